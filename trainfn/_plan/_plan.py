"""`Plan`: the data of a `Layout`, and the functions that make a step on one rank a step on N."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Self

from torch import Tensor

from trainfn._grad import GradientFunction
from trainfn._plan import _apply, _batches, _no_rows
from trainfn._plan._layout import Layout, Stage
from trainfn._types import Batch, Loss, Metrics, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Layout):
    """How a state is sharded over ranks: sizes of the mesh's axes, and what is split along them.

    The sizes multiply to the number of processes; one of them may be -1, for the ranks that are left.
    `Plan()` is one process.

    Attributes:
        replicate: The number of ranks that hold the same and have rows of their own.
        shard: The number of ranks that share the state, as ``stage`` says, and have rows of their own.
        tensor: The number of ranks that share the work on the same rows.
        stage: What is split over ``shard``, as DeepSpeed's ZeRO counts: 0 nothing, 1 the optimizer state, 2 also the
            gradients, 3 also the parameters. Rajbhandari et al. 2019, https://arxiv.org/abs/1910.02054.
        rules: ``(pattern, rule)`` by parameter name, the first that matches: ``"columns"`` and ``"rows"`` split a
            linear layer's outputs or inputs over ``tensor``; ``"replicate"`` leaves a parameter and its optimizer
            state full on every rank.
        reshard: With stage 3, whether gathered parameters are freed after the forward pass, and gathered again.
        precision: See `Precision`.
        offload: The parts of the state in host memory: ``"opt_state"``, ``"params"``. On a CPU all of it is. A plan
            for an accelerator can't offload, and `shard` raises.

    Raises:
        ValueError: If a size, the stage or a rule is not valid.

    >>> Plan.fsdp(replicate=2).shape(world=8)
    {'replicate': 2, 'shard': 4, 'tensor': 1}
    """

    # --- presets --------------------------------------------------------------------------------------------------

    @classmethod
    def replicated(cls, **fields: Any) -> Self:
        """Every rank holds the full state: data-parallel training, torch's DDP.

        >>> Plan.replicated().shape(world=4)
        {'replicate': 4, 'shard': 1, 'tensor': 1}
        """
        fields.setdefault("replicate", -1)
        return cls(**fields)

    @classmethod
    def zero(cls, stage: Stage, **fields: Any) -> Self:
        """DeepSpeed's ZeRO: stage 1 splits the optimizer state, 2 also the gradients, 3 also the parameters.

        >>> Plan.zero(1).stage
        1
        """
        fields.setdefault("shard", -1)
        return cls(stage=stage, **fields)

    @classmethod
    def fsdp(cls, **fields: Any) -> Self:
        """Everything is split, as in torch's ``fully_shard``; with ``replicate=``, hybrid: split within a group only.

        >>> Plan.fsdp() == Plan.zero(3)
        True
        """
        return cls.zero(3, **fields)

    # --- what makes a step one of N ranks; `train_step(..., plan=plan)` calls these -------------------------------

    def check(self, state: TrainState) -> None:
        """Raise if a state is not sharded by this plan."""
        if self.world > 1:
            _apply.check_sharded(self, state)

    def loss(self, loss: Loss) -> Loss:
        """The loss, which of a rank without rows is 0 of weight 0."""
        return _no_rows.idle(loss)

    def gradients(self, gradients: GradientFunction) -> GradientFunction:
        """The gradients of this rank's rows."""
        return _apply.gradients_on(self, gradients)

    def largest(self, state: TrainState, weight: Tensor) -> Tensor:
        """The largest of all ranks' weights."""
        return _apply.largest(self, state, weight)

    def update(self, update: Callable[..., Any]) -> Callable[..., Any]:
        """The update by the sums over all ranks."""
        return _apply.update_on(self, update)

    def metrics(self, evaluate: Callable[..., Metrics]) -> Callable[..., Metrics]:
        """The metrics of all ranks' rows."""
        return _apply.metrics_on(self, evaluate)

    def pieces(self, state: TrainState, batch: Batch, accumulate: int | str) -> Iterator[tuple[Batch, Tensor]]:
        """This rank's micro-batches, each with the place of its first row among those of all ranks."""
        return _batches.pieces_on(self, state, batch, accumulate)
