"""Where a run's batches come from, and on which device they go."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import optree
import torch
from torch import Tensor

from trainfn._batch_types import recognize
from trainfn._types import Batch


@runtime_checkable
class Startable(Protocol):
    """Batches that can start after any step, such as a `trainfn.data` loader."""

    def start(self, step: int, /) -> Iterator[Batch]:
        """The batches of step ``step`` and all later ones."""
        ...


Batches = Iterable[Batch] | Callable[[int], Batch] | Startable


def source(batches: Batches, n: int, until: int | None) -> tuple[Iterator[Batch], int | None]:
    """The batches after ``n`` completed steps, and the step at which the run ends, where that is known."""
    if isinstance(batches, Startable):
        until = getattr(batches, "steps", None) if until is None else until
        if until is None:
            raise ValueError(
                "steps(step, state, batches): these batches never end. Write `until=1000`, or give a loader"
                " with `epochs=1`."
            )
        return batches.start(n), until
    if isinstance(batches, Iterable):
        known = n + len(batches) if isinstance(batches, Sized) else None
        return iter(batches), until if until is not None else known
    if not callable(batches):
        raise TypeError(
            f"steps(step, state, batches): batches is a {type(batches).__name__}. Give an iterable of batches, a"
            " `tfn.data.loader`, or a function of the step number: `lambda n: batch`."
        )
    if until is None:
        raise ValueError("steps(step, state, batches): batches is a function, which never ends. Write `until=1000`.")
    return (batches(i) for i in range(n, until)), until


def start_anywhere(batches: Batches) -> bool:
    """Whether batches can start after any step, as a resumed run needs."""
    return isinstance(batches, Startable) or (callable(batches) and not isinstance(batches, Iterable))


def placed(batch: Batch, device: torch.device) -> Batch:
    """A batch on the device; NumPy arrays become tensors."""
    if isinstance(batch, Iterator):  # a stream of micro-batches
        return _Stream(cast("Iterator[Any]", batch), device)
    recognize(batch)
    return optree.tree_map(lambda x: _tensor(x, device), batch, is_leaf=_moves_itself)


class _Stream:
    """Micro-batches, each of which goes to the device when its turn comes."""

    def __init__(self, stream: Iterator[Any], device: torch.device) -> None:
        self._stream, self._device = stream, device

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return placed(next(self._stream), self._device)

    def __length_hint__(self) -> int:
        return operator.length_hint(self._stream, 1)


def _tensor(x: Any, device: torch.device) -> Any:
    if isinstance(x, np.ndarray | np.number):
        x = torch.as_tensor(x)
    if _moves_itself(x):
        return x.to(device)
    return x.to(device, non_blocking=True) if isinstance(x, Tensor) and x.device != device else x


def _moves_itself(x: Any) -> bool:
    """Whether ``x`` is a NamedTuple such as `PackedSequence`, of which a part stays on the host."""
    return isinstance(x, tuple) and hasattr(x, "to")
