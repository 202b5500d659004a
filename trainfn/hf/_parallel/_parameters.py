"""The model's own memory while its state is sharded over ranks.

The model shares the memory of each parameter that is full on every rank, so it holds the newest values. A sharded
parameter is NaN in the model, which takes no memory. It is full within a `whole` block and after the run.
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
from trainfn.hf._run._record import newest_state, trained_of
from trainfn.hf._types import TrainerLike

logger = logging.get_logger(__name__)


def see(trainer: TrainerLike) -> None:
    """Let the model share the memory of the state; sharded parameters become NaN."""
    if trainer._trainfn.world.plan is None:
        return
    trainer._trainfn.released = False
    for tensor, leaf in _pairs(trainer):
        if tfn.tree.is_split(leaf):
            tensor.data = torch.full((), torch.nan, dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)
            trainer._trainfn.released = True
        else:
            tensor.data = tfn.tree.local(leaf).detach()


def follow_buffers(trainer: TrainerLike) -> None:
    """Let the model share the memory of buffers that have another shape than before, such as a list that grows."""
    buffers = newest_state(trainer).buffers
    shapes = [buffer.shape for buffer in buffers.values()]
    if shapes == trainer._trainfn.shapes:  # as after most steps: a look at the model's tree takes longer
        return
    trainer._trainfn.shapes = shapes
    for name, tensor in trained_of(trainer).named_buffers(remove_duplicate=False):
        if name in buffers and tensor.shape != buffers[name].shape:
            tensor.data = buffers[name]


def fill(trainer: TrainerLike) -> None:
    """Gather the sharded parameters into the model; every rank calls this.

    One all-gather of each parameter's bytes, and the memory of the full model.
    """
    if trainer._trainfn.released:
        for tensor, leaf in _pairs(trainer):
            if tfn.tree.is_split(leaf):
                tensor.data = tfn.tree.full(leaf.detach())
        trainer._trainfn.released = False


@contextlib.contextmanager
def whole(trainer: TrainerLike) -> Generator[None]:
    """Gather the parameters into the model in this block; every rank enters it."""
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
    """Gather the state in this block, and let the model share its memory; afterwards shard it again.

    Every rank enters it. It gathers all bytes of the state, the optimizer's included, and scatters them at the end.
    The code for checkpoints of transformers only knows plain tensors.
    """
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
        RuntimeError: If it did.
    """
    if trainer._trainfn.released:
        raise RuntimeError(
            "Trainer: the last run ended in an error while the parameters were sharded over ranks, so the model has no"
            " values. Make a new Trainer of a new model, and resume from the last checkpoint:"
            " `trainer.train(resume_from_checkpoint=True)`."
        )


def warn_of_callbacks(trainer: TrainerLike) -> None:
    """Warn once of callbacks that take the model, because its sharded parameters are NaN when they are called."""
    if not trainer._trainfn.released or trainer._trainfn.world.ranks.rank > 0:
        return
    for callback in trainer.callback_handler.callbacks:
        kind = type(callback)
        if kind.__module__.partition(".")[0] in ("transformers", "trainfn"):  # these only read the model's config
            continue
        takes = [name for name in EVENTS if "model" in _arguments(getattr(kind, name, None))]
        if takes:
            logger.warning_once(
                f"Trainer(callbacks=[{kind.__name__}]): {', '.join(takes)} take{'s' * (len(takes) == 1)} `model`, but"
                " its parameters are sharded over ranks, and NaN in the model. To read them, write `with"
                " trainer.whole_model() as model: ...`, on all ranks."
            )


def _arguments(method: Callable[..., object] | None) -> list[str]:
    return [] if method is None else list(inspect.signature(method).parameters)


def _pairs(trainer: TrainerLike) -> list[tuple[Tensor, Tensor]]:
    model, state = trained_of(trainer), newest_state(trainer)
    held = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    return [(held[name], leaf) for name, leaf in {**state.params, **state.buffers}.items()]
