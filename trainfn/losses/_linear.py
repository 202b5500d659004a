"""The last linear layer and its cross entropy as one function, a chunk of rows at a time.

A language model's logits are its largest tensor by far. 16,384 tokens times 128,256 words are 8.4 GB in float32, and
again for their gradient. Here a chunk's logits live only until its loss and gradients are known, so memory is
``chunk_size * C``. The gradients are computed in the forward pass, so no logits are computed twice: three matrix
products, as without chunks.

Source: the idea is from Liger Kernel, https://arxiv.org/abs/2410.10989, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainfn._types import Mean
from trainfn.losses._checks import (
    check_class_indices,
    check_classes,
    check_float,
    check_smoothing,
    check_weights,
    shape,
    widen,
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_size: int = 1024,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Mean:
    """Cross entropy of ``hidden @ weight.T + bias`` in nats, per row, without ever holding all logits.

    Equal to `cross_entropy` of those logits up to the order of summation. Not to be differentiated twice: to
    a second derivative this loss's gradient is a constant.

    Args:
        hidden: Input of the last layer, ``hidden[..., D]``.
        weight: The last layer's matrix, ``weight[C, D]``: what `torch.nn.Linear` and a tied embedding hold.
        targets: Class indices, ``int[...]``.
        bias: ``bias[C]``.
        chunk_size: Rows whose logits exist at one time. `torch.compile` unrolls the loop over chunks, so each
            number of chunks is a graph of its own.
        ignore_index: Rows with this target count for nothing.
        label_smoothing: Share of each target spread evenly over the classes, in [0, 1).
        weights: Constant weight of each row, or a mask; as many dimensions as ``targets``, each the same or
            1.

    Raises:
        ValueError: If shapes disagree, or the smoothing or the chunk size is out of range.
        TypeError: If the targets are not integers.

    Source: `torch.nn.functional.cross_entropy`; chunks, https://arxiv.org/abs/2410.10989.

    >>> hidden, weight, targets = torch.zeros(6, 3), torch.zeros(4, 3), torch.arange(6) % 4
    >>> loss = linear_cross_entropy(hidden, weight, targets, chunk_size=2)
    >>> loss.weight.item(), round(loss.value.item(), 4)
    (6.0, 1.3863)
    """
    _check(hidden, weight, targets, bias, chunk_size, label_smoothing, weights)
    kept, dtype = targets != ignore_index, widen(hidden).dtype
    rows = kept.to(dtype) if weights is None else torch.where(kept, weights, 0).to(dtype)
    classes = torch.where(kept, targets, 0).long()
    wanted = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight, bias)]
    run = _LinearCrossEntropy.apply if any(wanted) else _forward
    total = run(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        classes.flatten(),
        rows.flatten(),
        label_smoothing,
        chunk_size,
        wanted,
    )[0]
    return Mean(total, rows.sum().float())


class _LinearCrossEntropy(torch.autograd.Function):
    """`_forward`, whose further outputs are the gradients of its first."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return _forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        grads = output[1:]
        ctx.mark_non_differentiable(*(g for g in grads if g is not None))
        ctx.save_for_backward(*grads)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grads = [None if g is None else grad_outputs[0].to(g.dtype) * g for g in ctx.saved_tensors]
        return *grads, None, None, None, None, None


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    classes: Tensor,
    rows: Tensor,
    label_smoothing: float,
    chunk_size: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The total over all rows and, where ``wanted``, its gradients by hidden, weight and bias.

    The sums over chunks are kept in at least float32, so that their number does not show in 16-bit gradients.
    """
    total = rows.new_zeros(())
    grad_hidden: list[Tensor] = []
    grad_weight = torch.zeros_like(weight, dtype=rows.dtype) if wanted[1] else None
    grad_bias = torch.zeros_like(bias, dtype=rows.dtype) if wanted[2] and bias is not None else None
    chunks = zip(hidden.split(chunk_size), classes.split(chunk_size), rows.split(chunk_size), strict=True)
    for x, y, r in chunks:
        log_p = F.log_softmax(widen(F.linear(x, weight, bias)), -1)
        total = total + _losses(log_p, y, r, label_smoothing).sum()
        if not any(wanted):
            continue
        grad = _grad_logits(log_p, y, r, label_smoothing)
        if grad_bias is not None:
            grad_bias += grad.sum(0)
        grad = grad.to(x.dtype)
        if wanted[0]:
            grad_hidden.append(grad @ weight)
        if grad_weight is not None:
            grad_weight += grad.T @ x
    return (
        total,
        torch.cat(grad_hidden).to(hidden.dtype) if wanted[0] else None,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )


def _losses(log_p: Tensor, classes: Tensor, rows: Tensor, label_smoothing: float) -> Tensor:
    """Weighted loss of each row: ``-sum(q * log_p)``, where q is one-hot up to the smoothing."""
    losses = (label_smoothing - 1) * log_p.gather(-1, classes[:, None]).squeeze(-1)
    if label_smoothing:
        losses = losses - label_smoothing * log_p.mean(-1)
    return torch.where(rows != 0, losses * rows, 0)


def _grad_logits(log_p: Tensor, classes: Tensor, rows: Tensor, label_smoothing: float) -> Tensor:
    """Gradient of the weighted loss by the logits: ``(softmax - q) * rows``, overwriting ``log_p``."""
    num_classes = log_p.shape[-1]
    hot = torch.arange(num_classes, device=log_p.device) == classes[:, None]
    grad = log_p.exp_().add_(hot, alpha=label_smoothing - 1)
    return grad.sub_(label_smoothing / num_classes).mul_(rows[:, None])


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    chunk_size: int,
    label_smoothing: float,
    weights: Tensor | None,
) -> None:
    call = "linear_cross_entropy(hidden, weight, targets)"
    check_float(call, "hidden", hidden)
    check_smoothing(call, label_smoothing)
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        fix = "weight.T" if weight.dim() == 2 and hidden.shape[-1:] == weight.shape[:1] else "linear.weight"
        raise ValueError(
            f"`{call}` got hidden of shape {shape(hidden)} and weight of shape {shape(weight)}, but"
            f" hidden[..., D] takes weight[C, D], as `torch.nn.Linear(D, C)` holds it. Write {fix}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"`{call}` got bias of shape {shape(bias)} and weight of shape {shape(weight)}: weight[C, D]"
            f" takes bias[C]. Write a bias of {weight.shape[0]} numbers, one per class."
        )
    if chunk_size < 1:
        raise ValueError(
            f"`{call}` got chunk_size={chunk_size}, the number of rows whose logits exist at one time. Write"
            " chunk_size=1024."
        )
    logits = hidden[..., :1].expand(*hidden.shape[:-1], weight.shape[0])  # their shape; no memory
    check_classes(call, logits)
    check_class_indices(call, logits, targets)
    check_weights(call, weights, targets)
