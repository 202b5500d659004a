"""Losses as exact sums, and their gradients.

Gradients are those of ``backward()`` on stand-ins for the module's Parameters (see `trainfn._bound`).
`torch.autograd.grad` finds nothing where a backward pass runs another one, as reentrant checkpoints, recomputation of
one's own and cached gradients do. A parameter that the loss does not reach has the gradient None, not zeros, and the
update leaves it alone (see `trainfn._reached`). The reached parameters are read off after each pass. In a captured step
they are a fact of its trace.

Tensors outside of the state that require gradients, such as a second module in a closure, are not trained. Their
``.grad`` stays as it was. If the loss reaches one of the module's own Parameters, and not its stand-in, something holds
that Parameter by another reference. It would use the old numbers for ever, so it is an error that names the Parameter.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from trainfn import tree
from trainfn._bound import Running, bound
from trainfn._keyed import Randomness
from trainfn._marks import backward_pass, split_batch
from trainfn._module import check_state
from trainfn._types import Batch, Gradients, Loss, Mean, Metrics, Total, TrainState
from trainfn.errors import InexactLossWarning, UnreachedWarning

_HOW_EXACT = (
    "Return `Mean(total, weight)` instead: `tfn.losses.cross_entropy(logits, targets)`, or"
    " `tfn.Mean.of(values, mask)` of what you would have averaged."
)
_RESERVED = ("loss", "grad_norm")
_NO_PARAMETER = (
    "value_and_grad(loss): the loss does not depend on any parameter. Compute it from the `model` argument: a module"
    " taken from outside the loss, `torch.no_grad()` or `.detach()` cuts the connection."
)


class GradientFunction(Protocol):
    """``(state, batch, first_row) -> Gradients``."""

    def __call__(self, state: TrainState, batch: Batch, first_row: Tensor | int = 0, /) -> Gradients:
        """Return the sums over the rows of ``batch``, which are rows ``first_row …`` of the whole batch."""
        ...


def value_and_grad(loss: Loss) -> GradientFunction:
    """The function ``(state, batch) -> Gradients`` of a loss: its sums over the rows, and their derivatives.

    Torch's random functions, dropout included, draw from ``fold_in(state.key, state.step)``; the module runs in
    training mode. Nothing is divided: gradients of pieces of a batch add up to the gradients of the batch.

    Args:
        loss: ``loss(model, batch) -> Mean``, or ``(Mean, {"name": Mean})``. A bare scalar is taken as the mean
            over the batch's rows, and an `InexactLossWarning` says so.

    Raises:
        TypeError: If the loss returns something else.
        ValueError: If the loss does not depend on any parameter, or uses one that the model argument does not give.

    >>> import torch, trainfn as tfn
    >>> state = tfn.init({"w": torch.tensor([3.0])}, tfn.optim.sgd(0.1))
    >>> value_and_grad(lambda p, x: tfn.Mean.of(p["w"] * x))(state, torch.tensor([1.0, 2.0])).grads
    {'w': tensor([3.])}
    """
    return gradient_function(loss, lambda state, weight: weight)


def gradient_function(loss: Loss, common: Callable[[TrainState, Tensor], Tensor]) -> GradientFunction:
    """See `value_and_grad`; ``common`` makes of a weight one that all ranks have in common."""
    randomness, known = Randomness(), Passes()

    def of_rows(state: TrainState, batch: Batch, first_row: Tensor | int, whole: bool) -> Gradients:
        check_state(state)
        rows, one = tree.row_count(batch), known.of(state)

        def sums() -> Gradients:
            with torch.enable_grad(), bound(state, training=True) as run:
                mean, metrics = exact(loss(run.model, batch), rows)
                terms = _terms(mean, whole)
                scales = [_scale(state, term, common) for term in terms]
                grads = _derivatives(run, terms, scales, one, state)
            torch.clear_autocast_cache()  # under a caller's autocast it would keep copies of these parameters
            means = {name: detached(metric) for name, metric in metrics.items()}
            alone, several = (grads[0], ()) if len(grads) == 1 else ({}, tuple(grads))
            return Gradients(detached(mean), alone, means, run.buffers, run.written, terms=several)

        return randomness(state, sums, rows=rows, first_row=first_row)

    def gradients(state: TrainState, batch: Batch, first_row: Tensor | int = 0, /) -> Gradients:
        return of_rows(state, batch, first_row, whole=False)

    gradients.whole = lambda state, batch: of_rows(state, batch, 0, whole=True)  # type: ignore[attr-defined]
    return gradients


def of_whole(gradients: GradientFunction) -> Callable[[TrainState, Batch], Gradients]:
    """The gradients of a batch to which no other piece is added: a total of several means takes one backward pass."""
    return getattr(gradients, "whole", gradients)


def _terms(mean: Mean, whole: bool) -> list[Mean]:
    """The means that a loss adds up, each of which takes a backward pass."""
    if not isinstance(mean, Total) or len(mean.total) == 1:
        return [mean if not isinstance(mean, Total) else mean.terms[0]]
    return [Mean(mean.value, torch.ones_like(mean.value))] if whole else mean.terms


class Pass:
    """The facts that the first pass of a loss found out, for states of one type.

    Attributes:
        first: Whether no pass was made yet.
        outside: Whether the loss reaches tensors outside of the state that require gradients.
    """

    def __init__(self) -> None:
        self.first, self.outside = True, False


class Passes:
    """A `Pass` for each type of state, for as long as the type lives."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[type, Pass] = weakref.WeakKeyDictionary()

    def of(self, state: TrainState) -> Pass:
        """The one for a state."""
        found = self._known.get(type(state))
        if found is None:
            found = self._known[type(state)] = Pass()
        return found


