"""Plans: the same pure step on N ranks."""

from trainfn._plan._layout import Precision as Precision
from trainfn._plan._place import gather as gather
from trainfn._plan._place import shard as shard
from trainfn._plan._plan import Plan as Plan
