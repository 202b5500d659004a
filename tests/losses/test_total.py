"""Sums of different losses, against a plain loop of torch; and the arithmetic of `Mean`."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trainfn as tfn
from tests.helpers import assert_close, quick, seeded

SGD = tfn.optim.sgd(0.5)
TOLERANCE = 1e-6  # float32 sums in another order


class Heads(nn.Module):
    """A trunk with two heads."""

    def __init__(self):
        super().__init__()
        self.trunk, self.classes, self.numbers = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x):
        hidden = self.trunk(x).tanh()
        return self.classes(hidden), self.numbers(hidden)


def batch(rows=7):
    """Targets of which some are ignored, so that the two losses count unequally in every piece."""
    targets = torch.arange(rows) % 3
    targets[::3] = -100
    return {"x": torch.randn(rows, 4), "y": targets, "z": torch.randn(rows, 2)}


def loss(model, b):
    logits, numbers = model(b["x"])
    ce, mse = tfn.losses.cross_entropy(logits, b["y"]), tfn.losses.mse(numbers, b["z"])
    return tfn.losses.total({"ce": ce, "mse": 0.5 * mse}), {"accuracy": tfn.metrics.accuracy(logits, b["y"])}


def plain(model, b):
    """One step of a loop; returns the parameters after it and the two losses."""
    model = copy.deepcopy(model)
    logits, numbers = model(b["x"])
    ce, mse = F.cross_entropy(logits, b["y"]), 0.5 * F.mse_loss(numbers, b["z"])
    (ce + mse).backward()
    return {n: p.detach() - 0.5 * p.grad for n, p in model.named_parameters()}, ce.detach(), mse.detach()


def made():
    return seeded(lambda: (Heads(), batch()))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 7, "stream"])
def test_a_total_is_the_sum_of_means_however_the_rows_are_split(accumulate, compiled):
    model, b = made()
    params, ce, mse = plain(model, b)
    step = tfn.train_step(loss, SGD, accumulate=accumulate)
    step = quick(step, dynamic=False) if compiled else step
    given = iter([{k: v[:4] for k, v in b.items()}, {k: v[4:] for k, v in b.items()}]) if accumulate == "stream" else b
    state, metrics = step(tfn.init(model, SGD), given)
    assert_close(state.params, params, TOLERANCE)
    shown = {name: metrics[name].value for name in ("loss", "ce", "mse")}
    assert_close(shown, {"loss": ce + mse, "ce": ce, "mse": mse}, TOLERANCE)
    assert metrics["accuracy"].weight == 4


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_total_takes_a_loss_scale(accumulate):
    model, b = made()
    scaling = tfn.transforms.dynamic_loss_scale(2.0**10)
    step = scaling(tfn.train_step(loss, SGD, accumulate=accumulate))
    state, metrics = step(scaling.init(tfn.init(model, SGD)), b)
    assert_close(state.params, plain(model, b)[0], TOLERANCE)
    assert metrics["skipped"].value == 0


def test_a_term_without_rows_and_a_constant_one_count_for_nothing():
    model, b = made()
    b["y"][:] = -100

    def with_constant(model, b):
        constant = tfn.Mean(torch.ones(()), torch.ones(()))
        return tfn.losses.total({"task": loss(model, b)[0], "constant": constant})

    expected = copy.deepcopy(model)
    (0.5 * F.mse_loss(expected(b["x"])[1], b["z"])).backward()
    for accumulate in (1, 3):
        step = tfn.train_step(with_constant, SGD, accumulate=accumulate)
        state, metrics = step(tfn.init(model, SGD), b)
        reached = {n: p.detach() - 0.5 * p.grad for n, p in expected.named_parameters() if p.grad is not None}
        assert_close({name: state.params[name] for name in reached}, reached, TOLERANCE)
        assert {"task/ce", "task/mse", "constant"} < set(metrics) and metrics["task/ce"].weight == 0


def test_a_penalty_counts_once_for_any_number_of_micro_batches():
    model, b = made()

    def penalized(model, b):
        penalty = tfn.Mean(sum(p.square().sum() for p in model.parameters()), torch.ones(()))
        return tfn.losses.total({"mse": tfn.losses.mse(model(b["x"])[1], b["z"]), "penalty": 0.1 * penalty})

    expected = copy.deepcopy(model)
    value = F.mse_loss(expected(b["x"])[1], b["z"]) + 0.1 * sum(p.square().sum() for p in expected.parameters())
    value.backward()
    state, _ = tfn.train_step(penalized, SGD, accumulate=4)(tfn.init(model, SGD), b)
    assert_close(state.params, {n: p.detach() - 0.5 * p.grad for n, p in expected.named_parameters()}, TOLERANCE)


def test_a_total_is_evaluated_over_uneven_batches():
    model, b = made()
    _, ce, mse = plain(model, b)
    pieces = [{k: v[:5] for k, v in b.items()}, {k: v[5:] for k, v in b.items()}]
    assert_close(
        tfn.evaluate(tfn.eval_step(loss), tfn.init(model, SGD), pieces)["loss"].value.float(), ce + mse, TOLERANCE
    )


def test_a_window_of_totals_is_kept_by_a_checkpoint():
    model, b = made()
    lines = []
    first, second = (tfn.callbacks.log(2, lines.append) for _ in range(2))
    _, metrics = tfn.train_step(loss, SGD)(tfn.init(model, SGD), b)
    first(tfn.StepInfo(1, None, metrics, 1.0))
    second.load_state_dict(first.state_dict())
    second(tfn.StepInfo(2, None, metrics, 1.0))
    assert f"loss {metrics['loss'].value.item():.4g} " in lines[0]


@pytest.mark.parametrize(
    ("parts", "error", "match"),
    [
        ([], TypeError, r"takes a dict of losses by name, not list"),
        ({}, ValueError, "has nothing to add"),
        ({"a": torch.ones(())}, TypeError, r"'a' of type Tensor, which has no weight.*tfn\.Mean\.of"),
        ({"a": tfn.Mean(torch.ones(2), torch.ones(2))}, ValueError, r"total of shape \[2\].*a loss is a scalar"),
    ],
)
def test_what_a_total_refuses(parts, error, match):
    with pytest.raises(error, match=match):
        tfn.losses.total(parts)


def test_a_term_with_the_name_of_a_metric_is_refused():
    one = tfn.Mean(torch.ones(()), torch.ones(()))
    step = tfn.train_step(lambda p, x: (tfn.losses.total({"a": p["w"].sum() * one}), {"a": one}), SGD)
    with pytest.raises(ValueError, match="a total with the term 'a', which is a metric's name too"):
        step(tfn.init({"w": torch.ones(1)}, SGD), torch.ones(1))


MEAN = tfn.Mean(torch.tensor(6.0), torch.tensor(2.0))


@pytest.mark.parametrize(
    "scaled",
    [
        lambda m: 0.5 * m,
        lambda m: m * 0.5,
        lambda m: torch.tensor(0.5) * m,
        lambda m: m * torch.tensor(0.5),
        lambda m: m / 2,
        lambda m: -(m / -2),
        lambda m: 1 * m / torch.tensor(2.0),
    ],
)
def test_a_number_scales_a_mean(scaled):
    for mean in (MEAN, tfn.losses.total({"a": MEAN})):
        assert type(scaled(mean)) is type(mean) and scaled(mean).value == 1.5
        assert scaled(mean).weight.sum() == 2


SIGNS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "**": operator.pow,
    "<": operator.lt,
}
NO_NUMBERS = [True, torch.ones(3), "a", (1, 2)]
REFUSED = [(sign, other) for sign in SIGNS for other in NO_NUMBERS]
REFUSED += [(sign, other) for sign in SIGNS if sign != "+" for other in [MEAN]]
REFUSED += [(sign, other) for sign in SIGNS if sign not in "*/" for other in [1.0, 1, MEAN.value]]


@pytest.mark.parametrize(("sign", "other"), REFUSED, ids=repr)
def test_all_other_arithmetic_says_what_to_write(sign, other):
    with pytest.raises(TypeError, match=r"Mean \S+ \w+: .*tfn\.losses\.total"):
        SIGNS[sign](MEAN, other)


def test_a_mean_is_not_a_number():
    with pytest.raises(TypeError, match=r"float\(mean\.value\)"):
        float(MEAN)
    for wrong in (1.0, True, torch.zeros(())):
        with pytest.raises(TypeError, match="pools two parts of one loss"):
            wrong + MEAN
    with pytest.raises(TypeError, match="Mean - float"):
        1.0 - MEAN
    with pytest.raises(TypeError, match=r"Total \+ Mean"):
        tfn.losses.total({"a": MEAN}) + MEAN
    with pytest.raises(ValueError, match=r"shapes \[\] and \[2\]"):
        MEAN + tfn.Mean(torch.ones(2), torch.ones(2))
