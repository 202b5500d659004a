"""Callbacks of the Trainer: the 16 events of `transformers.TrainerCallback`, each of which may return a decision.

``None`` or ``{}``                       no change
``{"should_training_stop": True}``       any of the five fields of `transformers.TrainerControl`
``control``                              a `transformers.TrainerControl`, also changed in place
``tfn.Stop("it has converged")``         stop, and say why
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from transformers import (
    DefaultFlowCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_callback import CallbackHandler as _Handler
from transformers.trainer_callback import ExportableState
from transformers.utils.import_utils import is_in_notebook

import trainfn as tfn
from trainfn.errors import nearest
from trainfn.hf._callbacks._readonly import StateView
from trainfn.hf._types import Callback, Loader, TrainerLike, Values

if TYPE_CHECKING:
    from trainfn.hf._arguments._training import TrainingArguments

EVENTS = tuple(name for name in vars(TrainerCallback) if name.startswith("on_"))
DECISIONS = tuple(field.name for field in dataclasses.fields(TrainerControl))
_logger = logging.getLogger(__name__)


def gather(
    callbacks: Sequence[Callback] | Callback | None = None, callback: Sequence[Callback] | Callback | None = None
) -> list[Callback]:
    """Return a Trainer's callbacks as a list: one or several, under either name.

    Args:
        callbacks: A callback, a list of them, or None.
        callback: The same, under the other name in the documentation of the Trainer.

    Raises:
        TypeError: If both are given, or one is not a callback.

    >>> import transformers
    >>> gather(callback=transformers.PrinterCallback)
    [<class 'transformers.trainer_callback.PrinterCallback'>]
    """
    if callbacks is not None and callback is not None:
        raise TypeError(
            "`Trainer(callbacks=..., callback=...)` can't work: it names the same thing twice. Write"
            " `callbacks=[a, b]`."
        )
    given = callback if callbacks is None else callbacks
    listed = [] if given is None else list(given) if isinstance(given, Sequence) else [given]
    for each in listed:
        _check_is_callback(each)
    return listed


def with_defaults(
    callbacks: Sequence[Callback], args: TrainingArguments, trackers: Sequence[Callback] = ()
) -> list[Callback]:
    """Return the user's callbacks between those that decide and report and the one that shows progress.

    Args:
        callbacks: The user's callbacks.
        args: The `TrainingArguments`; `disable_tqdm` chooses between a bar and printed lines.
        trackers: From `trainfn.hf._reporting._trackers.tracker_callbacks`.

    >>> import types
    >>> [c.__name__ for c in with_defaults([], types.SimpleNamespace(disable_tqdm=True))]
    ['DefaultFlowCallback', 'PrinterCallback']
    """
    return [DefaultFlowCallback, *trackers, *callbacks, PrinterCallback if args.disable_tqdm else _progress()]


def event(trainer: TrainerLike, name: str) -> None:
    """Call an event of all callbacks; their decisions become the Trainer's `control`."""
    call = getattr(trainer.callback_handler, name)
    trainer.control = call(trainer.args, trainer.state, trainer.control)


