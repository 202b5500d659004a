"""Torch's random functions inside a step, drawn from the state's key."""

from trainfn._keyed._composites import COMPOSITES as COMPOSITES
from trainfn._keyed._draws import Draws as Draws
from trainfn._keyed._draws import keyed as keyed
from trainfn._keyed._functions import HANDLERS as HANDLERS
from trainfn._keyed._functions import draws as draws
from trainfn._keyed._steps import Randomness as Randomness
from trainfn._keyed._steps import phases as phases
