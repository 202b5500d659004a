"""Steps for subclasses that override `training_step`: the gradients come from their own backward passes.

Such a step runs Python between its parts, so it is not compiled; the update is the core's all the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

import trainfn as tfn
from trainfn.hf._loss import counted, exact_loss


def overrides(trainer: Any) -> list[str]:
    """The overridden methods that keep a step from being one function."""
    return [] if getattr(type(trainer).training_step, "not_overridden", False) else ["training_step"]


def training_step(trainer: Any, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
    """One micro-batch: its loss, and the gradients of it, a mean, added to ``.grad``.

    An override's own backward pass beside this one, or what it does to ``.grad``, is in the same units then.
    """
    mean, _ = exact_loss(trainer, model, inputs)
    weight = mean.weight.detach()
    (mean.total / torch.where(weight > 0, weight, 1.0)).backward()
    trainer._manual_mean = tfn.Mean(mean.total.detach(), weight)
    return trainer._manual_mean.value


def step(trainer: Any, made: tfn.TrainStep) -> tfn.TrainStep:
    """The same step, with its gradients from `Trainer.training_step`."""

    def gradients(state: tfn.TrainState, batch: Any, first_row: Tensor | int = 0, /) -> tfn.Gradients:
        key = tfn.random.fold_in(state.key, state.step)
        model, trainer._manual_mean = trainer.model, None
        count = counted(trainer, batch)
        model.zero_grad(set_to_none=True)
        try:
            with torch.enable_grad(), tfn.keyed(key, rows=tfn.tree.row_count(batch), first_row=first_row):
                loss = trainer.training_step(model, dict(batch), count)
            mean = trainer._manual_mean
            if mean is None:  # a backward pass of its own, of a mean over what is counted
                mean = tfn.Mean(loss.detach().float() * count, count)
            held = dict(model.named_parameters(remove_duplicate=True))
            grads = {
                name: torch.zeros_like(p) if held[name].grad is None else held[name].grad.detach() * mean.weight
                for name, p in state.params.items()
            }
        finally:
            model.zero_grad(set_to_none=True)
        return tfn.Gradients(mean, grads, {}, state.buffers)

    return dataclasses.replace(made, gradients=gradients)
