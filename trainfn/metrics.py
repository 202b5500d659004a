"""Metrics: functions of outputs and targets that return a `Mean`, and so add up over rows.

Any loss is a metric too: ``{"mse": losses.mse(predictions, targets)}``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainfn._types import Mean


def accuracy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100, top_k: int = 1) -> Mean:
    """Share of rows whose target is among the ``top_k`` classes of highest logit; the weight counts rows.

    Ties go to the lower class, as in `torch.argmax`, so the result depends on nothing but the row; NaN is
    never right.

    Args:
        logits: ``logits[..., C]``, or anything else in their order.
        targets: Class indices, ``int[...]``.
        ignore_index: Rows with this target count for nothing.
        top_k: How many guesses a row has, from 1 to C.

    Raises:
        ValueError: If shapes disagree or ``top_k`` is out of range.
        TypeError: If the targets are not integers.

    Source: https://arxiv.org/abs/1409.0575, section 4.1, whose top-5 error is 1 less this.

    >>> logits = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.0, 0.0, 9.0]])
    >>> targets = torch.tensor([1, 1, -100])
    >>> accuracy(logits, targets).value.item(), accuracy(logits, targets, top_k=2).value.item()
    (0.5, 1.0)
    """
    _check("accuracy(logits, targets)", logits, targets, top_k)
    hits, kept = _hits(logits, targets, ignore_index, top_k)
    return Mean.of(hits, kept)


def per_class_accuracy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Mean:
    """Share of each class's rows that are found: the recall of every class, ``total[C]`` over ``weight[C]``.

    ``.value`` is NaN for a class without rows, so ``.value.nanmean()`` is the balanced accuracy.

    Args:
        logits: ``logits[..., C]``, or anything else in their order.
        targets: Class indices, ``int[...]``.
        ignore_index: Rows with this target count for nothing.

    Raises:
        ValueError: If shapes disagree.
        TypeError: If the targets are not integers.

    >>> logits = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    >>> per_class_accuracy(logits, torch.tensor([1, 1, 0])).value.tolist()
    [0.0, 0.5]
    """
    _check("per_class_accuracy(logits, targets)", logits, targets, 1)
    hits, kept = _hits(logits, targets, ignore_index, 1)
    classes = targets.flatten()[:, None] == torch.arange(logits.shape[-1], device=logits.device)
    rows = classes & kept.flatten()[:, None]
    return Mean((rows & hits.flatten()[:, None]).sum(0).float(), rows.sum(0).float())


def perplexity(loss: Mean) -> Tensor:
    """``exp`` of a mean cross entropy in nats: how many equally likely classes would be as surprising.

    A function of the whole mean: add the means first, for perplexities don't average.

    Source: Jelinek et al. 1977, https://doi.org/10.1121/1.2016299.

    >>> round(perplexity(Mean(torch.tensor(2.0794), torch.tensor(1.0))).item(), 2)
    8.0
    """
    return loss.value.exp()


def _hits(logits: Tensor, targets: Tensor, ignore_index: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Per row, whether fewer than ``top_k`` classes come before the target's, and whether the row counts."""
    kept = targets != ignore_index
    target = torch.where(kept, targets, 0).long()[..., None]
    own = logits.gather(-1, target)
    classes = torch.arange(logits.shape[-1], device=logits.device)
    ahead = ~(own >= logits) | ((own == logits) & (classes < target))  # `~>=`, not `<`: NaN is ahead of all
    return ahead.sum(-1) < top_k, kept


def _check(call: str, logits: Tensor, targets: Tensor, top_k: int) -> None:
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(
            f"`{call}` got targets of dtype {targets.dtype}, but they are class indices. Write"
            " targets.long(), or targets.argmax(-1) for probabilities."
        )
    if targets.shape != logits.shape[:-1] or logits.dim() == 0:
        fix = "logits.movedim(1, -1)" if logits.dim() > 2 else f"targets of shape {list(logits.shape[:-1])}"
        raise ValueError(
            f"`{call}` got logits of shape {list(logits.shape)} and targets of shape {list(targets.shape)},"
            f" but logits[..., C], classes last, take targets[...]. Write {fix}."
        )
    if not 1 <= top_k <= logits.shape[-1]:
        raise ValueError(
            f"`{call}` got top_k={top_k} for {logits.shape[-1]} classes: a row has from 1 guess to one per"
            " class. Write top_k=1."
        )
