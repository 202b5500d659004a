"""Exact losses from heads and overrides that return means.

A head of transformers returns the mean over what it counts, and so do most overrides of `compute_loss`. The batch shows
how much is counted (see `_counting`), so the total is the mean times the count. The core adds totals and counts over
micro-batches, and divides once.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import trainfn as tfn
from trainfn.hf._step import _terms
from trainfn.hf._step._counting import counted, shifts_labels
from trainfn.hf._step._held import opened
from trainfn.hf._types import Batch, Loss, Outputs, TrainerLike, Values

if TYPE_CHECKING:
    from trainfn.hf._arguments._training import TrainingArguments

_OUTPUTS = frozenset(("return_outputs",))


def exact_loss(
    trainer: TrainerLike,
    model: nn.Module,
    inputs: Batch,
    takes: frozenset[str] | None = None,
    *,
    outputs_too: bool = False,
    of_update: Batch | None = None,
) -> tuple[tfn.Mean, Outputs]:
    """The loss of a batch as an undivided mean, and the model's outputs.

    Args:
        trainer: A Trainer; its `compute_loss`, overridden or not, returns a `trainfn.Mean` or a scalar. A scalar counts
            as the mean over what `counted` counts, mostly the labels that are not -100.
        model: The model to call.
        inputs: The batch; it is not changed.
        takes: The result of `takes_of`, which is called by default.
        of_update: The batch with the counts of the whole update, by default ``inputs`` itself.
        outputs_too: Whether to ask `compute_loss` for the outputs too; otherwise they may be None.

    Raises:
        TypeError: If `compute_loss` returns something else.
    """
    update, inputs = _counts(inputs if of_update is None else of_update), without_update(opened(inputs))
    count, uncounted = _count(trainer, inputs)
    outputs_too = outputs_too or update is not None
    takes = takes_of(trainer) if takes is None else takes
    with autocast(trainer.args, count.device), trainer.compute_loss_context_manager():
        given = dict(inputs) if isinstance(inputs, Mapping) else inputs
        loss, outputs = _computed(trainer, model, given, count, takes if outputs_too else takes - _OUTPUTS)
    if isinstance(loss, tfn.Mean):
        return loss, outputs
    if uncounted is not None:
        raise uncounted
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        kind = f"a Tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TypeError(
            f"`{type(trainer).__name__}.compute_loss` returned {kind} for the loss. Return a scalar mean, or"
            " `tfn.Mean.of(values, weights)`, which is exact for any weights."
        )
    if update is not None:
        return _terms.of_update(trainer, inputs, outputs, loss, update), outputs
    # A mean over no labels is 0 / 0. Its gradient is 0, but its value, NaN, would spoil the sum.
    total = torch.where(count > 0, loss.float() * count, 0.0)
    return tfn.Mean(total, count), outputs


def _count(trainer: TrainerLike, inputs: Batch) -> tuple[Tensor, TypeError | None]:
    """The number that a mean over a batch divides by; or 1 and an error, for a loss that is not an exact mean."""
    try:
        return counted(trainer, inputs), None
    except TypeError as error:
        return torch.ones((), device=trainer.args.device), error


def scalar_loss(trainer: TrainerLike, model: nn.Module, inputs: Batch) -> Loss:
    """The result of `compute_loss` for a batch, as it is."""
    count = counted(trainer, inputs)
    with autocast(trainer.args, count.device), trainer.compute_loss_context_manager():
        return _computed(trainer, model, dict(inputs), count, takes_of(trainer) - _OUTPUTS)[0]


def _counts(inputs: Batch) -> Tensor | None:
    return inputs.get(_terms.UPDATE) if isinstance(inputs, Mapping) else None


def without_update(inputs: Batch) -> Batch:
    """The batch without the counts of the whole update, which the loop adds for some losses."""
    if _counts(inputs) is None:
        return inputs
    return {name: value for name, value in inputs.items() if name != _terms.UPDATE}


def _computed(
    trainer: TrainerLike, model: nn.Module, inputs: Batch, count: Tensor, takes: frozenset[str]
) -> tuple[Loss, Outputs]:
    options: Values = {"num_items_in_batch": count} if "num_items_in_batch" in takes else {}
    if "return_outputs" in takes:
        options["return_outputs"] = True
    returned = trainer.compute_loss(model, inputs, **options)
    return returned if isinstance(returned, tuple) and not isinstance(returned, tfn.Mean) else (returned, None)


def takes_of(trainer: TrainerLike) -> frozenset[str]:
    """The optional arguments that this trainer's `compute_loss` takes; older overrides have fewer."""
    found = inspect.signature(trainer.compute_loss).parameters
    known = {"num_items_in_batch", "return_outputs"}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values()):
        return frozenset(known)
    return frozenset(known & found.keys())


def compute_loss(
    trainer: TrainerLike,
    model: nn.Module,
    inputs: Batch,
    return_outputs: bool = False,
    num_items_in_batch: Tensor | None = None,
) -> Loss | tuple[Loss, Outputs]:
    """The default of `Trainer.compute_loss`: label smoothing, ``compute_loss_func``, or the loss of the head.

    Raises:
        ValueError: If the model returns no loss.
    """
    own = trainer.compute_loss_func is not None or trainer.label_smoother is not None
    labels = inputs.pop("labels") if own and "labels" in inputs else None
    shifted: Callable[..., Tensor] | None = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if labels is not None and shifted is not None:
        inputs.setdefault("decoder_input_ids", shifted(labels=labels))
    outputs = model(**inputs)
    if trainer.compute_loss_func is not None:
        loss = trainer.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
    elif labels is not None:
        assert trainer.label_smoother is not None
        loss = trainer.label_smoother(outputs, labels, shift_labels=shifts_labels(trainer))
    else:
        loss = head_loss(outputs, inputs)
    if trainer._trainfn.watch is not None:
        trainer._trainfn.watch(loss)
    return (loss, outputs) if return_outputs else loss


def head_loss(outputs: Outputs, inputs: Batch) -> Tensor:
    """The loss among a model's outputs.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(outputs, Mapping) and "loss" not in outputs:
        raise ValueError(
            f"`model(**inputs)` returned no loss, only {list(outputs)}, for the inputs {list(inputs)}. Pass labels:"
            " call their column `labels`, and don't let it be removed. Or write `compute_loss` or `compute_loss_func`."
        )
    return outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]


def training_loss(trainer: TrainerLike) -> Callable[[nn.Module, Batch], tuple[tfn.Mean, dict[str, tfn.Mean]]]:
    """The trainer's loss and the metrics that come with it, as `trainfn.train_step` takes them."""
    takes = takes_of(trainer)  # once: a signature can't be looked at inside a compiled step
    metrics, outputs_too = trainer._trainfn.loss_metrics, trainer._trainfn.needs_outputs

    def loss(_: nn.Module, batch: Batch) -> tuple[tfn.Mean, dict[str, tfn.Mean]]:  # a copy, if a loss has parameters
        mean, outputs = exact_loss(trainer, trainer.model, batch, takes, outputs_too=outputs_too)
        return mean, metrics(batch, outputs)

    return loss


@contextlib.contextmanager
def autocast(args: TrainingArguments, device: torch.device) -> Generator[None]:
    """Compute matrix products in bf16 or fp16, if the arguments ask for it."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if dtype is None:
        yield
        return
    with torch.autocast(device.type, dtype):
        yield
