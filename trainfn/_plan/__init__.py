"""Plans: the same pure step on N ranks."""

from trainfn._plan._agree import agreed as agreed
from trainfn._plan._agree import check_together as check_together
from trainfn._plan._agree import divided as divided
from trainfn._plan._agree import plan_of as plan_of
from trainfn._plan._layout import Precision as Precision
from trainfn._plan._layout import rank as rank
from trainfn._plan._place import gather as gather
from trainfn._plan._place import shard as shard
from trainfn._plan._plan import Plan as Plan
