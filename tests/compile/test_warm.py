"""`jit(step, warm=)`: steps are eager up to one that is said beforehand, while a second process compiles."""

import gc
import os
import subprocess
import sys

import pytest
import torch

import trainfn as tfn
from tests.helpers import assert_identical, generator, long
from trainfn._compile import _ahead, _backend, _helper
from trainfn.errors import RecompileError

pytestmark = pytest.mark.usefixtures("untouched_rng")

OPTIMIZER = tfn.optim.sgd(0.1, momentum=0.9)
UNTIL, STEPS = 3, 6


def rows(n=4, seed=0):
    g = generator(seed)
    return {"x": torch.randn(n, 3, generator=g), "y": torch.randn(n, 1, generator=g)}


def loss(params, batch):
    return tfn.losses.mse(torch.nn.functional.dropout(batch["x"], 0.5) @ params["w"], batch["y"])


def things(loss=loss, accumulate=1):
    return tfn.train_step(loss, OPTIMIZER, accumulate=accumulate), tfn.init({"w": torch.ones(3, 1)}, OPTIMIZER)


def states(step, state, steps=STEPS):
    """The states of a run, the first one included."""
    out = [tfn.copy(state)]
    for n in range(steps):
        state, _ = step(state, rows(seed=n))
        out.append(tfn.copy(state))
    return out


@pytest.fixture
def uncompiled(monkeypatch):
    """The captured graph stands for the compiled one. Returns the traces that were compiled."""
    compiled = []

    def by_inductor(trace, settings):
        compiled.append(trace)
        return trace.graph.forward

    monkeypatch.setattr(_backend, "_by_inductor", by_inductor)
    monkeypatch.setattr(_backend, "_PROGRAMS", type(_backend._PROGRAMS)())
    return compiled


class Recorder:
    """In the place of the second process."""

    def __init__(self, made):
        self.given, self.waited, self.ended = [], [], False
        made.append(self)

    def give(self, key, make):
        self.given.append(key)

    def last(self):
        self.ended = True

    def wait(self, key):
        self.waited.append(key)


@pytest.fixture
def helpers(monkeypatch, uncompiled):
    made = []
    monkeypatch.setattr("trainfn._compile._warm.Helper", lambda: Recorder(made))
    return made


# --- with the compiler --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("donate", "accumulate"), [(True, 1), long(False, 2)])
def test_the_second_process_compiles_what_this_one_runs(donate, accumulate, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_backend, "_PROGRAMS", type(_backend._PROGRAMS)())
    eager, first = things(accumulate=accumulate)
    step = tfn.jit(eager, donate=donate, warm=UNTIL)
    run = states(step, tfn.copy(first))
    report = step.explain()
    assert (report.graphs, report.cache_misses) == (accumulate, 0) and report.cache_hits >= accumulate
    for a, b in zip(run[: UNTIL + 1], states(eager, first, UNTIL), strict=True):
        assert_identical(a, b)
    _backend._PROGRAMS.clear()  # as in a new process, which has the caches on the disk alone
    state = tfn.copy(run[UNTIL])
    compiled = tfn.jit(eager, donate=donate)
    for n in range(UNTIL, STEPS):
        state, _ = compiled(state, rows(seed=n))
        assert_identical(state, run[n + 1])
    report = compiled.explain()
    assert (report.graphs, report.cache_misses) == (accumulate, 0) and report.cache_hits >= accumulate


# --- which steps are eager ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("donate", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_eager_up_to_the_one_that_was_given(donate, accumulate, helpers, uncompiled):
    eager, state = things(accumulate=accumulate)
    twin = tfn.copy(state)
    step = tfn.jit(eager, donate=donate, warm=UNTIL)
    for n in range(STEPS):
        assert len(uncompiled) == (0 if n <= UNTIL else accumulate)
        state, metrics = step(state, rows(seed=n))
        twin, expected = eager(twin, rows(seed=n))
        assert_identical((state, metrics), (twin, expected))
    (helper,) = helpers
    assert helper.given == helper.waited and len(helper.given) == accumulate and helper.ended
    assert step.explain().traces == accumulate


def test_what_runs_depends_on_the_state_alone(helpers, uncompiled):
    """An old state is eager again; one of a later step, such as that of a resumed run, is compiled at once."""
    eager, first = things()
    run = states(eager, first)
    step = tfn.jit(eager, warm=UNTIL)
    step(run[UNTIL], rows())
    assert len(uncompiled) == 1 and not helpers
    step(run[1], rows())
    assert len(uncompiled) == 1 and len(helpers) == 1 and not helpers[0].given  # this process has it


