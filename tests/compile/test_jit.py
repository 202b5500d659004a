"""The compiled step: one graph, no recompiles, the numbers of the eager step, donation, and what it says on errors."""

import functools
import logging
import re
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import trainfn as tfn
from tests.helpers import CONV_NET, EACH_NET, MLP_NET, adamw, assert_close, assert_identical, quick, seeded, takes_long
from tests.processes import succeeded
from trainfn.errors import CaptureError, DonatedStateError, RecompileError

pytestmark = pytest.mark.usefixtures("untouched_rng")

LOGGER = logging.getLogger(__name__)
ROWS = 4
OPTIMIZER = adamw()


@functools.cache
def compiled(net, **kwargs):
    """A compiled step of a net, its eager twin and a first state; compiled once for all tests."""
    step = tfn.train_step(net.loss, OPTIMIZER, accumulate=kwargs.pop("accumulate", 1))
    return quick(step, **kwargs), step, tfn.init(net.module(), OPTIMIZER, seed=3)


def vector_loss(model, batch):
    return tfn.losses.mse(model(batch["x"]), batch["y"])


def rows(n, width=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(n, width, generator=g), "y": torch.randn(n, 1, generator=g)}


def linear(loss=vector_loss, **kwargs):
    """A compiled step of the smallest net, and its first state."""
    optimizer = tfn.optim.sgd(0.1, momentum=0.9)
    state = tfn.init({"w": torch.ones(3, 1)}, optimizer)
    return quick(tfn.train_step(lambda p, b: loss(lambda x: x @ p["w"], b), optimizer), **kwargs), state


# --- one graph ----------------------------------------------------------------------------------------------------


@EACH_NET
def test_the_whole_step_is_one_graph_and_equals_the_eager_step(net):
    """Dropout is on: the draws, too, are the same bits, and aot_eager runs the kernels that eager runs."""
    step, eager, first = compiled(net)
    state, twin = first, first
    for n in range(3):
        state, metrics = step(state, net.batch(ROWS, n))
        twin, expected = eager(twin, net.batch(ROWS, n))
        assert_identical(state, twin)
        assert_identical(metrics, expected)
        assert (step.explain().graphs, step.explain().breaks) == (1, 0)
    again = step(first, net.batch(ROWS, 0))
    assert_identical(step(first, net.batch(ROWS, 0)), again)
    assert step.explain().graphs == 1
    assert type(state) is type(first)


@EACH_NET
def test_accumulation_is_two_graphs_and_equals_the_eager_step(net):
    step, eager, first = compiled(net, accumulate=2)
    state, twin = first, first
    for n in range(3):
        state, metrics = step(state, net.batch(2 * ROWS, n))
        twin, expected = eager(twin, net.batch(2 * ROWS, n))
        assert_identical(state, twin)
        assert_identical(metrics, expected)
        assert step.explain().graphs == 2


@pytest.mark.parametrize("net", [MLP_NET, CONV_NET], ids=lambda net: net.name)
def test_the_graph_does_not_grow_with_accumulation(net):
    two, _, state = compiled(net, accumulate=2)
    two(state, net.batch(2 * ROWS))
    five, _, state = compiled(net, accumulate=5)
    for n in range(2):
        state, _ = five(state, net.batch(5 * ROWS, n))
        assert five.explain().graphs == two.explain().graphs == 2
    assert five.explain().nodes == two.explain().nodes


def test_uneven_micro_batches_compile_once_for_each_size():
    step, state = linear()
    step = quick(tfn.accumulate(step.step, 3))
    for n in range(3):
        state, _ = step(state, rows(10, seed=n))  # 4 + 3 + 3
        assert step.explain().graphs == 3


def test_a_stream_is_two_graphs_however_long():
    step, state = linear()
    step = quick(tfn.accumulate(step.step, "stream"))
    for length in (1, 2, 4):
        state, _ = step(state, (rows(2, seed=n) for n in range(length)))
        assert step.explain().graphs == 2


