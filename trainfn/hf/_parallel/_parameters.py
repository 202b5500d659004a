"""The model's own memory while its state is sharded over ranks.

The model shares the memory of each parameter that is full on every rank, so it holds the newest values. A sharded
parameter is NaN in the model, which takes no memory. It is full within a `whole` block and after the run.
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
    """Let the model share the memory of the state; sharded parameters become NaN."""
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
    """Gather the sharded parameters into the model; every rank calls this.

    One all-gather of each parameter's bytes, and the memory of the full model.
    """
    if trainer._released:
        for tensor, leaf in _pairs(trainer):
            if tfn.tree.is_split(leaf):
                tensor.data = tfn.tree.full(leaf.detach())
        trainer._released = False


@contextlib.contextmanager
def whole(trainer: Any) -> Generator[None]:
    """Let the model have full parameters in this block; every rank enters it."""
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
    """Let the trainer have a full state in this block, which the model shares; afterwards it is sharded again."""
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
        RuntimeError: With the line that resumes from the last checkpoint.
    """
    if trainer._released:
        raise RuntimeError(
            "Trainer: the run before ended in an error while the parameters were split over ranks, so the model has no"
            " values. Make a new Trainer of a new model, and resume from the last checkpoint:"
            " `trainer.train(resume_from_checkpoint=True)`."
        )


def warn_of_callbacks(trainer: Any) -> None:
    """Warn once of callbacks that take a model, which has no values when they are called."""
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
