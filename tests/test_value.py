"""States as values: compared, fingerprinted, forked, replayed."""

import pytest
import torch
from hypothesis import given

import trainfn as tfn
import trainfn.testing as tt
from tests.helpers import MLP_NET, adamw

OPTIMIZER = adamw()
STEP = tfn.train_step(MLP_NET.loss, OPTIMIZER)


def state(seed=0):
    return tfn.init(MLP_NET.module(), OPTIMIZER, seed=seed)


@given(tt.trees())
def test_a_copy_is_the_same_and_has_the_same_digest(tree):
    copy = tfn.tree.copy(tree)
    assert not tfn.diff(tree, copy) and "the same to the bit" in repr(tfn.diff(tree, copy))
    assert tfn.digest(tree) == tfn.digest(copy)


@given(tt.trees(), tt.trees())
def test_the_digest_is_equal_exactly_where_there_is_no_difference(a, b):
    assert (tfn.digest(a).leaves == tfn.digest(b).leaves) == (not tfn.diff(a, b))


def test_the_digest_does_not_depend_on_order_or_strides():
    a = {"x": torch.arange(6.0).view(2, 3), "y": torch.ones(1)}
    b = {"y": torch.ones(1), "x": torch.arange(6.0).view(2, 3).t().contiguous().t()}
    assert tfn.digest(a) == tfn.digest(b)
    assert repr(tfn.digest(a)).endswith("2 leaves)")


@pytest.mark.parametrize(
    ("change", "name", "what"),
    [
        (lambda s: s._replace(step=s.step + 1), "step", "0 and 1"),
        (lambda s: s._replace(extra={"n": torch.ones(1)}), "extra/n", "only in the second"),
        (lambda s: s._replace(params=tfn.tree.cast(s.params, torch.float64)),
         "params/layers.0.bias", "float32[8] and float64[8]"),
        (lambda s: s._replace(params={**s.params, "layers.0.bias": s.params["layers.0.bias"] + 1}),
         "params/layers.0.bias", "8 of 8 elements, by up to 1"),
    ],
)  # fmt: skip
def test_differences_are_named(change, name, what):
    found = tfn.diff(state(), change(state()))
    assert what in found[name].what and name in repr(found) and name in found._repr_html_()


def test_a_negative_zero_is_a_difference():
    assert "the sign of a zero" in tfn.diff(torch.tensor([0.0]), torch.tensor([-0.0]))[""].what
    assert tfn.digest(torch.tensor([0.0])) != tfn.digest(torch.tensor([-0.0]))
    assert not tfn.diff(torch.tensor([float("nan")]), torch.tensor([float("nan")]))


def test_forks_are_independent():
    base = state()
    one, two = tfn.fork(base, 1), tfn.fork(base, 2)
    donating = tfn.jit(STEP, compile=False, donate=True)
    left, _ = donating(one, MLP_NET.batch(4))
    right, _ = donating(two, MLP_NET.batch(4))
    assert not tfn.diff(base, state())  # not overwritten
    assert "params/layers.0.weight" in tfn.diff(left, right)  # other dropout
    assert not tfn.diff(tfn.fork(base, 1), tfn.fork(base, 1))


def test_replay_proves_a_run_or_names_what_differs(tmp_path):
    def batch(n):
        return MLP_NET.batch(4, n)

    last = tfn.fit(STEP, state(), batch, until=6, checkpoints=tfn.Checkpoints(tmp_path, every=2))
    seen = []
    again = tfn.replay(tmp_path, 2, 6, step=STEP, batches=batch, like=state(), each=lambda info: seen.append(info.n))
    assert not tfn.diff(again, last) and seen == [3, 4, 5, 6]
    with pytest.raises(tfn.errors.ReplayError, match=r"the state of step 4 differs[\s\S]*params/layers"):
        tfn.replay(tmp_path, 2, 4, step=STEP, batches=lambda n: batch(n + 1), like=state())
    with pytest.raises(tfn.errors.CheckpointError, match="no checkpoint"):
        tfn.replay(tmp_path, 3, 4, step=STEP, batches=batch, like=state())
    with pytest.raises(ValueError, match=r"give an earlier step and a later one"):
        tfn.replay(tmp_path, 4, 4, step=STEP, batches=batch, like=state())
    with pytest.raises(ValueError, match=r"can't be started in the middle"):
        tfn.replay(tmp_path, 2, 4, step=STEP, batches=[batch(2)], like=state())
