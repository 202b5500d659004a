"""The sums of an evaluation over its batches, and over the ranks."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import trainfn as tfn
from trainfn.hf._parallel._world import World


class OfBatch(Protocol):
    """The values of a batch that are summed."""

    @property
    def loss(self) -> tfn.Mean | None: ...

    @property
    def rows(self) -> int: ...


class Totals(NamedTuple):
    """The sums over batches; tensors stay on the device, so that no batch waits for the one before."""

    loss: tfn.Mean | None = None  # summed in float64 where the device has it
    not_finite: Tensor | int = 0
    rows: int = 0
    batches: int = 0

    def plus(self, batch: OfBatch | None) -> Totals:
        if batch is None:
            return self._replace(batches=self.batches + 1)
        rows, batches = self.rows + batch.rows, self.batches + 1
        if batch.loss is None:
            return self._replace(rows=rows, batches=batches)
        dtype = torch.float32 if batch.loss.total.device.type == "mps" else torch.float64
        total = batch.loss.total.detach().to(dtype)
        mean = tfn.Mean(total, batch.loss.weight.detach().to(total))
        not_finite = self.not_finite + (~torch.isfinite(total)).any()
        return Totals(mean if self.loss is None else self.loss + mean, not_finite, rows, batches)

    def of_all(self, world: World) -> Totals:
        """Return the sums over all ranks; every rank calls this.

        Two gathers of a few numbers on the host, once an evaluation.
        """
        if world.plan is None:
            return self
        loss = _of_all(world, self.loss)
        not_finite, rows, batches = zip(*world.of_parts((int(self.not_finite), self.rows, self.batches)), strict=True)
        return Totals(loss, sum(not_finite), sum(rows), max(batches))

    def finish(self, prefix: str, *, sums: bool = False) -> dict[str, float]:
        """Return the loss by its key; an empty dict without a loss. A loss that ``sums`` is not divided."""
        if self.loss is None:
            return {}
        total, weight, not_finite = self.loss.total, self.loss.weight, int(self.not_finite)
        loss = float((total if sums else total / weight).sum())  # of one term, mostly; 0 / 0 is NaN
        if not math.isfinite(loss):
            reason = (
                f"the loss of {not_finite} of {self.batches} batches was NaN or infinite, and the mean includes it"
                if not_finite
                else f"no label of {self.batches} batches counts (all are -100), so there is nothing to take a mean of"
            )
            warnings.warn(f"`{prefix}_loss` is {loss}: {reason}.", tfn.errors.NonFiniteWarning, stacklevel=4)
        return {f"{prefix}_loss": loss}


def _of_all(world: World, mean: tfn.Mean | None) -> tfn.Mean | None:
    """Return the sum over all ranks of a mean, or of the means of several terms; every rank calls this."""
    terms = {} if mean is None else dict(enumerate(zip(mean.total.view(-1), mean.weight.view(-1), strict=True)))
    found = world.means({str(n): tfn.Mean(*pair) for n, pair in terms.items()})
    if not found:
        return None
    return tfn.Mean(*(torch.stack([each[i] for each in found.values()]) for i in (0, 1)))