def test_init_again_of_the_same_module_does_not_recompile():
    net = MLP_NET
    module = net.module()
    step = quick(tfn.train_step(net.loss, OPTIMIZER))
    one, two = tfn.init(module, OPTIMIZER, seed=0), tfn.init(module, OPTIMIZER, seed=1)
    assert type(one) is type(two)
    step(one, net.batch(ROWS))
    step(two, net.batch(ROWS))
    assert step.explain().graphs == 1


def test_state_and_step_changed_by_hand_do_not_recompile():
    """A new key, another step count or a scaled parameter are numbers, not structure."""
    step, state = linear()
    step(state, rows(4))
    changed = state._replace(step=state.step + 5, key=tfn.random.key(9), params={"w": 2 * state.params["w"]})
    step(changed, rows(4))
    assert step.explain().graphs == 1


def test_one_dynamic_graph_for_several_sizes():
    step, state = linear(dynamic=True)
    for n in (4, 5, 9):
        state, metrics = step(state, rows(n))
        assert metrics["loss"].weight == n
    assert step.explain().graphs == 1


def test_sizes_are_exact_by_default():
    step, state = linear()
    for n in (4, 5, 9, 5):
        step(state, rows(n))
    assert step.explain().graphs == 3


def test_explain():
    step, state = linear()
    assert (step.explain().graphs, step.explain().shapes) == (0, [])
    step(state, rows(17))
    report = step.explain()
    assert report.graphs == 1 and report.breaks == 0 and report.nodes > 10 and report.seconds > 0
    assert report.shapes == ["step(batch['x']: float32[17, 3], batch['y']: float32[17, 1])"]
    assert re.match(r"1 graphs of \d+ operations, 0 breaks, compiled in \d+\.\d s \(cache: 0 hits", str(report))
    assert repr(step).startswith("Compiled(TrainStep(")


def test_any_pure_function_compiles():
    state = tfn.init({"w": torch.ones(3, 1)}, OPTIMIZER)
    evaluate = quick(tfn.eval_step(lambda p, b: tfn.losses.mse(b["x"] @ p["w"], b["y"])))
    assert_identical(evaluate(state, rows(4)), evaluate.step(state, rows(4)))
    assert evaluate.explain().graphs == 1


# --- donation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_donated_step_gives_the_same_bits_in_the_old_memory(compile, accumulate):
    net = MLP_NET
    keep, _, first = compiled(net, accumulate=accumulate)
    donate = quick(keep.step, donate=True, compile=compile)
    state, donated = first, tfn.copy(first)
    places = {name: p.data_ptr() for name, p in donated.params.items()}
    for n in range(3):
        state, metrics = keep(state, net.batch(ROWS * accumulate, n))
        donated, got = donate(donated, net.batch(ROWS * accumulate, n))
        assert_identical(donated, state)
        assert_identical(got, metrics)
    assert {name: p.data_ptr() for name, p in donated.params.items()} == places
    assert donate.explain().graphs == (accumulate > 1) + 1 if compile else True


@pytest.mark.parametrize("compile", [True, False])
def test_a_donated_state_is_dead(compile):
    step, state = linear(donate=True, compile=compile)
    old = state
    state, _ = step(state, rows(4))
    with pytest.raises(DonatedStateError, match=r"step\(state, batch\): this state was given to a step with donate"):
        step(old, rows(4))
    with pytest.raises(DonatedStateError, match=r"`\.shape` of a donated tensor.*trainfn\.copy\(state\)"):
        _ = old.params["w"].shape
    with pytest.raises(DonatedStateError, match="`sum` of a donated tensor"):
        torch.sum(old.params["w"])
    for use in (
        lambda w: w + 1,
        lambda w: 2 * w,
        lambda w: -w,
        lambda w: w[0],
        float,
        bool,
        lambda w: torch.ones(3) * w,
    ):
        with pytest.raises(DonatedStateError, match="donated tensor: this state was given"):
            use(old.params["w"])
    evaluate = tfn.eval_step(lambda p, b: tfn.Mean.of(p["w"]))
    for use in (tfn.copy, lambda s: evaluate(s, rows(4)), lambda s: tfn.tree.global_norm(s.params)):
        with pytest.raises(DonatedStateError, match="donate=True"):
            use(old)
    assert repr(old.params["w"]) == "<donated>"
    assert "TrainState(functions" in repr(old)
    step(state, rows(4))


