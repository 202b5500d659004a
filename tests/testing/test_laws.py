"""The laws catch what they say, name it, show the smallest case of it, and leave alone what is right."""

import importlib
import re
import sys
import traceback

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

import trainfn as tfn
import trainfn.testing as tt
from tests.helpers import (
    CONV_NET,
    GPT_NET,
    MIXED_NET,
    MLP_NET,
    NETS,
    adamw,
    assert_identical,
    cross_entropy,
    quick,
    seeded,
    takes_long,
    tokens,
)
from tests.testing.adversaries import (
    ADVERSARIES,
    PLAIN,
    SGD,
    ShuffledOnce,
    ShuffledSampler,
    base,
    exact,
    mean_of_means,
    rows,
    squares,
    start,
    takes_item,
    warm,
    writes_state,
)

pytestmark = pytest.mark.usefixtures("untouched_rng")

TWINS = {(a.law, id(a.right)): pytest.param(a, id=a.name) for a in ADVERSARIES}  # one of those that share a twin
COMPILING = ("check_single_graph", "check_eager_equals_compiled")  # half a second each, whatever the seed is
STEP_LAWS = [
    tt.check_pure,
    tt.check_deterministic,
    tt.check_keyed,
    tt.check_dtype_stable,
    tt.check_no_host_sync,
    tt.check_single_graph,
    lambda *args: tt.check_eager_equals_compiled(*args, backend="eager"),
    tt.check_donation,
    lambda step, *args: tt.check_agrees(step, step, *args),
]


def on_one_line(error):
    """What was raised, without the layout."""
    return " ".join(str(error.value).split())


# --- adversaries --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adversary", [pytest.param(a, id=a.name) for a in ADVERSARIES])
def test_the_law_catches_the_mistake_and_names_its_cause(adversary):
    with pytest.raises(tt.LawViolation) as error:
        adversary.law(adversary.wrong)
    assert re.search(adversary.match, on_one_line(error))
    assert "probable cause" in str(error.value) and "fix" in str(error.value)


@pytest.mark.parametrize("adversary", TWINS.values())
def test_the_law_lets_its_twin_pass(adversary):
    for seed in range(1 if adversary.law.__name__ in COMPILING else 2):
        adversary.law(adversary.right, seed)


@takes_long
@pytest.mark.parametrize("adversary", TWINS.values())
def test_no_false_alarm_in_200_runs(adversary, few_examples):
    for seed in range(25 if adversary.law.__name__ in COMPILING else 200):
        adversary.law(adversary.right, seed)


@pytest.fixture
def few_examples():
    """Ten cases for each of the many runs."""
    before = settings.default
    settings.register_profile("long", before, max_examples=10)
    settings.load_profile("long")
    yield
    settings.register_profile("before", before)
    settings.load_profile("before")


def test_the_table_has_no_name_twice():
    names = [a.name for a in ADVERSARIES]
    assert len(set(names)) == len(names) >= 32


# --- what a violation says ----------------------------------------------------------------------------------------


def test_a_counterexample_is_minimal_and_says_all():
    """Two rows, one of which is ignored: with both counted, a mean of two means is right."""
    with pytest.raises(tt.LawViolation) as error:
        tt.check_accumulation_invariant(mean_of_means)
    said = str(error.value)
    assert said.startswith("check_accumulation_invariant: splitting the batch changes the update.")
    for part in (
        r"x = float32\[2, 4\] \[\[0.0, 0.0, 0.0, 0.0\], \[0.0, 0.0, 0.0, 0.0\]\]",
        r"y = int64\[2\] \[(0, -100|-100, 0)\]",
        r"split +row 0 \| row 1\n",
        r"whole +loss [\d.]+ \(total [\d.]+ over weight 1\)",
        r"in pieces +loss [\d.]+ \(total [\d.]+ over weight 2\)",
        r"differs +(the loss|the gradient of .*) by 0.5 of its size; it is 0.5 times as large",  # both are: a tie
        r"probable cause +the total is a mean",
        r"fix +return the sum and what it counts",
    ):
        assert re.search(part, said), part
    assert max(map(len, said.splitlines())) <= 120


def test_rows_of_your_own_batch_are_named():
    batch = {"x": torch.eye(6, 4), "y": torch.tensor([0, 1, 2, 0, -100, 1])}
    with pytest.raises(tt.LawViolation, match=r"batch +rows \[(0, 4|4, 0)\] of yours"):
        tt.check_accumulation_invariant(mean_of_means, None, batch)


def test_ranks_are_named():
    with pytest.raises(tt.LawViolation, match=r"split +rank 0: row 0; rank 1: row 1\n"):
        tt.check_rank_invariant(mean_of_means)


