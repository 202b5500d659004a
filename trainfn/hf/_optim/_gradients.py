"""Gradients that a callback can read and change between the backward pass and the update.

A step is one function, whose gradients go from one part to the next. A callback may have an event there. If the step
runs eagerly in one process, the gradients are then in ``.grad`` of the model's parameters too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from transformers import TrainerCallback
from transformers.utils import logging

import trainfn as tfn
from trainfn.hf._optim._resolve import clip_of
from trainfn.hf._run._record import TrainingRun
from trainfn.hf._step._loss import training_loss
from trainfn.hf._types import TrainerLike

logger = logging.get_logger(__name__)
_EVENTS = ("on_pre_optimizer_step", "on_optimizer_step")


def with_gradients(
    trainer: TrainerLike, run: TrainingRun, step: tfn.TrainStep, compiled: bool, announce: Callable[[], None]
) -> tfn.TrainStep:
    """The same step; where a callback watches, with its mean gradient, clipped, in ``.grad`` before the update.

    What a callback writes there counts.

    Args:
        trainer: The Trainer.
        run: The run.
        step: The step.
        compiled: Whether the step will be compiled. Then it is returned as it is, and so on several ranks.
        announce: Fires the events before the update.
    """
    if compiled or step.plan is not None:
        _warn(trainer, "it is compiled" if compiled else "it runs on several ranks")
        return step
    own = run.optimizer.groups is None  # a transform that clips by itself, if at all
    clip = tfn.optim.identity() if own else clip_of(trainer)
    rule = run.optimizer.transform
    kept = tfn.Transform(clip.init, tfn.optim.identity().update)  # of the state that the step's own clipping has
    unclipped = tfn.train_step(training_loss(trainer), rule if own else tfn.optim.chain(kept, rule)).update

    def update(state: tfn.TrainState, sums: tfn.Gradients) -> tuple[tfn.TrainState, tfn.Metrics]:
        if not _watched(trainer):
            return step.update(state, sums)
        one = torch.ones_like(sums.loss.weight)
        weight = torch.where(sums.loss.weight == 0, one, sums.loss.weight)
        grads = {name: grad for name, grad in sums.grads.items() if grad is not None}
        grads = tfn.tree.div(grads, weight)
        grads = tfn.tree.cast_like(grads, {name: state.params[name] for name in grads})
        before = tfn.tree.global_norm(grads)
        grads, _ = clip.update(grads, clip.init(grads), grads)
        if not run.announced:  # a step that finds a parameter without a gradient for the first time calls twice
            run.gradients = list(held.values())
            for name, parameter in held.items():
                parameter.grad = grads.get(name)
            announce()
        written = {name: held[name].grad for name in sums.grads}
        state, metrics = unclipped(state, sums._replace(grads=written, loss=tfn.Mean(sums.loss.total, one)))
        return state, {**metrics, "loss": sums.loss, "grad_norm": tfn.Mean(before, torch.ones_like(before))}

    held = run.optimizer.parameters()
    return dataclasses.replace(step, update=update)


def clear_gradients(run: TrainingRun) -> None:
    """Clear what `with_gradients` has put into ``.grad``."""
    for parameter in run.gradients:
        parameter.grad = None
    run.gradients = []


def _watched(trainer: TrainerLike) -> str | None:
    """The first event near the update that a callback has a method for."""
    for callback in trainer.callback_handler.callbacks:
        for event in _EVENTS:
            method = getattr(type(callback), event, None)
            if method is not None and method is not getattr(TrainerCallback, event):
                return f"{type(callback).__name__}.{event}"
    return None


def _warn(trainer: TrainerLike, why: str) -> None:
    if (method := _watched(trainer)) is not None:
        logger.warning(
            f"`{method}` finds no gradients in `.grad`, because the step is one function here: {why}. If it reads them,"
            " write `torch_compile=False`, and train in one process."
        )
