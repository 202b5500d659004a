"""A state on disk: safetensors and JSON, leaves by name, no pickle.

::

    runs/a/                            the folder of a run: `Checkpoints`
      checkpoint-20/                   one checkpoint: `save` writes it, `restore` reads it
        model.safetensors              the module's tensors under its own names; several files above `max_shard_size`
        state.safetensors              all other leaves by their path: step, key, optimizer state, extra
        config.json                    the module's configuration, if it has one as transformers' models do
        rank-1-of-4.safetensors        the pieces of split leaves that one rank wrote
        manifest.json                  written last: size and SHA-256 of each file and of itself, and every leaf

A folder is written beside its place, flushed, and renamed into it: a folder with its final name is complete.

Each file uses those below it::

    _api       save, restore, manifest       _store     Checkpoints: when to save, in the background, how many to keep
                                             _folder    the checkpoints of one folder: which are good, which may go
    _write     all of a checkpoint, or none  _read      every byte is checked before it is believed
    _contents  which leaf goes into which file, and which rank writes it
    _snapshot  copies in host memory         _leaves    names of leaves; which one fills which
    _format    the bytes of the files
    _pieces    parts of a leaf, on ranks and in files
    _disk      each change of the file system; the lock
"""

from trainfn._checkpoint._api import manifest as manifest
from trainfn._checkpoint._api import ranks_of as ranks_of
from trainfn._checkpoint._api import restore as restore
from trainfn._checkpoint._api import save as save
from trainfn._checkpoint._format import Manifest as Manifest
from trainfn._checkpoint._store import Checkpoints as Checkpoints
