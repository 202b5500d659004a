"""Batches are functions of their number: of no worker, rank, order of asking, or global generator."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import trainfn as tfn
from tests.data.tables import DATASETS, SAMPLERS, TABLE, Failing, Mapped, N, Noisy, X, Y, jitter, rows_as_dicts, same
from trainfn import data
from trainfn.data import _rows

SAMPLER = data.shuffled(N, 4, seed=0, last="pad")
EACH = pytest.mark.parametrize(("name", "last"), TABLE)


def take(batches, count):
    return list(itertools.islice(batches, count))


def rows_for(sampler):
    """A dataset whose row i holds i, in the shape that the sampler wants."""
    if sampler.packing is None:
        return {"x": np.arange(sampler.num_rows)}
    sizes = np.arange(sampler.num_rows) * 7 % 9 + 1
    return [{"input_ids": [i] * int(size)} for i, size in enumerate(sizes)]


# --- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("sampler", [SAMPLER, data.shuffled(N, 4, seed=0)], ids=["pad", "drop"])
def test_every_kind_of_dataset_gives_the_same_batches(name, sampler, untouched_rng):
    batches = data.loader(DATASETS[name](), sampler)
    for step in (0, 5, 10**7):
        rows = sampler.rows(step)
        expected = {"x": X[rows.indices], "y": Y[rows.indices]}
        if sampler.last == "pad":
            expected["weights"] = torch.from_numpy(rows.weights)
        assert same(batches(step), expected)
    with_transform = data.loader(DATASETS[name](), sampler, transform=lambda row: {"y": row["y"]})
    assert same(with_transform(5)["y"], batches(5)["y"])


def test_tuples_and_single_arrays():
    sampler = data.sequential(N, 4)
    both = data.loader(torch.utils.data.TensorDataset(X, Y), sampler)(1)
    assert same(both, (X[4:8], Y[4:8])) and same(data.loader((X.numpy(), Y), sampler)(1), both)
    assert same(data.loader([(X[i], Y[i]) for i in range(N)], sampler)(1), both)
    assert same(data.loader(X, sampler)(1), X[4:8])
    padded = data.loader((X, Y), data.sequential(N, 4, last="pad"))(5)
    assert same(padded, (X[[20, 21, 22, 20]], Y[[20, 21, 22, 20]], torch.tensor([1.0, 1.0, 1.0, 0.0])))


def test_weights_make_a_padded_epoch_exact():
    batches = data.loader({"x": X, "y": Y}, SAMPLER, epochs=1, weights="row_weights")
    step = tfn.eval_step(lambda p, b: tfn.Mean.of(b["x"][:, 0] * p["w"], b["row_weights"]))
    state = tfn.init({"w": torch.tensor(1.0)}, tfn.optim.sgd(0.1))
    mean = tfn.evaluate(step, state, batches)["loss"]
    assert mean.weight.item() == N and mean.value.item() == pytest.approx(X[:, 0].mean().item())


def test_whole_batches_are_read_at_once_where_nothing_is_drawn():
    hf = DATASETS["hf"]()
    assert not _rows.source(hf).draws and _rows.source(hf.with_transform(lambda rows: rows)).draws
    assert _rows.source(Mapped()).draws

    class Whole(Mapped):
        calls = 0

        def __getitems__(self, indices):
            self.calls += 1
            return [self[i] for i in indices]

    dataset = Whole()
    assert same(data.loader(dataset, SAMPLER, getitems=True)(3), data.loader(Mapped(), SAMPLER)(3))
    assert dataset.calls == 1


def test_a_transform_may_write_into_its_row():
    def double(row):
        row["x"] = row["x"] * 2 if isinstance(row["x"], torch.Tensor) else [2 * x for x in row["x"]]
        return row

    def double_in_place(row):
        row["x"] *= 2
        return row

    for dataset, transform in [(rows_as_dicts(), double), ({"x": X.clone(), "y": Y}, double_in_place)]:
        batches = data.loader(dataset, SAMPLER, transform=transform)
        assert same(batches(0), batches(0)) and same(batches(0)["x"], 2 * X[SAMPLER.indices(0)])


def test_memory_mapped_columns(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    batches = data.loader({"x": np.load(tmp_path / "x.npy", mmap_mode="r")}, data.sequential(N, 4))
    assert same(batches(2)["x"], X[8:12])
    batches(2)["x"].add_(1)


# --- steps, epochs, resuming ------------------------------------------------------------------------------------


@EACH
@given(st.integers(0, 50), st.integers(1, 5))
def test_starting_later_gives_the_tail(name, last, start, world):
    sampler = SAMPLERS[name].make(30, 5, 3, last)
    batches = data.loader(rows_for(sampler), sampler, collate=data.stack)
    expected = [batches(n) for n in range(start, start + 4)]
    assert all(map(same, take(batches.start(start), 4), expected))


def test_a_stop_iteration_does_not_end_a_run_in_silence():
    def stop(row):
        raise StopIteration

    with pytest.raises(RuntimeError, match="raised StopIteration"):
        list(data.loader({"x": X}, SAMPLER, transform=stop, epochs=1))


def test_a_run_ends_with_its_epochs():
    batches = data.loader({"x": X}, data.shuffled(N, 4, seed=0, last="short"), epochs=2)
    assert len(batches) == batches.steps == 12
    assert [len(batch["x"]) for batch in batches] == [4, 4, 4, 4, 4, 3] * 2
    assert list(batches.start(12)) == list(batches.start(10**9)) == []  # a finished run does nothing
    assert len(list(batches.start(11))) == 1
    endless = data.loader({"x": X}, data.shuffled(N, 4, seed=0))
    assert endless.steps is None and len(take(endless.start(10**7), 9)) == 9


# --- ranks ------------------------------------------------------------------------------------------------------


@EACH
@given(st.integers(0, 60), st.integers(1, 7))
def test_the_ranks_rows_are_the_global_batch(name, last, step, world):
    sampler = SAMPLERS[name].make(60, 6, 1, last)
    batches = data.loader(rows_for(sampler), sampler)
    if world > 1 and (last == "short" or (last == "drop" and 6 % world)):
        with pytest.raises(ValueError, match="batches of different shapes"):
            batches.shard(0, world)
        return
    parts = [batches.shard(rank, world)(step) for rank in range(world)]
    whole = batches(step)
    assert len({len(next(iter(part.values()))) for part in parts}) == 1
    for field in whole:
        joined = torch.cat([part[field] for part in parts])
        assert torch.equal(joined[:6], whole[field])
        if field == "weights":
            assert joined[6:].sum() == 0


# --- randomness -------------------------------------------------------------------------------------------------

RANDOM = {
    "dataset": lambda sampler: data.loader(Noisy(), sampler),
    "transform": lambda sampler: data.loader(Mapped(), sampler, transform=jitter),
    "transform of columns": lambda sampler: data.loader({"x": X, "y": Y}, sampler, transform=jitter),
    "key": lambda sampler: data.loader(
        rows_as_dicts(), sampler, transform=lambda row, key: {**row, "x": tfn.random.uniform(key, (3,))}
    ),
    "hf transform": lambda sampler: data.loader(
        DATASETS["hf"]().with_transform(lambda rows: {"x": [np.random.rand(3) for _ in rows["x"]], "y": rows["y"]}),
        sampler,
    ),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_rows_randomness_is_its_own(name, untouched_rng):
    """The same in any batch, of any size, on any rank; another one in another epoch."""
    halves = RANDOM[name](data.shuffled(N, 8, seed=0)).shard(1, 2)
    assert same(halves(1)["x"], RANDOM[name](data.shuffled(N, 8, seed=0))(1)["x"][4:])
    small, large = (data.shuffled(N, size, seed=0, last="short") for size in (1, 8))
    ones, eights = RANDOM[name](small), RANDOM[name](large)
    for epoch in (0, 10**6):
        alone = {int(ones(n)["y"]): ones(n)["x"][0] for n in range(epoch * N, epoch * N + N)}
        for n in range(epoch * 3, epoch * 3 + 3):
            batch = eights(n)
            assert all(torch.equal(alone[int(y)], x) for x, y in zip(batch["x"], batch["y"], strict=True))
    rows = {int(y): x for n in range(3) for x, y in zip(eights(n)["x"], eights(n)["y"], strict=True)}
    assert not torch.equal(rows[0], alone[0])


def test_randomness_follows_the_seed_and_nothing_else():
    sampler = data.sequential(N, 4)
    one, other = data.loader(Noisy(), sampler, seed=1), data.loader(Noisy(), sampler, seed=2)
    before = one(3)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert same(one(3), before) and not same(other(3), before)
    assert same(before, data.loader(Noisy(), sampler, seed=1)(3))


def test_rows_drawn_twice_differ_in_their_randomness():
    batch = data.loader(Noisy(), data.weighted([1.0] + [0.0] * (N - 1), 6, seed=0))(0)
    assert len(set(batch["x"][:, 0].tolist())) == 6


def test_generators_are_given_back_after_an_error(untouched_rng):
    def fail(row):
        random.random(), np.random.rand(), torch.rand(())
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        data.loader({"x": X}, SAMPLER, transform=fail)(0)
    with pytest.raises(RuntimeError, match="broken"):
        data.loader({"x": X}, SAMPLER, collate=fail)(0)


@pytest.fixture(scope="module")
def masking():
    """The collator of transformers that masks tokens, with a tokenizer made here."""
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    words = ["[PAD]", "[MASK]", "[UNK]", *(f"w{i}" for i in range(50))]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]"
    )

    def make(width, **options):
        options = {"mlm_probability": 0.4, "pad_to_multiple_of": width, **options}
        return DataCollatorForLanguageModeling(tokenizer, **options)

    return make


SENTENCES = [{"input_ids": [3 + (7 * i + j) % 50 for j in range(5 + i % 9)]} for i in range(N)]


def test_a_masking_collator_masks_by_row(masking, untouched_rng):
    sampler = data.shuffled(N, 6, seed=0)
    batches = data.loader(SENTENCES, sampler, collate=masking(16))
    whole = batches(2)
    assert type(whole) is dict and same(batches(2), whole) and not torch.equal(batches(1)["labels"], whole["labels"])
    assert (
        0.2 < ((whole["labels"] != -100) & (whole["attention_mask"] == 1)).float().sum() / whole["attention_mask"].sum()
    )
    for world in (2, 3, 6):
        parts = [batches.shard(rank, world)(2) for rank in range(world)]
        for field in whole:
            assert torch.equal(torch.cat([part[field] for part in parts]), whole[field])


def test_a_masking_collator_of_numpy_is_keyed_by_step(masking):
    batches = data.loader(SENTENCES, data.shuffled(N, 6, seed=0), collate=masking(16, return_tensors="np"))
    before = batches(2)["labels"]
    random.seed(6), np.random.seed(6), torch.manual_seed(6)
    assert (batches(2)["labels"] == before).all()
    assert (batches(1)["labels"] != batches(2)["labels"]).any()
    of_rank = [batches.shard(rank, 2)(2)["labels"] for rank in range(2)]
    assert (of_rank[0] == before[:3]).all()  # which tokens are masked is the first draw, in the order of the rows
    assert (of_rank[1] != before[3:]).any()  # so a rank that begins at another row draws other numbers


def test_a_collator_with_a_generator_of_its_own_is_refused(masking):
    batches = data.loader(SENTENCES, data.shuffled(N, 6, seed=0), collate=masking(16, seed=3))
    with pytest.raises(tfn.errors.RandomnessError, match="generator=") as caught:
        batches(0)
    assert "leave out its `seed=`" in caught.value.__notes__[0]


# --- workers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 10_000_000])
def test_workers_change_nothing(start, untouched_rng):
    """Across the end of an epoch, with everything random there is."""
    batches = data.loader(Noisy(), SAMPLER, transform=jitter, num_workers=2)
    here = data.loader(Noisy(), SAMPLER, transform=jitter)
    assert all(map(same, take(batches.start(start), 8), take(here.start(start), 8)))
    assert same(batches(start), here(start))


def test_workers_end_with_the_iterator():
    import multiprocessing

    batches = data.loader({"x": X}, SAMPLER, num_workers=2, prefetch=1)
    iterator = batches.start(0)
    next(iterator)
    assert len(multiprocessing.active_children()) == 2
    iterator.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_names_its_row_and_step(num_workers):
    batches = data.loader(Failing(), data.sequential(N, 4), num_workers=num_workers)
    iterator = batches.start(2)
    next(iterator)
    with pytest.raises(KeyError) as caught:
        next(iterator)
    text = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert "In row 13." in text and "In the batch of step 3, of the rows 12, 13, 14, 15." in text


# --- collating --------------------------------------------------------------------------------------------------


def test_stack():
    rows = [
        {"a": 1, "b": (True, "s"), "c": {"d": [1.5, 2.5]}, "e": np.float64(i), "f": [torch.ones(2)]} for i in (0, 1)
    ]
    out = data.stack(rows)
    assert same(out["a"], torch.tensor([1, 1])) and same(out["b"], (torch.tensor([True, True]), ["s", "s"]))
    assert same(out["c"]["d"], torch.tensor([[1.5, 2.5]] * 2)) and same(out["e"], torch.tensor([0.0, 1.0]).double())
    assert same(out["f"], torch.ones(2, 1, 2))
    assert same(data.stack([1, 2.5]), torch.tensor([1.0, 2.5]))
    mean = data.stack([tfn.Mean(torch.ones(1), torch.ones(1))] * 2)
    assert isinstance(mean, tfn.Mean) and mean.total.shape == (2, 1)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 5), st.sampled_from([None, 9, 12]))
def test_padding(sizes, multiple_of, length):
    rows = [{"input_ids": list(range(1, size + 1)), "n": size} for size in sizes]
    batch = data.pad_collate({"input_ids": 0}, multiple_of=multiple_of, length=length, mask="mask")(rows)
    width = length or -(-max(sizes) // multiple_of) * multiple_of
    assert batch["input_ids"].shape == batch["mask"].shape == (len(sizes), width)
    assert batch["mask"].sum(1).tolist() == batch["n"].tolist() == sizes
    assert torch.equal(batch["input_ids"], (torch.arange(width) + 1) * batch["mask"])


def test_padding_keeps_dtypes_and_further_dimensions():
    rows = [{"x": torch.ones(2, 3, dtype=torch.float16)}, {"x": torch.ones(1, 3, dtype=torch.float16)}]
    assert same(data.pad_collate({"x": -1})(rows)["x"][1, 1], torch.full((3,), -1, dtype=torch.float16))


def test_a_packed_row_keeps_its_rows_apart():
    rows = [{"input_ids": [1, 2], "labels": [5, 6]}, {"input_ids": [3], "labels": [7]}]
    row = data.pack_rows(rows, 5, pad={"input_ids": 9})
    assert {name: x.tolist() for name, x in row.items()} == {
        "input_ids": [1, 2, 3, 9, 9],
        "labels": [-100, 6, -100, -100, -100],
        "position_ids": [0, 1, 0, 0, 0],
        "segment_ids": [1, 1, 2, 0, 0],
    }


def test_packing_changes_no_loss():
    """The tokens predicted in packs are those predicted row by row, each with its own predecessor."""
    sampler = data.packed([len(row["input_ids"]) for row in SENTENCES], 16, 2, seed=0, last="pad")
    batches = data.loader(SENTENCES, sampler, epochs=1)
    table = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    alone = [tfn.losses.next_token(table[t := torch.tensor([row["input_ids"]])], t) for row in SENTENCES]
    packs = [tfn.losses.next_token(table[b["input_ids"]], b["labels"], weights=b["weights"][:, None]) for b in batches]
    assert sum(packs).weight == sum(alone).weight
    torch.testing.assert_close(sum(packs).total, sum(alone).total)


# --- descriptions and errors ------------------------------------------------------------------------------------


def test_description():
    batches = data.loader(DATASETS["hf"](), SAMPLER, collate=data.pad_collate({"x": 0}), transform=jitter)
    described = json.loads(json.dumps(batches.describe()))
    assert described["sampler"]["kind"] == "shuffled" and described["dataset"]["rows"] == N
    assert described["dataset"]["fingerprint"] and described["transform"] == "tests.data.tables.jitter"
    assert described["collate"]["pad"] == {"x": 0}
    assert batches.shard(0, 2).describe() == batches.describe()


class Lazy:
    def __iter__(self):
        return iter([1])


def load(dataset, sampler=SAMPLER, step=0, **options):
    return data.loader(dataset, sampler, **options)(step)


ONE = data.sequential(2, 2)
ERRORS = [
    (lambda: load(Lazy()), TypeError, r"a Lazy has no rows by number.*Use tfn.data.stream\(dataset"),
    (lambda: load({"x": X[:9]}), ValueError, r"has 9 rows and the sampler is for 23. .* range\(9\)\)"),
    (lambda: load({"x": [1, 2]}), TypeError, "'x/0' is of type int. Write np.asarray"),
    (lambda: load({"train": Mapped()}), TypeError, r"choose a split: dataset\[\"train\"\]"),
    (lambda: load({"x": X, "y": Y[:3]}), ValueError, "have {'x': 23, 'y': 3}"),
    (lambda: load(Mapped(), getitems=True), TypeError, "a Mapped has no `__getitems__`"),
    (
        lambda: load({"x": X}, prefetch=3),
        ValueError,
        "nothing is made ahead of time without workers. Say num_workers=1",
    ),
    (lambda: load({"x": X}, num_workers=-1), ValueError, "num_workers=-1 is not 0 or more"),
    (lambda: load({"x": X}, num_workers=1, prefetch=0), ValueError, "prefetch=0 is not 1 or more"),
    (lambda: load({"x": X}, epochs=0), ValueError, "epochs=0 is not 1 or more"),
    (lambda: load({"x": X}, epochs=1, step=6), IndexError, r"there are 6 batches, the last one is loader\(5\)"),
    (lambda: data.loader({"x": X}, SAMPLER).start(-1), ValueError, "step=-1 is not 0 or more"),
    (lambda: len(data.loader({"x": X}, SAMPLER)), TypeError, r"never ends. Say how long: loader\(..., epochs=1\)"),
    (lambda: data.loader({"x": X}, SAMPLER).shard(2, 2), ValueError, "ranks go from 0 to world - 1 = 1"),
    (lambda: load({"weights": X}), ValueError, "adds the rows' weights as 'weights'.*Say weights="),
    (lambda: load(X), TypeError, "must be a dict or a tuple, not a Tensor"),
    (
        lambda: load(X[:2], data.mixture([ONE], [1], seed=0), epochs=1),
        ValueError,
        r"a mixture has no epochs. Say how long in fit\(..., until=1000\)",
    ),
    (lambda: data.concat(), TypeError, "takes one dataset or more"),
    (lambda: load([{"x": [1]}, {"x": [1, 2]}], ONE), ValueError, r"field 'x' has shape \[1\].*pad_collate\({'x': 0}\)"),
    (lambda: load([{"x": 1}, {"y": 1}], ONE), ValueError, r"has the fields \['x'\], row 1 has \['y'\]"),
    (lambda: load([{"x": 1}, {"x": None}], ONE), TypeError, "field 'x' is a NoneType in row 1"),
    (lambda: load([{"x": [[1], [1, 2]]}] * 2, ONE), TypeError, "field 'x' is a list in row 0"),
    (lambda: load([(1,), (1, 2)], ONE), ValueError, "the tuples in the rows differ in length"),
    (lambda: data.stack([]), ValueError, "there are no rows"),
    (lambda: data.pad_collate({}), ValueError, "name a field at least"),
    (lambda: data.pad_collate({"x": 0})([{"y": [1]}]), ValueError, r"has no field 'x', but \['y'\]"),
    (lambda: data.pad_collate({"x": 0}, length=1)([{"x": [1, 2]}]), ValueError, "has 2 in 'x'.*or say length=2"),
    (lambda: data.pack_rows([{"input_ids": [1, 2]}], 1), ValueError, r"rows of lengths \[2\] don't fit into 1"),
    (lambda: data.pack_rows([{"input_ids": [1], "n": 3}], 1), ValueError, "must have one length"),
    (lambda: data.pack_rows([{"x": [1]}], 1), ValueError, "no `input_ids`. Pass your own function"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_say_what_to_write(call, error, message):
    with pytest.raises(error, match=message):
        call()
