"""Data: which rows a step sees, how they are read, and how they become a batch. Each is a function of numbers.

::

    sampler.rows(step) ──▶ indices, weights ──▶ read ▸ transform ▸ collate ──▶ batch
         ▲                    │                        ▲
    (seed, step, sampler)     └── this rank's part     └── randomness keyed by (seed, epoch, row)

====================== ================================================== ======================================
sampler                a step sees                                        it keeps
====================== ================================================== ======================================
`sequential`           the next rows, in the dataset's order              nothing
`shuffled`             the next rows of this epoch's permutation          nothing
`weighted`             draws with replacement                             8 bytes per row
`grouped_by_length`    shuffled rows of similar lengths                   8 bytes per row
`bucketed`             rows of one bucket                                 8 bytes per row
`mixture`              rows of several datasets, in exact proportions     nothing of its own
`packed`               packs of short rows, each joined into one          16 bytes per row
====================== ================================================== ======================================

A sampler answers for any step, past or future, at the same cost, on any machine with the same bits. It knows nothing
of ranks or workers. A `loader` reads the rows of a dataset by number: ``loader(n)`` is batch n, ``loader.start(n)``
iterates from there. `stream` does the same for data that can only be iterated. So a run resumes at step n by asking for
it.

Reading order: `_sampler.py`, `_orders.py`, `_loader.py`; `_bits.py` holds the permutation.
"""

from trainfn._plan import NoRows as NoRows
from trainfn._plan import is_empty as is_empty
from trainfn._plan import no_rows as no_rows
from trainfn.data._collate import pad_collate as pad_collate
from trainfn.data._collate import stack as stack
from trainfn.data._lengths import bucketed as bucketed
from trainfn.data._lengths import grouped_by_length as grouped_by_length
from trainfn.data._loader import Loader as Loader
from trainfn.data._loader import loader as loader
from trainfn.data._mixture import mixture as mixture
from trainfn.data._orders import sequential as sequential
from trainfn.data._orders import shuffled as shuffled
from trainfn.data._orders import weighted as weighted
from trainfn.data._packing import Packing as Packing
from trainfn.data._packing import pack_rows as pack_rows
from trainfn.data._packing import packed as packed
from trainfn.data._reading import Reading as Reading
from trainfn.data._reading import has_state as has_state
from trainfn.data._rows import concat as concat
from trainfn.data._sampler import Rows as Rows
from trainfn.data._sampler import Sampler as Sampler
from trainfn.data._stream import Stream as Stream
from trainfn.data._stream import stream as stream
