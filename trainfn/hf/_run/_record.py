"""The private records of a Trainer: one for its whole life, and one for each run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from torch import Tensor, nn

import trainfn as tfn
from trainfn.hf._parallel._world import ALONE, World
from trainfn.hf._step._frozen import Frozen
from trainfn.hf._types import Batch, LossMetrics, Metrics, Optimizer, Outputs, Scheduler, TrainerLike, Trial, Values

if TYPE_CHECKING:  # the files that define these import this one
    from trainfn.hf._checkpoints._folders import Saving
    from trainfn.hf._optim._facade import RunOptimizer
    from trainfn.hf._reporting._logs import LossWindow
    from trainfn.hf._run._data import Length, Windows
    from trainfn.hf._step._counting import Count


class Search(NamedTuple):
    """The trial of a hyperparameter search that is being trained.

    Attributes:
        trial: The trial of optuna.
        objective: ``metrics -> number``, or several numbers.
        space: ``trial -> {argument: value}``.
    """

    trial: Trial
    objective: Callable[[Metrics], float | list[float]]
    space: Callable[[Trial], Values]


class Restored(NamedTuple):
    """The checkpoint that a run resumes from, of which each method of the Trainer takes its part.

    Attributes:
        folder: The folder.
        state: The state; None if transformers wrote the checkpoint.
        extra: The values beside it.
    """

    folder: str
    state: tfn.TrainState | None
    extra: Values


@dataclasses.dataclass(eq=False)
class TrainingRun:
    """One call of `Trainer.train`.

    Attributes:
        length: The numbers of steps and epochs.
        windows: The micro-batches of each update, and the place in the data.
        losses: The metrics since the last log.
        requests: Ctrl-C and SIGTERM, on any rank.
        ignore_keys: Outputs that evaluations leave out.
        step: The compiled step, once it is prepared.
        saving: The checkpoints, once the loop has begun.
        changes: Functions that change the state before the next step.
        optimizer: The optimizer, once the run is prepared.
        learning_rate: The learning rate of the newest step.
        announced: Whether the events before the update were fired inside of the present step.
        gradients: The parameters whose ``.grad`` callbacks can read now.
        began: When the loop began, in seconds since the epoch.
        first: The number of steps before the run.
        saved: The step of the newest checkpoint of the run.
        tokens_before: The tokens that were seen before the loop began.
        restored: The checkpoint, while the run resumes from it.
        acts_alone: Whether a subclass overrides `_maybe_log_save_evaluate`, which is then called after every step.
        frozen: The parameters that the optimizer does not have.
    """

    length: Length
    windows: Windows
    losses: LossWindow
    requests: tfn.process.Requests
    ignore_keys: list[str] | None = None
    step: Callable[..., tuple[tfn.TrainState, tfn.Metrics]] = dataclasses.field(init=False, repr=False)
    saving: Saving = dataclasses.field(init=False, repr=False)
    changes: list[Callable[[tfn.TrainState], tfn.TrainState]] = dataclasses.field(default_factory=list)
    optimizer: RunOptimizer = dataclasses.field(init=False, repr=False)
    learning_rate: float = 0.0
    announced: bool = False
    gradients: list[Tensor] = dataclasses.field(default_factory=list, repr=False)
    began: float = dataclasses.field(default_factory=time.time)
    first: int = 0
    saved: int | None = None
    tokens_before: int = 0
    restored: Restored | None = None
    acts_alone: bool = False
    frozen: Frozen = dataclasses.field(default_factory=Frozen)


def no_metrics(inputs: Batch, outputs: Outputs) -> dict[str, tfn.Mean]:
    """The metrics of a loss that has none of its own: an empty dict."""
    return {}


@dataclasses.dataclass(eq=False)
class Record:
    """All private values of a Trainer, under the one name ``_trainfn``; a subclass may use any other name.

    Attributes:
        world: The processes that train together.
        given: The optimizer and the schedule that the user passed, or set on the Trainer.
        made: The schedule that `create_scheduler` made; the next run makes another one.
        run: The newest run. It stays after its end, so that its step can be looked at.
        trained: The model, with children for the optimizer's parameters that the model does not have.
        search: The trial that is being trained, if there is one.
        latest: The step of the newest evaluation, and its metrics.
        shifts: Whether the model's loss shifts labels; None until it is known.
        divisor: What the loss is divided by, if a trial has shown it to be another than that of the model's class.
        examined: Whether the loss has been tried out.
        shapes: The shapes of the state's buffers after the newest step.
        trials: How often that was begun.
        parameter_count: The model's parameters without embeddings; None until they are counted.
        released: Whether the parameters are sharded over ranks, so that the model does not hold them.
        manual_mean: The loss of the newest `training_step`, undivided.
        update: While an overridden `training_step` runs, the micro-batch with the counts of the whole update.
        watch: While an overridden `training_step` runs, a function that is called with the loss.
        loss_metrics: What is logged with the loss. It is part of the step, so nothing in it may wait for the device.
    """

    # A step is captured with what it reads. The rest, such as the run and its logs, changes while it trains.
    _steps_read: ClassVar[frozenset[str]] = frozenset(("world",))

    world: World = ALONE
    given: tuple[Optimizer | None, Scheduler | None] = (None, None)
    made: Scheduler | None = None
    run: TrainingRun | None = None
    trained: nn.Module | None = None
    search: Search | None = None
    latest: tuple[int, Metrics] = (-1, {})
    shifts: bool | None = None
    divisor: Count | None = None
    examined: bool = False
    shapes: Sequence[tuple[int, ...]] = ()
    trials: int = 0
    parameter_count: int | None = None
    released: bool = False
    manual_mean: tfn.Mean | None = None
    update: Batch | None = None
    watch: Callable[[object], None] | None = None
    loss_metrics: LossMetrics = no_metrics

    @property
    def needs_outputs(self) -> bool:
        """Whether a training step needs the outputs of the model, and not the loss alone."""
        return self.loss_metrics is not no_metrics


def current_run(trainer: TrainerLike) -> TrainingRun:
    """The run that the Trainer is in.

    Raises:
        RuntimeError: If no run is active.
    """
    run = trainer._trainfn.run
    if run is None or not trainer.is_in_train:
        raise RuntimeError(
            f"{type(trainer).__name__}: this method needs a run, and no run is active. Call it from a callback or an"
            " override while `trainer.train()` runs; `trainer.save_model(folder)` saves the model at any time."
        )
    return run


def trained_of(trainer: TrainerLike) -> nn.Module:
    """The model, with children for the optimizer's parameters that the model does not have."""
    trained = trainer._trainfn.trained
    return trainer.model if trained is None else trained


def newest_state(trainer: TrainerLike) -> tfn.TrainState:
    """The state after the newest step.

    Raises:
        RuntimeError: If there has been no run.
    """
    if trainer.train_state is None:
        raise RuntimeError(f"{type(trainer).__name__}: there is no state before a run. Call `trainer.train()` first.")
    return trainer.train_state
