"""The training step: gradients, then an update. Read this second.

::

    batch ──pieces──▶ gradients(state, piece) ─┐
                                               + ──▶ update(state, sums) ──▶ state', metrics
                      gradients(state, piece) ─┘
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import optree
import torch
from torch import Tensor

from trainfn import tree
from trainfn._bound import bound
from trainfn._grad import (
    GradientFunction,
    detached,
    divided,
    divisor,
    exact,
    gradient_function,
    of_whole,
    summed,
    value_and_grad,
)
from trainfn._keyed import Randomness
from trainfn._module import check_state, check_whole
from trainfn._reached import Unsettled, is_settled, kept
from trainfn._types import Batch, Gradients, Loss, Mean, Metrics, Params, TrainState, Transform, Tree
from trainfn.optim._combine import frozen_by, still

Update = Callable[[TrainState, Gradients], tuple[TrainState, Metrics]]


class Distribution(Protocol):
    """The part of a step that spreads it over ranks: `trainfn.Plan`."""

    @property
    def world(self) -> int:
        """The number of ranks."""
        ...

    def loss(self, loss: Loss, /) -> Loss:
        """The loss on one rank."""
        ...

    def gradients(self, gradients: GradientFunction, /) -> GradientFunction:
        """The gradients of one rank's rows."""
        ...

    def largest(self, state: TrainState, weight: Tensor, /) -> Tensor:
        """The largest of all ranks' weights."""
        ...

    def update(self, update: Update, /) -> Update:
        """The update by all ranks' gradients."""
        ...

    def metrics(self, evaluate: Callable[..., Metrics], /) -> Callable[..., Metrics]:
        """The metrics of all ranks' rows."""
        ...

    def pieces(self, state: TrainState, batch: Batch, accumulate: Any, /) -> Iterator[tuple[Batch, Any]]:
        """One rank's micro-batches, each with the place of its first row among those of all ranks."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStep:
    """A step in two parts, so that accumulation can repeat the first and transforms can wrap the second.

    Attributes:
        gradients: ``(state, batch, first_row) -> Gradients``.
        update: ``(state, Gradients) -> (state, metrics)``.
        accumulate: Into how many micro-batches a batch is split; ``"stream"`` if it comes as an iterable of them.
        plan: How the step is spread over ranks; its `gradients` and `update` know already.
    """

    gradients: GradientFunction
    update: Update
    accumulate: int | Literal["stream"] = 1
    plan: Distribution | None = None

    def __call__(self, state: TrainState, batch: Batch, /) -> tuple[TrainState, Metrics]:
        """Return the next state and this batch's metrics."""
        if self.accumulate == 1:
            sums = of_whole(self.gradients)(state, batch)
        else:
            plan = None if self.plan is None or self.plan.world == 1 else self.plan
            pieces = self.pieces(batch) if plan is None else plan.pieces(state, batch, self.accumulate)
            sums = summed(self.gradients, state, pieces, _empty_stream, self.count(batch))
        return self.advanced(state, sums)

    def advanced(self, state: TrainState, sums: Gradients) -> tuple[TrainState, Metrics]:
        """Update a state, to which the places are added that `Unsettled` asks for; a captured step is captured anew."""
        try:
            return self.update(state, sums)
        except Unsettled as ask:
            if tree.is_traced(state.step):
                raise
            return self.update(ask.prepared(state), sums)

    def count(self, batch: Batch) -> int:
        """The number of micro-batches of a batch; 1 for a stream that has neither a length nor a hint of one."""
        return operator.length_hint(batch, 1) if self.accumulate == "stream" else self.accumulate

    def pieces(self, batch: Batch) -> Iterator[tuple[Batch, int]]:
        if self.accumulate != "stream":
            yield from tree.split(batch, self.accumulate)
            return
        first = 0
        for micro in batch:
            yield micro, first
            first += tree.row_count(micro)


def _empty_stream() -> str:
    return 'step(state, batch) with accumulate="stream": the stream of micro-batches was empty.'


