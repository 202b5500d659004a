"""The loop: what it yields, when it stops, and that nothing is lost on the way."""

import math
import os
import signal
import textwrap
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import trainfn as tfn
from tests.processes import succeeded
from trainfn.process import Requests, termination, uninterrupted

OPTIMIZER = tfn.optim.sgd(0.1, momentum=0.9)


def loss(p, batch):
    return tfn.losses.mse(batch["x"] @ p["w"], batch["y"])


def fresh(seed=0):
    return tfn.init({"w": torch.ones(3)}, OPTIMIZER, seed=seed)


def batch(n):
    key = tfn.random.fold_in(tfn.random.key(1), n)
    return {"x": tfn.random.normal(key, (4, 3)), "y": torch.zeros(4)}


STEP = tfn.train_step(loss, OPTIMIZER)


def bits(state):
    return [leaf.tolist() for leaf in tfn.tree.leaves(state)]


def test_steps_yields_each_step_once_with_its_state_and_metrics():
    state, seen = fresh(), []
    for info in tfn.steps(STEP, state, [batch(0), batch(1)]):
        state, metrics = STEP(state, batch(info.n - 1))
        assert bits(info.state) == bits(state)
        assert info.metrics["loss"].value == metrics["loss"].value
        assert info.seconds > 0
        seen.append((info.n, info.until))
    assert seen == [(1, 2), (2, 2)]


def test_a_function_of_the_step_number_and_an_iterable_are_the_same_run():
    by_function = tfn.fit(STEP, fresh(), batch, until=5)
    by_iterable = tfn.fit(STEP, fresh(), (batch(n) for n in range(9)), until=5)
    assert bits(by_function) == bits(by_iterable)
    assert int(by_function.step) == 5


@given(st.integers(0, 6), st.integers(0, 6))
def test_a_run_cut_anywhere_and_resumed_is_the_uninterrupted_run(first, second):
    middle = tfn.fit(STEP, fresh(), batch, until=first)
    assert bits(tfn.fit(STEP, middle, batch, until=first + second)) == bits(
        tfn.fit(STEP, fresh(), batch, until=first + second)
    )


def test_a_finished_run_does_nothing():
    state = tfn.fit(STEP, fresh(), batch, until=3)
    assert tfn.fit(STEP, state, batch, until=3) is state


def test_callbacks_are_called_in_order_after_each_step():
    calls = []
    tfn.fit(STEP, fresh(), batch, until=2, callbacks=[lambda i: calls.append(("a", i.n)), lambda i: calls.append("b")])
    assert calls == [("a", 1), "b", ("a", 2), "b"]


def test_an_error_in_a_callback_names_the_callback():
    def broken(info):
        raise KeyError("x")

    with pytest.raises(KeyError) as caught:
        tfn.fit(STEP, fresh(), batch, until=2, callbacks=[broken])
    assert "broken" in caught.value.__notes__[0] and "step 1" in caught.value.__notes__[0]


def test_numpy_batches_become_tensors():
    arrays = {name: value.numpy() for name, value in batch(0).items()}
    assert bits(tfn.fit(STEP, fresh(), [arrays])) == bits(tfn.fit(STEP, fresh(), [batch(0)]))
    assert isinstance(arrays["x"], np.ndarray)


def test_a_stream_of_micro_batches():
    streamed = tfn.train_step(loss, OPTIMIZER, accumulate="stream")
    rows = batch(0)
    parts = [{k: v[:1].numpy() for k, v in rows.items()}, {k: v[1:] for k, v in rows.items()}]
    state = tfn.fit(streamed, fresh(), [iter(parts)])
    whole = tfn.fit(STEP, fresh(), [rows])
    torch.testing.assert_close(state.params, whole.params, rtol=1e-6, atol=0)


def test_batches_that_end_early_are_reported():
    with pytest.warns(UserWarning, match=r"the batches ended at step 2, before until=5"):
        tfn.fit(STEP, fresh(), [batch(0), batch(1)], until=5)


@pytest.mark.parametrize(
    ("batches", "kwargs", "error", "match"),
    [
        (batch, {}, ValueError, r"never ends. Write `until=1000`"),
        (3, {}, TypeError, r"batches is a int. Give an iterable of batches"),
        ([batch(0)], {"nonfinite": "ignore"}, ValueError, r"nonfinite='ignore': give"),
        ([batch(0)], {"nonfinite": "skip"}, ValueError, r"this step does not skip.*skip_nonfinite"),
    ],
)
def test_bad_arguments_say_what_to_write(batches, kwargs, error, match):
    with pytest.raises(error, match=match):
        tfn.fit(STEP, fresh(), batches, **kwargs)