def test_the_same_arguments_give_the_same_report():
    said = []
    for _ in range(2):
        with pytest.raises(tt.LawViolation) as error:
            tt.check_padding_invariant(mean_of_means, None, PLAIN | {"w": tt.floats()}, pad={"w": 0}, seed=3)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_a_violation_is_an_assertion_and_an_error_of_the_package():
    assert issubclass(tt.LawViolation, AssertionError) and issubclass(tt.LawViolation, tfn.errors.TrainfnError)


# --- where batches come from --------------------------------------------------------------------------------------

CONCRETE = {"x": torch.eye(5, 4), "y": torch.tensor([0, 1, 2, -100, 1])}
SPEC = {"x": tt.floats(4), "y": tt.integers(0, 3, or_else=-100)}
SOURCES = {"default": None, "batch": CONCRETE, "spec": SPEC, "strategy": tt.batches(SPEC)}
EACH_SOURCE = pytest.mark.parametrize("batches", [pytest.param(s, id=name) for name, s in SOURCES.items()])
LOSS_LAWS = [
    tt.check_row_additive,
    tt.check_accumulation_invariant,
    tt.check_rank_invariant,
    tt.check_padding_invariant,
    tt.check_permutation_invariant,
]


@EACH_SOURCE
@pytest.mark.parametrize("law", LOSS_LAWS)
def test_batches_may_come_from_anywhere(law, batches):
    law(exact, None, batches)
    if batches is CONCRETE and law is not tt.check_permutation_invariant:  # counting rows does not mind the order
        with pytest.raises(tt.LawViolation):
            law(mean_of_means if law is not tt.check_padding_invariant else counts_rows, None, batches)


def counts_rows(model, b):
    return tfn.Mean(exact(model, b).total, torch.tensor(float(len(b["y"]))))


@given(batch=tt.batches(SPEC, rows=(1, 4)), module=tt.modules())
@settings(max_examples=5)
def test_laws_hold_under_given(batch, module):
    for law in LOSS_LAWS:
        law(exact, module, batch)


def test_a_violation_under_given_shrinks():
    seen = []

    @settings(max_examples=100, database=None, derandomize=True)
    @given(tt.batches({"y": tt.floats()}, rows=(2, 5)))
    def inner(batch):
        seen.append(len(batch["y"]))
        loss = lambda p, b: tfn.Mean((b["y"] * p["w"]).mean(), torch.ones(()))  # noqa: E731
        tt.check_row_additive(loss, {"w": torch.ones(1)}, batch)

    with pytest.raises(tt.LawViolation, match=r"(?s)y = float32\[2\] \[0.0, 0.0\].*row 0 \| row 1\n"):
        inner()
    assert seen[-1] == 2  # the batch that was drawn outside has shrunk as well


@given(tt.batches(SPEC, rows=(2, 4)))
@settings(max_examples=3)
def test_a_strategy_may_be_searched_under_given(batch):
    with pytest.raises(tt.LawViolation):
        for _ in range(20):  # three cases are drawn each time
            tt.check_row_additive(mean_of_means, None, tt.batches(SPEC, rows=(2, 4)))
            hypothesis.assume(False)


# --- nothing is left behind ---------------------------------------------------------------------------------------


def test_settings_and_the_disk_are_as_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = settings.default
    tt.check_row_additive(exact)
    with pytest.raises(tt.LawViolation):
        tt.check_row_additive(mean_of_means)
    assert settings.default is before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("law", STEP_LAWS)
def test_laws_of_a_step_change_neither_state_nor_batch(law):
    state, batch = start(0), rows(0)
    before = tfn.tree.copy((state, batch))
    law(base, state, batch)
    assert_identical((state, batch), before)


def test_a_wrong_step_harms_neither_generators_nor_state():
    """The fixture looks at the generators; the state is looked at here. Only `check_pure` has to give its own away."""

    def step(state, batch):
        np.random.rand()
        torch.manual_seed(1)
        return writes_state(state, batch)

    state, batch = start(0), rows(0)
    before = tfn.tree.copy((state, batch))
    tt.check_dtype_stable(step, state, batch)
    tt.check_keyed(step, state, batch)
    tt.check_agrees(step, step, state, batch)
    assert_identical((state, batch), before)


def test_profiles_are_registered():
    tt.register_profiles()
    ci, dev = settings.get_profile("trainfn-ci"), settings.get_profile("trainfn-dev")
    assert ci.derandomize and not dev.derandomize
    assert ci.deadline is None and dev.deadline is None


