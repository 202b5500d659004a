"""A trial of the loss: what it is divided by, and whether the split into micro-batches changes it.

The gradient at the model's outputs shows the share of a row in the loss of a batch. Two calls of the loss give it: with
a few rows, and with one of them. The shares of rows in the counts of `CANDIDATES` are compared with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import optree
import torch
from torch import Tensor, nn

import trainfn as tfn
from trainfn.hf._step import _terms
from trainfn.hf._step._counting import BOXES, CANDIDATES, LABELS, ROWS, Count, base_of, counted, row_count, rule
from trainfn.hf._step._loss import scalar_loss
from trainfn.hf._step._modes import eval_mode
from trainfn.hf._step._restored import as_before
from trainfn.hf._types import Batch, Nested, Outputs, TrainerLike

_ROWS, _TRIALS, _TOLERANCE, _LOW_PRECISION = 4, 32, 1e-3, 3e-2


class SplitDependentLossWarning(UserWarning):
    """The loss of a batch is not the sum of its rows' losses."""


def examine(trainer: TrainerLike, batches: Sequence[Batch], *, training: bool) -> None:
    """Find out once what the loss is divided by, and warn if it does not add up over rows.

    It is computed without dropout, and draws the same noise for a row alone and with others. A loss of the user's own
    is called twice, and containers that it fills are restored. An error in here ends no run.

    Args:
        trainer: The Trainer.
        batches: One batch or several; single rows are joined.
        training: Whether they are micro-batches of an update.
    """
    record = trainer._trainfn
    if record.examined or not all(isinstance(batch, Mapping) for batch in batches):
        return
    if _terms.terms(trainer, batches[0]) is not None or record.trials >= _TRIALS:
        record.examined = True
        return
    record.trials += 1
    found = _compared(trainer, batches)
    if found is None:
        record.examined = True
        _warn(trainer, training)


class _Found(NamedTuple):
    """The result of a trial; without a divisor it showed nothing."""

    divisor: Count | None = None
    decisive: bool = False


def _compared(trainer: TrainerLike, batches: Sequence[Batch]) -> _Found | None:
    """Try the loss, and note what divides it. None if the loss does not add up, as far as can be seen."""
    record, own = trainer._trainfn, not _terms.is_of_head(trainer)
    try:
        few, one = _few(trainer, _joined(batches))
    except _TooFew:
        return _Found()
    except Exception:  # a batch that can't be cut, such as the nodes of several graphs in one tensor
        record.examined = True
        return None if _may_differ(trainer, batches) else _Found()
    if record.trials > 1 and not one.spread:
        return _Found()
    try:
        with as_before(trainer), eval_mode(trainer.model):
            together, alone = _tried(trainer, few), _tried(trainer, one.batch, one.row)
            shares = _shares(together, alone, one.row)
            rest = None if own else _rest(trainer, few, one.row)
    except Exception:  # a loss of pairs, for example, needs two rows
        record.examined = True
        return _Found()
    record.examined = own or together.exact  # a loss of the user's own is tried once
    losses = [together.loss, alone.loss, *([] if rest is None else [rest])]
    if (
        together.exact or not shares or not all(torch.isfinite(loss) for loss in losses)
    ):  # no gradient reaches the outputs of these rows; the next ones may show more
        return _Found()
    tolerance = _LOW_PRECISION if trainer.args.bf16 or trainer.args.fp16 else _TOLERANCE
    found = _decide(trainer, few, one.batch, shares, tolerance)
    if found is None or found.divisor is None:
        return None
    record.examined |= found.decisive
    if found.divisor is not rule(trainer):
        record.divisor = found.divisor
    if rest is not None and not _adds_up(shares[0], found.divisor.sums, together, alone, rest, tolerance):
        return None
    return found


def share_findings(trainer: TrainerLike) -> None:
    """Let all ranks use what the first of them found out; every rank calls this."""
    record = trainer._trainfn
    if record.world.plan is None:
        return
    mine = None if record.divisor is None else record.divisor.what
    found = record.world.ranks.gathered((record.shifts, mine, record.examined))
    shifts, divisors, examined = zip(*found, strict=True)
    record.shifts = next((each for each in shifts if each is not None), None)
    what = next((each for each in divisors if each is not None), None)
    record.divisor = next((count for count in CANDIDATES if count.what == what), None)
    record.examined = any(examined)


