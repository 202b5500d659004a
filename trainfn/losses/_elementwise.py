"""Losses that compare element with element. The weight counts **elements**, so ``.value`` is torch's mean.

An element of weight 0 may hold anything in its prediction or target, even NaN: it reaches neither the loss
nor the gradient. So ``weights=~targets.isnan()`` is how missing targets are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from trainfn._types import Mean
from trainfn.losses._checks import (
    check_constant,
    check_float,
    check_same_shape,
    check_smoothing,
    check_weights,
    shape,
    widen,
)


def mse(predictions: Tensor, targets: Tensor, *, weights: Tensor | None = None) -> Mean:
    """Squared error, averaged over elements.

    Args:
        predictions: ``predictions[...]``.
        targets: ``targets[...]``, the same shape: there is no broadcasting.
        weights: Constant weight of each element, or a mask; as many dimensions, each the same or 1.

    Raises:
        ValueError: If shapes disagree.
        TypeError: If the predictions are not floating-point numbers.

    Source: `torch.nn.functional.mse_loss`.

    >>> mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0]))
    Mean(4.5 over weight 2)
    """
    return _elementwise("mse", F.mse_loss, predictions, targets, weights)


def mae(predictions: Tensor, targets: Tensor, *, weights: Tensor | None = None) -> Mean:
    """Absolute error, averaged over elements.

    Args:
        predictions: ``predictions[...]``.
        targets: ``targets[...]``, the same shape: there is no broadcasting.
        weights: Constant weight of each element, or a mask; as many dimensions, each the same or 1.

    Raises:
        ValueError: If shapes disagree.
        TypeError: If the predictions are not floating-point numbers.

    Source: `torch.nn.functional.l1_loss`.

    >>> mae(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0]))
    Mean(1.5 over weight 2)
    """
    return _elementwise("mae", F.l1_loss, predictions, targets, weights)


def huber(predictions: Tensor, targets: Tensor, *, delta: float = 1.0, weights: Tensor | None = None) -> Mean:
    """Huber's loss, averaged over elements: half the squared error up to ``delta``, beyond it linear.

    Args:
        predictions: ``predictions[...]``.
        targets: ``targets[...]``, the same shape: there is no broadcasting.
        delta: The error where the parabola becomes a line, in units of the targets; above 0.
        weights: Constant weight of each element, or a mask; as many dimensions, each the same or 1.

    Raises:
        ValueError: If shapes disagree, or ``delta`` is not positive.
        TypeError: If the predictions are not floating-point numbers.

    Source: `torch.nn.functional.huber_loss`.

    >>> huber(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0]))
    Mean(1.25 over weight 2)
    """
    if not delta > 0:
        raise ValueError(
            f"`huber(predictions, targets)` got delta={delta}, the error where the loss becomes linear, which"
            " must be above 0. Write delta=1.0, or `mae(predictions, targets)` for a loss that is linear"
            " everywhere."
        )
    return _elementwise("huber", partial(F.huber_loss, delta=delta), predictions, targets, weights)


def binary_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Mean:
    """Cross entropy in nats between ``sigmoid(logits)`` and the targets, averaged over elements.

    With ``weights`` the mean divides by their sum; torch's divides by the number of elements all the same.

    Args:
        logits: ``logits[...]``, before the sigmoid.
        targets: Probabilities of "yes", or booleans, ``targets[...]``, the same shape: there is no
            broadcasting.
        pos_weight: What a "yes" weighs against a "no", constant; a scalar, or ``float[C]`` for ``logits[...,
            C]``. It is part of the loss, so the mean's weight doesn't change.
        label_smoothing: Moves the targets towards one half by this share, in [0, 1).
        weights: Constant weight of each element, or a mask; as many dimensions, each the same or 1.

    Raises:
        ValueError: If shapes disagree, or the smoothing is out of range.
        TypeError: If the logits are not floating-point numbers.

    Source: `torch.nn.functional.binary_cross_entropy_with_logits`.

    >>> loss = binary_cross_entropy(torch.zeros(2), torch.tensor([True, False]))
    >>> loss.weight.item(), round(loss.value.item(), 4)
    (2.0, 0.6931)
    """
    call = "binary_cross_entropy(logits, targets)"
    check_smoothing(call, label_smoothing)
    if pos_weight is not None:
        _check_pos_weight(call, pos_weight, logits)
        pos_weight = pos_weight.to(widen(logits).dtype)

    def fn(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
        targets = targets * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight, reduction=reduction)

    return _elementwise("binary_cross_entropy", fn, logits, targets, weights, "logits")


def _check_pos_weight(call: str, pos_weight: Tensor, logits: Tensor) -> None:
    if pos_weight.dim() > 0 and pos_weight.shape != logits.shape[-1:]:
        raise ValueError(
            f"`{call}` got pos_weight of shape {shape(pos_weight)} for logits of shape {shape(logits)}: it is"
            f" a scalar, or one per class of logits[..., C], that is {list(logits.shape[-1:])}. For a weight"
            " per element write weights=."
        )
    check_constant(call, "pos_weight", pos_weight)


def _elementwise(
    fn_name: str,
    fn: Callable[..., Tensor],
    predictions: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    name: str = "predictions",
) -> Mean:
    """Check, widen, silence the elements of weight 0 on both sides, and sum."""
    call = f"{fn_name}({name}, targets)"
    check_float(call, name, predictions)
    check_same_shape(call, name, predictions, targets)
    check_weights(call, weights, targets)
    predictions = widen(predictions)
    targets = targets.to(predictions.dtype)
    if weights is not None:
        predictions, targets = (torch.where(weights != 0, x, 0) for x in (predictions, targets))
    return Mean.of(fn(predictions, targets, reduction="none"), weights)
