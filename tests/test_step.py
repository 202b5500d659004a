"""The step is a pure function, exact for every split of its rows, and equal to the loop written by hand."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import trainfn as tfn
from tests.helpers import (
    CONV_NET,
    EACH_NET,
    GPT_NET,
    MIXED_NET,
    MLP_NET,
    NETS,
    adamw,
    assert_close,
    assert_identical,
    cross_entropy,
    quick,
    seeded,
)

pytestmark = pytest.mark.usefixtures("untouched_rng")

ROWWISE = pytest.mark.parametrize("net", [pytest.param(net, id=net.name) for net in NETS if net.rowwise])
SGD = tfn.optim.sgd(0.5)
# Sums of the same fp32 numbers in another order, relative to a leaf's largest element. Products of one row and of two
# are computed by different kernels: of 200 examples the worst differed by 1.02e-6, with torch 2.12.
TOLERANCE = 2e-6


def split_rows(draw_sizes):
    return [slice(sum(draw_sizes[:i]), sum(draw_sizes[: i + 1])) for i in range(len(draw_sizes))]


def cut(batch, piece):
    return {name: x[piece] for name, x in batch.items()}


def without_low_precision(tree):
    """A bf16 gradient is rounded once for each micro-batch, so it is compared apart, to bf16's own precision."""
    leaves = tfn.tree.named_leaves(tree).items()
    return {n: x for n, x in leaves if "low." not in n and "grad_norm" not in n}


def check_split(net, whole, pieces):
    """Both are ``(state, metrics)`` or `Gradients`."""
    if net is MIXED_NET:
        assert_close(pieces, whole, 1e-2, dtype=False)
        pieces, whole = without_low_precision(pieces), without_low_precision(whole)
    assert_close(pieces, whole, TOLERANCE)


# --- accumulation -------------------------------------------------------------------------------------------------


@ROWWISE
@given(data=st.data(), rows=st.integers(1, 9), seed=st.integers(0, 2**20))
def test_accumulation_equals_one_batch(net, data, rows, seed):
    """With dropout on, targets masked unevenly, and sizes that do not divide: draws belong to rows, not to calls."""
    num = data.draw(st.integers(1, rows), label="num")
    batch = net.batch(rows, seed)
    state = tfn.init(net.module(dropout=0.3), SGD, seed=seed)
    step = tfn.train_step(net.loss, SGD)
    check_split(net, step(state, batch), without_calls(tfn.accumulate(step, num)(state, batch), num))
    gradients = tfn.value_and_grad(net.loss)
    whole, pieces = gradients(state, batch), tfn.accumulate(gradients, num)(state, batch)
    check_split(net, whole._replace(buffers={}), pieces._replace(buffers={}))


def without_calls(result, num):
    """`Mixed` counts its forward passes: one for each micro-batch."""
    state, metrics = result
    if "calls" in state.buffers:
        state = state._replace(buffers={**state.buffers, "calls": state.buffers["calls"] - (num - 1)})
    return state, metrics


@ROWWISE
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 2**20))
def test_a_stream_of_uneven_micro_batches_equals_one_batch(net, sizes, seed):
    batch = net.batch(sum(sizes), seed)
    state = tfn.init(net.module(dropout=0.3), SGD, seed=seed)
    step = tfn.train_step(net.loss, SGD)
    stream = (cut(batch, piece) for piece in split_rows(sizes))
    got = tfn.train_step(net.loss, SGD, accumulate="stream")(state, stream)
    check_split(net, step(state, batch), without_calls(got, len(sizes)))


def test_compiled_accumulation_equals_one_eager_batch():
    """Uneven, masked, with dropout: the whole path at once, over several steps of AdamW."""
    net, optimizer = GPT_NET, adamw()
    step = tfn.train_step(net.loss, optimizer)
    many = quick(tfn.accumulate(step, 2), dynamic=False)
    state = twin = tfn.init(net.module(), optimizer)
    for n in range(3):
        state, metrics = many(state, net.batch(5, n))
        twin, expected = step(twin, net.batch(5, n))
        assert_close(metrics["loss"], expected["loss"], TOLERANCE)
        assert_close(state.params, twin.params, 1e-5)  # of a step of 1e-2: Adam divides small gradients by themselves


def test_a_micro_batch_without_a_single_target_weighs_nothing():
    net = MLP_NET
    batch = net.batch(6)
    batch["y"][:3] = -100
    state = tfn.init(net.module(), SGD)
    step = tfn.train_step(net.loss, SGD)
    assert_close(step(state, batch), tfn.accumulate(step, 2)(state, batch), TOLERANCE)


