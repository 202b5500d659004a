"""`mixture`: several plans as one, in exact proportions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar

import numpy as np

from trainfn.data import _bits
from trainfn.data._bits import Ints
from trainfn.data._plan import Plan, seeded


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Blocks of slots; each source gets its share of a block, and a permutation says which slots of it.

    ``shares`` are the cumulative proportions, exact fractions as (numerator, denominator), the last one 1. After b
    blocks the first k sources together have ``floor(b * block * shares[k])`` slots, so no source is ever off by more
    than one row at the end of a block, and where block b of a source starts is known without counting.
    """

    kind: ClassVar[str] = "mixture"
    mixable: ClassVar[bool] = True
    sources: tuple[Plan, ...]
    shares: tuple[tuple[int, int], ...]
    block: int
    seed: int

    @property
    def size(self) -> None:
        """There are no epochs."""

    @property
    def num_rows(self) -> int:
        """The rows of all sources."""
        return sum(plan.num_rows for plan in self.sources)

    def at(self, epoch: int, slots: Ints) -> tuple[Ints, Ints]:
        """See `Order`. A batch is no larger than a block, so it touches two at most."""
        out, visits = np.empty_like(slots), np.empty_like(slots)
        for block in np.unique(slots // self.block).tolist():
            here = slots // self.block == block
            out[here], visits[here] = self._block(block, slots[here] % self.block)
        return out, visits

    def _block(self, block: int, places: Ints) -> tuple[Ints, Ints]:
        """The rows and visits at these places of one block."""
        start, end = self._taken(block), self._taken(block + 1)
        cuts = np.array([b - a for a, b in zip(start, end, strict=True)])  # this block's places, source after source
        drawn = _bits.permute(_bits.fold_in(_bits.key(self.seed), block), self.block, places)
        which = np.searchsorted(cuts[1:], drawn, side="right")
        rows, visits, offset = np.empty_like(places), np.empty_like(places), 0
        for k, plan in enumerate(self.sources):
            mine = which == k
            position = start[k + 1] - start[k] + (drawn[mine] - cuts[k])
            rows[mine], visits[mine] = endless(plan, position)
            rows[mine] += offset
            offset += plan.num_rows
        return rows, visits

    def _taken(self, blocks: int) -> list[int]:
        """Slots of the first 0, 1, 2, … sources in so many blocks, in integers of any size."""
        return [0, *(blocks * self.block * top // bottom for top, bottom in self.shares)]


def endless(plan: Plan, positions: Ints) -> tuple[Ints, Ints]:
    """The rows and visits at these positions of all epochs of a plan, one behind the other."""
    if plan.order.size is None:
        return plan.order.at(0, positions)
    rows, visits = np.empty_like(positions), np.empty_like(positions)
    epochs, slots = np.divmod(positions, plan.order.size)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        rows[here], visits[here] = plan.order.at(epoch, slots[here])
    return rows, visits


def mixture(plans: Sequence[Plan], weights: Sequence[float], *, seed: int) -> Plan:
    """Batches with rows of several datasets in fixed proportions; each dataset starts again when it has ended.

    The proportions are exact, not expected: over any number of whole blocks each dataset has its share, to within
    one row. Within a block chance decides which slots are whose, so a `sequential` source keeps its order from block
    to block only. There are no epochs. The plan's indices are rows of the datasets put one behind the other, as by
    `trainfn.data.concat`.

    Args:
        plans: One plan per dataset, all with the batch size that the mixture will have. What they'd do with the last
            rows of an epoch doesn't matter here: the rows run on.
        weights: The proportions, positive; they need not add up to 1.
        seed: Any 64-bit integer.

    Raises:
        ValueError: If batch sizes differ, a weight is not positive, or a plan arranges whole batches.

    >>> import trainfn as tfn
    >>> code, text = tfn.data.sequential(100, 10), tfn.data.sequential(1000, 10)
    >>> plan = mixture([code, text], [0.3, 0.7], seed=0)
    >>> [int((plan.indices(step) < 100).sum()) for step in (0, 1, 10_000_000)]
    [3, 3, 3]
    """
    call = "mixture(plans, weights)"
    if not plans or len(plans) != len(weights):
        raise ValueError(f"`{call}` got {len(plans)} plans and {len(weights)} weights: give one weight per plan.")
    for plan in plans:
        if not plan.order.mixable or plan.packing is not None:
            kind = "packed" if plan.packing is not None else plan.order.kind
            raise ValueError(
                f"`{call}`: the plan `{kind}` arranges whole batches, which mixing would take apart. Use"
                " `shuffled` for this source."
            )
    sizes = sorted({plan.batch_size for plan in plans})
    if len(sizes) > 1:
        raise ValueError(f"`{call}`: plans with batch sizes {sizes}; give all of them the mixture's, {sizes[-1]}.")
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(
            f"`{call}`: weights={list(weights)} must be positive and finite; leave out a plan of weight 0."
        )
    return Plan(_order(tuple(plans), weights, sizes[0], seeded(call, seed)), sizes[0])


def _order(plans: tuple[Plan, ...], weights: Sequence[float], batch_size: int, seed: int) -> Mixture:
    exact = [Fraction(str(weight)) for weight in weights]  # 0.7 is 7/10, as it was written
    parts = [weight / sum(exact) for weight in exact]
    shares = [sum(parts[: k + 1], Fraction(0)) for k in range(len(parts))]
    # A block with a slot or more for each source keeps the counts from ever decreasing: floor(x + d) - floor(x)
    # differs from d by less than 1.
    block = max(batch_size, math.ceil(1 / min(parts)))
    return Mixture(plans, tuple((share.numerator, share.denominator) for share in shares), block, seed)
