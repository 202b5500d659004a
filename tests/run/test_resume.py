"""A run that stops, however it stops, goes on as if nothing had happened."""

import json
import os
import random
import re
import signal
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trainfn as tfn
import trainfn.testing as tt
from tests.helpers import GPT_NET, MLP_NET, assert_identical, quick
from tests.optim.table import OPTIMIZERS
from tests.processes import ended

ROWS = 12
NET = MLP_NET
DATA = NET.batch(ROWS)
SAMPLERS = {
    "sequential": lambda: tfn.data.sequential(ROWS, 4),
    "shuffled": lambda: tfn.data.shuffled(ROWS, 5, seed=3, last="pad"),
    "dropped": lambda: tfn.data.shuffled(ROWS, 5, seed=3, last="drop"),
    "weighted": lambda: tfn.data.weighted(np.arange(1, ROWS + 1), 4, seed=3),
    "grouped": lambda: tfn.data.grouped_by_length(np.arange(ROWS) % 5 + 1, 4, seed=3, mega_batch=2),
    "bucketed": lambda: tfn.data.bucketed(np.arange(ROWS) % 3 + 1, 2, boundaries=[2, 3], seed=3),
}


class Noisy(torch.utils.data.Dataset):
    """Augmented by all three global generators, as other people's datasets are."""

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        noise = torch.rand(4) + random.random() + np.random.rand()
        return {"x": DATA["x"][i] + noise.float(), "y": DATA["y"][i]}


def masking(rows):
    """A collator that draws."""
    batch = torch.utils.data.default_collate(rows)
    return {**batch, "x": batch["x"].masked_fill(torch.rand(batch["x"].shape) < 0.2, 0.0)}


OPTIMIZER_TABLE = {name: optimizer for name, optimizer, _ in OPTIMIZERS}


def make_run(sampler="shuffled", accumulate=1, workers=0, collate=None, optimizer="adamw clipped", dropout=0.2):
    rule = OPTIMIZER_TABLE[optimizer]
    options = {"collate": collate} if collate else {}
    batches = tfn.data.loader(Noisy(), SAMPLERS[sampler](), num_workers=workers, **options)
    step = tfn.jit(tfn.train_step(NET.loss, rule, accumulate=accumulate), compile=False, donate=True)
    return step, tfn.init(NET.module(dropout), rule, seed=7), batches


@settings(max_examples=30)
@given(
    sampler=st.sampled_from(sorted(SAMPLERS)),
    optimizer=st.sampled_from(sorted(OPTIMIZER_TABLE)),
    collate=st.sampled_from([None, masking]),
    accumulate=st.integers(1, 2),
    stop=st.integers(1, 6),
    more=st.integers(1, 3),
)
def test_resume_is_bit_exact(sampler, optimizer, collate, accumulate, stop, more):
    kinds = {"sampler": sampler, "optimizer": optimizer, "collate": collate, "accumulate": accumulate}
    step, state, batches = make_run(**kinds)
    whole = tfn.fit(step, state, batches, until=stop + more)
    with tempfile.TemporaryDirectory() as folder:
        for until in (stop, stop + more):  # two processes, one after the other
            step, state, batches = make_run(**kinds)
            last = tfn.fit(step, state, batches, until=until, checkpoints=tfn.Checkpoints(folder, keep=1))
    assert_identical(last, whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_number_of_workers_changes_nothing(workers, tmp_path):
    step, state, batches = make_run()
    whole = tfn.fit(step, state, batches, until=6)
    for until, there in ((2, 0), (4, workers), (6, 0)):
        step, state, batches = make_run(workers=there)
        last = tfn.fit(step, state, batches, until=until, checkpoints=tfn.Checkpoints(tmp_path))
    assert_identical(last, whole)


def test_the_law_of_resumption():
    tt.check_resume_bitexact(lambda: make_run(collate=masking), steps=5)


def test_a_compiled_run_resumes_to_the_bit(tmp_path):
    def run(until, checkpoints=None):
        optimizer = tfn.optim.adamw(1e-2)
        step = quick(tfn.train_step(GPT_NET.loss, optimizer, accumulate=2), donate=True)
        state = tfn.init(GPT_NET.module(0.2), optimizer)
        return tfn.fit(step, state, lambda n: GPT_NET.batch(4, n), until=until, checkpoints=checkpoints)

    whole = run(5)
    run(2, tfn.Checkpoints(tmp_path, every=1))
    assert_identical(run(5, tfn.Checkpoints(tmp_path, every=2)), whole)
    assert tfn.Checkpoints(tmp_path).steps() == [1, 2, 4, 5]


# --- where a run goes on ------------------------------------------------------------------------------------------


def go(folder, until, *, said=None, callbacks=(), state=None, **kinds):
    step, fresh, batches = make_run(**kinds)
    checkpoints = folder if isinstance(folder, tfn.Checkpoints) else tfn.Checkpoints(folder, every=2)
    return tfn.fit(step, state or fresh, batches, until=until, checkpoints=checkpoints, callbacks=callbacks)


def test_a_finished_run_does_nothing(tmp_path, capsys):
    first = go(tmp_path, 4)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("checkpoint-*/*")}
    calls = []
    assert_identical(go(tmp_path, 4, callbacks=[calls.append]), first)
    assert not calls and {p: p.stat().st_mtime_ns for p in tmp_path.glob("checkpoint-*/*")} == before
    assert "resuming from" in capsys.readouterr().err


