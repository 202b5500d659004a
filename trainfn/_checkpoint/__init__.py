"""A state on disk: safetensors and JSON, leaves by name, no pickle.

::

    runs/a/                            what `Checkpoints` looks after
      checkpoint-20/                   what `save` writes and `restore` reads
        model.safetensors              the module's own names; sharded, with an index, above `max_shard_size`
        state.safetensors              all else: step, key, optimizer state, extra; a leaf's name is its path
        config.json                    if the module has one as transformers' models do
        rank-1-of-4.safetensors        of a state that is split over ranks: the pieces that one of them wrote
        manifest.json                  written last: size and SHA-256 of each file, every leaf, and of itself

A folder is written beside its place, flushed, and renamed into it: one that has its name is complete. Reading order:
`_format.py` (what is in the files), `_write.py`, `_read.py`, `_store.py` (when, how many, which one); of a state on
several ranks `_pieces.py` (which part of a leaf is where) and `_spread.py` (who writes it).
"""

from trainfn._checkpoint._api import manifest as manifest
from trainfn._checkpoint._api import ranks_of as ranks_of
from trainfn._checkpoint._api import restore as restore
from trainfn._checkpoint._api import save as save
from trainfn._checkpoint._format import Manifest as Manifest
from trainfn._checkpoint._store import Checkpoints as Checkpoints
