"""Hyper-parameter search with optuna: each trial is a run of its own, from a model of its own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.trainer_utils import BestRun, default_compute_objective, default_hp_space_optuna

from trainfn.errors import nearest


def hyperparameter_search(
    trainer: Any,
    hp_space: Callable[[Any], Mapping[str, Any]] | None = None,
    compute_objective: Callable[[dict[str, float]], Any] | None = None,
    n_trials: int = 20,
    direction: Any = "minimize",
    backend: Any = None,
    hp_name: Callable[[Any], str] | None = None,
    **options: Any,
) -> Any:
    """Train with other arguments again and again, and return the best of the runs.

    Trial ``n`` saves to ``output_dir/run-n``. The trainer's own arguments are as before afterwards.

    Args:
        trainer: With a ``model_init``.
        hp_space: ``trial -> {argument: value}``, by default transformers' own.
        compute_objective: ``metrics -> number``, by default the evaluation's loss, or the sum of the other metrics if
            there are any.
        n_trials: How many runs.
        direction: ``"minimize"`` or ``"maximize"``, or a list of them for several objectives.
        backend: ``"optuna"``.
        hp_name: ``trial -> name``, for the trackers.
        **options: For ``optuna.create_study`` (``sampler``, ``storage``, …) and ``study.optimize`` (``timeout``, …).

    Raises:
        ValueError: If there is no ``model_init``, the backend is another one, or an argument does not exist.
        ImportError: If optuna is not installed.
    """
    if trainer._world.plan is not None:
        raise ValueError(
            f"hyperparameter_search on {trainer._world.ranks.size} processes: each would draw trials of its own. Start"
            " the search with `python script.py`, and train what it finds on all of them."
        )
    if trainer.model_init is None:
        raise ValueError(
            "hyperparameter_search: every trial begins with a model of its own, so the Trainer needs"
            " `Trainer(model_init=lambda: MyModel(...))` in place of `model=`."
        )
    if str(getattr(backend, "value", backend or "optuna")) != "optuna":
        raise ValueError(f"hyperparameter_search(backend={backend!r}): optuna is the one there is. Leave it out.")
    if find_spec("optuna") is None:
        raise ImportError("hyperparameter_search needs optuna: `pip install optuna`.")
    import optuna

    own, optimize = trainer.args, {k: options.pop(k) for k in ("timeout", "n_jobs", "gc_after_trial") if k in options}
    if optimize.get("n_jobs", 1) != 1:
        raise ValueError("hyperparameter_search(n_jobs=...): trials share this Trainer, so they run one by one.")
    objective = compute_objective or default_compute_objective

    def run(trial: Any) -> Any:
        trainer.args = with_values(own, (hp_space or default_hp_space_optuna)(trial))
        trainer._trial, trainer._objective, trainer._hp_name = trial, objective, hp_name
        trainer.train(trial=trial)
        at, metrics = trainer._latest_metrics
        return objective(dict(metrics if at == trainer.state.global_step else trainer.evaluate()))

    several = direction if isinstance(direction, list) else None
    study: Any = optuna.create_study(direction=None if several else str(direction), directions=several, **options)  # type: ignore[arg-type]
    try:
        study.optimize(run, n_trials=n_trials, **optimize)
    finally:
        trainer.args, trainer._trial = own, None
    if several:
        return [BestRun(str(best.number), best.values, best.params, study) for best in study.best_trials]
    best = study.best_trial
    return BestRun(str(best.number), best.value, best.params, study)


def with_values(args: Any, values: Mapping[str, Any]) -> Any:
    """A copy of the arguments with other values, each of the type that the old one has."""
    new = copy.copy(args)
    known = [field.name for field in dataclasses.fields(args)]
    for name, value in values.items():
        if name not in known:
            near = nearest(name, known, likeness=0)
            raise ValueError(f"hyperparameter_search: {name!r} is not a field of TrainingArguments.{near}")
        old = getattr(args, name)
        setattr(new, name, type(old)(value) if type(old) in (int, float, str, bool) else value)
    return new


def report(trainer: Any, metrics: dict[str, Any]) -> None:
    """Tell the trial of an evaluation, and end its run if it has no prospects."""
    import optuna

    trial = trainer._trial
    if isinstance(value := trainer._objective(dict(metrics)), int | float):
        trial.report(value, trainer.state.global_step)
        if trial.should_prune():
            raise optuna.TrialPruned


def folder(trainer: Any, output_dir: str) -> str:
    """Where a trial saves."""
    return output_dir if trainer._trial is None else str(Path(output_dir) / f"run-{trainer._trial.number}")