def test_a_copy_survives_donation():
    step, state = linear(donate=True)
    kept = tfn.copy(state)
    before = kept.params["w"].clone()
    step(state, rows(4))
    assert torch.equal(kept.params["w"], before)
    step(kept, rows(4))


@pytest.mark.parametrize("compile", [True, False])
def test_donation_when_tensors_of_the_state_change_places(compile):
    """A leaf handed to another slot must be read before its own slot is overwritten."""

    def rotate(old, new, metrics):
        extra = {"previous": old.params["w"], "before": old.extra["previous"], "same": old.extra["same"]}
        return new._replace(extra=extra), metrics

    plain, state = linear(compile=False)
    step = tfn.transforms.after(rotate)(plain.step)
    state = state._replace(extra={"previous": torch.zeros(3, 1), "before": torch.ones(3, 1), "same": torch.ones(2)})
    keep, donate = quick(step, compile=False), quick(step, donate=True, compile=compile)
    donated = tfn.copy(state)
    for n in range(3):
        state, _ = keep(state, rows(4, seed=n))
        donated, _ = donate(donated, rows(4, seed=n))
        assert_identical(donated, state)
    assert donated.extra["previous"].data_ptr() != donated.params["w"].data_ptr()


def test_donation_swaps_two_parameters():
    def swap(old, new, metrics):
        return new._replace(params={"a": old.params["b"], "b": old.params["a"]}), metrics

    optimizer = tfn.optim.sgd(0.1)
    state = tfn.init({"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}, optimizer)
    step = tfn.transforms.after(swap)(tfn.train_step(lambda p, x: tfn.Mean.of(p["a"] * p["b"] * x), optimizer))
    state, _ = quick(step, donate=True, compile=False)(state, torch.ones(1))
    assert (state.params["a"].item(), state.params["b"].item()) == (2.0, 1.0)


@pytest.mark.parametrize("compile", [True, False])
def test_donation_with_adopted_storage_keeps_the_module_current(compile):
    net = MLP_NET
    module = net.module()
    state = tfn.init(module, OPTIMIZER, storage="adopt")
    step = quick(tfn.train_step(net.loss, OPTIMIZER), donate=True, compile=compile)
    for n in range(2):
        state, _ = step(state, net.batch(ROWS, n))
        for name, p in module.named_parameters():
            assert p.data_ptr() == state.params[name].data_ptr() and torch.equal(p, state.params[name])
    assert all(p.is_leaf and p.requires_grad and p.grad is None for p in module.parameters())


@pytest.mark.parametrize("compile", [True, False])
def test_donation_refuses_another_structure(compile):
    def grow(old, new, metrics):
        return new._replace(extra={"new": new.step}), metrics

    step, state = linear(compile=False)
    with pytest.raises(
        ValueError,
        match=r"donate=True\): the step returned a state of another .*, shape or dtype .* `jit\(step, donate=False\)`",
    ):
        quick(tfn.transforms.after(grow)(step.step), donate=True, compile=compile)(state, rows(4))


@pytest.mark.parametrize("compile", [True, False])
def test_donation_needs_a_step(compile):
    _, state = linear()
    with pytest.raises(
        TypeError, match=r"donate=True\) needs a step that returns \(state, metrics\), and this one returned"
    ):
        quick(lambda s, b: s.params, donate=True, compile=compile)(state, rows(4))


@pytest.mark.parametrize("compile", [True, False])
def test_a_donating_step_that_fails_leaves_the_state_alone(compile):
    """An error before the update costs nothing: the state can be used again."""

    def fails(model, batch):
        if batch["x"].shape[0] == 3:
            raise ZeroDivisionError("three rows")
        return vector_loss(model, batch)

    step, state = linear(fails, donate=True, compile=compile)
    before = tfn.copy(state)
    with pytest.raises(ZeroDivisionError, match="three rows"):
        step(state, rows(3))
    assert_identical(state, before)
    step(state, rows(4))


# --- budgets and buckets ------------------------------------------------------------------------------------------


def test_the_budget_names_the_argument_and_the_shapes():
    step, state = linear(max_graphs=1, dynamic=False)
    step(state, rows(4))
    message = (
        r"step\(state, batch\) needs another compiled graph, and max_graphs=1 of them exist\. What changed: "
        r"batch\['x'\] from float32\[4, 3\] to float32\[7, 3\], batch\['y'\] from float32\[4, 1\] to float32\[7, 1\]"
        r"[\s\S]*tfn\.Buckets[\s\S]*dynamic=True"
    )
    for _ in range(2):
        with pytest.raises(RecompileError, match=message):
            step(state, rows(7))
    step(state, rows(4))
    assert step.explain().graphs == 1


def test_a_changed_dtype_is_named():
    step, state = linear(max_graphs=1)
    step(state, rows(4))
    double = {name: x.double() for name, x in rows(4).items()}
    with pytest.raises(RecompileError, match=r"batch\['x'\] from float32\[4, 3\] to float64\[4, 3\]"):
        step(state, double)


def test_a_changed_attribute_of_the_model_is_reported():
    """Not the batch but a guard: it is counted as a graph and, over the budget, told with torch's reason."""

    class Scaled(nn.Linear):
        how = "plain"

        def forward(self, x):
            return super().forward(x) * {"plain": 1, "double": 2, "triple": 3}[self.how]

    module = seeded(lambda: Scaled(3, 1))
    optimizer = tfn.optim.sgd(0.1)
    state = tfn.init(module, optimizer)
    step = quick(tfn.train_step(vector_loss, optimizer), max_graphs=2)
    for how, graphs in (("plain", 1), ("double", 2)):
        module.how = how
        new, _ = step(state, rows(4))
        assert step.explain().graphs == graphs
    assert_identical(new, step.step(state, rows(4))[0])
    module.how = "triple"
    with pytest.raises(RecompileError, match=r"not the batch:[\s\S]*how"):
        step(state, rows(4))


def padded_loss(model, batch):
    values = (model(batch["x"]) - batch["y"]).square()
    return tfn.Mean.of(values, batch["mask"])


def padded_rows(length, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, length, generator=g)
    return {"x": x, "y": x.flip(0), "mask": torch.ones(2, length), "weight": torch.ones(2)}


def test_buckets_are_so_many_graphs_and_change_no_loss():
    optimizer = tfn.optim.sgd(0.1)
    state = tfn.init({"w": torch.tensor([2.0])}, optimizer)
    plain = tfn.train_step(lambda p, b: padded_loss(lambda x: x * p["w"], b), optimizer)
    buckets = tfn.Buckets((4, 8), pad={"x": 7, "y": 0, "mask": 0})
    step = quick(plain, buckets=buckets)
    for length, graphs in ((3, 1), (4, 1), (2, 1), (5, 2), (8, 2), (1, 2)):
        new, metrics = step(state, padded_rows(length))
        expected, wanted = plain(state, padded_rows(length))
        assert step.explain().graphs == graphs
        assert_close((new, metrics), (expected, wanted))  # sums in another order, over zeros
    with pytest.raises(
        ValueError,
        match=r"Buckets\(sizes=\[4, 8\]\): .*size 9 in dimension 1 fits no bucket\. Write `Buckets\(\(4, 8, 9\)",
    ):
        step(state, padded_rows(9))
    with pytest.raises(
        ValueError, match=r"names \['mask', 'y'\], and the batch has \['x'\]: .* Leave the other names out of `pad`"
    ):
        step(state, {"x": torch.ones(2, 3)})


@pytest.mark.parametrize("sizes", [(), (8, 4), (4, 4)])
def test_bucket_sizes_ascend(sizes):
    with pytest.raises(ValueError, match=r"sizes ascend, and there is at least one\. Write `Buckets\(\(64, 128\)"):
        tfn.Buckets(sizes, pad={"x": 0})


def test_buckets_pad_the_named_leaves_along_their_dimension():
    batch = {"x": torch.ones(2, 3, 5), "n": [torch.ones(3, dtype=torch.int64), torch.ones(2)]}
    padded = tfn.Buckets((4,), pad={"x": 9}).apply(batch)
    assert padded["x"].shape == (2, 4, 5) and (padded["x"][:, 3] == 9).all() and (padded["x"][:, :3] == 1).all()
    assert padded["n"][1] is batch["n"][1]
    assert tfn.Buckets((4,), pad={"n/0": -1}, dim=0).apply(batch)["n"][0].tolist() == [1, 1, 1, -1]
    assert tfn.Buckets((8,), pad={"x": 0}, dim=-1).apply(batch)["x"].shape == (2, 3, 8)


# --- what can't be captured ---------------------------------------------------------------------------------------


def item(model, batch):
    scale = batch["y"].abs().max().item()  # HERE
    return vector_loss(model, {**batch, "y": batch["y"] / scale})


def branch(model, batch):
    loss = vector_loss(model, batch)
    if loss.total > 1e9:  # HERE
        return tfn.Mean(loss.total * 2, loss.weight)
    return loss


def boolean_index(model, batch):
    keep = batch["y"][:, 0] > 0
    return tfn.losses.mse(model(batch["x"])[keep], batch["y"][keep])  # HERE


def to_list(model, batch):
    first = batch["y"].tolist()[0][0]  # HERE
    return tfn.Mean.of(model(batch["x"]) * first)


def to_numpy(model, batch):
    return tfn.Mean.of(model(batch["x"]) * float(batch["y"].sum()))  # HERE


@pytest.mark.parametrize(
    ("loss", "remedy"),
    [
        (item, r"A number was taken out of a tensor\. Keep it a tensor"),
        (to_list, r"A number was taken out of a tensor\. Keep it a tensor"),
        (to_numpy, r"A number was taken out of a tensor\. Keep it a tensor"),
        (branch, r"A branch depends on a tensor's values\. Choose with `torch\.where"),
        (boolean_index, r"A shape depends on a tensor's values\. Keep the shape and weigh with a mask"),
    ],
)
def test_what_cannot_be_captured_shows_the_line_and_the_remedy(loss, remedy):
    lines = Path(__file__).read_text().splitlines()
    start = loss.__code__.co_firstlineno
    here = next(n for n in range(start, len(lines) + 1) if lines[n - 1].endswith("# HERE"))
    step, state = linear(loss)
    with pytest.raises(CaptureError, match=remedy) as caught:
        step(state, rows(4))
    message = str(caught.value)
    assert message.startswith("this step runs, but can't be compiled as one graph:")
    assert f"{__file__}:{here}, in {loss.__name__}" in message
    assert lines[here - 1].split("#")[0].strip() in message
    assert "tfn.jit(step, compile=False)" in message
    eager, state = linear(loss, compile=False)
    eager(state, rows(4))


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom("mine"), ValueError("mine"), RuntimeError("mine"), AssertionError("mine")])
def test_an_error_of_the_loss_surfaces_as_itself(error):
    def fails(model, batch):
        raise error

    step, state = linear(fails)
    with pytest.raises(type(error), match=r"^mine$"):
        step(state, rows(4))


