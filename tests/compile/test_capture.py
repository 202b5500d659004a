"""A step as a graph: what can be captured, what Python fixed while it was, and how that stays true."""

import re
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import trainfn as tfn
from tests.compile.capture_models import ROWS, Experts, classified, numbers
from tests.helpers import CONV_NET, MLP_NET, adamw, assert_close, assert_identical, generator, long, quick, seeded
from trainfn.errors import CaptureError, LeakedError, RecompileError, TrainfnError

pytestmark = pytest.mark.usefixtures("untouched_rng")

SGD = tfn.optim.sgd(0.1, momentum=0.9)
X, Y = torch.randn(4, 3, generator=generator(0)), torch.randn(4, 1, generator=generator(1))


def squares(model, batch):
    return tfn.losses.mse(model(batch["x"]), batch["y"])


def fresh(module, loss=squares, **kwargs):
    """A compiled step of a module, and its first state."""
    return quick(tfn.train_step(loss, SGD), **kwargs), tfn.init(module, SGD)


def batch(rows=4, width=3, seed=0):
    g = generator(seed)
    return {"x": torch.randn(rows, width, generator=g), "y": torch.randn(rows, 1, generator=g)}


# --- what can be captured -----------------------------------------------------------------------------------------


IN_TWO = [(row, 2) if n % 2 else long(row, 2) for n, row in enumerate(ROWS)]


# The row `vmap` calls the weight of a layer, and not its bias.
@pytest.mark.filterwarnings("ignore:The loss does not reach 1 of 2 parameters. .bias.")
@pytest.mark.parametrize(("row", "accumulate"), [*((row, 1) for row in ROWS), *IN_TWO], ids=str)
def test_the_graph_gives_the_bits_of_the_eager_step(row, accumulate):
    optimizer = adamw()
    eager = tfn.train_step(row.loss, optimizer, accumulate=accumulate)
    step = quick(eager)
    state = twin = tfn.init(seeded(row.module), optimizer)
    for _ in range(2):
        state, metrics = step(state, row.batch())
        twin, expected = eager(twin, row.batch())
        if row.name == "lstm":  # eager, it has a kernel of oneDNN's, which adds up in another order
            assert_close((state, metrics), (twin, expected), 1e-6)
        else:
            assert_identical((state, metrics), (twin, expected))
    assert step.explain().graphs == (1 if accumulate == 1 else 2)


def test_reentrant_checkpoints_are_captured_as_they_run():
    from tests.compile.capture_models import Blocks

    optimizer = adamw()
    eager = tfn.train_step(classified, optimizer)
    state = tfn.init(seeded(lambda: Blocks(use_reentrant=True)), optimizer)
    row = numbers(5, 8)()
    row["x"].requires_grad_()  # what a reentrant checkpoint needs
    got, wanted = quick(eager)(state, row), eager(state, row)
    assert_identical(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [long("lstm"), long("u-net"), "auxiliary loss", long("checkpoint"), "double backward", "cond"]
)
def test_compiled_it_rounds_alike(name):
    row = next(row for row in ROWS if row.name == name)
    eager = tfn.train_step(row.loss, SGD)
    state = tfn.init(seeded(row.module), SGD)
    assert_close(tfn.jit(eager)(state, row.batch()), eager(state, row.batch()), 1e-6)


def test_the_graph_is_a_value():
    """Its inputs have names; its operations have the user's line and module path; nothing has run."""
    net = CONV_NET
    optimizer = adamw()
    step, state = quick(tfn.train_step(net.loss, optimizer)), tfn.init(net.module(), optimizer)
    before = tfn.copy(state)
    graph = step.graph(state, net.batch(4))
    assert_identical(state, before)
    names = [node.name for node in graph.graph.find_nodes(op="placeholder")]
    assert names[:2] == ["step", "params_conv_weight"] and names[-2:] == ["batch_x", "batch_y"]
    convolution = next(node for node in graph.graph.nodes if node.target is torch.ops.aten.convolution.default)
    assert "self.conv(x)" in convolution.stack_trace
    assert list(convolution.meta["nn_module_stack"]) == ["", "conv"]
    assert not convolution.meta.get("autograd_backward")
    backward = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.convolution_backward.default)
    assert backward.meta["autograd_backward"]


