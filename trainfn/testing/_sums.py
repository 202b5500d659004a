"""A loss at work: its sums over a batch and over pieces of it, and how far two of them are apart."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from trainfn import tree
from trainfn._grad import value_and_grad
from trainfn._module import init
from trainfn._types import Batch, Gradients, Loss, Params, TrainState
from trainfn.errors import InexactLossWarning, UnreachedWarning
from trainfn.optim import sgd
from trainfn.testing._batches import ROWS, picks
from trainfn.testing._batches import batches as _batches
from trainfn.testing._splits import Piece, take
from trainfn.testing._things import default_module


class Sums(NamedTuple):
    """Total and weight of a loss over some rows, and the gradient of the total; in float64."""

    total: Tensor
    weight: Tensor
    grads: Params

    @property
    def mean(self) -> Params:
        """Loss and gradients, divided by the weight as a step would."""
        weight = torch.where(self.weight == 0, 1.0, self.weight)
        grads = {
            _of(k): g / weight.reshape(weight.shape + (1,) * (g.dim() - weight.dim())) for k, g in self.grads.items()
        }
        return {"the loss": self.total / weight, **grads}

    @property
    def sum(self) -> Params:
        """Loss, weight and gradients as they are."""
        return {
            "the total": self.total,
            "the weight": self.weight,
            **{_of(k): g for k, g in self.grads.items()},
        }

    def __repr__(self) -> str:
        loss, total, weight = (_numbers(x) for x in (self.mean["the loss"], self.total, self.weight))
        return f"loss {loss} (total {total} over weight {weight})"


def _numbers(x: Tensor) -> str:
    return f"{float(x):.6g}" if x.dim() == 0 else "[" + ", ".join(f"{float(one):.6g}" for one in x) + "]"


def of_whole(gradients: Any) -> Callable[[TrainState, Batch], Gradients]:
    """The gradients of a batch to which no other piece is added, of a total of several means too."""
    return getattr(gradients, "whole", gradients)


def whole_grads(found: Gradients, params: Params) -> Params:
    """The gradients, with zeros for the parameters that the loss does not reach; those of all terms, stacked."""
    terms = [
        {name: torch.zeros_like(params[name]) if g is None else g for name, g in grads.items()}
        for grads in found.terms or (found.grads,)
    ]
    return {name: torch.stack([term[name] for term in terms]) for name in params} if found.terms else terms[0]


def _of(name: str) -> str:
    return f"the gradient of {name!r}"


def add(parts: Iterable[Sums]) -> Sums:
    """The sums over all parts, as accumulation and ranks combine them."""
    first, *rest = parts
    for part in rest:
        grads = {k: g + part.grads[k] for k, g in first.grads.items()}
        first = Sums(first.total + part.total, first.weight + part.weight, grads)
    return first


class Sample(NamedTuple):
    """A drawn batch, and which rows of the user's own batch it is made of, if there is one."""

    batch: Batch
    picked: tuple[int, ...] | None

    def __repr__(self) -> str:
        from trainfn.testing._violation import shown

        head = f"rows {list(self.picked)} of yours\n" if self.picked is not None else ""
        return head + shown(self.batch)


