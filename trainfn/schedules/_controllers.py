"""Learning rates that react to a metric: pure functions that a callback runs after each evaluation.

They need no device: the state is a few float64 and int64 scalars on the CPU, and `update` has no branches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Mode = Literal["min", "max"]
ThresholdMode = Literal["rel", "abs"]


class Controller(NamedTuple):
    """A learning rate that reacts to a metric: a pair of pure functions.

    Attributes:
        init: ``() -> state``.
        update: ``(metric, state) -> state``; the rate to use is ``state.learning_rate``, ``float64[]``.
    """

    init: Callable[[], Any]
    update: Callable[[Tensor | float, Any], Any]


class PlateauState(NamedTuple):
    """The state of `reduce_on_plateau`: scalars."""

    learning_rate: Tensor
    best: Tensor
    num_bad: Tensor
    cooldown: Tensor


class GreedyState(NamedTuple):
    """The state of `greedy`: scalars, and the last metrics, ``float64[window_size]``, if it smooths."""

    learning_rate: Tensor
    best: Tensor
    num_bad: Tensor
    num_good: Tensor
    cooldown: Tensor
    warmup: Tensor
    reset_in: Tensor
    window: Tensor
    num_seen: Tensor


def reduce_on_plateau(
    learning_rate: float,
    *,
    mode: Mode = "min",
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: ThresholdMode = "rel",
    cooldown: int = 0,
    min_lr: float = 0.0,
    eps: float = 1e-8,
) -> Controller:
    """Reduce the learning rate when a metric stops improving; `torch.optim.lr_scheduler.ReduceLROnPlateau`.

    Args:
        learning_rate: The first value.
        mode: Whether the metric should fall or rise.
        factor: What a reduction multiplies the rate by.
        patience: Metrics without improvement that are tolerated.
        threshold: By how much a metric has to be better to count.
        threshold_mode: Whether that is relative to the best, or absolute.
        cooldown: Metrics after a reduction that can't count as bad.
        min_lr: The lowest rate.
        eps: The smallest change that is made.

    Raises:
        ValueError: If ``factor`` is 1 or more, or a mode is unknown.

    >>> control = reduce_on_plateau(1.0, factor=0.5, patience=1)
    >>> state = control.init()
    >>> for loss in [3.0, 3.0, 3.0]:
    ...     state = control.update(loss, state)
    >>> state.learning_rate.item()
    0.5
    """
    _check("reduce_on_plateau", factor, mode, threshold_mode)

    def init() -> PlateauState:
        return PlateauState(_real(learning_rate), _worst(mode), _whole(0), _whole(0))

    def update(metric: Tensor | float, state: PlateauState) -> PlateauState:
        value = _value(metric, state.best)
        better = _better(value, state.best, mode, threshold, threshold_mode)
        num_bad = torch.where(better | (state.cooldown > 0), 0, state.num_bad + 1)
        cooling = (state.cooldown - 1).clamp(min=0)
        reduce = num_bad > patience
        lower = (state.learning_rate * factor).clamp(min=min_lr)
        changes = reduce & (state.learning_rate - lower > eps)
        return PlateauState(
            learning_rate=torch.where(changes, lower, state.learning_rate),
            best=torch.where(better, value, state.best),
            num_bad=torch.where(reduce, 0, num_bad),
            cooldown=torch.where(reduce, cooldown, cooling),
        )

    return Controller(init, update)


def greedy(
    learning_rate: float,
    *,
    mode: Mode = "min",
    factor: float = 0.95,
    patience: int = 10,
    threshold: float = 1e-6,
    threshold_mode: ThresholdMode = "abs",
    cooldown: int = 0,
    warmup: int = 0,
    min_lr: float = 1e-3,
    max_lr: float = 1.0,
    eps: float = 1e-8,
    smooth: bool = False,
    window_size: int = 50,
    reset_start: int = 500,
) -> Controller:
    """Raise the learning rate while a metric improves, reduce it when it stops.

    The arithmetic of `transformers.optimization.GreedyLR`. Note its lower bound: a rate below ``min_lr`` is
    never reduced. https://arxiv.org/abs/2512.14527

    Args:
        learning_rate: The first value.
        mode: Whether the metric should fall or rise.
        factor: What a reduction multiplies the rate by, and a raise divides it by.
        patience: Consecutive good or bad metrics after which the rate changes.
        threshold: By how much a metric has to be better to count.
        threshold_mode: Whether that is relative to the best, or absolute.
        cooldown: Metrics that are ignored after a reduction.
        warmup: Metrics that are ignored after a raise.
        min_lr: The lowest rate.
        max_lr: The highest rate.
        eps: The smallest change that is made.
        smooth: Whether to look at the mean of the last ``window_size`` metrics.
        window_size: How many.
        reset_start: Reductions at ``min_lr`` after which all starts again.

    Raises:
        ValueError: If ``factor`` is 1 or more, or a mode is unknown.

    >>> control = greedy(0.5, factor=0.5, patience=1)
    >>> state = control.init()
    >>> for loss in [3.0, 2.0]:
    ...     state = control.update(loss, state)
    >>> state.learning_rate.item()
    1.0
    """
    _check("greedy", factor, mode, threshold_mode)

    def init() -> GreedyState:
        window = torch.zeros(window_size if smooth else 1, dtype=torch.float64)
        return GreedyState(
            learning_rate=_real(learning_rate),
            best=_worst(mode),
            num_bad=_whole(0),
            num_good=_whole(0),
            cooldown=_whole(0),
            warmup=_whole(0),
            reset_in=_whole(reset_start),
            window=window,
            num_seen=_whole(0),
        )

    def update(metric: Tensor | float, state: GreedyState) -> GreedyState:
        window, num_seen, value = _smooth(_value(metric, state.best), state)
        waiting = (state.cooldown > 0) | (state.warmup > 0)
        better = _better(value, state.best, mode, threshold, threshold_mode) & ~waiting
        num_good = torch.where(better, state.num_good + 1, 0)
        num_bad = torch.where(better | waiting, 0, state.num_bad + 1)
        grow = num_good > patience
        shrink = num_bad > patience

        higher = (state.learning_rate / factor).clamp(max=max_lr)
        lower = (state.learning_rate * factor).clamp(min=min_lr)
        rate = torch.where(grow & (higher - state.learning_rate > eps), higher, state.learning_rate)
        rate = torch.where(shrink & (state.learning_rate - lower > eps), lower, rate)

        reset_in = torch.where(shrink & (rate <= min_lr), state.reset_in - 1, state.reset_in)
        reset = shrink & (rate <= min_lr) & (reset_in <= 0)
        warming = torch.where(state.cooldown > 0, state.warmup, (state.warmup - 1).clamp(min=0))
        return GreedyState(
            learning_rate=torch.where(reset, learning_rate, rate),
            best=torch.where(reset, _worst(mode), torch.where(better, value, state.best)),
            num_bad=torch.where(shrink, 0, num_bad),
            num_good=torch.where(grow, 0, num_good),
            cooldown=torch.where(shrink, cooldown, (state.cooldown - 1).clamp(min=0)),
            warmup=torch.where(reset, 0, torch.where(grow, warmup, warming)),
            reset_in=torch.where(grow | reset, reset_start, reset_in),
            window=window,
            num_seen=torch.where(reset, 0, num_seen),
        )

    return Controller(init, update)


def _smooth(value: Tensor, state: GreedyState) -> tuple[Tensor, Tensor, Tensor]:
    """The window with the new value, the number of values seen, and the mean of those in the window."""
    size = state.window.numel()
    here = torch.arange(size) == state.num_seen % size
    window = torch.where(here, value, state.window)
    num_seen = state.num_seen + 1
    inside = torch.arange(size) < num_seen
    return window, num_seen, torch.where(inside, window, 0.0).sum() / num_seen.clamp(max=size)


def _better(value: Tensor, best: Tensor, mode: Mode, threshold: float, threshold_mode: ThresholdMode) -> Tensor:
    if mode == "min":
        return value < (best * (1.0 - threshold) if threshold_mode == "rel" else best - threshold)
    return value > (best * (1.0 + threshold) if threshold_mode == "rel" else best + threshold)


def _value(metric: Tensor | float, like: Tensor) -> Tensor:
    return (metric if isinstance(metric, Tensor) else torch.tensor(metric)).detach().to(like)


def _real(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _whole(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


def _worst(mode: Mode) -> Tensor:
    return _real(math.inf if mode == "min" else -math.inf)


def _check(call: str, factor: float, mode: str, threshold_mode: str) -> None:
    if not 0 < factor < 1:
        raise ValueError(
            f"`{call}(factor={factor})` can't work: it is what a reduction multiplies the rate by. Write a"
            " number between 0 and 1, such as 0.5."
        )
    for name, value, known in (
        ("mode", mode, ("min", "max")),
        ("threshold_mode", threshold_mode, ("rel", "abs")),
    ):
        if value not in known:
            raise ValueError(f"`{call}({name}={value!r})`: there is no such mode. Write one of {list(known)}.")
