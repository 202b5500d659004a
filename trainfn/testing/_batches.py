"""Strategies for batches: trees of tensors whose first dimension is the row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis.strategies as st
import optree
import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from trainfn import random, tree
from trainfn._types import Batch
from trainfn.testing._splits import take

_DRAWN_ONE_BY_ONE = 64  # larger tensors come from one drawn seed: quick, though their values don't shrink
ROWS = (1, 6)


class Field(NamedTuple):
    """A leaf of a batch to be drawn: ``rows -> strategy of tensors``. See `floats`, `integers` and `masks`."""

    draw: Callable[[int], SearchStrategy[Tensor]]


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Field:
    """Numbers from -4 to 4 in halves, ``dtype[rows, *shape]``; large tensors are standard normal.

    >>> field = floats(8, dtype=torch.float64)
    """

    def draw(rows: int) -> SearchStrategy[Tensor]:
        size = (rows, *shape)
        if math.prod(size) > _DRAWN_ONE_BY_ONE:
            return _keys.map(lambda key: random.normal(key, size, dtype=dtype))
        return _elements(st.integers(-8, 8).map(lambda n: n / 2), size, dtype)

    return Field(draw)


def integers(low: int, high: int, *shape: int, or_else: int | None = None) -> Field:
    """Integers in ``[low, high)``, ``int64[rows, *shape]``, or now and then ``or_else``: an index to ignore.

    >>> field = integers(0, 10, or_else=-100)
    """

    def draw(rows: int) -> SearchStrategy[Tensor]:
        size = (rows, *shape)
        if math.prod(size) > _DRAWN_ONE_BY_ONE:
            return _keys.map(lambda key: _many(key, low, high, size, or_else))
        one = st.integers(low, high - 1)
        return _elements(one if or_else is None else st.one_of(one, st.just(or_else)), size, torch.int64)

    if high <= low:
        raise ValueError(f"integers({low}, {high}): the range is empty. `high` is exclusive.")
    return Field(draw)


def masks(*shape: int) -> Field:
    """``bool[rows, *shape]``; shrinks to all true.

    >>> field = masks(8)
    """
    return Field(lambda rows: integers(0, 2, *shape).draw(rows).map(lambda x: x == 0))


_keys = st.integers(0, 2**16).map(random.key)


def _elements(one: SearchStrategy[Any], size: tuple[int, ...], dtype: torch.dtype) -> SearchStrategy[Tensor]:
    count = math.prod(size)
    return st.lists(one, min_size=count, max_size=count).map(lambda v: torch.tensor(v, dtype=dtype).view(size))


def _many(key: Tensor, low: int, high: int, size: tuple[int, ...], or_else: int | None) -> Tensor:
    values, coins = random.split(key)
    drawn = random.randint(values, low, high, size)
    return drawn if or_else is None else torch.where(random.bernoulli(coins, 0.25, size), or_else, drawn)


def batches(spec: Any = None, *, rows: tuple[int, int] = ROWS) -> SearchStrategy[Batch]:
    """Strategy: batches of a given make; shrinks to few rows of small numbers.

    Args:
        spec: A tree of fields, such as ``{"x": floats(4), "y": integers(0, 3)}``. Or a batch: then its own rows are
            drawn, so that what belongs together stays together. By default ``{"x": float[rows, 4], "y":
            int[rows]}``, with three classes and -100 for targets to ignore.
        rows: The fewest and the most rows.

    Raises:
        ValueError: If a leaf is neither a field nor a tensor, or ``rows`` is empty.

    >>> from hypothesis import given
    >>> @given(batches({"x": floats(2), "y": integers(0, 3)}))
    ... def test(batch):
    ...     assert batch["x"].shape == (len(batch["y"]), 2)
    >>> test()
    """
    if not 1 <= rows[0] <= rows[1]:
        raise ValueError(f"batches(spec, rows={rows}): give the fewest and the most rows, such as (1, 6).")
    if spec is None:
        spec = {"x": floats(4), "y": integers(0, 3, or_else=-100)}
    leaves, structure = optree.tree_flatten(spec, is_leaf=lambda x: isinstance(x, Field))
    if any(isinstance(leaf, Tensor) for leaf in leaves):
        return picks(spec, rows).map(lambda index: take(spec, index))
    wrong = [leaf for leaf in leaves if not isinstance(leaf, Field)]
    if wrong:
        raise ValueError(
            f"batches(spec): {wrong[0]!r} is not a field. Write `tfn.testing.floats(4)`, `integers(0, 3)` or `masks()`"
            " for what to draw, or give a batch of tensors, whose rows are then drawn."
        )

    def draw(n: int) -> SearchStrategy[Batch]:
        drawn = st.tuples(*[leaf.draw(n) for leaf in leaves])
        return drawn.map(lambda values: optree.tree_unflatten(structure, values))

    return st.integers(*rows).flatmap(draw)


def picks(batch: Batch, rows: tuple[int, int]) -> SearchStrategy[tuple[int, ...]]:
    """Strategy: indices of rows of a batch; different ones, as long as there are enough."""
    count = tree.row_count(batch)
    distinct = count >= rows[0]
    most = min(rows[1], count) if distinct else rows[1]
    return st.lists(st.integers(0, count - 1), min_size=rows[0], max_size=most, unique=distinct).map(tuple)


def token_batches(
    *, vocab: int = 11, length: int = 6, rows: tuple[int, int] = ROWS, ignore_index: int = -100, pad_id: int = 0
) -> SearchStrategy[dict[str, Tensor]]:
    """Strategy: right-padded rows of tokens of unequal length, under the names that transformers uses.

    ``input_ids``, ``attention_mask`` and ``labels``, each ``int64[rows, length]``; where the mask is 0 the labels are
    ``ignore_index``. Every row has a token or more. Shrinks to short rows.

    >>> from hypothesis import given
    >>> @given(token_batches())
    ... def test(batch):
    ...     assert ((batch["labels"] == -100) == (batch["attention_mask"] == 0)).all()
    >>> test()
    """

    def draw(n: int) -> SearchStrategy[dict[str, Tensor]]:
        lengths = _elements(st.integers(1, length), (n, 1), torch.int64)
        return st.tuples(integers(0, vocab, length).draw(n), lengths).map(lambda drawn: _padded(*drawn))

    def _padded(tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        mask = torch.arange(length) < lengths
        return {
            "input_ids": tokens.where(mask, pad_id),
            "attention_mask": mask.long(),
            "labels": tokens.where(mask, ignore_index),
        }

    return st.integers(*rows).flatmap(draw)


def masked_batches(
    *, features: int = 4, length: int = 3, rows: tuple[int, int] = ROWS
) -> SearchStrategy[dict[str, Tensor]]:
    """Strategy: sequences of numbers with a target and a mask for each position.

    ``x`` is ``float32[rows, length, features]``, ``y`` ``float32[rows, length]``, ``mask`` ``bool[rows, length]``;
    rows may be masked altogether. Shrinks to nothing masked.

    >>> from hypothesis import given
    >>> @given(masked_batches())
    ... def test(batch):
    ...     assert batch["mask"].shape == batch["y"].shape
    >>> test()
    """
    return batches({"x": floats(length, features), "y": floats(length), "mask": masks(length)}, rows=rows)