def train_step(
    loss: Loss,
    optimizer: Transform,
    *,
    accumulate: int | Literal["stream"] = 1,
    plan: Distribution | None = None,
) -> TrainStep:
    """The step ``(state, batch) -> (state, metrics)`` that follows the gradient of a loss.

    The metrics are ``loss``, ``grad_norm`` (of the mean gradient, before clipping) and the loss function's own.
    A batch whose weights are all 0 gives zero gradients.

    Args:
        loss: See `value_and_grad`.
        optimizer: What `init` was given.
        accumulate: Into how many micro-batches to split each batch. The update is the same, up to the order of
            floating-point additions, and activations take less memory. ``"stream"``: the batch is an iterable of
            micro-batches, which need not fit in memory together.
        plan: A `trainfn.Plan`: the same update on N ranks, of which each is called with its own rows and a state that
            `trainfn.shard` made.

    >>> import torch, trainfn as tfn
    >>> optimizer = tfn.optim.sgd(0.5)
    >>> state = tfn.init({"w": torch.tensor([4.0])}, optimizer)
    >>> step = train_step(lambda p, x: tfn.Mean.of((p["w"] - x) ** 2), optimizer)
    >>> state, metrics = step(state, torch.tensor([1.0, 1.0]))
    >>> state.params["w"], metrics["loss"]
    (tensor([1.]), Mean(9 over weight 2))
    """
    if not isinstance(optimizer, Transform):
        raise TypeError(
            f"train_step(loss, optimizer) takes the transform that `init` was given, such as `tfn.optim.adamw(1e-3)`,"
            f" not {type(optimizer).__name__}."
        )
    if plan is None:
        return _accumulated(TrainStep(gradients=_alone(value_and_grad(loss)), update=_update(optimizer)), accumulate)
    gradients = plan.gradients(gradient_function(plan.loss(loss), plan.largest))
    return _accumulated(TrainStep(gradients=gradients, update=plan.update(_update(optimizer)), plan=plan), accumulate)


