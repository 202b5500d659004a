"""The law of derivatives: what autograd says is what finite differences say."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from trainfn import random, tree
from trainfn._grad import value_and_grad
from trainfn._types import Batch, Gradients, Loss, Params, Total, TrainState
from trainfn.errors import UnreachedWarning
from trainfn.testing._search import counterexample
from trainfn.testing._sums import Sample, Subject, of_whole, whole_grads
from trainfn.testing._things import random_like
from trainfn.testing._violation import violation

_STEP = 1e-5  # of float64 numbers of size 1: the difference is exact to 1e-10, its rounding to 1e-11
_SMOOTH = 1e-4  # two step widths that disagree by more straddle a kink, or see float32 rounding: no verdict
_AT_A_TIME = 6  # parameters looked at for each batch


class _Slope(NamedTuple):
    name: str
    analytic: float
    numeric: float
    coarse: float

    @property
    def deviation(self) -> float:
        scale = max(abs(self.analytic), abs(self.numeric), 1e-6)
        if abs(self.numeric - self.coarse) > _SMOOTH * scale:
            return 0.0
        return abs(self.analytic - self.numeric) / scale


def check_gradients(
    loss: Loss,
    model: nn.Module | Params | None = None,
    batches: Any = None,
    *,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> None:
    """Law: the gradient of the total is its slope, by central differences in float64, for every parameter.

    Dropout stays as it is drawn; where the loss has a kink between the two points, there is no verdict.

    Args:
        loss: See `check_accumulation_invariant`, as for ``batches`` and ``seed``.
        model: The same; computed in float64.
        batches: The same; its floating-point leaves in float64.
        tolerance: The largest relative deviation of a slope.
        seed: The same.

    Raises:
        LawViolation: Naming the parameter, its gradient along a random direction, and its slope.

    >>> import trainfn as tfn
    >>> check_gradients(lambda model, b: tfn.losses.mse(model(b["x"]), b["x"][:, :3]))
    """
    subject = Subject("check_gradients", loss, model, batches)
    subject.state = _generic(tree.cast(subject.state, torch.float64))
    cases = st.tuples(subject.samples(), st.integers(0, 2**16))

    def worst(case: tuple[Sample, int]) -> _Slope:
        batch = tree.cast(case[0].batch, torch.float64)
        slopes = _slopes(subject, batch, random.key(case[1]))
        return max(slopes, key=lambda slope: slope.deviation)

    found = counterexample(cases, lambda case: worst(case).deviation > tolerance, seed)
    if found is not None:
        slope = worst(found)
        facts = {
            "batch": repr(found[0]),
            "parameter": repr(slope.name),
            "autograd": f"{slope.analytic:.6g} along a random direction",
            "differences": f"{slope.numeric:.6g}",
        }
        raise violation(
            "check_gradients",
            "the gradient is not the slope of the loss.",
            facts,
            "a `.detach()`, `torch.no_grad()` or `.data` on the way from this parameter to the loss, or a wrong"
            " `backward` of a custom autograd function. Straight-through estimators break this law on purpose."
            + (" Here no gradient arrives at all." if slope.analytic == 0.0 else ""),
            "let autograd see the whole computation, or correct the `backward`",
        )


def _generic(state: TrainState) -> TrainState:
    """Parameters off the special values that they start from: a bias of 0 sits on the kink of a ReLU."""
    noise = tree.mul(random_like(state.params, random.key(7)), 1e-2)
    return state._replace(params=tree.add(state.params, noise))


def _slopes(subject: Subject, batch: Batch, key: Tensor) -> list[_Slope]:
    names = list(subject.state.params)
    some = [names[int(i)] for i in random.permutation(key, len(names))[:_AT_A_TIME]]
    directions = random_like({name: subject.state.params[name] for name in some}, key)
    grads = whole_grads(_at(subject, batch, subject.state.params), subject.state.params)
    return [_slope(subject, batch, name, directions[name], grads[name]) for name in some]


def _slope(subject: Subject, batch: Batch, name: str, direction: Tensor, grad: Tensor) -> _Slope:
    direction = direction / direction.norm().clamp(min=1e-30)

    def difference(width: float) -> float:
        ahead, behind = (
            _total(_at(subject, batch, {**subject.state.params, name: subject.state.params[name] + h * direction}))
            for h in (width, -width)
        )
        return float((ahead.double() - behind.double()) / (2 * width))

    return _Slope(name, float((grad * direction).sum()), difference(_STEP), difference(4 * _STEP))


def _total(sums: Gradients) -> Tensor:
    """The number of which ``grads`` are the derivatives."""
    return sums.loss.value if isinstance(sums.loss, Total) else sums.loss.total


def _at(subject: Subject, batch: Batch, params: Params) -> Gradients:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreachedWarning)
            return of_whole(value_and_grad(subject.loss))(subject.state._replace(params=params), batch)
    except Exception as error:
        error.add_note("check_gradients computes in float64: a model or loss that casts to another dtype can't follow.")
        raise
