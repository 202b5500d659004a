"""The laws that every optimizer obeys: a table of optimizers times a list of laws."""

import pytest
import torch

from tests.helpers import quick
from tests.optim.table import OPTIMIZERS, net, train_reference
from trainfn import optim, tree
from trainfn.testing import check_transform

ALL = pytest.mark.parametrize("optimizer", [pytest.param(row[1], id=row[0]) for row in OPTIMIZERS])
SHAPES = {
    "fc.weight": (3, 4),
    "fc.bias": (3,),
    "ln.weight": (4,),
    "conv.weight": (2, 2, 3),
    "temperature": (),
}


def tensors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def signature(t):
    return {name: (x.dtype, x.shape) for name, x in tree.named_leaves(t).items()}


def assert_equal(a, b):
    assert signature(a) == signature(b)
    for name, x in tree.named_leaves(a).items():
        assert torch.equal(x, tree.named_leaves(b)[name]), name


def run(optimizer, params, num_steps, dtype=torch.float32):
    state = optimizer.init(params)
    for n in range(num_steps):
        updates, state = optimizer.update(tensors(n, dtype), state, params)
        params = tree.add(params, updates)
    return params, state


@pytest.mark.parametrize(("optimizer", "reference"), [pytest.param(*row[1:], id=row[0]) for row in OPTIMIZERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_the_reference(optimizer, reference, dtype):
    """On the gradients of the reference's own path, so that no chaos in the loss enlarges a rounding.

    60 steps round 60 times, in float32 by up to 6e-8 each; in float64 only the factors of some rules are
    float32.
    """
    tolerance = {"rtol": 3e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-8, "atol": 2e-8}
    params = {name: p.detach().clone() for name, p in net(dtype).named_parameters()}
    state = optimizer.init(params)
    for grads, expected in train_reference(reference, 60, dtype):
        updates, state = optimizer.update(grads, state, params)
        params = tree.add(params, updates)
        for name in expected:
            torch.testing.assert_close(params[name], expected[name], **tolerance, msg=name)


L2 = dict.fromkeys(
    ("sgd dampening, L2", "adam L2", "lomo"), 1 / 1.1
)  # of the target: where the penalty's slope balances
# The part of the way that is left after 600 steps, where it is more than 5 %: small steps by design.
LEFT = {
    "adagrad": 0.3,  # rates fall with the root of the number of steps
    "adafactor relative, warm-up, b1, decay": 0.75,
    "muon": 0.35,
    "galore adamw": 0.25,  # of a matrix of rank 4 two directions are seen, with a scale of 0.25
    "galore adamw, both sides, decay": 0.45,
    "galore adafactor": 0.2,
    "lomo clipped": 0.87,  # 600 steps of at most 0.01 * 0.05 on a way of 2.24
    "lookahead": 0.06,
    "partition, a part frozen": 0.46,  # 4 of 20 numbers are frozen where they were: sqrt(4 / 20) of the way
}


@pytest.mark.parametrize(("name", "optimizer"), [pytest.param(*row[:2], id=row[0]) for row in OPTIMIZERS])
def test_converges_to_the_known_optimum(name, optimizer):
    """Of a parabola, from half a unit aside in each coordinate."""
    target = {"fc.weight": torch.eye(4) + 0.5, "fc.bias": torch.arange(4.0) - 1.5}
    aside = torch.Generator().manual_seed(1)
    params = {n: t + 0.5 * torch.randn(t.shape, generator=aside).sign() for n, t in target.items()}
    optimum = {n: t * L2.get(name, 1.0) for n, t in target.items()}
    state, way = optimizer.init(params), tree.global_norm(tree.sub(params, optimum))
    for _ in range(600):
        updates, state = optimizer.update(tree.sub(params, target), state, params)
        params = tree.add(params, updates)
    assert tree.global_norm(tree.sub(params, optimum)) < LEFT.get(name, 0.05) * way


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_obeys_the_contract(optimizer, dtype):
    """Pure, stable in make, no shared memory, finite, one graph, the same in a chain."""
    check_transform(optimizer, tensors(0, dtype))


# References of "partition" find their parameters by their place in the net above.
ANY_PARAMS = [pytest.param(*row[1:], id=row[0]) for row in OPTIMIZERS if "partition" not in row[0]]


@pytest.mark.parametrize(("optimizer", "reference"), ANY_PARAMS)
def test_takes_the_references_steps_from_random_gradients(optimizer, reference):
    check_transform(optimizer, tensors(0), reference=reference)


@ALL
def test_empty_params(optimizer):
    updates, _ = optimizer.update({}, optimizer.init({}), {})
    assert updates == {}


@ALL
def test_works_inside_the_combinators(optimizer):
    """A chain with identity changes nothing; a mask and a partition act as if the others weren't there."""
    params = tensors(0)
    expected, _ = run(optimizer, params, 3)
    assert_equal(run(optim.chain(optim.identity(), optimizer), params, 3)[0], expected)
    assert_equal(run(optim.masked(optimizer, None), params, 3)[0], expected)
    assert_equal(run(optim.partition({"all": optimizer}, lambda name, p: "all"), params, 3)[0], expected)


@ALL
def test_meta_tensors_get_a_state_without_memory(optimizer):
    params = tree.map(lambda x: x.to("meta"), tensors(0))
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert all(x.is_meta for x in tree.leaves((updates, state)))


NUMBERS = [
    ("sgd", optim.sgd, {"learning_rate": 0.1, "momentum": 0.9, "dampening": 0.2}),
    ("adam", optim.adam, {"learning_rate": 0.1}),
    ("adamw", optim.adamw, {"learning_rate": 0.1, "weight_decay": 0.1}),
    ("lion", optim.lion, {"learning_rate": 0.1, "weight_decay": 0.1}),
    ("rmsprop", optim.rmsprop, {"learning_rate": 0.1, "momentum": 0.5, "centered": True}),
    ("adagrad", optim.adagrad, {"learning_rate": 0.1}),
    ("adafactor", optim.adafactor, {"learning_rate": 0.1, "b1": 0.9, "weight_decay": 0.1}),
    ("muon", optim.muon, {"learning_rate": 0.1}),
    ("galore adamw", optim.galore_adamw, {"learning_rate": 0.1, "weight_decay": 0.1, "rank": 2}),
    ("galore adafactor", optim.galore_adafactor, {"learning_rate": 0.1, "b1": 0.9, "weight_decay": 0.1, "rank": 2}),
    ("lomo", optim.lomo, {"learning_rate": 0.1, "weight_decay": 0.1, "clip_grad_norm": 1.0, "clip_grad_value": 0.5}),
    ("adalomo", optim.adalomo, {"learning_rate": 0.1, "weight_decay": 0.1, "clip_grad_norm": 1.0}),
]


FACTORIES = pytest.mark.parametrize(("factory", "numbers"), [pytest.param(*row[1:], id=row[0]) for row in NUMBERS])


@FACTORIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_injected_numbers_give_the_same_steps(factory, numbers, dtype):
    plain, injected = factory(**numbers), optim.inject_hyperparams(factory)(**numbers)
    params = tensors(0, dtype)
    expected, (actual, state) = run(plain, params, 5, dtype)[0], run(injected, params, 5, dtype)
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(actual, expected, **tolerance)
    assert signature(state) == signature(injected.init(params))


@FACTORIES
def test_injected_numbers_are_never_read_and_change_without_a_recompile(factory, numbers):
    optimizer, params = optim.inject_hyperparams(factory)(**numbers), tensors(0)
    on_meta = tree.map(lambda x: x.to("meta"), params)
    optimizer.update(on_meta, optimizer.init(on_meta), on_meta)  # there is nothing to read on meta

    update = quick(lambda state, grads: optimizer.update(grads, state, params))
    state = optimizer.init(params)
    updates, _ = update(state, tensors(1))
    none, _ = update(optim.set_hyperparams(state, learning_rate=0.0), tensors(1))
    assert (update.explain().graphs, update.explain().traces) == (1, 1)
    assert tree.global_norm(updates) > 0
    assert tree.global_norm(none) == 0


@pytest.mark.parametrize("name", ["mu_dtype", "nu_dtype"])
def test_moments_in_another_dtype(name):
    optimizer = optim.adamw(1e-3, **{name: torch.float32})
    params = tensors(0, torch.bfloat16)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    moment = getattr(state[0], name[:2])
    assert {x.dtype for x in moment.values()} == {torch.float32}
    assert signature(updates) == signature(params)
    assert signature(state) == signature(optimizer.init(params))


def test_generic_trees():
    params = {"a": [torch.ones(2), (torch.ones(3), torch.ones(()))]}
    for optimizer in (optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(0.1)), optim.lion(0.1)):
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        assert signature(updates) == signature(params)
