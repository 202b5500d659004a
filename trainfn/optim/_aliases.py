"""Optimizers: each is a sentence of transforms, and ends with the learning rate."""

from __future__ import annotations

import torch

from trainfn._types import Transform
from trainfn.optim._combine import chain, identity
from trainfn.optim._decay import add_decayed_weights
from trainfn.optim._masks import Mask
from trainfn.optim._math import Rate, Scalar, fraction, nonnegative
from trainfn.optim._scale import (
    scale_by_adagrad,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_lion,
    scale_by_rms,
    trace,
)


def sgd(
    learning_rate: Rate, *, momentum: Scalar | None = None, nesterov: bool = False, dampening: Scalar = 0.0
) -> Transform:
    """Stochastic gradient descent, with or without momentum; the arithmetic of `torch.optim.SGD`.

    Its ``weight_decay`` is ``chain(add_decayed_weights(weight_decay), sgd(…))``.

    Args:
        learning_rate: A number, a 0-dim tensor, or a function of the number of completed updates.
        momentum: Share of the past in the trace; None for no momentum, and no state.
        nesterov: Whether the step looks ahead.
        dampening: Share of each gradient (but the first) that is left out of the trace.

    Raises:
        ValueError: If the rate is negative, ``momentum`` or ``dampening`` outside [0, 1), or ``nesterov`` is
            asked for without momentum or with dampening.

    >>> optimizer = sgd(0.1, momentum=0.9)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    nonnegative("sgd", learning_rate=learning_rate)
    fraction("sgd", momentum=momentum, dampening=dampening)
    if nesterov and (momentum is None or (not isinstance(dampening, torch.Tensor) and dampening != 0)):
        raise ValueError(
            f"`sgd(nesterov=True, momentum={momentum!r}, dampening={dampening!r})` can't work: Nesterov's"
            " look-ahead is along the undampened momentum. Write `sgd(learning_rate, momentum=0.9,"
            " nesterov=True)`."
        )
    heavy_ball = identity() if momentum is None else trace(momentum, nesterov=nesterov, dampening=dampening)
    return chain(heavy_ball, scale_by_learning_rate(learning_rate))


def adam(
    learning_rate: Rate,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    mu_dtype: torch.dtype | None = None,
    nu_dtype: torch.dtype | None = None,
) -> Transform:
    """Adam; the arithmetic of `torch.optim.Adam` without weight decay.

    With its coupled ``weight_decay``: ``chain(add_decayed_weights(weight_decay), adam(…))``; decoupled:
    `adamw`. Kingma & Ba 2015, https://arxiv.org/abs/1412.6980.

    Args:
        learning_rate: A number, a 0-dim tensor, or a function of the number of completed updates.
        b1: Share of the past in the first moment.
        b2: Share of the past in the second moment.
        eps: Keeps the quotient finite; in the unit of the gradient.
        mu_dtype: dtype of the first moment; None for that of the parameter.
        nu_dtype: dtype of the second moment; None for that of the parameter.

    Raises:
        ValueError: If the rate or ``eps`` is negative, or ``b1`` or ``b2`` outside [0, 1).

    >>> optimizer = adam(1e-3)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params)[0]
    {'w': tensor([-0.0010])}
    """
    nonnegative("adam", learning_rate=learning_rate, eps=eps)
    fraction("adam", b1=b1, b2=b2)
    return chain(
        scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        scale_by_learning_rate(learning_rate),
    )


def adamw(
    learning_rate: Rate,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    weight_decay: Scalar = 0.01,
    mask: Mask = None,
    mu_dtype: torch.dtype | None = None,
    nu_dtype: torch.dtype | None = None,
) -> Transform:
    """Adam with decoupled weight decay; the arithmetic of `torch.optim.AdamW`.

    Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101.

    Args:
        learning_rate: A number, a 0-dim tensor, or a function of the number of completed updates.
        b1: Share of the past in the first moment.
        b2: Share of the past in the second moment.
        eps: Keeps the quotient finite; in the unit of the gradient.
        weight_decay: Share of a weight that a step of learning rate 1 takes away.
        mask: Which parameters decay, see `masked`; None for all, `decay_mask` for all but biases and norms.
        mu_dtype: dtype of the first moment; None for that of the parameter.
        nu_dtype: dtype of the second moment; None for that of the parameter.

    Raises:
        ValueError: If the rate, ``eps`` or ``weight_decay`` is negative, or ``b1`` or ``b2`` outside [0, 1).

    >>> from trainfn.optim import decay_mask
    >>> optimizer = adamw(1e-3, weight_decay=0.1, mask=decay_mask)
    >>> params = {"fc.weight": torch.ones(1, 1), "fc.bias": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init(params), params)[0]
    {'fc.weight': tensor([[-0.0011]]), 'fc.bias': tensor([-0.0010])}
    """
    nonnegative("adamw", learning_rate=learning_rate, eps=eps, weight_decay=weight_decay)
    fraction("adamw", b1=b1, b2=b2)
    return chain(
        scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def lion(
    learning_rate: Rate,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    *,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
    mu_dtype: torch.dtype | None = None,
) -> Transform:
    """Lion: the sign of a momentum, with decoupled weight decay.

    Its learning rate is usually 3-10 times smaller than AdamW's, its weight decay as much larger.
    Chen et al. 2023, https://arxiv.org/abs/2302.06675.

    Args:
        learning_rate: A number, a 0-dim tensor, or a function of the number of completed updates.
        b1: Share of the moment in the step.
        b2: Share of the past in the moment.
        weight_decay: Share of a weight that a step of learning rate 1 takes away.
        mask: Which parameters decay; see `masked`.
        mu_dtype: dtype of the moment; None for that of the parameter.

    Raises:
        ValueError: If the rate or ``weight_decay`` is negative, or ``b1`` or ``b2`` outside [0, 1).

    >>> optimizer = lion(1e-4)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params)[0]
    {'w': tensor([-1.0000e-04])}
    """
    nonnegative("lion", learning_rate=learning_rate, weight_decay=weight_decay)
    fraction("lion", b1=b1, b2=b2)
    return chain(
        scale_by_lion(b1, b2, mu_dtype=mu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def rmsprop(
    learning_rate: Rate,
    decay: Scalar = 0.99,
    eps: Scalar = 1e-8,
    *,
    centered: bool = False,
    momentum: Scalar | None = None,
) -> Transform:
    """RMSprop; the arithmetic of `torch.optim.RMSprop`, whose ``alpha`` is ``decay``.

    Tieleman & Hinton 2012, lecture 6.5; centered: Graves 2013, https://arxiv.org/abs/1308.0850.

    Args:
        learning_rate: A number, a 0-dim tensor, or a function of the number of completed updates.
        decay: Share of the past in the mean square.
        eps: Keeps the quotient finite; in the unit of the gradient.
        centered: Whether to divide by the deviation instead of the root mean square.
        momentum: Share of the past in the trace of the scaled gradients; None for no momentum.

    Raises:
        ValueError: If the rate or ``eps`` is negative, or ``decay`` or ``momentum`` outside [0, 1).

    >>> optimizer = rmsprop(0.01)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    nonnegative("rmsprop", learning_rate=learning_rate, eps=eps)
    fraction("rmsprop", decay=decay, momentum=momentum)
    return chain(
        scale_by_rms(decay, eps, centered=centered),
        identity() if momentum is None else trace(momentum),
        scale_by_learning_rate(learning_rate),
    )


def adagrad(learning_rate: Rate, *, initial: Scalar = 0.0, eps: Scalar = 1e-10) -> Transform:
    """Adagrad; the arithmetic of `torch.optim.Adagrad`, whose ``initial_accumulator_value`` is ``initial``.

    Duchi, Hazan & Singer 2011, https://jmlr.org/papers/v12/duchi11a.html.

    Args:
        learning_rate: A number, a 0-dim tensor, or a function of the number of completed updates.
        initial: Where the sum of squares starts.
        eps: Keeps the quotient finite; in the unit of the gradient.

    Raises:
        ValueError: If one of them is negative.

    >>> optimizer = adagrad(0.01)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params)[0]
    {'w': tensor([-0.0100])}
    """
    nonnegative("adagrad", learning_rate=learning_rate, initial=initial, eps=eps)
    return chain(scale_by_adagrad(initial, eps), scale_by_learning_rate(learning_rate))