def test_the_last_state_is_saved_whether_due_or_not(tmp_path):
    go(tmp_path, 5)
    assert tfn.Checkpoints(tmp_path).steps() == [2, 4, 5]


def test_a_state_that_was_given_is_taken_if_it_is_not_behind(tmp_path):
    state = go(tmp_path, 3)
    old, changed = tfn.copy(state), state._replace(key=tfn.random.key(99))
    assert torch.equal(go(tmp_path, 5, state=changed).key, tfn.random.key(99))
    with pytest.raises(ValueError, match=r"the state is at step 3, and .* up to step 5.*another folder"):
        go(tmp_path, 6, state=old)


def test_batches_that_can_not_start_anywhere_are_refused(tmp_path):
    step, state, _ = make_run()
    with pytest.raises(ValueError, match=r"can't be started in the middle.*tfn\.data\.loader"):
        tfn.fit(step, state, [NET.batch(2)], checkpoints=tfn.Checkpoints(tmp_path))


@pytest.mark.parametrize(
    ("then", "now", "match"),
    [
        ({"sampler": "sequential"}, {"sampler": "shuffled"}, r"changed: batches\.sampler\.\S+ was .*other rows"),
        ({"accumulate": 1}, {"accumulate": 2}, r"accumulate was 1, is 2: the same rows per step and the same update"),
        ({"collate": None}, {"collate": masking}, r"batches\.collate\S* was .*masking.*other rows"),
    ],
)
def test_what_changed_is_reported_with_its_consequence(then, now, match, tmp_path, capsys):
    go(tmp_path, 2, **then)
    go(tmp_path, 4, **now)
    err = capsys.readouterr().err
    assert re.search(match, err), err
    assert "until was 2, is 4: the run ends at another step" in err


def edited(folder, *, rate=0.01, seed=0, until=4, smooth=0.0, inject=False, other=False):
    """The cell of a notebook, with a run in it."""

    def loss(model, b):
        return tfn.losses.cross_entropy(model(b["x"]), b["y"], label_smoothing=smooth)

    def another(model, b):
        return 2 * tfn.losses.cross_entropy(model(b["x"]), b["y"], label_smoothing=smooth)

    optimizer = (tfn.optim.inject_hyperparams(tfn.optim.adamw) if inject else tfn.optim.adamw)(rate)
    step = tfn.jit(tfn.train_step(another if other else loss, optimizer), compile=False)
    state = tfn.init(NET.module(), optimizer, seed=seed)
    return tfn.fit(step, state, lambda n: NET.batch(4, n), until=until, checkpoints=tfn.Checkpoints(folder, every=2))


@pytest.mark.parametrize(
    ("then", "now", "match"),
    [
        ({}, {"rate": 0.1}, r"changed: step\.rate was 0\.01, is 0\.1: the steps from here on are those of this run"),
        ({}, {"smooth": 0.5}, r"changed: step\.loss\.smooth was 0\.0, is 0\.5"),
        ({}, {"other": True}, r"changed: step\.loss was 'edited.*loss \(\w+\)', is 'edited.*another \(\w+\)'"),
        ({}, {"seed": 1}, r"changed: seed was .* is .*: the saved run's key is kept"),
        (
            {"inject": True},
            {"inject": True, "rate": 0.1},
            r"hyperparams\.learning_rate was 0\.01, is 0\.1: the saved state's",
        ),
    ],
)
def test_what_changed_in_a_step_or_a_state_is_reported(then, now, match, tmp_path, capsys):
    edited(tmp_path, **then)
    assert edited(tmp_path, **now, until=6).step == 6
    lines = [line for line in capsys.readouterr().err.splitlines() if "changed: " in line]
    assert len(lines) == 2 and re.search(match, "\n".join(lines)), lines


