"""The loss and the metrics of `SFTTrainer`, and the separation of the sequences of a pack."""

from __future__ import annotations

import inspect
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

import trainfn as tfn
from trainfn.hf._sft._record import SFTLike
from trainfn.hf._step._counting import base_of
from trainfn.hf._step._loss import autocast
from trainfn.hf._step._modes import eval_mode
from trainfn.hf._types import Batch, Datasets, Outputs

IGNORED = -100
CHUNK = 1024  # tokens whose logits are cast to float32 at once


# --- packs ------------------------------------------------------------------------------------------------------------


def separate(trainer: SFTLike, dataset: Datasets | str | None) -> None:
    """Find out how the model separates sequences, if a dataset is packed and it is not known yet."""
    args, record = trainer.args, trainer._trainfn_sft
    parts = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
    packed = [part for part in parts if "seq_lengths" in (getattr(part, "column_names", None) or [])]
    wanted = (args.packing or args.packs_eval) and args.packing_strategy != "wrapped"
    if record.separation is None and (packed or wanted or args.padding_free):
        record.separation = separation(trainer)


def separation(trainer: SFTLike) -> str:
    """Return how this model separates sequences: by ``"positions"`` that begin anew, or by a ``"mask"``.

    The model is run on a pack in each way, because its code and its attention kernel decide which of them it honours.

    Raises:
        ValueError: If it honours neither.
    """
    model, ways = trainer.model, ["positions"]
    window = getattr(model.config, "sliding_window", None)
    if window is None or trainer.args.max_length is None or trainer.args.max_length <= window:
        ways.append("mask")  # the mask replaces the model's own, so a sliding window would be lost
    with eval_mode(model):
        for way in ways:
            if _separates(trainer, way):
                return way
    raise ValueError(
        f"`SFTConfig(packing=True)` (or `padding_free=True`) can't work with {type(model).__name__}: one sequence of a"
        " pack changes the model's logits of the next. Write `packing=False, padding_free=False`; or, if sequences may"
        " see each other, `packing_strategy='wrapped'`."
    )


@torch.no_grad()
def _separates(trainer: SFTLike, way: str) -> bool:
    """Whether a sequence's logits are the same after two different sequences, and alone."""
    model, device = trainer.model, trainer.args.device
    words = cast("nn.Embedding", cast("PreTrainedModel", model).get_input_embeddings()).num_embeddings
    one = (torch.arange(8, device=device) % words)[None]
    other = torch.cat([(one[:, :4] + 3) % words, one[:, 4:]], 1)
    segments = torch.tensor([[1] * 4 + [2] * 4], device=device)
    positions = torch.arange(4, device=device).repeat(2)[None]
    given = {"position_ids": positions, "segment_ids": segments}
    try:
        with autocast(trainer.args, device), tfn.keyed(tfn.random.key(0)):
            first, second = (
                model(**model_inputs(model, {"input_ids": ids, **given}, way)).logits[:, 4:].float()
                for ids in (one, other)
            )
            alone = model(**model_inputs(model, {"input_ids": one[:, 4:]}, way)).logits.float()
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False  # the model does not accept these inputs
    scale = float(alone.abs().max())
    exact = torch.allclose(first, second, rtol=0, atol=1e-6 * scale)
    return exact and torch.allclose(first, alone, rtol=0, atol=(3e-2 if _is_half(trainer) else 1e-4) * scale)


def _is_half(trainer: SFTLike) -> bool:
    return bool(trainer.args.bf16) or next(trainer.model.parameters()).dtype != torch.float32


def model_inputs(model: nn.Module, inputs: Batch, way: str | None) -> Batch:
    """Return the inputs of the model, in which positions or a mask stand for ``segment_ids``."""
    called = {name: value for name, value in inputs.items() if name not in ("segment_ids", "seq_lengths")}
    if way == "mask" and "segment_ids" in inputs:
        called["attention_mask"] = _mask(inputs["segment_ids"], model)
    # With a cache, models of transformers do not look for sequences in positions that begin anew.
    return called | ({"use_cache": False} if _takes(model, "use_cache") else {})


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(base_of(model).forward).parameters


