"""Python functions of torch that draw further down, or run others that do.

Torch hands such a function to a mode as a whole and runs it with the mode turned off. A twin of it does the same work
with the mode turned on, so that the functions it calls are rerouted one by one.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _twin(function: Any) -> Callable[..., Any]:
    """The same code, in which the tests for modes at its top are answered with no."""
    no = {name: lambda *_: False for name in function.__globals__ if name.startswith("has_torch_function")}
    twin = types.FunctionType(
        function.__code__, {**function.__globals__, **no}, function.__name__, function.__defaults__
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _composite(function: Any) -> Callable[..., Any]:
    twin = _twin(function)

    def run(d: TorchFunctionMode, *args: Any, **kwargs: Any) -> Any:
        with d:
            return twin(*args, **kwargs)

    return run


def _attention(function: Any) -> Callable[..., Any]:
    """Attention of tensors in any order: its weights have the rows in dimension 0."""
    inner = _composite(function)

    def run(d: Any, *args: Any, **kwargs: Any) -> Any:
        by_rows = getattr(d, "by_rows", None)
        return inner(d, *args, **kwargs) if by_rows is None else by_rows(lambda: inner(d, *args, **kwargs))

    return run


COMPOSITES: dict[Any, Callable[..., Any]] = {
    function: _composite(function)
    for function in (
        F.triplet_margin_with_distance_loss,
        torch.svd_lowrank,
        torch.pca_lowrank,
        torch.lobpcg,
        # These run a checkpointed module's forward pass again, and the backward pass of a user's function.
        torch.autograd.grad,
        torch.autograd.backward,
        Tensor.backward,
    )
} | {F.multi_head_attention_forward: _attention(F.multi_head_attention_forward)}
