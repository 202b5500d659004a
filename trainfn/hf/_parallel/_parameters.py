"""The model's own memory while its state is laid out over ranks.

A parameter that every rank has whole is in the model, too: the same memory, always the newest. One that is split has no
values there, only NaN that takes no memory, but for the time of a `whole` block and after the run.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator

import torch
from torch import Tensor
from transformers.utils import logging

import trainfn as tfn
from trainfn.hf._callbacks._events import EVENTS
from trainfn.hf._run._record import newest_state
from trainfn.hf._types import TrainerLike

logger = logging.get_logger(__name__)


def see(trainer: TrainerLike) -> None:
    """Let the model have the memory of the state, as far as this rank has it."""
    if trainer._trainfn.world.plan is None:
        return
    trainer._trainfn.released = False
    for tensor, leaf in _pairs(trainer):
        if tfn.tree.is_split(leaf):
            tensor.data = torch.full((), torch.nan, dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)
            trainer._trainfn.released = True
        else:
            tensor.data = tfn.tree.local(leaf).detach()


def fill(trainer: TrainerLike) -> None:
    """Bring together what is split; every rank calls this. It takes the memory of the whole parameters."""
    if trainer._trainfn.released:
        for tensor, leaf in _pairs(trainer):
            if tfn.tree.is_split(leaf):
                tensor.data = tfn.tree.full(leaf.detach())
        trainer._trainfn.released = False


@contextlib.contextmanager
def whole(trainer: TrainerLike) -> Generator[None]:
    """The model with all values in this block; every rank enters it."""
    if not trainer._trainfn.released:
        yield
        return
    fill(trainer)
    try:
        yield
    finally:
        see(trainer)


@contextlib.contextmanager
def plain(trainer: TrainerLike) -> Generator[None]:
    """The state as it would be in one process, which the model shares; afterwards laid out again."""
    plan = trainer._trainfn.world.plan
    if plan is None:
        yield
        return
    trainer.train_state = tfn.gather(newest_state(trainer))
    see(trainer)
    yield
    trainer.train_state = tfn.shard(newest_state(trainer), plan)
    see(trainer)


def check_whole(trainer: TrainerLike) -> None:
    """Raise if the last run ended in an error and left the model without values.

    Raises:
        RuntimeError: Saying where they are.
    """
    if trainer._trainfn.released:
        raise RuntimeError(
            "Trainer: the run before ended in an error while the parameters were split over ranks, so the model has no"
            " values. Make a new Trainer of a new model, and go on from the last checkpoint:"
            " `trainer.train(resume_from_checkpoint=True)`."
        )


def warn_of_callbacks(trainer: TrainerLike) -> None:
    """Say once which callbacks take a model that has no values when they are called."""
    if not trainer._trainfn.released or trainer._trainfn.world.ranks.rank > 0:
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


def _arguments(method: Callable[..., object] | None) -> list[str]:
    return [] if method is None else list(inspect.signature(method).parameters)


def _pairs(trainer: TrainerLike) -> list[tuple[Tensor, Tensor]]:
    model, state = trainer.model, newest_state(trainer)
    held = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    return [(held[name], leaf) for name, leaf in {**state.params, **state.buffers}.items()]
