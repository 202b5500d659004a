"""Every sampler is a row of the table SAMPLERS, and every row passes every law."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.tables import SAMPLERS, TABLE, lengths
from trainfn import data
from trainfn.data import _bits
from trainfn.testing import check_sampler

EACH = pytest.mark.parametrize(("name", "last"), TABLE)
EACH_KIND = pytest.mark.parametrize("name", SAMPLERS)
SIZES = st.tuples(st.integers(1, 60), st.integers(1, 7), st.integers(0, 99))


def made(name, last, sizes):
    n, batch_size, seed = sizes
    n = max(n, 4 * batch_size)  # so that no sampler is without a batch
    return SAMPLERS[name].make(n, batch_size, seed, last), n


def epoch_of(sampler, epoch):
    per = sampler.steps_per_epoch
    return [sampler.rows(step) for step in range(epoch * per, (epoch + 1) * per)]


@EACH
@given(SIZES, st.lists(st.integers(0, 10**9), min_size=1, max_size=6))
def test_pure(name, last, sizes, steps):
    """In whatever order steps are asked for, past or future, again or of another copy."""
    sampler, _ = made(name, last, sizes)
    first = [sampler.rows(step) for step in steps]
    again, _ = made(name, last, sizes)
    for step, rows in reversed(list(zip(steps, first, strict=True))):
        for a, b in zip(again.rows(step), rows, strict=True):
            assert a.dtype == b.dtype
            assert a.tolist() == b.tolist()


@EACH
@given(SIZES, st.integers(0, 3))
def test_arithmetic(name, last, sizes, epoch):
    sampler, _ = made(name, last, sizes)
    if SAMPLERS[name].infinite:
        assert sampler.steps_per_epoch is None and sampler.epoch(10**9) == 0
        return
    per, size = sampler.steps_per_epoch, sampler.batch_size
    assert [sampler.epoch(epoch * per + k) for k in (0, per - 1, per)] == [epoch, epoch, epoch + 1]
    for rows in epoch_of(sampler, epoch):
        assert len(rows.indices) == len(rows.weights) == len(rows.visits)
        assert len(rows.indices) == size if last != "short" else 0 < len(rows.indices) <= size
        valid = int(rows.weights.sum())
        assert rows.weights.tolist() == [1.0] * valid + [0.0] * (len(rows.weights) - valid)
        assert valid == size if last == "drop" else 0 < valid
        assert set(rows.indices[valid:].tolist()) <= set(rows.indices[:valid].tolist())  # repeats valid rows


@EACH
@given(SIZES, st.integers(0, 3))
def test_an_epoch_covers_each_row_once(name, last, sizes, epoch):
    case = SAMPLERS[name]
    if not case.covers:
        return
    sampler, n = made(name, last, sizes)
    seen = Counter()
    for rows in epoch_of(sampler, epoch):
        seen.update(case.rows_of(sampler, rows.indices[rows.weights > 0]).tolist())
        assert (rows.visits == epoch).all()
    assert set(seen.values()) == {1} and sampler.num_rows == n
    if last != "drop":
        assert sorted(seen) == list(range(n))
    elif name != "packed":
        assert len(seen) == n // sampler.batch_size * sampler.batch_size


@EACH_KIND
def test_seeds_and_epochs_differ(name):
    case = SAMPLERS[name]
    sampler, other = (case.make(400, 50, seed, case.lasts[0]) for seed in (0, 1))
    far = 10**7
    assert case.seeded != np.array_equal(sampler.indices(far), other.indices(far))
    assert case.seeded != np.array_equal(sampler.indices(0), sampler.indices(8 * (sampler.steps_per_epoch or 1)))
    assert sampler.seed == 0


@EACH_KIND
def test_any_step_costs_the_same(name, monkeypatch):
    """Counted in numbers that are drawn, not in seconds."""
    work = []
    network, bits = _bits._network, _bits.bits
    monkeypatch.setattr(_bits, "_network", lambda *args: work.append(len(args[-1])) or network(*args))
    monkeypatch.setattr(_bits, "bits", lambda *args: work.append(len(args[-1])) or bits(*args))
    case = SAMPLERS[name]
    sampler = case.make(1000, 8, 0, case.lasts[0])
    costs = []
    for step in (0, 10**7, 10**12):
        work.clear()
        sampler.indices(step)
        costs.append(sum(work))
    assert max(costs) <= 2 * min(costs) + 50


def test_a_trillion_rows():
    n = 10**12
    sampler = data.shuffled(n, 1000, seed=0)
    for step in (0, 10**7, 10**15):
        indices = sampler.indices(step)
        assert len(set(indices.tolist())) == 1000
        assert 0 <= indices.min() and indices.max() < n
        assert abs(indices.mean() / n - 0.5) < 0.05


@EACH
def test_description(name, last):
    make = SAMPLERS[name].make
    sampler = make(40, 4, 0, last)
    assert json.loads(json.dumps(sampler.describe())) == make(40, 4, 0, last).describe()
    numpy_ints = make(np.int64(40), np.int64(4), np.int64(0), last)
    assert json.dumps(numpy_ints.describe()) == json.dumps(sampler.describe())
    assert sampler.describe()["kind"] == ("shuffled" if name == "packed" else name)
    for other in (make(41, 4, 0, last), make(40, 5, 0, last)):
        assert other.describe() != sampler.describe()
    if SAMPLERS[name].seeded:
        assert make(40, 4, 1, last).describe() != sampler.describe()


def test_arguments_of_any_array_kind_and_a_copy_of_them():
    given_array = lengths(40)
    sampler = data.weighted(given_array, 4, seed=0)
    before = sampler.indices(3).tolist()
    given_array[:] = 0
    assert sampler.indices(3).tolist() == before
    for other in (lengths(40).tolist(), torch.from_numpy(lengths(40)), lengths(40).astype(np.float32)):
        assert data.weighted(other, 4, seed=0).indices(3).tolist() == before


# --- what is particular to a kind -------------------------------------------------------------------------------


def test_weighted_frequencies():
    weights = np.array([0.0, 1.0, 2.0, 0.0, 5.0, 0.0])
    sampler = data.weighted(weights, 1000, seed=3, rows_per_epoch=10_000)
    counts = sum(np.bincount(sampler.indices(step), minlength=6) for step in range(40))
    expected = weights / weights.sum() * 40_000
    assert counts[weights == 0].sum() == 0
    assert (np.abs(counts - expected) <= 4 * np.sqrt(expected)).all()
    rows = sampler.rows(2)
    assert len(set(rows.visits.tolist())) == 1000  # each draw has a visit, and so randomness, of its own


@EACH
def test_the_law_of_samplers(name, last):
    """The public law, on our own table: pure, any order of questions, every row once per epoch."""
    case = SAMPLERS[name]
    kinds = {} if case.covers or case.infinite else {"once": False}
    check_sampler(case.make(23, 4, 5, last), epochs=1 if name == "sequential" else 3, **kinds)


@pytest.mark.parametrize(("word", "row"), [(0, 1), (2**64 - 1, 4)])
def test_weighted_never_draws_weight_0_at_either_end(word, row, monkeypatch):
    monkeypatch.setattr(_bits, "bits", lambda key, numbers: np.full(len(numbers), word, np.uint64))
    assert data.weighted([0.0, 0.1, 0.2, 0.0, 0.3, 0.0], 1, seed=0).indices(0).tolist() == [row]


def test_weighted_epoch_length():
    sampler = data.weighted([1.0, 1.0], 3, seed=0, rows_per_epoch=10, last="short")
    assert [len(sampler.indices(step)) for step in range(5)] == [3, 3, 3, 1, 3]


@given(st.integers(0, 20), st.integers(0, 99))
def test_grouped_batches_have_similar_lengths(epoch, seed):
    values = np.random.default_rng(seed).integers(1, 500, 64 * 8)
    sampler = data.grouped_by_length(values, 8, seed=seed, mega_batch=16)
    first = epoch * sampler.steps_per_epoch
    batches = [values[sampler.indices(first + k)] for k in range(sampler.steps_per_epoch)]
    assert batches[0].max() == values.max()
    assert all((np.diff(batch) <= 0).all() for batch in batches)
    for chunk in range(4):
        ranked = np.concatenate(batches[chunk * 16 : (chunk + 1) * 16])
        assert (np.diff(ranked) <= 0).all()
    waste = 1 - sum(b.sum() for b in batches) / sum(b.max() * 8 for b in batches)
    assert waste < 0.1  # a plain shuffle wastes about 0.44


@given(SIZES, st.sampled_from(["drop", "pad", "short"]))
def test_batches_are_of_one_bucket(sizes, last):
    n, batch_size, seed = sizes
    buckets = np.repeat([-3, 7, 10**9], max(n, batch_size))
    sampler = data.bucketed(buckets, batch_size, seed=seed, last=last)
    epoch = [buckets[sampler.indices(step)] for step in range(sampler.steps_per_epoch)]
    assert all(len(set(batch.tolist())) == 1 for batch in epoch)
    if sampler.steps_per_epoch >= 30:  # and the buckets take turns
        assert len({int(batch[0]) for batch in epoch[: len(epoch) // 3]}) > 1


def test_buckets_are_shuffled_each_for_itself():
    sampler = data.bucketed([0] * 40 + [1] * 40, 40, seed=0)
    one, two = sorted((sampler.indices(step).tolist() for step in range(2)), key=min)
    assert [row + 40 for row in one] != two


def test_a_bucket_per_boundary():
    sampler = data.bucketed([1, 10, 11, 20, 5, 15], 1, boundaries=(10, 20), seed=0)
    assert np.diff(sampler.order.starts).tolist() == [3, 3]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 9), st.integers(0, 10**6))
def test_mixture_proportions_are_exact(weights, batch_size, step):
    samplers = [data.shuffled(100 + k, batch_size, seed=k) for k in range(len(weights))]
    sampler = data.mixture(samplers, weights, seed=0)
    block, total = sampler.order.block, sum(weights)
    taken = np.zeros(len(weights), int)
    ends = np.cumsum([p.num_rows for p in samplers])
    for k in range(3 * batch_size):  # whole blocks, wherever they begin
        slots = (step * 3 * batch_size + k) * block + np.arange(block)
        rows, _ = sampler.order.at(0, slots)
        taken += np.bincount(np.searchsorted(ends, rows, side="right"), minlength=len(weights))
        assert (np.abs(taken - np.array(weights) / total * (k + 1) * block) < 2).all()
    start = step * 3 * batch_size
    assert sampler.order._taken(start)[-1] == start * block


def test_mixture_uses_every_row_of_a_source_once_an_epoch():
    sources = [data.shuffled(12, 4, seed=1), data.sequential(40, 4)]
    sampler = data.mixture(sources, [0.5, 0.5], seed=0)
    rows = [sampler.rows(step) for step in range(60)]
    indices = np.concatenate([r.indices for r in rows])
    visits = np.concatenate([r.visits for r in rows])
    small = Counter(zip(indices[indices < 12].tolist(), visits[indices < 12].tolist(), strict=True))
    assert small == {(row, visit): 1 for row in range(12) for visit in range(10)}
    assert Counter(indices[indices >= 12].tolist()) == {12 + row: 3 for row in range(40)}


def test_mixtures_nest_and_rare_sources_are_met():
    inner = data.mixture([data.sequential(5, 4), data.sequential(5, 4)], [1, 1], seed=0)
    sampler = data.mixture([inner, data.sequential(5, 4)], [0.999, 0.001], seed=0)
    assert sampler.num_rows == 15 and sampler.order.block == 1000
    seen = np.concatenate([sampler.indices(step) for step in range(500)])
    assert np.bincount(seen // 5).tolist() == [999, 999, 2]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=80), st.integers(30, 50))
def test_packs_hold_each_row_once_and_fit(sizes, length):
    sampler = data.packed(sizes, length, 1, seed=0)
    packs = [sampler.packing.members(k) for k in range(sampler.steps_per_epoch)]
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(sizes)))
    room = [length - sum(sizes[row] for row in pack) for pack in packs]
    assert min(room) >= 0 and all(len(pack) for pack in packs)
    # Best fit decreasing opens a pack only for a row that fits nowhere else: at most 11/9 of the optimum and 1 more.
    assert len(packs) <= 11 / 9 * -(-sum(sizes) // length) * 1.25 + 1
    assert sampler.packing.fill == pytest.approx(sum(sizes) / (len(packs) * length))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_packing_is_best_fit_decreasing(sizes):
    """As many packs of the same fill as the textbook's row by row."""
    length, rooms = 12, []
    for size in sorted(sizes, reverse=True):
        fitting = [k for k, room in enumerate(rooms) if room >= size]
        best = min(fitting, key=lambda k: rooms[k], default=None)
        if best is None:
            rooms.append(length - size)
        else:
            rooms[best] -= size
    packing = data.packed(sizes, length, 1, seed=0).packing
    ours = [length - sum(sizes[row] for row in packing.members(k)) for k in range(len(packing.starts) - 1)]
    assert sorted(ours) == sorted(rooms)


