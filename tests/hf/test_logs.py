"""What the Trainer tells: the log history, files of metrics, the loss between two logs, verbosity and trackers."""

import importlib.util
import io
import json
import logging
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import accelerate.tracking
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

import trainfn as tfn
from trainfn.hf._callbacks._events import CallbackHandler, with_defaults
from trainfn.hf._reporting import _logs, _trackers
from trainfn.hf._reporting._logs import LossWindow
from trainfn.hf._reporting._trackers import TrackerCallback, tracker_callbacks
from trainfn.hf._run._record import Record

RANDOM_BATCHES = st.lists(st.tuples(st.floats(-9, 9), st.integers(1, 5)), min_size=1, max_size=12)


class Heard(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(logs)


class Trainer:
    """As much of a Trainer as `_logs` asks for."""

    def __init__(self, folder, *, process=0, trackers=(), **args):
        self.args = TrainingArguments(str(folder), use_cpu=True, disable_tqdm=False, **args)
        self.state, self.control = TrainerState(epoch=0.25, global_step=5), TrainerControl(should_log=True)
        self.model = self.processing_class = self.optimizer = self.lr_scheduler = None
        self.process, self.heard = process, Heard()
        self.callback_handler = CallbackHandler(with_defaults([self.heard], self.args, trackers), self)

    def is_world_process_zero(self):
        return self.process == 0

    def fire(self, event, **given):
        self.control = getattr(self.callback_handler, event)(self.args, self.state, self.control, **given)

    def log(self, logs):
        _logs.log(self, logs)


# --- log --------------------------------------------------------------------------------------------------------------


def test_a_log_goes_to_the_history_and_to_the_callbacks(tmp_path):
    trainer, logs = Trainer(tmp_path), {"loss": 0.5}
    trainer.log(logs)
    assert trainer.state.log_history == [{"loss": 0.5, "epoch": 0.25, "step": 5}]
    assert trainer.heard.logs == [logs] == [{"loss": 0.5, "epoch": 0.25}]
    assert not trainer.control.should_log


def test_outside_of_a_training_there_is_no_epoch(tmp_path):
    trainer = Trainer(tmp_path)
    trainer.state.epoch, trainer.state.global_step = None, 7
    trainer.log({"eval_loss": 0.5})
    assert trainer.state.log_history == [{"eval_loss": 0.5, "step": 7}]


def test_tokens_are_reported_where_they_are_counted(tmp_path):
    trainer = Trainer(tmp_path, include_num_input_tokens_seen="all")
    trainer.state.num_input_tokens_seen = 1000
    trainer._trainfn = Record(run=SimpleNamespace(tokens_before=500))
    _logs.log(trainer, {"loss": 0.5}, time.time() - 10)
    (entry,) = trainer.state.log_history
    assert entry["num_input_tokens_seen"] == 1000
    assert entry["train_tokens_per_second"] == pytest.approx(50, rel=0.05)


def test_whatever_is_logged_can_be_saved(tmp_path):
    trainer = Trainer(tmp_path)
    trainer.log({
        "mean": tfn.Mean(torch.tensor(3.0), torch.tensor(2.0)), "tensor": torch.tensor(2), "row": torch.ones(1),
        "numpy": np.float32(0.5), "array": np.arange(2), "text": "as it is", "none": None,
    })  # fmt: skip
    _logs.save_state(trainer)
    saved = json.loads((tmp_path / "trainer_state.json").read_text())
    assert saved["log_history"] == [
        {"mean": 1.5, "tensor": 2, "row": 1.0, "numpy": 0.5, "array": [0, 1], "text": "as it is", "none": None}
        | {"epoch": 0.25, "step": 5}
    ]


def test_trainer_state_json_is_that_of_transformers(tmp_path):
    trainer = Trainer(tmp_path / "new")
    trainer.state.stateful_callbacks = trainer.callback_handler.states(trainer.control)
    _logs.save_state(trainer)
    assert TrainerState.load_from_json(str(tmp_path / "new" / "trainer_state.json")) == trainer.state


# --- metrics of a split -----------------------------------------------------------------------------------------------

METRICS = {
    "epoch": 2.0, "train_loss": 0.123456, "train_runtime": 3723.456, "train_samples": 50, "total_flos": 7 << 30,
    "train_mem_cpu_alloc_delta": 3 << 20, "train_samples_per_second": 12.3456,
}  # fmt: skip


def test_metrics_are_printed_and_saved_as_transformers_does(tmp_path, capsys):
    ours, theirs = (Trainer(tmp_path / name) for name in ("ours", "theirs"))
    (tmp_path / "theirs").mkdir()
    printed = []
    for trainer, module in ((ours, _logs), (theirs, transformers.trainer_pt_utils)):
        module.log_metrics(trainer, "train", METRICS)
        printed.append(capsys.readouterr().out)
        module.save_metrics(trainer, "train", METRICS)
        module.save_metrics(trainer, "eval", {"eval_loss": math.nan, "epoch": 3.0})
        module.save_metrics(trainer, "test", {"test_loss": 1.0}, combined=False)
        module.save_state(trainer)
    assert printed[0] == printed[1]
    assert _logs.metrics_format(METRICS) == transformers.trainer_pt_utils.metrics_format(METRICS)
    files = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for name in files:
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text()
    assert json.loads((tmp_path / "ours" / "all_results.json").read_text())["epoch"] == 3.0


def test_only_the_main_process_reports(tmp_path, capsys):
    trainer = Trainer(tmp_path / "replica", process=1)
    _logs.log_metrics(trainer, "eval", METRICS)
    _logs.save_metrics(trainer, "eval", METRICS)
    _logs.save_state(trainer)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "replica").exists()


