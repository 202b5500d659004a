"""The optimizer and the schedule of a run: from the arguments, from overrides, or from torch objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import trainfn as tfn
from trainfn.hf._optim._named import clipped, make_optimizer
from trainfn.hf._optim._schedules import Scheduled, for_groups, from_lambda_lr, make_schedule
from trainfn.hf._optim._torch import from_torch


def create(trainer: Any, num_training_steps: int) -> None:
    """Set ``optimizer``, ``lr_scheduler`` and the transform that the step runs."""
    trainer.optimizer, trainer.lr_scheduler = trainer._given_optimizers
    given: Any = trainer.optimizer
    if trainer.lr_scheduler is None and isinstance(given, torch.optim.Optimizer) and not _schedules(trainer):
        trainer.lr_scheduler = for_groups(trainer.args, given, num_training_steps)
    if trainer.lr_scheduler is None:
        made = trainer.create_scheduler(num_training_steps, optimizer=trainer.optimizer or _stand_in(trainer))
        trainer.lr_scheduler = made if made is not None else trainer.lr_scheduler
    trainer._rates = _rates(trainer.lr_scheduler, num_training_steps)
    if trainer.optimizer is None:
        made = trainer.create_optimizer()
        trainer.optimizer = made if made is not None else trainer.optimizer
    trainer._transform = _transform(trainer)


def create_scheduler(trainer: Any, num_training_steps: int) -> Scheduled:
    """The schedule of the arguments."""
    return make_schedule(trainer.args, num_training_steps)


def create_optimizer(trainer: Any) -> tfn.Transform:
    """The optimizer of the arguments, or of ``optimizer_cls_and_kwargs``."""
    if trainer.optimizer_cls_and_kwargs is not None:
        cls, options = trainer.optimizer_cls_and_kwargs
        return cls([p for p in trainer.model.parameters() if p.requires_grad], **options)
    rates: Sequence[Any] = getattr(trainer, "_rates", None) or _rates(make_schedule(trainer.args, 1), 1)
    return make_optimizer(trainer.args, trainer.model, rates[0])


def _schedules(trainer: Any) -> bool:
    """Whether `create_scheduler` is overridden."""
    return not getattr(type(trainer).create_scheduler, "not_overridden", False)


def _stand_in(trainer: Any) -> torch.optim.Optimizer:
    """For an override of `create_scheduler` that wants a torch optimizer to schedule."""
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=trainer.args.learning_rate)


def _rates(scheduler: Any, num_training_steps: int) -> list[Any]:
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
        f"Trainer: the schedule is a {type(scheduler).__name__}. Give a torch LR scheduler, or a function of the step"
        " such as `tfn.schedules.cosine(1e-3, total_steps)`."
    )


def _transform(trainer: Any) -> tfn.Transform:
    optimizer = trainer.optimizer
    if isinstance(optimizer, tfn.Transform):
        return optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        groups = len(optimizer.param_groups)
        rates = trainer._rates if len(trainer._rates) == groups else [trainer._rates[0]] * groups
        made = from_torch(optimizer, trainer.model.named_parameters(), rates)
        if made is not None:
            return clipped(trainer.args, made)
    kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    raise ValueError(
        f"Trainer(optimizers=({kind}(...), ...)): what this optimizer does is known to its Python code alone, which"
        " can't be part of a pure step. Give one of torch's SGD, Adam, AdamW, RMSprop, Adagrad or transformers'"
        " Adafactor, which are converted; or a transform of `tfn.optim`; or name it in `TrainingArguments(optim=...)`."
    )


def learning_rate(trainer: Any) -> float:
    """The rate that the newest step used."""
    rate: Any = trainer._rates[0]
    if callable(rate):
        n = max(int(trainer.state.global_step) - 1, 0)
        value: Any = rate(torch.tensor(n))
        return float(value)
    return float(tfn.optim.get_hyperparams(trainer.train_state)["learning_rate"])


def after_evaluation(trainer: Any, metrics: dict[str, Any]) -> None:
    """Let a controller look at the metric, and set the rate it answers with."""
    controller = _controller(trainer)
    if controller is None or not trainer.is_in_train:
        return
    name = metric_name(trainer.args) or "eval_loss"
    if name not in metrics:
        raise KeyError(
            f"TrainingArguments(lr_scheduler_type={str(trainer.args.lr_scheduler_type)!r}): it follows {name!r}, which"
            f" is not among the evaluation's metrics {sorted(metrics)}. Set `metric_for_best_model`."
        )
    held = controller.init() if trainer._controller_state is None else trainer._controller_state
    _control(trainer, controller.update(float(metrics[name]), held))


def control_again(trainer: Any, saved: dict[str, Any]) -> None:
    """Let a controller go on from what a checkpoint says it knew, and the rate be what it had decided."""
    controller = _controller(trainer)
    assert controller is not None  # without one, the saved state has not fitted
    first: Any = controller.init()
    held = {n: torch.tensor(v, dtype=getattr(first, n).dtype) for n, v in saved.items()}
    _control(trainer, first._replace(**held))


def _controller(trainer: Any) -> tfn.schedules.Controller | None:
    """What the learning rate follows, if it follows a metric."""
    scheduled = trainer.lr_scheduler[0] if isinstance(trainer.lr_scheduler, list) else trainer.lr_scheduler
    return scheduled.controller if isinstance(scheduled, Scheduled) else None


def _control(trainer: Any, held: Any) -> None:
    """Keep a controller's state; from the next step on the rate is the one it says."""
    trainer._controller_state = held
    rate = float(held.learning_rate)
    trainer._changes.append(lambda state: tfn.optim.set_hyperparams(state, learning_rate=rate))


def metric_name(args: Any) -> str | None:
    """The metric to choose the best by, with its prefix."""
    name = args.metric_for_best_model
    return name if name is None or name.startswith("eval_") else f"eval_{name}"
