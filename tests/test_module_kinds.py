"""Nothing in a user's module is ignored: each kind of module trains as in torch's plain loop."""

import warnings

import pytest
import torch
from torch.nn.utils import prune

import trainfn as tfn
import trainfn.testing as tt
from tests.helpers import long
from tests.module_kinds import KINDS, WRITES, Kind, Late, by_hand, floats, squares, twins

STEPS = 6
ADAMW = {"lr": 1e-2, "weight_decay": 0.1}
pytestmark = pytest.mark.filterwarnings("ignore::trainfn.errors.UnreachedWarning")

WAYS = {
    "eager": lambda step: step,
    "compiled": lambda step: tfn.jit(step, backend="eager"),
    "donating": lambda step: tfn.jit(step, donate=True, compile=False),
    "compiled, donating": lambda step: tfn.jit(step, backend="eager", donate=True),
    "accumulated": lambda step: tfn.accumulate(step, 2),
    "accumulated, compiled": lambda step: tfn.jit(tfn.accumulate(step, 2), backend="eager"),
}


def trained(kind, module, optimizer, way, steps=STEPS):
    step = WAYS[way](tfn.train_step(kind.loss, optimizer))
    state = tfn.init(module, optimizer)
    for n in range(steps):
        kept = tfn.copy(state)
        new, metrics = step(state, kind.batch(n))
        assert torch.isfinite(metrics["loss"].value)
        if "donating" not in way:
            assert not tfn.diff(kept, state), f"step {n} changed the state that it was given"
        state = new
    return state


def assert_equal_modules(state, module, atol=1e-6):
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    ours = {**state.params, **state.buffers}
    assert held.keys() == ours.keys()
    for name, p in held.items():
        torch.testing.assert_close(ours[name], p.detach(), atol=atol, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# What some kinds do depends on the micro-batch, in torch too.
PAIRS = [(name, way) for name in KINDS for way in WAYS if KINDS[name].splits or "accumulated" not in way]


@pytest.mark.parametrize(("name", "way"), PAIRS)
def test_a_module_trains_as_in_torch(name, way):
    kind = KINDS[name]
    module, twin = twins(kind)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    state = trained(kind, module, tfn.optim.adamw(1e-2, weight_decay=0.1), way)
    parameters = [p for p in twin.parameters() if p.requires_grad]
    assert_equal_modules(state, by_hand(kind, twin, torch.optim.AdamW(parameters, **ADAMW), STEPS))
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters()), "the module itself was changed"
    assert all(p.grad is None for p in module.parameters())


GENERATED = ("momentum encoder by .data =", "batch norm in a reentrant checkpoint")  # in every run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
@pytest.mark.parametrize("name", [name if name in GENERATED else long(name) for name in KINDS])
def test_a_module_trains_as_in_torch_through_the_code_generator(name):
    kind = KINDS[name]
    module, twin = twins(kind)
    optimizer = tfn.optim.adamw(1e-2, weight_decay=0.1)
    step, state = tfn.jit(tfn.train_step(kind.loss, optimizer)), tfn.init(module, optimizer)
    for n in range(3):
        state, _ = step(state, kind.batch(n))
    parameters = [p for p in twin.parameters() if p.requires_grad]
    assert_equal_modules(state, by_hand(kind, twin, torch.optim.AdamW(parameters, **ADAMW), 3), atol=5e-6)


# --- what a loss does not reach -----------------------------------------------------------------------------------