def _scale(state: TrainState, mean: Mean, common: Callable[[TrainState, Tensor], Tensor]) -> Tensor | None:
    """The factor of the total, by which the mean is multiplied by almost the loss scale.

    It is the power of two at or below, which divides out exactly.
    """
    if "loss_scale" not in state.extra:
        return None
    scale = state.extra["loss_scale"]["scale"] / common(state, mean.weight.detach()).clamp(min=1.0)
    return torch.exp2(torch.floor(torch.log2(scale)))


def _shared_scale(state: TrainState, pieces: int) -> TrainState:
    """The state with one piece's share of the loss scale, as `torch.amp.GradScaler` has it of ``loss / pieces``.

    The sum over the pieces is then that of one batch, so the split does not change which updates overflow.
    """
    if "loss_scale" not in state.extra or pieces <= 1:
        return state
    held = state.extra["loss_scale"]
    return state._replace(extra={**state.extra, "loss_scale": {**held, "scale": held["scale"] / pieces}})


def _derivatives(
    run: Running, terms: list[Mean], scales: list[Tensor | None], one: Pass, state: TrainState
) -> list[dict[str, Tensor | None]]:
    """The gradients of each term's total."""
    if not any(term.total.requires_grad for term in terms):
        raise ValueError(_NO_PARAMETER)
    strangers = list(_outside(terms, run)) if one.first or one.outside else []
    held = [x.grad for x in strangers]
    last = max(i for i, term in enumerate(terms) if term.total.requires_grad)
    pairs = enumerate(zip(terms, scales, strict=True))
    found = [_backward(run, term, scale, keep=i != last) for i, (term, scale) in pairs]
    for x, grad in zip(strangers, held, strict=True):
        x.grad = grad
    if one.first:
        one.first, one.outside = False, bool(strangers)
        _check_first(any_of(found), state)
    return found


def _backward(run: Running, term: Mean, scale: Tensor | None, *, keep: bool) -> dict[str, Tensor | None]:
    """The gradients of one total; with loss scaling, of a larger one on the way back, so that float16 holds them."""
    for leaf in run.leaves.values():
        leaf.grad = None
    if not term.total.requires_grad:  # a constant among the terms
        return dict.fromkeys(run.leaves)
    seed = term.total if scale is None else term.total.float() * scale
    run.weight = term.weight.detach() if scale is None else term.weight.detach() * scale
    with backward_pass():
        torch.autograd.backward(seed, retain_graph=keep)
    grads = {name: leaf.grad for name, leaf in run.leaves.items()}
    if scale is not None:
        grads = {name: None if grad is None else grad / scale for name, grad in grads.items()}
    return grads


