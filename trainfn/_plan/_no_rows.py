"""A rank without rows.

Ranks may have unequally many rows, and each must take part in every collective of a step. So a loader gives a batch of
no rows, `no_rows`, to a rank that has none. Most modules can't compute on 0 rows: softmax and BatchNorm make NaN of
them. The rank computes on rows that it has seen before instead, as `Idle`, and they count 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainfn import tree
from trainfn._types import Batch, Loss, Mean


class NoRows:
    """A batch of no rows, where the batch to imitate has no tensor to cut.

    >>> no_rows({"text": "a b c"})
    NoRows()
    """

    def __repr__(self) -> str:
        return "NoRows()"


def no_rows(batch: Batch) -> Batch:
    """Return a batch like this one with 0 rows, or `NoRows` if no leaf is an array.

    >>> no_rows({"x": torch.ones(3, 2)})
    {'x': tensor([], size=(0, 2))}
    """
    return tree.map(_cut, batch) if next(_arrays(batch), None) is not None else NoRows()


def _cut(leaf: Any) -> Any:
    if isinstance(leaf, Mapping):  # one that is not a dict, such as a `BatchEncoding`, is a leaf of a tree
        return {name: tree.map(_cut, value) for name, value in leaf.items()}
    return leaf[:0] if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim else leaf


def is_empty(batch: Batch) -> bool:
    """Return whether a batch has no rows; a batch without arrays counts as having some.

    >>> is_empty(no_rows({"x": torch.ones(3, 2)})), is_empty({"x": torch.ones(3, 2)})
    (True, False)
    """
    return isinstance(batch, NoRows) or next((len(leaf) == 0 for leaf in _arrays(batch)), False)


def _arrays(batch: Batch) -> Iterator[Any]:
    for leaf in tree.leaves(batch):
        if isinstance(leaf, Mapping):
            for value in leaf.values():
                yield from _arrays(value)
        elif isinstance(leaf, Tensor | np.ndarray) and leaf.ndim:
            yield leaf


class Idle(NamedTuple):
    """Rows that a rank computes on and that count 0, because it has none of its own.

    Attributes:
        rows: A batch of which only the shapes matter.
    """

    rows: Batch


def idle(loss: Loss) -> Loss:
    """Return the loss, which of `Idle` rows is 0 of weight 0."""

    def counted(model: Any, batch: Batch) -> Any:
        if not isinstance(batch, Idle):
            return loss(model, batch)
        out = loss(model, batch.rows)
        if isinstance(out, Tensor):  # a bare scalar is a mean over rows, of which there are none
            return Mean(out * 0.0, torch.zeros((), device=out.device))
        mean, metrics = out if isinstance(out, tuple) and not isinstance(out, Mean) else (out, None)
        nothing = _nothing(mean)
        return nothing if metrics is None else (nothing, {name: _nothing(m) for name, m in metrics.items()})

    return counted


def _nothing(mean: Mean) -> Mean:
    return mean.mapped(
        lambda m: Mean(m.total * 0.0, m.weight * 0.0)
    )  # a product, so that the backward pass runs its collectives
