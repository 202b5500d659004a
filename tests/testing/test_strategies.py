"""The strategies draw what they say, all of it, and shrink to what can be read."""

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from torch import nn

import trainfn as tfn
import trainfn.testing as tt
from tests.helpers import assert_identical, floats

pytestmark = pytest.mark.usefixtures("untouched_rng")

SEARCH = settings(
    max_examples=300, database=None, deadline=None, derandomize=False, phases=(Phase.generate, Phase.shrink)
)


def least(strategy, condition=lambda drawn: True):
    """The minimum that a strategy shrinks to."""
    import random

    return find(strategy, condition, settings=SEARCH, random=random.Random(0))


def never(strategy, condition):
    with pytest.raises(NoSuchExample):
        least(strategy, condition)


# --- fields and batches -------------------------------------------------------------------------------------------


@given(batch=tt.batches({"x": tt.floats(2, 3, dtype=torch.float64), "deep": [tt.integers(-2, 5), tt.masks(2)]}))
def test_a_batch_has_the_shapes_and_dtypes_of_its_spec(batch):
    rows = len(batch["x"])
    assert 1 <= rows <= 6
    assert batch["x"].shape == (rows, 2, 3) and batch["x"].dtype == torch.float64
    assert batch["x"].abs().max() <= 4 and (batch["x"] * 2 == (batch["x"] * 2).round()).all()
    index, mask = batch["deep"]
    assert index.shape == (rows,) and index.dtype == torch.int64 and -2 <= index.min() and index.max() < 5
    assert mask.shape == (rows, 2) and mask.dtype == torch.bool


def test_batches_shrink_to_one_row_of_zeros():
    batch = least(tt.batches())
    assert_identical(batch, {"x": torch.zeros(1, 4), "y": torch.zeros(1, dtype=torch.int64)})
    assert least(tt.batches({"m": tt.masks(2)}))["m"].tolist() == [[True, True]]
    assert least(tt.batches(rows=(3, 5)))["x"].shape == (3, 4)


def test_batches_shrink_to_the_row_that_matters():
    batch = least(tt.batches(), lambda b: bool((b["x"].sum(1) > 3).any()))
    assert batch["x"].shape == (1, 4) and batch["x"].sum() == 3.5


def test_every_value_is_drawn():
    spec = {"y": tt.integers(0, 3, or_else=-100), "m": tt.masks(), "x": tt.floats()}
    for value in (0, 1, 2, -100):
        assert (least(tt.batches(spec), lambda b, v=value: v in b["y"])["y"] == value).any()
    assert least(tt.batches(spec), lambda b: not b["m"].any())["m"].tolist() == [False]
    assert least(tt.batches(spec), lambda b: -4.0 in b["x"])["x"].tolist() == [-4.0]
    assert len(least(tt.batches(spec), lambda b: len(b["x"]) == 6)["x"]) == 6


@given(batch=tt.batches({"x": tt.floats(100), "y": tt.integers(0, 3, 100, or_else=-100), "m": tt.masks(100)}))
@settings(max_examples=10)
def test_large_tensors_are_drawn_at_once(batch):
    assert batch["x"].std() > 0.5 and batch["x"].unique().numel() > 90
    assert set(batch["y"].unique().tolist()) == {-100, 0, 1, 2}
    assert batch["m"].any() and not batch["m"].all()


def test_large_tensors_differ_from_draw_to_draw():
    assert least(
        st.tuples(*[tt.batches({"x": tt.floats(100)}, rows=(1, 1))] * 2), lambda t: t[0]["x"][0, 0] != t[1]["x"][0, 0]
    )


OWN = floats(4)(5)  # a batch of five rows


@given(batch=tt.batches(OWN, rows=(2, 4)))
def test_rows_of_ones_own_batch_stay_together(batch):
    whole = [(x.tolist(), int(y)) for x, y in zip(OWN["x"], OWN["y"], strict=True)]
    drawn = [(x.tolist(), int(y)) for x, y in zip(batch["x"], batch["y"], strict=True)]
    assert 2 <= len(drawn) <= 4
    assert len({whole.index(row) for row in drawn}) == len(drawn)  # different ones


def test_a_single_row_of_ones_own_is_repeated_where_more_are_needed():
    one = {name: x[:1] for name, x in OWN.items()}
    batch = least(tt.batches(one, rows=(3, 3)))
    assert_identical(batch["x"], OWN["x"][:1].expand(3, 4))


def test_what_has_no_rows_is_kept():
    batch = least(tt.batches({**OWN, "scale": torch.tensor(3.0)}))
    assert batch["scale"].shape == () and batch["scale"] == 3