# --- non-finite losses ----------------------------------------------------------------------------------------------


def poisoned(n):
    rows = batch(n)
    return rows if n != 2 else {**rows, "y": torch.full((4,), math.nan)}


def test_a_nonfinite_loss_raises_at_its_step():
    seen = []
    with pytest.raises(tfn.errors.NonFiniteError, match=r"the loss of step 3 is NaN or infinite"):
        tfn.fit(STEP, fresh(), poisoned, until=5, callbacks=[lambda info: seen.append(info.n)])
    assert seen == [1, 2]


@pytest.mark.parametrize("run", ["fit", "steps"])
def test_the_error_of_a_nonfinite_loss_holds_the_state_before_its_step(run):
    with pytest.raises(tfn.errors.NonFiniteError) as caught:
        if run == "fit":
            tfn.fit(STEP, fresh(), poisoned, until=5)
        else:
            list(tfn.steps(STEP, fresh(), poisoned, until=5))
    assert bits(caught.value.state) == bits(tfn.fit(STEP, fresh(), [batch(0), batch(1)]))


def test_the_error_of_a_donating_step_holds_the_newest_checkpoint_or_no_state(tmp_path):
    step = tfn.jit(STEP, compile=False, donate=True)
    with pytest.raises(tfn.errors.NonFiniteError) as caught:
        tfn.fit(step, fresh(), poisoned, until=5)
    assert caught.value.state is None
    assert "The state before step 3 was donated" in caught.value.__notes__[0]
    with pytest.raises(tfn.errors.NonFiniteError) as caught:
        tfn.fit(step, fresh(), poisoned, until=5, checkpoints=tfn.Checkpoints(tmp_path, every=1))
    assert bits(caught.value.state) == bits(tfn.fit(STEP, fresh(), [batch(0), batch(1)]))


def test_a_skipping_step_continues_as_if_the_batch_had_not_been():
    skipping = tfn.transforms.skip_nonfinite()(STEP)
    with pytest.warns(tfn.errors.NonFiniteWarning, match=r"step 3 is NaN or infinite; the step was skipped"):
        state = tfn.fit(skipping, fresh(), poisoned, until=4)
    clean = tfn.fit(STEP, fresh(), [batch(0), batch(1), batch(3)])
    assert bits(state)[1:] == bits(clean)[1:] or state.params["w"].tolist() == clean.params["w"].tolist()
    assert int(state.step) == 4


def test_continue_lets_it_through_and_says_so():
    with pytest.warns(tfn.errors.NonFiniteWarning, match=r"let through, as asked"):
        state = tfn.fit(STEP, fresh(), poisoned, until=3, nonfinite="continue")
    assert state.params["w"].isnan().all()


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["step", "callback", "batch"])
def test_ctrl_c_returns_the_last_complete_state(where):
    def press(at, n):
        if at == where and n == 3:
            os.kill(os.getpid(), signal.SIGINT)

    count = 0

    def step(state, rows):
        nonlocal count
        count += 1
        press("step", count)
        return STEP(state, rows)

    def batches(n):
        press("batch", n + 1)
        return batch(n)

    donating = tfn.jit(step, compile=False, donate=True)
    with pytest.warns(UserWarning, match=r"interrupted: the state after step \d is returned"):
        state = tfn.fit(donating, fresh(), batches, until=9, callbacks=[lambda info: press("callback", info.n)])
    done = 2 if where == "batch" else 3
    assert bits(state) == bits(tfn.fit(STEP, fresh(), batch, until=done))
    assert bits(tfn.fit(STEP, state, batch, until=9)) == bits(tfn.fit(STEP, fresh(), batch, until=9))


def test_a_second_ctrl_c_ends_the_step_at_once_and_returns_no_half_state():
    def impatient(state, rows):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return STEP(state, rows)

    with pytest.raises(KeyboardInterrupt):
        tfn.fit(impatient, fresh(), batch, until=3)


def test_the_interrupt_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    tfn.fit(STEP, fresh(), batch, until=2)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_background_job_ignores_ctrl_c_as_before(ignored):
    def step(state, rows):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return STEP(state, rows)

    state = tfn.fit(step, fresh(), batch, until=3, callbacks=[lambda info: os.kill(os.getpid(), signal.SIGINT)])
    assert bits(state) == bits(tfn.fit(STEP, fresh(), batch, until=3))
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_handler_that_python_has_not_set_stays(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: pytest.fail("could not be put back"))
    with uninterrupted() as ctrl_c, termination() as end:
        assert not ctrl_c.arrived and not end.arrived


def test_fit_runs_in_a_thread():
    out = []
    thread = threading.Thread(target=lambda: out.append(tfn.fit(STEP, fresh(), batch, until=3)))
    thread.start()
    thread.join()
    assert bits(out[0]) == bits(tfn.fit(STEP, fresh(), batch, until=3))


