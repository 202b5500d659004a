"""Somebody else's loader on several ranks: whose batches are whose."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from accelerate.data_loader import DataLoaderStateMixin
from torch import Tensor
from torch.utils.data import DistributedSampler
from transformers.trainer_pt_utils import find_batch_size

import trainfn as tfn
from trainfn.hf._parallel._world import World


def dealt(world: World, loader: Any) -> Any:
    """A loader's part for this rank.

    ======================================= ==========================================================================
    of the Trainer, or one of `trainfn`      its rows of every batch; all ranks together have the whole one
    with a ``DistributedSampler``            all: it is this rank's part already
    prepared by Accelerate                   the same
    any other                                every N-th batch, as Accelerate deals them out; the others are read, too
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
    """Every N-th batch of a loader that all ranks read; what it has besides is the loader's.

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
            yield group[part] if part < len(group) else no_rows(group[0])

    def __len__(self) -> int:
        return -(-len(self.loader) // self.world.parts)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class Own(Dealt):
    """A loader of this rank's part. It goes on until no rank has a batch, with batches of no rows."""

    def __iter__(self) -> Generator[Any]:
        last, batches = None, iter(self.loader)
        while True:
            batch = next(batches, None)
            if not self.world.ranks.any([batch is not None])[0]:
                return
            last = batch if batch is not None else last
            if last is None:
                raise ValueError(
                    f"Trainer: this rank's loader, a {type(self.loader).__name__}, has no batch at all, and another's"
                    " has. Give all ranks the whole dataset, `Trainer(train_dataset=...)`, and it is divided."
                )
            yield last if batch is not None else no_rows(last)

    def __len__(self) -> int:
        return max(self.world.ranks.gathered(len(self.loader)))  # type: ignore[arg-type]


class NoRows:
    """In place of a batch without tensors, of which nobody knows the rows: another rank has them all."""


def no_rows(batch: Any) -> Any:
    """A batch like this one, of no rows; `NoRows` if it has no tensor to tell."""
    cut = tfn.tree.map(_cut, batch)
    return cut if is_empty(cut) else NoRows()


def _cut(leaf: Any) -> Any:
    if isinstance(leaf, Mapping):  # one that is no dict is a leaf of a tree
        return {name: tfn.tree.map(_cut, value) for name, value in leaf.items()}
    return leaf[:0] if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim else leaf


def is_empty(batch: Any) -> bool:
    """Whether a batch has no rows; one of no rows that are known counts as having some."""
    return isinstance(batch, NoRows) or find_batch_size(batch) == 0