def test_a_finished_run_says_so(tmp_path, capsys):
    edited(tmp_path)
    capsys.readouterr()
    assert edited(tmp_path).step == 4
    said = capsys.readouterr().err
    assert re.search(r"the run is finished: the state is at step 4, and until=4\. Nothing is trained", said)
    assert "changed" not in said


def test_an_unchanged_run_reports_nothing(tmp_path, capsys):
    with pytest.raises(RuntimeError):
        go(tmp_path, 4, callbacks=[fails_at(3)])
    capsys.readouterr()
    go(tmp_path, 4, workers=2)
    assert capsys.readouterr().err == f"trainfn: resuming from {tmp_path}/checkpoint-2\n"


def fails_at(n):
    def callback(info):
        if info.n == n:
            raise RuntimeError("out of memory, say")

    return callback


def test_an_error_has_the_last_complete_state(tmp_path):
    with pytest.raises(RuntimeError) as caught:
        go(tmp_path, 5, callbacks=[fails_at(3)])
    step, fresh, batches = make_run()
    assert_identical(caught.value.state, tfn.fit(step, fresh, batches, until=3))


def test_ctrl_c_saves_the_state_it_returns(tmp_path):
    def press(info):
        if info.n == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.warns(UserWarning, match="interrupted: the state after step 3"):
        go(tmp_path, 9, callbacks=[press])
    assert tfn.Checkpoints(tmp_path).steps() == [2, 3]


SCRIPT = """
    import os, signal, sys, torch, trainfn as tfn
    optimizer = tfn.optim.sgd(0.1, momentum=0.9)
    step = tfn.train_step(lambda p, x: tfn.Mean.of((p["w"] - x) ** 2), optimizer)
    def callback(info):
        if info.n == 3: os.kill(os.getpid(), signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    state = tfn.init({"w": torch.zeros(2)}, optimizer)
    tfn.fit(step, state, lambda n: torch.full((2,), float(n)), until=5, callbacks=[callback],
            checkpoints=tfn.Checkpoints(sys.argv[1]))
    print("not reached")
"""


def test_sigterm_saves_and_ends_the_process_between_steps(tmp_path):
    done = ended("-c", textwrap.dedent(SCRIPT), tmp_path)
    assert (done.status, done.out) == (143, ""), done.err
    assert f"SIGTERM: saved {tmp_path}/checkpoint-3, and stopped" in done.err
    assert tfn.Checkpoints(tmp_path).steps() == [3]


def test_the_handler_of_sigterm_is_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    go(tmp_path, 2)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failed_save_leaves_state_and_checkpoints(tmp_path, monkeypatch):
    go(tmp_path, 2)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(tfn.errors.CheckpointError, match=r"the disk is full.*state in memory is intact") as caught:
            go(tmp_path, 6)
    step, fresh, batches = make_run()
    assert_identical(caught.value.state, tfn.fit(step, fresh, batches, until=int(caught.value.state.step)))
    step, fresh, batches = make_run()
    assert_identical(go(tmp_path, 6), tfn.fit(step, fresh, batches, until=6))


# --- callbacks ----------------------------------------------------------------------------------------------------


def test_callbacks_go_on_with_what_they_kept(tmp_path):
    """The sums of a window that is half full, the patience of early stopping."""
    lines, whole = [], []
    step, state, batches = make_run()
    tfn.fit(step, state, batches, until=6, callbacks=[tfn.callbacks.window(4, keep(whole))])
    for until in (2, 3, 6):
        go(tmp_path, until, callbacks=[tfn.callbacks.window(4, keep(lines))])
    assert lines == whole and len(lines) == 1


def keep(lines):
    return lambda info: lines.append((info.n, info.metrics["loss"].total.item(), info.metrics["loss"].weight.item()))


def test_new_and_missing_callbacks_are_reported(tmp_path, capsys):
    go(tmp_path, 2, callbacks=[tfn.callbacks.window(4, print)])
    go(tmp_path, 4, callbacks=[tfn.callbacks.early_stopping("loss")])
    err = capsys.readouterr().err
    assert "the callback early_stopping is new, and starts without a state" in err
    assert "the callback window of the saved run is not in this one" in err


def check(every=1, then=(), **options):
    return tfn.callbacks.evaluation(tfn.eval_step(NET.loss), [NET.batch(4)], every=every, then=then, **options)


def test_evaluation_hands_its_metrics_on_and_runs_at_the_end(tmp_path):
    seen = []
    evaluating = check(2, [lambda info: seen.append((info.n, sorted(info.metrics)))])
    go(tmp_path, 5, callbacks=[evaluating])
    assert seen == [(n, ["eval_accuracy", "eval_loss"]) for n in (2, 4, 5)]


