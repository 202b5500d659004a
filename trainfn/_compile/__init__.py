"""From a pure step to one compiled program."""

from trainfn._compile._buckets import Buckets as Buckets
from trainfn._compile._donate import is_alive as is_alive
from trainfn._compile._file import LoadedStep as LoadedStep
from trainfn._compile._file import load_step as load_step
from trainfn._compile._jit import Compiled as Compiled
from trainfn._compile._jit import jit as jit
from trainfn._compile._report import Report as Report
