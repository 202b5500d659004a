"""Contexts after which a model, an optimizer and the global generators are exactly as before."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

import trainfn as tfn
from trainfn.hf._parallel._parameters import whole
from trainfn.hf._types import Optimizer, TrainerLike


@contextmanager
def as_found(trainer: TrainerLike) -> Generator[None]:
    """Set evaluation mode for a block; modes, dtypes and generators are restored after it, also after an error."""
    args = trainer.args
    dtype = torch.float16 if args.fp16_full_eval else torch.bfloat16 if args.bf16_full_eval else None
    with ExitStack() as stack:
        stack.enter_context(whole(trainer))
        stack.enter_context(tfn.process.generators_kept(args.device))  # a loader draws a seed, a collator masks tokens
        stack.enter_context(eval_mode(trainer.model))
        stack.enter_context(_averaged_weights(trainer.optimizer))
        if dtype is not None and not trainer.is_in_train:  # while training, autocast is what casts
            stack.enter_context(_cast(trainer.model, dtype))
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Generator[None]:
    """Call `model.eval()` for a block, and restore all modes after it."""
    with same_modes(model):
        model.eval()
        yield


@contextmanager
def same_modes(model: nn.Module) -> Generator[None]:
    """Restore after a block the mode of each submodule, which need not be its parent's."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _averaged_weights(optimizer: Optimizer | None) -> Generator[None]:
    """Swap in the weights to evaluate of a schedule-free optimizer, which holds two sets of weights."""
    groups = getattr(optimizer, "param_groups", [])
    swap: Callable[[], None] | None = getattr(optimizer, "eval", None)
    back: Callable[[], None] | None = getattr(optimizer, "train", None)
    if swap is None or back is None or not any(group.get("train_mode") for group in groups):
        yield
        return
    try:
        swap()
        yield
    finally:
        back()


@contextmanager
def _cast(model: nn.Module, dtype: torch.dtype) -> Generator[None]:
    """Cast the model to 16 bits for a block. The tensors stay the same objects, so ties hold."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    storage = [t.data for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for tensor, data in zip(tensors, storage, strict=True):
            tensor.data = data
