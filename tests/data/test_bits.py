"""The bits are `trainfn.random`'s, and the permutation is one, and a good one."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import trainfn as tfn
from trainfn.data import _bits

SEEDS = st.integers(-(2**63), 2**64 - 1)


@given(SEEDS, st.integers(-(2**63), 2**63 - 1))
def test_keys_and_draws_are_those_of_the_device(seed, number):
    key = tfn.random.key(seed)
    ours = _bits.key(seed)
    assert ours.view(np.int64).tolist() == key.tolist()
    assert _bits.fold_in(ours, number).view(np.int64).tolist() == tfn.random.fold_in(key, number).tolist()
    draws = _bits.bits(ours, np.arange(5))
    assert draws.view(np.int64).tolist() == tfn.random.bits(key, (5,)).tolist()


def test_many_keys_at_once():
    numbers = np.array([0, 1, -1, 2**62])
    many = _bits.fold_in(_bits.fold_in(_bits.key(3), numbers), numbers[::-1].copy())
    key = tfn.random.key(3)
    for i in range(4):
        one = tfn.random.fold_in(tfn.random.fold_in(key, int(numbers[i])), int(numbers[3 - i]))
        assert many[i].view(np.int64).tolist() == one.tolist()
        assert torch.equal(tfn.data._seeding.as_tensor(many[i]), one)


def test_golden_values():
    """They may never change: a run goes on where it was on any machine, with any version."""
    assert _bits.permute(_bits.key(0), 10**12, np.arange(3)).tolist() == GOLDEN_LARGE
    assert _bits.permute(_bits.key(0), 10, np.arange(10)).tolist() == GOLDEN_SMALL


GOLDEN_LARGE = [634424036558, 855168295385, 981435122399]
GOLDEN_SMALL = [7, 2, 4, 8, 9, 5, 6, 0, 3, 1]


@pytest.mark.parametrize("n", [*range(1, 70), 100, 1023, 1024, 1025, 4096, 5000])
def test_a_permutation_is_a_bijection(n):
    for seed in range(3):
        out = _bits.permute(_bits.key(seed), n, np.arange(n))
        assert out.dtype == np.int64
        assert (np.sort(out) == np.arange(n)).all()


@given(SEEDS, st.integers(1, 2**62), st.lists(st.integers(0, 2**62 - 1), min_size=1, max_size=20, unique=True))
def test_any_size(seed, n, positions):
    positions = np.unique(np.array(positions) % n)
    out = _bits.permute(_bits.key(seed), n, positions)
    assert ((0 <= out) & (out < n)).all()
    assert len(set(out.tolist())) == len(positions)
    one = _bits.permute(_bits.key(seed), n, positions[-1:])
    assert one[0] == out[-1]  # whatever else is asked for


def excess(counts, expected):
    """How many standard deviations chi-square is above its mean."""
    counts = np.asarray(counts, float)
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_all_permutations_are_equally_likely(n):
    trials = 6000
    seen = Counter(tuple(_bits.permute(_bits.fold_in(_bits.key(n), i), n, np.arange(n))) for i in range(trials))
    counts = [seen[p] for p in itertools.permutations(range(n))]
    assert excess(counts, trials / math.factorial(n)) < 4


@pytest.mark.parametrize(("n", "trials"), [(17, 3000), (64, 2000), (1500, 300)])
def test_every_row_is_as_likely_in_every_place(n, trials):
    """By place, by pair of neighbours, by number of fixed points; large ones in 15 cells each way."""
    cells = min(n, 15)
    places, steps, fixed = np.zeros((cells, cells)), np.zeros(cells), 0
    for i in range(trials):
        out = _bits.permute(_bits.fold_in(_bits.key(n), i), n, np.arange(n))
        whole = n // cells * cells  # cells of equal size
        inside = (np.arange(n) < whole) & (out < whole)
        np.add.at(places, (np.arange(n)[inside] * cells // whole, out[inside] * cells // whole), 1)
        differences = (np.diff(out) % n)[: n - 1] - 1  # uniform on 0 .. n - 2
        np.add.at(steps, differences * cells // (n - 1), 1)
        fixed += int((out == np.arange(n)).sum())
    # A permutation's counts vary a little less than independent ones.
    assert abs(excess(places, places.mean())) < 5 + cells * 0.8
    widths = np.bincount(np.arange(n - 1) * cells // (n - 1), minlength=cells)
    assert excess(steps, steps.sum() * widths / widths.sum()) < 5
    assert abs(fixed / trials - 1) < 5 / math.sqrt(trials)


def test_epochs_are_unrelated():
    n = 2000
    epochs = [_bits.permute(_bits.fold_in(_bits.key(0), e), n, np.arange(n)) for e in range(8)]
    for a, b in itertools.combinations(epochs, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(n)


def test_a_seed_has_64_bits():
    with pytest.raises(ValueError, match=r"a seed has 64 bits. Use seed="):
        tfn.data.shuffled(10, 2, seed=2**64)
