"""Plans: the same pure step on N ranks."""

from trainfn._plan._apply import first_rows as first_rows
from trainfn._plan._batches import aligned as aligned
from trainfn._plan._batches import check_same_run as check_same_run
from trainfn._plan._batches import divided as divided
from trainfn._plan._batches import plan_of as plan_of
from trainfn._plan._layout import Precision as Precision
from trainfn._plan._layout import rank as rank
from trainfn._plan._no_rows import NoRows as NoRows
from trainfn._plan._no_rows import is_empty as is_empty
from trainfn._plan._no_rows import no_rows as no_rows
from trainfn._plan._place import gather as gather
from trainfn._plan._place import shard as shard
from trainfn._plan._plan import Plan as Plan
