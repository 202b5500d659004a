"""`packed`: several short rows in one, with nothing leaking from one into the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainfn.data._bits import Ints
from trainfn.data._orders import Shuffled
from trainfn.data._sampler import Last, Sampler, column, natural, seeded

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
    """The rows of each pack: pack k is ``rows[starts[k] : starts[k + 1]]``, and how they become one row.

    >>> packing = packed([3, 1, 2], 4, 1, seed=0).packing
    >>> [packing.members(k).tolist() for k in range(2)]
    [[0, 1], [2]]
    """

    rows: Ints = dataclasses.field(repr=False)
    starts: Ints = dataclasses.field(repr=False)
    length: int
    fill: float  # the share of the packs' places that rows take
    join: Callable[[Sequence[Row], int], Any]

    def members(self, pack: int) -> Ints:
        """The rows of a pack, in their order."""
        return self.rows[self.starts[pack] : self.starts[pack + 1]]


def packed(
    lengths: Any,
    length: int,
    batch_size: int,
    *,
    seed: int,
    last: Last = "drop",
    join: Callable[[Sequence[Row], int], Any] | None = None,
) -> Sampler:
    """Rows packed into rows of ``length``, by best fit decreasing; the packs are shuffled in each epoch.

    The packs are made once: a second for a million rows, and 16 bytes per row. The sampler's indices
    are packs; a `loader` reads a pack's rows, applies its ``transform`` to each and joins them.

    Args:
        lengths: The length of each row, ``int[rows]``, from 1 to ``length``, after the loader's transform.
        length: The length of a pack.
        batch_size: Packs of a global batch.
        seed: Any 64-bit integer.
        last: See `Sampler`.
        join: ``(rows, length) -> row``; `pack_rows` by default.

    Raises:
        ValueError: If a row does not fit a pack, or is empty.

    Source: best fit decreasing, as in Ding et al.: "Fewer truncations improve language modeling", ICML 2024.

    >>> sampler = packed([3, 1, 2, 2], 4, 2, seed=0)
    >>> sampler.steps_per_epoch, sampler.packing.fill
    (1, 1.0)
    """
    call = f"packed(lengths, length={length!r})"
    array = column(call, "lengths", lengths, np.int64)
    length = natural(call, "length", length)
    if array.min() < 1 or array.max() > length:
        raise ValueError(
            f"`{call}`: {int((array > length).sum())} rows are longer than a pack (the longest: {int(array.max())}) and"
            f" {int((array < 1).sum())} are empty. Cut the rows with `transform=`, pass np.minimum(lengths, {length}),"
            " and leave empty rows out of the dataset."
        )
    pack_of_row, packs = _best_fit(array, length)
    rows = np.argsort(pack_of_row, kind="stable").astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(np.bincount(pack_of_row, minlength=packs))]).astype(np.int64)
    fill = float(array.sum()) / (packs * length)
    packing = Packing(rows, starts, length, fill, pack_rows if join is None else join)
    return Sampler(Shuffled(packs, seeded(call, seed)), batch_size, last, packing)


def _best_fit(lengths: Ints, length: int) -> tuple[Ints, int]:
    """The pack of each row and the number of packs: longest rows first, each where the least room is left.

    Rows of one length are placed together, so the work grows with the number of lengths, not of rows. A pack with room
    r takes ``r // size`` of them at once.
    """
    by_length = np.argsort(-lengths, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(lengths[by_length]), 1)) + 1
    pack_of_row = np.empty_like(lengths)
    room: list[list[int]] = [[] for _ in range(length + 1)]  # packs by the room left in them
    packs = start = 0
    for end in ends.tolist():
        rows, start = by_length[start:end], end
        size = int(lengths[rows[0]])
        for left in [left for left in range(size, length) if room[left]]:
            if len(rows):
                needed = -(-len(rows) // (left // size))
                chosen = room[left][-needed:]
                del room[left][-needed:]
                rows = _place(rows, chosen, left, size, room, pack_of_row)
        if len(rows):
            new = range(packs, packs + -(-len(rows) // (length // size)))
            packs = new.stop
            _place(rows, list(new), length, size, room, pack_of_row)
    return pack_of_row, packs


def _place(rows: Ints, chosen: list[int], left: int, size: int, room: list[list[int]], pack_of_row: Ints) -> Ints:
    """Fill the chosen packs, with room ``left``, with rows of this size; return the rows that are left over."""
    each = left // size
    placed = min(len(rows), each * len(chosen))
    pack_of_row[rows[:placed]] = np.repeat(chosen, each)[:placed]
    in_last = placed - each * (len(chosen) - 1)
    room[left - each * size].extend(chosen[:-1])
    room[left - in_last * size].append(chosen[-1])
    return rows[placed:]


def pack_rows(
    rows: Sequence[Row], length: int, *, pad: Mapping[str, float] | None = None, ignore_index: int = -100
) -> dict[str, Tensor]:
    """Join the rows of a pack into one row of ``length``, with what keeps them apart.

    Each field of the rows is a sequence of tokens, or one number per token. The result has them joined and padded, and

    * ``labels``: the rows' own, or their ``input_ids``; the first token of each row is ignored, as no token predicts
      it, and so is the padding;
    * ``position_ids``: 0, 1, 2, … anew in each row, and in the padding;
    * ``segment_ids``: 1 for the first row, 2 for the second, …, and 0 for the padding: attention is allowed where
      they are equal.

    An ``attention_mask`` of the rows is left out: `segment_ids` say it better.

    Args:
        rows: Mappings with ``input_ids`` and fields of the same length.
        length: The length of the result.
        pad: What fills up each field, by name; 0 for those not named.
        ignore_index: The label of what is not predicted.

    Raises:
        ValueError: If the fields of a row differ in length, or the rows don't fit.

    >>> row = pack_rows([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}], 6)
    >>> row["labels"].tolist(), row["segment_ids"].tolist()
    ([-100, 6, 7, -100, 9, -100], [1, 1, 1, 2, 2, 0])
    >>> row["position_ids"].tolist()
    [0, 1, 2, 0, 1, 0]
    """
    fields = [{name: torch.as_tensor(row[name]) for name in row if name != "attention_mask"} for row in rows]
    sizes = [len(_tokens(row)) for row in fields]
    for row, size in zip(fields, sizes, strict=True):
        if any(x.dim() == 0 or len(x) != size for x in row.values()):
            shapes = {name: list(x.shape) for name, x in row.items()}
            raise ValueError(f"pack_rows: the fields of a row must have one length, and have {shapes}. Drop the others"
                             " with `transform=`.")  # fmt: skip
        labels = row.get("labels", row["input_ids"]).clone()
        labels[:1] = ignore_index
        row["labels"] = labels
        row["position_ids"] = torch.arange(size)
    if sum(sizes) > length:
        raise ValueError(
            f"pack_rows: rows of lengths {sizes} don't fit into {length}. The lengths that the sampler was made of,"
            " `packed(lengths, ...)`, must be those of the transformed rows."
        )
    values = {"labels": ignore_index, **(pad or {})}
    out = {name: _joined([row[name] for row in fields], length, values.get(name, 0)) for name in fields[0]}
    out["segment_ids"] = _joined([torch.full((size,), k + 1) for k, size in enumerate(sizes)], length, 0)
    return out


def _tokens(row: Row) -> Tensor:
    if "input_ids" not in row:
        raise ValueError(f"pack_rows: a row has the fields {sorted(row)} and no `input_ids`. Pass your own function,"
                         " packed(..., join=my_join), or add them with `transform=`.")  # fmt: skip
    return row["input_ids"]


def _joined(parts: Sequence[Tensor], length: int, value: float) -> Tensor:
    joined = torch.cat(list(parts))
    return torch.cat([joined, joined.new_full((length - len(joined), *joined.shape[1:]), value)])
