"""Laws of a loss: it is the same however its rows are cut, ordered and padded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from trainfn import tree
from trainfn._step import eval_step
from trainfn._types import Batch, Loss, Params, Tree
from trainfn.testing._batches import ROWS
from trainfn.testing._diagnose import NOT_LEFT_OUT, batch_statistics, diagnose
from trainfn.testing._pooled import pooled
from trainfn.testing._search import counterexample
from trainfn.testing._splits import Split, check_pad, padded, splits, take
from trainfn.testing._sums import Gap, Sample, Subject, Sums, add, attempt, gap, magnitudes
from trainfn.testing._violation import violation

TOLERANCE = 1e-4  # of the largest summand: float32 sums in another order differ by some 1e-7 of it
_Case = tuple[Sample, Split]


def check_accumulation_invariant(
    loss: Loss,
    model: nn.Module | Params | None = None,
    batches: Any = None,
    *,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> None:
    """Law: cut into micro-batches of any sizes, a batch gives the same loss and the same mean gradient.

    Args:
        loss: ``loss(model, batch) -> Mean``, as for `trainfn.train_step`.
        model: Your module, or a dict of tensors; by default a small one from ``x[rows, 4]`` to 3 outputs.
        batches: A batch, whose rows are then drawn; a spec or strategy for batches, see `batches`.
        tolerance: The largest deviation, relative to what is added up.
        seed: The choice of the cases that are tried.

    Raises:
        LawViolation: With the smallest batch and split that break the law, the probable cause and the fix.

    >>> import trainfn as tfn
    >>> check_accumulation_invariant(lambda model, b: tfn.losses.cross_entropy(model(b["x"]), b["y"]))
    """
    subject = Subject("check_accumulation_invariant", loss, model, batches)
    cases = subject.samples(2).flatmap(lambda s: st.tuples(st.just(s), splits(s.batch, min_pieces=2)))
    _check_pieces(subject, cases, lambda sums: sums.mean, "splitting the batch changes the update.", tolerance, seed)


def check_rank_invariant(
    loss: Loss,
    model: nn.Module | Params | None = None,
    batches: Any = None,
    *,
    ranks: int = 3,
    pad: Mapping[str, float] | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> None:
    """Law: spread over ranks with unequally many rows and micro-batches, a batch gives the same update.

    The ranks are computed one after the other here; their sums are added, as a reduction over processes would.

    Args:
        loss: See `check_accumulation_invariant`, as for ``model``, ``batches``, ``tolerance`` and ``seed``.
        model: The same.
        batches: The same.
        ranks: The most ranks.
        pad: By leaf name, the value that makes a row count for nothing, such as ``{"labels": -100}``. Then ranks are
            padded until they have equally many rows.
        tolerance: The same.
        seed: The same.

    Raises:
        LawViolation: With the smallest batch and distribution that break the law.

    >>> import trainfn as tfn
    >>> check_rank_invariant(lambda model, b: tfn.losses.cross_entropy(model(b["x"]), b["y"]), pad={"y": -100})
    """
    subject = Subject("check_rank_invariant", loss, model, batches)
    cases = subject.samples(2).flatmap(lambda s: st.tuples(st.just(s), splits(s.batch, ranks=ranks, min_pieces=2)))
    said = "the update depends on how the rows are spread over ranks."
    _check_pieces(subject, cases, lambda sums: sums.mean, said, tolerance, seed, pad)


def check_row_additive(
    loss: Loss,
    model: nn.Module | Params | None = None,
    batches: Any = None,
    *,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> None:
    """Law: the total, the weight and the gradient of the total are sums over the rows.

    It is stronger than `check_accumulation_invariant`, and holds for every loss whose rows do not see each other.

    Args:
        loss: See `check_accumulation_invariant`, as for the others.
        model: The same.
        batches: The same.
        tolerance: The same.
        seed: The same.

    Raises:
        LawViolation: With the smallest batch that breaks the law. It distinguishes a mean of means, a loss divided
            twice, a weight that does not count, weighted rows with another weight, and coupled rows.

    >>> import trainfn as tfn
    >>> check_row_additive(lambda model, b: tfn.losses.cross_entropy(model(b["x"]), b["y"]))
    """
    subject = Subject("check_row_additive", loss, model, batches)
    by_row = subject.samples(2).map(lambda s: (s, Split(((1,) * tree.row_count(s.batch),))))
    _check_pieces(subject, by_row, lambda sums: sums.sum, "the loss is not a sum over the rows.", tolerance, seed)
    _check_pooled(subject, seed)


def _check_pooled(subject: Subject, seed: int) -> None:
    """Raise if the loss adds two different losses by ``+``, which pools their totals and their weights."""
    found = counterexample(subject.samples(1, 1), lambda sample: pooled(subject, sample.batch) is not None, seed)
    if found is not None:
        a, b = pooled(subject, found.batch) or ("", "")
        raise violation(
            subject.law,
            "two different losses are pooled by `+`.",
            {"batch": repr(found), "added": f"{a} + {b}"},
            "`a + b` of two `Mean`s adds their totals and their weights. For two losses of the same rows that is"
            " neither the sum of the losses nor their mean.",
            '`tfn.losses.total({"a": a, "b": b})` adds two losses, each divided by its own weight',
        )


def _check_pieces(
    subject: Subject,
    cases: SearchStrategy[_Case],
    view: Callable[[Sums], Params],
    headline: str,
    tolerance: float,
    seed: int,
    pad: Mapping[str, float] | None = None,
) -> None:
    def compared(case: _Case) -> tuple[Sums, list[list[Sums]] | Exception, Gap]:
        sample, split = case
        if pad is not None:
            check_pad(sample.batch, pad)  # here, or it would pass for an error of the loss
        whole = subject.sums(sample.batch)
        parts, error = attempt(lambda: [subject.over(rank) for rank in split.pieces(sample.batch, pad)])
        if error is not None:
            return whole, error, Gap(float("inf"), "a piece", None)
        flat = [part for rank in parts for part in rank]
        scales = magnitudes([view(part._replace(weight=_total_weight(flat, view))) for part in flat])
        return whole, parts, gap(view(add(flat)), view(whole), scales, subject.slack)

    found = counterexample(cases, lambda case: compared(case)[2].size > tolerance, seed)
    if found is None:
        return
    whole, parts, worst = compared(found)
    facts = {"batch": repr(found[0]), "split": repr(found[1]), "whole": repr(whole)}
    if isinstance(parts, Exception):
        facts["in pieces"] = f"{type(parts).__name__}: {parts}"
    else:
        flat = [part for rank in parts for part in rank]
        facts |= {"in pieces": repr(add(flat)), "piece by piece": "\n".join(map(repr, flat)), "differs": str(worst)}
    raise violation(subject.law, headline, facts, *diagnose(subject, found[0].batch, found[1], pad))


def _total_weight(parts: list[Sums], view: Callable[[Sums], Params]) -> Tensor:
    """The divisor of each part, once all are added up; parts that are not divided keep their own."""
    weight = torch.stack([part.weight for part in parts]).sum(0)
    return weight if "the loss" in view(parts[0]) else parts[0].weight


def check_permutation_invariant(
    loss: Loss,
    model: nn.Module | Params | None = None,
    batches: Any = None,
    *,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> None:
    """Law: the order of the rows changes neither the loss nor its gradient.

    A loss with dropout, which belongs to the row's place in the batch, is compared in eval mode, without gradient.

    Args:
        loss: See `check_accumulation_invariant`, as for the others.
        model: The same.
        batches: The same.
        tolerance: The same.
        seed: The same.

    Raises:
        LawViolation: With the smallest batch and order that break the law.

    >>> import trainfn as tfn
    >>> check_permutation_invariant(lambda model, b: tfn.losses.mse(model(b["x"])[:, 0], b["x"][:, 0]))
    """
    subject = Subject("check_permutation_invariant", loss, model, batches)

    def compared(case: tuple[Sample, list[int]]) -> Gap:
        sample, order = case
        other = take(sample.batch, order)
        found, expected = subject.sums(other), subject.sums(sample.batch)
        gradients = gap(found.sum, expected.sum, magnitudes([found.sum, expected.sum]), subject.slack)
        return _in_eval_mode(subject, other, sample.batch) if gradients.size > tolerance and _is_random(
            subject, sample.batch) else gradients  # fmt: skip

    def orders(sample: Sample) -> SearchStrategy[tuple[Sample, list[int]]]:
        return st.tuples(st.just(sample), st.permutations(range(tree.row_count(sample.batch))))

    found = counterexample(subject.samples(2).flatmap(orders), lambda case: compared(case).size > tolerance, seed)
    if found is not None:
        sample, order = found
        raise violation(
            subject.law,
            "the order of the rows changes the loss.",
            {"batch": repr(sample), "order": str(order), "differs": str(compared(found))},
            "a row's index plays a part: a target taken by position, a cumulative sum over rows, pairs of"
            " neighbours, or a tensor in another order.",
            "compute each row from that row alone; put what belongs to it into the batch",
        )


def _is_random(subject: Subject, batch: Batch) -> bool:
    """Whether the loss depends on the key; few rows may draw the same by chance."""
    before, state = subject.sums(batch), subject.state
    try:
        for n in range(1, 9):
            subject.state = state._replace(key=state.key + 2 * n)
            if gap(subject.sums(batch).sum, before.sum).size > 0:
                return True
    finally:
        subject.state = state
    return False


def _in_eval_mode(subject: Subject, batch: Batch, expected: Batch) -> Gap:
    step = eval_step(subject.loss)
    got, want = (
        {"the total": m["loss"].total.double(), "the weight": m["loss"].weight.double()}
        for m in (step(subject.state, batch), step(subject.state, expected))
    )
    return gap(got, want, magnitudes([got, want]))


def check_padding_invariant(
    loss: Loss,
    model: nn.Module | Params | None = None,
    batches: Any = None,
    *,
    pad: Mapping[str, float] | None = None,
    dim: int = 0,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> None:
    """Law: padding changes neither total nor weight nor gradient.

    A loss with dropout draws other masks for longer rows: with ``dim=1`` it is compared in eval mode, without gradient.

    Args:
        loss: See `check_accumulation_invariant`, as for ``model``, ``batches``, ``tolerance`` and ``seed``.
        model: The same.
        batches: The same.
        pad: Padding value by leaf name, as for `trainfn.Buckets`: ``{"input_ids": 0, "attention_mask": 0, "labels":
            -100}``. By default, integer leaves named ``labels``, ``targets`` or ``y`` get -100, and masks and weights
            0.
        dim: 0 appends rows, 1 appends positions to every leaf that ``pad`` names.
        tolerance: The same.
        seed: The same.

    Raises:
        LawViolation: With the smallest batch that breaks the law.
        ValueError: If ``pad`` is needed, or names leaves that are not there.

    >>> import trainfn as tfn
    >>> check_padding_invariant(lambda model, b: tfn.losses.cross_entropy(model(b["x"]), b["y"]))
    """
    subject = Subject("check_padding_invariant", loss, model, batches)

    def compared(case: tuple[Sample, int]) -> tuple[Batch, Gap]:
        sample, more = case
        values = pad if pad is not None else _silencing(sample.batch)
        longer = padded(sample.batch, more, values) if dim == 0 else _lengthened(sample.batch, more, values, dim)
        found, error = attempt(lambda: subject.sums(longer))
        if error is not None:
            return longer, Gap(float("inf"), f"{type(error).__name__}: {error}; the padded batch", None)
        expected = subject.sums(sample.batch)
        worst = gap(found.sum, expected.sum, magnitudes([found.sum, expected.sum]), subject.slack)
        if dim > 0 and worst.size > tolerance and _is_random(subject, sample.batch):
            worst = _in_eval_mode(subject, longer, sample.batch)
        return longer, worst

    cases = st.tuples(subject.samples(), st.integers(1, 3))
    found = counterexample(cases, lambda case: compared(case)[1].size > tolerance, seed)
    if found is not None:
        longer, worst = compared(found)
        what = "rows" if dim == 0 else f"positions in dimension {dim}"
        facts = {"batch": repr(found[0]), f"with {found[1]} {what} of padding": repr(Sample(longer, None))}
        facts |= _both(subject, found[0].batch, longer) | {"differs": str(worst)}
        why = batch_statistics(subject) or NOT_LEFT_OUT
        raise violation(subject.law, "padding counts.", facts, *why)


def _both(subject: Subject, batch: Batch, longer: Batch) -> dict[str, str]:
    sums, error = attempt(lambda: subject.sums(longer))
    return {"without": repr(subject.sums(batch)), "with": repr(sums) if error is None else repr(error)}


def _silencing(batch: Batch) -> dict[str, float]:
    """Values that make a row count for nothing, guessed from the names of leaves."""
    values: dict[str, float] = {}
    for name, leaf in tree.named_leaves(batch).items():
        last = name.rpartition("/")[2].lower()
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            if last in ("labels", "label", "targets", "target", "y") and not leaf.is_floating_point():
                values[name] = -100
            elif "mask" in last or last in ("weight", "weights"):
                values[name] = 0
    if not values:
        raise ValueError(
            "check_padding_invariant(loss, model, batches): can't guess the value that marks a row of"
            f" {sorted(tree.named_leaves(batch))} as padding. Say it by leaf name:"
            ' `pad={"labels": -100}` or `pad={"mask": 0}`.'
        )
    return values


def _lengthened(batch: Batch, more: int, pad: Mapping[str, float], dim: int) -> Batch:
    check_pad(batch, pad)
    named = tree.named_leaves(batch)
    for name, value in pad.items():
        x = named[name]
        extra = torch.full((*x.shape[:dim], more, *x.shape[dim + 1 :]), value, dtype=x.dtype, device=x.device)
        named[name] = torch.cat([x, extra], dim)
    return tree.with_leaves(batch, named)


def check_split_invariant(
    update: Callable[[list[list[Batch]]], Tree],
    batches: Any,
    *,
    ranks: int = 1,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> None:
    """Law: a function of ranks and their micro-batches depends on the rows only, not on how they are spread.

    It is for functions other than losses of `trainfn`: another library's trainer, a loop written by hand.

    Args:
        update: ``[[micro-batch, …] for each rank] -> tree``, such as the new parameters; it starts afresh each time.
        batches: See `check_accumulation_invariant`.
        ranks: The most ranks.
        tolerance: The largest deviation, relative to the largest element of a leaf.
        seed: The choice of the cases that are tried.

    Raises:
        LawViolation: With the smallest batch and split that break the law.

    >>> check_split_invariant(lambda ranks: sum(x.sum() for micro in ranks for x in micro), torch.arange(5.0))
    """
    law = "check_split_invariant"
    subject = Subject(law, lambda model, batch: batch, {"unused": torch.zeros(1)}, batches)

    def compared(case: _Case) -> Gap:
        sample, split = case
        pieces = [[piece.batch for piece in rank] for rank in split.pieces(sample.batch)]
        found, expected = (
            {name: x.detach().double() for name, x in tree.named_leaves({"": update(p)}).items()}
            for p in (pieces, [[sample.batch]])
        )
        return gap(found, expected)

    cases = subject.samples(2, ROWS[1]).flatmap(
        lambda s: st.tuples(st.just(s), splits(s.batch, ranks=ranks, min_pieces=2))
    )
    found = counterexample(cases, lambda case: compared(case).size > tolerance, seed)
    if found is not None:
        facts = {"batch": repr(found[0]), "split": repr(found[1]), "differs": str(compared(found))}
        raise violation(
            law,
            "splitting the batch changes the update.",
            facts,
            "pieces are averaged before they are added up (a mean of means), counted wrongly, or their rows are"
            " coupled.",
            "add up totals and weights, and divide once, at the end",
        )