# --- wrong arguments ----------------------------------------------------------------------------------------------


def test_without_hypothesis_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match=r"needs hypothesis, .*`pip install 'trainfn\[testing\]'`"):
        importlib.reload(tt)


@pytest.mark.parametrize("law", [*LOSS_LAWS, tt.check_gradients])
def test_a_loss_is_a_function(law):
    with pytest.raises(TypeError, match=rf"{law.__name__}\(loss, model, batches\) takes a loss .* not Tensor"):
        law(torch.ones(()))


def test_padding_must_be_known():
    with pytest.raises(ValueError, match=r"can't guess the value that marks a row of \['x'\] as padding.*pad="):
        tt.check_padding_invariant(lambda model, b: tfn.Mean.of(model(b["x"])), None, {"x": tt.floats(4)})


@pytest.mark.parametrize("dim", [0, 1])
def test_padding_of_a_leaf_that_is_not_there(dim):
    with pytest.raises(ValueError, match=r"no leaf 'labels'. Its leaves are \['x', 'y'\]"):
        tt.check_padding_invariant(exact, pad={"labels": -100}, dim=dim)


def test_padding_of_ranks_by_a_leaf_that_is_not_there():
    with pytest.raises(ValueError, match=r"no leaf 'labels'. Its leaves are \['x', 'y'\]"):
        tt.check_rank_invariant(exact, pad={"labels": -100})


def test_an_error_of_the_loss_on_default_batches_says_so():
    with pytest.raises(KeyError) as error:
        tt.check_row_additive(lambda model, b: model(b["image"]))
    notes = "".join(traceback.format_exception_only(error.value))
    assert re.search(r"on a default model \(4 inputs, 3 outputs\) or batch", notes)


def test_an_error_of_the_loss_in_float64_says_so():
    with pytest.raises(RuntimeError) as error:
        tt.check_gradients(lambda model, b: tfn.losses.mse(model(b["x"].float()), b["x"][:, :3]))
    assert "check_gradients computes in float64" in "".join(traceback.format_exception_only(error.value))


# --- laws of a step -----------------------------------------------------------------------------------------------

BOTH_WAYS = [(net, 2) for net in NETS] + [(MLP_NET, 1), (MIXED_NET, 1)]  # one program, or one for each part of a step
ALL = "pure, deterministic, keyed, dtype_stable, no_host_sync, single_graph, eager_equals_compiled, donation, roundtrip"


@pytest.mark.parametrize("net, k", [pytest.param(net, k, id=f"{net.name}-{k}") for net, k in BOTH_WAYS])
def test_every_law_holds_for_every_net(net, k):
    step = tfn.train_step(net.loss, adamw(), accumulate=k)
    assert repr(tt.check_step(step, tfn.init(net.module(), adamw()), net.batch(4))) == f"9 laws hold: {ALL}"


def test_a_compiled_donating_step_and_several_batches():
    step = quick(tfn.train_step(squares, SGD), donate=True)
    state = start(0)
    assert len(tt.check_step(step, state, [rows(0), rows(1)]).held) == 9
    assert_identical(state, start(0))


def test_a_stream_is_checked_as_far_as_it_goes():
    step = tfn.train_step(squares, SGD, accumulate="stream")
    assert repr(tt.check_step(step, start(0), [[rows(0), rows(1)]])) == "2 laws hold: dtype_stable, roundtrip"


def test_all_broken_laws_are_reported():
    def step(state, batch):
        np.random.rand()
        return takes_item(state, batch)

    with pytest.raises(tt.LawViolation) as error:
        tt.check_step(step, start(0), rows(0))
    said = str(error.value)
    assert said.startswith("check_step: ")
    for number, law in enumerate(["check_pure", "check_no_host_sync", "check_single_graph"], 1):
        assert f"({number}) {law}: " in said
    with pytest.raises(tt.LawViolation, match=r"^check_pure: "):  # one alone is not numbered
        tt.check_step(writes_batch_in_place, start(0), rows(0))


def test_a_step_that_other_laws_crash_on_is_reported_all_the_same():
    inner = tfn.train_step(lambda p, b: tfn.losses.mse(b["x"] @ p["w"], b["y"]), tfn.optim.sgd(0.1))

    def widened(state, batch):
        new, metrics = inner(state, batch)
        return new._replace(params={name: p.double() for name, p in new.params.items()}), metrics

    def grown(state, batch):
        new, metrics = inner(state, batch)
        return new._replace(extra={"average": metrics["loss"].value}), metrics

    for step in (widened, grown):
        with pytest.raises(tt.LawViolation, match="check_dtype_stable: the step returns a state of another make"):
            tt.check_step(step, start(0), rows(0))


