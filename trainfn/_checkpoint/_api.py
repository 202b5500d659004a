"""One checkpoint: save a state, restore it, look at it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from trainfn import tree
from trainfn._checkpoint import _disk, _leaves
from trainfn._checkpoint._contents import SHARD, contents_of
from trainfn._checkpoint._format import Manifest
from trainfn._checkpoint._leaves import Only, Rename, matched
from trainfn._checkpoint._read import filled, inspect
from trainfn._checkpoint._write import sweep, write
from trainfn._compile._donate import check_alive
from trainfn._dtensor import is_distributed
from trainfn._ranks import _group
from trainfn._ranks._group import ALONE, Ranks
from trainfn._reached import settled_like
from trainfn._types import TrainState


def save(path: str | os.PathLike[str], state: TrainState, *, max_shard_size: int = SHARD, full: bool = False) -> None:
    """Write a state to the folder ``path``; one that exists is replaced once the new one is complete.

    ``path/model.safetensors`` holds the module's tensors under its own names; where the module has a transformers
    config, that is written too, and ``from_pretrained(path)`` reads the folder.

    All ranks call this together for a sharded state. Each writes its part into a file of its own, at the same time.
    `restore` reads it in any other layout, or in one process. If parameters are split, there is no
    ``model.safetensors``, unless ``full=True``.

    Args:
        path: The folder, on a disk that all ranks share.
        state: The state.
        max_shard_size: Bytes above which the model is split into several files, with an index.
        full: Whether rank 0 writes the files that one process would write (FSDP's FULL_STATE_DICT). Every leaf is
            gathered, one at a time.

    Raises:
        CheckpointError: If it can't be written, for example to a full disk. The folder is as it was before. An error on
            one rank is raised on all.
        TypeError: If a leaf of the state is not a tensor, or has a dtype or a layout that a file can't hold.

    >>> import tempfile, torch, trainfn as tfn
    >>> state = tfn.init(torch.nn.Linear(2, 1), tfn.optim.adam(1e-3))
    >>> folder = tempfile.mkdtemp() + "/checkpoint"
    >>> save(folder, state)
    >>> tfn.restore(folder, like=state)
    TrainState(Linear, step=0, params=2 tensors / 3 numbers)
    """
    ranks = ranks_of(state)
    call = "save(path, state)"
    state = _leaves.alike(state, ranks)
    contents = ranks.agreed(
        lambda: contents_of(state, call, max_shard_size=max_shard_size, full=full, ranks=ranks)
    )  # fmt: skip
    target = Path(path)

    def prepare() -> None:
        _disk.make_folders(target.parent)
        sweep(target.parent, re.escape(target.name))

    write(target, contents, ranks, prepare)


def ranks_of(state: TrainState) -> Ranks:
    """The processes that hold a state and save it together: all of the job if a leaf is distributed, else this one."""
    return _group.ranks() if any(map(is_distributed, tree.leaves(state))) else ALONE


def restore(
    path: str | os.PathLike[str],
    *,
    like: TrainState,
    strict: bool = True,
    only: Only = None,
    rename: Rename = None,
) -> TrainState:
    """Read the state in the folder ``path``, in the structure and on the devices of ``like``.

    Leaves are chosen and renamed by name: ``model/<name in the module>`` for parameters and buffers, and for the rest
    the path: ``step``, ``opt_state/0/mu/<name>``.

    A checkpoint of any number of ranks is read in the layout of ``like``. If ``like`` is sharded, all ranks call this
    together, and each reads the files that hold a piece of its part.

    Args:
        path: The folder given to `save`.
        like: A state of the same model and optimizer, as `init` makes it. It is not changed.
        strict: Whether every leaf must fit. Otherwise a leaf that doesn't fit stays as in ``like``, and a warning names
            it.
        only: The leaves to fill: a regular expression searched in their names, a list of names, or a function of a
            name. The others stay as in ``like``.
        rename: The name in the state of each of the checkpoint's leaves: ``{"old": "new"}``, where ``old`` begins a
            name or one of its parts between slashes; or a function from name to name.

    Raises:
        CheckpointError: If a file can't be read or is damaged, with its name; or if leaves are missing, unexpected or
            of another shape or dtype, with their names.
        ValueError: If ``only`` or ``rename`` match no leaf.
    """
    check_alive(like)
    ranks = ranks_of(like)
    call = f"restore({str(path)!r}, like=state)"

    def found() -> tuple[Path, Manifest]:
        folder = _disk.located(Path(path))
        return folder, inspect(folder)

    folder, manifest = ranks.first(found)
    like = settled_like(like, manifest.tree)
    expected = _leaves.named(like, call)
    sources = matched(call, manifest.tree, expected, strict=strict, only=only, rename=rename)
    return ranks.agreed(lambda: filled(folder, manifest, like, expected, sources))


def manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read everything of the checkpoint in the folder ``path`` but its values: step, metrics, leaves, ``extra``.

    Raises:
        CheckpointError: If there is no checkpoint, or it is damaged.

    >>> import tempfile, torch, trainfn as tfn
    >>> folder = tempfile.mkdtemp() + "/checkpoint"
    >>> save(folder, tfn.init({"w": torch.ones(2)}, tfn.optim.sgd(0.1)))
    >>> manifest(folder).step, sorted(manifest(folder).tree)
    (0, ['key', 'model/w', 'step'])
    """
    return inspect(_disk.located(Path(path)))