@pytest.mark.parametrize(("accumulate", "most"), [(1, 330), (2, 420)])
def test_golden_numbers(accumulate, most):
    """A graph that grows costs everyone time: say why here."""
    optimizer = tfn.optim.adamw(1e-3)
    state = tfn.init(seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.Linear(4, 1))), optimizer)
    step = quick(tfn.train_step(squares, optimizer, accumulate=accumulate))
    step(state, batch())
    assert most * 0.5 < step.explain().nodes <= most


PINNED = re.findall(r'"torch==([\d.]+)"', (Path(__file__).parents[2] / "pyproject.toml").read_text())


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__.split("+")[0] not in PINNED, reason="each version of inductor fuses otherwise")
@pytest.mark.parametrize(("net", "most"), [pytest.param(MLP_NET, 25, id="mlp")])
def test_golden_kernels(net, most, monkeypatch):
    """More kernels than these are more launches at every step: say why here."""
    from torch._inductor import metrics

    monkeypatch.setattr("trainfn._compile._backend._PROGRAMS", OrderedDict())  # an equal program compiles nothing
    optimizer = adamw()
    step, state = tfn.jit(tfn.train_step(net.loss, optimizer)), tfn.init(net.module(), optimizer)
    before = metrics.generated_kernel_count
    step(state, net.batch(4))
    assert most * 0.5 < metrics.generated_kernel_count - before <= most


# --- what Python fixed --------------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    factor = 1.0

    def __init__(self):
        super().__init__(3, 1)
        self.scale, self.power, self.widths = 1.0, "one", [1, 2]

    def forward(self, x):
        how = {"one": 1.0, "two": 2.0}[self.power]
        return super().forward(x) * self.scale * how * len(self.widths) * self.factor


def rescale(module):
    module.scale = 3.0


def rename(module):
    module.power = "two"


def shadow(module):
    module.factor = 2.0  # an attribute of the instance, where there was one of the class


def hook(module):
    module.register_forward_hook(lambda module, given, out: out * 2)


def replace_forward(module):
    module.forward = lambda x: nn.functional.linear(x, module.weight)


def lengthen(module):
    module.widths.append(3)


@pytest.mark.parametrize("change", [rescale, rename, shadow, hook, replace_forward, lengthen])
def test_a_changed_module_is_captured_again(change):
    module = seeded(Scaled)
    step, state = fresh(module)
    step(state, batch())
    change(module)
    assert_identical(step(state, batch()), step.step(state, batch()))
    assert step.explain().graphs == 2
    step(state, batch())
    assert step.explain().traces == 2


def test_a_removed_hook_is_noticed():
    module = seeded(Scaled)
    handle = module.register_forward_hook(lambda module, given, out: out * 2)
    step, state = fresh(module)
    step(state, batch())
    handle.remove()
    assert_identical(step(state, batch()), step.step(state, batch()))


def test_a_replaced_activation_is_noticed():
    module = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)))
    step, state = fresh(module)
    step(state, batch())
    module[1] = nn.Tanh()
    assert_identical(step(state, batch()), step.step(state, batch()))


def closure():
    factor = 1.0

    def loss(model, batch):
        mean = squares(model, batch)
        return tfn.Mean(mean.total * factor, mean.weight)

    def change():
        nonlocal factor
        factor = 2.0

    return loss, change


FACTOR = 1.0


def of_a_global():
    def loss(model, batch):
        mean = squares(model, batch)
        return tfn.Mean(mean.total * FACTOR, mean.weight)

    def change():
        global FACTOR
        FACTOR += 1.0

    return loss, change


def of_an_object():
    class Experiment:
        factor, seen = 1.0, 0

        def loss(self, model, batch):
            mean = squares(model, batch)
            return tfn.Mean(mean.total * self.factor, mean.weight)

    made = Experiment()
    made.factor = 1.0

    def change():
        made.factor = 2.0

    return made.loss, change


def of_a_dict():
    settings = {"factor": 1.0}

    def loss(model, batch):
        mean = squares(model, batch)
        return tfn.Mean(mean.total * settings["factor"], mean.weight)

    return loss, lambda: settings.update(factor=2.0)


def of_a_tensor():
    held = [torch.tensor([1.0, 1.0])]

    def loss(model, batch):
        mean = squares(model, batch)
        return tfn.Mean(mean.total * held[0].sum(), mean.weight)

    return loss, lambda: held.__setitem__(0, torch.tensor([1.0, 3.0]))


