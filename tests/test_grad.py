"""Sums and their derivatives, and what a loss may return."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import trainfn as tfn
from tests.helpers import EACH_NET, MLP_NET, assert_close, quick
from trainfn.errors import InexactLossWarning

pytestmark = pytest.mark.usefixtures("untouched_rng")

SGD = tfn.optim.sgd(0.5)


def one(loss, batch=None):
    state = tfn.init({"w": torch.tensor([3.0])}, SGD)
    return tfn.value_and_grad(loss)(state, torch.tensor([1.0, 2.0]) if batch is None else batch)


@EACH_NET
def test_gradients_are_those_of_the_total(net):
    """What autograd says of the module itself; nothing is divided."""
    module = net.module(dropout=0.0)
    gradients = tfn.value_and_grad(net.loss)(tfn.init(net.module(dropout=0.0), SGD), net.batch(5))
    mean, metrics = net.loss(module, net.batch(5))
    mean.total.backward()
    expected = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    assert [n for n, g in gradients.grads.items() if g is None] == [n for n, g in expected.items() if g is None]
    assert_close(gradients.grads, expected)
    assert_close((gradients.loss, gradients.metrics), (mean, metrics))
    assert not any(t.requires_grad for t in tfn.tree.leaves(gradients))


@given(values=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=8), cut=st.integers(0, 8))
def test_means_combine_exactly(values, cut):
    x = torch.tensor(values)
    weights = torch.arange(len(values)) % 2 == 0
    whole = tfn.Mean.of(x, weights)
    assert_close(tfn.Mean.of(x[:cut], weights[:cut]) + tfn.Mean.of(x[cut:], weights[cut:]), whole)
    assert_close(sum([tfn.Mean.of(x[:cut]), tfn.Mean.of(x[cut:])]), tfn.Mean.of(x))


def test_means():
    assert tfn.Mean.of(torch.tensor([1, 2])).value == 1.5
    assert tfn.Mean.of(torch.tensor([True, False])).value == 0.5
    assert tfn.Mean.of(torch.ones(2, 3), torch.tensor([[1.0], [0.0]])).weight == 3
    assert tfn.Mean.of(torch.ones(2), torch.zeros(2)).value.isnan()
    assert repr(tfn.Mean.of(torch.ones(4))) == "Mean(1 over weight 4)"
    with pytest.raises(TypeError):
        tfn.Mean.of(torch.ones(1)) + 1
    with pytest.raises(TypeError):
        1 + tfn.Mean.of(torch.ones(1))


def test_a_loss_may_return_metrics():
    gradients = one(lambda p, x: (tfn.Mean.of(p["w"] * x), {"size": tfn.Mean.of(x)}))
    assert gradients.loss.value == 4.5 and gradients.metrics["size"].value == 1.5
    state = tfn.init({"w": torch.tensor([3.0])}, SGD)
    _, metrics = tfn.train_step(lambda p, x: (tfn.Mean.of(p["w"] * x), {"size": tfn.Mean.of(x)}), SGD)(
        state, torch.tensor([1.0, 2.0])
    )
    assert list(metrics) == ["loss", "grad_norm", "size"] and metrics["grad_norm"].value == 1.5


MESSAGE = (
    "The loss returned a bare scalar. It is taken as the mean over the batch's rows, which is exact only if every row"
    " weighs the same. With masked, padded or weighted rows it is wrong. Return `Mean(total, weight)` instead:"
    " `tfn.losses.cross_entropy(logits, targets)`, or `tfn.Mean.of(values, mask)` of what you would have averaged."
)


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bare_scalar_is_the_mean_over_the_rows_and_warns_once(compile, accumulate):
    state = tfn.init({"w": torch.tensor([3.0])}, SGD)
    bare = quick(tfn.train_step(lambda p, x: (p["w"] * x).mean(), SGD, accumulate=accumulate), compile=compile)
    exact = tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), SGD)
    batch = torch.tensor([1.0, 2.0, 3.0, 5.0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        results = [bare(state, batch) for _ in range(3)]
    assert [(w.category, str(w.message)) for w in caught] == [(InexactLossWarning, MESSAGE)]
    for result in results:
        assert_close(result, exact(state, batch))


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda x: x, TypeError, r"returned a Tensor of shape \[2\]\. Return `Mean\(total, weight\)` instead"),
        (lambda x: None, TypeError, r"returned a NoneType\. Return `Mean"),
        (lambda x: {"loss": x.sum()}, TypeError, r"returned a dict\. Return `Mean"),
        (lambda x: 3.0, TypeError, r"returned a float\. Return `Mean"),
        (lambda x: (tfn.Mean.of(x), [x]), TypeError, r"returned \(Mean, list\); the second is a dict of metrics"),
        (lambda x: (tfn.Mean.of(x), {"loss": tfn.Mean.of(x)}), ValueError, "a metric named 'loss', which the step"),
        (lambda x: (tfn.Mean.of(x), {"grad_norm": tfn.Mean.of(x)}), ValueError, "a metric named 'grad_norm'"),
        (
            lambda x: (tfn.Mean.of(x), {"acc": x.mean()}),
            TypeError,
            r"metric 'acc' is a Tensor\. Make it `tfn\.Mean\.of",
        ),
        (lambda x: (tfn.Mean.of(x), {"acc": 0.5}), TypeError, "metric 'acc' is a float"),
    ],
)
def test_what_a_loss_may_not_return(returned, error, message):
    with pytest.raises(error, match=message):
        one(lambda p, x: returned(p["w"] * x))


@pytest.mark.parametrize("returned", [lambda x: (tfn.Mean.of(x), {}, {}), lambda x: (), lambda x: (tfn.Mean.of(x),)])
def test_a_tuple_of_another_length_is_refused(returned):
    with pytest.raises(TypeError, match=r"loss\(model, batch\) returned a tuple of \d"):
        one(lambda p, x: returned(p["w"] * x))


def test_a_loss_cut_from_the_parameters_is_refused():
    for cut in (lambda p, x: tfn.Mean.of(x), lambda p, x: tfn.Mean.of((p["w"] * x).detach())):
        with pytest.raises(
            ValueError, match=r"does not depend on any parameter\. Compute it from the `model` argument"
        ):
            one(cut)
    module = MLP_NET.module()

    def outside(model, batch):
        return MLP_NET.loss(model, batch) if model is None else tfn.Mean.of(batch["x"])

    with pytest.raises(ValueError, match="does not depend on any parameter"):
        tfn.value_and_grad(outside)(tfn.init(module, SGD), MLP_NET.batch(2))


def test_gradients_run_where_gradients_are_off():
    with torch.no_grad():
        assert one(lambda p, x: tfn.Mean.of(p["w"] * x)).grads["w"] == 3
    with torch.inference_mode():
        batch = torch.tensor([1.0, 2.0])
    assert one(lambda p, x: tfn.Mean.of(p["w"] * x.clone()), batch).grads["w"] == 3


def test_a_loss_may_take_gradients_of_its_own():
    """A gradient penalty: the derivative of a derivative."""

    def penalty(p, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad((p["w"] * x**2).sum(), x, create_graph=True)
        return tfn.Mean.of(slope**2)

    assert_close(one(penalty).grads["w"], torch.tensor([8 * 3.0 * (1 + 4)]))


def test_gradients_add_up_by_addition():
    state = tfn.init(MLP_NET.module(), SGD)
    gradients = tfn.value_and_grad(MLP_NET.loss)
    batch = MLP_NET.batch(6)
    first = gradients(state, {k: v[:2] for k, v in batch.items()})
    second = gradients(state, {k: v[2:] for k, v in batch.items()}, 2)
    whole = gradients(state, batch)
    assert_close(tfn.tree.add(first.grads, second.grads), whole.grads)
    assert_close(first.loss + second.loss, whole.loss)
