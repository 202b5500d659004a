"""Gather the outputs of an evaluation from several ranks, in the order of the rows, each row once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_pt_utils import nested_numpify

from trainfn.hf._evaluation._concatenate import merged
from trainfn.hf._parallel._world import World
from trainfn.hf._types import Nested


def all_batches(world: World, places: list[int], fields: list[list[Nested] | None]) -> list[list[Nested] | None]:
    """Return, for each field, one tree of arrays a batch with the rows of all ranks; every rank calls this.

    One gather on the host, once an evaluation, of the bytes of all that is kept. Each rank computes the metrics from
    all rows, so that all ranks have the same metrics.

    Args:
        world: The processes of the run.
        places: The numbers of the batches of which this rank has rows.
        fields: The trees of this rank for these batches; None for a field that is not kept.
    """
    if world.plan is None:
        return fields
    found = world.of_parts((places, fields))
    count = max((place + 1 for theirs, _ in found for place in theirs), default=0)
    out: list[list[Nested] | None] = []
    for i in range(len(fields)):
        batches: list[list[Nested]] = [[] for _ in range(count)]
        for theirs, kept in found:
            for place, tree in zip(theirs, kept[i] or (), strict=False):
                batches[place].append(tree)
        full = [merged(pieces) for pieces in batches if pieces]
        out.append(full or None)
    return out


def one_batch(world: World, mine: Nested | None) -> Nested | None:
    """Return one batch with the rows of all ranks, as tensors; every rank calls this, once a batch.

    One gather on the host of the batch's bytes: `compute_metrics` must see the same rows as in one process.
    """
    if world.plan is None:
        return mine
    pieces = [piece for piece in world.of_parts(_arrays(mine)) if piece is not None]
    return _tensors(merged(pieces)) if pieces else None


def _arrays(tree: Nested) -> Nested:
    if isinstance(tree, Mapping):
        return {name: _arrays(value) for name, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_arrays(value) for value in tree)
    return nested_numpify(tree) if isinstance(tree, Tensor) else tree


def _tensors(tree: Nested) -> Nested:
    if isinstance(tree, dict):
        return {name: _tensors(value) for name, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_tensors(value) for value in tree)
    return torch.as_tensor(tree) if isinstance(tree, np.ndarray) else tree