def writes_batch_in_place(state, batch):
    batch["y"].mul_(1.5)
    return base(state, batch)


def calls_backward(module):
    F.mse_loss(module(torch.ones(1, 3)), torch.ones(1, 1)).backward()


@pytest.mark.parametrize(
    "change, said",
    [
        (calls_backward, "the .grad of 'weight'"),
        (lambda module: module.train(False), "the mode of 'the module'"),
        (lambda module: module.register_forward_hook(lambda *args: None), "the hooks of 'the module'"),
        (lambda module: module.bias.data.add_(1), "the value of 'bias'"),
        (lambda module: setattr(module, "seen", len(vars(module))), "the attributes of 'the module'"),
    ],
    ids=["grad", "mode", "hooks", "value", "attributes"],
)
def test_a_module_that_a_step_changes_is_named(change, said):
    module = seeded(lambda: nn.Linear(3, 1))

    def step(state, batch):
        change(module)
        return state, {}

    state = type("Held", (tfn.TrainState,), {"module": module})(*start(0))  # whose module still has its values
    with pytest.raises(tt.LawViolation, match=rf"check_pure: the step changed: .*module[^\n]*\n(.*\n)*.*{said}"):
        tt.check_pure(step, state, rows(0))


@pytest.mark.parametrize("read", ["item", "tolist", "bool", "numpy", "nonzero", "mask"])
def test_a_read_inside_of_a_loss_is_found_on_its_line(read):
    """Not hidden by the mode that reroutes random functions, which every operation of a loss passes through."""

    def loss(p, b):
        found = p["w"].detach()
        if read == "item":
            found.sum().item()
        elif read == "tolist":
            found.tolist()
        elif read == "bool" and found.sum() > 0:
            pass
        elif read == "numpy":
            found.numpy()
        elif read == "nonzero":
            found.nonzero()
        elif read == "mask":
            found[found > 0]
        return squares(p, b)

    with pytest.raises(tt.LawViolation) as error:
        tt.check_no_host_sync(tfn.train_step(loss, SGD), start(0), rows(0))
    assert re.search(r"test_laws\.py:\d+, in loss: ", on_one_line(error))


def test_agreement_names_what_was_lost_and_what_differs():
    state = start(0)._replace(extra={"ema": {"w": torch.zeros(3)}})

    def loses(state, batch):
        return base(state._replace(extra={}), batch)

    with pytest.raises(tt.LawViolation, match=r"lost +0/extra/ema/w"):
        tt.check_agrees(loses, base, state, rows(0))
    with pytest.raises(tt.LawViolation, match=r"step +1\n.*differs +.*(params/w|grad_norm).*\n.*another formula"):
        tt.check_agrees(tfn.train_step(squares, tfn.optim.sgd(0.2)), base, state, rows(0))
    tt.check_agrees(tfn.accumulate(base, 2), base, state, [rows(0), rows(1)])


# --- laws of a loss, over the nets --------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [pytest.param(net, id=net.name) for net in NETS if net.rowwise])
def test_losses_of_the_nets_add_up(net):
    module, batch = net.module(), net.batch(4)
    tt.check_row_additive(net.loss, module, batch, tolerance=1e-3)
    tt.check_rank_invariant(net.loss, module, batch, pad={"y": -100}, tolerance=1e-3)
    tt.check_padding_invariant(net.loss, module, batch, tolerance=1e-3)
    tt.check_permutation_invariant(net.loss, module, batch)


@pytest.mark.parametrize("law", [tt.check_row_additive, tt.check_accumulation_invariant, tt.check_padding_invariant])
def test_batch_normalization_is_named(law):
    with pytest.raises(tt.LawViolation, match="the model's 'norm' normalizes by statistics of the rows"):
        law(CONV_NET.loss, CONV_NET.module(0.0), CONV_NET.batch(4))


def test_frozen_batch_normalization_adds_up():
    module = CONV_NET.module(0.0)
    module.get_submodule("norm").eval()
    tt.check_row_additive(CONV_NET.loss, module, CONV_NET.batch(4))


@pytest.mark.parametrize("net", [MLP_NET, GPT_NET], ids=["mlp", "gpt"])
def test_gradients_of_the_nets_are_slopes(net):
    tt.check_gradients(net.loss, net.module(), net.batch(3))


def test_positions_may_be_padded():
    module = GPT_NET.module()
    batch = {name: x[:, :3] for name, x in tokens(4).items()}
    tt.check_padding_invariant(cross_entropy, module, batch, pad={"x": 0, "y": -100}, dim=1)