@given(batch=tt.token_batches(vocab=7, length=5, pad_id=6, ignore_index=-1, rows=(2, 3)))
def test_token_batches(batch):
    mask = batch["attention_mask"]
    assert {tuple(x.shape) for x in batch.values()} == {(len(mask), 5)} and len(mask) in (2, 3)
    assert all(x.dtype == torch.int64 for x in batch.values())
    assert mask.sum(1).min() >= 1 and (mask.diff(dim=1) <= 0).all()  # padded on the right
    kept = mask.bool()
    assert (batch["labels"][~kept] == -1).all() and (batch["input_ids"][~kept] == 6).all()
    assert_identical(batch["labels"][kept], batch["input_ids"][kept])
    assert batch["input_ids"].min() >= 0 and batch["input_ids"].max() < 7


def test_token_batches_shrink_to_one_token():
    batch = least(tt.token_batches(length=3))
    assert {name: x.tolist() for name, x in batch.items()} == {
        "input_ids": [[0, 0, 0]],
        "attention_mask": [[1, 0, 0]],
        "labels": [[0, -100, -100]],
    }
    uneven = least(tt.token_batches(length=3), lambda b: len(b["labels"].ne(-100).sum(1).unique()) > 1)
    assert sorted(uneven["attention_mask"].sum(1).tolist()) == [1, 2]


@given(batch=tt.masked_batches(features=2, length=3))
def test_masked_batches(batch):
    rows = len(batch["x"])
    assert batch["x"].shape == (rows, 3, 2) and batch["y"].shape == batch["mask"].shape == (rows, 3)
    assert batch["mask"].dtype == torch.bool


def test_masked_batches_shrink_to_nothing_masked_and_reach_everything_masked():
    assert least(tt.masked_batches())["mask"].all()
    assert not least(tt.masked_batches(), lambda b: not b["mask"].any())["mask"].any()


def test_specs_are_checked():
    with pytest.raises(ValueError, match=r"integers\(3, 3\): the range is empty"):
        tt.integers(3, 3)
    for rows in ((0, 2), (3, 2)):
        with pytest.raises(ValueError, match=r"batches\(spec, rows=.*\): give the fewest and the most rows"):
            tt.batches(rows=rows)
    with pytest.raises(ValueError, match=r"batches\(spec\): 4 is not a field. Write `tfn.testing.floats\(4\)`"):
        tt.batches({"x": 4})


# --- splits -------------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 8), ranks=st.integers(1, 4), data=st.data())
def test_splits_partition_the_rows(rows, ranks, data):
    fewest = data.draw(st.integers(1, rows))
    split = data.draw(tt.splits(rows, ranks=ranks, min_pieces=fewest))
    assert 1 <= len(split.ranks) <= ranks
    assert all(size >= 1 for sizes in split.ranks for size in sizes) and all(split.ranks)
    assert sum(len(sizes) for sizes in split.ranks) >= fewest
    pieces = split.pieces({"x": torch.arange(rows), "all": torch.tensor(7)})
    assert [[len(p.batch["x"]) for p in rank] for rank in pieces] == [list(sizes) for sizes in split.ranks]
    flat = [p for rank in pieces for p in rank]
    assert torch.cat([p.batch["x"] for p in flat]).tolist() == list(range(rows))
    assert all(p.first_row == p.batch["x"][0] and p.batch["all"] == 7 for p in flat)


def test_every_split_is_drawn_and_the_least_is_whole():
    assert least(tt.splits(4)) == tt.Split(((4,),))
    assert least(tt.splits(4, min_pieces=2)) in (tt.Split(((1, 3),)), tt.Split(((3, 1),)))
    for sizes in ((1, 1, 1), (1, 2), (2, 1), (3,)):
        assert least(tt.splits(3), lambda split, s=sizes: split.ranks == (s,))
    for ranks in (((1,), (1, 1)), ((1, 1), (1,)), ((1,), (1,), (1,)), ((2,), (1,))):
        assert least(tt.splits(3, ranks=3, min_pieces=2), lambda split, r=ranks: split.ranks == r)
    never(tt.splits(3, ranks=3, min_pieces=2), lambda split: len(split.ranks) == 1)  # then it would be no ranks' law


@given(rows=st.integers(2, 7), data=st.data())
def test_padded_ranks_have_equally_many_rows(rows, data):
    batch = {"x": torch.arange(rows), "y": torch.arange(rows) + 10}
    split = data.draw(tt.splits(batch, ranks=3, min_pieces=2))
    ranks = split.pieces(batch, pad={"y": -100})
    counts = {sum(len(piece.batch["x"]) for piece in rank) for rank in ranks}
    assert len(counts) == 1
    pieces = [piece.batch for rank in ranks for piece in rank]
    counted = torch.cat([p["y"][p["y"] != -100] for p in pieces])
    assert counted.tolist() == batch["y"].tolist()
    assert batch["y"].min() == 10  # padded in a copy


