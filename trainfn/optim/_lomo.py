"""LOMO and AdaLomo: optimizers with no moments, or with two vectors of them per matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from trainfn import tree
from trainfn._types import Params, Transform, Tree
from trainfn.optim._adafactor import adafactor
from trainfn.optim._clip import clip_by_global_norm, clip_by_value
from trainfn.optim._combine import EmptyState, chain, identity
from trainfn.optim._decay import add_decayed_weights
from trainfn.optim._masks import Mask
from trainfn.optim._math import Rate, Scalar, nonnegative, positive, times
from trainfn.optim._scale import scale_by_learning_rate


def lomo(
    learning_rate: Rate,
    *,
    clip_grad_norm: Scalar | None = None,
    clip_grad_value: Scalar | None = None,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
) -> Transform:
    """Gradient descent without state, in float32; the arithmetic of lomo-optim's ``Lomo``.

    Lv et al. 2023, https://arxiv.org/abs/2306.09782. Theirs updates each tensor inside the backward pass, so that one
    gradient exists at a time. It needs a second backward pass to clip by the norm. Here the update follows the backward
    pass of the same program. There are no moments, and with ``jit(donate=True)`` there is no second copy of the
    parameters. All gradients exist at once, unless the compiler saves that memory. In return clipping costs no second
    pass, and accumulation works as with every optimizer.

    Args:
        learning_rate: A number, a 0-dim tensor, or a function of the number of completed updates.
        clip_grad_norm: The largest 2-norm of all gradients as one vector; None for any.
        clip_grad_value: The largest magnitude of a number in a gradient; None for any. The norm is taken before.
        weight_decay: Share of a weight that a step of learning rate 1 takes away; decoupled.
        mask: Which parameters decay; see `masked`.

    Raises:
        ValueError: If the rate or ``weight_decay`` is negative, or a bound not above 0.

    >>> optimizer = lomo(0.1, clip_grad_norm=1.0)
    >>> params = {"w": torch.ones(2)}
    >>> optimizer.update({"w": torch.tensor([3.0, 4.0])}, optimizer.init(params), params)[0]
    {'w': tensor([-0.0600, -0.0800])}
    """
    nonnegative("lomo", learning_rate=learning_rate, weight_decay=weight_decay)
    positive("lomo", clip_grad_norm=clip_grad_norm, clip_grad_value=clip_grad_value)
    plain = not isinstance(weight_decay, Tensor) and weight_decay == 0
    return _in_float32(
        chain(
            _clip(clip_grad_norm, clip_grad_value),
            identity() if plain else add_decayed_weights(weight_decay, mask),
            scale_by_learning_rate(learning_rate),
        )
    )


def adalomo(
    learning_rate: Rate,
    *,
    decay_rate: Scalar = -0.8,
    eps: Scalar = 1e-30,
    eps_param: Scalar = 1e-3,
    clip_threshold: Scalar = 1.0,
    clip_grad_norm: Scalar | None = None,
    clip_grad_value: Scalar | None = None,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
) -> Transform:
    """LOMO with the factored second moments and the relative steps of `adafactor`; as lomo-optim's ``AdaLomo``.

    Lv et al. 2023, https://arxiv.org/abs/2310.10195. It is `adafactor` with its default options and a learning rate,
    in float32 throughout, after clipping. What `lomo` says on memory holds here; the moments are two vectors per
    matrix, and part of the state. There is no ``loss_scale``: nothing is computed in float16.

    Args:
        learning_rate: A number, a 0-dim tensor, or a function of the number of completed updates; times the root
            mean square of each parameter.
        decay_rate: The second moment forgets as ``t^decay_rate``.
        eps: Added to the squared gradient.
        eps_param: The least scale of a parameter.
        clip_threshold: The largest root mean square of an update, before the rate.
        clip_grad_norm: The largest 2-norm of all gradients as one vector; None for any.
        clip_grad_value: The largest magnitude of a number in a gradient; None for any. The norm is taken before.
        weight_decay: Share of a weight that a step of rate 1 takes away; decoupled.
        mask: Which parameters decay; see `masked`.

    Raises:
        ValueError: If a number is out of its range.

    >>> optimizer = adalomo(1e-2)
    >>> params = {"w": torch.full((1,), 2.0)}
    >>> optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params)[0]
    {'w': tensor([-0.0200])}
    """
    nonnegative("adalomo", learning_rate=learning_rate, eps=eps, eps_param=eps_param, weight_decay=weight_decay)
    positive("adalomo", clip_grad_norm=clip_grad_norm, clip_grad_value=clip_grad_value)
    rule = adafactor(
        learning_rate,
        decay_rate=decay_rate,
        eps=eps,
        eps_param=eps_param,
        clip_threshold=clip_threshold,
        weight_decay=weight_decay,
        mask=mask,
    )
    return _in_float32(chain(_clip(clip_grad_norm, clip_grad_value), rule))


def _clip(norm: Scalar | None, value: Scalar | None) -> Transform:
    """Both bounds, each of which looks at the gradients as they come."""
    if norm is None:
        return identity() if value is None else clip_by_value(value)
    if value is None:
        return clip_by_global_norm(norm)
    by_value = clip_by_value(value)

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        factor = torch.clamp(norm / (tree.global_norm(updates) + 1e-6), max=1.0)
        bounded, _ = by_value.update(updates, state, params)
        return times(bounded, factor), state

    return Transform(lambda params: EmptyState(), update)


def _in_float32(rule: Transform) -> Transform:
    """Apply a rule to gradients and parameters in at least float32; the sum is rounded once, to the parameter."""

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        wide = _widen(params)
        steps, new = rule.update(_widen(updates), state, wide)
        return tree.map(_rounded, steps, wide, params), new

    return Transform(rule.init, update)


def _widen(params: Params) -> Params:
    return tree.map(lambda x: x.to(torch.promote_types(x.dtype, torch.float32)), params)


def _rounded(step: Tensor, wide: Tensor, param: Tensor) -> Tensor:
    """The step that takes a narrow parameter to the number nearest to the wide sum."""
    return step if step.dtype == param.dtype else ((wide + step).to(param.dtype) - param).to(param.dtype)