class _One(NamedTuple):
    batch: Batch
    row: int
    spread: float  # by how much the candidates differ


class _Tried(NamedTuple):
    """A loss and its gradients at the outputs, each of shape ``[rows, ...]``."""

    loss: Tensor
    gradients: list[Tensor | None]
    exact: bool


class _TooFew(Exception):
    """There are fewer than two rows."""


def _joined(batches: Sequence[Batch]) -> Batch:
    """One batch of two rows or more, if there are as many."""
    if row_count(batches[0]) > 1:
        return batches[0]
    rows = [batch for batch in batches if not tfn.data.is_empty(batch)][:_ROWS]
    if len(rows) < 2:
        raise _TooFew
    made: Batch = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if _rows_of(first) is None:
            made[name] = first
        elif isinstance(first, Tensor):
            if len({x.shape[1:] for x in values}) > 1:
                raise _TooFew  # rows of several lengths; the next ones may fit
            made[name] = torch.cat(values)
        else:
            made[name] = [x for value in values for x in value]
    return made


def _may_differ(trainer: TrainerLike, batches: Sequence[Batch]) -> bool:
    """Whether labels, rows and boxes are counted differently in these batches, and no class says which is right."""
    if type(base_of(trainer.model)).__module__.startswith("transformers."):
        return False
    try:
        ratios = [[float(count.of(trainer, x) / ROWS.of(trainer, x)) for count in (LABELS, BOXES)] for x in batches]
    except Exception:
        return True
    return any(other != ratios[0] for other in ratios)


def _few(trainer: TrainerLike, inputs: Batch) -> tuple[Batch, _One]:
    """A few rows of a batch, and one of them: the one whose share differs most between the candidates."""
    rows = row_count(inputs)
    count = min(rows, _ROWS)
    if any(_rows_of(x) not in (None, rows) for x in inputs.values()):
        raise ValueError
    few = _cut(inputs, 0, count, rows)
    ones = [_cut(few, i, i + 1, count) for i in range(count)]
    spreads: list[float] = []
    for one in ones:
        shares = [float(each.of(trainer, one) / each.of(trainer, few)) for each in CANDIDATES[:-1]]
        shares = [share for share in shares if share == share]
        spreads.append((max(shares) - min(shares)) * (min(shares) > 0))
    best = max(range(count), key=spreads.__getitem__)
    return few, _One(ones[best], best, spreads[best])


def _rows_of(x: object) -> int | None:
    if isinstance(x, Tensor):
        return x.shape[0] if x.dim() else None
    return len(x) if isinstance(x, list | tuple) else None


def _cut(inputs: Batch, first: int, last: int, rows: int) -> Batch:
    return {k: x[first:last] if _rows_of(x) == rows else x for k, x in inputs.items()}


