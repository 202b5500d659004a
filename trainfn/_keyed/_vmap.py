"""Draws under `torch.vmap`: one for each sample, one for all, or an error, as its ``randomness`` says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainfn.errors import RandomnessError

Levels = list[tuple[int, int]]

functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def batch_levels(*given: Any) -> Levels:
    """The active vmaps whose samples draw each their own: number and size, outermost first.

    There is none if the key itself differs by sample: then the draws do as well.
    """
    if functorch.peek_interpreter_stack() is None:
        return []
    if any(isinstance(x, Tensor) and functorch.is_functorch_wrapped_tensor(x) for x in given):
        return []
    levels: Levels = []
    for interpreter in functorch.get_interpreter_stack() or []:
        if interpreter.key() == functorch.TransformType.Vmap:
            vmap = functorch.CVmapInterpreterPtr(interpreter)
            randomness = vmap.randomness()
            if randomness == functorch.RandomnessType.Error:
                raise RandomnessError(
                    'a random function under `torch.vmap(..., randomness="error")`, its default: it may mean one draw'
                    ' for each sample or one for all. Write `randomness="different"` or `randomness="same"`.'
                )
            if randomness == functorch.RandomnessType.Different:
                levels.append((interpreter.level(), vmap.batchSize()))
    return levels


def batched(draw: Callable[[tuple[int, ...]], Tensor], levels: Levels) -> Tensor:
    """A draw with leading dimensions of these sizes, of which each sample sees its own part."""
    if not levels:
        return draw(())
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():  # a plain tensor, beneath all transforms
        out = draw(tuple(size for _, size in levels))
    for level, _ in levels:
        out = functorch._add_batch_dim(out, 0, level)
    return out
