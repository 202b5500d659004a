"""The batches that each rank gets from a loader: one of trainfn, of torch, of Accelerate, or any other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from accelerate.data_loader import DataLoaderStateMixin
from torch.utils.data import DistributedSampler

import trainfn as tfn
from trainfn.hf._parallel._world import World


def dealt(world: World, loader: Any) -> Any:
    """Return a loader's part for this rank.

    ======================================= ==========================================================================
    of the Trainer, or one of `trainfn`      this rank's rows of every batch
    with a ``DistributedSampler``            all batches: the loader is this rank's part already
    prepared by Accelerate                   all batches, too
    with a sampler, of the Trainer           all batches, too: see `Parted`
    any other                                every N-th batch, as in Accelerate; the other batches are read and dropped
    ======================================= ==========================================================================
    """
    if world.plan is None:
        return loader
    if isinstance(loader, tfn.data.Loader | tfn.data.Stream):
        return loader.shard(world.part, world.parts, even=False) if loader.world == 1 else loader
    if isinstance(loader, Dealt):
        return loader
    return Own(world, loader) if is_divided(loader) else Dealt(world, loader)


def is_divided(loader: Any) -> bool:
    """Whether a loader has this rank's part only."""
    if isinstance(loader, DataLoaderStateMixin | Dealt):
        return True
    samplers = [getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    samplers += [getattr(sampler, "sampler", None) for sampler in samplers]
    return any(isinstance(sampler, DistributedSampler) or hasattr(sampler, "num_replicas") for sampler in samplers)


class Dealt:
    """Every N-th batch of a loader that all ranks read; other attributes are the loader's.

    Args:
        world: The processes of the run.
        loader: An iterable with the same batches on every rank.
        split: Whether ``loader.batch_size`` is the number of rows on all ranks together.
    """

    def __init__(self, world: World, loader: Iterable[Any], *, split: bool = False) -> None:
        self.world, self.loader = world, loader
        self.shares = 1 if split else world.parts  # ranks that each have ``loader.batch_size`` rows of a micro-batch

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while group := list(itertools.islice(batches, self.world.parts)):
            part = self.world.part
            yield group[part] if part < len(group) else tfn.data.no_rows(group[0])

    def __len__(self) -> int:
        return -(-len(self.loader) // self.world.parts)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class Own(Dealt):
    """A loader of this rank's part, followed by batches without rows until no rank has a batch any more."""

    def __iter__(self) -> Generator[Any]:
        last, batches = None, iter(self.loader)
        while True:
            batch = next(batches, None)
            # An all-reduce of 4 bytes, once a batch: a rank that stopped earlier would leave the others waiting.
            if not self.world.ranks.any([batch is not None])[0]:
                return
            last = batch if batch is not None else last
            if last is None:
                raise ValueError(
                    f"Trainer: this rank's loader, a {type(self.loader).__name__}, has no batch at all, but that of"
                    " another rank has. Pass the same full dataset on all ranks, `Trainer(train_dataset=...)`: the"
                    " Trainer divides it."
                )
            yield last if batch is not None else tfn.data.no_rows(last)

    def __len__(self) -> int:
        # One gather of a number on the host: ranks may have different numbers of batches, and all step equally often.
        return max(self.world.ranks.gathered(len(self.loader)))  # type: ignore[arg-type]


class Parted(Dealt):
    """A loader of this rank's part that has as many batches on every rank."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]


class Share:
    """A collator of all rows of a batch, of which this rank gets its share; shares differ by at most one row.

    Every rank reads all rows, so that what rows and samplers draw stays the same on all.

    Args:
        world: The processes of the run.
        collate: A function from rows to a batch.
    """

    def __init__(self, world: World, collate: Callable[[list[Any]], Any]) -> None:
        self.part, self.parts, self.collate = world.part, world.parts, collate

    def __call__(self, rows: list[Any]) -> Any:
        """Return a batch of this rank's rows."""
        first, end = (len(rows) * part // self.parts for part in (self.part, self.part + 1))
        return self.collate(rows[first:end]) if end > first else tfn.data.no_rows(self.collate(rows[:1]))
