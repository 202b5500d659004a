"""The loss, the predictions and the labels of one batch in an evaluation."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from typing import TypeAlias, cast

import torch
import transformers
from accelerate.utils.operations import convert_to_fp32
from torch import Tensor, nn
from transformers.trainer_pt_utils import find_batch_size, nested_detach

import trainfn as tfn
from trainfn.hf._evaluation._concatenate import no_tensor
from trainfn.hf._names import overridden
from trainfn.hf._step import _terms
from trainfn.hf._step._counting import counted, find_shift
from trainfn.hf._step._loss import autocast, exact_loss
from trainfn.hf._types import Batch, Nested, Outputs, TrainerLike

logger = logging.getLogger(__name__)

StepOutput: TypeAlias = "tuple[Tensor | None, Nested, Nested]"


def prediction_step(
    trainer: TrainerLike,
    model: nn.Module,
    inputs: Batch,
    prediction_loss_only: bool,
    ignore_keys: list[str] | None = None,
) -> StepOutput:
    """Return the loss, the predictions and the labels of one batch; `None` for each that is missing.

    The loss is the batch's mean, as in transformers. It also holds its undivided `trainfn.Mean` (see `mean_of`), and
    the evaluation loop adds these up. So an override that calls this one and returns its loss keeps the evaluation
    exact.

    Args:
        trainer: The trainer.
        model: The model to call.
        inputs: One batch.
        prediction_loss_only: Whether to return the loss alone.
        ignore_keys: Names of model outputs to leave out of the predictions. An output that is not a tensor is left out
            as well.
    """
    labelled = gives_loss(trainer, inputs)
    inputs = trainer._prepare_inputs(inputs)
    ignored = _ignored(trainer) if ignore_keys is None else ignore_keys
    labels = (
        _labels(trainer, inputs) if labelled and not prediction_loss_only else None
    )  # before a `compute_loss` can pop them
    with torch.no_grad():
        if labelled:
            find_shift(trainer, inputs)
            mean, outputs = exact_loss(trainer, model, inputs, outputs_too=True)
            loss = loss_of(mean, _terms.means(trainer, inputs, outputs, mean.value))
        else:
            loss, outputs = None, forward(trainer, model, inputs)
    if prediction_loss_only:
        return loss, None, None
    return loss, _predictions(trainer, outputs, [*ignored, *(["loss"] if labelled else [])]), labels


def forward(trainer: TrainerLike, model: nn.Module, inputs: Batch) -> Outputs:
    """Return the model's outputs for a batch without labels."""
    with autocast(trainer.args, torch.device(trainer.args.device)), trainer.compute_loss_context_manager():
        return model(**inputs)


# ---- undivided losses ----


def loss_of(mean: tfn.Mean, of_terms: tfn.Mean | None = None) -> Tensor:
    """Return the scalar loss, with the undivided mean, or the means of its terms, as an attribute of the tensor."""
    loss = mean.value.detach()
    if not loss.is_inference():  # tensors of inference mode have no `_version`, which shows a change in place
        mean = mean if of_terms is None else of_terms
        kept = tfn.Mean(mean.total.detach(), mean.weight.detach())
        loss.undivided = kept, loss._version  # type: ignore[attr-defined]
    return loss


def mean_of(trainer: TrainerLike, loss: Tensor | float, inputs: Batch) -> tfn.Mean:
    """Return the undivided mean behind the loss of a batch, also if an override computed it.

    The divisor of an override is not known. The number of counted labels is exact for a mean over labels, and the
    number of rows for a mean over rows. With other weights, such as those of classes, the result is a mean of means.
    """
    exact, version = getattr(loss, "undivided", (None, None))
    if isinstance(exact, tfn.Mean) and isinstance(loss, Tensor) and loss._version == version:
        return exact  # not after a change in place such as `loss += penalty`, which leaves the attribute on the tensor
    loss = torch.as_tensor(loss).detach().float()
    if loss.dim() == 1 and len(loss) == find_batch_size(inputs):  # one loss a row
        return tfn.Mean.of(loss)
    loss = loss.mean()
    weight = _count(trainer, inputs).to(loss.device)
    # A batch without a counted label has the loss 0/0 = NaN, and adds nothing to the sum.
    return tfn.Mean(torch.where(weight > 0, loss * weight, 0.0), weight)


def _count(trainer: TrainerLike, inputs: Batch) -> Tensor:
    try:
        return counted(trainer, inputs)
    except TypeError:  # rows that can't be counted
        return torch.ones(())


# ---- what a batch holds ----


def _has_labels(trainer: TrainerLike, inputs: Batch) -> bool:
    return bool(trainer.label_names) and all(inputs.get(name) is not None for name in trainer.label_names)


def gives_loss(trainer: TrainerLike, inputs: Batch) -> bool:
    """Whether a batch has a loss: it has all labels, or the model makes its own labels, as CLIP does.

    Only an override of `compute_loss` knows the labels of a batch that is not a mapping.
    """
    if not isinstance(inputs, Mapping):
        return overridden(trainer, "compute_loss")
    asked = inputs.get("return_loss")
    makes_own = not trainer.label_names and bool(trainer.can_return_loss if asked is None else asked)
    return _has_labels(trainer, inputs) or makes_own


def _labels(trainer: TrainerLike, inputs: Batch) -> Nested:
    if not isinstance(inputs, Mapping):
        return None
    labels = cast("tuple[Nested, ...]", nested_detach(tuple(inputs.get(name) for name in trainer.label_names)))
    return labels[0] if len(labels) == 1 else labels


# A cache of plain tensors looks like a prediction: only its name, the old one or the present one, shows it.
_CACHES = ["past_key_values", "cache"]


def _ignored(trainer: TrainerLike) -> list[str]:
    config = getattr(trainer.model, "config", None)
    return [] if config is None else getattr(config, "keys_to_ignore_at_inference", _CACHES)


def _predictions(trainer: TrainerLike, outputs: Outputs, ignored: list[str]) -> Nested:
    """Return the outputs without those ignored: one tensor if one is left, else a tuple."""
    if outputs is None:  # a `compute_loss` without `return_outputs`
        return None
    if isinstance(outputs, Mapping):
        kept: Nested = _tensors((name, value) for name, value in outputs.items() if name not in ignored)
    elif isinstance(outputs, tuple | list):
        start = 1 if "loss" in ignored else 0  # the loss comes first
        kept = _tensors(enumerate(cast("tuple[Nested, ...]", outputs)[start:], start))
    else:
        kept = outputs
    kept = nested_detach(kept)
    if trainer.args.bf16 or trainer.args.fp16:  # NumPy has no bfloat16, and metrics want float32
        kept = convert_to_fp32(kept)
    return kept[0] if isinstance(kept, tuple | list) and len(kept) == 1 else kept


def _tensors(outputs: Iterable[tuple[str | int, Nested]]) -> tuple[Nested, ...]:
    """Return the outputs that are tensors, without caches of any name."""
    kept: list[Nested] = []
    for name, value in outputs:
        odd = no_tensor(value)
        if odd is None:
            kept.append(value)
        elif not isinstance(odd, transformers.Cache):
            _warn_left_out(name, type(odd).__name__)
    return tuple(kept)


@functools.cache  # once for each output, not once a batch
def _warn_left_out(name: str | int, kind: str) -> None:
    logger.warning(
        "The model's output %r holds a %s, which is not a tensor, so it is left out of the predictions.", name, kind
    )