def _alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a state that one process holds, and no other."""

    def alone(state: TrainState, *batch: Any) -> Any:
        check_whole(state)
        return function(state, *batch)

    if hasattr(function, "whole"):
        alone.whole = _alone(function.whole)  # type: ignore[attr-defined]
    return alone


def _update(optimizer: Transform) -> Update:
    frozen = frozen_by(optimizer)

    def update(state: TrainState, sums: Gradients) -> tuple[TrainState, Metrics]:
        sums, weight = divided(sums), divisor(sums.loss)
        state = state._replace(params={**state.params, **sums.written}) if sums.written else state
        grads = {name: grad for name, grad in sums.grads.items() if grad is not None}
        missed = {name: sums.reached.get(name) for name in state.params if name not in grads or name in sums.reached}
        if missed and not is_settled(state.opt_state, frozenset(missed)):
            raise Unsettled(missed)
        grads = tree.div(grads, weight)
        grads = grads if len(grads) == len(state.params) else _with_zeros(grads, state.params)
        grads = tree.cast_like(grads, state.params)
        if frozen is not None:
            grads = still(grads, frozen(state.params))
        norm = tree.global_norm(grads)
        updates, opt_state = _transformed(optimizer, grads, state)
        params = tree.cast_like(tree.add(state.params, updates), state.params)
        new = state._replace(
            step=state.step + 1,
            params=kept(state.params, params, missed) if missed else params,
            buffers=sums.buffers,
            opt_state=kept(state.opt_state, opt_state, missed) if missed else opt_state,
        )
        return new, {"loss": sums.loss, "grad_norm": Mean(norm, torch.ones_like(norm)), **sums.metrics}

    return update


def _with_zeros(grads: Params, params: Params) -> Params:
    return {name: grads[name] if name in grads else torch.zeros_like(p) for name, p in params.items()}


def _transformed(optimizer: Transform, grads: Params, state: TrainState) -> tuple[Params, Tree]:
    try:
        return optimizer.update(grads, state.opt_state, state.params)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        made, given = (optree.tree_structure(t) for t in (optimizer.init(state.params), state.opt_state))
        if made == given:
            raise
        raise ValueError(
            f"step(state, batch): state.opt_state is {given}, and this step's optimizer keeps {made}. Give `init` and"
            " `train_step` the same optimizer; to change it in mid-training,"
            " `state._replace(opt_state=optimizer.init(state.params))`."
        ) from error


def accumulate(
    step: TrainStep | GradientFunction, num: int | Literal["stream"]
) -> TrainStep | Callable[[TrainState, Batch], Gradients]:
    """Compute a step, or a gradient function, in ``num`` micro-batches one after the other.

    Compiled, it is one program for the gradients of a micro-batch and one for the update, whatever ``num`` is.

    >>> import torch, trainfn as tfn
    >>> state = tfn.init({"w": torch.tensor([3.0])}, tfn.optim.sgd(0.1))
    >>> grads = tfn.value_and_grad(lambda p, x: tfn.Mean.of(p["w"] * x))
    >>> accumulate(grads, 2)(state, torch.tensor([1.0, 2.0, 3.0])).loss
    Mean(6 over weight 3)
    """
    if isinstance(step, TrainStep):
        return _accumulated(step, num)
    _check_takes_rows(step)
    whole = _accumulated(TrainStep(gradients=step, update=lambda state, sums: (state, {})), num)
    return lambda state, batch: summed(step, state, whole.pieces(batch), _empty_stream, whole.count(batch))


def _check_takes_rows(gradients: Any) -> None:
    """Raise if a function is not one of `value_and_grad`, which takes the number of the first row."""
    try:
        inspect.signature(gradients).bind(None, None, 0)
    except (TypeError, ValueError) as error:
        name = getattr(gradients, "__name__", type(gradients).__name__)
        raise TypeError(
            f"accumulate({name}, num): it takes a `TrainStep` or a gradient function, whose sums add up over"
            " micro-batches; of a function that updates, the updates would. Split the step inside:"
            " `tfn.train_step(loss, optimizer, accumulate=2)`."
        ) from error


def _accumulated(step: TrainStep, num: int | Literal["stream"]) -> TrainStep:
    if num != "stream" and (isinstance(num, bool) or not isinstance(num, int) or num < 1):
        raise ValueError(f'accumulate={num!r}: give a number of micro-batches, 1 or more, or "stream".')
    return dataclasses.replace(step, accumulate=num)


def eval_step(
    loss: Loss, *, plan: Distribution | None = None, grad: bool | None = None
) -> Callable[[TrainState, Batch], Metrics]:
    """The function ``(state, batch) -> metrics`` of a loss: the module in eval mode, no gradients.

    Args:
        loss: See `value_and_grad`.
        plan: See `train_step`.
        grad: Whether the loss takes derivatives itself, as of an energy, and so needs autograd. By default it is
            tried without, and then with it. False leaves torch's error as it is.

    >>> import torch, trainfn as tfn
    >>> state = tfn.init({"w": torch.tensor([3.0])}, tfn.optim.sgd(0.1))
    >>> eval_step(lambda p, x: tfn.Mean.of(p["w"] * x))(state, torch.tensor([1.0, 2.0]))
    {'loss': Mean(4.5 over weight 2)}

    A loss that differentiates:

    >>> def slope(p, x):
    ...     x = x.clone().requires_grad_()
    ...     (g,) = torch.autograd.grad((p["w"] * x**2).sum(), x, create_graph=True)
    ...     return tfn.Mean.of(g)
    >>> eval_step(slope)(state, torch.tensor([1.0, 2.0]))
    {'loss': Mean(9 over weight 2)}
    """
    one = loss if plan is None else plan.loss(loss)
    randomness, noticed = Randomness(), bool(grad)

    def evaluate_batch(state: TrainState, batch: Batch, first_row: Tensor | int = 0, /) -> Metrics:
        check_state(state)
        rows = tree.row_count(batch)

        def means(grads: bool) -> Metrics:
            with torch.set_grad_enabled(grads), bound(state, training=False, grads=grads) as run:
                mean, metrics = exact(one(run.model, batch), rows)
            torch.clear_autocast_cache()  # as in `value_and_grad`
            return {"loss": detached(mean), **{name: detached(metric) for name, metric in metrics.items()}}

        def means_somehow() -> Metrics:
            nonlocal noticed
            if not noticed:
                try:
                    return means(False)
                except RuntimeError as error:
                    if grad is False or _NO_GRAPH not in str(error):
                        raise
                noticed = True
            return means(True)

        return randomness(state, means_somehow, rows=rows, first_row=first_row)

    found = _alone(evaluate_batch) if plan is None else plan.metrics(evaluate_batch)
    found.takes_first_row = True  # type: ignore[attr-defined]
    return found


_NO_GRAPH = "does not require grad and does not have a grad_fn"  # as torch says it of a derivative without autograd
