"""Transforms that remember where the parameters or the updates have been."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainfn import tree
from trainfn._types import NOTHING, Params, Transform, Tree
from trainfn.optim._combine import around
from trainfn.optim._math import Scalar, average, fraction, times, unbias, zero_count


class LookaheadState(NamedTuple):
    """Count of completed updates, ``int64[]``, the slow parameters, and the inner state."""

    count: Tensor  # type: ignore[assignment]  # shadows tuple.count
    slow: Params
    inner: Tree


class EmaState(NamedTuple):
    """Count of completed updates, ``int64[]``, and the moving average, like the parameters.

    ``late`` holds how many updates a parameter missed, ``int64[]`` by name; empty if none missed any.
    """

    count: Tensor  # type: ignore[assignment]  # shadows tuple.count
    ema: Params
    late: Params = NOTHING


def lookahead(inner: Transform, sync_period: int = 6, slow_step_size: Scalar = 0.5) -> Transform:
    """Take ``sync_period`` fast steps, then go back part of the way to where they began.

    ::

        fast ← fast + inner.update
        every sync_period-th step: slow ← slow + slow_step_size · (fast - slow);  fast ← slow

    Zhang et al. 2019, https://arxiv.org/abs/1907.08610. The parameters are the fast ones.

    Args:
        inner: A whole optimizer, learning rate included.
        sync_period: Fast steps between two slow ones.
        slow_step_size: Share of the way that is kept.

    Raises:
        ValueError: If ``sync_period`` is below 1, or ``slow_step_size`` outside [0, 1].

    >>> from trainfn.optim import sgd
    >>> optimizer = lookahead(sgd(1.0), sync_period=1, slow_step_size=0.5)
    >>> params = {"w": torch.zeros(1)}
    >>> optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params)[0]
    {'w': tensor([-0.5000])}
    """
    if sync_period < 1:
        raise ValueError(
            f"`lookahead(inner, sync_period={sync_period})` can't work: it is the number of fast steps"
            " between two slow ones. Write 1 or more."
        )
    if not isinstance(slow_step_size, Tensor) and not 0 <= slow_step_size <= 1:
        raise ValueError(
            f"`lookahead(inner, slow_step_size={slow_step_size})` can't work: it is the share of the way"
            " that is kept. Write a number in [0, 1], such as 0.5."
        )

    def init(params: Params) -> Tree:
        return LookaheadState(zero_count(params), tree.copy(params), inner.init(params))

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        count = state.count + 1
        updates, inner_state = inner.update(updates, state.inner, params)
        moved = tree.add(state.slow, times(tree.sub(tree.add(params, updates), state.slow), slow_step_size))
        sync = count % sync_period == 0
        updates = tree.where(sync, tree.sub(moved, params), updates)
        return updates, LookaheadState(count, tree.where(sync, moved, state.slow), inner_state)

    return around(Transform(init, update), inner)


def ema(decay: Scalar, *, debias: bool = True, dtype: torch.dtype | None = None) -> Transform:
    """Replace the updates by their exponential moving average.

    Args:
        decay: Share of the past.
        debias: Whether to divide by ``1 - decay^t``, since the average starts at 0.
        dtype: dtype of the average; None for that of the parameter.

    Raises:
        ValueError: If ``decay`` is outside [0, 1).

    >>> rule = ema(0.9)
    >>> params = {"w": torch.ones(1)}
    >>> rule.update(params, rule.init(params), params)[0]
    {'w': tensor([1.])}
    """
    fraction("ema", decay=decay)

    def init(params: Params) -> Tree:
        return EmaState(zero_count(params), tree.zeros_like(params, dtype))

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        count = state.count + 1
        mean = average(state.ema, updates, decay)
        out = unbias(mean, decay, count, state.late) if debias else mean
        return tree.cast_like(out, updates), EmaState(count, mean, state.late)

    return Transform(init, update)
