"""Arithmetic on trees: the same eagerly (optree walks) and compiled (we walk)."""

from collections import OrderedDict
from typing import NamedTuple

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import assert_close, assert_identical
from trainfn import tree


class Pair(NamedTuple):
    left: object
    right: object


class Empty(NamedTuple):
    pass


leaf = st.integers(-5, 5).map(lambda n: torch.full((2,), float(n)))
names = st.text("abcxyz", min_size=1, max_size=2)


def containers(inner):
    dicts = st.dictionaries(names, inner, max_size=3)
    return st.one_of(
        dicts,
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=2).map(tuple),
        st.builds(Pair, inner, inner),
        st.just(Empty()),
        dicts.map(OrderedDict),
    )


trees = st.recursive(leaf | st.none(), containers, max_leaves=8)


def both(fn):
    """The result, eagerly and as it is when torch traces."""
    eager = fn()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        traced = fn()
    assert optree.tree_structure(eager) == optree.tree_structure(traced)
    assert_identical(eager, traced)
    return eager


@given(t=trees)
def test_map_keeps_structure_and_order(t):
    out = both(lambda: tree.map(lambda x, y: x + y, t, tree.map(lambda x: 2 * x, t)))
    assert optree.tree_structure(out) == optree.tree_structure(t)
    assert_identical(out, optree.tree_map(lambda x: 3 * x, t))


@given(t=trees)
def test_vector_operations_are_maps(t):
    other = tree.map(lambda x: 3 * x + 1, t)
    for got, expected in [
        (both(lambda: tree.add(t, other)), tree.map(lambda x, y: x + y, t, other)),
        (both(lambda: tree.add(t, other, alpha=2.0)), tree.map(lambda x, y: x + 2 * y, t, other)),
        (both(lambda: tree.add(t, 1.5, alpha=2.0)), tree.map(lambda x: x + 3, t)),
        (both(lambda: tree.sub(t, other)), tree.map(lambda x, y: x - y, t, other)),
        (both(lambda: tree.mul(t, other)), tree.map(lambda x, y: x * y, t, other)),
        (both(lambda: tree.mul(t, torch.tensor(2.0))), tree.map(lambda x: 2 * x, t)),
        (both(lambda: tree.div(t, 4.0)), tree.map(lambda x: x / 4, t)),
        (both(lambda: tree.lerp(t, other, 0.25)), tree.map(lambda x, y: x + 0.25 * (y - x), t, other)),
        (both(lambda: tree.addcmul(t, other, other, 0.5)), tree.map(lambda x, y: x + 0.5 * y * y, t, other)),
        (both(lambda: tree.where(torch.tensor(False), t, other)), other),
        (both(lambda: tree.zeros_like(t)), tree.map(lambda x: 0 * x, t)),
    ]:
        assert_close(got, expected)


@given(t=trees)
def test_names_and_leaves(t):
    named = tree.named_leaves(t)
    assert len(named) == len(tree.leaves(t))
    assert all(x is y for x, y in zip(named.values(), tree.leaves(t), strict=True))
    expected = (
        torch.stack([x.double().square().sum() for x in tree.leaves(t)]).sum().sqrt() if named else torch.zeros(())
    )
    assert_close(both(lambda: tree.global_norm(t)).double(), expected.double())


@given(t=trees)
def test_a_copy_shares_no_memory(t):
    copied = tree.copy(t)
    assert_identical(copied, t)
    assert not {x.data_ptr() for x in tree.leaves(copied)} & {x.data_ptr() for x in tree.leaves(t)}


def test_trees_of_another_structure_are_refused():
    x = torch.ones(1)
    for a, b in [
        ({"a": x}, {"b": x}),
        ({"a": x}, {}),
        ([x], [x, x]),
        ((x, x), (x,)),
        (Pair(x, x), (x,)),
        ({"a": [x]}, {"a": []}),
    ]:
        for compiling in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.compiler, "is_compiling", lambda c=compiling: c)
                with pytest.raises(ValueError):
                    tree.map(lambda x, y: x, a, b)
                with pytest.raises(ValueError):
                    tree.add(a, b)


def test_dtypes():
    t = {"a": torch.ones(2), "n": torch.ones(2, dtype=torch.int64)}
    low = tree.cast(t, torch.bfloat16)
    assert low["a"].dtype == torch.bfloat16 and low["n"].dtype == torch.int64
    assert tree.cast_like(low, t)["a"].dtype == torch.float32
    assert tree.global_norm(low["a"]).dtype == torch.float32
    assert tree.zeros_like(t, torch.float64)["n"].dtype == torch.float64


@given(rows=st.integers(1, 12), data=st.data())
def test_split_covers_the_rows_in_order_and_evenly(rows, data):
    num = data.draw(st.integers(1, rows))
    batch = {
        "x": torch.arange(rows),
        "y": [torch.arange(2 * rows).view(rows, 2)],
        "scale": torch.tensor(3.0),
        "name": "b",
    }
    pieces = list(tree.split(batch, num))
    sizes = [len(piece["x"]) for piece, _ in pieces]
    assert len(pieces) == num and max(sizes) - min(sizes) <= 1
    assert torch.equal(torch.cat([piece["x"] for piece, _ in pieces]), batch["x"])
    assert torch.equal(torch.cat([piece["y"][0] for piece, _ in pieces]), batch["y"][0])
    assert [first for _, first in pieces] == [int(piece["x"][0]) for piece, _ in pieces]
    assert all(piece["scale"] == 3 and piece["name"] == "b" for piece, _ in pieces)


def test_rows():
    assert tree.row_count({"a": torch.tensor(1.0), "b": torch.ones(3, 2)}) == 3
    assert tree.row_count(torch.ones(4)) == 4
    assert tree.row_count({"a": torch.tensor(1.0)}) == 1
    assert tree.row_count([]) == 1


def test_patterns():
    assert tree.matches("Blocks.0.LN1.weight", r"ln\d\.weight$") and not tree.matches("head.bias", "weight")


def test_states_of_two_modules_are_not_mapped_together():
    import trainfn as tfn

    one, other = (tfn.init(torch.nn.Linear(2, 1), tfn.optim.sgd(0.1)) for _ in range(2))
    with pytest.raises(
        ValueError, match=r"the states are of two modules.*tfn\.tree\.map\(fn, state\.params, other\.params\)"
    ):
        tree.map(torch.add, one, other)
    with pytest.raises(ValueError, match="the states are of two modules"):
        tree.map(torch.add, {"a": one}, {"a": other})
    with pytest.raises(ValueError, match="Expected an instance of dict"):  # another mistake keeps its own message
        tree.map(torch.add, {"a": one}, [one])
    with pytest.raises(TypeError, match=r"got a dict of 1 states.*state\['a'\], metrics = step\(state\['a'\], batch\)"):
        tfn.train_step(lambda m, x: tfn.Mean.of(m(x)), tfn.optim.sgd(0.1))({"a": one}, torch.ones(1, 2))
    assert_close(tree.map(torch.add, one, one).params, tree.mul(one.params, 2.0))
