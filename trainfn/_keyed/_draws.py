"""The mode that reroutes torch's random functions, and the bookkeeping of draws.

Draw number ``n`` of a block uses ``fold_in(key, n)``. Where a drawn tensor starts with the batch's rows, row ``r`` of a
micro-batch draws what row ``first_row + r`` of the whole batch would. So dropout, too, is the same for every split of
the rows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trainfn import random
from trainfn._keyed._composites import COMPOSITES
from trainfn._keyed._functions import HANDLERS
from trainfn._keyed._generators import check_unused, restored
from trainfn._keyed._rows import Doubts, rows_first
from trainfn._keyed._vmap import batch_levels, batched

_REROUTED = {**HANDLERS, **COMPOSITES}
# Keys made at once, before the first draw: one takes as many operations as all of them.
_KEYS = 32


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
    with rerouted(Draws(key, rows, first_row)):
        yield


@contextlib.contextmanager
def rerouted(draws: Draws) -> Generator[None]:
    """See `keyed`. Torch's generators are given back as they were found; meanwhile one counts the draws."""
    with restored() as found:
        torch.default_generator.manual_seed(0)
        with draws:
            yield
        check_unused(found)


class Draws(TorchFunctionMode):
    """The draws of one block of code, as a function of a key.

    Attributes:
        drew: Whether there were any.
    """

    def __init__(
        self,
        key: Tensor,
        rows: int,
        first_row: Tensor | int,
        doubts: Doubts | None = None,
        module: nn.Module | None = None,
    ) -> None:
        super().__init__()
        # Only a part of a batch has the number of its first row as a tensor: a batch that is not split needs no rows.
        self._doubts, self._module = doubts if isinstance(first_row, Tensor) else None, module
        self.key, self.rows, self.first_row = key, rows, first_row
        self.drew = False
        self._keys = random.fold_in(key, torch.arange(1, _KEYS + 1, dtype=torch.int64, device=key.device))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the random functions; run the others as they are."""
        handler = _REROUTED.get(func)
        if handler is not None:
            return handler(self, *args, **(kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)

    def count(self) -> int:
        """Number this draw.

        The count is the seed of torch's own generator. A checkpointed module rewinds that generator before it computes
        its forward pass again, and so draws the same numbers again.
        """
        self.drew = True
        number = torch.default_generator.initial_seed() + 1
        torch.default_generator.manual_seed(number)
        return number

    def draw(self, sample: Callable[..., Tensor], shape: Sequence[int], **kwargs: Any) -> Tensor:
        """The next draw: ``sample(key, shape, first=, ...)``, a function of `trainfn.random`."""
        levels = batch_levels(self._keys, self.first_row)
        return batched(lambda sizes: self._plain(sample, (*sizes, *shape), len(sizes), kwargs), levels)

    def _plain(
        self, sample: Callable[..., Tensor], shape: tuple[int, ...], ahead: int, kwargs: dict[str, Any]
    ) -> Tensor:
        number = self.count()
        key = self._keys[number - 1] if number <= _KEYS else random.fold_in(self.key, number)
        at = random.ROWS_AT.get()
        if at is None:
            return sample(random.fold_in(key, 0), shape, **kwargs)
        at += ahead if at else 0
        if self._doubts is not None and at == 0 and self.rows > 0:
            self._doubts.see(self._module, shape, self.rows)
        if self.rows > 0 and len(shape) > at and shape[at] % self.rows == 0:
            first = self.first_row * (math.prod(shape) // self.rows)
            if at == 0:
                return sample(key, shape, first=first, **kwargs)
            return sample(key, rows_first(shape, at), first=first, **kwargs).movedim(0, at)
        return sample(random.fold_in(key, self.first_row), shape, **kwargs)

    def by_rows(self, draw: Callable[[], Tensor]) -> Tensor:
        """A draw that has its rows in dimension 0 for certain."""
        doubts, self._doubts, token = self._doubts, None, random.ROWS_AT.set(0)
        try:
            return draw()
        finally:
            self._doubts = doubts
            random.ROWS_AT.reset(token)

    def uniform(self, shape: Sequence[int], dtype: torch.dtype | None, device: Any, **bounds: float) -> Tensor:
        """Uniform numbers."""
        return _moved(self.draw(random.uniform, shape, dtype=dtype or torch.get_default_dtype(), **bounds), device)

    def keep(self, p: float | Tensor, shape: Sequence[int], device: Any) -> Tensor:
        """A mask, true with probability ``p``."""
        return _moved(self.draw(random.uniform, shape), device) < p

    def normal(self, shape: Sequence[int], dtype: torch.dtype | None, device: Any) -> Tensor:
        """Standard normal numbers."""
        return _moved(self.draw(random.normal, shape, dtype=dtype or torch.get_default_dtype()), device)

    def exponential(self, shape: Sequence[int], dtype: torch.dtype, device: Any) -> Tensor:
        """Standard exponential numbers."""
        return _moved(self.draw(random.exponential, shape, dtype=dtype), device)

    def integers(self, low: int, high: int, shape: Sequence[int], dtype: torch.dtype, device: Any) -> Tensor:
        """Integers in ``[low, high)``."""
        drawn = self.draw(lambda key, shape, first=0: random.randint(key, low, high, shape, first=first), shape)
        return drawn.to(dtype=dtype, device=device)

    def permutation(self, n: int) -> Tensor:
        """A random order; one that has no rows."""
        rows, self.rows = self.rows, 0
        try:
            return self.draw(_permutations, (n,))
        finally:
            self.rows = rows


def _permutations(key: Tensor, shape: tuple[int, ...], first: int = 0) -> Tensor:
    return torch.argsort(random.bits(key, shape, first=first), stable=True)


def _moved(x: Tensor, device: Any) -> Tensor:
    return x if device is None or x.device == torch.device(device) else x.to(device)