def test_a_wrong_shape_in_the_loss_surfaces_as_torchs_own_error():
    step, state = linear()
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(4x5 and 3x1\)"):
        step(state, rows(4, width=5))


def test_a_loss_cut_from_the_parameters_says_so_when_compiled():
    step, state = linear(lambda model, batch: tfn.Mean.of(batch["x"]))
    with pytest.raises(ValueError, match="the loss does not depend on any parameter"):
        step(state, rows(4))


def test_a_step_works_after_one_that_could_not_be_captured():
    step, state = linear(item)
    with pytest.raises(CaptureError):
        step(state, rows(4))
    step, state = linear()
    step(state, rows(4))


def test_prints_logs_and_warnings_of_a_module_happen_once_while_it_is_captured(capsys, caplog):

    class Talks(nn.Linear):
        def forward(self, x):
            print("shape", x.shape)
            LOGGER.warning("shape %s", x.shape)
            warnings.warn("deprecated", stacklevel=1)
            return super().forward(x)

    optimizer = tfn.optim.sgd(0.1)
    state = tfn.init(seeded(lambda: Talks(3, 1)), optimizer)
    step = quick(tfn.train_step(vector_loss, optimizer))
    with pytest.warns(UserWarning, match="deprecated"):
        step(state, rows(4))
    step(state, rows(4))
    assert step.explain().graphs == 1
    assert (capsys.readouterr().out.count("shape"), len(caplog.records)) == (1, 1)


