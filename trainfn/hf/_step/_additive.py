"""A check whether a loss adds up over rows: if not, the split into micro-batches changes the update."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

import trainfn as tfn
from trainfn.hf._step._loss import exact_loss
from trainfn.hf._step._modes import eval_mode
from trainfn.hf._types import Batch, TrainerLike

_ROWS, _TOLERANCE, _LOW_PRECISION = 4, 1e-3, 3e-2


class SplitDependentLossWarning(UserWarning):
    """The loss of a batch is not the sum of its rows' losses."""


def check_additive(trainer: TrainerLike, inputs: Batch) -> None:
    """Warn if the loss of a few rows together is not the sum of their losses one by one.

    It is computed without gradients and without dropout; a step with one micro-batch does not need it.
    """
    rows = next((x.shape[0] for x in inputs.values() if isinstance(x, Tensor) and x.dim() > 0), 0)
    count = min(rows, _ROWS)
    if count < 2 or any(not isinstance(x, Tensor) or (x.dim() and x.shape[0] != rows) for x in inputs.values()):
        return
    try:
        with eval_mode(trainer.model), torch.no_grad(), tfn.keyed(tfn.random.key(0)):
            whole = exact_loss(trainer, trainer.model, _cut(inputs, 0, count))[0]
            pieces = sum(exact_loss(trainer, trainer.model, _cut(inputs, i, i + 1))[0] for i in range(count))
    except Exception:  # a loss of pairs, for example, needs two rows; a check must not end a run that works
        return
    together, apart = float(whole.value), float(pieces.value)  # type: ignore[union-attr]
    tolerance = _LOW_PRECISION if trainer.args.bf16 or trainer.args.fp16 else _TOLERANCE
    if abs(together - apart) > tolerance * max(abs(together), abs(apart)):
        warnings.warn(
            f"`{type(trainer).__name__}.compute_loss`: the loss of {count} rows is {together:.4g} together and"
            f" {apart:.4g} one by one, so the split into {trainer.args.gradient_accumulation_steps} micro-batches"
            " changes the update. Most often the loss is a mean with weights that only it knows. Return them: write"
            " `return tfn.Mean.of(values, weights)` in compute_loss, or `tfn.losses.cross_entropy(logits, labels,"
            " class_weights=...)`. If rows are meant to see each other (an auxiliary loss of a mixture of experts,"
            " in-batch negatives), the micro-batch is part of the method.",
            SplitDependentLossWarning,
            stacklevel=2,
        )


def _cut(inputs: Batch, first: int, last: int) -> Batch:
    return {k: x[first:last] if isinstance(x, Tensor) and x.dim() > 0 else x for k, x in inputs.items()}