@pytest.mark.parametrize("make", [closure, of_a_global, of_an_object, of_a_dict, of_a_tensor])
def test_a_changed_variable_is_noticed(make):
    loss, change = make()
    step, state = fresh(seeded(lambda: nn.Linear(3, 1)), loss)
    first = step(state, batch())
    change()
    second = step(state, batch())
    assert_identical(second, step.step(state, batch()))
    assert not torch.equal(first[1]["loss"].total, second[1]["loss"].total)


def test_a_tensor_of_a_closure_is_passed_by_reference():
    held = torch.tensor([1.0, 1.0])
    step, state = fresh(
        seeded(lambda: nn.Linear(3, 1)), lambda m, b: tfn.Mean(squares(m, b).total * held.sum(), Y.sum())
    )
    step(state, batch())
    held[0] = 5.0
    assert_identical(step(state, batch()), step.step(state, batch()))
    assert step.explain().traces == 1


def test_what_only_the_loop_around_uses_is_not_watched():
    class Experiment:
        def __init__(self):
            self.seen = 0

        def loss(self, model, batch):
            return squares(model, batch)

    made = Experiment()
    step, state = fresh(seeded(lambda: nn.Linear(3, 1)), made.loss)
    for _ in range(3):
        state, _ = step(state, batch())
        made.seen += 1
    assert step.explain().traces == 1


def test_an_equal_value_in_a_new_object_changes_nothing():
    module = seeded(Scaled)
    step, state = fresh(module)
    step(state, batch())
    module.scale = float("1.0")
    step(state, batch())
    assert step.explain().traces == 1


@pytest.mark.parametrize("name", ["autocast", "default dtype"])
def test_torchs_settings_are_part_of_the_signature(name):
    def loss(model, batch):
        return tfn.Mean.of((model(batch["x"]) * torch.ones(1)).float().double())

    step, state = fresh(seeded(lambda: nn.Linear(3, 1)), loss)
    given = batch()
    step(state, given)
    before = torch.get_default_dtype()
    try:
        if name == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                got, wanted = step(state, given), step.step(state, given)
        else:
            torch.set_default_dtype(torch.float64)
            got, wanted = step(state, given), step.step(state, given)
    finally:
        torch.set_default_dtype(before)
    assert_identical(got, wanted)
    assert step.explain().graphs == 2
    step(state, batch())
    assert step.explain().traces == 2


def test_python_values_in_the_batch_are_part_of_the_signature():
    step, state = fresh(seeded(lambda: nn.Linear(3, 1)), lambda m, b: tfn.Mean(squares(m, b).total * b["k"], Y.sum()))
    for k in (1, 2, 1):
        given = {**batch(), "k": k}
        got, wanted = step(state, given), step.step(state, given)
        assert_identical(got, wanted)
    assert step.explain().graphs == 2


def test_an_array_in_the_batch_is_refused():
    step, state = fresh(seeded(lambda: nn.Linear(3, 1)))
    with pytest.raises(TypeError, match=r"got a ndarray in the batch[\s\S]*torch\.as_tensor\(x\)"):
        step(state, {**batch(), "n": X.numpy()})


def test_over_the_budget_the_error_names_the_attribute():
    module = seeded(Scaled)
    step, state = fresh(module, max_graphs=1)
    step(state, batch())
    module.scale = 2.5
    with pytest.raises(RecompileError, match=r"not the batch: Scaled\.scale from 1\.0 to 2\.5"):
        step(state, batch())


# --- equal traces share a program ---------------------------------------------------------------------------------


def test_a_sweep_of_seeds_compiles_once():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    for seed in range(5):
        module = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.Linear(4, 1)), seed)
        step = tfn.jit(tfn.train_step(squares, SGD), backend=backend)
        state = tfn.init(module, SGD, seed=seed)
        assert_identical(step(state, batch()), step.step(state, batch()))
        assert step.explain().traces == 1
    assert len(compiled) == 1


def test_nine_modules_of_one_architecture_are_one_graph():
    step = quick(tfn.train_step(squares, SGD))
    for seed in range(9):
        step(tfn.init(seeded(lambda: nn.Linear(3, 1), seed), SGD), batch())
    assert (step.explain().graphs, step.explain().traces) == (1, 9)


