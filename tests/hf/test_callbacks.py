"""The Trainer's callbacks: 16 events, decisions that are returned, views that can't be changed, states that go on."""

import copy
import dataclasses
import importlib.util
import json
import logging
import pickle
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    DefaultFlowCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

import trainfn as tfn
from trainfn.hf._callbacks import _events
from trainfn.hf._callbacks._events import DECISIONS, EVENTS, CallbackHandler, gather, with_defaults
from trainfn.hf._callbacks._readonly import StateView

STEP_EVENTS = ("on_pre_optimizer_step", "on_optimizer_step", "on_substep_end", "on_step_end")


class Trainer:
    """A Trainer that trains nothing, but fires its events in order."""

    def __init__(self, callbacks, folder="x", steps=20, **args):
        self.model, self.processing_class, self.optimizer, self.lr_scheduler = "model", "processing", "sgd", "schedule"
        self.args = TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, logging_strategy="no", **args)
        self.state, self.control = TrainerState(max_steps=steps, epoch=0.0), TrainerControl()
        self.state.compute_steps(self.args, steps)
        self.callback_handler = CallbackHandler([DefaultFlowCallback, *callbacks], self)

    def fire(self, event, **given):
        self.control = getattr(self.callback_handler, event)(self.args, self.state, self.control, **given)
        return self.control

    def train(self):
        self.fire("on_train_begin")
        self.fire("on_epoch_begin")
        while not (self.control.should_training_stop or self.control.should_epoch_stop):
            self.fire("on_step_begin")
            self.state.global_step += 1
            for event in STEP_EVENTS:
                self.fire(event)
            if self.control.should_evaluate:
                self.fire("on_evaluate", metrics={"eval_loss": float(self.state.global_step)})
        self.fire("on_epoch_end")
        self.fire("on_train_end")


