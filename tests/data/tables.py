"""The tables that the laws of samplers run over."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from trainfn import data


class SamplerCase(NamedTuple):
    """``make(n, batch_size, seed, last)``; ``covers``: an epoch has every row once, but for what "drop" drops."""

    make: Callable[..., data.Sampler]
    covers: bool = True
    seeded: bool = True
    infinite: bool = False
    lasts: tuple[str, ...] = ("drop", "pad", "short")
    rows_of: Callable[[data.Sampler, np.ndarray], np.ndarray] = lambda sampler, indices: indices


def lengths(n):
    """The length of each row, from 1 to 9."""
    return np.arange(n) * 7 % 9 + 1


def _mixture(n, batch_size, seed, last):
    half = max(n // 2, batch_size)
    sources = [data.shuffled(half, batch_size, seed=seed + 1), data.sequential(n + batch_size, batch_size)]
    return data.mixture(sources, [0.25, 0.75], seed=seed)


def _members(sampler, packs):
    return np.concatenate([sampler.packing.members(pack) for pack in packs]) if len(packs) else packs


SAMPLERS = {
    "sequential": SamplerCase(lambda n, b, seed, last: data.sequential(n, b, last=last), seeded=False),
    "shuffled": SamplerCase(lambda n, b, seed, last: data.shuffled(n, b, seed=seed, last=last)),
    "weighted": SamplerCase(lambda n, b, seed, last: data.weighted(lengths(n), b, seed=seed, last=last), covers=False),
    "grouped_by_length": SamplerCase(
        lambda n, b, seed, last: data.grouped_by_length(lengths(n), b, seed=seed, mega_batch=2, last=last)
    ),
    "bucketed": SamplerCase(
        lambda n, b, seed, last: data.bucketed(lengths(n), b, boundaries=(4, 9), seed=seed, last=last),
        lasts=("pad", "short"),
    ),
    "mixture": SamplerCase(_mixture, covers=False, infinite=True, lasts=("drop",)),
    "packed": SamplerCase(
        lambda n, b, seed, last: data.packed(lengths(n), 9, b, seed=seed, last=last), rows_of=_members
    ),
}
TABLE = [(name, last) for name, case in SAMPLERS.items() for last in case.lasts]


N = 23
X = torch.arange(3 * N, dtype=torch.float32).reshape(N, 3) / 8
Y = torch.arange(N) * 2


class Mapped(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        if not 0 <= i < N:
            raise IndexError(i)
        return {"x": X[i], "y": int(Y[i])}


class Noisy(Mapped):
    """Draws from all global generators, as augmentations do."""

    def __getitem__(self, i):
        noise = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])
        return {"x": X[i] + noise, "y": i}


class Failing(Mapped):
    def __getitem__(self, i):
        if i == 13:
            raise KeyError("no such file")
        return super().__getitem__(i)


class Iterated(IterableDataset):
    def __iter__(self):
        return iter([{"x": X[i], "y": int(Y[i])} for i in range(N)])


class NoisyIterated(IterableDataset):
    def __iter__(self):
        for i in range(N):
            yield {"x": X[i] + np.random.rand(), "y": i}


def jitter(row):
    """A transform that draws from all global generators."""
    return {**row, "x": torch.as_tensor(row["x"]) + random.random() + np.random.rand() + torch.rand(3)}


def rows_as_dicts():
    return [{"x": X[i].tolist(), "y": int(Y[i])} for i in range(N)]


def _huggingface(form=None):
    import datasets

    return datasets.Dataset.from_list(rows_as_dicts()).with_format(form)


DATASETS = {
    "columns of tensors": lambda: {"x": X, "y": Y},
    "columns of arrays": lambda: {"x": X.numpy(), "y": Y.numpy()},
    "list of dicts": rows_as_dicts,
    "list of dicts of tensors": lambda: [{"x": X[i], "y": Y[i]} for i in range(N)],
    "torch": Mapped,
    "torch subset": lambda: torch.utils.data.Subset(Mapped(), range(N)),
    "hf": _huggingface,
    "hf numpy": lambda: _huggingface("numpy"),
    "hf torch": lambda: _huggingface("torch"),
    "concat": lambda: data.concat(rows_as_dicts()[:9], {"x": X[9:].numpy(), "y": Y[9:]}),
}


def same(a, b):
    """Whether two batches are equal to the bit, dtypes included."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b