def any_of(terms: Iterable[dict[str, Tensor | None]]) -> dict[str, Tensor | None]:
    """By name, the first gradient that is not None: what the terms reach together."""
    found: dict[str, Tensor | None] = {}
    for grads in terms:
        found = {name: grad if found.get(name) is None else found[name] for name, grad in grads.items()}
    return found


def divided(sums: Gradients) -> Gradients:
    """The gradients of a total of several means, each divided once, by the weight of all rows.

    Sums of one mean are returned as they are.
    """
    if not sums.terms:
        return sums
    whole: dict[str, Tensor | None] = dict.fromkeys(any_of(sums.terms))
    for grads, weight in zip(sums.terms, sums.loss.weight, strict=True):
        mine = {name: grad for name, grad in grads.items() if grad is not None}
        mine = tree.div(mine, torch.where(weight == 0, torch.ones_like(weight), weight))
        for name, grad in mine.items():
            whole[name] = grad if (before := whole[name]) is None else before + grad
    return sums._replace(grads=whole, terms=())


def divisor(loss: Mean) -> Tensor:
    """The number that the update divides `Gradients.grads` by; 1 where nothing counted, for the sums are 0 too."""
    weight = torch.ones_like(loss.weight[0]) if isinstance(loss, Total) and len(loss.weight) > 1 else loss.weight
    weight = weight.reshape(())
    return torch.where(weight == 0, torch.ones_like(weight), weight)


def _outside(terms: Iterable[Mean], run: Running) -> Iterator[Tensor]:
    """The tensors that a loss depends on and that keep gradients, except for the stand-ins of parameters."""
    ours = {id(leaf) for leaf in run.leaves.values()}
    seen: set[Any] = set()
    ahead: list[Any] = [term.total.grad_fn for term in terms]
    while ahead:
        node: Any = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        ahead += [function for function, _ in node.next_functions]
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in ours:
            _check_own(leaf, run.own)
            yield leaf


def _check_own(leaf: Tensor, own: dict[int, str]) -> None:
    if (name := own.get(id(leaf))) is not None:
        raise ValueError(
            f"value_and_grad(loss): the loss uses the Parameter {name!r} itself, which something other than the module"
            " holds: a variable, a list, a cache. Its numbers are those of before the first step, and it would never"
            f" be trained. Read it from the model that the loss gets: `model.get_parameter({name!r})`."
        )


def _check_first(grads: dict[str, Tensor | None], state: TrainState) -> None:
    missed = [name for name, grad in grads.items() if grad is None]
    if len(missed) == len(grads):
        raise ValueError(_NO_PARAMETER)
    sparse = next((name for name, grad in grads.items() if grad is not None and grad.is_sparse), None)
    if sparse is not None:
        raise ValueError(
            f"value_and_grad(loss): the gradient of {sparse!r} is sparse, and updates are dense. Make the embedding"
            " with `sparse=False`."
        )
    missed = [name for name in missed if not _is_frozen(state, name)]
    if missed:
        some = ", ".join(map(repr, missed[:3])) + (", ..." if len(missed) > 3 else "")
        part = missed[0].rpartition(".")[0]
        warnings.warn(
            f"The loss does not reach {len(missed)} of {len(grads)} parameters: {some}. They, their moments and their"
            " weight decay stand still, as in torch where `grad` is None. Most often the forward pass"
            f" {f'does not call {part!r}' if part else 'does not use them'}, drops what comes out of it, or computes it"
            " under `torch.no_grad()` or with `.detach()`. If it is meant, `requires_grad_(False)` before `init` says"
            " so.",
            UnreachedWarning,
            stacklevel=2,
        )


def _is_frozen(state: TrainState, name: str) -> bool:
    return state.module is not None and not state.module.get_parameter(name).requires_grad


def detached(mean: Mean) -> Mean:
    return type(mean)(mean.total.detach(), mean.weight.detach())


