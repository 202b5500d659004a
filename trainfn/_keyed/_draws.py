"""The mode that reroutes torch's random functions, and the bookkeeping of draws.

Draw number ``n`` of a block uses ``fold_in(key, n)``. Where a drawn tensor starts with the batch's rows, row ``r`` of
a micro-batch draws what row ``first_row + r`` of the whole batch would: so dropout, too, is the same for every split
of the rows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.overrides import TorchFunctionMode

from trainfn import random
from trainfn._keyed._functions import COMPOSITES, DERIVATIVES, HANDLERS
from trainfn.errors import RandomnessError


@contextlib.contextmanager
def keyed(key: Tensor, *, rows: int = 0, first_row: Tensor | int = 0) -> Generator[None]:
    """Draw from ``key`` whatever torch's random functions draw in this block, dropout included.

    Args:
        key: ``int64[2]``.
        rows: Rows in this micro-batch; 0 if its tensors are not rows of a larger batch.
        first_row: Index of the first of them in the whole batch, a number or ``int64[]``.

    Raises:
        RandomnessError: If the block uses a function whose draws can't be rerouted.

    >>> import torch, trainfn as tfn
    >>> with keyed(tfn.random.key(0)):
    ...     a = torch.rand(3)
    >>> with keyed(tfn.random.key(0)):
    ...     b = torch.rand(3)
    >>> torch.equal(a, b)
    True
    """
    with _borrowed_generator(), Draws(key, rows, first_row):
        yield


@contextlib.contextmanager
def _borrowed_generator() -> Generator[None]:
    """Give torch's generator back as it was found; meanwhile its seed counts the draws (see `Draws.count`)."""
    if torch.compiler.is_compiling():
        yield
        return
    generator = torch.default_generator
    saved = generator.get_state()
    generator.manual_seed(0)
    try:
        yield
        if not torch.equal(generator.get_state(), torch.Generator().manual_seed(generator.initial_seed()).get_state()):
            raise RandomnessError(
                "something in this step drew from torch's global generator by a way that can't be rerouted to"
                " state.key, such as `torch.ops.aten.rand` or another library's kernel. Draw it before the step and"
                " pass it in the batch."
            )
    finally:
        generator.set_state(saved)


class Draws(TorchFunctionMode):
    """The draws of one block of code, as a function of a key."""

    def __init__(self, key: Tensor, rows: int, first_row: Tensor | int) -> None:
        super().__init__()
        self.key, self.rows, self.first_row = key, rows, first_row
        self.traced = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the random functions; run the others as they are."""
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(self, *args, **(kwargs or {}))
        composite = COMPOSITES.get(func)
        if composite is not None and not (func in DERIVATIVES and torch.compiler.is_compiling()):
            with self:
                return composite(*args, **(kwargs or {}))
        if func is tag_activation_checkpoint:  # what torch.compile makes of torch.utils.checkpoint
            return self._checkpoint(*args, **(kwargs or {}))
        if func is Tensor.unflatten:  # a Python method that calls super(), which torch.compile can't trace under a mode
            func = torch.unflatten
        return func(*args, **(kwargs or {}))

    def _checkpoint(self, body: Any, *args: Any, **kwargs: Any) -> Any:
        """Trace a checkpointed body with draws of its own: torch turns a mode off for what the mode calls.

        The body may not change this object, so the count goes in and comes out by value.
        """
        key, rows, first_row, start = self.key, self.rows, self.first_row, self.traced

        def run(*args: Any, **kwargs: Any) -> Any:
            draws = Draws(key, rows, first_row)
            draws.traced = start
            with draws:
                return body(*args, **kwargs), draws.traced

        out, self.traced = tag_activation_checkpoint(run, *args, **kwargs)
        return out

    def count(self) -> int:
        """Number this draw.

        An eager step counts in the seed of torch's own generator: a checkpointed module rewinds that generator
        before it computes its forward again in the backward pass, and so draws the same numbers again. A compiled
        step recomputes the very same operations and needs no such help.
        """
        if torch.compiler.is_compiling():
            self.traced += 1
            return self.traced
        number = torch.default_generator.initial_seed() + 1
        torch.default_generator.manual_seed(number)
        return number

    def next(self, shape: Sequence[int]) -> tuple[Tensor, tuple[int, ...], Tensor | int]:
        """Key, shape and first counter of the next draw: what the functions of `trainfn.random` take."""
        shape = tuple(shape)
        key = random.fold_in(self.key, self.count())
        if self.rows > 0 and shape and shape[0] % self.rows == 0:
            return key, shape, self.first_row * (math.prod(shape) // self.rows)
        return random.fold_in(key, self.first_row), shape, 0

    def uniform(self, shape: Sequence[int], dtype: torch.dtype | None, device: Any, **bounds: float) -> Tensor:
        """Uniform numbers for the next draw."""
        key, shape, first = self.next(shape)
        out = random.uniform(key, shape, dtype=dtype or torch.get_default_dtype(), first=first, **bounds)
        return _moved(out, device)

    def keep(self, p: float | Tensor, shape: Sequence[int], device: Any) -> Tensor:
        """A mask, true with probability ``p``, for the next draw."""
        key, shape, first = self.next(shape)
        return _moved(random.uniform(key, shape, first=first), device) < p

    def normal(self, shape: Sequence[int], dtype: torch.dtype | None, device: Any) -> Tensor:
        """Standard normal numbers for the next draw."""
        key, shape, first = self.next(shape)
        return _moved(random.normal(key, shape, dtype=dtype or torch.get_default_dtype(), first=first), device)

    def exponential(self, shape: Sequence[int], dtype: torch.dtype, device: Any) -> Tensor:
        """Standard exponential numbers for the next draw."""
        key, shape, first = self.next(shape)
        return _moved(random.exponential(key, shape, dtype=dtype, first=first), device)


def _moved(x: Tensor, device: Any) -> Tensor:
    return x if device is None or x.device == torch.device(device) else x.to(device)