# --- arguments ----------------------------------------------------------------------------------------------------


def test_arguments_are_checked():
    step, _ = linear()
    with pytest.raises(TypeError, match=r"this step is compiled already\. .* `jit\(step\.step, \.\.\.\)`"):
        tfn.jit(step)
    with pytest.raises(
        TypeError,
        match=r"takes a function \(state, batch\) -> \(state, metrics\), not int\. Write `jit\(tfn\.train_step",
    ):
        tfn.jit(3)
    with pytest.raises(ValueError, match=r"max_graphs=0\): .* at least one graph\. Write `max_graphs=1`"):
        tfn.jit(step.step, max_graphs=0)


def test_a_backend_may_be_a_function():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step, state = linear(backend=backend)
    step(state, rows(4))
    assert len(graphs) == step.explain().graphs == 1


# --- the real compiler --------------------------------------------------------------------------------------------

PROGRAM = """
    import sys
    import torch
    import trainfn as tfn

    torch.set_num_threads(1)
    optimizer = tfn.optim.sgd(0.1)
    state = tfn.init({"w": torch.ones(3, 1)}, optimizer)
    loss = lambda p, b: tfn.losses.mse(torch.nn.functional.dropout(b["x"], 0.5) @ p["w"], b["y"])
    step = tfn.jit(tfn.train_step(loss, optimizer))
    batch = {"x": torch.arange(12.0).view(4, 3), "y": torch.ones(4, 1)}
    new, metrics = step(state, batch)
    eager, _ = step.step(state, batch)
    torch.testing.assert_close(new.params["w"], eager.params["w"], rtol=1e-6, atol=1e-6)
    report = step.explain()
    print(report.graphs, report.cache_hits, report.cache_misses)
"""


