"""Step transforms: functions from a step to a step, which compose.

::

    average = tfn.transforms.ema(0.999)
    state = average.init(tfn.init(model, optimizer))
    step = tfn.jit(average(tfn.transforms.skip_nonfinite()(tfn.train_step(loss, optimizer))))

A transform wraps what happens after the gradients, so it costs no extra graph, with accumulation or without. One
that keeps something keeps it in ``state.extra``, under its name, and its `init` puts it there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from trainfn import tree
from trainfn._step import TrainStep
from trainfn._types import Mean, Metrics, TrainState

_Advance = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


class StepTransform(NamedTuple):
    """What to add to a state, and how to change a step.

    Attributes:
        init: ``state -> state``, with what the transform keeps.
        wrap: ``step -> step``; calling the transform does the same.
    """

    init: Callable[[TrainState], TrainState]
    wrap: Callable[[Any], Any]

    def __call__(self, step: Any) -> Any:
        """Wrap a step: a `TrainStep`, or any function ``(state, batch) -> (state, metrics)``."""
        return self.wrap(step)


def after(
    change: Callable[[TrainState, TrainState, Metrics], tuple[TrainState, Metrics]],
) -> Callable[[Any], Any]:
    """A step transform from a pure function ``(old_state, new_state, metrics) -> (state, metrics)``.

    >>> import trainfn as tfn
    >>> halve = after(lambda old, new, metrics: (
    ...     new._replace(params=tfn.tree.lerp(old.params, new.params, 0.5)), metrics))
    """

    def around(advance: _Advance) -> _Advance:
        def advanced(state: TrainState, given: Any, /) -> tuple[TrainState, Metrics]:
            return change(state, *advance(state, given))

        return advanced

    def wrap(step: Any) -> Any:
        if isinstance(step, TrainStep):
            return dataclasses.replace(step, update=around(step.update))
        return around(step)

    return wrap


def ema(decay: float, *, name: str = "ema") -> StepTransform:
    """Keep an exponential moving average of the parameters in ``state.extra[name]``.

    Evaluate it with ``state._replace(params=state.extra["ema"])``.

    Args:
        decay: In [0, 1): the average remembers about ``1 / (1 - decay)`` steps.
        name: Its place in ``state.extra``; two averages need two names.

    Raises:
        ValueError: If ``decay`` is out of range, or ``init`` was not applied to the state.

    >>> import torch, trainfn as tfn
    >>> average = ema(0.9)
    >>> optimizer = tfn.optim.sgd(0.5)
    >>> state = average.init(tfn.init({"w": torch.tensor([4.0])}, optimizer))
    >>> step = average(tfn.train_step(lambda p, x: tfn.Mean.of((p["w"] - x) ** 2), optimizer))
    >>> step(state, torch.ones(1))[0].extra["ema"]["w"]
    tensor([3.7000])
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"ema(decay={decay}): the decay is in [0, 1), such as 0.999.")

    def init(state: TrainState) -> TrainState:
        return state._replace(extra={**state.extra, name: tree.copy(state.params)})

    def change(old: TrainState, new: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
        _needs(old, name, f"ema({decay})")
        average = tree.lerp(old.extra[name], new.params, 1.0 - decay)
        return new._replace(extra={**new.extra, name: average}), metrics

    return StepTransform(init, after(change))


def skip_nonfinite() -> StepTransform:
    """Keep parameters, buffers and optimizer state as they were where the loss or the gradient is NaN or infinite.

    ``state.step`` goes on, so the next batch is a new one. The metric ``skipped`` is the share of skipped steps.

    >>> import torch, trainfn as tfn
    >>> optimizer = tfn.optim.sgd(0.5)
    >>> state = tfn.init({"w": torch.tensor([4.0])}, optimizer)
    >>> step = skip_nonfinite()(tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), optimizer))
    >>> state, metrics = step(state, torch.tensor([float("nan")]))
    >>> state.params["w"], metrics["skipped"].value
    (tensor([4.]), tensor(1.))
    """

    def change(old: TrainState, new: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
        finite = torch.isfinite(metrics["loss"].total)
        if "grad_norm" in metrics:
            finite = finite & torch.isfinite(metrics["grad_norm"].total)
        kept = tree.where(finite, new._replace(step=old.step, key=old.key), old)
        skipped = Mean.of((~finite).float())
        return kept._replace(step=new.step, key=new.key), {**metrics, "skipped": skipped}

    return StepTransform(lambda state: state, after(change))


def _needs(state: TrainState, name: str, call: str) -> None:
    if name not in state.extra:
        raise ValueError(
            f"{call}: state.extra has no {name!r}. Let the transform add it before the first step:"
            f" `state = tfn.transforms.{call}.init(state)`."
        )
