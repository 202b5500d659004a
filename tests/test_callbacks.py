"""The role of a callback, and the callbacks of the core."""

import math

import pytest
import torch

import trainfn as tfn
from trainfn import callbacks

OPTIMIZER = tfn.optim.sgd(0.1)
STEP = tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), OPTIMIZER)


def fresh():
    return tfn.init({"w": torch.tensor([4.0])}, OPTIMIZER)


def run(*given, until=3, **options):
    return tfn.fit(STEP, fresh(), lambda n: torch.ones(1), until=until, callbacks=given, **options)


def info(n, *, seconds=0.5, until=None, **metrics):
    means = {name: tfn.Mean.of(torch.tensor([value])) for name, value in metrics.items()}
    return tfn.StepInfo(n, None, means, seconds, until)


class Recorder(tfn.Callback):
    """Writes down which method of the role was called."""

    def __init__(self):
        self.calls = []

    def __enter__(self):
        self.calls.append("enter")
        return self

    def __exit__(self, *error):
        self.calls.append("exit")

    def begin(self, info):
        self.calls.append(f"begin {info.n}")

    def check(self, names):
        self.calls.append(f"check {names}")

    def __call__(self, info):
        self.calls.append(info.n)

    def state_dict(self):
        return {"calls": len(self.calls)}

    def load_state_dict(self, state):
        self.calls.append(f"load {state['calls']}")


# --- the role ---------------------------------------------------------------------------------------------------------


def test_a_callback_that_overrides_nothing_changes_nothing(tmp_path, capsys):
    assert tfn.diff(run(tfn.Callback(), checkpoints=tfn.Checkpoints(tmp_path)), run()) == {}
    assert tfn.manifest(tmp_path / "checkpoint-3").extra["callbacks"] == []
    run(tfn.Callback(), until=4, checkpoints=tfn.Checkpoints(tmp_path))
    assert "the callback" not in capsys.readouterr().err  # it has no state that could be missing


def test_the_methods_of_the_role_are_called_in_order():
    recorder = Recorder()
    run(recorder)
    assert recorder.calls == ["enter", "begin 0", 1, 2, 3, "exit"]


def test_a_resumed_callback_gets_its_state_before_it_begins(tmp_path):
    run(Recorder(), until=2, checkpoints=tfn.Checkpoints(tmp_path))
    recorder = Recorder()
    run(recorder, until=3, checkpoints=tfn.Checkpoints(tmp_path))
    assert recorder.calls == ["load 4", "enter", "begin 2", 3, "exit"]


def test_a_finished_run_begins_nothing(tmp_path):
    run(until=3, checkpoints=tfn.Checkpoints(tmp_path))
    recorder = Recorder()
    run(recorder, until=3, checkpoints=tfn.Checkpoints(tmp_path))
    assert recorder.calls == ["enter", "exit"]


def test_callbacks_are_left_after_an_error():
    recorder = Recorder()
    with pytest.raises(ZeroDivisionError) as caught:
        run(recorder, lambda info: 1 / 0)
    assert recorder.calls == ["enter", "begin 0", 1, "exit"]
    assert int(caught.value.state.step) == 1


def test_an_evaluation_passes_the_role_on():
    recorder = Recorder()
    step = tfn.eval_step(lambda p, x: tfn.Mean.of(p["w"] * x))
    run(callbacks.evaluation(step, [torch.ones(1)], every=2, then=[recorder]))
    assert recorder.calls == ["enter", "check ['eval_loss']", "begin 0", 2, 3, "exit"]


def test_a_function_may_return_anything_and_only_a_stop_ends_the_run():
    assert int(run(lambda info: info.n).step) == 3
    assert int(run(lambda info: tfn.Stop("enough")).step) == 1


def test_every_callback_sees_the_step_after_which_another_stops():
    seen = []
    run(lambda info: tfn.Stop("enough"), lambda info: seen.append(info.n))
    assert seen == [1]


class Duck:
    def __call__(self, info):
        pass

    def begin(self, info):
        pass


@pytest.mark.parametrize(
    "given, words",
    [
        pytest.param(Duck(), r"it has `begin`.*`class Duck\(tfn\.Callback\)`", id="a method that would not be called"),
        pytest.param(callbacks.progress, r"it is a class.*Write `progress\(\.\.\.\)`", id="a class"),
        pytest.param(3, r"3\]: it can't be called.*`tfn\.StepInfo`", id="a number"),
    ],
)
@pytest.mark.parametrize("give", [run, lambda given: callbacks.evaluation(STEP, [0], every=1, then=[given])])
def test_what_is_not_a_callback_is_refused(give, given, words):
    with pytest.raises(TypeError, match=words):
        give(given)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_a_window_adds_up_in_float64():
    """2²⁴ + 1 + 1 …: each 1 is lost in float32."""
    found = []
    window = callbacks.window(101, lambda info: found.append(info.metrics["loss"]))
    window(info(1, loss=2.0**24))
    for n in range(2, 102):
        window(info(n, loss=1.0))
    assert (found[0].total.item(), found[0].weight.item()) == (2.0**24 + 100, 101)
    assert found[0].total.dtype == torch.float64