OPTIMIZERS = {
    "adam": (tfn.optim.adam(1e-2), lambda ps: torch.optim.Adam(ps, 1e-2)),
    "sgd, dampened": (
        tfn.optim.chain(
            tfn.optim.add_decayed_weights(0.1),
            tfn.optim.trace(0.9, dampening=0.5),
            tfn.optim.scale_by_learning_rate(0.1),
        ),
        lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, dampening=0.5, weight_decay=0.1),
    ),
    "rmsprop": (tfn.optim.rmsprop(1e-2), lambda ps: torch.optim.RMSprop(ps, 1e-2)),
    "adagrad": (tfn.optim.adagrad(1e-2), lambda ps: torch.optim.Adagrad(ps, 1e-2)),
    "partition": (
        tfn.optim.partition({"all": tfn.optim.adamw(1e-2, weight_decay=0.1)}, [(".", "all")]),
        lambda ps: torch.optim.AdamW(ps, 1e-2, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_that_every_second_step_reaches_counts_its_own_steps(name):
    kind, (ours, theirs) = KINDS["heads by task"], OPTIMIZERS[name]
    module, twin = twins(kind)
    state = trained(kind, module, ours, "eager", steps=8)
    assert_equal_modules(state, by_hand(kind, twin, theirs(twin.parameters()), 8))


@pytest.mark.parametrize("complex_rule", ["adam", "rmsprop", "adagrad"])
def test_complex_parameters_have_the_moments_of_torch(complex_rule):
    kind, (ours, theirs) = KINDS["complex"], OPTIMIZERS[complex_rule]
    module, twin = twins(kind)
    state = trained(kind, module, ours, "eager")
    assert_equal_modules(state, by_hand(kind, twin, theirs(twin.parameters()), STEPS))


def test_a_state_with_late_parameters_is_saved_and_restored(tmp_path):
    kind, optimizer = KINDS["heads by task"], tfn.optim.adamw(1e-2)
    state = trained(kind, twins(kind)[0], optimizer, "eager")
    assert int(state.opt_state[0].late["pooler.weight"]) == STEPS
    tfn.save(tmp_path / "c", state)
    assert not tfn.diff(tfn.restore(tmp_path / "c", like=tfn.init(twins(kind)[0], optimizer)), state)


@pytest.mark.filterwarnings("default::trainfn.errors.UnreachedWarning")
def test_what_is_not_reached_is_named_once():
    kind, optimizer = KINDS["heads by task"], tfn.optim.sgd(0.1)
    step, state = tfn.train_step(kind.loss, optimizer), tfn.init(kind.make(), optimizer)
    with pytest.warns(tfn.errors.UnreachedWarning, match=r"4 of 8 parameters: 'heads.b.weight'.*not call 'heads.b'"):
        state, _ = step(state, kind.batch(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(state, kind.batch(0))


def test_a_loss_that_reaches_no_parameter_is_an_error():
    other = torch.ones(4, requires_grad=True)
    step = tfn.train_step(lambda model, x: tfn.Mean.of(x * other), tfn.optim.sgd(0.1))
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        step(tfn.init(torch.nn.Linear(4, 1), tfn.optim.sgd(0.1)), torch.ones(2, 4))
    assert other.grad is None


def test_what_is_outside_of_the_state_keeps_its_gradients():
    teacher, optimizer = torch.nn.Linear(4, 1), tfn.optim.sgd(0.1)
    loss = lambda model, x: tfn.Mean.of((model(x) - teacher(x)) ** 2)  # noqa: E731
    for way in ("eager", "compiled"):
        state = tfn.init(torch.nn.Linear(4, 1), optimizer)
        step = WAYS[way](tfn.train_step(loss, optimizer))
        for _ in range(2):
            state, _ = step(state, torch.ones(2, 4))
        assert teacher.weight.grad is None


# --- references that can't follow, and what changes after `init` ---------------------------------------------------


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_a_parameter_that_the_loss_takes_from_elsewhere_is_an_error(way):
    model, optimizer = torch.nn.Linear(4, 1), tfn.optim.sgd(0.1)
    weight = model.weight
    loss = lambda m, x: tfn.Mean.of(m(x) ** 2 + weight.sum())  # noqa: E731
    with pytest.raises(ValueError, match=r"uses the Parameter 'weight' itself.*model.get_parameter\('weight'\)"):
        WAYS[way](tfn.train_step(loss, optimizer))(tfn.init(model, optimizer), torch.ones(2, 4))


def test_a_view_of_a_parameter_is_an_error():
    model = torch.nn.Linear(4, 1)
    model.row = model.weight.data[0]
    with pytest.raises(ValueError, match=r"row is a tensor in the memory of the parameter 'weight'"):
        tfn.init(model, tfn.optim.sgd(0.1))
    model.weight.requires_grad_(False)  # it stays as it is, and so does the row
    tfn.init(model, tfn.optim.sgd(0.1))


def test_a_sparse_embedding_is_an_error():
    with pytest.raises(ValueError, match="'0' is an embedding with `sparse=True`"):
        tfn.init(torch.nn.Sequential(torch.nn.Embedding(4, 2, sparse=True)), tfn.optim.sgd(0.1))


@pytest.mark.parametrize(
    "rule",
    [tfn.optim.muon(0.1), tfn.optim.adafactor(), tfn.optim.galore_adamw(0.1)],
    ids=["muon", "adafactor", "galore"],
)
def test_rules_without_a_meaning_for_complex_numbers_say_so(rule):
    with pytest.raises(ValueError, match="'w' is complex"):
        tfn.init({"w": torch.ones(2, 2, dtype=torch.cfloat)}, rule)


def small():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_what_is_frozen_after_init_stands_still(way):
    model, optimizer = small(), tfn.optim.adamw(0.1)
    step, state = WAYS[way](tfn.train_step(squares, optimizer)), tfn.init(model, optimizer)
    state, _ = step(state, torch.ones(2, 4))
    model[0].requires_grad_(False)
    new, _ = step(state, torch.ones(2, 4))
    moved = {name: bool((new.params[name] != p).any()) for name, p in state.params.items()}
    assert moved == {"0.weight": False, "0.bias": False, "2.weight": True, "2.bias": True}


CHANGES = {
    "another head": (lambda m: m.__setitem__(2, torch.nn.Linear(4, 3)), "'2.weight' was replaced"),
    "another layer": (lambda m: m.append(torch.nn.Linear(1, 1)), "'3.weight' is new"),
    "pruned": (lambda m: prune.l1_unstructured(m[2], "weight", 0.5), "'2.weight' is gone"),
    "another parameter": (lambda m: setattr(m[2], "bias", torch.nn.Parameter(torch.ones(1))), "'2.bias' was replaced"),
}


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_module_that_changed_after_init_is_noticed(name, way):
    change, match = CHANGES[name]
    model, optimizer = small(), tfn.optim.adam(0.1)
    step, state = WAYS[way](tfn.train_step(squares, optimizer)), tfn.init(model, optimizer)
    state, _ = step(state, torch.ones(2, 4))
    change(model)
    with pytest.raises(ValueError, match=match + r".*tfn.adapt\(state, model, optimizer\)"):
        step(state, torch.ones(2, 4))
    adapted = tfn.adapt(state, model, optimizer)
    assert torch.equal(adapted.params["0.weight"], state.params["0.weight"])
    assert torch.equal(adapted.opt_state[0].mu["0.weight"], state.opt_state[0].mu["0.weight"])
    new, _ = WAYS[way](tfn.train_step(squares, optimizer))(adapted, torch.ones(2, 4))
    assert int(new.step) == 2 and new.params.keys() == {n for n, _ in model.named_parameters()}


def test_what_is_unfrozen_after_init_is_adapted_and_counts_its_own_updates():
    optimizer = tfn.optim.adam(1e-2)
    model, twin = small().eval(), small()
    model[1].p = twin[1].p = 0.0
    theirs = torch.optim.Adam(twin.parameters(), 1e-2)
    state = tfn.init(model[0].requires_grad_(False) and model, optimizer)
    twin[0].requires_grad_(False)
    x = floats(0)
    for n in range(6):
        if n == 3:
            model[0].requires_grad_(True)
            twin[0].requires_grad_(True)
            with pytest.raises(ValueError, match=r"'0.weight' was frozen at `init`"):
                tfn.train_step(squares, optimizer)(state, x)
            state = tfn.adapt(state, model, optimizer)
        state, _ = tfn.train_step(squares, optimizer)(state, x)
        theirs.zero_grad()
        squares(twin, x).value.backward()
        theirs.step()
    assert_equal_modules(state, twin)


def test_a_submodule_in_eval_mode_after_init_is_named():
    model, optimizer = small(), tfn.optim.sgd(0.1)
    state = tfn.init(model, optimizer)
    model[1].eval()
    with pytest.warns(UserWarning, match="'1' was put into eval mode after `init`.*tfn.adapt"):
        tfn.train_step(squares, optimizer)(state, torch.ones(2, 4))


# --- the law ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["heads by task", "hook: mask", "momentum encoder by mul_", "alias in a list"])
def test_check_module_says_what_a_module_holds(name):
    said = {
        "heads by task": "the loss does not reach: 'heads.b.weight'",
        "hook: mask": "hooks of parameters: '0.weight'",
        "momentum encoder by mul_": "written to by the forward pass: 'k.weight'",
        "alias in a list": "follow the state: 1",
    }
    kind = KINDS[name]
    report = repr(tt.check_module(kind.make(), kind.loss, kind.batch(0)))
    assert "3 steps equal those of torch's plain loop; compiled too." in report and said[name] in report


def test_check_module_finds_a_module_that_counts_in_python():
    class Counts(torch.nn.Linear):
        calls = 0

        def forward(self, x):
            type(self).calls += 1
            return super().forward(x) * type(self).calls

    with pytest.raises(tfn.errors.LawViolation, match=r"check_module: a step is not that of torch's plain loop"):
        tt.check_module(Counts(4, 1), squares, floats(0), compile=False)


# --- a write that comes late --------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["copy", "adopt"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("how", WRITES)
def test_a_write_that_comes_late_leaves_the_old_state_as_it_is(how, frozen, storage):
    kind = Kind(lambda: Late(how, frozen=frozen), squares, floats)
    module, twin = twins(kind)
    optimizer = tfn.optim.adamw(1e-2, weight_decay=0.1)
    step, state = tfn.train_step(squares, optimizer), tfn.init(module, optimizer, storage=storage)
    for n in range(STEPS):
        kept = tfn.copy(state)
        new, _ = step(state, kind.batch(n))
        assert not tfn.diff(kept, state), f"step {n} changed the state that it was given"
        state = new
    assert torch.equal(module.w, torch.ones(4)), "the module itself was changed"
    parameters = [p for p in twin.parameters() if p.requires_grad]
    assert_equal_modules(state, by_hand(kind, twin, torch.optim.AdamW(parameters, **ADAMW), STEPS))