def test_no_metrics_can_be_reported_too(tmp_path, capsys):
    _logs.log_metrics(Trainer(tmp_path), "eval", {})
    assert capsys.readouterr().out == "***** eval metrics *****\n"


# --- the loss between two logs ----------------------------------------------------------------------------------------


def means(batches):
    return [{"loss": tfn.Mean(torch.tensor(v * w), torch.tensor(float(w)))} for v, w in batches]


@given(RANDOM_BATCHES)
def test_the_loss_is_the_mean_over_all_rows(batches):
    window = LossWindow()
    for metrics in means(batches):
        window.add(metrics)
    rows = [value for value, weight in batches for _ in range(weight)]
    assert window.take()["loss"] == pytest.approx(sum(rows) / len(rows), abs=1e-5)


@given(RANDOM_BATCHES, st.data())
def test_a_window_resumes_bit_for_bit(batches, data):
    whole, part = LossWindow(), LossWindow()
    cut, taken = (data.draw(st.integers(0, len(batches))) for _ in range(2))
    for n, metrics in enumerate(means(batches)):
        if n == taken and n:
            assert repr(whole.take()) == repr(part.take())
        if n == cut:
            saved, part = json.loads(json.dumps(part.state_dict())), LossWindow()
            part.load_state_dict(saved)
        whole.add(metrics)
        part.add(metrics)
    assert repr(whole.loss) == repr(part.loss)
    assert repr(whole.take()) == repr(part.take())
    assert repr(whole.loss) == repr(part.loss)


def test_a_window_starts_anew_and_the_run_continues():
    window = LossWindow()
    window.add(means([(1.0, 3)])[0])
    assert window.take() == {"loss": 1.0}
    window.add(means([(5.0, 1)])[0])
    assert window.loss == 2.0  # of both steps, before and after
    assert window.take() == {"loss": 5.0}
    assert window.loss == 2.0
    assert window.steps == 0


def test_the_norm_and_the_rate_are_the_last_steps_the_users_metrics_are_means():
    window = LossWindow()
    for n in (1.0, 3.0):
        one = torch.tensor(1.0)
        norm, user = tfn.Mean(torch.tensor(10 * n), one), tfn.Mean(torch.tensor(n), one)
        window.add({"kl": user, "loss": tfn.Mean(torch.tensor(n), one), "grad_norm": norm})
    logs = window.take(learning_rate=torch.tensor(0.5))
    assert logs == {"loss": 2.0, "grad_norm": 30.0, "learning_rate": 0.5, "kl": 2.0}
    assert list(logs) == ["loss", "grad_norm", "learning_rate", "kl"]
    assert all(type(value) is float for value in logs.values())
    window.add({"loss": tfn.Mean(one, one), "learning_rate": tfn.Mean(torch.tensor(0.25), one)})
    assert window.take(learning_rate=0.5)["learning_rate"] == 0.25