def exact(output: object, rows: int) -> tuple[Mean, Metrics]:
    """The mean and the metrics that a loss returned, in their full form."""
    mean, metrics = output, {}
    if isinstance(output, tuple) and not isinstance(output, Mean):
        if len(output) != 2:
            raise TypeError(f"loss(model, batch) returned a tuple of {len(output)}, not (mean, metrics). {_HOW_EXACT}")
        mean, metrics = output
    if isinstance(mean, Tensor) and mean.dim() == 0:
        _warn_inexact()
        mean = Mean(mean * rows, torch.full((), rows, dtype=torch.float32, device=mean.device))
    if not isinstance(mean, Mean):
        shape = f" of shape {list(mean.shape)}" if isinstance(mean, Tensor) else ""
        raise TypeError(f"loss(model, batch) returned a {type(mean).__name__}{shape}. {_HOW_EXACT}")
    if not isinstance(metrics, dict):
        raise TypeError(
            f"loss(model, batch) returned ({type(mean).__name__}, {type(metrics).__name__}); the second is a dict of"
            ' metrics: `return mean, {"accuracy": tfn.metrics.accuracy(logits, targets)}`.'
        )
    for name, metric in metrics.items():
        if name in _RESERVED:
            raise ValueError(f"loss(model, batch) returned a metric named {name!r}, which the step reports itself.")
        if not isinstance(metric, Mean):
            raise TypeError(f"metric {name!r} is a {type(metric).__name__}. Make it `tfn.Mean.of(values)`.")
    return mean, _with_parts(mean, metrics)


def _with_parts(mean: Mean, metrics: Metrics) -> Metrics:
    if not isinstance(mean, Total):
        return metrics
    twice = next((name for name in mean.parts if name in metrics or name in _RESERVED), None)
    if twice is not None:
        raise ValueError(
            f"loss(model, batch) returned a total with the term {twice!r}, which is a metric's name too. The step"
            f" reports each term under its name; write another one: `tfn.losses.total({{'{twice}_term': ...}})`."
        )
    return {**mean.parts, **metrics}


def _warn_inexact() -> None:
    """A compiled step warns once, while it is captured."""
    warnings.warn(
        "The loss returned a bare scalar. It is taken as the mean over the batch's rows, which is exact only if every"
        f" row weighs the same. With masked, padded or weighted rows it is wrong. {_HOW_EXACT}",
        InexactLossWarning,
        stacklevel=2,
    )


def summed(
    gradients: GradientFunction,
    state: TrainState,
    pieces: Iterable[tuple[Batch, int]],
    report: Callable[[], str],
    count: int,
) -> Gradients:
    """Add up the gradients of ``count`` pieces of a batch, one at a time; the buffers are threaded through.

    Low-precision gradients are added in float32.
    """
    total: Gradients | None = None
    state = _shared_scale(state, count)

    def run(state: TrainState, piece: Batch, row: Tensor) -> Gradients:
        if count == 1:
            return gradients(state, piece, row)
        with split_batch():
            return gradients(state, piece, row)

    for piece, first_row in pieces:
        row = torch.full((), first_row, dtype=torch.int64, device=state.step.device)
        if total is None:
            total = run(state, piece, row)
            total = total._replace(grads=_owned(total.grads), terms=tuple(map(_owned, total.terms)))
        else:
            params = {**state.params, **total.written}
            total = _add(total, run(state._replace(params=params, buffers=total.buffers), piece, row))
    if total is None:
        raise ValueError(report())
    return total


def _owned(grads: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if grad is None else _own(grad) for name, grad in grads.items()}


def _own(grad: Tensor) -> Tensor:
    """A copy to add to: what autograd returns may be one tensor for two parameters."""
    low = grad.dtype in (torch.float16, torch.bfloat16)
    return grad.to(torch.float32 if low else grad.dtype, copy=True)


def _add(total: Gradients, part: Gradients) -> Gradients:
    for mine, more in zip((total.grads, *total.terms), (part.grads, *part.terms), strict=True):
        _add_to(mine, more)
    metrics = {name: mean + part.metrics[name] for name, mean in total.metrics.items()}
    written = {**total.written, **part.written}
    return total._replace(loss=total.loss + part.loss, metrics=metrics, buffers=part.buffers, written=written)


def _add_to(grads: dict[str, Tensor | None], part: dict[str, Tensor | None]) -> None:
    sums, more = list[Tensor](), list[Tensor]()
    for name, grad in part.items():
        if grad is None:
            continue
        if (added := grads[name]) is None:
            grads[name] = _own(grad)
        else:
            sums.append(added)
            more.append(grad)
    if sums:
        torch._foreach_add_(sums, more)  # we own the first list
