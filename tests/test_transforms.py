"""Step transforms: what they compute, how they compose, what they cost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import trainfn as tfn
from tests.helpers import CONV_NET, MLP_NET, adamw, assert_close, assert_identical, quick
from trainfn.testing import check_step
from trainfn.transforms import after, dynamic_loss_scale, ema, skip_nonfinite

pytestmark = pytest.mark.usefixtures("untouched_rng")

SGD = tfn.optim.sgd(0.5, momentum=0.9)


def linear():
    state = tfn.init({"w": torch.tensor([4.0, -2.0])}, SGD)
    return state, tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), SGD)


TRANSFORMS = {"ema": ema(0.9), "skip_nonfinite": skip_nonfinite(), "loss_scale": dynamic_loss_scale()}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_every_law_of_a_step(transform, accumulate):
    net, optimizer = MLP_NET, adamw()
    step = transform(tfn.train_step(net.loss, optimizer, accumulate=accumulate))
    assert len(check_step(step, transform.init(tfn.init(net.module(), optimizer)), net.batch(4)).held) == 9


# --- ema ----------------------------------------------------------------------------------------------------------


@given(decay=st.floats(0.0, 0.999), steps=st.integers(1, 6))
def test_ema_equals_its_formula(decay, steps):
    state, step = linear()
    average = ema(decay)
    state, step = average.init(state), average(step)
    expected = state.params["w"].double()
    for n in range(steps):
        state, _ = step(state, torch.full((2, 2), float(n)))
        expected = decay * expected + (1 - decay) * state.params["w"].double()
    assert_close(state.extra["ema"]["w"], expected, 1e-6, dtype=False)


def test_two_averages_and_their_evaluation():
    net = MLP_NET
    fast, slow = ema(0.5, name="fast"), ema(0.9, name="slow")
    state = slow.init(fast.init(tfn.init(net.module(), SGD)))
    step = slow(fast(tfn.train_step(net.loss, SGD)))
    new, _ = step(state, net.batch(4))
    for name, decay in (("fast", 0.5), ("slow", 0.9)):
        assert_close(new.extra[name], tfn.tree.lerp(state.params, new.params, 1 - decay))
    metrics = tfn.eval_step(net.loss)(new._replace(params=new.extra["slow"]), net.batch(4))
    assert metrics["loss"].value.isfinite()
    assert "extra=['fast', 'slow']" in repr(new)


def test_ema_is_checked():
    for decay in (1.0, -0.1, 2.0):
        with pytest.raises(ValueError, match=r"ema\(decay=.*\): the decay is in \[0, 1\)"):
            ema(decay)
    state, step = linear()
    with pytest.raises(
        ValueError, match=r"state\.extra has no 'ema'.*`state = tfn\.transforms\.ema\(0\.9\)\.init\(state\)`"
    ):
        ema(0.9)(step)(state, torch.ones(2))


# --- skip_nonfinite -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("compile", [True, False])
def test_a_nonfinite_step_changes_only_the_count(bad, compile):
    net, optimizer = CONV_NET, adamw()
    state = tfn.init(net.module(0.0), optimizer)
    step = quick(skip_nonfinite()(tfn.train_step(net.loss, optimizer)), compile=compile)
    plain = tfn.train_step(net.loss, optimizer)
    good, metrics = step(state, net.batch(4))
    expected, _ = plain(state, net.batch(4))
    assert_identical(good, expected)
    assert metrics["skipped"].value == 0
    batch = net.batch(4)
    batch["x"][0] = bad
    after_bad, metrics = step(good, batch)
    assert_identical(after_bad._replace(step=good.step), good)
    assert after_bad.step == 2 and metrics["skipped"].value == 1 and not metrics["loss"].value.isfinite()
    again, metrics = step(after_bad, net.batch(4, 1))
    expected, _ = plain(good._replace(step=torch.tensor(2)), net.batch(4, 1))
    assert_identical(again, expected)
    assert metrics["skipped"].value == 0


def test_a_finite_loss_with_an_infinite_gradient_is_skipped():
    state = tfn.init({"w": torch.tensor([0.0])}, SGD)
    step = skip_nonfinite()(tfn.train_step(lambda p, x: tfn.Mean.of(p["w"].sqrt() * x), SGD))
    new, metrics = step(state, torch.ones(2))
    assert metrics["loss"].value == 0 and metrics["skipped"].value == 1 and new.params["w"] == 0


# --- composition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["before", "after"])
def test_transforms_compose_with_accumulation_in_any_order(order):
    """And cost no graph: gradients and update, whatever wraps the update."""
    net, average = MLP_NET, ema(0.5)
    state = average.init(tfn.init(net.module(), SGD))
    step = tfn.train_step(net.loss, SGD)
    if order == "before":
        wrapped = tfn.accumulate(average(skip_nonfinite()(step)), 2)
    else:
        wrapped = average(skip_nonfinite()(tfn.accumulate(step, 2)))
    assert isinstance(wrapped, tfn.TrainStep) and wrapped.accumulate == 2
    compiled = quick(wrapped)
    got, twin = state, state
    for n in range(2):
        got, metrics = compiled(got, net.batch(6, n))
        twin, expected = average(skip_nonfinite()(step))(twin, net.batch(6, n))
        assert_close((got, metrics), (twin, expected))
    assert compiled.explain().graphs == 2


def test_the_outer_transform_sees_what_the_inner_one_made():
    """An average outside of a skip averages the parameters that stayed; inside, those that were skipped: NaN."""
    average = ema(0.5)
    state, step = linear()
    state = average.init(state)
    bad = torch.tensor([float("nan"), 1.0])
    outside, _ = average(skip_nonfinite()(step))(state, bad)
    assert_identical(outside.extra["ema"], state.params)
    inside, _ = skip_nonfinite()(average(step))(state, bad)
    assert_identical(inside.extra["ema"], state.extra["ema"])


def test_after_wraps_a_step_or_any_function():
    def double(old, new, metrics):
        return new._replace(params=tfn.tree.mul(new.params, 2.0)), {**metrics, "was": tfn.Mean.of(old.params["w"])}

    state, step = linear()
    plain, metrics = step(state, torch.ones(2))
    for wrapped in (after(double)(step), after(double)(lambda s, b: step(s, b)), quick(after(double)(step))):
        new, more = wrapped(state, torch.ones(2))
        assert_identical(new.params, tfn.tree.mul(plain.params, 2.0))
        assert list(more) == [*metrics, "was"] and more["was"].value == 1.0


# --- dynamic_loss_scale -------------------------------------------------------------------------------------------


def test_a_scaled_loss_gives_the_same_update():
    """Powers of two divide out exactly."""
    net, optimizer = MLP_NET, adamw()
    scaling = dynamic_loss_scale()
    step = tfn.train_step(net.loss, optimizer, accumulate=2)
    plain = tfn.init(net.module(), optimizer)
    scaled, expected = scaling.init(plain), plain
    for n in range(3):
        scaled, metrics = scaling(step)(scaled, net.batch(4, n))
        expected, wanted = step(expected, net.batch(4, n))
    assert_identical(scaled._replace(extra={}), expected)
    assert_identical(metrics["grad_norm"], wanted["grad_norm"])
    assert metrics["loss_scale"].value == 2.0**16


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_the_scale_is_that_of_torchs_grad_scaler(good):
    """As `torch.amp.GradScaler` has it, with the same factors and interval."""
    scaling = dynamic_loss_scale(8.0, growth_interval=2)
    state, step = linear()
    state, step = scaling.init(state), scaling(step)
    scale, tracker = torch.tensor(8.0), torch.tensor(0, dtype=torch.int32)
    for fine in good:
        before = state
        state, _ = step(state, torch.full((2, 2), 1.0 if fine else float("nan")))
        torch._amp_update_scale_(scale, tracker, torch.tensor(0.0 if fine else 1.0), 2.0, 0.5, 2)
        assert state.extra["loss_scale"]["scale"] == scale
        assert fine or not tfn.diff(before.params, state.params)


@pytest.mark.parametrize("how", ["number", "list", "iterator", "fit"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_micro_batches_are_scaled_as_those_of_grad_scaler(k, how):
    """Overflows of float16 are skipped at the same updates, whatever the split."""

    def mean(w, x):
        return (w.half() * x.half()).float().square()

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    w = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([w], 0.01)
    scaling = dynamic_loss_scale(2.0**22)
    sgd = tfn.optim.sgd(0.01)
    given = {"number": k}.get(how, "stream")
    step = scaling(tfn.train_step(lambda p, x: tfn.Mean.of(mean(p["w"], x)), sgd, accumulate=given))
    state, batch, skips = scaling.init(tfn.init({"w": torch.ones(4)}, sgd)), torch.full((8, 4), 8.0), 0
    for _ in range(8):
        optimizer.zero_grad()
        for micro in batch.chunk(k):
            scaler.scale(mean(w, micro).mean() / k).backward()
        scaler.step(optimizer)
        scaler.update()
        parts = list(batch.chunk(k))
        if how == "fit":
            state = tfn.fit(step, state, [iter(parts)])
        else:
            state, metrics = step(state, {"number": batch, "list": parts, "iterator": iter(parts)}[how])
            skips += int(metrics["skipped"].value)
        assert state.extra["loss_scale"]["scale"] == scaler.get_scale()
    assert_close(state.params["w"], w.detach(), 1e-6)
    assert scaler.get_scale() < 2.0**22 and (how == "fit" or skips > 0)


def test_small_float16_gradients_survive():
    """1e-4 twice is below what float16 can hold."""

    def loss(p, x):
        small = torch.tensor(1e-4, dtype=torch.float16)
        return tfn.Mean.of(((p["w"] * x).half() * small * small).float())

    optimizer, x = tfn.optim.sgd(1.0), torch.full((64,), 1e-3)
    state = tfn.init({"w": torch.tensor([1.0])}, optimizer)
    assert tfn.value_and_grad(loss)(state, x).grads["w"] == 0
    scaled = tfn.value_and_grad(loss)(dynamic_loss_scale().init(state), x).grads["w"]
    assert float(scaled) == pytest.approx(64 * 1e-3 * 1e-8, rel=0.02)


def test_the_scales_numbers_are_checked():
    for options in ({"initial": 0.0}, {"growth_interval": 0}, {"growth": 1.0}, {"backoff": 1.0}):
        with pytest.raises(ValueError, match=r"can't work. The scale is positive, the interval 1 or more"):
            dynamic_loss_scale(**options)
    state, step = linear()
    with pytest.raises(ValueError, match=r"no 'loss_scale'.*dynamic_loss_scale\(65536\.0\)\.init\(state\)"):
        dynamic_loss_scale()(step)(state, torch.ones(2))