def test_a_batch_without_a_single_target_changes_no_parameter():
    net = MLP_NET
    batch = net.batch(4)
    batch["y"][:] = -100
    state = tfn.init(net.module(), SGD)
    new, metrics = tfn.train_step(net.loss, SGD)(state, batch)
    assert_identical(new.params, state.params)
    assert metrics["loss"].weight == 0 and metrics["grad_norm"].value == 0 and new.step == 1


def test_low_precision_gradients_are_added_in_float32():
    """256 micro-batches of gradient 1 add up to 256 in float32; in bfloat16, 257 would already be lost."""
    state = tfn.init({"w": torch.zeros(1, dtype=torch.bfloat16)}, SGD)
    gradients = tfn.value_and_grad(lambda p, x: tfn.Mean.of(p["w"] * x))
    total = tfn.accumulate(gradients, 300)(state, torch.ones(300, dtype=torch.bfloat16))
    assert total.grads["w"].item() == 300 and total.grads["w"].dtype == torch.float32
    new, _ = tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), SGD, accumulate=300)(
        state, torch.ones(300, dtype=torch.bfloat16)
    )
    assert new.params["w"].dtype == torch.bfloat16 and new.params["w"].item() == -0.5


@pytest.mark.parametrize("k", [1, 2, 3])
def test_batchnorm_buffers_are_those_of_the_micro_batches_in_sequence(k):
    net = CONV_NET
    module, twin = net.module(dropout=0.0), net.module(dropout=0.0)
    batch = net.batch(7)
    state, metrics = tfn.train_step(net.loss, SGD, accumulate=k)(tfn.init(module, SGD), batch)
    total = torch.zeros(())
    for piece, _ in tfn.tree.split(batch, k):
        loss = F.cross_entropy(twin(piece["x"]), piece["y"], reduction="sum", ignore_index=-100)
        total += loss.detach()
        loss.backward()
    assert_identical(state.buffers, dict(twin.named_buffers()))
    assert_close(metrics["loss"].total, total)
    weight = (batch["y"] != -100).sum()
    assert_close(state.params, {name: p.detach() - 0.5 * p.grad / weight for name, p in twin.named_parameters()})


def plain(state, batch):
    return state, {}


def test_accumulation_is_checked():
    net = MLP_NET
    state = tfn.init(net.module(), SGD)
    for num in (0, -1, 2.0, True, "all"):
        with pytest.raises(ValueError, match=r'accumulate=.*: give a number of micro-batches, 1 or more, or "stream"'):
            tfn.train_step(net.loss, SGD, accumulate=num)
    with pytest.raises(TypeError, match=r"accumulate\(plain, num\).*tfn\.train_step\(loss, optimizer, accumulate=2\)"):
        tfn.accumulate(plain, 2)
    with pytest.raises(ValueError, match=r"accumulate=4 needs at least 4 rows, and this batch has 3"):
        tfn.train_step(net.loss, SGD, accumulate=4)(state, net.batch(3))
    with pytest.raises(ValueError, match=r"batch\['y'\] 2, with the shape \[2\]"):
        tfn.train_step(net.loss, SGD, accumulate=2)(state, {**net.batch(4), "y": net.batch(2)["y"]})
    with pytest.raises(ValueError, match="the stream of micro-batches was empty"):
        tfn.train_step(net.loss, SGD, accumulate="stream")(state, iter([]))
    with pytest.raises(TypeError, match=r"takes the transform that `init` was given.*not SGD"):
        tfn.train_step(net.loss, torch.optim.SGD(net.module().parameters()))


# --- purity -------------------------------------------------------------------------------------------------------


@EACH_NET
@pytest.mark.parametrize("k", [1, 2])
def test_the_same_state_and_batch_give_the_same_bits(net, k):
    step = tfn.train_step(net.loss, adamw(), accumulate=k)
    state = tfn.init(net.module(), adamw())
    before = tfn.copy(state)
    one = step(state, net.batch(4))
    torch.rand(3)  # the global generator has moved on
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        two = step(state, net.batch(4))
    torch.set_rng_state(RNG)
    assert_identical(two, one)
    assert_identical(state, before)
    other = step(state._replace(key=tfn.random.key(5)), net.batch(4))
    assert not torch.equal(other[1]["grad_norm"].total, one[1]["grad_norm"].total)  # dropout is on


@pytest.fixture(autouse=True)
def _remember_rng():
    global RNG
    RNG = torch.get_rng_state()


