"""A whole step as one launch: what goes in and comes out around it. The kernels themselves: `tests/test_device.py`."""

import pytest
import torch
from torch import Tensor

import trainfn as tfn
from tests.helpers import MLP_NET, adamw, assert_identical, quick
from trainfn._compile._launch import Launches

pytestmark = pytest.mark.usefixtures("untouched_rng")


class Again:
    """Stands for a CUDA graph: recording computes nothing, a launch computes into the recorded places."""

    def __init__(self, fixed):
        self.fixed = fixed  # what a donating step overwrites

    def record(self, fn):
        before = [x.clone() for x in self.fixed]
        self.fn, self.out = fn, fn()
        for x, old in zip(self.fixed, before, strict=True):
            x.copy_(old)
        return self.out

    def launch(self):
        for place, new in zip(tfn.tree.leaves(self.out), tfn.tree.leaves(self.fn()), strict=True):
            if isinstance(place, Tensor) and place is not new:
                place.copy_(new)


def launched(state, *, donate, accumulate=1):
    step = quick(tfn.train_step(MLP_NET.loss, adamw(), accumulate=accumulate), donate=donate)
    made, fixed = [], tfn.tree.leaves(state)

    def recorder():
        made.append(Again(fixed))
        return made[-1]

    step._run = Launches(step._run, step._programs, donate=donate, recorder=recorder, device="cpu")
    return step, made


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_launches_give_the_bits_of_single_calls(donate, accumulate):
    first = tfn.init(MLP_NET.module(), adamw(), seed=3)
    state, twin = tfn.copy(first), first
    step, made = launched(state, donate=donate, accumulate=accumulate)
    eager = step.step
    kept = []
    for n in range(6):
        state, metrics = step(state, MLP_NET.batch(4, n))
        twin, expected = eager(twin, MLP_NET.batch(4, n))
        assert_identical(state, twin)
        kept.append((metrics, expected))
    for metrics, expected in kept:  # later launches leave what was returned alone
        assert_identical(metrics, expected)
    assert len(made) == 1


def test_a_donated_state_is_dead_after_a_launch():
    state = tfn.init(MLP_NET.module(), adamw())
    step, made = launched(state, donate=True)
    for n in range(4):
        old = state
        state, _ = step(state, MLP_NET.batch(4, n))
    assert len(made) == 1
    with pytest.raises(tfn.errors.DonatedStateError):
        step(old, MLP_NET.batch(4))


def test_what_changed_outside_ends_a_recording():
    module = MLP_NET.module()
    state = tfn.init(module, adamw())
    step, made = launched(state, donate=True)
    for n in range(4):
        state, _ = step(state, MLP_NET.batch(4, n))
    module.layers[2].p = 0.5
    eager = step.step
    expected, _ = eager(tfn.copy(state), MLP_NET.batch(4))
    state, _ = step(state, MLP_NET.batch(4))
    assert_identical(state, expected)
    assert len(made) == 1 and step.explain().graphs == 2


def test_a_batch_on_another_device_runs_as_it_is():
    state = tfn.init(MLP_NET.module(), adamw())
    step = quick(tfn.train_step(MLP_NET.loss, adamw()), donate=True)
    step._run = Launches(step._run, step._programs, donate=True, device="cuda")
    for n in range(4):
        state, _ = step(state, MLP_NET.batch(4, n))
    assert int(state.step) == 4 and torch.isfinite(next(iter(state.params.values()))).all()
