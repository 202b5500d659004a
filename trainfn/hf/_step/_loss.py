"""Exact losses from heads and overrides that return means.

A head of transformers returns the mean over the labels it counts, and so do most overrides of `compute_loss`. The
labels show how many are counted, so the total is the mean times the count. The core adds totals and counts over
micro-batches, and divides once.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

import trainfn as tfn
from trainfn.hf._step._modes import eval_mode
from trainfn.hf._types import Batch, Loss, Outputs, TrainerLike, Values

if TYPE_CHECKING:
    from trainfn.hf._arguments._training import TrainingArguments

IGNORED = -100
_OUTPUTS = frozenset(("return_outputs",))


def exact_loss(
    trainer: TrainerLike,
    model: nn.Module,
    inputs: Batch,
    takes: frozenset[str] | None = None,
    *,
    outputs_too: bool = False,
) -> tuple[tfn.Mean, Outputs]:
    """The loss of a batch as an undivided mean, and the model's outputs.

    Args:
        trainer: A Trainer; its `compute_loss`, overridden or not, returns a `trainfn.Mean` or a scalar. A scalar counts
            as the mean over the batch's labels that are not -100. If the labels are not class indices, it counts as
            the mean over the rows.
        model: The model to call.
        inputs: The batch; it is not changed.
        takes: The result of `takes_of`, which is called by default.
        outputs_too: Whether to ask `compute_loss` for the outputs too; otherwise they may be None.

    Raises:
        TypeError: If `compute_loss` returns something else.
    """
    count = counted(trainer, inputs)
    takes = takes_of(trainer) if takes is None else takes
    with autocast(trainer.args, count.device), trainer.compute_loss_context_manager():
        loss, outputs = _computed(trainer, model, dict(inputs), count, takes if outputs_too else takes - _OUTPUTS)
    if isinstance(loss, tfn.Mean):
        return loss, outputs
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        kind = f"a Tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TypeError(
            f"`{type(trainer).__name__}.compute_loss` returned {kind} for the loss. Return a scalar mean, or"
            " `tfn.Mean.of(values, weights)`, which is exact for any weights."
        )
    # A mean over no labels is 0 / 0. Its gradient is 0, but its value, NaN, would spoil the sum.
    total = torch.where(count > 0, loss.float() * count, 0.0)
    return tfn.Mean(total, count), outputs


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


def counted(trainer: TrainerLike, inputs: Batch) -> Tensor:
    """The number of labels that a mean over this batch counts, ``float32[]``."""
    labels = inputs.get("shift_labels")
    shifted = labels is None and shifts_labels(trainer)
    labels = inputs.get("labels") if labels is None else labels
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() == 0:
        first = next(x for x in inputs.values() if isinstance(x, Tensor) and x.dim() > 0)
        return torch.full((), first.shape[0], dtype=torch.float32, device=first.device)
    labels = labels[..., 1:] if shifted and labels.dim() > 1 else labels
    counts = labels != IGNORED
    other = getattr(getattr(trainer.model, "config", None), "semantic_loss_ignore_index", None)
    if other is not None and labels.dim() > 2:  # a segmentation map
        counts = counts & (labels != other)
    return counts.sum().float()


def shifts_labels(trainer: TrainerLike) -> bool:
    """Whether the model's own loss compares position t with label t + 1, so that the first label is not counted.

    A known ``loss_type`` of the model decides. Without one, `find_shift` has tried it out.
    """
    known = _known_shift(trainer.model)
    return bool(trainer._trainfn.shifts) if known is None else known


def base_of(model: nn.Module) -> nn.Module:
    """The model under the adapters of peft, or else the model itself."""
    base: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    return base() if base is not None and hasattr(model, "peft_config") else model


def _known_shift(model: nn.Module) -> bool | None:
    inner = base_of(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return False
    kind = getattr(inner, "loss_type", None)
    return LOSS_MAPPING[kind] is ForCausalLMLoss if kind in LOSS_MAPPING else None


def find_shift(trainer: TrainerLike, inputs: Batch) -> None:
    """Try out, once per trainer, whether the model shifts labels: then its loss ignores the first ones."""
    if not may_shift(trainer, inputs):
        return
    labels = inputs["labels"]
    rows = labels.shape[0]  # two of them are enough, and cheap
    inputs = {k: x[:2] if isinstance(x, Tensor) and x.dim() and x.shape[0] == rows else x for k, x in inputs.items()}
    labels = labels[:2]
    if bool((labels[:, 0] == IGNORED).all()) or bool((labels[:, 1:] == IGNORED).all()):
        return  # such labels decide nothing; the next batch may
    without = labels.clone()
    without[:, 0] = IGNORED
    one, two = (_tried(trainer.model, {**inputs, "labels": x}) for x in (labels, without))
    trainer._trainfn.shifts = bool(torch.allclose(one, two, rtol=1e-5))


def may_shift(trainer: TrainerLike, inputs: Batch) -> bool:
    """Whether it is still unknown if the model shifts labels, and such a batch could show it."""
    labels = inputs.get("labels")
    if trainer._trainfn.shifts is not None or _known_shift(trainer.model) is not None:
        return False
    if not isinstance(labels, Tensor) or labels.dim() < 2 or labels.is_floating_point():
        return False
    return _returns_loss_for_labels(trainer.model)


def _tried(model: nn.Module, inputs: Batch) -> Tensor:
    """The head's loss in eval mode, which does not change running statistics."""
    with eval_mode(model), torch.no_grad(), tfn.keyed(tfn.random.key(0)):
        return head_loss(model(**inputs), inputs)


def _returns_loss_for_labels(model: nn.Module) -> bool:
    inner = base_of(model)
    return "labels" in inspect.signature(inner.forward).parameters and hasattr(inner, "config")


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

    def loss(model: nn.Module, batch: Batch) -> tuple[tfn.Mean, dict[str, tfn.Mean]]:
        mean, outputs = exact_loss(trainer, model, batch, takes, outputs_too=outputs_too)
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