def _tried(trainer: TrainerLike, inputs: Batch, first_row: int = 0) -> _Tried:
    """The loss of some rows, and its gradient at each float output of the model."""
    kept: list[Tensor] = []
    rows = row_count(inputs)

    def keep(module: nn.Module, _: object, outputs: Outputs) -> None:
        kept[:] = [x for x in _tensors(outputs) if x.requires_grad and x.dim() and x.shape[0] % rows == 0]

    handle = trainer.model.register_forward_hook(keep)
    try:
        with torch.enable_grad(), tfn.keyed(tfn.random.key(0), rows=rows, first_row=first_row):
            loss = scalar_loss(trainer, trainer.model, inputs)
            if isinstance(loss, tfn.Mean):
                return _Tried(loss.value.detach(), [], True)
            found = torch.autograd.grad(loss, kept, allow_unused=True) if kept else []
    finally:
        handle.remove()
    gradients = [None if g is None else g.reshape(rows, g.shape[0] // rows, *g.shape[1:]) for g in found]
    return _Tried(loss.detach(), gradients, False)


def _tensors(outputs: Outputs) -> list[Tensor]:
    tree: Nested = dict(outputs) if isinstance(outputs, Mapping) else outputs
    leaves: list[object] = optree.tree_leaves(tree)  # type: ignore[arg-type]
    return [x for x in leaves if isinstance(x, Tensor)]


def _shares(together: _Tried, alone: _Tried, row: int) -> list[float] | None:
    """The share of the row by each output that the loss depends on; NaN where other rows change it too."""
    shares: list[float] = []
    for among, single in zip(together.gradients, alone.gradients, strict=True):
        if among is None or single is None:
            continue
        mine, own = among[row].double().flatten(), single[0].double().flatten()
        if mine.shape != own.shape or not torch.isfinite(own).all():
            continue
        if float(own.norm()) == 0:
            shares += [float("nan")] if float(mine.norm()) > 0 else []  # alone it has no loss, as in contrastive ones
            continue
        share = float(mine @ own / (own @ own))
        apart = float((mine - share * own).norm() / own.norm())
        shares.append(share if apart < 0.02 * abs(share) + 1e-6 else float("nan"))
    return shares


def _rest(trainer: TrainerLike, few: Batch, row: int) -> Tensor:
    """The head's loss of the other rows, without gradients."""
    count = row_count(few)
    others = {k: _without(x, row) if _rows_of(x) == count else x for k, x in few.items()}
    first = 1 if row == 0 else 0
    with torch.no_grad(), tfn.keyed(tfn.random.key(0), rows=count - 1, first_row=first):
        loss = scalar_loss(trainer, trainer.model, others)
    return loss.value if isinstance(loss, tfn.Mean) else loss


def _without(x: Nested, row: int) -> Nested:
    return torch.cat([x[:row], x[row + 1 :]]) if isinstance(x, Tensor) else [*x[:row], *x[row + 1 :]]


def _decide(trainer: TrainerLike, few: Batch, one: Batch, shares: list[float], tolerance: float) -> _Found | None:
    """The first candidate whose share is that of every output; the one in use comes first."""
    used = rule(trainer)
    share = shares[0]
    if any(not abs(other - share) <= tolerance * abs(share) for other in shares):
        return None
    fitting = []
    for count in dict.fromkeys((used, *CANDIDATES)):
        expected = float((counted(trainer, one) / counted(trainer, few)) if count is used else
                         count.of(trainer, one) / count.of(trainer, few))  # fmt: skip
        fitting += [(count, expected)] if abs(expected - share) <= tolerance * abs(share) else []
    if not fitting:
        return None
    others = [count.of(trainer, one) / count.of(trainer, few) for count in CANDIDATES]
    decisive = any(abs(float(other) - share) > tolerance * abs(share) for other in others[:-1])
    return _Found(fitting[0][0], decisive)


def _adds_up(share: float, sums: bool, together: _Tried, alone: _Tried, rest: Tensor, tolerance: float) -> bool:
    parts = float(alone.loss + rest) if sums else share * float(alone.loss) + (1 - share) * float(rest)
    return abs(parts - float(together.loss)) <= tolerance * max(abs(parts), abs(float(together.loss)))


def _warn(trainer: TrainerLike, training: bool) -> None:
    number = trainer.args.gradient_accumulation_steps
    changes = (
        f"the split into {number} micro-batches changes the update"
        if training and number > 1
        else "the number of processes changes the update"
        if training
        else f"per_device_eval_batch_size={trainer.args.per_device_eval_batch_size} changes the loss of an evaluation"
    )
    warnings.warn(
        f"`{type(trainer).__name__}.compute_loss`: the loss of several rows together is not the mean of their losses"
        f" one by one, for any count that the batch shows. So {changes}. Most often the loss is a mean with weights"
        " that only it knows. Return them: write `return tfn.Mean.of(values, weights)` in compute_loss, or"
        " `tfn.losses.cross_entropy(logits, labels, class_weights=...)`. If rows are meant to see each other (an"
        " auxiliary loss of a mixture of experts, in-batch negatives), the micro-batch is part of the method.",
        SplitDependentLossWarning,
        stacklevel=2,
    )
