"""Orders by length or shape: `grouped_by_length`, `bucketed`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from trainfn.data import _bits
from trainfn.data._bits import Ints
from trainfn.data._sampler import Last, Sampler, column, natural, seeded


@dataclasses.dataclass(frozen=True, eq=False)
class GroupedByLength:
    """A permutation per epoch, each chunk of it sorted by length."""

    kind: ClassVar[str] = "grouped_by_length"
    mixable: ClassVar[bool] = False
    lengths: Ints = dataclasses.field(repr=False)
    chunk: int
    seed: int

    @property
    def num_rows(self) -> int:
        """One length per row."""
        return len(self.lengths)

    @property
    def size(self) -> int:
        """An epoch is every row once."""
        return len(self.lengths)

    def at(self, epoch: int, slots: Ints) -> tuple[Ints, Ints]:
        """See `Order`. All slots are in one chunk, since a chunk is a number of batches."""
        key = _bits.fold_in(_bits.key(self.seed), epoch)
        first = int(slots[0]) // self.chunk * self.chunk
        rows = self._shuffled(key, np.arange(first, min(first + self.chunk, self.num_rows)))
        ranked = rows[np.argsort(-self.lengths[rows], kind="stable")]
        return ranked[slots - first], np.full_like(slots, epoch)

    def _shuffled(self, key: _bits.Words, positions: Ints) -> Ints:
        """A permutation with the longest row of all in front, by one exchange: too little memory shows at once."""
        longest = int(np.argmax(self.lengths))
        rows = _bits.permute(key, self.num_rows, positions)
        displaced = _bits.permute(key, self.num_rows, np.zeros(1, np.int64))
        return np.where(positions == 0, longest, np.where(rows == longest, displaced, rows))


@dataclasses.dataclass(frozen=True, eq=False)
class Bucketed:
    """Batches of one bucket each, shuffled; inside a bucket rows are shuffled too.

    ``rows`` lists the rows bucket by bucket, ``starts[k]`` where bucket k begins, ``batches[k]`` how many batches come
    before it. A bucket's last batch may have empty slots.
    """

    kind: ClassVar[str] = "bucketed"
    mixable: ClassVar[bool] = False
    rows: Ints = dataclasses.field(repr=False)
    starts: Ints
    batches: Ints
    batch_size: int
    seed: int

    @property
    def num_rows(self) -> int:
        """Every row is in one bucket."""
        return len(self.rows)

    @property
    def size(self) -> int:
        """Slots, the empty ones included."""
        return int(self.batches[-1]) * self.batch_size

    def at(self, epoch: int, slots: Ints) -> tuple[Ints, Ints]:
        """See `Order`. The slots are one batch."""
        key = _bits.fold_in(_bits.key(self.seed), epoch)
        batch = int(_bits.permute(key, int(self.batches[-1]), slots[:1] // self.batch_size)[0])
        bucket = int(np.searchsorted(self.batches, batch, side="right")) - 1
        start, end = int(self.starts[bucket]), int(self.starts[bucket + 1])
        place = (batch - int(self.batches[bucket])) * self.batch_size + slots % self.batch_size
        taken = place < end - start
        rows = np.full_like(slots, -1)
        rows[taken] = self.rows[start + _bits.permute(_bits.fold_in(key, bucket + 1), end - start, place[taken])]
        return rows, np.full_like(slots, epoch)


def grouped_by_length(
    lengths: Any, batch_size: int, *, seed: int, mega_batch: int = 50, last: Last = "drop"
) -> Sampler:
    """Shuffled, yet rows of a batch have similar lengths, so padding is little.

    The rows are shuffled, cut into chunks of ``mega_batch`` batches, and each chunk is sorted, the longest row first.
    The first batch of an epoch holds the longest row of all. A step costs the sorting of one chunk.

    Args:
        lengths: The length of each row, ``int[rows]``.
        batch_size: Rows of a global batch.
        seed: Any 64-bit integer.
        mega_batch: Batches in a chunk: more of them mean less padding and less chance.
        last: See `Sampler`. What ``"drop"`` leaves out are the shortest rows of the last chunk.

    Raises:
        ValueError: If the lengths are not one number per row.

    Source: ``LengthGroupedSampler`` of Hugging Face transformers.

    >>> sampler = grouped_by_length([5, 1, 9, 1, 5, 9], 2, seed=0)
    >>> sorted(sampler.indices(0).tolist())
    [2, 5]
    """
    call = "grouped_by_length(lengths, batch_size)"
    array = column(call, "lengths", lengths, np.int64)
    chunk = natural(call, "mega_batch", mega_batch) * natural(call, "batch_size", batch_size)
    return Sampler(GroupedByLength(array, chunk, seeded(call, seed)), batch_size, last)


def bucketed(
    buckets: Any, batch_size: int, *, seed: int, boundaries: Sequence[int] | None = None, last: Last = "drop"
) -> Sampler:
    """Each batch comes from one bucket, such as rows of one shape: one compiled program per bucket, little padding.

    Rows are shuffled within their bucket and batches among each other, anew in each epoch. Keeps 8 bytes per row.

    Args:
        buckets: The bucket of each row, ``int[rows]``, any integers; or with ``boundaries``, its length.
        batch_size: Rows of a global batch.
        seed: Any 64-bit integer.
        boundaries: The greatest length in each bucket, increasing: ``(128, 256)`` makes two.
        last: See `Sampler`; it holds for each bucket, so ``"pad"`` and ``"short"`` may meet once per bucket.

    Raises:
        ValueError: If a row is longer than the last boundary, or ``"drop"`` would never show a bucket.

    >>> lengths = np.array([3, 90, 7, 100, 5, 4])
    >>> sampler = bucketed(lengths, 2, boundaries=(10, 100), seed=0)
    >>> sorted(int(lengths[sampler.indices(step)].max()) > 10 for step in range(3))
    [False, False, True]
    """
    call = f"bucketed(buckets, batch_size={batch_size!r}, last={last!r})"
    array = column(call, "buckets", buckets, np.int64)
    batch_size = natural(call, "batch_size", batch_size)
    if boundaries is not None:
        array = _between(call, array, np.asarray(boundaries, np.int64))
    names, counts = np.unique(array, return_counts=True)
    batches = counts // batch_size if last == "drop" else -(-counts // batch_size)
    if (batches == 0).any():
        small = {int(name): int(count) for name, count in zip(names, counts, strict=True) if count < batch_size}
        raise ValueError(
            f"`{call}` would never show the buckets with fewer rows than a batch, {small} (bucket: rows). Use"
            ' last="pad", which fills their batch with rows of weight 0, or fewer buckets.'
        )
    starts, firsts = (np.concatenate([[0], np.cumsum(x)]).astype(np.int64) for x in (counts, batches))
    rows = np.argsort(array, kind="stable").astype(np.int64)
    return Sampler(Bucketed(rows, starts, firsts, batch_size, seeded(call, seed)), batch_size, last)


def _between(call: str, lengths: Ints, boundaries: Ints) -> Ints:
    if boundaries.ndim != 1 or len(boundaries) == 0 or (np.diff(boundaries) <= 0).any():
        raise ValueError(f"`{call}`: boundaries={boundaries.tolist()} don't increase. Write (128, 256, 512).")
    if lengths.max() > boundaries[-1]:
        raise ValueError(
            f"`{call}`: {int((lengths > boundaries[-1]).sum())} rows are longer than the last boundary,"
            f" {int(boundaries[-1])}; the longest has {int(lengths.max())}. Add a boundary, or cut the rows and pass"
            f" np.minimum(lengths, {int(boundaries[-1])})."
        )
    return np.searchsorted(boundaries, lengths, side="left").astype(np.int64)
