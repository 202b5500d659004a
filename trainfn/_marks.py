"""Marks on the operations of a step that is being captured; without a capture they cost a look at a flag."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Generator
from typing import Any

from torch.fx import traceback

_SPLIT: contextvars.ContextVar[bool] = contextvars.ContextVar("split", default=False)


@contextlib.contextmanager
def split_batch() -> Generator[None]:
    """Mark this block as one in which a loss sees a part of a batch's rows."""
    token = _SPLIT.set(True)
    try:
        yield
    finally:
        _SPLIT.reset(token)


def is_split_batch() -> bool:
    """Whether a loss sees a part of a batch's rows: micro-batches, or those of one rank of several."""
    return _SPLIT.get()


class Again(BaseException):
    """A step has to start again from a state that is prepared for it. Whoever calls the step does that."""

    def prepared(self, state: Any) -> Any:
        """The state to start from."""
        return state


@contextlib.contextmanager
def backward_pass() -> Generator[None]:
    """Mark the operations of this block as those of the backward pass."""
    if not traceback.has_preserved_node_meta():
        yield
        return
    traceback.current_meta["autograd_backward"] = True
    try:
        yield
    finally:
        traceback.current_meta.pop("autograd_backward", None)
