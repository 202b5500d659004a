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

_SMALLEST_SCALE = 2.0**-24  # a run whose loss is NaN for good must not end up dividing by 0
_Advance = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


class StepTransform(NamedTuple):
    """An addition to a state, and a change of a step.

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
        finite = torch.isfinite(metrics["loss"].total).all()
        if "grad_norm" in metrics:
            finite = finite & torch.isfinite(metrics["grad_norm"].total)
        kept = tree.where(finite, new._replace(step=old.step, key=old.key), old)
        skipped = Mean.of((~finite).float())
        return kept._replace(step=new.step, key=new.key), {**metrics, "skipped": skipped}

    return StepTransform(lambda state: state, after(change))


def dynamic_loss_scale(
    initial: float = 2.0**16, *, growth_interval: int = 2000, growth: float = 2.0, backoff: float = 0.5
) -> StepTransform:
    """Scale the loss on its way back, so that float16 gradients neither vanish nor overflow.

    The gradients that come out are those of the loss itself. A step whose gradients are NaN or infinite changes no
    parameter, buffer or optimizer state, as with `skip_nonfinite`, and lowers the scale. After so many good steps it
    rises. The scale is in ``state.extra["loss_scale"]``, and among the metrics. Only for losses that compute in
    float16: bfloat16 has the range of float32. With k micro-batches each is scaled by ``scale / k``, as
    GradScaler scales ``loss / k``; a stream of them needs a length, as a list or its iterator has.

    Args:
        initial: The first scale, a power of two.
        growth_interval: Good steps in a row after which the scale grows.
        growth: By which factor, above 1.
        backoff: The factor after a bad step, between 0 and 1.

    Raises:
        ValueError: If a number is out of range, or ``init`` was not applied to the state.

    Source: https://arxiv.org/abs/1710.03740, section 3.2; `torch.amp.GradScaler`.

    >>> import torch, trainfn as tfn
    >>> optimizer, scaling = tfn.optim.sgd(0.5), dynamic_loss_scale(4.0)
    >>> state = scaling.init(tfn.init({"w": torch.tensor([4.0])}, optimizer))
    >>> step = scaling(tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), optimizer))
    >>> state, metrics = step(state, torch.tensor([float("inf")]))
    >>> state.params["w"], state.extra["loss_scale"]["scale"], metrics["skipped"].value
    (tensor([4.]), tensor(2.), tensor(1.))
    """
    if not (initial > 0 and growth_interval >= 1 and growth > 1 and 0 < backoff < 1):
        raise ValueError(
            f"dynamic_loss_scale({initial}, growth_interval={growth_interval}, growth={growth}, backoff={backoff}) "
            "can't work. The scale is positive, the interval 1 or more, growth above 1 and backoff between 0 and 1."
        )
    skip = skip_nonfinite()

    def init(state: TrainState) -> TrainState:
        held = {"scale": torch.full_like(state.step, 0, dtype=torch.float32) + initial, "good": state.step * 0}
        return state._replace(extra={**state.extra, "loss_scale": held})

    def change(old: TrainState, new: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
        _needs(old, "loss_scale", f"dynamic_loss_scale({initial})")
        held, bad = old.extra["loss_scale"], metrics["skipped"].total > 0
        good = torch.where(bad, 0, held["good"] + 1)
        grows = good >= growth_interval
        factor = torch.where(bad, backoff, torch.where(grows, growth, 1.0))
        next_held = {"scale": (held["scale"] * factor).clamp(min=_SMALLEST_SCALE), "good": torch.where(grows, 0, good)}
        shown = {**metrics, "loss_scale": Mean(held["scale"], torch.ones_like(held["scale"]))}
        return new._replace(extra={**new.extra, "loss_scale": next_held}), shown

    adjust = after(change)
    return StepTransform(init, lambda step: adjust(skip(step)))


def _needs(state: TrainState, name: str, call: str) -> None:
    if name not in state.extra:
        raise ValueError(
            f"{call}: state.extra has no {name!r}. Let the transform add it before the first step:"
            f" `state = tfn.transforms.{call}.init(state)`."
        )
