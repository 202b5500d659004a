"""The metrics of a state over many batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from trainfn._plan import aligned, divided, plan_of
from trainfn._run._batches import placed
from trainfn._types import Batch, Mean, Metrics, TrainState


def evaluate(eval_step: Callable[[TrainState, Batch], Metrics], state: TrainState, batches: Iterable[Batch]) -> Metrics:
    """The metrics over all batches, exact whatever their sizes; sums are kept in float64 where the device has it.

    Args:
        eval_step: From `trainfn.eval_step`, or any function that returns metrics.
        state: What to evaluate.
        batches: With a plan, a `trainfn.data` loader, which is divided among the ranks; or this rank's batches.

    Raises:
        ValueError: If there is no batch.

    >>> import torch, trainfn as tfn
    >>> state = tfn.init({"w": torch.tensor([3.0])}, tfn.optim.sgd(0.1))
    >>> step = tfn.eval_step(lambda p, x: tfn.Mean.of(p["w"] * x))
    >>> evaluate(step, state, [torch.ones(3), torch.zeros(1)])["loss"]
    Mean(2.25 over weight 4)
    """
    device = state.step.device
    plan = plan_of(eval_step)
    if plan is not None:
        part, equal = divided(plan, batches)
        batches = aligned(iter(part), "evaluate(eval_step, state, batches)", equal=equal, parts=plan.data_size)
    total: Metrics = {}
    for batch in batches:
        metrics = {name: _wide(mean) for name, mean in eval_step(state, placed(batch, device)).items()}
        total = {name: total[name] + mean for name, mean in metrics.items()} if total else metrics
    if not total:
        raise ValueError("evaluate(eval_step, state, batches): there was no batch. An iterator can be used once.")
    return total


def _wide(mean: Mean) -> Mean:
    dtype = torch.float32 if mean.total.device.type == "mps" else torch.float64
    return Mean(mean.total.to(dtype), mean.weight.to(dtype))
