"""A stream obeys the laws of a loader, as far as something that can only be iterated can."""

import itertools
import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.tables import Iterated, N, NoisyIterated, X, Y, jitter, rows_as_dicts, same
from trainfn import data


def _huggingface():
    import datasets

    return datasets.Dataset.from_list(rows_as_dicts()).to_iterable_dataset(num_shards=4)


class Skipping:
    """Can skip, and says what was read."""

    def __init__(self, n=10**9):
        self.n, self.read = n, []

    def __iter__(self):
        return self._from(0)

    def skip(self, rows):
        return self._from(rows)

    def _from(self, first):
        for i in range(first, self.n):
            self.read.append(i)
            yield {"i": i}


SOURCES = {
    "list": rows_as_dicts,
    "function": lambda: lambda: iter(rows_as_dicts()),
    "function of first": lambda: lambda first: iter(rows_as_dicts()[first:]),
    "torch": Iterated,
    "hf": _huggingface,
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.filterwarnings("ignore:stream. .* rows are read and dropped")
def test_every_source_gives_the_same_batches(name, untouched_rng):
    batches = data.stream(SOURCES[name](), 4, last="pad")
    sampler = data.sequential(N, 4, last="pad")
    assert len(list(batches)) == 6
    for start in (0, 1, 4):
        for n, batch in enumerate(batches.start(start), start):
            rows = sampler.rows(n)
            weights = torch.from_numpy(rows.weights)
            assert same(batch, {"x": X[rows.indices], "y": Y[rows.indices], "weights": weights})
    assert list(batches.start(6)) == [] and same(batches(2), next(batches.start(2)))


@given(
    st.integers(5, 40),
    st.integers(1, 5),
    st.sampled_from(["drop", "pad", "short"]),
    st.sampled_from([0, 1, 4, 7, 100]),
    st.booleans(),
    st.integers(1, 3),
)
def test_starting_later_gives_the_tail(n, batch_size, last, shuffle, sized, world):
    epochs = 3 if sized else 1
    make = dict(last=last, shuffle=shuffle, seed=2, length=n if sized else None, epochs=epochs)
    stream = data.stream(Skipping(n), batch_size, **make)
    every = [batch["i"].tolist() for batch in stream]
    for start in range(0, len(every) + 1, 3):
        assert [batch["i"].tolist() for batch in stream.start(start)] == every[start:]
    per_epoch = n // batch_size if last == "drop" else -(-n // batch_size)
    assert len(every) == per_epoch * epochs and (stream.steps or len(every)) == len(every)
    for epoch in range(epochs):
        seen = list(itertools.chain(*every[epoch * per_epoch : (epoch + 1) * per_epoch]))
        assert len(seen) == len(set(seen)) or last == "pad"
        if last != "drop":
            assert sorted(set(seen)) == list(range(n))
    if last == "pad" or (last == "drop" and batch_size % world == 0):
        parts = [list(stream.shard(rank, world)) for rank in range(world)]
        joined = [torch.cat([part["i"] for part in ranks]).tolist() for ranks in zip(*parts, strict=True)]
        assert [batch[:batch_size] for batch in joined] == every


def test_what_can_skip_is_skipped():
    source = Skipping()
    batches = data.stream(source, 8, shuffle=100, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = next(batches.start(1_000_001))
    assert min(source.read) == 8_000_000 and len(source.read) == 100
    assert len(set(batch["i"].tolist())) == 8


def test_what_can_not_skip_is_read_and_says_so():
    with pytest.warns(UserWarning, match=r"12 rows are read and dropped.*stream\(lambda first: rows_from\(first\)"):
        data.stream(Iterated(), 4)(3)


def test_shuffled_blocks_differ_by_epoch():
    batches = data.stream(Skipping(20), 20, shuffle=20, length=20, epochs=None, seed=0)
    one, two = next(batches.start(0)), next(batches.start(10**7))
    assert sorted(one["i"].tolist()) == sorted(two["i"].tolist()) and not same(one, two)


@pytest.mark.parametrize("source", [rows_as_dicts, NoisyIterated], ids=["transform", "source"])
@pytest.mark.filterwarnings("ignore:stream. .* rows are read and dropped")
def test_randomness_is_the_rows(source, untouched_rng):
    transform = jitter if source is rows_as_dicts else None
    ones = list(data.stream(source(), 1, seed=1, transform=transform))
    for size in (4, 5):
        batches = data.stream(source(), size, seed=1, transform=transform)
        for start in (0, 2):
            rows = [x for batch in batches.start(start) for x in batch["x"]]
            assert all(torch.equal(x, one["x"][0]) for x, one in zip(rows, ones[start * size :], strict=False))
    other = data.stream(source(), 1, seed=2, transform=transform)
    assert not same(other(0), ones[0])
    epochs = data.stream(source(), 1, seed=1, transform=transform, epochs=2, length=N)
    assert not same(epochs(N), ones[0])


def test_a_worker_changes_nothing(untouched_rng):
    make = dict(shuffle=10, transform=jitter, last="pad", seed=4)
    here, there = (data.stream(_huggingface(), 4, num_workers=k, **make) for k in (0, 1))
    assert all(itertools.starmap(same, itertools.zip_longest(here.start(2), there.start(2))))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # of torch, on a machine with few cores
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("last", ["short", "drop"])
def test_a_stream_resumes_by_its_state(workers, last, untouched_rng):
    """After every batch; the state is that of the rows so far, though workers read ahead."""
    stream = data.stream(_huggingface(), 4, num_workers=workers, last=last, transform=jitter)
    whole, states = [], [None]
    batches = stream.start()
    for batch in batches:
        whole.append(batch)
        states.append(json.loads(json.dumps(batches.state())))
    rows = [int(y) for batch in whole for y in batch["y"]]
    assert len(set(rows)) == len(rows) and (last == "drop" or len(rows) == N)
    for step in (1, 3, len(whole)):
        again = list(stream.start(step, states[step]))
        assert len(again) == len(whole) - step and all(map(same, again, whole[step:]))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("source", [_huggingface, Iterated])
def test_workers_take_turns_as_in_torch(source):
    ours = data.stream(source(), 4, num_workers=3, last="short")
    theirs = list(torch.utils.data.DataLoader(source(), 4, num_workers=3, collate_fn=data.stack))
    assert [batch["y"].tolist() for batch in ours] == [batch["y"].tolist() for batch in theirs]
    with pytest.warns(UserWarning, match="2 batches are read and dropped"):
        assert [batch["y"].tolist() for batch in ours.start(2)] == [batch["y"].tolist() for batch in theirs[2:]]


def test_shards_of_the_source():
    parts = [data.stream(_huggingface(), 4).shard(rank, 2, by="shards") for rank in range(2)]
    seen = [int(y) for part in parts for batch in part for y in batch["y"]]
    assert parts[0].batch_size == 2 and len(seen) == len(set(seen)) >= N - 2
    assert parts[0].seed != parts[1].seed


def test_set_epoch_is_reported():
    class Told(Skipping):
        def set_epoch(self, epoch):
            told.append(epoch)

    told = []
    list(data.stream(Told(4), 2, length=4, epochs=3))
    assert told == [0, 1, 2]


def test_description():
    described = data.stream(Iterated(), 4, shuffle=8, transform=jitter).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["source"] == "tests.data.tables.Iterated" and described["shuffle"] == 8


def test_an_error_names_its_row_and_step():
    def fail(row):
        raise OSError(f"row {row['y']}")

    with pytest.raises(OSError) as caught:
        data.stream(Iterated(), 4, transform=fail)(0)
    assert caught.value.__notes__ == ["In row 0.", "In the batch of step 0, of the rows from 0 on of epoch 0."]


def generator():
    yield {"x": np.zeros(2)}


THREE = {"readers": [None] * 3, "next": 0}
ERRORS = [
    (lambda: data.stream(generator(), 2), TypeError, r"a generator can be read once.*stream\(read_rows, ...\)"),
    (lambda: data.stream(3, 2), TypeError, "a int can be read once at most"),
    (lambda: data.stream(Iterated(), 0), ValueError, "batch_size=0 is not 1 or more"),
    (lambda: data.stream(Iterated(), 2, last="x"), ValueError, 'handled by last="drop", "pad" or "short", not \'x\''),
    (lambda: data.stream(Iterated(), 2, num_workers=2, epochs=2), ValueError, "of its own.*Say num_workers=1"),
    (lambda: data.stream(Iterated(), 2, num_workers=2, length=23), ValueError, "epochs=1 without a length"),
    (lambda: data.stream(Iterated(), 2).start(1, THREE), ValueError, "is that of 3 readers.*Write `num_workers=3`"),
    (lambda: data.stream(Iterated(), 2, epochs=None), ValueError, "is not known.*Say length=100_000"),
    (lambda: data.stream([1], 2), ValueError, "a pass of 1 rows has no batch"),
    (lambda: list(data.stream(Iterated(), 2, length=40)), ValueError, "ended after 23 rows. Say length=23"),
    (lambda: data.stream(Iterated(), 2)(99), IndexError, r"stream\(99\): the source ends before"),
    (lambda: data.stream(Iterated(), 2).shard(0, 3), ValueError, "batches of different shapes"),
    (lambda: data.stream(Iterated(), 2).shard(0, 2, by="files"), ValueError, 'shard by="rows" or by="shards"'),
    (lambda: data.stream(Iterated(), 2).shard(0, 2, by="shards"), TypeError, 'has no method `shard`. Use by="rows"'),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
@pytest.mark.filterwarnings("ignore:stream. .* rows are read and dropped")
def test_errors_say_what_to_write(call, error, message):
    with pytest.raises(error, match=message):
        call()
