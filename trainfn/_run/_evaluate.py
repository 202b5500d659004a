"""Evaluate a state: its metrics over many batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from trainfn._run._batches import placed
from trainfn._run._feed import feed_of
from trainfn._types import Batch, Metrics, TrainState


def evaluate(eval_step: Callable[[TrainState, Batch], Metrics], state: TrainState, batches: Iterable[Batch]) -> Metrics:
    """Return the metrics over all batches, exact whatever their sizes; sums are in float64 where the device has it.

    Args:
        eval_step: From `trainfn.eval_step`, or any function that returns metrics.
        state: The state to evaluate.
        batches: Batches on any device. With a plan, a `trainfn.data` loader, which is divided among the ranks, or this
            rank's own batches.

    Raises:
        ValueError: If there is no batch.

    >>> import torch, trainfn as tfn
    >>> state = tfn.init({"w": torch.tensor([3.0])}, tfn.optim.sgd(0.1))
    >>> step = tfn.eval_step(lambda p, x: tfn.Mean.of(p["w"] * x))
    >>> evaluate(step, state, [torch.ones(3), torch.zeros(1)])["loss"]
    Mean(2.25 over weight 4)
    """
    device, feed = state.step.device, feed_of(eval_step)
    total: Metrics = {}
    run: Callable[..., Metrics] = eval_step
    counts = getattr(eval_step, "takes_first_row", False)
    first = torch.zeros((), dtype=torch.int64, device=device)  # a draw belongs to a row, whatever batch it is in
    for batch in feed.stream(feed.part(batches), "evaluate(eval_step, state, batches)"):
        batch = placed(batch, device)
        found = run(state, batch, first) if counts else run(state, batch)
        metrics = {name: mean.wide() for name, mean in found.items()}
        first = first + feed.rows(state, batch) if counts else first
        total = {name: total[name] + mean for name, mean in metrics.items()} if total else metrics
    if not total:
        raise ValueError(
            "evaluate(eval_step, state, batches): there was no batch. An iterator is empty after its first use: give a"
            " list, or a `tfn.data.loader`."
        )
    return total
