"""Rules for the size and the direction of a step. Each reads like the equations of its paper."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainfn import tree
from trainfn._types import NOTHING, Params, Transform, Tree
from trainfn.optim._combine import EmptyState
from trainfn.optim._math import (
    Rate,
    Scalar,
    average,
    fraction,
    nonnegative,
    on_parts,
    plus,
    square,
    times,
    unbias,
    zero_count,
)


class ScaleByScheduleState(NamedTuple):
    """Count: completed updates, ``int64[]``."""

    count: Tensor  # type: ignore[assignment]  # shadows tuple.count


class ScaleByOwnScheduleState(NamedTuple):
    """Count of completed updates, and how many of them a parameter missed, by name: ``int64[]`` all."""

    count: Tensor  # type: ignore[assignment]  # shadows tuple.count
    late: Params = NOTHING


class TraceState(NamedTuple):
    """Count of completed updates, ``int64[]``, and the decaying sum of the past updates.

    ``late`` holds how many updates a parameter missed, ``int64[]`` by name; empty if none missed any.
    """

    count: Tensor  # type: ignore[assignment]  # shadows tuple.count
    trace: Params
    late: Params = NOTHING


class ScaleByAdamState(NamedTuple):
    """Count of completed updates, ``int64[]``; first and second moment, like the parameters.

    ``late`` holds how many updates a parameter missed, ``int64[]`` by name; empty if none missed any.
    """

    count: Tensor  # type: ignore[assignment]  # shadows tuple.count
    mu: Params
    nu: Params
    late: Params = NOTHING


class ScaleByLionState(NamedTuple):
    """First moment, like the parameters."""

    mu: Params


class ScaleByRmsState(NamedTuple):
    """Second moment, and first moment (empty unless centered), like the parameters."""

    nu: Params
    mu: Params


class ScaleByAdagradState(NamedTuple):
    """Sum of squares of all past updates, like the parameters."""

    total: Params


def scale(factor: Scalar) -> Transform:
    """Multiply the updates by a number.

    >>> rule = scale(-0.1)
    >>> rule.update({"w": torch.ones(1)}, rule.init({}), {})[0]
    {'w': tensor([-0.1000])}
    """

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        return times(updates, factor), state

    return Transform(lambda params: EmptyState(), update)


def scale_by_schedule(schedule: Rate, *, own: bool = False) -> Transform:
    """Multiply the updates by ``schedule(count)``, where count is the number of completed updates, first 0.

    Args:
        schedule: A function of the count, or a number.
        own: Whether a parameter that the loss did not reach at some steps counts its own updates. The rules of torch
            do so that make their rate themselves. By default all steps count for all parameters.

    >>> rule = scale_by_schedule(lambda count: 1.0 / (count + 1))
    >>> updates, state = rule.update({"w": torch.ones(1)}, rule.init({}), {})
    >>> rule.update({"w": torch.ones(1)}, state, {})
    ({'w': tensor([0.5000])}, ScaleByScheduleState(count=tensor(2)))
    """
    if not callable(schedule):
        return scale(schedule)

    def init(params: Params) -> Tree:
        return (ScaleByOwnScheduleState if own else ScaleByScheduleState)(zero_count(params))

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        scaled = times(updates, schedule(state.count))
        if not own:
            return scaled, ScaleByScheduleState(state.count + 1)
        late = {name: missed for name, missed in state.late.items() if name in updates}
        mine = {name: times(updates[name], schedule(state.count - missed)) for name, missed in late.items()}
        return {**scaled, **mine}, ScaleByOwnScheduleState(state.count + 1, state.late)

    return Transform(init, update)


def scale_by_learning_rate(learning_rate: Rate) -> Transform:
    """Multiply the updates by ``-learning_rate``: the last word of an optimizer, for updates are *added*.

    Args:
        learning_rate: A number, a 0-dim tensor, or a function of the number of completed updates,
            ``int64[]``.

    Raises:
        ValueError: If it is negative.

    >>> rule = scale_by_learning_rate(0.1)
    >>> rule.update({"w": torch.ones(1)}, rule.init({}), {})[0]
    {'w': tensor([-0.1000])}
    """
    nonnegative("scale_by_learning_rate", learning_rate=learning_rate)
    if callable(learning_rate):
        return scale_by_schedule(lambda count: -learning_rate(count))
    rate: Scalar = learning_rate

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        return times(updates, -rate), state  # not `scale`: a rerun names the number by this closure

    return Transform(scale(-rate).init, update)


def trace(decay: Scalar, *, nesterov: bool = False, dampening: Scalar = 0.0) -> Transform:
    """Momentum: ``trace ← decay · trace + (1 - dampening) · update``.

    The first update enters undampened, as in `torch.optim.SGD`. Polyak 1964; with ``nesterov`` the step looks
    ahead, Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html.

    Raises:
        ValueError: If ``decay`` or ``dampening`` is outside [0, 1).

    >>> rule = trace(0.9)
    >>> params = {"w": torch.ones(1)}
    >>> updates, state = rule.update(params, rule.init(params), params)
    >>> rule.update(params, state, params)[0]
    {'w': tensor([1.9000])}
    """
    fraction("trace", decay=decay, dampening=dampening)

    def init(params: Params) -> Tree:
        return TraceState(zero_count(params), tree.zeros_like(params))

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        new = updates
        if isinstance(dampening, Tensor) or dampening:
            damped = times(updates, 1.0 - dampening)
            new = tree.where(state.count == 0, updates, damped)
            late = state.late.items()
            new = {**new, **{n: torch.where(state.count == missed, updates[n], damped[n]) for n, missed in late}}
        sums = tree.add(times(state.trace, decay), new)
        updates = tree.add(updates, times(sums, decay)) if nesterov else sums
        return updates, TraceState(state.count + 1, sums, state.late)

    return Transform(init, update)


def scale_by_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    mu_dtype: torch.dtype | None = None,
    nu_dtype: torch.dtype | None = None,
) -> Transform:
    """Divide the mean of the updates by the root of their mean square, both moving and unbiased.

    ::

        mu ← b1 · mu + (1 - b1) · g                   nu ← b2 · nu + (1 - b2) · g²
        mu_hat = mu / (1 - b1^t)                      nu_hat = nu / (1 - b2^t)
        update = mu_hat / (√nu_hat + eps)

    Algorithm 1 of Kingma & Ba 2015, https://arxiv.org/abs/1412.6980.

    Args:
        b1: Share of the past in the first moment.
        b2: Share of the past in the second moment.
        eps: Keeps the quotient finite; in the unit of the gradient.
        mu_dtype: dtype of the first moment; None for that of the parameter.
        nu_dtype: dtype of the second moment; None for that of the parameter.

    Raises:
        ValueError: If ``b1`` or ``b2`` is outside [0, 1), or ``eps`` negative.

    >>> rule = scale_by_adam()
    >>> params = {"w": torch.tensor([3.0, -0.2])}
    >>> rule.update(params, rule.init(params), params)[0]
    {'w': tensor([ 1.0000, -1.0000])}
    """
    fraction("scale_by_adam", b1=b1, b2=b2)
    nonnegative("scale_by_adam", eps=eps)

    def init(params: Params) -> Tree:
        mu, nu = tree.zeros_like(params, mu_dtype), tree.zeros_like(params, nu_dtype)
        return ScaleByAdamState(zero_count(params), mu, nu)

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        count = state.count + 1
        mu = average(state.mu, updates, b1)
        nu = average(state.nu, square(tree.cast_like(updates, state.nu)), b2)
        mu_hat, nu_hat = unbias(mu, b1, count, state.late), unbias(nu, b2, count, state.late)
        step = tree.div(mu_hat, plus(tree.sqrt(nu_hat), eps))
        return tree.cast_like(step, updates), ScaleByAdamState(count, mu, nu, state.late)

    return Transform(init, on_parts(update))


def scale_by_lion(b1: Scalar = 0.9, b2: Scalar = 0.99, *, mu_dtype: torch.dtype | None = None) -> Transform:
    """Take the sign of a mixture of the moment and the update: every number moves by ±1.

    ::

        update = sign(b1 · mu + (1 - b1) · g)         mu ← b2 · mu + (1 - b2) · g

    Algorithm 2 of Chen et al. 2023, https://arxiv.org/abs/2302.06675.

    Raises:
        ValueError: If ``b1`` or ``b2`` is outside [0, 1).

    >>> rule = scale_by_lion()
    >>> params = {"w": torch.tensor([3.0, -0.2])}
    >>> rule.update(params, rule.init(params), params)[0]
    {'w': tensor([ 1., -1.])}
    """
    fraction("scale_by_lion", b1=b1, b2=b2)

    def init(params: Params) -> Tree:
        return ScaleByLionState(tree.zeros_like(params, mu_dtype))

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        step = tree.map(torch.sign, average(state.mu, updates, b1))
        return tree.cast_like(step, updates), ScaleByLionState(average(state.mu, updates, b2))

    return Transform(init, on_parts(update))


def scale_by_rms(decay: Scalar = 0.99, eps: Scalar = 1e-8, *, centered: bool = False) -> Transform:
    """Divide the updates by the root of their moving mean square, or with ``centered`` by their deviation.

    ::

        nu ← decay · nu + (1 - decay) · g²            mu ← decay · mu + (1 - decay) · g
        update = g / (√nu + eps)                      centered: g / (√(nu - mu²) + eps)

    Tieleman & Hinton 2012, lecture 6.5; centered: Graves 2013, https://arxiv.org/abs/1308.0850, equation 39.

    Raises:
        ValueError: If ``decay`` is outside [0, 1), or ``eps`` negative.

    >>> rule = scale_by_rms(0.75)
    >>> params = {"w": torch.tensor([3.0, -0.2])}
    >>> rule.update(params, rule.init(params), params)[0]
    {'w': tensor([ 2.0000, -2.0000])}
    """
    fraction("scale_by_rms", decay=decay)
    nonnegative("scale_by_rms", eps=eps)

    def init(params: Params) -> Tree:
        return ScaleByRmsState(tree.zeros_like(params), tree.zeros_like(params) if centered else {})

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        nu = average(state.nu, square(updates), decay)
        mu = average(state.mu, updates, decay) if centered else {}
        variance = tree.addcmul(nu, mu, mu, -1.0) if centered else nu
        return tree.div(updates, plus(tree.sqrt(variance), eps)), ScaleByRmsState(nu, mu)

    return Transform(init, on_parts(update))


def scale_by_adagrad(initial: Scalar = 0.0, eps: Scalar = 1e-10) -> Transform:
    """Divide the updates by the root of the sum of their squares so far: ``g / (√Σg² + eps)``.

    Duchi, Hazan & Singer 2011, https://jmlr.org/papers/v12/duchi11a.html.

    Args:
        initial: Where the sum of squares starts.
        eps: Keeps the quotient finite; in the unit of the gradient.

    Raises:
        ValueError: If ``initial`` or ``eps`` is negative.

    >>> rule = scale_by_adagrad()
    >>> params = {"w": torch.tensor([3.0, -0.2])}
    >>> rule.update(params, rule.init(params), params)[0]
    {'w': tensor([ 1., -1.])}
    """
    nonnegative("scale_by_adagrad", initial=initial, eps=eps)

    def init(params: Params) -> Tree:
        return ScaleByAdagradState(plus(tree.zeros_like(params), initial))

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        total = tree.addcmul(state.total, updates, updates)
        return tree.div(updates, plus(tree.sqrt(total), eps)), ScaleByAdagradState(total)

    return Transform(init, on_parts(update))
