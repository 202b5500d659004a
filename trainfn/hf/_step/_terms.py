"""Losses that one number does not divide: sums, and sums of several means over different counts.

A head for questions adds a mean over the starts in the window to one over the ends. One for pretraining adds a mean
over tokens to one over rows. Their exact value for an update needs the counts of the whole update.
The loop puts these into each micro-batch, under the name `UPDATE`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

import trainfn as tfn
from trainfn.hf._names import overridden
from trainfn.hf._step._counting import IGNORED, base_of, items, row_count, rule
from trainfn.hf._types import Batch, Outputs, TrainerLike, Values

UPDATE = "trainfn: counts of the update"


class Terms(NamedTuple):
    """The terms of a loss, each of which is a total divided by a count.

    Attributes:
        counts: ``(model, inputs) -> float32[terms]``; 0 for a term that nothing divides.
        totals: ``(model, inputs, outputs, loss) -> float32[terms]``, not divided.
    """

    counts: Callable[[nn.Module, Batch], Tensor]
    totals: Callable[[nn.Module, Batch, Outputs, Tensor], Tensor]


def terms(trainer: TrainerLike, inputs: Batch) -> Terms | None:
    """The terms of this trainer's loss, or None if one count divides it."""
    if not isinstance(inputs, Mapping):
        return None
    if rule(trainer).sums:
        return _SUM
    if not is_of_head(trainer):
        return None
    name, kind = type(base_of(trainer.model)).__name__, getattr(base_of(trainer.model), "loss_type", None)
    for applies, found in (
        (name.endswith("ForQuestionAnswering") and {"start_positions", "end_positions"} <= inputs.keys(), _ANSWERS),
        (name.endswith("ForPreTraining") and "labels" in inputs and _sentences(inputs) is not None, _SENTENCES),
        (kind == "ForObjectDetection" and items(inputs) is not None, _DETECTION),
    ):
        if applies:
            return found
    return None


def is_of_head(trainer: TrainerLike) -> bool:
    """Whether the loss is the head's own."""
    return (
        not overridden(trainer, "compute_loss") and trainer.compute_loss_func is None and trainer.label_smoother is None
    )


def means(trainer: TrainerLike, inputs: Batch, outputs: Outputs, loss: Tensor) -> tfn.Mean | None:
    """The terms of a batch's loss as undivided means, each of shape ``[terms]``; None if one count divides the loss."""
    found = terms(trainer, inputs)
    if found is None or not _shows(found, outputs):
        return None
    return tfn.Mean(found.totals(trainer.model, inputs, outputs, loss), found.counts(trainer.model, inputs))


def of_update(trainer: TrainerLike, inputs: Batch, outputs: Outputs, loss: Tensor, update: Tensor) -> tfn.Mean:
    """This micro-batch's part of the loss of an update, whose counts are ``update``, ``float32[rows, 1 + terms]``."""
    found = terms(trainer, inputs)
    assert found is not None
    counts, weight = update[0, 1:], (1 / update[:, 0]).sum()
    if not _shows(found, outputs):  # outputs without names, of `return_dict=False`
        return tfn.Mean(loss.float() * weight, weight)
    totals = found.totals(trainer.model, inputs, outputs, loss)
    return tfn.Mean((totals / torch.where(counts > 0, counts, 1.0)).sum(), weight)


def with_update(trainer: TrainerLike, window: list[Batch]) -> list[Batch]:
    """The micro-batches of an update with its counts, if their loss needs them; every rank calls this.

    On several ranks a sum of a few numbers on the host, once an update, for losses of several terms only.
    """
    world, model = trainer._trainfn.world, trainer.model
    found = [terms(trainer, micro) for micro in window]
    if not any(found):
        return window
    sizes = [0 if tfn.data.is_empty(micro) else row_count(micro) for micro in window]
    counts = sum(
        torch.cat([torch.tensor([float(size)]), each.counts(model, micro).detach().cpu().float()])
        for each, size, micro in zip(found, sizes, window, strict=True)
        if each is not None and size
    )
    if world.plan is not None:
        mine = counts.tolist() if isinstance(counts, Tensor) else [0.0] * (1 + _width(found))
        counts = torch.tensor(world.sums(mine))
    assert isinstance(counts, Tensor)
    counts = counts.to(trainer.args.device)
    return [
        {**micro, UPDATE: counts.expand(size, -1)} if size else {**micro, UPDATE: counts.new_zeros(0, len(counts))}
        for size, micro in zip(sizes, window, strict=True)
    ]