def after(step, answer):
    """A callback that answers this at a step."""

    class Answering(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            return answer if state.global_step == step else None

    return Answering()


# --- events -----------------------------------------------------------------------------------------------------------


def test_the_events_are_those_of_transformers():
    assert len(EVENTS) == 16
    assert {"on_init_end", "on_push_begin", "on_pre_optimizer_step"} <= set(EVENTS)
    assert DECISIONS == (
        *("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log"),
    )


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_has_the_arguments_of_transformers(event):
    seen = []

    def note(self, args, state, control, **kwargs):
        seen.append((args, state, control, kwargs))

    trainer = Trainer([type("Noting", (TrainerCallback,), {event: note})])
    trainer.callback_handler.train_dataloader, trainer.callback_handler.eval_dataloader = "train", "eval"
    extra = {"on_evaluate": "metrics", "on_predict": "metrics", "on_log": "logs"}.get(event)
    trainer.model = "the newest model"
    trainer.fire(event, **({extra: {"eval_loss": 1.0}} if extra else {}))
    ((args, state, control, kwargs),) = seen
    assert args is trainer.args and control is trainer.control and isinstance(state, TrainerState)
    assert kwargs == {
        "model": "the newest model", "processing_class": "processing", "optimizer": "sgd", "lr_scheduler": "schedule",
        "train_dataloader": "train", "eval_dataloader": "eval", **({extra: {"eval_loss": 1.0}} if extra else {}),
    }  # fmt: skip


RESETS = {
    "on_train_begin": {"should_training_stop"},
    "on_epoch_begin": {"should_epoch_stop"},
    "on_step_begin": {"should_log", "should_evaluate", "should_save"},
    "on_evaluate": {"should_evaluate"},
    "on_save": {"should_save"},
    "on_log": {"should_log"},
}


@pytest.mark.parametrize("event", EVENTS)
def test_each_event_clears_the_decisions_that_it_carries_out(event):
    theirs = transformers.trainer_callback.CallbackHandler([DefaultFlowCallback()], None, None, None, None)
    extra = {"on_evaluate": {"metrics": {}}, "on_predict": {"metrics": {}}, "on_log": {"logs": {}}}.get(event, {})
    trainer = Trainer([])
    trainer.callback_handler.callbacks.clear()  # the flow would decide anew
    theirs.callbacks.clear()
    trainer.control = TrainerControl(*[True] * 5)
    control = trainer.fire(event, **extra)
    assert {name for name in DECISIONS if not getattr(control, name)} == RESETS.get(event, set())
    expected = getattr(theirs, event)(trainer.args, trainer.state, TrainerControl(*[True] * 5), **extra)
    assert control == expected


def test_callbacks_are_called_in_their_order():
    order = []

    def named(name):
        def on_step_end(self, *args, **kwargs):
            order.append(name)

        return type(name, (TrainerCallback,), {"on_step_end": on_step_end})

    Trainer([named("a"), named("b")()]).fire("on_step_end")
    assert order == ["a", "b"]


def test_an_object_with_some_of_the_events_will_do():
    class Duck:
        def on_step_end(self, args, state, control, **kwargs):
            return {"should_training_stop": True}

    trainer = Trainer([Duck()])
    trainer.train()
    assert trainer.state.global_step == 1


# --- decisions --------------------------------------------------------------------------------------------------------


def test_the_callback_of_the_documentation_stops_after_ten_steps():
    class EarlyStoppingCallback(TrainerCallback):
        def __init__(self, num_steps=10):
            self.num_steps = num_steps

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step >= self.num_steps:
                return {"should_training_stop": True}
            else:
                return {}

    trainer = Trainer(gather(callback=[EarlyStoppingCallback()]))
    trainer.train()
    assert trainer.state.global_step == 10


@given(st.dictionaries(st.sampled_from(DECISIONS), st.booleans()), st.lists(st.booleans(), min_size=5, max_size=5))
def test_a_dict_changes_what_it_names_and_nothing_else(decisions, before):
    trainer = Trainer([])
    trainer.callback_handler.callbacks[:] = [after(0, decisions)]
    trainer.control = TrainerControl(*before)
    control = trainer.fire("on_step_end")
    assert dataclasses.asdict(control) == {**dict(zip(DECISIONS, before, strict=True)), **decisions}


def test_a_later_callback_sees_and_can_undo_what_an_earlier_one_decided():
    trainer = Trainer([after(1, {"should_save": True, "should_log": True}), after(1, {"should_save": False})])
    trainer.state.global_step = 1
    control = trainer.fire("on_step_end")
    assert control.should_log and not control.should_save


def test_a_control_that_is_returned_is_the_new_one():
    mine = TrainerControl(should_save=True)
    trainer = Trainer([after(0, mine)])
    assert trainer.fire("on_step_end") is mine


def test_a_control_that_is_changed_in_place_counts():
    class InPlace(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = True

    assert Trainer([InPlace]).fire("on_step_end").should_evaluate


def test_stop_stops_and_says_why(caplog):
    trainer = Trainer([after(3, tfn.Stop("it has converged"))])
    with caplog.at_level(logging.INFO, "trainfn"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.callback_handler.stop_reason == "it has converged"
    assert "Answering.on_step_end stops the training: it has converged" in caplog.text


def test_an_unknown_decision_is_an_error_with_the_right_name():
    with pytest.raises(ValueError, match="'should_stop' is not a decision") as caught:
        Trainer([after(1, {"should_stop": True})]).train()
    message = str(caught.value)
    assert "`Answering.on_step_end` returned {'should_stop': True}" in message
    assert all(name in message for name in DECISIONS)
    assert message.endswith("write `return {'should_training_stop': True}`.")


def test_a_slip_of_the_pen_is_corrected():
    with pytest.raises(ValueError, match=r"write `return \{'should_evaluate': True\}`"):
        Trainer([after(1, {"shuold_evaluat": True})]).train()


@pytest.mark.parametrize("answer", [True, "stop", 3, ["should_save"]])
def test_anything_else_is_not_a_decision(answer):
    with pytest.raises(TypeError, match=r"`Answering\.on_step_end` returned .* is not a decision\. Return None"):
        Trainer([after(1, answer)]).train()


def test_an_error_says_whose_it_was():
    class Faulty(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyError("loss")

    with pytest.raises(KeyError) as caught:
        Trainer([Faulty]).train()
    assert caught.value.__notes__ == ["in Faulty.on_step_end, a callback of the Trainer"]


# --- views ------------------------------------------------------------------------------------------------------------


def test_the_state_can_not_be_assigned_to():
    class Cheat(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            state.global_step = 1000

    trainer = Trainer([Cheat])
    with pytest.raises(AttributeError, match=r"`state\.global_step = 1000` can't work: .* returns its decisions"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_a_view_shows_the_present_state_and_is_one():
    state = TrainerState(log_history=[{"loss": 1.0}], trial_params={"lr": 0.1})
    view = StateView(state)
    state.global_step, state.best_metric = 7, 0.5
    assert (view.global_step, view.best_metric, view.max_steps) == (7, 0.5, 0)
    assert isinstance(view, TrainerState)
    assert dataclasses.asdict(view) == dataclasses.asdict(state)
    state.of_a_subclass = "seen"
    assert view.of_a_subclass == "seen"
    with pytest.raises(AttributeError):
        view.nothing_of_this_name  # noqa: B018
    with pytest.raises(AttributeError, match=r"`del state\.epoch` can't work"):
        del view.epoch


def test_a_view_can_be_saved_copied_and_pickled(tmp_path):
    state = TrainerState(log_history=[{"loss": 1.0}], global_step=3)
    view = StateView(state)
    view.save_to_json(str(tmp_path / "state.json"))
    assert TrainerState.load_from_json(str(tmp_path / "state.json")) == state
    for copied in (copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        assert copied == state and type(copied) is TrainerState
        copied.log_history.append({"loss": 2.0})
        copied.log_history[0]["loss"] = 9.0
    assert state.log_history == [{"loss": 1.0}]


CHANGES = [
    lambda history: history.append({}),
    lambda history: history.extend([{}]),
    lambda history: history.pop(),
    lambda history: history.clear(),
    lambda history: history.__setitem__(0, {}),
    lambda history: history.__delitem__(0),
    lambda history: history.__iadd__([{}]),
    lambda history: history[-1].update(loss=0.0),
    lambda history: history[0].pop("loss"),
    lambda history: history[:1][0].__setitem__("loss", 0.0),
    lambda history: next(iter(history)).clear(),
    lambda history: next(reversed(history)).setdefault("x", 0.0),
    lambda history: list(history)[1].__delitem__("eval_loss"),
    lambda history: history.copy()[0].__ior__({"loss": 0.0}),
]


@pytest.mark.parametrize("change", CHANGES)
def test_the_log_history_can_be_read_and_not_changed(change):
    state = TrainerState(log_history=[{"loss": 1.0}, {"eval_loss": 2.0}])
    history = StateView(state).log_history
    with pytest.raises(TypeError, match=r"`state\.log_history`, .* can't be changed there.*`trainer\.log\("):
        change(history)
    assert state.log_history == [{"loss": 1.0}, {"eval_loss": 2.0}]
    assert history == state.log_history
    assert json.loads(json.dumps(history)) == state.log_history
    assert list(history) == state.log_history and dict(history[0]) == {"loss": 1.0}
    own = copy.deepcopy(history)
    own.append({"mine": 1.0})
    own[0]["loss"] = 3.0


@pytest.mark.parametrize(("event", "name"), [("on_log", "logs"), ("on_evaluate", "metrics"), ("on_predict", "metrics")])
def test_what_a_callback_pops_the_others_still_see(event, name):
    seen = []

    def pop(self, args, state, control, **kwargs):
        seen.append(dict(kwargs[name]))
        kwargs[name].pop("total_flos")
        kwargs[name]["new"] = 1.0

    first, second = (type(kind, (TrainerCallback,), {event: pop}) for kind in ("First", "Second"))
    values = {"loss": 1.0, "total_flos": 5.0}
    Trainer([first, second]).fire(event, **{name: values})
    assert seen == [{"loss": 1.0, "total_flos": 5.0}] * 2
    assert values == {"loss": 1.0, "total_flos": 5.0}


def test_the_printer_prints_and_changes_nothing(capsys):
    logs = {"loss": 0.123456, "total_flos": 5.0}
    Trainer([PrinterCallback]).fire("on_log", logs=logs)
    assert capsys.readouterr().out == "{'loss': '0.1235'}\n"
    assert logs == {"loss": 0.123456, "total_flos": 5.0}


@pytest.fixture
def notebook(monkeypatch):
    """The module of transformers, which needs IPython only to show its tables."""
    if importlib.util.find_spec("IPython") is None:
        for name in ("IPython", "IPython.display"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(sys.modules["IPython"], "display", sys.modules["IPython.display"], raising=False)
        monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    return importlib.import_module("transformers.utils.notebook")


def test_the_notebook_table_changes_no_metrics(notebook, monkeypatch):
    monkeypatch.setattr(notebook, "NotebookTrainingTracker", lambda *_: SimpleNamespace(
        update=lambda *_, **__: None, write_line=lambda *_: None, remove_child=lambda *_: None))  # fmt: skip
    trainer = Trainer([notebook.NotebookProgressCallback], eval_strategy="steps")
    trainer.fire("on_train_begin")
    trainer.state.log_history.append({"loss": 1.0, "step": 1})
    metrics = {"eval_loss": 0.5, "epoch": 1.0, "eval_runtime": 2.0, "eval_samples_per_second": 3.0}
    trainer.fire("on_evaluate", metrics=metrics)
    assert len(metrics) == 4


# --- transformers' own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [1, 3])
def test_early_stopping_of_transformers_works_unchanged(patience):
    stopping = transformers.EarlyStoppingCallback(early_stopping_patience=patience)
    trainer = Trainer(
        [stopping], eval_strategy="steps", eval_steps=1, metric_for_best_model="loss", load_best_model_at_end=True,
        save_steps=1,
    )  # fmt: skip
    trainer.state.best_metric = 0.5  # every evaluation is worse
    trainer.train()
    assert trainer.state.global_step == patience


def test_early_stopping_without_a_metric_says_so():
    with pytest.raises(AssertionError, match="requires metric_for_best_model"):
        Trainer([transformers.EarlyStoppingCallback], eval_strategy="steps").train()


def test_the_bar_of_transformers_works_unchanged(capsys):
    trainer = Trainer([ProgressCallback], steps=4)
    trainer.train()
    trainer.fire("on_log", logs={"eval_loss": 1.0})
    assert "4/4" in capsys.readouterr().err


def test_the_flow_of_transformers_decides(tmp_path):
    trainer = Trainer([], eval_strategy="steps", eval_steps=2, save_steps=3, steps=7)
    decided = []
    trainer.fire("on_train_begin")
    while not trainer.control.should_training_stop:
        trainer.fire("on_step_begin")
        trainer.state.global_step += 1
        trainer.fire("on_step_end")
        decided.append((trainer.control.should_evaluate, trainer.control.should_save))
    evaluated, saved = ({n for n, flags in enumerate(decided, 1) if flags[i]} for i in (0, 1))
    assert (evaluated, saved) == ({2, 4, 6, 7}, {3, 6, 7})


def test_the_defaults_stand_around_the_users_callbacks():
    mine = after(1, None)
    quiet, bar = (with_defaults([mine], SimpleNamespace(disable_tqdm=flag), ["tracker"]) for flag in (True, False))
    assert quiet == [DefaultFlowCallback, "tracker", mine, PrinterCallback]
    assert bar[-1] is ProgressCallback


def test_in_a_notebook_the_progress_is_a_table(notebook, monkeypatch):
    monkeypatch.setattr(_events, "is_in_notebook", lambda: True)
    assert with_defaults([], SimpleNamespace(disable_tqdm=False))[-1] is notebook.NotebookProgressCallback


# --- which callbacks --------------------------------------------------------------------------------------------------


def test_one_or_several_under_either_name():
    one, two = after(1, None), after(2, None)
    assert gather() == []
    assert gather(one) == gather([one]) == gather(callback=one) == gather(callback=(one,)) == [one]
    assert gather([one, two]) == [one, two]
    assert gather(PrinterCallback) == [PrinterCallback]
    with pytest.raises(TypeError, match=r"names the same thing twice\. Write `callbacks=\[a, b\]`"):
        gather([one], callback=[two])


@pytest.mark.parametrize("wrong", [lambda info: None, print, 3, dict, tfn.callbacks.log(1)])
def test_functions_of_a_step_info_belong_to_fit(wrong):
    with pytest.raises(TypeError, match=r"are for `tfn\.fit`\. Write `class Mine\(TrainerCallback\)"):
        gather([wrong])
    with pytest.raises(TypeError, match=r"none of the events of a TrainerCallback"):
        Trainer([]).callback_handler.add_callback(wrong)


def test_two_of_a_class_are_warned_of():
    with pytest.warns(UserWarning, match=r"`add_callback\(PrinterCallback\)`: there is one of this class already"):
        trainer = Trainer([PrinterCallback, PrinterCallback()])
    assert len(trainer.callback_handler.callbacks) == 3


def test_without_the_flow_nothing_is_decided_which_is_warned_of():
    with pytest.warns(
        UserWarning, match=r"no DefaultFlowCallback.*Write `trainer\.add_callback\(DefaultFlowCallback\)"
    ):
        CallbackHandler([PrinterCallback], Trainer([]))


def test_add_pop_and_remove():
    handler, mine = Trainer([]).callback_handler, after(1, None)
    handler.add_callback(PrinterCallback)
    handler.add_callback(mine)
    assert handler.callback_list == "DefaultFlowCallback\nPrinterCallback\nAnswering"
    assert isinstance(handler.pop_callback(PrinterCallback), PrinterCallback)
    assert handler.pop_callback(PrinterCallback) is None
    assert handler.pop_callback(mine) is mine
    handler.add_callback(mine)
    handler.remove_callback(mine)
    handler.remove_callback(DefaultFlowCallback)
    assert handler.callbacks == []


@pytest.mark.parametrize(
    ("name", "right"),
    [("on_step_ends", "on_step_end"), ("on_stepend", "on_step_end"), ("on_evalute", "on_evaluate"),
     ("on_logs", "on_log"), ("on_epoch_ended", "on_epoch_end"), ("on_optimiser_step", "on_optimizer_step")],
)  # fmt: skip
def test_a_misspelt_event_is_reported_once(name, right):
    kind = type("Mine", (TrainerCallback,), {name: lambda self, *args, **kwargs: None})
    with pytest.warns(UserWarning, match=rf"`Mine\.{name}` is never called.*Write `def {right}\(self, args") as told:
        Trainer([kind]).train()
    assert len(told) == 1


@pytest.mark.parametrize("name", ["on_load", "on_my_own", "helper", "_on_step_ends", "once"])
def test_other_methods_are_no_misspelt_events(name):
    Trainer([type("Mine", (TrainerCallback,), {name: lambda self: None})])


@pytest.mark.parametrize("kind", [ProgressCallback, PrinterCallback, transformers.EarlyStoppingCallback])
def test_transformers_own_callbacks_are_not_warned_of(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer([kind])


# --- states -----------------------------------------------------------------------------------------------------------


class Counting(TrainerCallback, ExportableState):
    def __init__(self, every=1):
        self.every, self.count = every, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self):
        return {"args": {"every": self.every}, "attributes": {"count": self.count}}


def test_states_are_what_trainer_state_json_of_transformers_holds(tmp_path):
    stopping = transformers.EarlyStoppingCallback(3)
    with pytest.warns(UserWarning, match="one of this class already"):
        trainer = Trainer([stopping, Counting(), Counting(2)])
    states = trainer.callback_handler.states(trainer.control)
    theirs = TrainerState(stateful_callbacks=[*trainer.callback_handler.callbacks[1:], trainer.control])
    assert states == theirs.stateful_callbacks
    assert [state["args"]["every"] for state in states["Counting"]] == [1, 2]
    trainer.state.stateful_callbacks = states
    trainer.state.save_to_json(str(tmp_path / "trainer_state.json"))
    assert TrainerState.load_from_json(str(tmp_path / "trainer_state.json")).stateful_callbacks == states


def test_a_callback_resumes_as_the_object_that_it_is():
    first, second = Counting(every=1), Counting(every=5)
    trainer = Trainer([first], steps=7)
    trainer.train()
    states = json.loads(json.dumps(trainer.callback_handler.states(trainer.control)))
    resumed = Trainer([second, PrinterCallback])
    resumed.callback_handler.load_states(states)
    assert (second.count, second.every) == (7, 5)  # what this program says counts
    assert resumed.callback_handler.callbacks[1] is second


def test_a_callback_that_makes_itself_from_its_state_may():
    class Made(Counting):
        @classmethod
        def from_state(cls, state):
            made = cls(every=100)
            made.count = -state["attributes"]["count"]
            return made

    trainer = Trainer([Made(), PrinterCallback])
    trainer.callback_handler.load_states({"Made": {"args": {}, "attributes": {"count": 4}}})
    assert (trainer.callback_handler.callbacks[1].count, trainer.callback_handler.callbacks[1].every) == (-4, 100)


def test_states_without_a_callback_are_reported(caplog):
    class EarlyStoppingCallback(TrainerCallback):
        """Of the user's own, and without a state."""

    trainer = Trainer([EarlyStoppingCallback])
    states = {"EarlyStoppingCallback": transformers.EarlyStoppingCallback().state(), "TrainerControl": {"args": {}}}
    with caplog.at_level(logging.WARNING, "trainfn"):
        trainer.callback_handler.load_states(states)
    assert "the state of 1 EarlyStoppingCallback, and this Trainer has 0, so the rest is not restored" in caplog.text
    assert "TrainerControl" not in caplog.text