def snapshot(module):
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return (
        {name: (id(t), t.data_ptr(), t.clone(), t.requires_grad, t.grad) for name, t in tensors.items()},
        [
            (id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m.__dict__))
            for m in module.modules()
        ],
        {name: type(m) for name, m in module.named_modules()},
    )


def assert_untouched(module, before):
    tensors, modes, types = snapshot(module)
    assert modes == before[1] and types == before[2] and tensors.keys() == before[0].keys()
    for name, (identity, pointer, value, requires_grad, grad) in tensors.items():
        assert (identity, pointer, requires_grad, grad) == tuple(before[0][name][i] for i in (0, 1, 3, 4)), name
        assert torch.equal(value, before[0][name][2]), name


class Interrupted(Exception):
    pass


@EACH_NET
@pytest.mark.parametrize("error", [None, Interrupted, KeyboardInterrupt])
@pytest.mark.parametrize("training", [True, False])
def test_the_module_is_never_changed(net, error, training):
    """Nor the generators, the warnings, the modes (see conftest.py): after success, an error, and Ctrl-C."""
    module = net.module().train(training)
    module.register_forward_hook(lambda *_: None)

    def loss(model, batch):
        out = net.loss(model, batch)
        if error is not None:
            raise error("in the loss")
        return out

    before = snapshot(module)
    generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    state = tfn.init(module, adamw())
    for step in (tfn.train_step(loss, adamw()), tfn.train_step(loss, adamw(), accumulate=2), tfn.eval_step(loss)):
        if error is None:
            step(state, net.batch(4))
        else:
            with pytest.raises(error, match="in the loss"):
                step(state, net.batch(4))
        assert_untouched(module, before)
        assert torch.equal(torch.get_rng_state(), generators[0])
        assert (np.random.get_state()[1] == generators[1]).all() and random.getstate() == generators[2]
        assert torch.is_grad_enabled()


def test_what_a_module_keeps_between_calls_is_not_left_behind():
    """A tensor that a forward pass puts in the place of a buffer is state; the module has its own one back."""

    class Replaces(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))
            self.register_buffer("last", torch.zeros(2))

        def forward(self, x):
            self.last = (self.last + x * self.w).detach()
            return x * self.w

    module = Replaces()
    state = tfn.init(module, SGD)
    step = tfn.train_step(lambda m, x: tfn.Mean.of(m(x)), SGD)
    state, _ = step(state, torch.ones(2))
    assert state.buffers["last"].tolist() == [1, 1] and module.last.tolist() == [0, 0]
    assert not state.buffers["last"].requires_grad


# --- by hand ------------------------------------------------------------------------------------------------------


def by_hand(net, module, steps, lr_lambda=None):
    """The loop of a PyTorch tutorial: AdamW, clipping, a schedule. Yields the parameters after each step."""
    params = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda or (lambda _: 1.0))
    module.train()
    for n in range(steps):
        batch = net.batch(8, n)
        optimizer.zero_grad()
        logits = module(batch["x"])
        F.cross_entropy(logits.flatten(0, -2), batch["y"].flatten(), ignore_index=-100).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
    return module


@EACH_NET
@pytest.mark.parametrize("scheduled", [False, True])
def test_twenty_steps_equal_a_loop_written_by_hand(net, scheduled):
    if scheduled:
        factor = lambda n: (n + 1) / 10 if n < 9 else 0.5 ** ((n - 9) / 10)  # noqa: E731
        lr = lambda step: 1e-2 * torch.where(step < 9, (step + 1) / 10, 0.5 ** ((step - 9) / 10))  # noqa: E731
    else:
        factor, lr = None, 1e-2
    optimizer = adamw(lr)
    module = net.module(dropout=0.0)
    if net is MIXED_NET:
        module.low.float()  # torch's AdamW keeps bf16 moments, ours fp32 ones; the forward pass stays mixed
        module.low.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    state, step = tfn.init(module, optimizer), tfn.train_step(net.loss, optimizer)
    for n in range(20):
        state, _ = step(state, net.batch(8, n))
    expected = by_hand(net, module, 20, factor)
    assert_close(state.params, {n: p.detach() for n, p in expected.named_parameters() if n in state.params}, 1e-6)
    assert_close(state.buffers, {n: b.detach() for n, b in everything_else(expected, state)}, 1e-6)


def everything_else(module, state):
    named = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    return [(name, named[name]) for name in state.buffers]


def test_training_learns():
    net, optimizer = GPT_NET, adamw(3e-2)
    step, state = tfn.train_step(net.loss, optimizer), tfn.init(net.module(dropout=0.0), adamw(3e-2))
    losses = []
    for _ in range(60):
        state, metrics = step(state, net.batch(8, 0))
        losses.append(metrics["loss"].value.item())
    assert losses[-1] < 0.3 * losses[0]


