"""`World`: the processes of a run, with the plan and the rows of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

import trainfn as tfn
from trainfn.launch import Ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run; by default one process without a plan.

    Attributes:
        plan: The plan of the step; None in one process.
        ranks: The processes, and their exchanges on the host.
        compile: The arguments of `tfn.jit` that a launcher was configured with.
        loss_scale: The arguments of `tfn.transforms.dynamic_loss_scale` from a DeepSpeed configuration.
        checkpointing: Whether the launcher asks to compute activations again instead of keeping them.
        sharded_files: Whether the launcher asks for one file a rank in checkpoints.

    >>> World().part, World().parts, World().of_parts(7)
    (0, 1, [7])
    """

    plan: tfn.Plan | None = None
    ranks: Ranks = dataclasses.field(default_factory=Ranks)
    compile: dict[str, Any] | None = None
    loss_scale: dict[str, Any] = dataclasses.field(default_factory=dict)
    checkpointing: bool = False
    sharded_files: bool = False

    @property
    def parts(self) -> int:
        """The number of parts that the rows of a batch are divided into."""
        return self.ranks.size // self._sharers

    @property
    def part(self) -> int:
        """The number of this rank's part."""
        return self.ranks.rank // self._sharers

    @property
    def _sharers(self) -> int:
        """The number of ranks that share the work on the same rows."""
        return 1 if self.plan is None else self.plan.shape(self.ranks.size)["tensor"]

    def of_parts(self, value: Any) -> list[Any]:
        """Return one value for each part, in the order of the rows; all ranks call this."""
        return self.ranks.gathered(value)[:: self._sharers]

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """Return the sum of each number over the parts; all ranks call this."""
        counts = self.ranks.rank % self._sharers == 0  # ranks with the same rows must count them once
        return self.ranks.sums([number if counts else 0.0 for number in numbers])

    def means(self, means: dict[str, tfn.Mean]) -> dict[str, tfn.Mean]:
        """Return means over the rows of all ranks, the same bits on each; all ranks call this.

        A rank without rows may pass an empty dict. The totals and weights are gathered on the host, 16 bytes a mean,
        and added in the same order on every rank.
        """
        if self.plan is None:
            return means
        of_parts = self.of_parts({name: (float(mean.total), float(mean.weight)) for name, mean in means.items()})
        found = {name: [theirs[name] for theirs in of_parts if name in theirs] for each in of_parts for name in each}
        return {
            name: tfn.Mean(*(torch.tensor([pair[i] for pair in pairs], dtype=torch.float64).sum() for i in (0, 1)))
            for name, pairs in found.items()
        }


ALONE = World()
