"""The same step on N ranks as on one: every plan, optimizer and kind of model, by ranks that `server.py` forks."""

import pytest
import torch

import trainfn as tfn
from tests.helpers import assert_close, long
from tests.optim.table import OPTIMIZERS
from tests.ranks import cases

# Most parameters are of order 1, and Adam's steps of 1e-2: what is left is the order of additions in float32, and what
# the compiler makes of it.
TOLERANCE, COMPILED_TOLERANCE = 1e-6, 5e-6


@pytest.mark.parametrize("name", [name if case.quick else long(name) for name, case in cases.CASES.items()])
def test_n_ranks_are_one(name, ranks):
    most = COMPILED_TOLERANCE if name.startswith("compiled") else TOLERANCE
    assert max(ranks(cases.__name__, cases.CASES[name].world, name)) < most


@pytest.mark.parametrize("plan", cases.PLANS)
def test_callbacks_end_a_run_as_in_one_process(plan, ranks):
    (step, best), *_ = ranks(cases.__name__, 1, plan)
    assert step < 20
    for there, found in ranks(cases.__name__, 2, plan):
        assert there == step
        assert_close(
            {name: torch.tensor(p) for name, p in found.items()}, {n: torch.tensor(p) for n, p in best.items()}
        )


def test_every_optimizer_has_its_turn_and_every_kind_of_state_under_every_plan():
    quick = {(plan, name) for plan in cases.PLANS for name, *_ in OPTIMIZERS if cases.CASES[f"{plan}: {name}"].quick}
    for kind, names in cases.KINDS.items():
        for plan in cases.PLANS:
            assert any((plan, name) in quick for name in names), (plan, kind)
    for name, *_ in OPTIMIZERS:
        assert sum((plan, name) in quick for plan in cases.PLANS) >= 2, name


# --- in one process -----------------------------------------------------------------------------------------------


def mean_square(model, x):
    return tfn.Mean.of(model(x).square().sum(1))


@pytest.mark.parametrize("accumulate", [1, 2, "stream"])
@pytest.mark.parametrize("plan", [tfn.Plan(), tfn.Plan.replicated(), tfn.Plan.fsdp()], ids=repr)
def test_a_plan_for_one_process_changes_no_bit(plan, accumulate):
    optimizer = tfn.optim.adamw(0.1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5))
    state = tfn.init(model, optimizer)
    batch = torch.randn(4, 3)
    give = (lambda: iter([batch[:2], batch[2:]])) if accumulate == "stream" else lambda: batch
    expected, _ = tfn.train_step(mean_square, optimizer, accumulate=accumulate)(state, give())
    laid = tfn.shard(state, plan)
    assert laid is state
    after, _ = tfn.train_step(mean_square, optimizer, accumulate=accumulate, plan=plan)(laid, give())
    assert tfn.digest(after) == tfn.digest(expected)
    assert tfn.gather(after).params.keys() == after.params.keys()
    evaluated = [tfn.eval_step(mean_square, plan=p)(state, batch)["loss"].value for p in (None, plan)]
    assert torch.equal(*evaluated)


def test_precision():
    plan = tfn.Plan(precision=tfn.Precision(param=torch.float32, compute=torch.bfloat16))
    optimizer = tfn.optim.sgd(0.1)
    state = tfn.shard(tfn.init(torch.nn.Linear(3, 4).double(), optimizer), plan)
    assert state.params["weight"].dtype == torch.float32
    seen = []

    def loss(model, x):
        seen.append(model(x).dtype)
        return mean_square(model, x)

    with torch.no_grad():
        after, _ = tfn.train_step(loss, optimizer, plan=plan)(state, torch.ones(2, 3))
    assert seen == [torch.bfloat16]
    assert after.params["weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"shard": 0}, r"Plan\(shard=0\): a number of ranks from 1 on"),
        ({"tensor": 1.5}, r"Plan\(tensor=1.5\)"),
        ({"shard": -1, "replicate": -1}, "only one axis"),
        ({"stage": 4}, r"Plan\(stage=4\): 0, 1, 2 or 3"),
        ({"rules": (("q", "diagonals"),)}, r"\('q', 'diagonals'\).*'columns', 'rows'"),
        ({"rules": ("q",)}, r"\(pattern, rule\)"),
        ({"offload": ("grads",)}, r'"opt_state" or "params"'),
    ],
)
def test_a_plan_that_cannot_be(fields, match):
    with pytest.raises(ValueError, match=match):
        tfn.Plan(**fields)


@pytest.mark.parametrize(
    ("plan", "world", "shape"),
    [
        (tfn.Plan.replicated(), 4, (4, 1, 1)),
        (tfn.Plan.zero(1), 4, (1, 4, 1)),
        (tfn.Plan.fsdp(replicate=2), 8, (2, 4, 1)),
        (tfn.Plan.fsdp(replicate=2, tensor=2), 8, (2, 2, 2)),
        (tfn.Plan(tensor=2), 2, (1, 1, 2)),
    ],
)
def test_the_shape_of_a_plan(plan, world, shape):
    assert tuple(plan.shape(world).values()) == shape


@pytest.mark.parametrize(
    ("plan", "world", "match"),
    [
        (tfn.Plan(shard=3), 2, r"for 3 ranks.*there are 2 processes"),
        (tfn.Plan(shard=4, replicate=-1), 6, "for 4 ranks or a multiple"),
        (tfn.Plan(), 2, "there are 2 processes"),
        (tfn.Plan(shard=2), 1, "there is 1 process. Launch"),
    ],
)
def test_a_plan_for_another_number_of_processes(plan, world, match):
    with pytest.raises(ValueError, match=match):
        plan.shape(world)


def test_each_believing_it_is_alone_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"2 processes were launched .*tfn\.launch\.plan\(\)"):
        tfn.shard(tfn.init(torch.nn.Linear(2, 1), tfn.optim.sgd(0.1)), tfn.Plan.replicated())


def test_attention_dropout_is_not_split():
    config = type("Config", (), {"to_dict": lambda self: {"attention_dropout": 0.1}})()
    model = torch.nn.Linear(4, 4)
    model.config = config
    from trainfn._plan import _place

    with pytest.raises(ValueError, match=r"attention_dropout=0\.1, ranks would drop the same weights"):
        _place.check_split(tfn.init(model, tfn.optim.sgd(0.1)), tfn.Plan(tensor=2), 2)


def test_offloading_from_an_accelerator_is_refused():
    from trainfn._plan import _place

    with pytest.raises(ValueError, match=r"Plan\(offload=\('opt_state',\)\) on 'cuda' is not there.*tfn\.deepspeed"):
        _place._check_offload(tfn.Plan(offload=("opt_state",)), "cuda")
    state = tfn.init(torch.nn.Linear(2, 1), tfn.optim.sgd(0.1))
    assert tfn.shard(state, tfn.Plan(offload=("opt_state",))) is state


def test_the_norm_of_whole_and_of_split_tensors_is_one_function():
    assert_close(tfn.tree.global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}), torch.tensor(5.0))
