"""Why a loss is not the same in pieces: probes that distinguish mistakes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainfn import tree
from trainfn._types import Batch
from trainfn.testing._splits import Piece, Split, take
from trainfn.testing._sums import Subject, Sums, attempt, gap, magnitudes

_EXACT = "`return tfn.Mean.of(values, mask)` of what is averaged, or `tfn.losses.cross_entropy(logits, targets)`"
_SUM = "return the sum and what it counts: `tfn.Mean(values.sum(), count)`, or `tfn.Mean.of(values, mask)`"
NOT_LEFT_OUT = (
    "the loss does not leave out what is padding: `ignore_index` or the mask is forgotten in the sum, in the weight, or"
    " in both; or the division is by the number of rows or positions.",
    "`tfn.losses.cross_entropy(logits, targets)` ignores -100 in both; for other values `tfn.Mean.of(values, mask)`. If"
    ' another leaf or value marks padding in your batches, say so: `pad={"labels": -100}`',
)
_BATCH_STATISTICS = (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm)


def diagnose(subject: Subject, batch: Batch, split: Split, pad: Mapping[str, float] | None = None) -> tuple[str, str]:
    """The probable cause and the fix."""
    if subject.inexact:
        return (
            "the loss returns a bare scalar: the mean over something that pieces hold unequal amounts of, such as"
            " tokens or weights. The update is then a mean of means.",
            _EXACT,
        )
    pieces = [piece for rank in split.pieces(batch) for piece in rank]
    return (
        _nothing(subject, pieces)
        or _doubled(subject, batch)
        or batch_statistics(subject)
        or (_padding(subject, batch, split, pad) if pad is not None else None)
        or _coupled(subject, batch)
    )


def _padding(subject: Subject, batch: Batch, split: Split, pad: Mapping[str, float]) -> tuple[str, str] | None:
    """The cause, if the rows that a rank is padded with count."""
    for bare, longer in zip(split.pieces(batch), split.pieces(batch, pad), strict=True):
        for a, b in zip(subject.over(bare), subject.over(longer), strict=True):
            if gap(b.sum, a.sum, magnitudes([a.sum, b.sum]), subject.slack).size > 1e-4:
                return "the rows that ranks are padded with count: " + NOT_LEFT_OUT[0], NOT_LEFT_OUT[1]
    return None


def _nothing(subject: Subject, pieces: list[Piece]) -> tuple[str, str] | None:
    for piece in pieces:
        sums, error = attempt(lambda p=piece: subject.sums(p.batch, p.first_row))
        if error is None and not bool(torch.isfinite(sums.total).all()):
            return (
                "a piece with nothing to count (every target ignored, every weight 0) gives NaN or infinity: 0 / 0"
                " inside the loss.",
                "don't divide in the loss; a total of 0 over a weight of 0 is right. " + _EXACT,
            )
    return None


def _doubled(subject: Subject, batch: Batch) -> tuple[str, str] | None:
    """Every row twice must double both the total and the weight."""
    rows = list(range(tree.row_count(batch)))
    once, twice = subject.sums(batch), subject.sums(take(batch, rows + rows))
    if once.total.dim():
        return None  # a total of several means, of which any may be wrong
    total, weight = _ratio(twice.total, once.total), _ratio(twice.weight, once.weight)
    if total == 1 and weight == 2:
        return (
            "the total is divided already, and its weight counts the rows again: with every row given twice, the total"
            " stays and the weight doubles. The loss is divided twice.",
            _SUM,
        )
    if total == 1 and weight == 1:
        return (
            "the total is a mean and its weight a constant: with every row given twice, neither changes. Pieces are"
            " then averaged alike, whatever they hold: a mean of means.",
            _SUM,
        )
    if total == 2 and weight == 1:
        return (
            "the total is a sum, but the weight does not count: with every row given twice, the total doubles and the"
            " weight stays.",
            "make the weight the number of things summed: `tfn.Mean.of(values, mask)` counts them",
        )
    return None


def _ratio(a: Tensor, b: Tensor) -> int | None:
    """1 or 2, if that is what ``a / b`` is."""
    ratio = float(a / b) if float(b) != 0.0 else float("nan")
    return next((n for n in (1, 2) if abs(ratio - n) < 0.02), None)


def batch_statistics(subject: Subject) -> tuple[str, str] | None:
    """The cause, if the model normalizes over the rows."""
    module = subject.state.module
    named = [] if module is None else [n for n, m in module.named_modules() if isinstance(m, _BATCH_STATISTICS)]
    if not named:
        return None
    return (
        f"the model's {named[0]!r} normalizes by statistics of the rows it sees together, so a row's loss depends on"
        " its neighbours.",
        f"use GroupNorm or LayerNorm, or freeze it: `model.get_submodule({named[0]!r}).eval()` before `tfn.init`;"
        " otherwise do not split: the size of a micro-batch is then part of the method",
    )


def _coupled(subject: Subject, batch: Batch) -> tuple[str, str]:
    rows = [Piece(take(batch, [i]), i) for i in range(tree.row_count(batch))]
    alone, error = attempt(lambda: subject.over(rows))
    counted = _counts(subject.sums(batch), alone) if error is None else None
    if counted is not None and all(abs(c) > 1e-3 for c in counted):  # rows that fall out were not weighted, but chosen
        said = ", ".join(f"row {i}: {c:.3g}" for i, c in enumerate(counted))
        return (
            "the rows keep their own gradients but count differently together than alone (in the whole batch, times"
            f" what each counts by itself: {said}). The loss is normalized by something of the whole batch, such as"
            " the sum of its weights, and the weight it reports is another.",
            "report what you divide by as the weight: `tfn.Mean(total=(w * values).sum(), weight=w.sum())`, which is"
            " `tfn.Mean.of(values, w)`",
        )
    return (
        "a row's loss depends on the other rows: in-batch negatives, a normalization over the batch, a top-k or a sort"
        " across rows; or on its place in the batch, which `check_permutation_invariant` finds.",
        "use what does not look across rows, or do not split such a batch: the size of a micro-batch is then part of"
        " the method",
    )


def _counts(whole: Sums, alone: list[Sums]) -> list[float] | None:
    """The factors with which the rows' own gradients make up the batch's, if they do and it is certain."""
    columns = torch.stack([torch.cat([g.flatten() for g in row.grads.values()]) for row in alone], 1)
    target = torch.cat([g.flatten() for g in whole.grads.values()])
    if columns.shape[0] <= columns.shape[1] or not bool(torch.isfinite(columns).all()):
        return None
    if int(torch.linalg.matrix_rank(columns)) < columns.shape[1]:
        return None
    solution = torch.linalg.lstsq(columns, target[:, None]).solution[:, 0]
    residual = float((columns @ solution - target).norm()) / max(float(target.norm()), 1e-30)
    return [float(c) for c in solution] if residual < 1e-3 else None