def test_nothing_waits_for_the_device_until_it_is_taken(monkeypatch):
    window = LossWindow()
    with monkeypatch.context() as patched:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
            patched.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"waited: {name}"))
        for metrics in means([(1.0, 2), (math.nan, 1), (3.0, 2)]):
            window.add(metrics)
    with pytest.warns(tfn.errors.NonFiniteWarning):
        assert window.take() == {"loss": 2.0, "nonfinite_steps": 1}


def test_a_window_keeps_numbers_and_not_the_steps_tensors():
    window, total = LossWindow(nan_inf_filter=False), torch.tensor(4.0, dtype=torch.float64)
    window.add({"loss": tfn.Mean(total, torch.tensor(2.0))})
    total.zero_()  # as a captured graph's next replay does
    assert window.take()["loss"] == 2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_is_counted_and_warned_of_once(bad):
    window = LossWindow()
    for metrics in means([(1.0, 2), (bad, 2), (3.0, 2)]):
        window.add(metrics)
    with pytest.warns(tfn.errors.NonFiniteWarning, match=r"The loss of 1 of the last 3 steps .* are left out") as told:
        assert window.take() == {"loss": 2.0, "nonfinite_steps": 1}
        window.add(means([(bad, 1)])[0])
        logs = window.take()
    assert len(told) == 1
    assert math.isnan(logs["loss"]) and logs["nonfinite_steps"] == 1  # and never 0.0
    assert window.loss == 2.0


def test_without_the_filter_the_loss_is_what_it_is():
    window = LossWindow(nan_inf_filter=False)
    for metrics in means([(1.0, 2), (math.inf, 2)]):
        window.add(metrics)
    with pytest.warns(tfn.errors.NonFiniteWarning, match="make the logged loss NaN or infinite"):
        assert window.take() == {"loss": math.inf, "nonfinite_steps": 1}
    assert window.loss == math.inf


def test_there_is_no_mean_of_nothing():
    assert LossWindow().take() == {}
    assert LossWindow().take(learning_rate=0.5) == {"learning_rate": 0.5}
    assert math.isnan(LossWindow().loss)


# --- verbosity --------------------------------------------------------------------------------------------------------


@pytest.fixture
def loggers():
    package, root = logging.getLogger("trainfn"), logging.getLogger()
    before = package.level, list(package.handlers), transformers_logging.get_verbosity(), list(root.handlers)
    yield package, root
    package.setLevel(before[0])
    package.handlers[:] = before[1]
    transformers_logging.set_verbosity(before[2])
    root.handlers[:] = before[3]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("log_level", "replica"), [("warning", "error"), ("error", "error"), ("debug", "warning"), ("passive", "warning")]
)
@pytest.mark.parametrize("each_node", [True, False])
def test_the_level_is_that_of_the_process(loggers, log_level, replica, rank, each_node, monkeypatch):
    package, root = loggers
    handlers, level = list(root.handlers), root.level
    args = TrainingArguments(
        "x", use_cpu=True, log_level=log_level, log_level_replica=replica, log_on_each_node=each_node
    )
    index = "local_process_index" if each_node else "process_index"
    monkeypatch.setattr(type(args), index, property(lambda self: rank))
    transformers_logging.set_verbosity_warning()
    returned = _logs.set_verbosity(args)
    assert returned == args.get_process_log_level() == transformers_logging.get_verbosity()
    names = {"warning": 30, "error": 40, "debug": 10}
    passive = log_level == "passive" and rank == 0
    assert package.level == (20 if passive else names[replica if rank else log_level])
    assert (root.handlers, root.level) == (handlers, level)


