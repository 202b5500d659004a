"""Batches made ahead of time, in other processes: torch's ``DataLoader`` asked for batch numbers.

A worker of a loader gets a number and returns that batch, so what it makes can't depend on which worker it is. Batches
come out in order, epochs included: there is no end of an epoch at which workers would stop or start. The workers of a
stream have a source each, and their batches come in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from trainfn._types import Batch
from trainfn.data._sampler import natural


def checked(call: str, num_workers: int, prefetch: int | None) -> int:
    """Batches that a worker is ahead."""
    natural(call, "num_workers", num_workers, least=0)
    if prefetch is not None and num_workers == 0:
        raise ValueError(f"`{call}`: nothing is made ahead of time without workers. Say num_workers=1, or leave out"
                         " prefetch.")  # fmt: skip
    return 2 if prefetch is None else natural(call, "prefetch", prefetch)


class _Numbered(Dataset[Batch]):
    def __init__(self, make: Callable[[int], Batch]) -> None:
        self.make = make

    def __getitem__(self, n: int) -> Batch:
        return self.make(n)


class _Streamed(IterableDataset[Any]):
    def __init__(self, make: Callable[[int], Iterator[Any]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        return self.make(info.id)


def each(make: Callable[[int], Batch], numbers: Iterable[int], num_workers: int, prefetch: int) -> Iterator[Batch]:
    """``make(n)`` for each number, in order."""
    if num_workers == 0:
        return (make(n) for n in numbers)  # no `map`: a StopIteration in `make` would end it in silence
    return _loaded(_Numbered(make), num_workers, prefetch, sampler=numbers)


def streamed(make: Callable[[int], Iterator[Any]], num_workers: int, prefetch: int) -> Iterator[Any]:
    """The values that ``make(worker)`` yields in each worker, in turn; a worker that has ended is left out."""
    return _loaded(_Streamed(make), num_workers, prefetch)


def _loaded(dataset: Any, num_workers: int, prefetch: int, **options: Any) -> Iterator[Batch]:
    batches = iter(
        DataLoader(
            dataset,
            batch_size=None,
            collate_fn=_same,
            num_workers=num_workers,
            prefetch_factor=prefetch,
            pin_memory=torch.cuda.is_available(),  # so that the copy to the GPU overlaps with the step
            generator=torch.Generator(),  # without one, it draws a seed from the global generator
            **options,
        )
    )
    try:
        yield from batches
    finally:  # also when the generator is left early: its workers end now, not at the next garbage collection
        batches._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]


def _same(batch: Batch) -> Batch:
    return batch
