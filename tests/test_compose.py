"""Several updates as one step: one clock, and noise of each phase's own."""

import itertools

import pytest
import torch

import trainfn as tfn
from tests.helpers import assert_close, quick

SGD = tfn.optim.sgd(0.05)
X = torch.arange(40.0).reshape(10, 4).sin()
pytestmark = pytest.mark.filterwarnings("ignore::trainfn.errors.UnreachedWarning")  # each phase has its own parameter


def square(p, x):
    return tfn.Mean.of((p["w"] * x - 1) ** 2)


ONE = tfn.train_step(square, SGD)


def twice(state, batch):
    state, _ = ONE(state, batch)
    return ONE(state, batch)


def stuck(state, batch):
    new, metrics = ONE(state, batch)
    return new._replace(step=state.step), metrics


def fresh():
    return tfn.init({"w": torch.zeros(4)}, SGD)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("step", "now"), [(twice, 2), (stuck, 0)])
def test_a_call_that_is_not_one_step_is_an_error_at_the_first(step, now, compiled):
    asked = []

    def batches(n):
        asked.append(n)
        return X[n]

    step = quick(step, dynamic=False) if compiled else step
    match = rf"state\.step from 0 to {now}, and a call is one step.*tfn\.one_step\(function\)"
    for run in (
        lambda: tfn.fit(step, fresh(), batches, until=6),
        lambda: list(tfn.steps(step, fresh(), batches, until=6)),
    ):
        asked.clear()
        with pytest.raises(ValueError, match=match):
            run()
        assert asked == [0]


def test_a_later_call_that_is_not_one_step_is_an_error_too():
    def sometimes(state, batch):
        return (twice if int(state.step) == 3 else ONE)(state, batch)

    with pytest.raises(ValueError, match=r"from 3 to 5"):
        tfn.fit(sometimes, fresh(), lambda n: X[n], until=6)


def by_hand(calls, updates):
    """The plain loop: so many updates of SGD for each batch."""
    w = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([w], 0.05)
    for n, _ in itertools.product(range(calls), range(updates)):
        optimizer.zero_grad()
        ((w * X[n] - 1) ** 2).mean().backward()
        optimizer.step()
    return w.detach()


@pytest.mark.parametrize("compiled", [False, True])
def test_two_updates_are_one_step_of_a_run_that_is_resumed(compiled, tmp_path):
    seen, counted = [], []

    def batches(n):
        seen.append(n)
        return X[n]

    step = tfn.one_step(twice)
    step = tfn.jit(step, donate=True, compile=False) if not compiled else quick(step, dynamic=False)
    checkpoints = lambda: tfn.Checkpoints(tmp_path, every=1)  # noqa: E731
    for until in (3, 6, 9):
        state = tfn.fit(
            step,
            fresh(),
            batches,
            until=until,
            checkpoints=checkpoints(),
            callbacks=[lambda info: counted.append(info.n)],
        )
    assert seen == list(range(9)) and counted == list(range(1, 10))
    assert int(state.step) == 9 and checkpoints().steps()[-1] == 9
    assert_close(state.params["w"], by_hand(9, 2), 1e-6)


def phase(name, seen):
    def loss(p, x):
        z = torch.randn(4)
        seen.append(z)
        return tfn.Mean.of(p[name] * z)

    return tfn.train_step(loss, SGD)


def in_turn(d, g):
    def both(state, batch):
        state, _ = d(state, batch)
        return g(state, batch)

    return both


def set_back(d, g):
    def both(state, batch):
        new, _ = d(state, batch)
        return g(new._replace(step=state.step), batch)

    return both


def set_back_after(d, g):
    def both(state, batch):
        new, _ = d(state, batch)
        last, metrics = g(new, batch)
        return last._replace(step=new.step), metrics

    return both


@pytest.mark.parametrize("compose", [in_turn, set_back, set_back_after])
def test_no_two_phases_of_any_steps_draw_the_same(compose):
    seen = []
    step = tfn.one_step(compose(phase("d", seen), phase("g", seen)))
    state = tfn.init({"d": torch.ones(1), "g": torch.ones(1)}, SGD)
    key = state.key
    state = tfn.fit(step, state, [X[0]] * 5)
    assert len({tuple(z.tolist()) for z in seen}) == 10
    assert torch.equal(state.key, key) and int(state.step) == 5


def test_a_compiled_composition_draws_what_the_eager_one_draws():
    found = []
    for way in (lambda step: step, lambda step: quick(step, dynamic=False)):
        step = way(tfn.one_step(set_back(phase("d", []), phase("g", []))))
        state = tfn.init({"d": torch.ones(1), "g": torch.ones(1)}, SGD)
        found.append(tfn.fit(step, state, [X[0]] * 3).params)
    assert_close(*found, 1e-6)


def test_compiled_phases_keep_the_draws_that_they_have_alone():
    """A phase that is compiled inside a composition is the same program outside."""
    alone, inside = (tfn.jit(phase("d", []), backend="eager") for _ in range(2))
    step = tfn.one_step(in_turn(phase("g", []), inside))
    state = tfn.init({"d": torch.ones(1), "g": torch.ones(1)}, SGD)
    step(state, X[0])
    assert_close(inside(state, X[0])[0].params, alone(state, X[0])[0].params)