# --- errors -----------------------------------------------------------------------------------------------------

ERRORS = [
    (lambda: data.shuffled(3, 4, seed=0), ValueError, 'drops every row: an epoch has 3.*Use last="pad"'),
    (lambda: data.shuffled(3, 2, seed=0, last="keep"), ValueError, 'handled by last="drop", "pad" or "short"'),
    (lambda: data.shuffled(3, 0, seed=0), ValueError, "batch_size=0 is not 1 or more"),
    (lambda: data.shuffled(3, 1.5, seed=0), TypeError, r"batch_size=1.5 is not a whole number; write batch_size=int"),
    (lambda: data.shuffled(0, 1, seed=0), ValueError, "num_rows=0 is not 1 or more"),
    (lambda: data.shuffled(3, 1, seed=0.5), TypeError, "seed=0.5 is not a whole number"),
    (lambda: data.sequential(True, 1), ValueError, "num_rows=True is not 1 or more"),
    (lambda: data.sequential(2**63, 1), ValueError, "would overflow 64 bits"),
    (lambda: data.sequential(4, 2).indices(-1), ValueError, "step=-1 is not 0 or more"),
    (lambda: data.sequential(4, 2).indices(0.5), TypeError, "step=0.5 is not a whole number"),
    (lambda: data.weighted([1.0, -1.0], 1, seed=0), ValueError, "weights are finite, 0 or more"),
    (lambda: data.weighted([0.0, 0.0], 1, seed=0), ValueError, "not all 0"),
    (lambda: data.weighted([1.0, float("nan")], 1, seed=0), ValueError, "weights are finite"),
    (lambda: data.weighted([[1.0]], 1, seed=0), ValueError, r"one number per row, and is float64\[1, 1\]"),
    (lambda: data.grouped_by_length([1.5], 1, seed=0), ValueError, "one whole number per row"),
    (lambda: data.grouped_by_length([], 1, seed=0), ValueError, "one whole number per row"),
    (lambda: data.bucketed([0, 0, 1], 2, seed=0), ValueError, r'never show .*\{1: 1\}.*Use last="pad"'),
    (lambda: data.bucketed([5], 1, boundaries=(2, 4), seed=0), ValueError, "1 rows are longer than .* 4; .* has 5"),
    (lambda: data.bucketed([5], 1, boundaries=(4, 2), seed=0), ValueError, "don't increase"),
    (lambda: data.mixture([], [], seed=0), ValueError, "0 samplers and 0 weights"),
    (lambda: data.mixture([data.sequential(4, 2)], [0], seed=0), ValueError, "positive and finite"),
    (
        lambda: data.mixture([data.sequential(4, 2), data.sequential(4, 1)], [1, 1], seed=0),
        ValueError,
        r"batch sizes \[1, 2\]; give all of them",
    ),
    (
        lambda: data.mixture([data.grouped_by_length([1, 2], 1, seed=0)], [1], seed=0),
        ValueError,
        "`grouped_by_length` arranges whole batches",
    ),
    (lambda: data.mixture([data.packed([1], 2, 1, seed=0)], [1], seed=0), ValueError, "`packed` arranges"),
    (lambda: data.packed([3, 9], 8, 1, seed=0), ValueError, r"1 rows are longer .* longest: 9.* 0 are empty"),
    (lambda: data.packed([0], 8, 1, seed=0), ValueError, "1 are empty"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_say_what_to_write(call, error, message):
    with pytest.raises(error, match=message):
        call()
