"""One checkpoint: written, and read into a state."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from trainfn._checkpoint import _disk, _leaves
from trainfn._checkpoint._contents import SHARD, contents_of
from trainfn._checkpoint._fit import Only, Rename, fit
from trainfn._checkpoint._format import Manifest
from trainfn._checkpoint._read import inspect, read_leaves
from trainfn._checkpoint._write import explained, sweep, write
from trainfn._compile._donate import check_alive
from trainfn._types import TrainState
from trainfn.errors import CheckpointError


def save(path: str | os.PathLike[str], state: TrainState, *, max_shard_size: int = SHARD) -> None:
    """Write a state to the folder ``path``; one that exists is replaced once the new one is complete.

    ``path/model.safetensors`` holds the module's tensors under its own names; where the module has a transformers
    config, that is written too, and ``from_pretrained(path)`` reads the folder.

    Args:
        path: The folder.
        state: The state.
        max_shard_size: Bytes above which the model is split into several files, with an index.

    Raises:
        CheckpointError: If it can't be written: the disk is full, say. What was there before is still there.
        TypeError: If a leaf of the state is no tensor, or of a kind that a file can't hold.

    >>> import tempfile, torch, trainfn as tfn
    >>> state = tfn.init(torch.nn.Linear(2, 1), tfn.optim.adam(1e-3))
    >>> folder = tempfile.mkdtemp() + "/checkpoint"
    >>> save(folder, state)
    >>> tfn.restore(folder, like=state)
    TrainState(Linear, step=0, params=2 tensors / 3 numbers)
    """
    contents = contents_of(state, "save(path, state)", max_shard_size=max_shard_size)
    target = Path(path)
    try:
        _disk.make_folders(target.parent)
    except OSError as error:
        raise CheckpointError(explained(error, target, contents.nbytes)) from error
    sweep(target.parent, re.escape(target.name))
    write(target, contents)


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
    folder = _disk.located(Path(path))
    call = f"restore({str(path)!r}, like=state)"
    expected = _leaves.named(like, call)
    manifest = inspect(folder)
    sources = fit(call, manifest.tree, expected, strict=strict, only=only, rename=rename)
    return filled(folder, manifest, like, expected, sources)


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