def test_dropout_belongs_to_the_place_not_the_row():
    """A permutation gives other masks, so the loss is compared in eval mode; a true dependence is still found."""
    module = MLP_NET.module(0.5)
    tt.check_permutation_invariant(MLP_NET.loss, module, MLP_NET.batch(5))

    def by_place(model, b):
        return tfn.Mean.of(
            F.mse_loss(model(b["x"]), b["x"][:, :3], reduction="none").mean(1), torch.arange(len(b["x"]))
        )

    with pytest.raises(tt.LawViolation, match="the order of the rows changes the loss"):
        tt.check_permutation_invariant(by_place, module, MLP_NET.batch(5))


# --- laws of the rest ---------------------------------------------------------------------------------------------


def test_many_optimizers_and_schedules_in_one_process():
    """Torch gives up compiling one function after eight other things it was compiled for."""
    for n in range(10):
        tt.check_schedule(
            tfn.schedules.linear(1.0 + n, 10), total_steps=10, reference=lambda i, n=n: (1 + n) * (1 - i / 10)
        )
        tt.check_transform(tfn.optim.sgd(0.1 + n), {"w": torch.ones(2)})


def test_a_reference_may_be_a_list_of_values():
    tt.check_schedule(warm, total_steps=3, reference=[0.0, 0.2, 0.4, 0.6])
    with pytest.raises(tt.LawViolation, match=r"step +2\n *value +0.4, not 0.5"):
        tt.check_schedule(warm, total_steps=3, reference=[0.0, 0.2, 0.5, 0.6])


class Padded(ShuffledSampler):
    """Ten rows in batches of four: the last batch is filled with rows of weight 0."""

    num_rows, last = 10, "pad"

    def indices(self, step):
        return np.resize(super().indices(step), self.batch)

    def weights(self, step):
        return (np.arange(self.batch) < (2 if step % 3 == 2 else 4)).astype(np.float32)


class Unweighted(Padded):
    weights = property(lambda self: lambda step: np.ones(self.batch, np.float32))


class Dropping(ShuffledSampler):
    num_rows, steps_per_epoch = 10, 2


class Endless(ShuffledSampler):
    steps_per_epoch = None

    def indices(self, step):
        return np.random.default_rng([self.seed, step]).integers(0, self.num_rows, self.batch)


class AsTensors(ShuffledSampler):
    def indices(self, step):
        return torch.from_numpy(super().indices(step))


class InOrder(ShuffledSampler):
    def order(self, epoch):
        return np.arange(self.num_rows)


class Backwards(ShuffledSampler):
    def order(self, epoch):
        return np.arange(self.num_rows)[::-1]


@pytest.mark.parametrize("sampler", [Backwards, Padded, Dropping, Endless, AsTensors, InOrder])
def test_samplers_of_every_kind_hold(sampler):
    tt.check_sampler(sampler())


def test_samplers_that_cover_too_little_or_too_much():
    with pytest.raises(tt.LawViolation, match=r"rows that count"):
        tt.check_sampler(Unweighted())
    with pytest.raises(tt.LawViolation, match=r"(?s)left out of an epoch.*, 2 in all; 1 may be"):
        tt.check_sampler(Dropping(), drops=1)
    with pytest.raises(tt.LawViolation, match=r"(?s)not in the dataset.*of a dataset of 11"):
        tt.check_sampler(ShuffledSampler(), rows=11)
    with pytest.raises(tt.LawViolation, match=r"come more than once"):
        tt.check_sampler(WithReplacement())
    tt.check_sampler(WithReplacement(), once=False)
    tt.check_sampler(ShuffledOnce(), epochs=1)  # it says which order it means


class WithReplacement(ShuffledSampler):
    def order(self, epoch):
        return np.random.default_rng([self.seed, epoch]).integers(0, self.num_rows, self.num_rows)


def test_a_law_of_a_run_names_the_step_it_left_at():
    """A counter that starts anew is not noticed before it would have reached 2."""

    def make_run():
        calls = []

        def step(state, batch):
            calls.append(0)
            new, metrics = base(state, batch)
            return (new if len(calls) < 3 else state._replace(step=new.step)), metrics

        return step, start(0), rows

    with pytest.raises(tt.LawViolation, match=r"stopped after +step 1\n *differs +params/w"):
        tt.check_resume_bitexact(make_run, steps=4)


def test_equivariance_of_one_row_and_of_trees():
    tt.check_equivariant(torch.relu, torch.ones(1, 2))
    tt.check_equivariant(lambda t: {"sum": t["a"] + t["b"]}, {"a": torch.eye(3, 2), "b": torch.ones(3, 2)})