def test_messages_are_shown_once_whether_the_program_logs_or_not(loggers, monkeypatch):
    package, root = loggers
    root.handlers.clear()
    args = SimpleNamespace(log_level="info", should_log=True, get_process_log_level=lambda: 20)
    for _ in range(2):
        _logs.set_verbosity(args)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    package.info("to the screen")
    assert sys.stderr.getvalue() == "to the screen\n"
    stream = io.StringIO()
    root.addHandler(logging.StreamHandler(stream))
    logging.getLogger("trainfn.hf._reporting._hub").info("to the program")
    assert (sys.stderr.getvalue(), stream.getvalue()) == ("to the screen\n", "to the program\n")


# --- trackers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    """A tracker as a user registers one."""

    class Fake(accelerate.tracking.GeneralTracker):
        name = "fake"
        requires_logging_directory = False
        calls: list = []  # noqa: RUF012

        def __init__(self, project, **options):
            super().__init__()
            self.project, self.options = project, options

        tracker = property(lambda self: SimpleNamespace(id="run-1"))

        def start(self):
            self.calls.append(("start", self.project, self.options))

        def store_init_configuration(self, values):
            self.calls.append(("config", values))

        def log(self, values, step=None, **kwargs):
            self.calls.append(("log", values, step))

        def finish(self):
            self.calls.append(("finish",))

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "fake", Fake)
    return Fake


def training(trainer, *logs, step=0):
    trainer.state.global_step = step
    trainer.fire("on_train_begin")
    for entry in logs:
        trainer.state.global_step += 1
        trainer.log(entry)
    trainer.fire("on_train_end")


@pytest.mark.parametrize("report_to", ["fake", ["fake"], ["none", "fake", "fake"]])
def test_a_tracker_hears_a_training(fake, tmp_path, report_to, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=report_to, project="birds", hub_token="secret")
    trainer = Trainer(tmp_path, trackers=tracker_callbacks(args))
    trainer.args = args
    trainer.state.epoch = None
    trainer.model = SimpleNamespace(config=transformers.BertConfig(hidden_size=16))
    training(trainer, {"loss": 0.5, "list": [1]}, {"eval_loss": 0.25, "test_x": 1, "note": "hi"})
    names = [call[0] for call in fake.calls]
    assert names == ["start", "config", "log", "log", "finish"]
    assert fake.calls[0] == ("start", "birds", {})
    config = fake.calls[1][1]
    assert config["model/hidden_size"] == 16 and config["learning_rate"] == 5e-5 and "secret" not in str(config)
    assert all(isinstance(value, str | int | float) for value in config.values())
    assert fake.calls[2] == ("log", {"train/loss": 0.5}, 1)
    assert fake.calls[3] == ("log", {"eval/loss": 0.25, "test/x": 1, "train/note": "hi"}, 2)


def test_an_evaluation_after_the_training_is_sent_too(fake, tmp_path):
    trainer = Trainer(tmp_path, trackers=[TrackerCallback(["fake"])])
    training(trainer, {"loss": 0.5})
    del fake.calls[:]
    trainer.state.epoch = None
    trainer.log({"eval_loss": 0.25})
    assert fake.calls == [("start", "huggingface", {}), ("log", {"eval/loss": 0.25}, 1), ("finish",)]


def test_only_the_main_process_sends(fake, tmp_path):
    trainer = Trainer(tmp_path, trackers=[TrackerCallback(["fake"])])
    trainer.state.is_world_process_zero = False
    training(trainer, {"loss": 0.5})
    assert fake.calls == []


def test_a_resumed_training_logs_into_the_same_run(fake, tmp_path, monkeypatch):
    monkeypatch.setitem(_trackers._CONTINUE, "fake", ("id", "id", {"resume": "allow"}))
    first = Trainer(tmp_path, trackers=[TrackerCallback(["fake"], logging_dir="here")])
    training(first, {"loss": 0.5})
    states = json.loads(json.dumps(first.callback_handler.states(first.control)))
    assert states["TrackerCallback"]["attributes"] == {"logging_dir": "here", "run_ids": {"fake": "run-1"}}
    del fake.calls[:]
    second = Trainer(tmp_path, trackers=[TrackerCallback(["fake"], logging_dir="there")])
    second.callback_handler.load_states(states)
    training(second, {"loss": 0.25}, step=1)
    assert fake.calls[0] == ("start", "huggingface", {"id": "run-1", "resume": "allow"})
    assert [call[0] for call in fake.calls] == ["start", "log", "finish"]  # the arguments were told before
    assert second.callback_handler.callbacks[1].logging_dir == "here"
    del fake.calls[:]
    training(second)  # anew, not resumed
    assert fake.calls[0] == ("start", "huggingface", {})


