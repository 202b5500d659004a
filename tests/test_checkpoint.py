"""Save and restore: identity, resumption, and errors that name the leaf."""

import json

import pytest
import torch
from torch import nn

import trainfn as tfn
from trainfn.errors import CheckpointError, DonatedStateError


class Odd(nn.Module):
    """Tied weights, a buffer, a frozen and an integer parameter, mixed dtypes, a channels-last weight."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.low = nn.Linear(4, 2).to(torch.bfloat16)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.table = nn.Parameter(torch.arange(3), requires_grad=False)
        self.conv = nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.low(self.norm(self.b(self.a(x))).to(torch.bfloat16)).float()


def loss(model, x):
    return tfn.losses.mse(model(x), torch.zeros(len(x), 2))


OPTIMIZERS = {
    "sgd": tfn.optim.sgd(0.1),
    "adamw": tfn.optim.chain(tfn.optim.clip_by_global_norm(1.0), tfn.optim.adamw(1e-2)),
    "partition": tfn.optim.partition(
        {"m": tfn.optim.sgd(0.1, momentum=0.9), "r": tfn.optim.adam(1e-2)}, [("weight", "m"), (".", "r")]
    ),
    "injected": tfn.optim.inject_hyperparams(tfn.optim.adam)(learning_rate=1e-2),
}


def trained(name, model=None, steps=2):
    torch.manual_seed(0)
    optimizer = OPTIMIZERS[name]
    average = tfn.transforms.ema(0.9)
    state = average.init(tfn.init(model or Odd(), optimizer, seed=3))
    step = average(tfn.train_step(loss, optimizer))
    for _ in range(steps):
        state, _ = step(state, torch.randn(5, 4))
    return state, step


def assert_same(a, b):
    left, right = tfn.tree.named_leaves(a), tfn.tree.named_leaves(b)
    assert list(left) == list(right)
    for name, leaf in left.items():
        assert leaf.dtype == right[name].dtype and leaf.stride() == right[name].stride(), name
        assert torch.equal(leaf, right[name]), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restore_is_the_inverse_of_save(name, tmp_path):
    state, _ = trained(name)
    tfn.save(tmp_path / "c", state)
    like = tfn.transforms.ema(0.9).init(tfn.init(Odd(), OPTIMIZERS[name]))
    restored = tfn.restore(tmp_path / "c", like=like)
    assert_same(restored, state)
    assert type(restored) is type(like)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_run_goes_on_bit_for_bit(name, tmp_path):
    model = Odd()
    state, step = trained(name, model)
    tfn.save(tmp_path / "c", state)
    restored = tfn.restore(tmp_path / "c", like=state)
    x = torch.randn(5, 4)
    assert_same(step(restored, x)[0], step(state, x)[0])


def test_the_model_file_has_the_modules_own_names(tmp_path):
    from safetensors.torch import load_file

    state, _ = trained("sgd")
    tfn.save(tmp_path / "c", state)
    stored = load_file(tmp_path / "c" / "model.safetensors")
    assert set(stored) == {k for k in Odd().state_dict() if k != "b.weight"}  # tied: once, under its first name
    assert json.loads((tmp_path / "c" / "state.json").read_text()) == {"format": 1, "step": 2}


def test_saving_again_replaces_and_leaves_nothing_beside(tmp_path):
    state, step = trained("sgd")
    tfn.save(tmp_path / "c", state)
    state, _ = step(state, torch.randn(5, 4))
    tfn.save(tmp_path / "c", state)
    assert_same(tfn.restore(tmp_path / "c", like=state), state)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_restoring_changes_nothing_it_was_given(tmp_path):
    state, _ = trained("adamw")
    tfn.save(tmp_path / "c", state)
    like = tfn.copy(state)
    restored = tfn.restore(tmp_path / "c", like=like)
    for leaf in tfn.tree.leaves(restored):
        leaf.zero_()
    assert_same(like, state)


def test_views_of_one_memory_are_saved_apart(tmp_path):
    both = torch.arange(6.0)
    state = tfn.init({"a": both[:3], "b": both[3:]}, tfn.optim.sgd(0.1), storage="adopt")
    tfn.save(tmp_path / "c", state)
    assert tfn.restore(tmp_path / "c", like=state).params["b"].tolist() == [3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s._replace(params={**s.params, "new": torch.ones(1)}), r"missing in the checkpoint: new"),
        (lambda s: s._replace(params={"a": s.params["a"]}), r"not in the state: b"),
        (
            lambda s: s._replace(params={**s.params, "a": torch.ones(7)}),
            r"shape of a: \[2\] in the checkpoint, \[7\] in the",
        ),
        (
            lambda s: s._replace(params={**s.params, "a": s.params["a"].double()}),
            r"dtype of a: torch.float32 in the check",
        ),
        (lambda s: s._replace(extra={"ema": {"a": torch.ones(2)}}), r"missing in the checkpoint: extra/ema/a"),
    ],
)
def test_what_does_not_fit_is_named(change, match, tmp_path):
    state = tfn.init({"a": torch.ones(2), "b": torch.ones(3)}, tfn.optim.sgd(0.1))
    tfn.save(tmp_path / "c", state)
    with pytest.raises(CheckpointError, match=match):
        tfn.restore(tmp_path / "c", like=change(state))


def test_an_absent_or_damaged_checkpoint_is_said_to_be(tmp_path):
    state = tfn.init({"a": torch.ones(2)}, tfn.optim.sgd(0.1))
    with pytest.raises(CheckpointError, match=r"no checkpoint there"):
        tfn.restore(tmp_path / "nothing", like=state)
    tfn.save(tmp_path / "c", state)
    file = tmp_path / "c" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"the checkpoint is damaged"):
        tfn.restore(tmp_path / "c", like=state)
    tfn.save(tmp_path / "c", state)
    (tmp_path / "c" / "state.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match=r"format 99; this version of trainfn reads 1"):
        tfn.restore(tmp_path / "c", like=state)


def test_a_leaf_that_is_no_tensor_is_refused_before_anything_is_written(tmp_path):
    state = tfn.init({"a": torch.ones(2)}, tfn.optim.sgd(0.1))
    with pytest.raises(TypeError, match=r"state.extra/count is 3, not a tensor"):
        tfn.save(tmp_path / "c", state._replace(extra={"count": 3}))
    assert list(tmp_path.iterdir()) == []


def test_a_donated_state_can_be_neither_saved_nor_filled(tmp_path):
    optimizer = tfn.optim.sgd(0.1)
    state = tfn.init({"a": torch.ones(2)}, optimizer)
    step = tfn.jit(tfn.train_step(lambda p, x: tfn.Mean.of(p["a"] * x), optimizer), donate=True, compile=False)
    new, _ = step(state, torch.ones(2))
    tfn.save(tmp_path / "c", new)
    with pytest.raises(DonatedStateError):
        tfn.save(tmp_path / "d", state)
    with pytest.raises(DonatedStateError):
        tfn.restore(tmp_path / "c", like=state)
