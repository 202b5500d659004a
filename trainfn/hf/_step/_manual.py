"""Steps for subclasses that override `training_step`: the gradients come from their own backward passes.

Such a step runs Python between its parts, so it is not compiled; the update is the core's all the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Generator, Mapping
from types import CodeType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers.utils import logging

import trainfn as tfn
from trainfn.hf._names import overridden
from trainfn.hf._parallel._parameters import whole
from trainfn.hf._run._record import trained_of
from trainfn.hf._step._counting import counted
from trainfn.hf._step._held import opened
from trainfn.hf._step._loss import exact_loss, head_loss, without_update
from trainfn.hf._types import Batch, Outputs, TrainerLike

logger = logging.get_logger(__name__)
_NUMBERS = frozenset(("gradient_accumulation_steps", "current_gradient_accumulation_steps"))


def overrides(trainer: TrainerLike) -> list[str]:
    """The overridden methods that keep a step from being one function."""
    return ["training_step"] if overridden(trainer, "training_step") else []


def training_step(
    trainer: TrainerLike, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | None = None
) -> Tensor:
    """Compute the loss of one micro-batch, and add the gradients of its mean to ``.grad``.

    An override that adds a backward pass or changes ``.grad`` then works in the same units.
    """
    # Here and not before the window: an override may generate from the model, or count its calls.
    inputs = trainer._prepare_inputs(inputs)
    mean, _ = exact_loss(trainer, model, inputs, of_update=trainer._trainfn.update)
    weight = mean.weight.detach()
    (mean.total / torch.where(weight > 0, weight, 1.0)).backward()
    mean = trainer._trainfn.manual_mean = tfn.Mean(mean.total.detach(), weight)
    return mean.value


def step(trainer: TrainerLike, made: tfn.TrainStep) -> tfn.TrainStep:
    """The same step, with its gradients from `Trainer.training_step`.

    On several ranks each gathers the full parameters for every micro-batch, because the method reads them from the
    model.
    """
    record = trainer._trainfn
    plan = record.world.plan
    _check_axes(trainer, plan)

    def gradients(state: tfn.TrainState, batch: Batch, first_row: Tensor | int = 0, /) -> tfn.Gradients:
        key = tfn.random.fold_in(state.key, state.step)
        model, record.manual_mean = trainer.model, None
        if tfn.data.is_empty(batch):
            zero = torch.zeros((), device=state.step.device)
            return tfn.Gradients(tfn.Mean(zero, zero), dict.fromkeys(state.params), {}, state.buffers)
        rest = without_update(opened(batch))
        count, trained = counted(trainer, rest), trained_of(trainer)
        trained.zero_grad(set_to_none=True)
        try:
            with torch.enable_grad(), tfn.keyed(key, rows=tfn.tree.row_count(batch), first_row=first_row):
                with _undivided(trainer) as factor:
                    record.update = batch
                    loss = trainer.training_step(model, dict(rest) if isinstance(rest, Mapping) else rest, count)
            mean, scale = record.manual_mean, 1.0
            if mean is None:  # an override ran its own backward pass, of a mean over the counted labels
                scale = factor()
                mean = tfn.Mean(torch.as_tensor(loss).detach().float().mean() * count * scale, count)
            held = dict(trained.named_parameters(remove_duplicate=True))
            grads = {
                name: _summand(p, None if (grad := held[name].grad) is None else grad.detach() * (mean.weight * scale))
                for name, p in state.params.items()
            }
        finally:
            record.update = None
            trained.zero_grad(set_to_none=True)
        return tfn.Gradients(mean, grads, {}, state.buffers)

    if plan is None:
        return dataclasses.replace(made, gradients=gradients)
    of_this_rank = plan.gradients(gradients)

    def on_whole(state: tfn.TrainState, batch: Batch, /, *first_row: Tensor | int) -> tfn.Gradients:
        with whole(trainer):
            return of_this_rank(state, batch, *first_row)

    return dataclasses.replace(made, gradients=on_whole)


@contextlib.contextmanager
def _undivided(trainer: TrainerLike) -> Generator[Callable[[], float]]:
    """Let an override that divides by the number of micro-batches give the gradients of a mean all the same.

    In the block these numbers are 1, so an override that reads them divides by 1. One that does not name them may know
    them otherwise, which the gradient of the loss shows. Yield a function that returns the factor which undoes it.
    """
    args, record = trainer.args, trainer._trainfn
    number, current = args.gradient_accumulation_steps, trainer.current_gradient_accumulation_steps
    factors: list[Tensor] = []

    def watch(loss: object) -> None:
        if isinstance(loss, Tensor) and loss.requires_grad and loss.dim() == 0:
            loss.register_hook(factors.append)

    def of_outputs(module: nn.Module, _: object, outputs: Outputs) -> None:
        with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
            watch(head_loss(outputs, {}))

    def factor() -> float:
        found = set[float]() if _reads_numbers(trainer) else {float(x) for x in factors}
        k = next((k for k in (number, current) if k > 1 and any(abs(x * k - 1) < 1e-5 for x in found)), 1)
        if k > 1:
            logger.warning_once(
                f"`{type(trainer).__name__}.training_step`: the gradient of its loss is 1/{k}, so it seems to divide by"
                f" gradient_accumulation_steps={number}, which is undone. If 1/{k} is a weight of your own, write"
                " `loss / self.args.gradient_accumulation_steps`. That number is 1 inside of `training_step`."
            )
        return float(k)

    record.watch = watch
    handle = trainer.model.register_forward_hook(of_outputs)
    args.gradient_accumulation_steps = trainer.current_gradient_accumulation_steps = 1
    try:
        yield factor
    finally:
        handle.remove()
        record.watch = None
        args.gradient_accumulation_steps, trainer.current_gradient_accumulation_steps = number, current


def _reads_numbers(trainer: TrainerLike) -> bool:
    """Whether an override of `training_step` names the number of micro-batches in its code."""
    owners = (vars(trainer), *(vars(k) for k in type(trainer).__mro__ if not k.__module__.startswith("trainfn.hf.")))
    return any(
        not _NUMBERS.isdisjoint(_names_in(inspect.unwrap(owner["training_step"])))
        for owner in owners
        if "training_step" in owner
    )


def _names_in(function: object) -> set[object]:
    """The names and the strings in the code of a function, and of those that are written inside of it."""
    code: CodeType | None = getattr(function, "__code__", function if isinstance(function, CodeType) else None)
    if code is None:
        return set()
    inner = (_names_in(each) for each in code.co_consts if isinstance(each, CodeType))
    return {*code.co_names, *(each for each in code.co_consts if isinstance(each, str))}.union(*inner)


def _summand(param: Tensor, grad: Tensor | None) -> Tensor | None:
    """A gradient of this rank's rows, if there is one; on several ranks, as one summand of the sum over ranks."""
    if grad is None or not isinstance(param, DTensor):
        return grad
    return DTensor.from_local(grad.contiguous(), param.device_mesh, [Partial()], run_check=False)


def _check_axes(trainer: TrainerLike, plan: tfn.Plan | None) -> None:
    sizes = {} if plan is None else {axis: n for axis, n in plan.shape(plan.world).items() if n > 1}
    if len(sizes) > 1 or "tensor" in sizes:
        raise ValueError(
            f"{type(trainer).__name__}.training_step is overridden, and its backward pass gives gradients of full"
            f" parameters, which can't be sharded over {sizes}. Override compute_loss in place of training_step, or"
            " train with one axis: DDP, or FSDP without `hybrid_shard` and tensor parallelism."
        )
