"""The processes that train together, as the Trainer sees them: who has which rows, and what they tell each other.

What is told goes between hosts, over gloo, so that no device waits for it. All ranks make the same calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

import trainfn as tfn

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """Who works together, and how; by default one process.

    Attributes:
        plan: Of the step; None in one process.
        rank: This process's number.
        world: How many there are.
        compile: The arguments of `tfn.jit` that a launcher was configured with.
        loss_scale: Those of `tfn.transforms.dynamic_loss_scale` that a DeepSpeed configuration has.
        checkpointing: Whether it was configured to compute activations again instead of keeping them.
        sharded_files: Whether it was configured to save each rank's part in a file of its own.
        timeout: Seconds that a rank waits for what another tells it.

    >>> Ranks().told("here"), Ranks().parts(7), Ranks().any([False, True])
    (['here'], [7], [False, True])
    """

    plan: tfn.Plan | None = None
    rank: int = 0
    world: int = 1
    compile: dict[str, Any] | None = None
    loss_scale: dict[str, Any] = dataclasses.field(default_factory=dict)
    checkpointing: bool = False
    sharded_files: bool = False
    timeout: float = 1800.0

    # --- rows -----------------------------------------------------------------------------------------------------

    @property
    def part(self) -> int:
        """Which part of a batch's rows is this rank's."""
        return 0 if self.plan is None else self.plan.data_rank

    @property
    def size(self) -> int:
        """Over how many ranks the rows of a batch are spread."""
        return 1 if self.plan is None else self.plan.data_size

    # --- what is told ---------------------------------------------------------------------------------------------

    def told(self, mine: Any) -> list[Any]:
        """What every rank says, in order."""
        if self.plan is None:
            return [mine]
        out: list[Any] = [None] * self.world
        distributed.all_gather_object(out, mine, group=_group(self.timeout))
        return out

    def parts(self, mine: Any) -> list[Any]:
        """What the ranks say that have different rows, in the order of the rows."""
        return self.told(mine)[:: self.world // self.size]

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, which alone does so; if it fails, all do.

        Raises:
            RuntimeError: On the others, if it failed on rank 0.
        """
        if self.plan is None:
            return make()
        said: list[Any] = [None, None]
        error: BaseException | None = None
        if self.rank == 0:
            try:
                said = [make(), None]
            except Exception as failed:
                error, said = failed, [None, f"{type(failed).__name__}: {failed}"]
        distributed.broadcast_object_list(said, src=0, group=_group(self.timeout))
        if error is not None:
            raise error
        if said[1] is not None:
            raise RuntimeError(f"rank 0 failed, and all ranks end with it: {said[1]}")
        return said[0]

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Of each flag, whether it is set on any rank."""
        return [number > 0 for number in self.sums([float(flag) for flag in flags], of_rows=False)]

    def sums(self, numbers: Sequence[float], *, of_rows: bool = True) -> list[float]:
        """The sum of each number over ranks; ``of_rows``, over those with different rows."""
        if self.plan is None:
            return list(numbers)
        counts = not of_rows or self.rank % (self.world // self.size) == 0
        total = torch.tensor(numbers, dtype=torch.float64) * float(counts)
        distributed.all_reduce(total, group=_group(self.timeout))
        return total.tolist()

    def wait(self) -> None:
        """Wait for all."""
        if self.plan is not None:
            distributed.barrier(group=_group(self.timeout))

    def means(self, means: dict[str, tfn.Mean]) -> dict[str, tfn.Mean]:
        """Means over the rows of all ranks, of which some may have none; the same bits on each."""
        if self.plan is None:
            return means
        said = self.parts({name: (float(mean.total), float(mean.weight)) for name, mean in means.items()})
        found = {name: [theirs[name] for theirs in said if name in theirs] for each in said for name in each}
        return {
            name: tfn.Mean(*(torch.tensor([pair[i] for pair in pairs], dtype=torch.float64).sum() for i in (0, 1)))
            for name, pairs in found.items()
        }


ALONE = Ranks()
_made: list[tuple[Any, Any]] = []  # the default group, and ours: at most one, for a group may be destroyed


def _group(timeout: float) -> Any:
    world = distributed.group.WORLD
    if not _made or _made[0][0] is not world:
        _made[:] = [(world, distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout)))]
    return _made[0][1]