class Subject:
    """A loss under test, with its model and where its batches come from."""

    def __init__(self, law: str, loss: Loss, model: nn.Module | Params | None, batches: Any) -> None:
        if not callable(loss):
            raise TypeError(
                f"{law}(loss, model, batches) takes a loss `loss(model, batch) -> Mean`, not {type(loss).__name__}."
                " For a function of outputs and targets, `lambda model, b: loss(model(b['x']), b['y'])`."
            )
        self.law, self.loss, self.batches = law, loss, batches
        self.default = model is None or batches is None
        module = default_module() if model is None else model
        self.state: TrainState = init(module, sgd(1.0))
        self.inexact = False
        self.slack: dict[str, float] = {}

    def samples(self, fewest: int = 1, most: int = ROWS[1]) -> SearchStrategy[Sample]:
        """Strategy for batches of at least and at most so many rows."""
        if isinstance(self.batches, SearchStrategy):
            drawn = self.batches.filter(lambda batch: tree.row_count(batch) >= fewest)
            return drawn.map(lambda batch: Sample(batch, None))
        if self.batches is None:
            return _batches(rows=(fewest, most)).map(lambda batch: Sample(batch, None))
        if not any(isinstance(leaf, Tensor) for leaf in tree.leaves(self.batches)):
            return _batches(self.batches, rows=(fewest, most)).map(lambda batch: Sample(batch, None))
        return picks(self.batches, (fewest, most)).map(lambda rows: Sample(take(self.batches, rows), rows))

    def sums(self, batch: Batch, first_row: int = 0) -> Sums:
        """The loss over a batch; its parameters, as those of a step, are the state's."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = self._gradients(batch, first_row)
        for warning in caught:
            if issubclass(warning.category, InexactLossWarning):
                self.inexact = True
            elif not issubclass(warning.category, UnreachedWarning):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        found_grads = whole_grads(found, self.state.params)
        grads = {name: g.double() for name, g in found_grads.items()}
        self.slack = {_of(name): _slack(g.dtype) for name, g in found_grads.items()}
        return Sums(found.loss.total.double(), found.loss.weight.double(), grads)

    def _gradients(self, batch: Batch, first_row: int) -> Any:
        try:
            return value_and_grad(self.loss)(self.state, batch, first_row)
        except Exception as error:
            if self.default:
                error.add_note(
                    f"Raised by your loss in {self.law}, on a default model (4 inputs, 3 outputs) or batch"
                    " ({'x': float[rows, 4], 'y': int[rows]}). Give yours:"
                    f" `{self.law}(loss, model, batch)`."
                )
            raise

    def over(self, pieces: Iterable[Piece]) -> list[Sums]:
        """The loss over each of several pieces."""
        return [self.sums(piece.batch, piece.first_row) for piece in pieces]


class Gap(NamedTuple):
    """The largest deviation between two sets of numbers, relative to the size of what was added up."""

    size: float
    where: str
    factor: float | None

    def __str__(self) -> str:
        said = (
            f"{self.where} by {self.size:.2g} of its size"
            if self.size < float("inf")
            else f"{self.where} is not finite"
        )
        times = f"; it is {self.factor:.4g} times as large" if self.factor is not None else ""
        return said + times


def gap(
    got: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    scales: Mapping[str, Tensor] | None = None,
    slack: Mapping[str, float] | None = None,
) -> Gap:
    """How far ``got`` is from ``expected``: the worst of its numbers, relative to the larger of it and its scale."""
    worst = Gap(0.0, "", None)
    # A gradient that is 0 but for rounding, such as that of a scale before a normalization, is rounding of the others.
    floor = 1e-2 * max((float(x.max()) for x in scales.values() if x.numel()), default=0.0) if scales else 0.0
    for name, want in expected.items():
        have = got[name]
        if not bool(torch.isfinite(want).all()):
            continue  # the loss of the whole batch is not finite itself: nothing to compare with
        if not bool(torch.isfinite(have).all()):
            return Gap(float("inf"), name, None)
        if want.numel() == 0:
            continue
        scale = max(float(want.abs().max()), float(scales[name].max()) if scales else 0.0, floor, 1e-30)
        size = float((have - want).abs().max()) / (scale * (slack or {}).get(name, 1.0))
        if size > worst.size:
            worst = Gap(size, name, _factor(have, want))
    return worst


def _slack(dtype: torch.dtype) -> float:
    """How much coarser than float32 a gradient is rounded: once for each piece."""
    return max(1.0, 2 * torch.finfo(dtype).eps / 1e-4)


def _factor(have: Tensor, want: Tensor) -> float | None:
    """The one number by which all elements differ, if there is one."""
    if float(want.abs().max()) == 0.0:
        return None
    factor = float((have * want).sum() / (want * want).sum())
    return factor if float((have - factor * want).abs().max()) < 1e-3 * float(have.abs().max()) else None


def magnitudes(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The size of what is added up: where summands cancel, rounding is relative to them, not to the sum."""
    found: dict[str, Tensor] = {}
    for part in parts:
        for name, x in part.items():
            found[name] = found[name] + x.abs() if name in found else x.abs()
    return found


def attempt(fn: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The result of a function, or its error."""
    try:
        return fn(), None
    except Exception as error:
        return None, error
