"""The actions of a run between its steps and at its end: the ranks decide together, then log, evaluate and save."""

from __future__ import annotations

import contextlib

from transformers.trainer_utils import SaveStrategy, TrainOutput, speed_metrics

from trainfn.hf._callbacks._events import DECISIONS, event
from trainfn.hf._checkpoints import _parts
from trainfn.hf._names import overridden
from trainfn.hf._parallel import _parameters
from trainfn.hf._run._record import TrainingRun
from trainfn.hf._step._modes import eval_mode
from trainfn.hf._types import TrainerLike, Trial


def agree(trainer: TrainerLike, run: TrainingRun) -> None:
    """Set on all ranks the decisions that any rank has made, and add up the counts of all."""
    world = trainer._trainfn.world
    # A rank that saved or stopped alone would leave the others waiting in a collective. The cost is two small sums.
    control = trainer.control
    found = run.requests.agree(*(bool(getattr(control, name)) for name in DECISIONS))
    if world.plan is None:
        return
    for name, value in zip(DECISIONS, found, strict=True):
        setattr(control, name, value)
    run.windows.take_counts(world.sums(run.windows.counted))


def trial_of(trainer: TrainerLike) -> Trial | None:
    search = trainer._trainfn.search
    return None if search is None else search.trial


def act(trainer: TrainerLike, run: TrainingRun) -> None:
    """Log, evaluate and save, if the callbacks decided so. Then stop, if Ctrl-C was pressed on a rank.

    Raises:
        KeyboardInterrupt: If Ctrl-C was pressed. All ranks raise it after the same step, with full parameters in the
            model.
    """
    control = trainer.control
    acted = control.should_log or control.should_evaluate or control.should_save
    if run.acts_alone:  # an override decides by itself when to log
        loss, norm = run.losses.newest(trainer.args.device)
        state, where = trainer.state, (run.ignore_keys, run.began)
        trainer._maybe_log_save_evaluate(loss, norm, trainer.model, trial_of(trainer), state.epoch or 0.0, *where)
    else:
        maybe_log_save_evaluate(trainer, run)
    if acted:  # logs, evaluations and checkpoints fire events, in which callbacks decide again
        agree(trainer, run)
    if run.requests.interrupted:
        _parameters.fill(trainer)
        raise KeyboardInterrupt


def maybe_log_save_evaluate(trainer: TrainerLike, run: TrainingRun, rate: float | None = None) -> None:
    """Log, evaluate and save, in this order, if the callbacks decided so."""
    control = trainer.control
    if control.should_log and run.losses.steps > 0:
        trainer.store_flos()
        trainer.log(run.losses.take(learning_rate=run.learning_rate if rate is None else rate), run.began)
    if control.should_evaluate and not run.requests.terminated:
        with eval_mode(trainer.model):  # until the next step, as in transformers; an override may log after `evaluate`
            metrics = trainer._evaluate(trial_of(trainer), run.ignore_keys)
        better = trainer._determine_best_metric(metrics=metrics, trial=trial_of(trainer))
        if trainer.args.save_strategy == SaveStrategy.BEST:
            control.should_save = control.should_save or better
    if control.should_save:
        trainer._save_checkpoint(trainer.model, trial=trial_of(trainer))
        event(trainer, "on_save")


def finished(trainer: TrainerLike, run: TrainingRun, rows: float, began: float) -> TrainOutput:
    """Log the metrics of a run, load the best model if asked for, and return the run's output."""
    steps = trainer.state.global_step - run.first
    rows = rows * steps / max(run.length.max_steps, 1)
    metrics = speed_metrics("train", began, num_samples=rows, num_steps=steps)
    trainer.store_flos()
    metrics["total_flos"] = trainer.state.total_flos
    metrics["train_loss"] = run.losses.loss
    trainer.log(metrics)
    run.saving.wait()
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        with contextlib.ExitStack() as stack:
            if overridden(trainer, "_load_best_model"):  # it knows full parameters only
                stack.enter_context(_parameters.plain(trainer))
            stack.enter_context(_parts.same_tensors(trainer.model))
            trainer._load_best_model()
    _parameters.fill(trainer)
    return TrainOutput(trainer.state.global_step, metrics["train_loss"], metrics)
