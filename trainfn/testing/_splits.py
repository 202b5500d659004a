"""Splits of a batch into micro-batches on ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from trainfn import tree
from trainfn._types import Batch


class Piece(NamedTuple):
    """A micro-batch.

    Attributes:
        batch: Its rows.
        first_row: The index of the first of them in the whole batch.
    """

    batch: Batch
    first_row: int


class Split(NamedTuple):
    """The rows of each part: for each rank, the sizes of its micro-batches, in the order of the rows.

    >>> Split(((2, 1), (1,)))
    rank 0: rows 0-1 | row 2; rank 1: row 3
    """

    ranks: tuple[tuple[int, ...], ...]

    def __repr__(self) -> str:
        said: list[str] = []
        first = 0
        for sizes in self.ranks:
            starts = [first + sum(sizes[:i]) for i in range(len(sizes))]
            said.append(" | ".join(_rows(start, size) for start, size in zip(starts, sizes, strict=True)) or "no rows")
            first += sum(sizes)
        return said[0] if len(said) == 1 else "; ".join(f"rank {i}: {text}" for i, text in enumerate(said))

    def pieces(self, batch: Batch, pad: Mapping[str, float] | None = None) -> list[list[Piece]]:
        """Cut a batch: for each rank, its micro-batches.

        Args:
            batch: Tensors whose first dimension is the row; what has no rows goes to every piece.
            pad: By leaf name, the value that makes a row count for nothing, such as ``{"labels": -100}``. If it is
                given, each rank's last micro-batch is padded until all ranks have equally many rows.

        >>> import torch
        >>> [[piece.batch.tolist() for piece in rank] for rank in Split(((2,), (1,))).pieces(torch.arange(3))]
        [[[0, 1]], [[2]]]
        """
        first, cut = 0, list[list[Piece]]()
        longest = max(sum(sizes) for sizes in self.ranks)
        for sizes in self.ranks:
            mine: list[Piece] = []
            for i, size in enumerate(sizes):
                piece = take(batch, range(first, first + size))
                if pad is not None and i == len(sizes) - 1:
                    piece = padded(piece, longest - sum(sizes), pad)
                mine.append(Piece(piece, first))
                first += size
            cut.append(mine)
        return cut


def _rows(first: int, size: int) -> str:
    return f"row {first}" if size == 1 else f"rows {first}-{first + size - 1}"


def take(batch: Batch, rows: Any) -> Batch:
    """The given rows of a batch."""
    index = torch.tensor(list(rows), dtype=torch.int64)
    return tree.map(lambda x: x[index.to(x.device)] if isinstance(x, Tensor) and x.dim() > 0 else x, batch)


def check_pad(batch: Batch, pad: Mapping[str, float]) -> None:
    """Whether the batch has the leaves that ``pad`` names."""
    names = tree.named_leaves(batch).keys()
    if strange := sorted(pad.keys() - names):
        raise ValueError(f"pad={dict(pad)!r}: the batch has no leaf {strange[0]!r}. Its leaves are {sorted(names)}.")


def padded(batch: Batch, more: int, pad: Mapping[str, float]) -> Batch:
    """A batch with ``more`` rows that count for nothing, made of its first row and the values of ``pad``."""
    check_pad(batch, pad)
    if more == 0:
        return batch
    whole = take(batch, [*range(tree.row_count(batch)), *[0] * more])
    named = tree.named_leaves(whole)
    for name, value in pad.items():
        named[name] = named[name].clone()
        named[name][-more:] = value
    return tree.with_leaves(whole, named)


def splits(batch: Batch | int, *, ranks: int = 1, min_pieces: int = 1) -> SearchStrategy[Split]:
    """Strategy: every way to cut a batch into micro-batches, on up to ``ranks`` ranks; shrinks to fewer cuts.

    Args:
        batch: The batch, or its number of rows.
        ranks: The most ranks.
        min_pieces: The fewest micro-batches, all ranks together; no more than there are rows.

    Raises:
        ValueError: If there are fewer rows than pieces.

    >>> from hypothesis import given
    >>> @given(splits(4, ranks=2))
    ... def test(split):
    ...     assert sum(map(sum, split.ranks)) == 4
    >>> test()
    """
    rows = batch if isinstance(batch, int) else tree.row_count(batch)
    if rows < min_pieces:
        raise ValueError(f"splits(batch, min_pieces={min_pieces}): the batch has {rows} rows, one piece needs one.")
    cuts = st.integers(min_pieces, rows).flatmap(lambda pieces: _composition(rows, pieces))
    return cuts.flatmap(lambda sizes: _on_ranks(sizes, ranks))


def _composition(total: int, parts: int) -> SearchStrategy[tuple[int, ...]]:
    inner = st.lists(st.integers(1, total - 1), min_size=parts - 1, max_size=parts - 1, unique=True) if total > 1 else (
        st.just(list[int]())
    )  # fmt: skip
    return inner.map(lambda cuts: tuple(b - a for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), total], strict=True)))


def _on_ranks(sizes: tuple[int, ...], ranks: int) -> SearchStrategy[Split]:
    if ranks == 1:
        return st.just(Split((sizes,)))
    most = min(ranks, len(sizes))
    grouped = st.integers(min(2, most), most).flatmap(lambda parts: _composition(len(sizes), parts))
    return grouped.map(lambda counts: Split(tuple(_chunks(sizes, counts))))


def _chunks(sizes: tuple[int, ...], counts: tuple[int, ...]) -> list[tuple[int, ...]]:
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [sizes[start : start + count] for start, count in zip(starts, counts, strict=True)]