def test_splits_read_well():
    assert repr(tt.Split(((1, 2), (1,)))) == "rank 0: row 0 | rows 1-2; rank 1: row 3"
    assert repr(tt.Split(((2, 1),))) == "rows 0-1 | row 2"
    assert repr(tt.Split(((1,), ()))) == "rank 0: row 0; rank 1: no rows"


def test_splits_are_checked():
    with pytest.raises(ValueError, match=r"splits\(batch, min_pieces=3\): the batch has 2 rows"):
        tt.splits({"x": torch.zeros(2)}, min_pieces=3)
    with pytest.raises(ValueError, match=r"pad=\{'z': 0\}: the batch has no leaf 'z'"):
        tt.Split(((1, 1),)).pieces({"x": torch.zeros(2)}, pad={"z": 0})


# --- things -------------------------------------------------------------------------------------------------------


@given(module=tt.modules(features=3, outputs=2))
def test_modules_treat_rows_by_themselves(module):
    module.eval()
    x = torch.arange(12.0).view(4, 3)
    assert module(x).shape == (4, 2)
    assert torch.allclose(module(x)[1:2], module(x[1:2]), atol=1e-6)


def test_modules_shrink_to_a_linear_layer_and_some_have_dropout():
    assert isinstance(least(tt.modules()), nn.Linear)
    assert least(tt.modules(), lambda m: any(isinstance(part, nn.Dropout) for part in m.modules()))
    assert least(tt.modules(), lambda m: any(isinstance(part, nn.LayerNorm) for part in m.modules()))
    never(tt.modules(), lambda m: any(isinstance(part, nn.BatchNorm1d) for part in m.modules()))


def test_tensors():
    zero = least(tt.tensors())
    assert zero.shape == () and zero.dtype == torch.float32 and zero == 0
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool):
        assert least(tt.tensors(), lambda x, d=dtype: x.dtype == d and x.dim() == 2 and x.any()).dtype == dtype
    assert least(tt.tensors(), lambda x: x.numel() == 0).numel() == 0
    never(tt.tensors((torch.int64,)), lambda x: x.dtype != torch.int64 or x.dim() > 3)


@given(t=tt.trees())
def test_trees_hold_tensors(t):
    leaves = tfn.tree.leaves(t)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    assert_identical(tfn.tree.copy(t), t)


def test_trees_shrink_to_a_leaf_and_come_in_every_kind():
    assert isinstance(least(tt.trees()), torch.Tensor)
    for kind in (dict, list, tuple):
        assert isinstance(least(tt.trees(), lambda t, k=kind: isinstance(t, k) and len(t) > 0), kind)
    assert least(tt.trees(), lambda t: isinstance(t, dict) and any(isinstance(v, dict) for v in t.values()))
    never(tt.trees(max_leaves=2), lambda t: len(tfn.tree.leaves(t)) > 6)
    assert least(tt.trees(st.just(3))) == 3


def test_states_shrink_to_what_init_returns():
    state = least(tt.states())
    assert int(state.step) == 0
    adamw = tfn.optim.adamw(1e-2)
    assert_identical(least(tt.states({"w": torch.ones(2)}, adamw)), tfn.init({"w": torch.ones(2)}, adamw, seed=0))


@given(state=tt.states({"w": torch.ones(2)}, tfn.optim.adam(0.1), max_steps=2))
def test_states_are_in_training(state):
    assert 0 <= int(state.step) <= 2
    moved = not torch.equal(state.params["w"], torch.ones(2))
    assert moved == (int(state.step) > 0)
    tt.check_dtype_stable(
        tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), tfn.optim.adam(0.1)), state, torch.ones(2)
    )


@given(schedule=tt.schedules(total_steps=8), n=st.integers(0, 30))
def test_schedules_are_rates(schedule, n):
    value = schedule(torch.tensor(n))
    assert value.shape == () and value.dtype == torch.float32 and 0 <= value <= 1


def test_schedules_shrink_to_a_constant_and_move():
    steps = [torch.tensor(n) for n in range(9)]
    assert len({float(least(tt.schedules(total_steps=8))(n)) for n in steps}) == 1
    ends = least(tt.schedules(total_steps=8), lambda s: s(steps[8]) < s(steps[7]) and s(steps[1]) > s(steps[0]))
    assert ends(steps[8]) < ends(steps[4])
