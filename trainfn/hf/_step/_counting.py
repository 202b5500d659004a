"""The number that the loss of a batch is divided by: labels, rows, masked patches, boxes, or nothing.

A head of transformers returns a mean, and its class says over what. A loss of another class is tried out by
`_additive.examine`, which chooses among `CANDIDATES`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import optree
import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

import trainfn as tfn
from trainfn.hf._names import overridden
from trainfn.hf._step._modes import eval_mode
from trainfn.hf._types import Batch, Nested, TrainerLike

IGNORED = -100


class Count(NamedTuple):
    """A divisor of losses.

    Attributes:
        what: Its name.
        of: ``(trainer, inputs) -> float32[]``, the number for a batch.
        sums: Whether the loss is a sum over the batch, which nothing divides.
    """

    what: str
    of: Callable[[TrainerLike, Batch], Tensor]
    sums: bool = False


def counted(trainer: TrainerLike, inputs: Batch) -> Tensor:
    """The number that a mean over this batch divides by, ``float32[]``."""
    if overridden(trainer, "_get_num_items_in_batch"):
        own = trainer._get_num_items_in_batch([inputs], torch.device(trainer.args.device))
        if own is not None:
            return torch.as_tensor(own, dtype=torch.float32, device=trainer.args.device)
    return rule(trainer).of(trainer, inputs)


def rule(trainer: TrainerLike) -> Count:
    """The divisor of this trainer's loss: the one that was found by a trial, or that of the model's class."""
    return trainer._trainfn.divisor or known(trainer.model) or LABELS


def known(model: nn.Module) -> Count | None:
    """The divisor of a head of transformers that is not its labels, by its class and configuration."""
    inner = base_of(model)
    config, name = getattr(inner, "config", None), type(inner).__name__
    reduction = getattr(config, "ctc_loss_reduction", None)
    if name.endswith("ForCTC") and reduction in ("mean", "sum"):
        return SUM if reduction == "sum" else ROWS
    if name.endswith(("ForTextToSpeech", "ForSpeechToSpeech")):
        return FRAMES
    if name.endswith("ForObjectDetection"):
        return BOXES
    return None


# ---- the divisors --------------------------------------------------------------------------------------------------


def of_labels(trainer: TrainerLike, inputs: Batch) -> Tensor:
    """The labels that are not -100; the rows, if the labels are not class indices."""
    labels = inputs.get("shift_labels") if isinstance(inputs, Mapping) else None
    shifted = labels is None and shifts_labels(trainer)
    if labels is None and isinstance(inputs, Mapping):
        labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() == 0:
        return of_rows(trainer, inputs)
    labels = labels[..., 1:] if shifted and labels.dim() > 1 else labels
    counts = labels != IGNORED
    other = getattr(getattr(trainer.model, "config", None), "semantic_loss_ignore_index", None)
    if other is not None and labels.dim() > 2:  # a segmentation map
        counts = counts & (labels != other)
    return counts.sum().float()


def of_rows(trainer: TrainerLike, inputs: Batch) -> Tensor:
    """The rows."""
    return torch.full((), row_count(inputs), dtype=torch.float32, device=trainer.args.device)


def _every_label(trainer: TrainerLike, inputs: Batch) -> Tensor | None:
    labels = inputs.get("labels")
    return (labels != IGNORED).sum().float() if isinstance(labels, Tensor) else None


def _masked(trainer: TrainerLike, inputs: Batch) -> Tensor | None:
    mask = inputs.get("bool_masked_pos")
    return mask.sum().float() if isinstance(mask, Tensor) else None


def _attended(trainer: TrainerLike, inputs: Batch) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask.sum().float() if isinstance(mask, Tensor) and not mask.is_floating_point() else None


def items(inputs: Batch) -> int | None:
    """The boxes of labels that are a list with a dict for each row."""
    labels = inputs.get("labels")
    if not isinstance(labels, list | tuple) or not all(isinstance(row, Mapping) for row in labels):
        return None
    tensors = [row.get("class_labels", next(iter(row.values()), None)) for row in labels]
    return sum(len(x) for x in tensors) if all(isinstance(x, Tensor) and x.dim() for x in tensors) else None


def _boxes(trainer: TrainerLike, inputs: Batch) -> Tensor | None:
    number = items(inputs)
    return None if number is None else torch.full((), float(number), device=trainer.args.device)


def _one(trainer: TrainerLike, inputs: Batch) -> Tensor:
    return torch.ones((), device=trainer.args.device)


def _or_rows(count: Callable[[TrainerLike, Batch], Tensor | None]) -> Callable[[TrainerLike, Batch], Tensor]:
    def of(trainer: TrainerLike, inputs: Batch) -> Tensor:
        found = count(trainer, inputs) if isinstance(inputs, Mapping) else None
        return of_rows(trainer, inputs) if found is None else found

    return of


LABELS = Count("the labels that are not -100", of_labels)
ROWS = Count("the rows", of_rows)
FRAMES = Count("all labels that are not -100", _or_rows(_every_label))
BOXES = Count("the boxes", _or_rows(_boxes))
PATCHES = Count("the masked patches", _or_rows(_masked))
TOKENS = Count("the tokens that are attended to", _or_rows(_attended))
SUM = Count("nothing", _one, sums=True)
CANDIDATES = (LABELS, ROWS, FRAMES, BOXES, PATCHES, TOKENS, SUM)


def row_count(inputs: Nested) -> int:
    """The rows of a batch of any kind.

    The labels say it, if they are a tensor; else the first tensor with a dimension, those inside of other values last.
    In a batch without tensors the first list does. A batch that is a list of dicts without tensors has a row for each.

    Raises:
        TypeError: If the batch has neither.
    """
    if isinstance(inputs, Mapping):
        for x in (inputs.get("labels"), *inputs.values()):
            if isinstance(x, Tensor) and x.dim():
                return x.shape[0]
    if has_tensor(inputs):
        return tfn.tree.row_count(inputs)
    found = _first_list(inputs)
    if found is None:
        raise TypeError(
            f"`trainer.compute_loss(...)` returned a mean, but the rows of this batch, a {type(inputs).__name__}, can't"
            " be counted: it has neither a tensor nor a list. Return what the loss is divided by too: write"
            " `return tfn.Mean.of(values, weights)` in compute_loss."
        )
    return len(found)


def has_tensor(inputs: Nested) -> bool:
    """Whether there is a tensor in a batch of any kind, also in an object with ``to()``."""
    if isinstance(inputs, Mapping) and any(isinstance(x, Tensor) for x in inputs.values()):
        return True
    _recognized(inputs)
    leaves: list[object] = optree.tree_leaves(inputs)  # type: ignore[arg-type]
    return any(isinstance(leaf, Tensor) for leaf in leaves)


def _recognized(inputs: Nested) -> None:
    with contextlib.suppress(TypeError):
        tfn.tree.row_count(inputs)  # optree learns the batch's own types by it


def _first_list(inputs: object) -> Sequence[object] | None:
    if isinstance(inputs, list) or (isinstance(inputs, tuple) and not any(_is_nested(x) for x in inputs)):
        return inputs
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else ()
    return next((found for part in parts if (found := _first_list(part)) is not None), None)


def _is_nested(x: object) -> bool:
    return isinstance(x, Mapping | list | tuple)


# ---- labels that are shifted ---------------------------------------------------------------------------------------


def shifts_labels(trainer: TrainerLike) -> bool:
    """Whether the model's own loss compares position t with label t + 1, so that the first label is not counted.

    A known ``loss_type`` of the model decides. Without one, `find_shift` has tried it out.
    """
    shift = _known_shift(trainer.model)
    return bool(trainer._trainfn.shifts) if shift is None else shift


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
    try:
        one, two = (_tried(trainer.model, {**inputs, "labels": x}) for x in (labels, without))
    except Exception:  # rows of one tensor for several graphs, for example, can't be cut like this
        trainer._trainfn.shifts = False
        return
    trainer._trainfn.shifts = bool(torch.allclose(one, two, rtol=1e-5))


def may_shift(trainer: TrainerLike, inputs: Batch) -> bool:
    """Whether it is still unknown if the model shifts labels, and such a batch could show it."""
    if trainer._trainfn.shifts is not None or _known_shift(trainer.model) is not None:
        return False
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if not isinstance(labels, Tensor) or labels.dim() < 2 or labels.is_floating_point():
        return False
    inner = base_of(trainer.model)
    return "labels" in inspect.signature(inner.forward).parameters and hasattr(inner, "config")


def _tried(model: nn.Module, inputs: Batch) -> Tensor:
    """The head's loss in eval mode, which does not change running statistics."""
    with eval_mode(model), torch.no_grad(), tfn.keyed(tfn.random.key(0)):
        outputs = model(**inputs)
    return outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
