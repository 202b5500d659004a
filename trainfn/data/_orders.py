"""The plain orders: `sequential`, `shuffled`, `weighted`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from trainfn.data import _bits
from trainfn.data._bits import Ints
from trainfn.data._sampler import Last, Sampler, column, natural, seeded


@dataclasses.dataclass(frozen=True, eq=False)
class Sequential:
    """Row i in slot i."""

    kind: ClassVar[str] = "sequential"
    mixable: ClassVar[bool] = True
    num_rows: int

    @property
    def seed(self) -> int:
        """There is no chance in it."""
        return 0

    @property
    def size(self) -> int:
        """An epoch is every row once."""
        return self.num_rows

    def at(self, epoch: int, slots: Ints) -> tuple[Ints, Ints]:
        """See `Order`."""
        return slots, np.full_like(slots, epoch)


@dataclasses.dataclass(frozen=True, eq=False)
class Shuffled:
    """A permutation of its own for each epoch."""

    kind: ClassVar[str] = "shuffled"
    mixable: ClassVar[bool] = True
    num_rows: int
    seed: int

    @property
    def size(self) -> int:
        """An epoch is every row once."""
        return self.num_rows

    def at(self, epoch: int, slots: Ints) -> tuple[Ints, Ints]:
        """See `Order`."""
        key = _bits.fold_in(_bits.key(self.seed), epoch)
        return _bits.permute(key, self.num_rows, slots), np.full_like(slots, epoch)


@dataclasses.dataclass(frozen=True, eq=False)
class Weighted:
    """Draws with replacement, by the inverse of the cumulative distribution."""

    kind: ClassVar[str] = "weighted"
    mixable: ClassVar[bool] = True
    cumulative: npt.NDArray[np.float64] = dataclasses.field(repr=False)
    size: int
    seed: int

    @property
    def num_rows(self) -> int:
        """One weight per row."""
        return len(self.cumulative)

    def at(self, epoch: int, slots: Ints) -> tuple[Ints, Ints]:
        """See `Order`. The visit is the number of the draw: rows that come twice differ in their randomness."""
        draws = epoch * self.size + slots
        unit = (_bits.bits(_bits.key(self.seed), draws) >> np.uint64(11)) * 2.0**-53
        total = self.cumulative[-1]
        point = np.minimum(unit * total, np.nextafter(total, 0))  # the product may round up to the total
        # From the right, so that a row of weight 0, which adds no width, is never met.
        return np.searchsorted(self.cumulative, point, side="right").astype(np.int64), draws


def sequential(num_rows: int, batch_size: int, *, last: Last = "drop") -> Sampler:
    """Rows in the order of the dataset, again in every epoch.

    Args:
        num_rows: Rows of the dataset.
        batch_size: Rows of a global batch.
        last: See `Sampler`. For evaluation use ``"pad"``: equal shapes, exact results.

    Raises:
        ValueError: If no batch comes out.

    >>> sampler = sequential(5, 2, last="short")
    >>> [sampler.indices(step).tolist() for step in range(4)]
    [[0, 1], [2, 3], [4], [0, 1]]
    """
    num_rows = natural(f"sequential(num_rows={num_rows!r})", "num_rows", num_rows)
    return Sampler(Sequential(num_rows), batch_size, last)


def shuffled(num_rows: int, batch_size: int, *, seed: int, last: Last = "drop") -> Sampler:
    """Every row once an epoch, in an order that is new in each.

    Nothing is stored: a keyed permutation says which row stands where, for a trillion rows as for ten.

    Args:
        num_rows: Rows of the dataset.
        batch_size: Rows of a global batch.
        seed: Any 64-bit integer.
        last: See `Sampler`. What ``"drop"`` leaves out differs from epoch to epoch.

    Raises:
        ValueError: If no batch comes out.

    >>> sampler = shuffled(10**12, 3, seed=0)
    >>> sampler.indices(10_000_000).shape
    (3,)
    >>> epoch = [shuffled(6, 2, seed=1).indices(step).tolist() for step in range(3)]
    >>> sorted(sum(epoch, []))
    [0, 1, 2, 3, 4, 5]
    """
    num_rows = natural(f"shuffled(num_rows={num_rows!r})", "num_rows", num_rows)
    return Sampler(Shuffled(num_rows, seeded("shuffled(num_rows, batch_size)", seed)), batch_size, last)


def weighted(
    weights: Any, batch_size: int, *, seed: int, rows_per_epoch: int | None = None, last: Last = "drop"
) -> Sampler:
    """Draws with replacement; a row is drawn with probability ``weight / sum of weights``.

    Keeps 8 bytes per row, and finds a batch in O(batch_size * log(rows)).

    Args:
        weights: One number per row, 0 or more: a list, array or tensor ``[rows]``.
        batch_size: Rows of a global batch.
        seed: Any 64-bit integer.
        rows_per_epoch: What counts as an epoch; by default, as many draws as there are rows.
        last: See `Sampler`.

    Raises:
        ValueError: If a weight is negative or not finite, or all are 0.

    >>> sampler = weighted([0.0, 1.0, 0.0], 4, seed=0, rows_per_epoch=100)
    >>> sampler.indices(7).tolist(), sampler.steps_per_epoch
    ([1, 1, 1, 1], 25)
    """
    call = "weighted(weights, batch_size)"
    array = column(call, "weights", weights, np.float64)
    with np.errstate(over="ignore"):  # an infinite sum is refused below
        cumulative = np.cumsum(array)
    if not (array >= 0).all() or not 0 < cumulative[-1] < np.inf:
        raise ValueError(
            f"`{call}`: weights are finite, 0 or more, and not all 0; these go from {array.min()} to {array.max()}."
            " Write weights=np.exp(logits - logits.max()), for example."
        )
    size = natural(call, "rows_per_epoch", len(array) if rows_per_epoch is None else rows_per_epoch)
    return Sampler(Weighted(cumulative, size, seeded(call, seed)), batch_size, last)