def test_equal_shapes_alone_share_nothing():
    """Two architectures with the same tensors."""
    step = quick(tfn.train_step(squares, SGD))
    for last in (nn.ReLU, nn.Tanh):
        state = tfn.init(seeded(lambda last=last: nn.Sequential(nn.Linear(3, 1), last())), SGD)
        assert_identical(step(state, batch()), step.step(state, batch()))
    assert step.explain().graphs == 2


# --- tensors that stay behind -------------------------------------------------------------------------------------


def test_a_tensor_that_is_merely_kept_works_and_says_so_when_it_is_used():
    module = seeded(Experts)
    step, state = fresh(module, lambda m, b: tfn.Mean.of(m(b["x"]).square()))
    step(state, batch(width=4))
    for use in (lambda t: t + 1, float, lambda t: t.item(), lambda t: torch.sum(t)):
        with pytest.raises(LeakedError, match=r"Experts\.aux was written while a step was captured[\s\S]*as a metric"):
            use(module.aux)
    module(torch.ones(1, 4))  # an eager call writes a real one
    assert module.aux.item() > 0
    step(state, batch(width=4))


class Remembers(nn.Module):
    """The next step depends on what this one left on the module."""

    def __init__(self):
        super().__init__()
        self.cell, self.hidden = nn.Linear(3, 1), None

    def forward(self, x):
        out = self.cell(x) + (0 if self.hidden is None else self.hidden)
        self.hidden = out.detach()
        return out


class Counts(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) / self.calls


@pytest.mark.parametrize(
    ("make", "name"), [(Remembers, r"Remembers\.hidden"), (lambda: Counts(3, 1), r"Counts\.calls")]
)
def test_a_step_that_reads_what_it_wrote_is_refused(make, name):
    step, state = fresh(seeded(make))
    message = rf"it writes {name}, and what it computes depends on it[\s\S]*register_buffer"
    with pytest.raises(CaptureError, match=message):
        step(state, batch())


def test_a_counter_that_nothing_depends_on_is_harmless():
    class Counter(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    step, state = fresh(seeded(lambda: Counter(3, 1)))
    for _ in range(3):
        state, _ = step(state, batch())
    assert step.explain().graphs == 1 and step.explain().traces == 1


# --- errors -------------------------------------------------------------------------------------------------------


def unkeyed(model, batch):
    return tfn.Mean.of(model(batch["x"]) + torch.ops.aten.rand.default([1]))  # HERE


def in_the_backward_pass(model, batch):
    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * g.max().item()  # HERE

    return tfn.Mean.of(Noisy.apply(model(batch["x"])))


@pytest.mark.parametrize(
    ("loss", "remedy"),
    [(unkeyed, r"draws from torch's global generator"), (in_the_backward_pass, "A number was taken out of a tensor")],
)
def test_an_error_shows_the_users_line(loss, remedy):
    lines = Path(__file__).read_text().splitlines()
    here = next(n for n in range(loss.__code__.co_firstlineno, 10_000) if lines[n - 1].endswith("# HERE"))
    step, state = fresh(seeded(lambda: nn.Linear(3, 1)), loss)
    with pytest.raises(TrainfnError, match=remedy) as caught:
        step(state, batch())
    assert re.search(rf"test_capture\.py\"?(:|, line ){here}\b", str(caught.value)), str(caught.value)


# --- sizes --------------------------------------------------------------------------------------------------------


def padded(model, batch):
    return tfn.Mean.of((model(batch["x"]) - batch["y"]).square(), batch["mask"])


def ragged(rows, length):
    x = torch.randn(rows, length, 3, generator=generator(rows * length))
    return {"x": x, "y": x[..., :1].flip(0), "mask": torch.ones(rows, length, 1)}


@pytest.mark.parametrize("dynamic", [True, (0, 1), {"x": (0, 1), "y": (0, 1), "mask": (0, 1)}])
def test_one_graph_for_declared_dimensions(dynamic):
    module = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1)))
    step, state = fresh(module, padded, dynamic=dynamic)
    for rows, length in ((4, 6), (3, 11), (6, 24), (2, 2)):
        got, wanted = step(state, ragged(rows, length)), step.step(state, ragged(rows, length))
        assert_identical(got, wanted)
    assert (step.explain().graphs, step.explain().traces) == (1, 1)


