"""`mixture`: several samplers as one, in exact proportions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar

import numpy as np

from trainfn.data import _bits
from trainfn.data._bits import Ints
from trainfn.data._sampler import Sampler, seeded


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Blocks of slots; each source gets its share of a block, and a permutation says which slots of it.

    ``shares`` are the cumulative proportions, exact fractions as (numerator, denominator), the last one 1. After b
    blocks the first k sources together have ``floor(b * block * shares[k])`` slots. So no source is off by more than
    one row at the end of a block. Where block b of a source starts is known without counting.
    """

    kind: ClassVar[str] = "mixture"
    mixable: ClassVar[bool] = True
    sources: tuple[Sampler, ...]
    shares: tuple[tuple[int, int], ...]
    block: int
    seed: int

    @property
    def size(self) -> None:
        """There are no epochs."""

    @property
    def num_rows(self) -> int:
        """The rows of all sources."""
        return sum(sampler.num_rows for sampler in self.sources)

    def at(self, epoch: int, slots: Ints) -> tuple[Ints, Ints]:
        """See `Order`. A batch is not larger than a block, so it touches two at most."""
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
        for k, sampler in enumerate(self.sources):
            mine = which == k
            position = start[k + 1] - start[k] + (drawn[mine] - cuts[k])
            rows[mine], visits[mine] = endless(sampler, position)
            rows[mine] += offset
            offset += sampler.num_rows
        return rows, visits

    def _taken(self, blocks: int) -> list[int]:
        """Slots of the first 0, 1, 2, … sources in so many blocks, in integers of any size."""
        return [0, *(blocks * self.block * top // bottom for top, bottom in self.shares)]


def endless(sampler: Sampler, positions: Ints) -> tuple[Ints, Ints]:
    """The rows and visits at these positions of all epochs of a sampler, one behind the other."""
    if sampler.order.size is None:
        return sampler.order.at(0, positions)
    rows, visits = np.empty_like(positions), np.empty_like(positions)
    epochs, slots = np.divmod(positions, sampler.order.size)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        rows[here], visits[here] = sampler.order.at(epoch, slots[here])
    return rows, visits


def mixture(samplers: Sequence[Sampler], weights: Sequence[float], *, seed: int) -> Sampler:
    """Batches with rows of several datasets in fixed proportions; each dataset starts again when it has ended.

    The proportions are exact, not expected: over any number of whole blocks each dataset has its share, to within
    one row. Within a block chance decides which slots are whose, so a `sequential` source keeps its order from block
    to block only. There are no epochs. The sampler's indices are rows of the datasets put one behind the other, as by
    `trainfn.data.concat`.

    Args:
        samplers: One sampler per dataset, all with the batch size of the mixture. Their ``last`` does not matter: the
            rows run on into the next epoch.
        weights: The proportions, positive; they need not add up to 1.
        seed: Any 64-bit integer.

    Raises:
        ValueError: If batch sizes differ, a weight is not positive, or a sampler arranges whole batches.

    >>> import trainfn as tfn
    >>> code, text = tfn.data.sequential(100, 10), tfn.data.sequential(1000, 10)
    >>> sampler = mixture([code, text], [0.3, 0.7], seed=0)
    >>> [int((sampler.indices(step) < 100).sum()) for step in (0, 1, 10_000_000)]
    [3, 3, 3]
    """
    call = "mixture(samplers, weights)"
    if not samplers or len(samplers) != len(weights):
        raise ValueError(
            f"`{call}` got {len(samplers)} samplers and {len(weights)} weights: give one weight per sampler."
        )
    for sampler in samplers:
        if not sampler.order.mixable or sampler.packing is not None:
            kind = "packed" if sampler.packing is not None else sampler.order.kind
            raise ValueError(
                f"`{call}`: the sampler `{kind}` arranges whole batches, which mixing would take apart. Use"
                " `shuffled` for this source."
            )
    sizes = sorted({sampler.batch_size for sampler in samplers})
    if len(sizes) > 1:
        raise ValueError(f"`{call}`: samplers with batch sizes {sizes}; give all of them the mixture's, {sizes[-1]}.")
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(
            f"`{call}`: weights={list(weights)} must be positive and finite; leave out a sampler of weight 0."
        )
    return Sampler(_order(tuple(samplers), weights, sizes[0], seeded(call, seed)), sizes[0])


def _order(samplers: tuple[Sampler, ...], weights: Sequence[float], batch_size: int, seed: int) -> Mixture:
    exact = [Fraction(str(weight)) for weight in weights]  # 0.7 is 7/10, as it was written
    parts = [weight / sum(exact) for weight in exact]
    shares = [sum(parts[: k + 1], Fraction(0)) for k in range(len(parts))]
    # A block with a slot or more for each source keeps the counts from ever decreasing: floor(x + d) - floor(x)
    # differs from d by less than 1.
    block = max(batch_size, math.ceil(1 / min(parts)))
    return Mixture(samplers, tuple((share.numerator, share.denominator) for share in shares), block, seed)
