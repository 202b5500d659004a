"""Hyper-parameter search with optuna: each trial is a run of its own, from a model of its own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import (
    BestRun,
    HPSearchBackend,
    default_compute_objective,
    default_hp_space_optuna,
)

from trainfn.hf._run._record import Search
from trainfn.hf._types import Metrics, Trial, Values

if TYPE_CHECKING:
    from trainfn.hf._arguments._training import TrainingArguments
    from trainfn.hf._trainer import Trainer

from trainfn.errors import nearest


def hyperparameter_search(
    trainer: Trainer,
    hp_space: Callable[[Trial], Values] | None = None,
    compute_objective: Callable[[Metrics], float | list[float]] | None = None,
    n_trials: int = 20,
    direction: str | list[str] = "minimize",
    backend: str | HPSearchBackend | None = None,
    hp_name: Callable[[Trial], str] | None = None,
    **options: Any,
) -> BestRun | list[BestRun]:
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
    world = trainer._trainfn.world
    if world.plan is not None:
        raise ValueError(
            f"hyperparameter_search on {world.ranks.size} processes: each would draw trials of its own. Start the"
            " search with `python script.py`, and train what it finds on all of them."
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

    def run(trial: optuna.Trial) -> float | list[float]:
        trainer.args = with_values(own, (hp_space or default_hp_space_optuna)(trial))
        trainer._trainfn.search = Search(trial, objective, hp_name)
        trainer.train(trial=trial)
        at, metrics = trainer._trainfn.latest
        return objective(dict(metrics if at == trainer.state.global_step else trainer.evaluate()))

    several = direction if isinstance(direction, list) else None
    study: Any = optuna.create_study(direction=None if several else str(direction), directions=several, **options)  # type: ignore[arg-type]
    try:
        study.optimize(run, n_trials=n_trials, **optimize)
    finally:
        trainer.args, trainer._trainfn.search = own, None
    if several:
        return [BestRun(str(best.number), best.values, best.params, study) for best in study.best_trials]
    best = study.best_trial
    return BestRun(str(best.number), best.value, best.params, study)


def with_values(args: TrainingArguments, values: Values) -> TrainingArguments:
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


def report(search: Search, metrics: Metrics, step: int) -> None:
    """Report an evaluation to the trial, and end its run if it has no prospects."""
    import optuna

    if isinstance(value := search.objective(dict(metrics)), int | float):
        search.trial.report(value, step)
        if search.trial.should_prune():
            raise optuna.TrialPruned
