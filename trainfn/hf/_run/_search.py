"""Hyperparameter search with optuna: each trial is a run of its own, from a model of its own."""

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
from trainfn.hf._types import Metrics, TrainerLike, Trial, Values

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
    """Train one run for each trial, with its own arguments, and return the best run.

    Trial ``n`` saves to ``output_dir/run-n``, or to the folder that ``hp_name`` names. Afterwards the trainer has its
    own arguments again.

    Args:
        trainer: A Trainer with a ``model_init``.
        hp_space: ``trial -> {argument: value}``, by default transformers' own.
        compute_objective: ``metrics -> number``, by default the evaluation's loss, or the sum of the other metrics if
            there are any.
        n_trials: The number of runs.
        direction: ``"minimize"`` or ``"maximize"``, or a list of them for several objectives.
        backend: ``"optuna"``.
        hp_name: ``trial -> name``, for the trackers and the folder.
        **options: For ``optuna.create_study`` (``sampler``, ``storage``, …) and ``study.optimize`` (``timeout``, …).

    Raises:
        ValueError: If there is no ``model_init``, the backend is not optuna, ``n_jobs`` is not 1, an argument does not
            exist, or there are several processes.
        ImportError: If optuna is not installed.
    """
    world = trainer._trainfn.world
    if world.plan is not None:
        raise ValueError(
            f"`trainer.hyperparameter_search(...)` on {world.ranks.size} processes can't work: each of them would"
            " draw its own trials. Search with `python script.py`, and train with the result on all processes."
        )
    if trainer.model_init is None:
        raise ValueError(
            "`trainer.hyperparameter_search(...)` can't work without `model_init`: every trial begins with its own"
            " model. Write `Trainer(model_init=lambda: MyModel(...))` in place of `model=`."
        )
    if str(getattr(backend, "value", backend or "optuna")) != "optuna":
        raise ValueError(
            f"`hyperparameter_search(backend={backend!r})` can't work: optuna is the only backend. Leave `backend` out."
        )
    if find_spec("optuna") is None:
        raise ImportError(
            "`hyperparameter_search(...)` needs optuna, which is not installed. Run `pip install optuna`."
        )
    import optuna

    own, optimize = trainer.args, {k: options.pop(k) for k in ("timeout", "n_jobs", "gc_after_trial") if k in options}
    if optimize.get("n_jobs", 1) != 1:
        raise ValueError(
            f"`hyperparameter_search(n_jobs={optimize['n_jobs']})` can't work: all trials share this Trainer, so they"
            " run one by one. Leave `n_jobs` out."
        )
    objective = compute_objective or default_compute_objective
    trainer.hp_search_backend, trainer.hp_name = HPSearchBackend.OPTUNA, hp_name

    def run(trial: optuna.Trial) -> float | list[float]:
        trainer.args = own
        trainer._trainfn.search = Search(trial, objective, hp_space or default_hp_space_optuna)
        trainer.train(trial=trial)
        at, metrics = trainer._trainfn.latest
        return objective(dict(metrics if at == trainer.state.global_step else trainer.evaluate()))

    several = direction if isinstance(direction, list) else None
    study: Any = optuna.create_study(direction=None if several else str(direction), directions=several, **options)  # type: ignore[arg-type]
    try:
        study.optimize(run, n_trials=n_trials, **optimize)
    finally:
        trainer.args, trainer._trainfn.search = own, None
        trainer.hp_search_backend = trainer.hp_name = None
    if several:
        return [BestRun(str(best.number), best.values, best.params, study) for best in study.best_trials]
    best = study.best_trial
    return BestRun(str(best.number), best.value, best.params, study)


def with_values(args: TrainingArguments, values: Values) -> TrainingArguments:
    """A copy of the arguments with other values, each converted to the type of the old one."""
    new = copy.copy(args)
    known = [field.name for field in dataclasses.fields(args)]
    for name, value in values.items():
        if name not in known:
            near = nearest(name, known, likeness=0)
            raise ValueError(
                f"`hyperparameter_search(hp_space=...)` can't work: {name!r} is not a field of TrainingArguments.{near}"
            )
        old = getattr(args, name)
        setattr(new, name, type(old)(value) if type(old) in (int, float, str, bool) else value)
    return new


def setup(trainer: Trainer, trial: Trial | None) -> None:
    """Give the Trainer the arguments of a trial, and an Accelerator that fits them."""
    search = trainer._trainfn.search
    if search is None or trial is None:
        return
    trainer.args = with_values(trainer.args, search.space(trial))
    trainer._train_batch_size = trainer.args.train_batch_size
    trainer.create_accelerator_and_postprocess()


def report(trainer: TrainerLike, trial: Trial | None, step: int, metrics: Metrics) -> None:
    """Report an evaluation to the trial, and end its run if optuna prunes it."""
    search = trainer._trainfn.search
    if search is None or trial is None:
        return
    import optuna

    if isinstance(value := search.objective(dict(metrics)), int | float):
        trial.report(value, step)
        if trial.should_prune():
            raise optuna.TrialPruned
