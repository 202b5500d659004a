"""The model's own memory while its state is laid out over ranks.

A parameter that every rank has whole is in the model, too: the same memory, always the newest. One that is split has no
values there, only NaN that takes no memory, but for the time of a `whole` block and after the run.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

import trainfn as tfn
from trainfn.hf._callbacks._events import EVENTS

logger = logging.get_logger(__name__)


def see(trainer: Any) -> None:
    """Let the model have the memory of the state, as far as this rank has it."""
    if trainer._world.plan is None:
        return
    trainer._released = False
    for tensor, leaf in _pairs(trainer):
        if tfn.tree.is_split(leaf):
            tensor.data = torch.full((), torch.nan, dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)
            trainer._released = True
        else:
            tensor.data = tfn.tree.local(leaf).detach()


def fill(trainer: Any) -> None:
    """Bring together what is split; every rank calls this. It takes the memory of the whole parameters."""
    if trainer._released:
        for tensor, leaf in _pairs(trainer):
            if tfn.tree.is_split(leaf):
                tensor.data = tfn.tree.full(leaf.detach())
        trainer._released = False


@contextlib.contextmanager
def whole(trainer: Any) -> Generator[None]:
    """The model with all values in this block; every rank enters it."""
    if not trainer._released:
        yield
        return
    fill(trainer)
    try:
        yield
    finally:
        see(trainer)


@contextlib.contextmanager
def plain(trainer: Any) -> Generator[None]:
    """The state as it would be in one process, which the model shares; afterwards laid out again."""
    plan = trainer._world.plan
    if plan is None:
        yield
        return
    trainer.train_state = tfn.gather(trainer.train_state)
    see(trainer)
    yield
    trainer.train_state = tfn.shard(trainer.train_state, plan)
    see(trainer)


def check_whole(trainer: Any) -> None:
    """Raise if the last run ended in an error and left the model without values.

    Raises:
        RuntimeError: Saying where they are.
    """
    if trainer._released:
        raise RuntimeError(
            "Trainer: the run before ended in an error while the parameters were split over ranks, so the model has no"
            " values. Make a new Trainer of a new model, and go on from the last checkpoint:"
            " `trainer.train(resume_from_checkpoint=True)`."
        )


def warn_of_callbacks(trainer: Any) -> None:
    """Say once which callbacks take a model that has no values when they are called."""
    if not trainer._released or trainer._world.ranks.rank > 0:
        return
    for callback in trainer.callback_handler.callbacks:
        kind = type(callback)
        if kind.__module__.partition(".")[0] in ("transformers", "trainfn"):  # they want the model's config
            continue
        takes = [name for name in EVENTS if "model" in _arguments(getattr(kind, name, None))]
        if takes:
            logger.warning_once(
                f"Trainer(callbacks=[{kind.__name__}]): {', '.join(takes)} take{'s' * (len(takes) == 1)} `model`, whose"
                " parameters are split over ranks, and NaN there. To see them, write `with trainer.whole_model() as"
                " model: ...`, on all ranks."
            )


def _arguments(method: Any) -> list[str]:
    return [] if method is None else list(inspect.signature(method).parameters)


def _pairs(trainer: Any) -> list[tuple[Tensor, Any]]:
    model, state = trainer.model, trainer.train_state
    held = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    return [(held[name], leaf) for name, leaf in {**state.params, **state.buffers}.items()]