def test_trackers_with_files_get_a_folder(fake, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(fake, "requires_logging_directory", True)
    monkeypatch.setattr(fake, "__init__", lambda self, *args, **options: made.append(args))
    monkeypatch.setattr(fake, "start", lambda self: None)
    trainer = Trainer(tmp_path, trackers=[TrackerCallback(["fake"], logging_dir="logs")])
    trainer.state.trial_name = "trial-1"
    training(trainer)
    assert made == [("huggingface", str(Path("logs", "trial-1")))]


def test_a_tracker_can_be_an_object(fake, tmp_path):
    callback = TrackerCallback([fake("mine")])
    training(Trainer(tmp_path, trackers=[callback]), {"loss": 1.0})
    assert fake.calls[0] == ("start", "mine", {})
    assert callback.state()["args"] == {"trackers": []}


def test_the_run_has_its_name(tmp_path):
    options = {name: TrackerCallback([], run_name="mine")._options(name, 0) for name in ("wandb", "mlflow", "clearml")}
    assert options == {"wandb": {"name": "mine"}, "mlflow": {"run_name": "mine"}, "clearml": {}}
    assert TrackerCallback([])._options("tensorboard", 7) == {"purge_step": 8}
    assert TrackerCallback([])._options("dvclive", 7) == {"resume": True}


def test_a_tracker_has_options_of_its_own(fake):
    args = SimpleNamespace(report_to=["fake"], run_name=None, logging_dir="logs", trackio_space_id="user/space")
    (callback,) = tracker_callbacks(args)
    assert callback._options("trackio", 0) == {"space_id": "user/space"} and callback._options("fake", 0) == {}


def test_the_folder_is_named_after_time_and_host(monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    args = SimpleNamespace(output_dir="out")
    path = Path(_trackers.logging_dir(args))
    assert path.parts[:2] == ("out", "runs") and "_" in path.name
    args.logging_dir = "mine"
    assert _trackers.logging_dir(args) == "mine"
    args.logging_dir = None
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "of/the/environment")
    assert _trackers.logging_dir(args) == "of/the/environment"


@pytest.mark.parametrize("name", ["wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"])
def test_a_missing_package_is_an_error_at_construction(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ImportError, match=rf"`TrainingArguments\(report_to='{name}'\)`.*Run `pip install {name}`"):
        tracker_callbacks(SimpleNamespace(report_to=[name]))


def test_an_unknown_tracker_is_an_error_at_construction():
    with pytest.raises(ValueError, match=r"report_to='wandbb'\)`: there is no such tracker\. There are .*wandb"):
        tracker_callbacks(SimpleNamespace(report_to="wandbb"))


def test_what_only_transformers_reports_to_its_own_callback_does(monkeypatch):
    class Azure(TrainerCallback):
        pass

    monkeypatch.setitem(_trackers.INTEGRATION_TO_CALLBACK, "azure_ml", Azure)
    (callback,) = tracker_callbacks(SimpleNamespace(report_to=["azure_ml"]))
    assert type(callback) is Azure


def test_all_are_those_that_are_installed(fake, monkeypatch):
    named = SimpleNamespace(value="fake")
    monkeypatch.setattr(_trackers, "get_available_trackers", lambda: [named])
    assert _trackers.names("all") == ["fake"]
    assert _trackers.names(["all", "fake"]) == ["fake"]


def test_tensorboard_gets_the_curves(tmp_path):
    pytest.importorskip("tensorboard")
    trainer = Trainer(tmp_path, trackers=[TrackerCallback(["tensorboard"], logging_dir=str(tmp_path / "runs" / "one"))])
    training(trainer, {"loss": 0.5})
    training(trainer, {"loss": 0.25}, step=1)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs" / "one"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