def test_a_dimension_that_is_not_declared_stays_exact():
    step, state = fresh(seeded(lambda: nn.Linear(3, 1)), padded, dynamic=(1,))
    for length in (4, 7):
        step(state, ragged(4, length))
    assert step.explain().graphs == 1
    step(state, ragged(5, 7))
    assert step.explain().graphs == 2


def test_a_size_that_the_graph_does_not_hold_for_is_captured_again():
    def loss(model, batch):
        mean = padded(model, batch)
        return mean if batch["x"].shape[1] < 10 else tfn.Mean(mean.total * 2, mean.weight)

    step, state = fresh(seeded(lambda: nn.Linear(3, 1)), loss, dynamic=True)
    for length in (4, 12, 9, 30):
        got, wanted = step(state, ragged(4, length)), step.step(state, ragged(4, length))
        assert_identical(got, wanted)
    assert step.explain().graphs == 2


@pytest.mark.slow
def test_the_compiler_takes_symbolic_sizes():
    module = seeded(lambda: nn.Sequential(nn.Dropout(0.2), nn.Linear(3, 1)))
    step = tfn.jit(tfn.train_step(padded, SGD), dynamic=True)
    state = tfn.init(module, SGD)
    for rows, length in ((4, 6), (3, 11), (6, 24)):
        assert_close(step(state, ragged(rows, length)), step.step(state, ragged(rows, length)), 1e-6)
    assert step.explain().graphs == 1


def test_dynamic_dimensions_are_checked():
    with pytest.raises(TypeError, match=r"dynamic='x'\): say which dimensions of the batch vary"):
        tfn.jit(lambda s, b: (s, {}), dynamic="x")
    step, state = fresh(seeded(lambda: nn.Linear(3, 1)), padded, dynamic={"z": (0,)})
    with pytest.raises(
        ValueError,
        match=r"dynamic=\.\.\.\) names \['z'\], and the batch has \['mask', 'x', 'y'\]\. .*`dynamic=True` for all",
    ):
        step(state, ragged(4, 4))


# --- arguments that are easily mistaken ---------------------------------------------------------------------------


def weighed(params, batch):
    return tfn.Mean.of(params["w"].sum() * (batch["a"] * 3 - batch["b"] * 5) ** 2)


def of_params(loss, **kwargs):
    return quick(tfn.train_step(loss, SGD), **kwargs), tfn.init({"w": torch.tensor([1.0, 2.0])}, SGD)


def test_the_order_of_a_dict_is_kept():
    step, state = of_params(weighed)
    for given in (
        {"a": torch.ones(3), "b": torch.zeros(3)},
        {"b": torch.zeros(4), "a": torch.ones(4)},
        {"b": torch.zeros(3), "a": torch.ones(3)},
    ):
        assert_identical(step(state, given), step.step(state, given))


def test_one_tensor_in_two_places_is_two_inputs():
    step, state = of_params(weighed)
    same = torch.ones(3)
    step(state, {"a": same, "b": same})
    given = {"a": torch.ones(3), "b": torch.zeros(3)}
    assert_identical(step(state, given), step.step(state, given))


@pytest.mark.parametrize("compile", [True, False])
def test_leaves_of_a_donated_state_that_share_memory(compile):
    """An average that starts as the parameters themselves."""

    def average(old, new, metrics):
        return new._replace(extra={"slow": tfn.tree.lerp(old.extra["slow"], new.params, 0.5)}), metrics

    step, state = of_params(lambda p, b: tfn.Mean.of((p["w"] ** 2).sum() * b), donate=True, compile=compile)
    step = quick(tfn.transforms.after(average)(step.step), donate=True, compile=compile)
    state = state._replace(extra={"slow": dict(state.params)})
    twin = tfn.copy(state)
    for _ in range(3):
        state, _ = step(state, torch.ones(2))
        twin, _ = step.step(twin, torch.ones(2))
        assert_identical(state, twin)


