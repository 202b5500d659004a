"""Losses over one distribution per row: ``logits[..., C]``, the classes always last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainfn._types import Mean
from trainfn.losses._checks import (
    check_class_indices,
    check_class_weights,
    check_classes,
    check_float,
    check_no_ignore,
    check_probabilities,
    check_smoothing,
    check_weights,
    widen,
)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Mean:
    """Cross entropy in nats between ``softmax(logits)`` and the targets, per row.

    ``.value`` is that of `torch.nn.functional.cross_entropy` with ``reduction="mean"``, whose weight depends
    on the arguments (times ``weights``, if given):

    =============== ============================ ====================================================
    targets         class_weights                one row adds to the weight
    =============== ============================ ====================================================
    class indices   no                           1, or 0 where the target is ``ignore_index``
    class indices   yes                          its target's class weight, 0 where ignored
    probabilities   either                       1
    =============== ============================ ====================================================

    Args:
        logits: Unnormalised log-probabilities, ``logits[..., C]``. The class dimension is the **last**, where
            torch wants dimension 1: for images write ``logits.movedim(1, -1)``.
        targets: Class indices ``int[...]``, or probabilities ``float[..., C]``.
        ignore_index: Rows with this class index count for nothing; for class indices only.
        class_weights: ``float[C]``, constant.
        label_smoothing: Share of each target spread evenly over the classes, in [0, 1).
        weights: Constant weight of each row, or a mask; as many dimensions as the rows ``[...]``, each the
            same or 1.

    Raises:
        ValueError: If shapes disagree, there is a single class, the smoothing is out of range, or
            ``ignore_index`` meets probabilities.
        TypeError: If a dtype makes no sense.

    Source: `torch.nn.functional.cross_entropy`; label smoothing, https://arxiv.org/abs/1512.00567.

    >>> loss = cross_entropy(torch.zeros(3, 4), torch.tensor([1, 2, -100]))
    >>> loss.weight.item(), round(loss.value.item(), 4)
    (2.0, 1.3863)
    """
    _check_cross_entropy(logits, targets, ignore_index, class_weights, label_smoothing, weights)
    logits, classes = widen(logits), logits.shape[-1]
    soft = targets.is_floating_point()
    class_weights = None if class_weights is None else class_weights.to(logits.dtype)
    losses = F.cross_entropy(
        logits.reshape(-1, classes),
        targets.reshape(-1, classes).to(logits.dtype) if soft else targets.reshape(-1).long(),
        weight=class_weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    ).view(logits.shape[:-1])
    counts = torch.ones_like(losses) if soft else _counts(targets, ignore_index, class_weights, losses.dtype)
    return _weighted(losses, counts, weights)


def next_token(
    logits: Tensor,
    tokens: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Mean:
    """Cross entropy of predicting each token from those before it, in nats per predicted token.

    The logits at position t are compared with token t + 1; the last position predicts nothing. Rows of equal
    length T weigh T - 1 each, less the tokens that are ignored or masked.

    Args:
        logits: ``logits[..., T, C]``.
        tokens: The tokens that went into the model, ``int[..., T]``, not shifted.
        ignore_index: A token with this index is not predicted.
        label_smoothing: Share of each target spread evenly over the classes, in [0, 1).
        weights: What predicting ``tokens[..., t]`` weighs, such as the attention mask of right-padded rows;
            as many dimensions as ``tokens``, each the same or 1. The first token's weight is unused.

    Raises:
        ValueError: If shapes disagree, or the smoothing is out of range.
        TypeError: If a dtype makes no sense.

    Source: ``ForCausalLMLoss`` of Hugging Face transformers, which shifts in the same way.

    >>> next_token(torch.zeros(1, 4, 8), torch.tensor([[5, 1, 2, 3]])).weight.item()
    3.0
    """
    call = "next_token(logits, tokens)"
    check_float(call, "logits", logits)
    check_classes(call, logits)
    check_class_indices(call, logits, tokens, "tokens")
    check_weights(call, weights, tokens, "tokens")
    if tokens.dim() == 0:
        raise ValueError(
            f"`{call}` got tokens of shape []: there is no next token without a time dimension. Write"
            " logits[..., T, C] and tokens[..., T], or use `cross_entropy`."
        )
    # Moving the targets rather than cutting the logits spares a copy of the largest tensor there is.
    targets = F.pad(tokens.long()[..., 1:], (0, 1), value=ignore_index)
    if weights is not None:
        weights = F.pad(weights.expand_as(tokens)[..., 1:], (0, 1))
    return cross_entropy(logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, weights=weights)


def kl(logits: Tensor, targets: Tensor, *, weights: Tensor | None = None) -> Mean:
    """Kullback-Leibler divergence of the prediction from the target, in nats per row.

    KL(targets ‖ softmax(logits)), the sum over classes of ``targets * (log(targets) - log_softmax(logits))``:
    cross entropy less the target's own entropy. The weight counts **rows**, all leading dimensions together.
    On ``[N, C]`` that is `torch.nn.functional.kl_div` with ``reduction="batchmean"``, which on ``[N, T, C]``
    divides by N, and this by N * T; torch's default ``"mean"`` divides by the number of elements.

    Args:
        logits: Logits or log-probabilities (for which the softmax changes nothing), ``logits[..., C]``.
        targets: Probabilities, ``float[..., C]``; from a teacher's logits, ``teacher.softmax(-1)``.
        weights: Constant weight of each row, or a mask; as many dimensions as the rows ``[...]``, each the
            same or 1.

    Raises:
        ValueError: If shapes disagree.
        TypeError: If the targets are not floating-point numbers.

    Source: `torch.nn.functional.kl_div`; distillation, https://arxiv.org/abs/1503.02531.

    >>> kl(torch.zeros(2, 4), torch.full((2, 4), 0.25))
    Mean(0 over weight 2)
    """
    call = "kl(logits, targets)"
    check_float(call, "logits", logits)
    check_classes(call, logits)
    check_probabilities(call, logits, targets)
    check_weights(call, weights, logits[..., 0], "the rows")
    log_p = F.log_softmax(widen(logits), -1)
    q = targets.to(log_p.dtype)
    losses = (torch.xlogy(q, q) - q * log_p).sum(-1)
    return _weighted(losses, torch.ones_like(losses), weights)


def _counts(targets: Tensor, ignore_index: int, class_weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight of each row: 0 if it is ignored, else its class weight."""
    kept = targets != ignore_index
    if class_weights is None:
        return kept.to(dtype)
    return torch.where(kept, class_weights[torch.where(kept, targets, 0).long()], 0)


def _weighted(losses: Tensor, counts: Tensor, weights: Tensor | None) -> Mean:
    """Sum the rows; where the weight is 0 even an infinite loss counts for nothing."""
    if weights is not None:
        weights = weights.to(losses.dtype)
        losses = torch.where(weights != 0, losses, 0) * weights
        counts = counts * weights
    return Mean(losses.sum(), counts.sum().float())


def _check_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    class_weights: Tensor | None,
    label_smoothing: float,
    weights: Tensor | None,
) -> None:
    call = "cross_entropy(logits, targets)"
    check_float(call, "logits", logits)
    check_smoothing(call, label_smoothing)
    check_classes(call, logits)
    if targets.is_floating_point() and targets.shape == logits.shape:
        check_no_ignore(call, ignore_index)
    else:
        check_class_indices(call, logits, targets)
    if class_weights is not None:
        check_class_weights(call, class_weights, logits)
    if weights is not None:
        check_weights(call, weights, logits[..., 0], "the rows")
