"""Pack several rows into one, and collate rows into a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import datasets
from torch import Tensor

import trainfn as tfn
from trainfn.hf._types import Row

IGNORED = -100
D = TypeVar("D", datasets.Dataset, datasets.IterableDataset)
Columns: TypeAlias = dict[str, list[list[int]]]


def pack_dataset(dataset: D, seq_length: int, strategy: str = "bfd") -> D:
    """Pack several rows into one, within each thousand rows.

    Args:
        dataset: Rows of lists; the lists of one row have the same length.
        seq_length: The length of a pack.
        strategy: ``"bfd"`` is best fit decreasing, and cuts longer rows. ``"bfd_split"`` makes further rows of their
            rests. ``"wrapped"`` joins all rows, and cuts anywhere. The first two add the column ``seq_lengths``.

    >>> import datasets
    >>> rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10], [11]]})
    >>> pack_dataset(rows, 4)[:]
    {'input_ids': [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7]], 'seq_lengths': [[4], [3, 1], [2]]}
    >>> pack_dataset(rows, 4, "bfd_split")["input_ids"][:]
    [[1, 2, 3, 4], [8, 9, 10, 5], [6, 7, 11]]
    """
    function = _wrap if strategy == "wrapped" else _best_fit
    options = {"length": seq_length} if strategy == "wrapped" else {"length": seq_length, "split": strategy != "bfd"}
    return dataset.map(function, batched=True, fn_kwargs=options, remove_columns=dataset.column_names)


def _wrap(batch: Columns, length: int) -> Columns:
    joined = {name: [value for row in rows for value in row] for name, rows in batch.items()}
    return {name: [row[n : n + length] for n in range(0, len(row), length)] for name, row in joined.items()}


def _best_fit(batch: Columns, length: int, split: bool) -> Columns:
    sizes = [len(row) for row in next(iter(batch.values()))]
    cuts = [(row, n) for row, size in enumerate(sizes) for n in range(0, size if split else min(size, 1), length)]
    pieces = {name: [rows[row][n : n + length] for row, n in cuts] for name, rows in batch.items()}
    sizes = [len(piece) for piece in next(iter(pieces.values()))]
    packing = tfn.data.packed(sizes, length, 1, seed=0).packing
    assert packing is not None
    # The longest first, as in trl.
    packs = [sorted(packing.members(k).tolist(), key=lambda i: (-sizes[i], i)) for k in range(len(packing.starts) - 1)]
    out = {name: [[x for i in pack for x in rows[i]] for pack in packs] for name, rows in pieces.items()}
    return {**out, "seq_lengths": [[sizes[i] for i in pack] for pack in packs]}


# --- batches ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SFTCollator:
    """The function from rows of tokens to a padded batch; packs also get the positions of their sequences.

    A padded batch has an ``attention_mask``. A batch of packs has ``position_ids``, which begin anew in each sequence,
    and ``segment_ids``, the number of the sequence in its row, 0 for padding.

    Attributes:
        pad_token_id: The token that fills up the rows.
        multiple_of: The number of which the length of a batch is a multiple.
        flatten: Whether to join all sequences of a batch into one row.
        flatten_packs: Whether to do so for packs.
        masks: The columns that say which tokens of a row without labels are learnt.
    """

    pad_token_id: int
    multiple_of: int = 1
    flatten: bool = False
    flatten_packs: bool = False
    masks: tuple[str, ...] = ()

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return the batch."""
        packs = "seq_lengths" in rows[0]
        if not packs and not self.flatten:
            pad = {"input_ids": self.pad_token_id, "labels": IGNORED}
            collate = tfn.data.pad_collate(pad, multiple_of=self.multiple_of, mask="attention_mask")
            return collate([self._labelled(row) for row in rows])
        sequences = [_sequences(row, self._labelled(row)) for row in rows]
        if self.flatten or self.flatten_packs:
            sequences = [[sequence for row in sequences for sequence in row]]
        longest = max(sum(len(sequence["input_ids"]) for sequence in row) for row in sequences)
        length = -(-longest // self.multiple_of) * self.multiple_of
        pad = {"input_ids": self.pad_token_id}
        return tfn.data.stack([tfn.data.pack_rows(row, length, pad=pad) for row in sequences])

    def _labelled(self, row: Row) -> dict[str, Sequence[int]]:
        ids = row["input_ids"]
        return {"input_ids": ids, "labels": row["labels"] if "labels" in row else masked(ids, row, self.masks)}


def masked(ids: Sequence[int], row: Row, masks: Sequence[str]) -> list[int]:
    """Return the labels of a row of tokens: each token that all of the row's masks keep.

    Raises:
        ValueError: If a mask has another length.
    """
    present = [name for name in masks if name in row]
    for name in present:
        if len(row[name]) != len(ids):
            raise ValueError(
                f"SFTTrainer: a row has {len(ids)} input_ids and {len(row[name])} values of {name!r}, but each token"
                f" needs one. Correct the column {name!r}."
            )
    learnt = (
        [all(bits) for bits in zip(*(row[name] for name in present), strict=True)] if present else [True] * len(ids)
    )
    return [token if bit else IGNORED for token, bit in zip(ids, learnt, strict=True)]


def _sequences(row: Row, whole: dict[str, Sequence[int]]) -> list[dict[str, Sequence[int]]]:
    start: int = 0
    out: list[dict[str, Sequence[int]]] = []
    for size in row.get("seq_lengths", [len(row["input_ids"])]):
        out.append({name: values[start : start + size] for name, values in whole.items()})
        start += size
    return out