# --- checkpointed modules -----------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, active):
        super().__init__()
        self.active = active
        self.first = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 4))
        self.second = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.GELU(), nn.Linear(16, 3))

    def forward(self, x):
        for part in (self.first, self.second):
            x = checkpoint(part, x, use_reentrant=False) if self.active else part(x)
        return x


def test_checkpointed_modules_recompute_the_same_dropout():
    results = []
    for active in (False, True):
        state = tfn.init(seeded(lambda active=active: Checkpointed(active)), SGD)
        results.append(tfn.value_and_grad(cross_entropy)(state, MLP_NET.batch(6)))
        for compile in (False, True):
            step = quick(tfn.train_step(cross_entropy, SGD, accumulate=2), compile=compile)
            results.append(step(state, MLP_NET.batch(6)))
    assert_identical(results[3], results[0])
    for other in (results[2], results[4], results[5]):
        assert_close(other, results[1])


def test_backward_recomputes_the_same_dropout():
    """For users of `keyed` who call `backward` themselves."""
    grads = []
    for active in (False, True):
        module, batch = seeded(lambda active=active: Checkpointed(active)), MLP_NET.batch(6)
        with tfn.keyed(tfn.random.key(1)):
            cross_entropy(module, batch)[0].total.backward()
        grads.append([p.grad for p in module.parameters()])
    assert_close(grads[1], grads[0])


# --- evaluation ---------------------------------------------------------------------------------------------------


@EACH_NET
def test_evaluation_is_the_module_in_eval_mode(net):
    module = net.module()
    state = tfn.init(module, SGD)
    before = tfn.copy(state)
    metrics = tfn.eval_step(net.loss)(state, net.batch(6))
    assert_identical(state, before)
    assert_identical(metrics, tfn.eval_step(net.loss)(state._replace(key=tfn.random.key(8)), net.batch(6)))
    module.eval()
    with torch.no_grad():
        expected, more = net.loss(module, net.batch(6))
    assert_identical(metrics, {"loss": expected, **more})
    assert not any(mean.total.requires_grad for mean in metrics.values())


def test_evaluation_does_not_keep_what_a_module_writes():
    """A buffer written in eval mode is not kept: an evaluation changes nothing."""

    class Counts(nn.Linear):
        def __init__(self):
            super().__init__(2, 1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    module = seeded(Counts)
    state = tfn.init(module, SGD)
    evaluate = tfn.eval_step(lambda m, x: tfn.Mean.of(m(x) * m.calls))
    one, two = evaluate(state, torch.ones(3, 2)), evaluate(state, torch.ones(3, 2))
    assert_identical(one, two)
    assert state.buffers["calls"] == 0 and module.calls == 0


def test_means_of_pieces_add_up_to_the_mean_of_all():
    net = GPT_NET
    state, evaluate = tfn.init(net.module(), SGD), tfn.eval_step(net.loss)
    batch = net.batch(7)
    whole = evaluate(state, batch)
    parts = [evaluate(state, cut(batch, piece)) for piece in split_rows([1, 4, 2])]
    assert_close({name: sum(part[name] for part in parts) for name in whole}, whole)


def test_a_step_says_what_is_wrong_with_its_state():
    with torch.random.fork_rng():
        model = torch.nn.Linear(2, 1)
    sgd, adam = tfn.optim.sgd(0.1), tfn.optim.adamw(1e-3)
    state, x = tfn.init(model, sgd), torch.ones(3, 2)

    def loss(model, x):
        return tfn.Mean.of(model(x))

    with pytest.raises(TypeError, match=r"got a Linear for the state.*tfn.init\(model, optimizer\)"):
        tfn.train_step(loss, sgd)(model, x)
    with pytest.raises(TypeError, match=r"got a Linear for the state"):
        tfn.eval_step(loss)(model, x)
    with pytest.raises(ValueError, match=r"Give `init` and `train_step` the same optimizer"):
        tfn.train_step(loss, adam)(state, x)
    with pytest.raises(ValueError, match=r"the module's 'weight' is in neither state.params nor state.buffers"):
        tfn.train_step(loss, sgd)(state._replace(params={"bias": state.params["bias"]}), x)
    compiled = tfn.jit(tfn.train_step(loss, adam), backend="aot_eager")
    with pytest.raises(ValueError, match=r"Give `init` and `train_step` the same optimizer"):
        compiled(state, x)
