"""Loaders that are not trainfn's: their order and augmentation follow from (seed, epoch), and they may have a state."""

from __future__ import annotations

import functools
import random
from collections.abc import Generator, Iterator
from typing import cast

import datasets
import numpy as np
import torch
from accelerate.data_loader import DataLoaderStateMixin
from torch.utils.data import DataLoader, IterableDataset

import trainfn as tfn
from trainfn.hf._parallel._sharding import Dealt
from trainfn.hf._types import Batch, Loader, Nested


class Foreign(Iterator[Batch]):
    """One epoch of a loader that is not trainfn's.

    Such a loader draws from the global generators. For each batch they have its states, and afterwards their own.

    Args:
        loader: The loader.
        seed: The seed of the run.
        epoch: The number of the epoch.
        skip: The number of batches that updates have seen already.
        state: The loader's state after these; without one they are read, and dropped.
    """

    def __init__(self, loader: Loader, seed: int, epoch: int, skip: int, state: Nested = None) -> None:
        self._owner = owner_of_state(loader)
        self._batches = self._read(loader, (seed, epoch), skip, state)

    def __next__(self) -> Batch:
        return next(self._batches)

    def state(self) -> Nested:
        """The loader's state after the newest batch, or that of its stream; None if neither has one."""
        return None if self._owner is None else self._owner.state_dict()

    def close(self) -> None:
        """End the epoch."""
        self._batches.close()

    def _read(self, loader: Loader, key: tuple[int, int], skip: int, state: Nested) -> Generator[Batch]:
        for shuffles in shufflers(loader):
            if callable(set_epoch := getattr(shuffles, "set_epoch", None)):
                set_epoch(key[1])
        if isinstance(own := getattr(loader, "generator", None), torch.Generator):
            own.manual_seed(_number(*key))
        lent = _Generators(*key)
        if state is not None:
            self._owner.load_state_dict(state)
        with lent:
            batches = iter(loader)
        for n in range(0 if state is None else skip, 2**62):
            if n and self._owner is not None:
                lent.seed(*key, n)  # so that the draws for a batch don't follow from those before it
            with lent:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            if state is not None and n == skip and isinstance(self._owner, datasets.IterableDataset):
                self._owner.load_state_dict(cast("Nested", None))  # it would begin a later run there, too
            if n >= skip:  # skipped batches are read too, so that the generators advance as in the first run
                yield batch


def owner_of_state(loader: Loader) -> Nested:
    """The loader, or the stream in it, if that has the methods ``state_dict`` and ``load_state_dict``.

    A stream's state is that of the batches so far only in a plain loader of torch without workers. Others read ahead.
    """
    loader = loader.loader if isinstance(loader, Dealt) else loader
    if isinstance(loader, DataLoaderStateMixin) and not getattr(loader, "use_stateful_dataloader", False):
        return None
    if tfn.data.has_state(loader):
        return loader
    stream = getattr(loader, "dataset", None)
    plain = type(loader) is DataLoader and loader.num_workers == 0 and isinstance(stream, IterableDataset)
    return stream if plain and tfn.data.has_state(stream) else None


def shufflers(loader: Loader) -> list[object]:
    """A loader and what it draws its order from, such as a `DistributedSampler` in a batch sampler."""
    found: list[object] = [loader, getattr(loader, "dataset", None)]
    batches = getattr(loader, "batch_sampler", None)
    for owner in (loader, batches, getattr(batches, "batch_sampler", None)):
        found += [getattr(owner, "sampler", None), getattr(owner, "batch_sampler", None)]
    return [each for n, each in enumerate(found) if all(each is not other for other in found[:n])]


def _number(seed: int, *numbers: int) -> int:
    key = functools.reduce(tfn.random.fold_in, numbers, tfn.random.key(seed))
    return int(key[0]) % 2**32


class _Generators:
    """A loader's states of the global generators, in place for the time of a block."""

    def __init__(self, seed: int, epoch: int) -> None:
        self.seed(seed, epoch)

    def seed(self, *key: int) -> None:
        """Begin at the states that follow from a seed, an epoch, and the number of a batch."""
        number = _number(*key)
        with tfn.process.generators_kept():
            torch.default_generator.manual_seed(number)  # `torch.manual_seed` reseeds those of devices too
            np.random.seed(number)
            random.seed(number)
            self._mine = tfn.process.Generators.now()

    def __enter__(self) -> None:
        self._theirs = tfn.process.Generators.now()
        self._mine.restore()

    def __exit__(self, *_: object) -> None:
        self._mine = tfn.process.Generators.now()
        self._theirs.restore()