class Second(tfn.launch.Ranks):
    """One of two ranks. ``theirs`` are the flags of the other."""

    rank, size = 1, 2
    theirs = ()

    def any(self, flags):
        return [mine or theirs for mine, theirs in zip(flags, self.theirs, strict=True)]


def test_ctrl_c_on_one_rank_stops_all_after_the_same_step():
    ranks = Second()
    with pytest.raises(KeyboardInterrupt), Requests(ranks) as requests:
        signal.raise_signal(signal.SIGINT)  # held back
        ranks.theirs = (False, True, False)
        assert requests.agree(True) == [True]
        assert (requests.interrupted, requests.terminated) == (True, True)
        raise KeyboardInterrupt
    for theirs in (False, True):  # pressed after the last step, on this rank or on the other
        with pytest.raises(KeyboardInterrupt), Requests(ranks):
            ranks.theirs = (theirs,)
            if not theirs:
                signal.raise_signal(signal.SIGINT)
    ranks.theirs = (False,)
    with Requests(ranks):
        pass


# --- evaluate ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_evaluation_does_not_depend_on_the_batch_sizes(sizes):
    rows = sum(sizes)
    x, y = tfn.random.normal(tfn.random.key(3), (rows, 3)), torch.zeros(rows)
    pieces = [{"x": a, "y": b} for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]
    state, step = fresh(), tfn.eval_step(loss)
    whole = tfn.evaluate(step, state, [{"x": x, "y": y}])["loss"]
    split = tfn.evaluate(step, state, pieces)["loss"]
    torch.testing.assert_close(split.value, whole.value, rtol=1e-6, atol=0)
    assert split.weight == whole.weight == rows


def test_evaluating_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"there was no batch"):
        tfn.evaluate(tfn.eval_step(loss), fresh(), [])


# --- callbacks --------------------------------------------------------------------------------------------------------


def test_window_sums_what_every_skips():
    every, window = [], []
    tfn.fit(STEP, fresh(), batch, until=6, callbacks=[
        tfn.callbacks.every(3, lambda i: every.append(i.metrics["loss"].weight.item())),
        tfn.callbacks.window(3, lambda i: window.append(i.metrics["loss"].weight.item())),
    ])  # fmt: skip
    assert (every, window) == ([4.0, 4.0], [12.0, 12.0])


def test_log_lines():
    lines = []
    tfn.fit(STEP, fresh(), batch, until=4, callbacks=[tfn.callbacks.log(2, lines.append)])
    assert [line.split("  ")[0] for line in lines] == ["step 2/4", "step 4/4"]
    assert "loss" in lines[0] and "steps/s" in lines[0]


def test_progress_shows_loss_throughput_and_the_end(capsys):
    bar = tfn.callbacks.progress(per_step={"rows": 4}, seconds=0.0)
    tfn.fit(STEP, fresh(), batch, until=3, callbacks=[bar])
    shown = capsys.readouterr().err
    assert "3/3" in shown and "loss=" in shown and "rows/s=" in shown
    tfn.fit(STEP, fresh(), batch, until=2, callbacks=[bar])  # and again with the same one
    assert "2/2" in capsys.readouterr().err


def test_the_loop_never_reads_a_tensor_between_logs():
    """On an accelerator each read would wait for the device; here each read is counted."""
    code = """
        import torch, trainfn as tfn
        from torch.utils._python_dispatch import TorchDispatchMode

        class Reads(TorchDispatchMode):
            count = 0
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                Reads.count += func is torch.ops.aten._local_scalar_dense.default
                return func(*args, **(kwargs or {}))

        optimizer = tfn.optim.adam(0.1)
        step = tfn.train_step(lambda p, b: tfn.losses.mse(p["w"] * b, b), optimizer)
        state = tfn.init({"w": torch.ones(3)}, optimizer)
        with Reads():
            state, metrics = step(state, torch.ones(3))
            assert Reads.count == 0, Reads.count
            window = tfn.callbacks.window(100, print)
            window(tfn.StepInfo(1, state, metrics, 0.1))
            assert Reads.count == 0, Reads.count
    """
    succeeded("-c", textwrap.dedent(code))


def test_processes_that_would_each_train_alone_are_reported(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    step = tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), tfn.optim.sgd(0.1))
    state = tfn.init({"w": torch.ones(1)}, tfn.optim.sgd(0.1))
    with pytest.raises(RuntimeError, match=r"2 processes were launched, and the step has no plan.*`plan = tfn.launch"):
        tfn.fit(step, state, [torch.ones(1)])
