"""Loaders on several ranks, also those of others: the batches that each rank gets."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from accelerate.data_loader import DataLoaderStateMixin
from torch.utils.data import DistributedSampler

import trainfn as tfn
from trainfn.hf._parallel._world import World


def dealt(world: World, loader: Any) -> Any:
    """Return a loader's part for this rank.

    ======================================= ==========================================================================
    of the Trainer, or one of `trainfn`      its rows of every batch
    with a ``DistributedSampler``            all batches: the loader is this rank's part already
    prepared by Accelerate                   the same
    any other                                every N-th batch, as in Accelerate; the others are read, too
    ======================================= ==========================================================================
    """
    if world.plan is None:
        return loader
    if isinstance(loader, tfn.data.Loader | tfn.data.Stream):
        return loader.shard(world.part, world.parts, even=False) if loader.world == 1 else loader
    return Own(world, loader) if is_divided(loader) else Dealt(world, loader)


def is_divided(loader: Any) -> bool:
    """Whether a loader has this rank's part only."""
    if isinstance(loader, DataLoaderStateMixin | Own | Dealt):
        return True
    samplers = [getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    samplers += [getattr(sampler, "sampler", None) for sampler in samplers]
    return any(isinstance(sampler, DistributedSampler) or hasattr(sampler, "num_replicas") for sampler in samplers)


class Dealt:
    """Every N-th batch of a loader that all ranks read; other attributes are the loader's.

    Args:
        world: The processes of the run.
        loader: Anything that gives the same batches on every rank.
    """

    def __init__(self, world: World, loader: Iterable[Any]) -> None:
        self.world, self.loader = world, loader

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
    """A loader of this rank's part, which gives batches of no rows until no rank has a batch."""

    def __iter__(self) -> Generator[Any]:
        last, batches = None, iter(self.loader)
        while True:
            batch = next(batches, None)
            # 4 bytes a rank, once a batch: a rank that stopped earlier would leave the others waiting.
            if not self.world.ranks.any([batch is not None])[0]:
                return
            last = batch if batch is not None else last
            if last is None:
                raise ValueError(
                    f"Trainer: this rank's loader, a {type(self.loader).__name__}, has no batch at all, and another's"
                    " has. Give all ranks the same full dataset, `Trainer(train_dataset=...)`, and it is divided."
                )
            yield last if batch is not None else tfn.data.no_rows(last)

    def __len__(self) -> int:
        return max(self.world.ranks.gathered(len(self.loader)))  # type: ignore[arg-type]
