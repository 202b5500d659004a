"""How the rows of a run reach this process: all of them on one process, a part of them by a plan.

A `Feed` is the identity: `steps` and `evaluate` use it without asking whether there is a plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from trainfn import tree
from trainfn._plan import Plan, aligned, check_same_run, divided, first_rows, plan_of
from trainfn._ranks._errors import launched
from trainfn._ranks._group import ranks
from trainfn._types import Batch, TrainState


class Feed:
    """The feed of one process, which has every row and no other process to agree with."""

    def check(self, state: TrainState, until: int | None) -> None:
        """Before the first step.

        Raises:
            RuntimeError: If several processes were launched: each would train by itself.
        """
        if launched() > 1 and isinstance(state, TrainState):
            raise RuntimeError(
                f"steps(step, state, batches): {launched()} processes were launched, and the step has no plan: each"
                " would train by itself. `plan = tfn.launch.plan()`, `state = tfn.shard(state, plan)` and"
                " `tfn.train_step(..., plan=plan)`; a function around such a step needs `function.plan = plan`. For"
                " runs of their own, call `step(state, batch)` in a loop."
            )

    def part(self, batches: Any) -> Any:
        """This process's part of the batches."""
        return batches

    def end(self, until: int | None) -> int | None:
        """The step at which the run ends, if it is known."""
        return until

    def rows(self, state: TrainState, batch: Batch) -> Tensor | int:
        """The number of rows of a batch, on all ranks together."""
        return tree.row_count(batch)

    def stream(self, batches: Iterable[Batch], what: str) -> Iterator[Batch]:
        """The batches of the part; ``what`` they are called in an error."""
        return iter(batches)


class PlannedFeed(Feed):
    """The feed of one rank of several: its part of a loader, and a batch whenever any rank has one."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._equal = False  # whether all ranks are known to have equally many batches

    def check(self, state: TrainState, until: int | None) -> None:
        """Before the first step, all ranks together.

        Raises:
            ValueError: On all ranks, if they are about to run different things.
        """
        check_same_run(self.plan, state, until)

    def part(self, batches: Any) -> Any:
        """This rank's part of a loader; other batches are its own rows already."""
        part, self._equal = divided(self.plan, batches)
        return part

    def end(self, until: int | None) -> int | None:
        """The same on all ranks: the latest, for a rank without rows takes part in the steps of the others."""
        return None if until is None else max(ranks().gathered(until))

    def rows(self, state: TrainState, batch: Batch) -> Tensor | int:
        """The sum over the ranks."""
        return super().rows(state, batch) if self.plan.world == 1 else first_rows(self.plan, state, batch)[1]

    def stream(self, batches: Iterable[Batch], what: str) -> Iterator[Batch]:
        """As many batches as the rank with the most of them has."""
        return aligned(iter(batches), what, equal=self._equal, parts=self.plan.data_size)


def feed_of(step: Any) -> Feed:
    """The feed of a step, compiled or not, by its plan."""
    plan = plan_of(step)
    return Feed() if plan is None else PlannedFeed(plan)
