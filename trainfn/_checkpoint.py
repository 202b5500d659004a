"""A state on disk: safetensors and JSON, leaves by name, no pickle.

::

    path/
      model.safetensors   parameters and buffers, under the names the module gives them
      state.safetensors   all else: step, key, optimizer state, extra; a leaf's name is its path
      state.json          format version and step
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainfn import tree
from trainfn._compile._donate import check_alive
from trainfn._types import TrainState
from trainfn.errors import CheckpointError

_FORMAT = 1
_Named = dict[str, Any]


def save(path: str | os.PathLike[str], state: TrainState) -> None:
    """Write a state to the folder ``path``; one that exists is replaced once the new one is complete.

    Raises:
        TypeError: If a leaf of the state is no tensor.

    >>> import tempfile, torch, trainfn as tfn
    >>> state = tfn.init(torch.nn.Linear(2, 1), tfn.optim.adam(1e-3))
    >>> folder = tempfile.mkdtemp() + "/checkpoint"
    >>> save(folder, state)
    >>> tfn.restore(folder, like=state)
    TrainState(Linear, step=0, params=2 tensors / 3 numbers)
    """
    check_alive(state)
    model, rest = _named(state)
    for name, leaf in rest.items():
        if not isinstance(leaf, Tensor):
            raise TypeError(f"save(path, state): state.{name} is {leaf!r}, not a tensor. Make it `torch.tensor(...)`.")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.writing-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        save_file(_storable(model), beside / "model.safetensors", metadata={"format": "pt"})
        save_file(_storable(rest), beside / "state.safetensors")
        (beside / "state.json").write_text(json.dumps({"format": _FORMAT, "step": int(state.step)}) + "\n")
        for file in beside.iterdir():
            _flush(file)
        _replace(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def restore(path: str | os.PathLike[str], *, like: TrainState) -> TrainState:
    """Read the state in the folder ``path``, in the structure and on the devices of ``like``.

    Args:
        path: What `save` was given.
        like: A state of the same model and optimizer, as `init` makes it. It is not changed.

    Raises:
        CheckpointError: If it can't be read; or naming each leaf that is missing, unexpected, or of another shape or
            dtype.
    """
    check_alive(like)
    source = Path(path)
    if not (source / "state.json").is_file():
        raise CheckpointError(f"restore({str(path)!r}): no checkpoint there (no state.json). `tfn.save` writes one.")
    try:
        found_format = json.loads((source / "state.json").read_text())["format"]
        found = (load_file(source / "model.safetensors"), load_file(source / "state.safetensors"))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"restore({str(path)!r}): the checkpoint is damaged: {error}") from error
    if found_format != _FORMAT:
        raise CheckpointError(
            f"restore({str(path)!r}): format {found_format}; this version of trainfn reads {_FORMAT}."
        )
    expected = _named(like)
    problems = [problem for have, want in zip(found, expected, strict=True) for problem in _problems(have, want)]
    if problems:
        more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(
            f"restore({str(path)!r}, like=state): the checkpoint does not fit the state:\n  "
            + "\n  ".join(problems[:20]) + more + "\nBuild `like` with the model and optimizer that wrote it."
        )  # fmt: skip
    model, rest = found
    params = {name: _as(model[name], p) for name, p in like.params.items()}
    buffers = {name: _as(model[name], b) for name, b in like.buffers.items()}
    filled = {name: _as(rest[name], leaf) for name, leaf in expected[1].items()}
    return tree.with_leaves(_without_model(like), filled)._replace(params=params, buffers=buffers)


def _named(state: TrainState) -> tuple[_Named, _Named]:
    """The module's tensors by their names, and the other leaves by their paths."""
    return {**state.params, **state.buffers}, tree.named_leaves(_without_model(state))


def _without_model(state: TrainState) -> TrainState:
    return state._replace(params={}, buffers={})


def _problems(found: _Named, expected: _Named) -> list[str]:
    problems = [f"missing in the checkpoint: {name}" for name in expected if name not in found]
    problems += [f"not in the state: {name}" for name in found if name not in expected]
    for name, want in expected.items():
        have = found.get(name, want)
        if have.shape != want.shape:
            problems.append(f"shape of {name}: {list(have.shape)} in the checkpoint, {list(want.shape)} in the state")
        elif have.dtype != want.dtype:
            problems.append(f"dtype of {name}: {have.dtype} in the checkpoint, {want.dtype} in the state")
    return problems


def _storable(named: _Named) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, each with memory of its own."""
    cpu = {name: leaf.detach().cpu().contiguous() for name, leaf in named.items()}
    whole = {name: t.untyped_storage().nbytes() == t.numel() * t.element_size() for name, t in cpu.items()}
    owners = {t.untyped_storage().data_ptr(): name for name, t in cpu.items()}
    return {n: t if whole[n] and owners[t.untyped_storage().data_ptr()] == n else t.clone() for n, t in cpu.items()}


def _as(value: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like).copy_(value)  # keeps device and memory format


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _replace(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    old = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    target.rename(old)
    new.rename(target)
    shutil.rmtree(old)
