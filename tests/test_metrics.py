"""Metrics are means: exact by count, and added over rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainfn import losses
from trainfn._types import Mean
from trainfn.metrics import accuracy, per_class_accuracy, perplexity

METRICS: dict[str, Callable[[Tensor, Tensor], Mean]] = {
    "accuracy": accuracy,
    "accuracy-top3": lambda x, y: accuracy(x, y, top_k=3),
    "per_class_accuracy": per_class_accuracy,
}
EVERY = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
some = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def case(seed: int, n: int = 8, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Logits with many ties, and targets of which a third is ignored."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 4, (n, 3, classes), generator=g).float()
    y = torch.randint(0, classes, (n, 3), generator=g)
    return logits, torch.where(torch.rand(n, 3, generator=g) < 0.3, -100, y)


@some
@given(seed=seeds, top_k=st.integers(1, 5))
def test_accuracy_counts_the_first_of_a_stable_sort(seed: int, top_k: int) -> None:
    logits, y = case(seed)
    guesses = logits.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    kept = y != -100
    hits = (guesses == y[..., None]).any(-1) & kept
    mean = accuracy(logits, y, top_k=top_k)
    assert mean == (hits.sum(), kept.sum())
    assert mean.total.dtype == mean.weight.dtype == torch.float32


@some
@given(seed=seeds)
def test_per_class_accuracy_counts_each_class(seed: int) -> None:
    logits, y = case(seed)
    mean = per_class_accuracy(logits, y)
    for c in range(5):
        one = accuracy(logits, torch.where(y == c, y, -100))
        assert (mean.total[c], mean.weight[c]) == (one.total, one.weight)
    whole = accuracy(logits, y)
    assert (mean.total.sum(), mean.weight.sum()) == (whole.total, whole.weight)


@EVERY
@some
@given(seed=seeds, cut=st.integers(0, 8))
def test_adds_up_over_rows(metric: Callable[..., Mean], seed: int, cut: int) -> None:
    logits, y = case(seed)
    parts = metric(logits[:cut], y[:cut]) + metric(logits[cut:], y[cut:])
    torch.testing.assert_close(tuple(parts), tuple(metric(logits, y)), rtol=0, atol=0)


@EVERY
def test_compiled_is_eager_and_compiles_once(metric: Callable[..., Mean]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(metric, backend="aot_eager", fullgraph=True)
    assert_equal(compiled(*case(0)), metric(*case(0)))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_equal(compiled(*case(1)), metric(*case(1)))


def assert_equal(a: Mean, b: Mean) -> None:
    torch.testing.assert_close(tuple(a), tuple(b), rtol=0, atol=0)


@EVERY
def test_ignored_batch_is_nothing(metric: Callable[..., Mean]) -> None:
    logits, y = case(0)
    mean = metric(logits, torch.full_like(y, -100))
    assert (mean.total == 0).all() and (mean.weight == 0).all()


def test_accuracy_of_constant_and_nan_logits() -> None:
    y = torch.arange(4)
    assert accuracy(torch.zeros(4, 4), y).total == 1  # every row guesses class 0
    assert accuracy(torch.full((4, 4), float("nan")), y).total == 0
    one_nan = torch.eye(4).index_fill(1, torch.tensor([3]), float("nan"))
    assert accuracy(one_nan, y, top_k=3).total == 3 and accuracy(one_nan, y).total == 0


def test_accuracy_keeps_another_ignore_index() -> None:
    y = torch.tensor([0, 1, 1, 0])
    assert accuracy(torch.eye(2)[y], y, ignore_index=0) == (2, 2)


def test_perplexity_is_of_the_mean() -> None:
    logits, y = case(0)
    parts = [losses.cross_entropy(logits[i], y[i]) for i in range(8)]
    total: Any = sum(parts)
    torch.testing.assert_close(perplexity(total), losses.cross_entropy(logits, y).value.exp())
    uniform = losses.cross_entropy(torch.zeros(3, 7), torch.arange(3))
    torch.testing.assert_close(perplexity(uniform), torch.tensor(7.0))


z, y3 = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)
ERRORS: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (TypeError, "Write targets.long()", lambda: accuracy(z, y3.float())),
    (TypeError, "targets of dtype torch.bool", lambda: per_class_accuracy(z, y3.bool())),
    (ValueError, "targets of shape [3].", lambda: accuracy(z, y3[:2])),
    (ValueError, "Write logits.movedim(1, -1)", lambda: accuracy(torch.zeros(3, 4, 5), y3.new_zeros(3, 5))),
    (ValueError, "top_k=5 for 4 classes", lambda: accuracy(z, y3, top_k=5)),
    (ValueError, "top_k=0", lambda: accuracy(z, y3, top_k=0)),
]


@pytest.mark.parametrize(("error", "message", "call"), ERRORS, ids=[message for _, message, _ in ERRORS])
def test_errors_say_what_to_write(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
