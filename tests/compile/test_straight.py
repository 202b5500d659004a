"""Straight code for a structure does what walking over it does."""

import gc
import weakref
from typing import NamedTuple

import pytest
import torch

import trainfn as tfn
from tests.helpers import adamw, generator, quick
from trainfn._compile._donate import DONATED
from trainfn._compile._straight import emptier, maker, taker
from trainfn._compile._structure import Misfit, flatten, structure


class Pair(NamedTuple):
    a: object
    b: object


class Empty(NamedTuple):
    pass


def trees():
    return [
        1,
        {},
        [],
        (),
        Empty(),
        None,
        {"a": 1, "b": 2},
        {"b": 2, "a": 1},
        {"it's": 1, 3: 2, ("x", 1): 3},
        {"a": {"b": 1}, "c": [2, 3]},
        [1, (2, [3], {})],
        Pair({"a": 1}, Pair([2], (3, Empty()))),
        {"p": None, "q": 1},
        {f"n{i}": i for i in range(300)},
    ]


EACH = pytest.mark.parametrize("number", range(len(trees())))


@EACH
def test_a_tree_is_taken_apart_and_made_again(number):
    tree = trees()[number]
    leaves, form = flatten(tree)
    assert taker(form)(tree) == leaves
    made, some = maker(form, [("x", i) for i in range(form.size)], {"x": form.size}, [range(form.size // 2)])(leaves)
    assert (made, structure(made)) == (tree, form) and some == leaves[: form.size // 2]


@EACH
def test_another_tree_does_not_fit(number):
    form = structure(trees()[number])
    for other in trees()[:number] + trees()[number + 1 :]:
        if form == structure(1):
            assert taker(form)(other) == [other]  # whether a leaf is one is not asked
        else:
            with pytest.raises(Misfit):
                taker(form)(other)


@EACH
def test_a_tree_is_emptied(number):
    walked, straight = trees()[number], trees()[number]
    form = structure(walked)
    form.retire(walked)
    emptier(form)(straight)
    assert walked == straight
    assert not isinstance(walked, dict) or all(x is DONATED or not isinstance(x, int) for x in walked.values())


def test_leaves_come_from_several_lists():
    form = structure({"a": 1, "b": [2, 3]})
    make = maker(form, [("y", 0), ("value", "v"), ("x", 1)], {"x": 2, "y": 1}, [range(1, 2), range(2, 3)])
    assert make([1, 2], [3]) == ({"a": 3, "b": ["v", 2]}, ["v"], [2])


@pytest.mark.parametrize("donate", [True, False])
@pytest.mark.parametrize("calls", [0, 2])
def test_a_state_that_nobody_has_is_let_go(donate, calls):
    """A step knows its newest state again, and does not keep it alive."""
    g = generator(0)
    optimizer = adamw()
    state = tfn.init({"w": torch.randn(3, 4, generator=g), "b": torch.randn(4, generator=g)}, optimizer)
    step = quick(tfn.train_step(lambda p, x: tfn.Mean.of((x @ p["w"] + p["b"]).square()), optimizer), donate=donate)
    for _ in range(1 + calls):
        state, _ = step(state, torch.randn(5, 3, generator=g))
    alive = [weakref.ref(x) for x in tfn.tree.leaves(state)]
    del state
    gc.collect()
    assert not any(ref() is not None for ref in alive)
