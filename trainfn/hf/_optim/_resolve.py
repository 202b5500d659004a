"""The optimizer and the schedule of a run: from the arguments, from overrides, or from torch objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import trainfn as tfn
from trainfn.hf._optim._named import clipped, make_optimizer
from trainfn.hf._optim._schedules import Scheduled, for_groups, from_lambda_lr, make_schedule
from trainfn.hf._optim._torch import from_torch
from trainfn.hf._run._record import ControllerState, TrainingRun, current_run, newest_state
from trainfn.hf._types import Metrics, Optimizer, Rate, Scheduler, TrainerLike, Values

if TYPE_CHECKING:
    from trainfn.hf._arguments._training import TrainingArguments


def create(trainer: TrainerLike, num_training_steps: int) -> None:
    """Set ``optimizer`` and ``lr_scheduler``, and the learning rate of each parameter group."""
    given, trainer.lr_scheduler = trainer._trainfn.given
    # The schedule comes first, because the transform that `create_optimizer` makes contains it.
    trainer.optimizer = given
    if trainer.lr_scheduler is None and isinstance(given, torch.optim.Optimizer) and not _schedules(trainer):
        trainer.lr_scheduler = for_groups(trainer.args, given, num_training_steps)
    if trainer.lr_scheduler is None:
        made = trainer.create_scheduler(num_training_steps, optimizer=trainer.optimizer or _stand_in(trainer))
        trainer.lr_scheduler = made if made is not None else trainer.lr_scheduler
    trainer._trainfn.rates = _rates(trainer.lr_scheduler, num_training_steps)
    if trainer.optimizer is None:
        made = trainer.create_optimizer()
        trainer.optimizer = made if made is not None else trainer.optimizer


def create_scheduler(trainer: TrainerLike, num_training_steps: int) -> Scheduler:
    """The schedule of the arguments."""
    return make_schedule(trainer.args, num_training_steps)


def create_optimizer(trainer: TrainerLike) -> Optimizer:
    """The optimizer of the arguments, or of ``optimizer_cls_and_kwargs``."""
    if trainer.optimizer_cls_and_kwargs is not None:
        cls, options = trainer.optimizer_cls_and_kwargs
        return cls([p for p in trainer.model.parameters() if p.requires_grad], **options)
    rates = trainer._trainfn.rates or _rates(make_schedule(trainer.args, 1), 1)
    return make_optimizer(trainer.args, trainer.model, rates[0])


def _schedules(trainer: TrainerLike) -> bool:
    """Whether `create_scheduler` is overridden."""
    return not getattr(type(trainer).create_scheduler, "not_overridden", False)


def _stand_in(trainer: TrainerLike) -> torch.optim.Optimizer:
    """A torch optimizer without a model, for an override of `create_scheduler` that needs one."""
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=trainer.args.learning_rate)


def _rates(scheduler: Scheduler | None, num_training_steps: int) -> list[Rate]:
    """The learning rate of each parameter group: a function of the step, or a number that a controller changes."""
    if isinstance(scheduler, Scheduled):
        return [scheduler.schedule]
    if isinstance(scheduler, list):
        return [one.schedule for one in scheduler]
    if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        return list(from_lambda_lr(scheduler, num_training_steps))
    if callable(scheduler):
        return [scheduler]
    raise TypeError(
        f"`Trainer(optimizers=(..., schedule))` can't work: the schedule is a {type(scheduler).__name__}. Pass a"
        " torch LR scheduler, or a function of the step: `tfn.schedules.cosine(1e-3, total_steps)`."
    )


def transform_of(trainer: TrainerLike, num_training_steps: int) -> tfn.Transform:
    """The Trainer's optimizer as a transform, which is part of the step.

    Raises:
        ValueError: If the optimizer can't be converted.
    """
    record, optimizer = trainer._trainfn, trainer.optimizer
    if not record.rates:  # an override of `create_optimizer_and_scheduler` has set the two by itself
        record.rates = _rates(trainer.lr_scheduler, num_training_steps)
    if isinstance(optimizer, tfn.Transform):
        return optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        groups = len(optimizer.param_groups)
        rates = record.rates if len(record.rates) == groups else [record.rates[0]] * groups
        made = from_torch(optimizer, trainer.model.named_parameters(), rates)
        if made is not None:
            return clipped(trainer.args, made)
    kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    raise ValueError(
        f"`Trainer(optimizers=({kind}(...), ...))` can't work: only its own Python code knows its update, and that"
        " can't be part of a pure step. Pass torch's SGD, Adam, AdamW, RMSprop or Adagrad, or transformers' Adafactor,"
        " which are converted; or a transform of `tfn.optim`; or write `TrainingArguments(optim=...)`."
    )


def learning_rate(trainer: TrainerLike) -> float:
    """The learning rate that the newest step used."""
    rate = trainer._trainfn.rates[0]
    if callable(rate):
        return float(rate(torch.tensor(max(int(trainer.state.global_step) - 1, 0))))
    return float(tfn.optim.get_hyperparams(newest_state(trainer))["learning_rate"])


def after_evaluation(trainer: TrainerLike, metrics: Metrics) -> None:
    """Pass the metric to the controller, and set the learning rate that it returns."""
    controller = _controller(trainer)
    if controller is None or not trainer.is_in_train:
        return
    run = current_run(trainer)
    name = metric_name(trainer.args) or "eval_loss"
    if name not in metrics:
        raise KeyError(
            f"`TrainingArguments(lr_scheduler_type={str(trainer.args.lr_scheduler_type)!r})` can't work: it follows"
            f" {name!r}, which is not among the evaluation's metrics {sorted(metrics)}. Write"
            " `metric_for_best_model=...` with one of them."
        )
    held = controller.init() if run.controller_state is None else run.controller_state
    _control(run, controller.update(float(metrics[name]), held))


def control_again(trainer: TrainerLike, run: TrainingRun, saved: Values) -> None:
    """Restore the state of a controller from a checkpoint, and set its learning rate."""
    controller = _controller(trainer)
    assert controller is not None  # without one, the checkpoint's state would not have fitted
    first = controller.init()
    held = {n: torch.tensor(v, dtype=getattr(first, n).dtype) for n, v in saved.items()}
    _control(run, first._replace(**held))


def _controller(trainer: TrainerLike) -> tfn.schedules.Controller | None:
    """The controller of the learning rate, if it follows a metric."""
    scheduled = trainer.lr_scheduler[0] if isinstance(trainer.lr_scheduler, list) else trainer.lr_scheduler
    return scheduled.controller if isinstance(scheduled, Scheduled) else None


def _control(run: TrainingRun, held: ControllerState) -> None:
    """Keep a controller's state, and use its learning rate from the next step on."""
    run.controller_state = held
    rate = float(held.learning_rate)
    run.changes.append(lambda state: tfn.optim.set_hyperparams(state, learning_rate=rate))


def metric_name(args: TrainingArguments) -> str | None:
    """The metric that chooses the best checkpoint, with its prefix."""
    name = args.metric_for_best_model
    return name if name is None or name.startswith("eval_") else f"eval_{name}"
