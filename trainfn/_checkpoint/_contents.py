"""The plan of one save, made before its first byte: which leaf goes into which file, and which rank writes it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from trainfn._checkpoint import _leaves
from trainfn._checkpoint._format import CODES, MANIFEST, MODEL, NAME, OWN, STATE_FILE, Leaf, Manifest, Piece
from trainfn._checkpoint._pieces import holders, is_split, local
from trainfn._compile._donate import check_alive
from trainfn._ranks._group import ALONE, Ranks
from trainfn._types import Mean, TrainState

SHARD = 5 * 10**9  # bytes, as in transformers


class Contents(NamedTuple):
    """Everything that one rank writes, but the checksums.

    Attributes:
        leaves: The leaves that this rank writes, or its parts of them; if ``full``, every leaf.
        manifest: Its ``files`` are filled in once they are written.
        texts: The contents of the other files.
        mine: The files of leaves that this rank writes.
        full: Whether each leaf has yet to be gathered, which all ranks take part in.
        adopt: The folder that the caller has begun to fill, if there is one; it becomes the checkpoint.
    """

    leaves: Mapping[str, Tensor]
    manifest: Manifest
    texts: dict[str, bytes]
    mine: tuple[str, ...]
    full: bool = False
    adopt: Path | None = None

    @property
    def nbytes(self) -> int:
        """About the size of the checkpoint on the disk."""
        return sum(leaf.nbytes for leaf in self.manifest.tree.values())


def contents_of(
    state: TrainState,
    call: str,
    *,
    max_shard_size: int = SHARD,
    extra: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    files: Mapping[str, str | bytes] | None = None,
    full: bool = False,
    model: bool = True,
    adopt: Path | None = None,
    ranks: Ranks = ALONE,
) -> Contents:
    """The contents of a save of ``state`` on this rank; errors begin with ``call``.

    Without ``model``, or with a folder to ``adopt``, the module's leaves are beside the others, and no file looks like
    a model's.
    """
    check_alive(state)
    leaves = _leaves.named(state, call)
    full = full and ranks.size > 1
    split = {name: leaf for name, leaf in leaves.items() if is_split(leaf) and ranks.size > 1 and not full}
    model = model and adopt is None
    places, texts = _files(state, leaves, max_shard_size, set(split)) if model else (_beside(leaves, set(split)), {})
    pieces, writers = spread(split, leaves, places, ranks.size)
    tree = {
        name: Leaf(_code(leaf, name, call), tuple(leaf.shape), places[name], pieces.get(name, ()))
        for name, leaf in leaves.items()
    }
    config = getattr(state.module, "config", None)
    if model and callable(getattr(config, "to_json_string", None)):
        texts["config.json"] = _config(config, type(state.module).__name__)
    for name, text in (files or {}).items():
        if not NAME.fullmatch(name) or name == MANIFEST or OWN.fullmatch(name):
            raise ValueError(
                f"{call}: files={{{name!r}: ...}} is not a valid name for a file beside the state's own."
                " Take letters, digits, '.', '_' and '-', in a folder or not; and not the name of a file of the state."
            )
        texts[name] = text.encode() if isinstance(text, str) else text
    plain = json.loads(_json_text(dict(extra or {}), call))  # a copy, which the user can't change any more
    numbers = {name: _number(value, name, call) for name, value in (metrics or {}).items()}
    manifest = Manifest(int(state.step), numbers, {}, tree, plain, _versions())
    if full:
        return Contents(leaves, manifest, texts, tuple(writers) if ranks.rank == 0 else (), full, adopt)
    mine = tuple(file for file, writer in writers.items() if writer == ranks.rank)
    held = {name: local(leaves[name]) for leaves_of in map(manifest.by_file().get, mine) for name in leaves_of or ()}
    return Contents(held, manifest, texts, mine, adopt=adopt)


def _versions() -> dict[str, str]:
    ours = getattr(sys.modules["trainfn"], "__version__", "unknown")  # above this layer, so not imported
    return {"trainfn": str(ours), "torch": str(torch.__version__)}


def _code(leaf: Tensor, name: str, call: str) -> str:
    if leaf.dtype not in CODES:
        raise TypeError(
            f"{call}: {name!r} is of {leaf.dtype}, which safetensors files can't hold. Keep it in another dtype, such"
            f" as {'`torch.view_as_real(x)`' if leaf.is_complex() else '`x.float()`'}."
        )
    return CODES[leaf.dtype]


# --- files --------------------------------------------------------------------------------------------------------


def _files(
    state: TrainState, leaves: dict[str, Tensor], max_shard_size: int, split: set[str]
) -> tuple[dict[str, str], dict[str, bytes]]:
    """The file of each leaf that is not split, and the index of a model in several files.

    A model with a split leaf has no file of its own: a file with the other leaves would look like the full model.
    """
    unsaved = _leaves.unsaved_buffers(state)
    model = [name for name in leaves if name.startswith(MODEL) and name not in unsaved]
    files = _beside(leaves, split)
    if not split.isdisjoint(model):
        return files, {}
    shards = _shards({name: leaves[name].nbytes for name in model}, max_shard_size)
    for i, shard in enumerate(shards):
        of = f"-{i + 1:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        files.update(dict.fromkeys(shard, f"model{of}.safetensors"))
    if len(shards) < 2:
        return files, {}
    total = {
        "total_parameters": sum(leaves[name].numel() for name in model),
        "total_size": sum(leaves[name].nbytes for name in model),
    }
    placed = {name.removeprefix(MODEL): files[name] for name in sorted(model)}
    text = json.dumps({"metadata": total, "weight_map": placed}, indent=2) + "\n"
    return files, {"model.safetensors.index.json": text.encode()}


def _beside(leaves: dict[str, Tensor], split: set[str]) -> dict[str, str]:
    """The one file of all leaves that are not split."""
    return {name: "" if name in split else STATE_FILE for name in leaves}


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """The names in order, in shards below the limit; a leaf larger than the limit has a shard of its own."""
    shards: list[list[str]] = []
    room = -1
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _config(config: Any, architecture: str) -> bytes:
    found = json.loads(config.to_json_string())
    if not found.get("architectures"):
        found["architectures"] = [architecture]  # as `save_pretrained` does
    return (json.dumps(found, indent=2, sort_keys=True) + "\n").encode()


# --- which rank writes what -----------------------------------------------------------------------------------------


def spread(
    split: Mapping[str, Tensor], leaves: Mapping[str, Tensor], places: Mapping[str, str], ranks: int
) -> tuple[dict[str, tuple[Piece, ...]], dict[str, int]]:
    """The pieces of each split leaf, and the rank that writes each file, so that all ranks write at the same time.

    Each part of a leaf is written once, by the rank among its holders that has the least to write. Every rank computes
    the same result, so nothing is exchanged.
    """
    load = [0] * ranks
    pieces: dict[str, tuple[Piece, ...]] = {}
    writers: dict[str, int] = {}
    for name, leaf in split.items():
        found: list[Piece] = []
        for box, having in holders(leaf).items():
            rank = min(having, key=lambda r: (load[r], r))
            load[rank] += box.numel * leaf.dtype.itemsize
            found.append(Piece(f"rank-{rank}-of-{ranks}.safetensors", box.offsets, box.shape))
            writers[found[-1].file] = rank
        pieces[name] = tuple(found)
    sizes: dict[str, int] = {}
    for name, file in places.items():
        if file:
            sizes[file] = sizes.get(file, 0) + leaves[name].numel() * leaves[name].dtype.itemsize
    for file, size in sizes.items():  # every rank holds these leaves, so any rank can write them
        rank = min(range(ranks), key=lambda r: (load[r], r))
        load[rank] += size
        writers[file] = rank
    return pieces, writers


# --- what the user adds -------------------------------------------------------------------------------------------


def _json_text(extra: dict[str, Any], call: str) -> str:
    try:
        _check_plain(extra, "extra", call)
        return json.dumps(extra)
    except RecursionError:
        raise ValueError(
            f"{call}: extra is nested too deep, or contains itself, which JSON can't write. Give a few levels of dicts"
            " and lists."
        ) from None


def _check_plain(value: Any, path: str, call: str) -> None:
    """Raise unless JSON returns the value as it was; Python's JSON does so for infinities and NaN."""
    if isinstance(value, dict):
        for name, item in cast("dict[Any, Any]", value).items():
            if not isinstance(name, str):
                raise TypeError(f"{call}: {path} has the key {name!r}; keys of JSON are strings. Use `str({name!r})`.")
            _check_plain(item, f"{path}[{name!r}]", call)
    elif isinstance(value, list):
        for i, item in enumerate(cast("list[Any]", value)):
            _check_plain(item, f"{path}[{i}]", call)
    elif not isinstance(value, str | int | float | None):
        hint = "a tuple comes back as a list: make it one" if isinstance(value, tuple) else "put tensors into the state"
        raise TypeError(
            f"{call}: {path} is a {type(value).__name__}, which JSON can't return as it was. Give dicts, lists,"
            f" strings, numbers, True, False and None ({hint})."
        )


def _number(value: Any, name: str, call: str) -> float:
    try:
        return float(value.value if isinstance(value, Mean) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{call}: metrics[{name!r}] is {value!r}, not a number, and checkpoints are compared by numbers. Give one,"
            " such as `float(x)`."
        ) from error