def _width(found: list[Terms | None]) -> int:
    return 2 if any(each is not None and each is not _SUM for each in found) else 1


def _shows(found: Terms, outputs: Outputs) -> bool:
    """Whether the outputs have what the terms are computed of."""
    needs = {id(_ANSWERS): ("start_logits",), id(_SENTENCES): ("prediction_logits",), id(_DETECTION): ("loss_dict",)}
    names = needs.get(id(found), ())
    return not names or (isinstance(outputs, Mapping) and all(name in outputs for name in names))


# ---- the kinds -----------------------------------------------------------------------------------------------------


def _cross_entropy(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    return nn.functional.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=ignored, reduction="sum"
    )


def _window(inputs: Batch) -> int:
    return next(inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None).shape[1]


def _answer_counts(model: nn.Module, inputs: Batch) -> Tensor:
    window = _window(inputs)
    places = [inputs[name].clamp(0, window) for name in ("start_positions", "end_positions")]
    return torch.stack([(place != window).sum().float() for place in places])


def _answer_totals(model: nn.Module, inputs: Batch, outputs: Outputs, loss: Tensor) -> Tensor:
    totals: list[Tensor] = []
    for name in ("start", "end"):
        logits = outputs[f"{name}_logits"]
        window = logits.shape[1]
        totals.append(_cross_entropy(logits, inputs[f"{name}_positions"].clamp(0, window), window) / 2)
    return torch.stack(totals)


def _sentences(inputs: Batch) -> str | None:
    names = ("next_sentence_label", "sentence_order_label")
    return next((name for name in names if inputs.get(name) is not None), None)


def _sentence_counts(model: nn.Module, inputs: Batch) -> Tensor:
    labels = inputs["labels"], inputs[_sentences(inputs) or ""]
    return torch.stack([(each != IGNORED).sum().float() for each in labels])


def _sentence_totals(model: nn.Module, inputs: Batch, outputs: Outputs, loss: Tensor) -> Tensor:
    logits = outputs["seq_relationship_logits"] if "seq_relationship_logits" in outputs else outputs["sop_logits"]
    words = _cross_entropy(outputs["prediction_logits"], inputs["labels"], IGNORED)
    return torch.stack([words, _cross_entropy(logits, inputs[_sentences(inputs) or ""], IGNORED)])


def _detection_counts(model: nn.Module, inputs: Batch) -> Tensor:
    """The weights of the classes, in which a query without a box has a small one; and the boxes."""
    config: Values = getattr(base_of(model), "config", None).__dict__
    boxes, rows = float(items(inputs) or 0), row_count(inputs)
    queries = config["num_queries"] if "num_queries" in config else config["num_detection_tokens"]
    weights = boxes + (rows * queries - boxes) * config["eos_coefficient"]
    return torch.tensor([weights, boxes], device=next(model.parameters()).device)


def _detection_totals(model: nn.Module, inputs: Batch, outputs: Outputs, loss: Tensor) -> Tensor:
    counts = _detection_counts(model, inputs)
    parts: dict[str, Tensor] = outputs["loss_dict"]
    classes = torch.stack([value for name, value in parts.items() if name.startswith("loss_ce")]).sum()
    return torch.stack([classes, loss - classes]) * counts  # all other terms are divided by the boxes


def _sum_counts(model: nn.Module, inputs: Batch) -> Tensor:
    return torch.zeros(1, device=next(model.parameters()).device)


_ANSWERS = Terms(_answer_counts, _answer_totals)
_SENTENCES = Terms(_sentence_counts, _sentence_totals)
_DETECTION = Terms(_detection_counts, _detection_totals)
_SUM = Terms(_sum_counts, lambda model, inputs, outputs, loss: loss.float()[None])
