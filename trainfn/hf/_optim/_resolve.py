"""The optimizer and the schedule of a run: asked for as transformers asks, then shown as torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers.trainer_optimizer import is_optimizer_factory

import trainfn as tfn
from trainfn.hf._optim._facade import RunOptimizer, TransformOptimizer
from trainfn.hf._optim._named import clipping, decay_names
from trainfn.hf._optim._outside import trained_module
from trainfn.hf._optim._schedules import as_scheduler, follows_metric, make_scheduler, stepped
from trainfn.hf._types import Metrics, Optimizer, Scheduler, Steps, TrainerLike, Values

if TYPE_CHECKING:
    from trainfn.hf._arguments._training import TrainingArguments


def create(trainer: TrainerLike, num_training_steps: int) -> None:
    """The default of `Trainer.create_optimizer_and_scheduler`: the optimizer first, because a schedule writes into it.

    An override that returns an optimizer or a schedule, and does not set the attribute, is understood too.
    """
    made = trainer.create_optimizer()
    trainer.optimizer = made if trainer.optimizer is None else trainer.optimizer
    trainer.optimizer = as_torch(trainer, trainer.optimizer)
    scheduler = trainer.create_scheduler(num_training_steps=num_training_steps)
    trainer.lr_scheduler = scheduler if trainer.lr_scheduler is None else trainer.lr_scheduler


def create_optimizer(trainer: TrainerLike, model: nn.Module | None) -> Optimizer | None:
    """The default of `Trainer.create_optimizer`: the Trainer's own, or that of the arguments in two groups."""
    if trainer.optimizer is not None:
        return trainer.optimizer
    model = trainer.model if model is None else model
    decays = trainer.get_decay_parameter_names(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: object = [
        {"params": [p for n, p in trained if n in decays], "weight_decay": trainer.args.weight_decay},
        {"params": [p for n, p in trained if n not in decays], "weight_decay": 0.0},
    ]
    if trainer.optimizer_cls_and_kwargs is not None:
        cls, options = trainer.optimizer_cls_and_kwargs
    else:
        cls, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    options = dict(options)
    if isinstance(cls, type) and is_optimizer_factory(cls):
        factory = cast("Callable[[], Callable[..., torch.optim.Optimizer]]", cls)
        trainer.optimizer = factory()(model, **options)
        return trainer.optimizer
    for key in ("params", "model", "optimizer_dict"):  # in place of the two groups, as in transformers
        groups = options.pop(key, groups)
    try:
        trainer.optimizer = cls(groups, **options)
    except RuntimeError:
        if not options.pop("fused", False):  # a kernel that this device does not have
            raise
        trainer.optimizer = cls(groups, **options)
    return trainer.optimizer


def create_scheduler(trainer: TrainerLike, num_training_steps: int, optimizer: Optimizer | None) -> Scheduler:
    """The default of `Trainer.create_scheduler`: the Trainer's own, or that of the arguments."""
    if trainer.lr_scheduler is None:
        optimizer = as_torch(trainer, trainer.optimizer if optimizer is None else optimizer)
        trainer.lr_scheduler = trainer._trainfn.made = make_scheduler(trainer.args, optimizer, num_training_steps)
    return trainer.lr_scheduler


def as_torch(trainer: TrainerLike, optimizer: Optimizer | None) -> torch.optim.Optimizer:
    """A torch optimizer as it is, or a transform as one.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    if isinstance(optimizer, tfn.Transform):
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        return TransformOptimizer(optimizer, trained, trainer.args.learning_rate)
    raise TypeError(
        f"`Trainer(optimizers=(optimizer, ...))` can't work: the optimizer is a {type(optimizer).__name__}. Pass a"
        " torch optimizer, or a transform of `tfn.optim`; an override of `create_optimizer` sets `self.optimizer`."
    )


def begin(trainer: TrainerLike, num_training_steps: int) -> RunOptimizer:
    """Ask the Trainer for the optimizer and the schedule of a new run, and show them as torch's.

    If a former run made them, they are made anew. If the user gave them, or set them, they are used again.
    """
    record = trainer._trainfn
    if isinstance(trainer.optimizer, RunOptimizer):
        trainer.optimizer.rewind()
        trainer.optimizer, trainer.lr_scheduler = record.given
    if trainer.lr_scheduler is record.made:
        trainer.lr_scheduler = record.made = None
    record.given = trainer.optimizer, trainer.lr_scheduler
    trainer.create_optimizer_and_scheduler(num_training_steps=num_training_steps)
    optimizer = as_torch(trainer, trainer.optimizer)
    if isinstance(optimizer, RunOptimizer):
        optimizer = optimizer.optimizer
    trainer.lr_scheduler = scheduler = as_scheduler(trainer.lr_scheduler, optimizer)
    record.trained = trained_module(trainer, optimizer)
    trainer.optimizer = shown = RunOptimizer(trainer, optimizer, scheduler, record.trained.named_parameters())
    return shown


def transform_of(trainer: TrainerLike) -> tfn.Transform:
    """The update of the run's optimizer, clipped where the arguments say so."""
    optimizer = cast("RunOptimizer", trainer.optimizer)
    return optimizer.transform if optimizer.groups is None else tfn.optim.chain(clip_of(trainer), optimizer.transform)


def clip_of(trainer: TrainerLike) -> tfn.Transform:
    """The clipping before the update: of the model's parameters, as in transformers, and not of a loss's own."""
    alone = trainer._trainfn.trained in (None, trainer.model)
    return clipping(trainer.args, None if alone else frozenset(name for name, _ in trainer.model.named_parameters()))


def decay_parameter_names(model: nn.Module) -> list[str]:
    """The names of the parameters that decay, in the order of the model."""
    names = decay_names(model)
    return [name for name, _ in model.named_parameters() if name in names]


def learning_rate(trainer: TrainerLike) -> float:
    """The learning rate of the first group, as transformers logs it."""
    scheduler = trainer.lr_scheduler
    if follows_metric(scheduler):
        return float(cast("torch.optim.Optimizer", trainer.optimizer).param_groups[0]["lr"])
    return float(steps_of(trainer, cast("torch.optim.Optimizer", trainer.optimizer)).get_last_lr()[0])


def steps_of(trainer: TrainerLike, optimizer: torch.optim.Optimizer) -> Steps:
    """The schedule of the run; a function that a callback has set becomes one that keeps its place."""
    own = optimizer.optimizer if isinstance(optimizer, RunOptimizer) else optimizer
    trainer.lr_scheduler = scheduler = as_scheduler(trainer.lr_scheduler, own)
    return scheduler


def advance(trainer: TrainerLike, optimizer: RunOptimizer, metrics: tfn.Metrics) -> None:
    """Make the step of the schedule that follows an update, unless the update was skipped or a metric decides."""
    # Only float16 skips updates. To know it, the host waits for the device, as in transformers.
    if "skipped" in metrics and bool(metrics["skipped"].total > 0):
        return
    if not follows_metric(trainer.lr_scheduler):
        stepped(steps_of(trainer, optimizer.optimizer), optimizer.optimizer)


def after_evaluation(trainer: TrainerLike, metrics: Metrics) -> None:
    """Make the step of a schedule that follows a metric."""
    scheduler = trainer.lr_scheduler
    if not follows_metric(scheduler) or not trainer.is_in_train:
        return
    name = metric_name(trainer.args) or "eval_loss"
    if name not in metrics:
        raise KeyError(
            f"`TrainingArguments(lr_scheduler_type={str(trainer.args.lr_scheduler_type)!r})` can't work: it follows"
            f" {name!r}, which is not among the evaluation's metrics {sorted(metrics)}. Write"
            " `metric_for_best_model=...` with one of them."
        )
    scheduler.step(float(metrics[name]))


def metric_name(args: TrainingArguments) -> str | None:
    """The metric that chooses the best checkpoint, with its prefix."""
    name = args.metric_for_best_model
    return name if name is None or name.startswith("eval_") else f"eval_{name}"


def optimizer_of(trainer: TrainerLike) -> torch.optim.Optimizer:
    """The Trainer's optimizer.

    Raises:
        ValueError: If it has none yet.
    """
    if trainer.optimizer is None:
        raise ValueError(
            "`trainer.get_learning_rates()` and `trainer.get_optimizer_group()` can't work: the Trainer optimizer is"
            " None. Call `trainer.create_optimizer()` or `trainer.train()` first."
        )
    return as_torch(trainer, trainer.optimizer)


def saved(trainer: TrainerLike, optimizer: RunOptimizer) -> Values:
    """The groups and the schedule of a run, for a checkpoint."""
    return optimizer.to_json(steps_of(trainer, optimizer.optimizer))


def restore(trainer: TrainerLike, optimizer: RunOptimizer, values: Values) -> None:
    """Take back what `saved` returned."""
    optimizer.load_json(steps_of(trainer, optimizer.optimizer), values)