class CallbackHandler(_Handler):
    """Calls the callbacks in their order, and turns their decisions into the Trainer's `control`.

    Each callback gets its own copy of `metrics` and `logs`, and a view of `state`, so it can't change those of others.
    An error in a callback gets a note with the name of the callback.

    Args:
        callbacks: Callbacks, as classes or instances, in the order in which they are called.
        trainer: The Trainer. Its `model`, `processing_class`, `optimizer` and `lr_scheduler` are looked up at each
            event.

    Raises:
        TypeError: If one is not a callback.

    >>> import transformers, types
    >>> class AfterTen(transformers.TrainerCallback):
    ...     def on_step_end(self, args, state, control, **kwargs):
    ...         return {"should_training_stop": state.global_step >= 10}
    >>> trainer = types.SimpleNamespace(model=None, processing_class=None, optimizer=None, lr_scheduler=None)
    >>> handler = CallbackHandler([transformers.DefaultFlowCallback, AfterTen()], trainer)
    >>> args = types.SimpleNamespace(logging_first_step=False, logging_strategy="no", eval_strategy="no",
    ...     save_strategy="no")
    >>> state, control = transformers.TrainerState(global_step=10, max_steps=99), transformers.TrainerControl()
    >>> handler.on_step_end(args, state, control).should_training_stop
    True
    """

    def __init__(self, callbacks: Sequence[Callback], trainer: TrainerLike) -> None:
        # The base class's `__init__` is not called: it would keep the present model and optimizer, which may change.
        self.trainer = trainer
        self.callbacks: list[TrainerCallback] = []
        self.train_dataloader: Loader | None = None
        self.eval_dataloader: Loader | None = None
        self.stop_reason: str | None = None
        for callback in callbacks:
            self.add_callback(callback)
        if not any(isinstance(callback, DefaultFlowCallback) for callback in self.callbacks):
            warnings.warn(
                "This Trainer has no DefaultFlowCallback, so nothing decides when to log, evaluate, save and stop, and"
                " training never ends by itself. Write `trainer.add_callback(DefaultFlowCallback)`.",
                stacklevel=2,
            )

    model = property(lambda self: self.trainer.model)
    processing_class = property(lambda self: self.trainer.processing_class)
    optimizer = property(lambda self: self.trainer.optimizer)
    lr_scheduler = property(lambda self: self.trainer.lr_scheduler)

    def add_callback(self, callback: Callback) -> None:
        """Add a callback after the others; a class is called without arguments.

        Raises:
            TypeError: If it is not a callback.
        """
        _check_is_callback(callback)
        made = callback() if isinstance(callback, type) else callback
        if type(made) in [type(other) for other in self.callbacks]:
            warnings.warn(
                f"`add_callback({type(made).__name__})`: there is one of this class already, and both will be called."
                f" To replace the first, write `trainer.remove_callback({type(made).__name__})` before.",
                stacklevel=2,
            )
        _warn_of_misspelt_events(type(made))
        self.callbacks.append(made)

    def call_event(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> TrainerControl:
        """Call one event of all callbacks; return the `control` after their decisions.

        Raises:
            ValueError: If a callback returns a dict with an unknown decision.
            TypeError: If a callback returns a value of another type.
        """
        view = StateView(state)
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is None:  # a callback need not derive from TrainerCallback, nor have all events
                continue
            own = {name: dict(value) if isinstance(value, Mapping) else value for name, value in given.items()}
            try:
                answer = method(args, view, control, **self._shown(), **own)
                control = self._decide(control, answer, f"{type(callback).__name__}.{event}")
            except Exception as error:
                error.add_note(f"in {type(callback).__name__}.{event}, a callback of the Trainer")
                raise
        return control

    def _shown(self) -> Values:
        return {
            "model": self.model,
            "processing_class": self.processing_class,
            "optimizer": self.optimizer,
            "lr_scheduler": self.lr_scheduler,
            "train_dataloader": self.train_dataloader,
            "eval_dataloader": self.eval_dataloader,
        }

    def _decide(self, control: TrainerControl, answer: object, call: str) -> TrainerControl:
        """Return ``control`` after a callback's answer."""
        if answer is None:
            return control
        if isinstance(answer, TrainerControl):
            return answer
        if isinstance(answer, tfn.Stop):
            self.stop_reason, control.should_training_stop = answer.reason, True
            _logger.info("%s stops the training: %s", call, answer.reason)
            return control
        if not isinstance(answer, Mapping):
            raise TypeError(
                f"`{call}` returned {answer!r}, which is not a decision. Return None for no change, `control`, a dict"
                ' such as `{"should_training_stop": True}`, or `tfn.Stop("why")`.'
            )
        decisions = cast("Mapping[str, object]", answer)
        for name in decisions:
            if name not in DECISIONS:
                raise ValueError(
                    f"`{call}` returned {dict(decisions)!r}, but {name!r} is not a decision. The decisions are"
                    f" {', '.join(DECISIONS)}: write `return {{{_meant(name)!r}: True}}`."
                )
        for name, value in decisions.items():
            setattr(control, name, bool(value))
        return control

    # --- states in checkpoints --------------------------------------------------------------------------------

    def states(self, control: TrainerControl) -> Values:
        """Return the state of every callback that has one, by class, as `TrainerState.stateful_callbacks` holds it."""
        exportable = [each for each in [*self.callbacks, control] if isinstance(each, ExportableState)]
        return cast(
            "Values", TrainerState(stateful_callbacks=cast("list[TrainerCallback]", exportable)).stateful_callbacks
        )

    def load_states(self, states: Values, *, replace: bool = False) -> None:
        """Restore the states of the callbacks.

        Each callback stays the same object, at its place, with the arguments of this program. For example, a new
        patience stays the new one, while the count of bad evaluations is the one in the checkpoint.

        Args:
            states: From `states`, or a `trainer_state.json` of transformers.
            replace: Whether each is replaced by one with the checkpoint's arguments, too.
        """
        for name, saved in states.items():
            if name == TrainerControl.__name__:
                continue  # each of its flags is cleared before anything reads it
            saved = cast("list[Values]", saved if isinstance(saved, list) else [saved])
            places = [i for i, c in enumerate(self.callbacks) if type(c).__name__ == name]
            places = [i for i in places if isinstance(self.callbacks[i], ExportableState)]
            if len(places) < len(saved):
                _logger.warning(
                    "The checkpoint has the state of %d %s, and this Trainer has %d, so the rest is not restored.",
                    *(len(saved), name, len(places)),
                )
            for i, state in zip(places, saved, strict=False):
                held = self.callbacks[i]
                self.callbacks[i] = _restored(type(held)(**state.get("args", {})) if replace else held, state)


def _restored(callback: TrainerCallback, state: Values) -> TrainerCallback:
    """Return the callback with a saved state; the same object unless its class overrides `from_state`."""
    kind = cast("type[ExportableState]", type(callback))
    if kind.from_state.__func__ is not ExportableState.from_state.__func__:  # type: ignore[attr-defined]
        return cast("TrainerCallback", kind.from_state(state))
    for name, value in state.get("attributes", {}).items():
        setattr(callback, name, value)
    return callback


def _progress() -> type[TrainerCallback]:
    if not is_in_notebook():
        return ProgressCallback
    from transformers.utils.notebook import NotebookProgressCallback  # needs IPython

    return NotebookProgressCallback


def _check_is_callback(callback: Callback) -> None:
    kind: type = callback if isinstance(callback, type) else type(callback)
    if any(hasattr(kind, event) for event in EVENTS):
        return
    name = getattr(callback, "__name__", repr(callback))
    raise TypeError(
        f"`Trainer(callbacks=[{name}])`: that has none of the events of a TrainerCallback; functions of a"
        " `tfn.StepInfo` are for `tfn.fit`. Write `class Mine(TrainerCallback): def on_step_end(self, args, state,"
        " control, **kwargs): ...`, and pass `callbacks=[Mine()]`."
    )


def _warn_of_misspelt_events(kind: type) -> None:
    """Warn of a method like ``on_step_ends``, which would never be called."""
    for name in dir(kind):
        if name in EVENTS or not name.startswith("on") or not callable(getattr(kind, name, None)):
            continue
        # Below 0.85, short names such as `on_load` and `on_log` are alike by chance.
        if write := nearest(name, EVENTS, "Write `def {}(self, args, state, control, **kwargs)`.", likeness=0.85):
            warnings.warn(f"`{kind.__name__}.{name}` is never called: there is no such event. {write}", stacklevel=3)


def _meant(name: str) -> str:
    """Return the decision that was meant: one with all words of the name (``should_stop``), or else the nearest."""
    words = set(name.split("_"))
    return next(
        (each for each in DECISIONS if words <= set(each.split("_"))), nearest(name, DECISIONS, "{}", likeness=0)
    )
