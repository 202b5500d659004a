"""A state on disk: safetensors and JSON, leaves by name, no pickle.

::

    runs/a/                            what `Checkpoints` looks after
      checkpoint-20/                   what `save` writes and `restore` reads
        model.safetensors              the module's own names; sharded, with an index, above `max_shard_size`
        state.safetensors              all else: step, key, optimizer state, extra; a leaf's name is its path
        config.json                    if the module has one as transformers' models do
        manifest.json                  written last: size and SHA-256 of each file, every leaf, and of itself

A folder is written beside its place, flushed, and renamed into it: one that has its name is complete. Reading order:
`_format.py` (what is in the files), `_write.py`, `_read.py`, `_store.py` (when, how many, which one).
"""

from trainfn._checkpoint._api import manifest as manifest
from trainfn._checkpoint._api import restore as restore
from trainfn._checkpoint._api import save as save
from trainfn._checkpoint._format import Manifest as Manifest
from trainfn._checkpoint._store import Checkpoints as Checkpoints
