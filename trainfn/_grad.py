"""Losses as exact sums, and their gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from trainfn import tree
from trainfn._keyed import Randomness
from trainfn._marks import backward_pass
from trainfn._module import bound, check_state
from trainfn._types import Batch, Gradients, Loss, Mean, Metrics, Params, TrainState
from trainfn.errors import InexactLossWarning

_HOW_EXACT = (
    "Return `Mean(total, weight)` instead: `tfn.losses.cross_entropy(logits, targets)`, or"
    " `tfn.Mean.of(values, mask)` of what you would have averaged."
)
_RESERVED = ("loss", "grad_norm")


class GradientFunction(Protocol):
    """``(state, batch, first_row) -> Gradients``."""

    def __call__(self, state: TrainState, batch: Batch, first_row: Tensor | int = 0, /) -> Gradients:
        """Return the sums over the rows of ``batch``, which are rows ``first_row …`` of the whole batch."""
        ...


def value_and_grad(loss: Loss) -> GradientFunction:
    """The function ``(state, batch) -> Gradients`` of a loss: its sums over the rows, and their derivatives.

    Torch's random functions, dropout included, draw from ``fold_in(state.key, state.step)``; the module runs in
    training mode. Nothing is divided: gradients of pieces of a batch add up to the gradients of the batch.

    Args:
        loss: ``loss(model, batch) -> Mean``, or ``(Mean, {"name": Mean})``. A bare scalar is taken as the mean
            over the batch's rows, and an `InexactLossWarning` says so.

    Raises:
        TypeError: If the loss returns something else.
        ValueError: If the loss does not depend on any parameter.

    >>> import torch, trainfn as tfn
    >>> state = tfn.init({"w": torch.tensor([3.0])}, tfn.optim.sgd(0.1))
    >>> value_and_grad(lambda p, x: tfn.Mean.of(p["w"] * x))(state, torch.tensor([1.0, 2.0])).grads
    {'w': tensor([3.])}
    """
    return gradient_function(loss, lambda state, weight: weight)


def gradient_function(loss: Loss, common: Callable[[TrainState, Tensor], Tensor]) -> GradientFunction:
    """See `value_and_grad`; ``common`` makes of a weight one that all ranks have in common."""
    randomness = Randomness()

    def gradients(state: TrainState, batch: Batch, first_row: Tensor | int = 0, /) -> Gradients:
        check_state(state)
        rows = tree.row_count(batch)

        def sums() -> Gradients:
            params = {name: p.detach().requires_grad_() for name, p in state.params.items()}
            with torch.enable_grad(), bound(state, params, training=True) as (model, buffers):
                mean, metrics = exact(loss(model, batch), rows)
                grads = _derivatives(mean, params, _scale(state, mean, common))
            torch.clear_autocast_cache()  # under a caller's autocast it would keep copies of these parameters
            return Gradients(detached(mean), grads, {k: detached(m) for k, m in metrics.items()}, buffers)

        return randomness(state, sums, rows=rows, first_row=first_row)

    return gradients


def _scale(state: TrainState, mean: Mean, common: Callable[[TrainState, Tensor], Tensor]) -> Tensor | None:
    """By which to multiply the total, so that the mean is multiplied by the loss scale: almost."""
    if "loss_scale" not in state.extra:
        return None
    return state.extra["loss_scale"]["scale"] / _power_of_two(common(state, mean.weight.detach()))


def _derivatives(mean: Mean, params: Params, scale: Tensor | None) -> Params:
    """The gradients of the total; with loss scaling, of a larger one on the way back, so that float16 holds them."""
    if not mean.total.requires_grad:
        raise ValueError(
            "value_and_grad(loss): the loss does not depend on any parameter. Compute it from the `model` argument:"
            " a module taken from outside the loss, `torch.no_grad()` or `.detach()` cuts the connection."
        )
    seed = mean.total if scale is None else mean.total.float() * scale
    with backward_pass():
        grads = torch.autograd.grad(seed, list(params.values()), allow_unused=True, materialize_grads=True)
    named = dict(zip(params, grads, strict=True))
    return named if scale is None else tree.div(named, scale)


def _power_of_two(weight: Tensor) -> Tensor:
    """The next one: what is scaled is the mean, but by a number that divides out exactly."""
    return torch.exp2(torch.ceil(torch.log2(weight.clamp(min=1.0))))


def detached(mean: Mean) -> Mean:
    return Mean(mean.total.detach(), mean.weight.detach())


def exact(output: object, rows: int) -> tuple[Mean, Metrics]:
    """The mean and the metrics that a loss returned, in their full form."""
    mean, metrics = output, {}
    if isinstance(output, tuple) and not isinstance(output, Mean):
        if len(output) != 2:
            raise TypeError(f"loss(model, batch) returned a tuple of {len(output)}, not (mean, metrics). {_HOW_EXACT}")
        mean, metrics = output
    if isinstance(mean, Tensor) and mean.dim() == 0:
        _warn_inexact()
        mean = Mean(mean * rows, torch.full((), rows, dtype=torch.float32, device=mean.device))
    if not isinstance(mean, Mean):
        shape = f" of shape {list(mean.shape)}" if isinstance(mean, Tensor) else ""
        raise TypeError(f"loss(model, batch) returned a {type(mean).__name__}{shape}. {_HOW_EXACT}")
    if not isinstance(metrics, dict):
        raise TypeError(
            f"loss(model, batch) returned ({type(mean).__name__}, {type(metrics).__name__}); the second is a dict of"
            ' metrics: `return mean, {"accuracy": tfn.metrics.accuracy(logits, targets)}`.'
        )
    for name, metric in metrics.items():
        if name in _RESERVED:
            raise ValueError(f"loss(model, batch) returned a metric named {name!r}, which the step reports itself.")
        if not isinstance(metric, Mean):
            raise TypeError(f"metric {name!r} is a {type(metric).__name__}. Make it `tfn.Mean.of(values)`.")
    return mean, metrics


def _warn_inexact() -> None:
    """A compiled step warns once, while it is captured."""
    warnings.warn(
        "The loss returned a bare scalar. It is taken as the mean over the batch's rows, which is exact only if every"
        f" row weighs the same. With masked, padded or weighted rows it is wrong. {_HOW_EXACT}",
        InexactLossWarning,
        stacklevel=2,
    )


def summed(
    gradients: GradientFunction,
    state: TrainState,
    pieces: Iterable[tuple[Batch, int]],
    report: Callable[[], str],
) -> Gradients:
    """Add up the gradients of pieces of a batch, one at a time; the buffers are threaded through.

    Low-precision gradients are added in float32.
    """
    total: Gradients | None = None
    for piece, first_row in pieces:
        row = torch.full((), first_row, dtype=torch.int64, device=state.step.device)
        if total is None:
            total = gradients(state, piece, row)
            total = total._replace(grads={k: _own(g) for k, g in total.grads.items()})
        else:
            total = _add(total, gradients(state._replace(buffers=total.buffers), piece, row))
    if total is None:
        raise ValueError(report())
    return total


def _own(grad: Tensor) -> Tensor:
    """A copy to add to: what autograd returns may be one tensor for two parameters."""
    low = grad.dtype in (torch.float16, torch.bfloat16)
    return grad.to(torch.float32 if low else grad.dtype, copy=True)


def _add(total: Gradients, part: Gradients) -> Gradients:
    torch._foreach_add_(list(total.grads.values()), list(part.grads.values()))  # we own the first list
    metrics = {name: mean + part.metrics[name] for name, mean in total.metrics.items()}
    return Gradients(total.loss + part.loss, total.grads, metrics, part.buffers)
