"""From a batch's rows to the batch: the part that a loader and a stream share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainfn._types import Batch
from trainfn.data import _seeding
from trainfn.data._bits import Ints, Words
from trainfn.data._collate import Collate
from trainfn.data._sampler import Rows, filled

Transform = Callable[..., Any]
_OURS = "trainfn.data._collate"  # collate functions from here draw nothing


def check_share(call: str, batch_size: int, last: str, rank: int, world: int) -> None:
    """Whether every rank gets batches of one shape."""
    if not 0 <= rank < world:
        raise ValueError(f"`{call}`: ranks go from 0 to world - 1 = {world - 1}.")
    if world > 1 and (last == "short" or (last == "drop" and batch_size % world)):
        raise ValueError(
            f"`{call}`: with batch_size={batch_size} and last={last!r}, ranks would get batches of different shapes."
            f' Use last="pad", or batch_size={-(-batch_size // world) * world} with last="drop".'
        )


def share(rows: Rows, batch_size: int, rank: int, world: int, even: bool = True) -> tuple[Rows, int]:
    """A rank's rows of a global batch, and the place of the first among them."""
    if world == 1:
        return rows, 0
    if not even:
        each, more = divmod(len(rows.indices), world)
        first = rank * each + min(rank, more)
        mine = slice(first, first + each + (rank < more))
        return rows.part(mine), first
    each = -(-batch_size // world)
    first = rank * each
    everything = filled(rows.indices, rows.visits, each * world)  # the global batch divides, or is padded
    weights = np.zeros(each * world, np.float32)
    weights[: len(rows.weights)] = rows.weights
    mine = slice(first, first + each)
    return Rows(everything.indices[mine], weights[mine], everything.visits[mine]), first


def collated(collate: Collate, rows: Sequence[Any], seed: int, step: int, first_row: int) -> Batch:
    """The batch; what a collate function that isn't ours draws is keyed, see `_seeding.collating`."""
    if getattr(collate, "func", collate).__module__ == _OURS:
        return collate(rows)
    with _seeding.collating(seed, step, len(rows), first_row):
        batch = collate(rows)
    # The `BatchEncoding` of transformers is a mapping but no dict, and so one leaf of a tree.
    return dict(batch) if isinstance(batch, Mapping) and not isinstance(batch, dict) else batch


def weighted(batch: Batch, weights: npt.NDArray[np.float32], name: str) -> Batch:
    """The batch with the rows' weights: a new field of a dict, a new last item of a tuple."""
    values = torch.from_numpy(weights)
    if isinstance(batch, Mapping):
        if name in batch:
            raise ValueError(
                f'loader(...) with last="pad" adds the rows\' weights as {name!r}, which the batch already has. Say'
                ' weights="row_weights", for example.'
            )
        return {**batch, name: values}
    if isinstance(batch, tuple) and not hasattr(batch, "_fields"):
        return (*batch, values)
    raise TypeError(
        f'loader(...) with last="pad" adds the rows\' weights to a batch, which must be a dict or a tuple, not a'
        f" {type(batch).__name__}. Write transform=lambda x: {{'x': x}}."
    )


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name, such as the ``key`` that replaces seeded generators."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in functions hide their signature
        return False


def transformed(
    transform: Transform | None, read: Callable[[int], Any], rows: Ints, keys: Words, *, seeding: bool
) -> list[Any]:
    """Read and transform the rows of a batch, each under its own key; ``read`` takes the row's place among them."""
    keyed = transform is not None and takes(transform, "key")
    out: list[Any] = []
    with _seeding.borrowed() as seed:
        for place, key in enumerate(keys):
            if seeding:
                seed(key)
            try:
                row = read(place)
                if transform is not None:
                    row = transform(row, key=_seeding.as_tensor(key)) if keyed else transform(row)
            except Exception as error:
                error.add_note(f"In row {rows[place]}.")
                raise
            out.append(row)
    return out
