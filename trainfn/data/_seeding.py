"""Randomness of a row, for code that draws from the global generators of Python, NumPy and torch."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Generator

import numpy as np
import torch
from torch import Tensor

from trainfn._keyed import keyed
from trainfn.data import _bits
from trainfn.data._bits import Ints, Words
from trainfn.errors import RandomnessError
from trainfn.process import generators_kept


def row_keys(seed: int, visits: Ints, rows: Ints) -> Words:
    """A key for each row's visit, ``uint64[rows, 2]``: of (seed, visit, row) and of nothing else."""
    return _bits.fold_in(_bits.fold_in(_bits.key(seed), visits), rows)


def as_tensor(key: Words) -> Tensor:
    """The same key for `trainfn.random`."""
    return torch.from_numpy(key.view(np.int64).copy())


@contextlib.contextmanager
def borrowed() -> Generator[Callable[[Words], None]]:
    """Lend the three global generators, to be seeded as often as wanted, and give them back as they were.

    torch's generator of the CPU only: `torch.manual_seed` would reseed those of all devices.
    """
    with generators_kept():
        yield _seed


def _seed(key: Words) -> None:
    word = int(key[0])
    random.seed(word)
    np.random.seed([word & 0xFFFFFFFF, word >> 32])
    torch.default_generator.manual_seed(word >> 1)


@contextlib.contextmanager
def collating(seed: int, step: int, rows: int, first_row: int) -> Generator[None]:
    """Randomness for a collator, which draws for all rows of a batch at once, such as one that masks tokens.

    A draw from torch is keyed by the row's place in the global batch. A tensor that begins with the batch's rows is
    filled for each row as it would be in a batch of one rank. (So transformers' masking collator masks the
    same tokens on any number of ranks, if rows are padded to one length.) Draws from NumPy or Python are one sequence
    and can't be separated by row. They are keyed by the step and the rank's first row.
    """
    # No visit is -1, so no row has this key.
    key = _bits.fold_in(_bits.fold_in(_bits.key(seed), -1), step)
    try:
        with borrowed() as seed_all:
            seed_all(_bits.fold_in(key, first_row))
            with keyed(as_tensor(key), rows=rows, first_row=first_row):
                yield
    except RandomnessError as error:
        error.add_note(
            "Raised in a collate function, which runs like a step: for the same batch it draws the same numbers. A"
            " collator's own seed is not needed; leave out its `seed=` or `generator=`."
        )
        raise