@pytest.mark.parametrize("other", [None, (X, X), {"k": X}])
def test_another_kind_of_leaf_is_another_structure(other):
    def loss(params, batch):
        found = batch["m"]
        found = 5.0 if found is None else sum(tfn.tree.leaves(found)).sum()
        return tfn.Mean.of(params["w"].sum() * batch["z"] * found)

    step, state = of_params(loss)
    for m in (X, other, X):
        given = {"m": m, "z": torch.ones(2)}
        assert_identical(step(state, given), step.step(state, given))


def test_a_mapping_is_a_batch():
    from collections import UserDict

    step, state = of_params(weighed)
    given = {"a": torch.ones(3), "b": torch.zeros(3)}
    assert_identical(step(state, UserDict(given)), step.step(state, given))


class Settings:
    scale = 1.0


def of_a_class():
    Settings.scale = 1.0
    return lambda: Settings.scale, lambda: setattr(Settings, "scale", 3.0)


def of_a_namespace():
    import argparse

    found = argparse.Namespace(scale=1.0)
    return lambda: found.scale, lambda: setattr(found, "scale", 3.0)


def of_a_number():
    held = torch.tensor(1.0)
    return lambda: float(held), lambda: held.fill_(3.0)


def of_a_flag():
    held = torch.tensor(True)
    return lambda: 1.0 if held else 3.0, lambda: held.fill_(False)


def of_a_property():
    class Found:
        held = 1.0

        @property
        def scale(self):
            return self.held

    found = Found()
    found.held = 1.0
    return lambda: found.scale, lambda: setattr(found, "held", 3.0)


@pytest.mark.parametrize("make", [of_a_class, of_a_namespace, of_a_number, of_a_flag, of_a_property])
def test_settings_that_changed_are_noticed(make):
    read, change = make()
    step, state = of_params(lambda p, b: tfn.Mean.of(p["w"].sum() * b * read()))
    step(state, torch.ones(2))
    change()
    assert_identical(step(state, torch.ones(2)), step.step(state, torch.ones(2)))


def test_a_tensor_from_outside_that_became_another_kind():
    teacher = seeded(lambda: nn.Linear(3, 1))
    step, state = fresh(
        seeded(lambda: nn.Linear(3, 1)),
        lambda m, b: tfn.losses.mse(m(b["x"]), teacher(b["x"].to(teacher.weight.dtype)).float().detach()),
    )
    step(state, batch())
    teacher.double()
    assert_identical(step(state, batch()), step.step(state, batch()))


def test_an_error_leaves_nothing_of_the_trace_on_the_module():
    class Fails(nn.Linear):
        aux = None

        def forward(self, x):
            self.aux = super().forward(x)
            raise ZeroDivisionError("mine")

    module = seeded(lambda: Fails(3, 1))
    step, state = fresh(module)
    with pytest.raises(ZeroDivisionError, match="mine"):
        step(state, batch())
    assert not hasattr(module.aux, "fake_mode")


def test_numbers_are_written_on_the_device_where_they_are_used():
    """A copy from the host would make a step wait, and a CUDA graph can't record it."""
    from trainfn._compile._graph import lift_constants

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    held = graph.get_attr("held")
    fresh = graph.call_function(torch.ops.aten.lift_fresh_copy.default, (held,))
    options = {"dtype": torch.bfloat16, "device": torch.device("meta")}
    moved = graph.call_function(torch.ops.aten._to_copy.default, (fresh,), options)
    graph.output([graph.call_function(torch.ops.aten.mul.Tensor, (x, moved))])
    module = torch.fx.GraphModule({"held": torch.tensor(1.5)}, graph)
    assert lift_constants(module, lambda value: value) == []
    names = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    assert names == ["aten.full.default", "aten.mul.Tensor"]
    full = next(iter(module.graph.find_nodes(op="call_function", target=torch.ops.aten.full.default)))
    assert full.args == ([], 1.5)
    assert (full.kwargs["dtype"], full.kwargs["device"]) == (torch.bfloat16, torch.device("meta"))


def test_a_warning_that_is_an_error_stays_itself():
    state = tfn.init(seeded(lambda: nn.Linear(2, 1)), tfn.optim.sgd(0.1))
    step = tfn.jit(tfn.train_step(lambda m, x: tfn.Mean.of(x @ m.weight.T), tfn.optim.sgd(0.1)), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(tfn.errors.UnreachedWarning, match="does not reach 1 of 2 parameters: 'bias'"):
            step(state, torch.ones(3, 2))