def test_early_stopping_stops_and_remembers(tmp_path, capsys):
    def stopping(values):
        values = iter(values)
        loss = lambda model, batch: tfn.Mean.of(torch.tensor([next(values)]))  # noqa: E731
        stop = tfn.callbacks.early_stopping("eval_loss", patience=2)
        return tfn.callbacks.evaluation(loss_step(loss), [0], every=1, then=[stop])

    go(tmp_path, 3, callbacks=[stopping([0.0, 3.0, 2.0, 2.5])])  # the first one is the trial before the first step
    assert int(go(tmp_path, 9, callbacks=[stopping([0.0, 2.0, 0.0])]).step) == 4
    told = "stopped after step 4: 'eval_loss' was best at step 2 (2), and has not improved in 2 looks"
    assert told in capsys.readouterr().err


def loss_step(loss):
    return lambda state, batch: {"loss": loss(None, batch)}


def test_the_best_is_kept_on_disk_and_in_memory(tmp_path):
    values = iter([0.0, 3.0, 1.0, 2.0, 4.0, 5.0])
    best = tfn.callbacks.keep_best("eval_loss")
    evaluating = tfn.callbacks.evaluation(
        lambda state, batch: {"loss": tfn.Mean.of(torch.tensor([next(values)]))}, [0], every=1, then=[best]
    )
    store = tfn.Checkpoints(tmp_path, keep=1, best="eval_loss")
    go(store, 5, callbacks=[evaluating])
    assert store.steps() == [2, 5] and (best.n, best.value) == (2, 1.0)
    assert_identical(store.restore(best.state, step=2)[0], best.state)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda f: [check(then=[tfn.callbacks.early_stopping("eval_los")])], r"Did you mean 'eval_loss'\?"),
        (lambda f: [check(then=[tfn.callbacks.keep_best("accuracy")])], r"Did you mean 'eval_accuracy'\?"),
    ],
)
def test_the_name_of_a_metric_is_checked_before_the_first_step(make, match, tmp_path):
    seen = []
    with pytest.raises(ValueError, match=match):
        go(tmp_path, 2, callbacks=[*make(tmp_path), seen.append])
    assert not seen


def test_the_best_metric_is_checked_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"Did you mean 'eval_loss'"):
        go(tfn.Checkpoints(tmp_path / "a", best="loss"), 2, callbacks=[check()])
    with pytest.raises(ValueError, match=r"nothing is evaluated in this run.*tfn\.callbacks\.evaluation"):
        go(tfn.Checkpoints(tmp_path / "b", best="eval_loss"), 2)


def test_wrong_arguments_of_callbacks():
    with pytest.raises(ValueError, match=r"every=0\): give the number of steps"):
        check(0)
    with pytest.raises(ValueError, match=r"iterated only once.*epochs=1"):
        tfn.callbacks.evaluation(print, iter([]), every=1)
    with pytest.raises(ValueError, match=r"the batches never end.*epochs=1"):
        tfn.callbacks.evaluation(print, make_run()[2], every=1)
    with pytest.raises(ValueError, match=r"mode='low'\): give 'min' or 'max'"):
        tfn.callbacks.keep_best("loss", mode="low")
    with pytest.raises(ValueError, match=r"patience=0\): give 1 or more"):
        tfn.callbacks.early_stopping("loss", patience=0)
    with pytest.raises(ValueError, match=r"there is no batch"):
        tfn.fit(*make_run()[:2], lambda n: NET.batch(2), until=1, callbacks=[
            tfn.callbacks.evaluation(tfn.eval_step(NET.loss), [], every=1)])  # fmt: skip


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=12), st.integers(1, 3), st.sampled_from(["min", "max"]))
def test_early_stopping_is_its_definition(values, patience, mode):
    stop = tfn.callbacks.early_stopping("m", patience=patience, mode=mode)
    sign, looks = (1 if mode == "min" else -1), []
    for n, value in enumerate(values):
        kept = tfn.callbacks.early_stopping("m", patience=patience, mode=mode)
        kept.load_state_dict(json.loads(json.dumps(stop.state_dict())))
        stop = kept  # as if the run had stopped here
        mean = {"m": tfn.Mean(torch.tensor(value, dtype=torch.float64), torch.tensor(1.0))}
        answer = stop(tfn.StepInfo(n, None, mean, 0.0))
        looks.append(value * sign)
        since = n - looks.index(min(looks))
        assert (answer is not None) == (since >= patience)
        if answer:
            break


def test_nothing_is_left_open(tmp_path):
    """Another process could save here at once."""
    go(tmp_path, 2)
    go(tmp_path, 3)
    assert Path(tmp_path / "checkpoint-3").is_dir()