def _mask(segments: Tensor, model: nn.Module) -> Tensor:
    """Return the summand of the attention scores, ``[rows, 1, length, length]``."""
    dtype, length = next(model.parameters()).dtype, segments.shape[1]
    dtype = dtype if dtype.is_floating_point else torch.float32
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    allowed = (segments[:, :, None] == segments[:, None, :]) & causal
    return torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


# --- loss -------------------------------------------------------------------------------------------------------------


def loss(trainer: SFTLike, outputs: Outputs, labels: Tensor, num_items_in_batch: Tensor | None) -> Tensor:
    """Return the mean loss of the learnt tokens by ``loss_type``, plus the load-balancing loss."""
    shifted, logits = _shifted(labels), logits_of(trainer, outputs, labels)
    found = dft(logits, shifted) if trainer.args.loss_type == "dft" else tfn.losses.cross_entropy(logits, shifted)
    count = found.weight if num_items_in_batch is None else num_items_in_batch
    value = found.total / count.clamp(min=1)
    auxiliary = getattr(outputs, "aux_loss", None)
    return value if auxiliary is None else value + trainer._trainfn_sft.auxiliary * auxiliary


def dft(logits: Tensor, targets: Tensor) -> tfn.Mean:
    """Return the cross entropy of each token times its probability, which is held constant: `Dynamic Fine-Tuning`.

    Source: https://arxiv.org/abs/2508.05629, equation 9.
    """
    kept = targets != IGNORED
    chosen = targets.where(kept, 0)
    log_p = logits.float().log_softmax(-1).gather(-1, chosen[..., None])[..., 0]
    return tfn.Mean.of(-log_p.detach().exp() * log_p, kept)


def logits_of(trainer: SFTLike, outputs: Outputs, labels: Tensor) -> Tensor:
    """Return the logits at the positions of the labels.

    Raises:
        TypeError: If the model returns no logits of that shape.
    """
    logits = outputs.get("logits") if hasattr(outputs, "get") else None
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        shape = list(logits.shape) if isinstance(logits, Tensor) else None
        raise TypeError(
            f"SFTTrainer(model={type(trainer.model).__name__}): a causal language model is needed, which returns logits"
            f" [rows, length, words]; this one returns {'logits ' + str(shape) if shape else 'no logits'}. Load one:"
            " `AutoModelForCausalLM.from_pretrained(name)`."
        )
    return logits[:, -labels.shape[1] :]  # without the virtual tokens of prompt tuning


def _shifted(labels: Tensor) -> Tensor:
    """Shift the labels: position t predicts label t + 1. To cut the logits instead would copy more."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


# --- metrics ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def metrics(trainer: SFTLike, inputs: Batch, outputs: Outputs) -> dict[str, tfn.Mean]:
    """Return ``entropy`` and ``mean_token_accuracy`` over the learnt tokens, and ``num_tokens`` over all tokens."""
    tokens = _token_count(inputs)
    out = {"num_tokens": tfn.Mean(tokens, torch.ones_like(tokens))}
    labels = inputs.get("labels")
    if labels is None or getattr(outputs, "logits", None) is None:
        return out  # a fused head computes the loss without logits
    logits, shifted = logits_of(trainer, outputs, labels).detach(), _shifted(labels)
    out["mean_token_accuracy"] = tfn.metrics.accuracy(logits, shifted)
    out["entropy"] = tfn.Mean.of(_entropy(logits), shifted != IGNORED)
    auxiliary = getattr(outputs, "aux_loss", None)
    if auxiliary is not None:
        weight = out["entropy"].weight
        out["aux_loss"] = tfn.Mean(auxiliary.detach().float() * weight, weight)
    return out


def _token_count(inputs: Batch) -> Tensor:
    if "segment_ids" in inputs:
        return (inputs["segment_ids"] > 0).sum().float()
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum().float()
    return torch.full((), inputs["input_ids"].numel(), dtype=torch.float32, device=inputs["input_ids"].device)


def _entropy(logits: Tensor) -> Tensor:
    """Return the entropy at each position in nats; float32 logits exist for a few positions at a time."""
    parts = []
    for some in logits.flatten(0, 1).split(CHUNK):
        log_p = some.float().log_softmax(-1)
        parts.append(torch.special.entr(log_p.exp()).sum(-1))
    return torch.cat(parts).view(logits.shape[:2])