def test_a_window_resumes_from_its_state_bit_for_bit():
    first, found = [], []
    unbroken = callbacks.window(4, lambda info: first.append(info))
    for n in range(1, 5):
        unbroken(info(n, loss=0.1 * n))
    half = callbacks.window(4, print)
    half(info(1, loss=0.1))
    half(info(2, loss=0.2))
    resumed = callbacks.window(4, lambda info: found.append(info))
    resumed.load_state_dict(half.state_dict())
    for n in (3, 4):
        resumed(info(n, loss=0.1 * n))
    assert callbacks.values(found[0].metrics) == callbacks.values(first[0].metrics)
    assert found[0].seconds == first[0].seconds == 2.0


def test_a_window_begins_anew_after_each_call():
    found = []
    window = callbacks.window(2, lambda info: found.append((info.n, callbacks.values(info.metrics)["loss"])))
    for n in range(1, 6):
        window(info(n, loss=float(n)))
    assert found == [(2, 1.5), (4, 3.5)]


def test_a_line_of_the_log():
    lines = []
    log = callbacks.log(2, lines.append)
    for n in (1, 2):
        log(info(n, loss=float(n), until=9))
    assert lines == ["step 2/9  loss 1.5  2 steps/s"]


@pytest.mark.parametrize("make", [callbacks.every, callbacks.window])
def test_an_interval_below_one_is_refused(make):
    with pytest.raises(ValueError, match=r"\(0, fn\): the interval is 0; give 1 or more"):
        make(0, print)


# --- the best ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, losses, best",
    [
        ("min", [3.0, 1.0, 2.0], (1.0, 1)),
        ("max", [1.0, 3.0, 2.0], (3.0, 1)),
        ("min", [math.nan, 2.0, math.nan], (2.0, 1)),
    ],
)
def test_keep_best_keeps_the_first_best_and_never_nan(mode, losses, best):
    kept = callbacks.keep_best("loss", mode=mode)
    for n, loss in enumerate(losses):
        kept(info(n, loss=loss)._replace(state={"w": torch.tensor(float(n))}))
    assert (kept.value, kept.n) == best
    assert kept.state["w"].item() == best[1]


def test_early_stopping_needs_a_gain_of_min_delta():
    stop = callbacks.early_stopping("loss", patience=2, min_delta=0.5)
    answers = [stop(info(n, loss=value)) for n, value in enumerate([3.0, 2.6, 2.4, 2.3, 2.2])]
    assert [answer is not None for answer in answers] == [False, False, False, False, True]


def test_early_stopping_counts_on_after_a_resume():
    stop = callbacks.early_stopping("loss", patience=2)
    assert [stop(info(n, loss=value)) for n, value in enumerate([1.0, 2.0])] == [None, None]
    resumed = callbacks.early_stopping("loss", patience=2)
    resumed.load_state_dict(stop.state_dict())
    assert resumed(info(2, loss=1.5)).reason == "'loss' was best at step 0 (1), and has not improved in 2 looks since"


def test_a_misspelt_metric_is_found_before_the_first_step():
    step, seen = tfn.eval_step(lambda p, x: tfn.Mean.of(p["w"] * x)), []
    evaluation = callbacks.evaluation(step, [torch.ones(1)], every=1, then=[callbacks.early_stopping("eval_los")])
    with pytest.raises(ValueError, match=r"early_stopping\('eval_los'\).*\['eval_loss'\].*Did you mean 'eval_loss'\?"):
        run(evaluation, lambda info: seen.append(info.n))
    assert seen == []


def test_metrics_of_several_numbers_are_shown_one_by_one(capsys):
    def loss(p, b):
        logits = b["x"] * p["w"]
        return tfn.losses.cross_entropy(logits, b["y"]), {"acc": tfn.metrics.per_class_accuracy(logits, b["y"])}

    optimizer, lines = tfn.optim.sgd(0.1), []
    b = {"x": torch.eye(3).repeat(2, 1), "y": torch.tensor([0, 1, 2, 0, 0, 0])}
    state, step = tfn.init({"w": torch.ones(3)}, optimizer), tfn.train_step(loss, optimizer)
    bar = tfn.callbacks.progress(seconds=0.0)
    tfn.fit(step, state, [b] * 2, callbacks=[tfn.callbacks.log(2, lines.append), bar])
    assert "acc/0 0.5  acc/1 1  acc/2 1" in lines[0]
    assert "acc/0=0.5" in capsys.readouterr().err
    grid = tfn.Mean(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(()))
    assert tfn.callbacks.values({"m": grid}) == {"m/0/0": 1.0, "m/0/1": 2.0, "m/1/0": 3.0, "m/1/1": 4.0}
