"""One checkpoint: written, and read into a state."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from trainfn import tree
from trainfn._checkpoint import _disk, _leaves
from trainfn._checkpoint._contents import SHARD, contents_of
from trainfn._checkpoint._fit import Only, Rename, fit
from trainfn._checkpoint._format import Manifest
from trainfn._checkpoint._read import inspect, read_leaves
from trainfn._checkpoint._write import sweep, write
from trainfn._compile._donate import check_alive
from trainfn._dtensor import is_distributed
from trainfn._ranks import _group
from trainfn._ranks._group import ALONE, Ranks
from trainfn._types import TrainState


def save(path: str | os.PathLike[str], state: TrainState, *, max_shard_size: int = SHARD, full: bool = False) -> None:
    """Write a state to the folder ``path``; one that exists is replaced once the new one is complete.

    ``path/model.safetensors`` holds the module's tensors under its own names; where the module has a transformers
    config, that is written too, and ``from_pretrained(path)`` reads the folder.

    A state that `trainfn.shard` laid out is saved by all ranks, which call this together: each writes its part into a
    file of its own, all at once. `restore` reads it in any other layout, or in one process. If parameters are split,
    there is no ``model.safetensors``, unless ``full=True``.

    Args:
        path: The folder, on a disk that all ranks share.
        state: The state.
        max_shard_size: Bytes above which the model is split into several files, with an index.
        full: Whether rank 0 writes what one process would write, as FULL_STATE_DICT has it: every leaf is gathered, one
            at a time.

    Raises:
        CheckpointError: If it can't be written: the disk is full, say. What was there before is still there. On ranks,
            all raise the error of any.
        TypeError: If a leaf of the state is no tensor, or of a kind that a file can't hold.

    >>> import tempfile, torch, trainfn as tfn
    >>> state = tfn.init(torch.nn.Linear(2, 1), tfn.optim.adam(1e-3))
    >>> folder = tempfile.mkdtemp() + "/checkpoint"
    >>> save(folder, state)
    >>> tfn.restore(folder, like=state)
    TrainState(Linear, step=0, params=2 tensors / 3 numbers)
    """
    ranks = ranks_of(state)
    call = "save(path, state)"
    contents = ranks.agreed(
        lambda: contents_of(state, call, max_shard_size=max_shard_size, full=full, ranks=ranks)
    )  # fmt: skip
    target = Path(path)

    def prepare() -> None:
        _disk.make_folders(target.parent)
        sweep(target.parent, re.escape(target.name))

    write(target, contents, ranks, prepare)


def ranks_of(state: TrainState) -> Ranks:
    """Those that a state is laid out over: they call together what is called on it."""
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

    How the checkpoint was laid out does not matter: written by any number of ranks, it is read in the layout of
    ``like``, each rank reading the files that hold something of its part. If ``like`` is laid out, all ranks call this
    together.

    Args:
        path: What `save` was given.
        like: A state of the same model and optimizer, as `init` makes it. It is not changed.
        strict: Whether everything must fit. If not, what does not is left as in ``like``, and a warning names it.
        only: The leaves to fill, the others being left as in ``like``: a regular expression that is searched in their
            names, a list of names, or a function of a name.
        rename: What the checkpoint's leaves are called in the state: ``{"old": "new"}``, where ``old`` begins a name or
            one of its parts between slashes; or a function from name to name.

    Raises:
        CheckpointError: If it can't be read, naming the file and the damage; or naming each leaf that is missing,
            unexpected, or of another shape or dtype.
        ValueError: If ``only`` or ``rename`` choose nothing.
    """
    check_alive(like)
    ranks = ranks_of(like)
    call = f"restore({str(path)!r}, like=state)"
    expected = _leaves.named(like, call)

    def found() -> tuple[Path, Manifest]:
        folder = _disk.located(Path(path))
        return folder, inspect(folder)

    folder, manifest = ranks.first(found)
    sources = fit(call, manifest.tree, expected, strict=strict, only=only, rename=rename)
    return ranks.agreed(lambda: filled(folder, manifest, like, expected, sources))


def filled(
    folder: Path, manifest: Manifest, like: TrainState, expected: dict[str, Tensor], sources: dict[str, str]
) -> TrainState:
    """``like`` with the leaves named in ``sources`` from the checkpoint, and copies of the others."""
    values: dict[str, Any] = read_leaves(folder, manifest, {old: expected[new] for new, old in sources.items()})
    found = {new: values[old] for new, old in sources.items()}
    kept = {name: leaf.detach().clone() for name, leaf in expected.items() if name not in found}
    return _leaves.refilled(like, {**kept, **found})


def manifest(path: str | os.PathLike[str]) -> Manifest:
    """What is known of the checkpoint in the folder ``path`` without its values: step, metrics, leaves, ``extra``.

    Raises:
        CheckpointError: If there is none, or it is damaged.

    >>> import tempfile, torch, trainfn as tfn
    >>> folder = tempfile.mkdtemp() + "/checkpoint"
    >>> save(folder, tfn.init({"w": torch.ones(2)}, tfn.optim.sgd(0.1)))
    >>> manifest(folder).step, sorted(manifest(folder).tree)
    (0, ['key', 'model/w', 'step'])
    """
    return inspect(_disk.located(Path(path)))