@takes_long
@pytest.mark.slow
def test_compile_caches_are_shared_between_processes(tmp_path):
    def run():
        done = succeeded("-c", textwrap.dedent(PROGRAM), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
        return [int(n) for n in done.out.split()]

    assert run() == [1, 0, 1]
    graphs, hits, misses = run()
    assert graphs == 1 and hits >= 1 and misses == 0


# --- buffers that grow ------------------------------------------------------------------------------------------------


class Growing(nn.Module):
    """Keeps the first number of each row."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.register_buffer("seen", torch.empty(0))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.seen, self.count = torch.cat([self.seen, x[:, 0].detach()]), self.count + 1
        return self.linear(x)


def test_a_buffer_may_grow_in_an_eager_step_that_donates():
    plain = tfn.train_step(lambda model, x: tfn.Mean.of(model(x).square()), tfn.optim.adamw(1e-2))
    donating = tfn.jit(plain, compile=False, donate=True)
    with torch.random.fork_rng(devices=[]):
        state = tfn.init(Growing(), tfn.optim.adamw(1e-2), seed=0)
    twin = tfn.copy(state)
    weight = twin.params["linear.weight"]
    for n in range(3):
        state, metrics = plain(state, torch.full((2, 2), float(n)))
        twin, expected = donating(twin, torch.full((2, 2), float(n)))
        assert_identical((twin, metrics), (state, expected))
    assert twin.buffers["seen"].tolist() == [0, 0, 1, 1, 2, 2]
    assert twin.params["linear.weight"] is weight  # others keep their memory
    with pytest.raises(ValueError, match=r"float32 \[6\] became float32 \[8\]. So it can't take its memory"):
        tfn.jit(plain, backend="eager", donate=True)(twin, torch.ones(2, 2))


@pytest.mark.parametrize(
    "given", [{"w": torch.ones(2)}, torch.ones(2), [torch.ones(1)]], ids=["dict", "tensor", "list"]
)
def test_an_eager_step_that_donates_names_a_state_of_another_structure(given):
    state = tfn.init({"w": torch.ones(2)}, tfn.optim.sgd(0.1))
    with pytest.raises(ValueError, match="a state of another structure, shape or dtype than the one it got"):
        tfn.jit(lambda s, b: (state, {}), compile=False, donate=True)(given, torch.ones(1))