def test_the_count_is_read_once_where_each_state_comes_from_the_last(helpers, monkeypatch):
    reads = []
    monkeypatch.setattr("trainfn._compile._warm.held", lambda x: reads.append(x) or x)
    states(tfn.jit(things()[0], warm=UNTIL), things()[1])
    assert len(reads) <= UNTIL + 1 + STEPS  # `states` copies: each of these states is new to the step
    step, (_, state) = tfn.jit(things()[0], warm=UNTIL), things()
    reads.clear()
    for _ in range(STEPS):
        state, _ = step(state, rows())
    assert len(reads) == UNTIL + 1


def test_a_step_that_returns_no_state_is_counted_too(helpers):
    evaluate = tfn.eval_step(loss)
    state = things()[1]._replace(step=torch.tensor(UNTIL))
    step = tfn.jit(evaluate, warm=UNTIL)
    for _ in range(2):
        assert_identical(step(state, rows()), evaluate(state, rows()))
    assert step.explain().graphs == 1


def test_what_changes_meanwhile_is_captured_again(helpers, uncompiled):
    factor = torch.nn.Module()
    factor.value = 1.0
    eager, state = things(lambda p, b: tfn.losses.mse(b["x"] @ p["w"] * factor.value, b["y"]))
    step = tfn.jit(eager, warm=UNTIL)
    twin = state
    for n in range(STEPS):
        factor.value = 1.0 if n < 2 else 2.0
        state, _ = step(state, rows(seed=n))
        twin, _ = eager(twin, rows(seed=n))
        assert_identical(state, twin)
    assert len(uncompiled) == 1 and len(set(helpers[0].given)) == 2


def test_the_budget_holds_for_eager_steps(helpers):
    eager, state = things()
    step = tfn.jit(eager, warm=UNTIL, max_graphs=1)
    state, _ = step(state, rows(4))
    with pytest.raises(RecompileError, match=r"batch\['x'\] from float32\[4, 3\] to float32\[5, 3\]"):
        step(state, rows(5))


# --- the second process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("executable", "warning"),
    [("/bin/false", "could not compile the step: it ended with code 1"), ("/none", "could not be started: .*No such")],
)
def test_without_a_second_process_this_one_compiles(executable, warning, uncompiled, monkeypatch):
    monkeypatch.setattr(sys, "executable", executable)
    eager, first = things()
    step = tfn.jit(eager, warm=UNTIL)
    with pytest.warns(UserWarning, match=warning):
        run = states(step, first)
    for a, b in zip(run, states(eager, first), strict=True):
        assert_identical(a, b)
    assert len(uncompiled) == 1


def test_a_graph_that_cannot_be_handed_over_is_reported(uncompiled, monkeypatch):
    def order(trace, settings):
        raise AttributeError("no pickle for this")

    monkeypatch.setattr("trainfn._compile._program.order", order)
    with pytest.warns(UserWarning, match=r"second process could not compile.*AttributeError: no pickle for this"):
        states(tfn.jit(things()[0], warm=UNTIL), things()[1])


def test_a_failure_in_the_second_process_is_reported():
    helper = _ahead.Helper()
    helper.give("a", lambda: b"no order")
    with pytest.warns(UserWarning, match="could not compile the step: UnpicklingError"):
        helper.wait("a")
    helper.last()
    assert helper._process.wait(60) == 0


def test_the_second_process_ends_with_its_owner():
    helper = _ahead.Helper()
    process = helper._process
    del helper
    gc.collect()
    assert process.poll() is not None


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="signals of POSIX")
def test_the_second_process_ends_when_the_first_one_was_killed():
    process = subprocess.Popen([sys.executable, "-P", _helper.__file__], stdin=subprocess.PIPE, start_new_session=True)
    process.stdin.close()
    assert process.wait(60) < 0


# --- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [0, -1, True, 2.0, "now"])
def test_the_number_of_eager_steps_must_be_given(warm):
    with pytest.raises(ValueError, match=r"say how many steps run eagerly.*`warm=200`.*is 100"):
        tfn.jit(things()[0], warm=warm)


@pytest.mark.parametrize(
    ("kwargs", "remedy"),
    [
        ({"backend": "aot_eager"}, "Leave out `warm=` or `backend=`"),
        ({"dynamic": True}, "symbolic sizes.*buckets=tfn.Buckets"),
    ],
)
def test_what_a_second_process_cannot_do_is_refused(kwargs, remedy):
    with pytest.raises(ValueError, match=remedy):
        tfn.jit(things()[0], warm="eager", **kwargs)


def test_it_goes_by_the_count_of_a_state():
    with pytest.raises(TypeError, match=r"goes by `state.step`, and this state is a dict.*tfn.init"):
        tfn.jit(lambda state, batch: (state, {}), warm=5)({"w": torch.ones(1)}, rows())
