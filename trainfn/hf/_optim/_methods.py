"""The methods of a Trainer that are about its optimizer and its schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainfn.hf._optim import _resolve
from trainfn.hf._optim._named import cls_and_kwargs
from trainfn.hf._types import Optimizer, Scheduler, TrainerLike, Values

if TYPE_CHECKING:
    from trainfn.hf._arguments._training import TrainingArguments


class Optimizing:
    """How a Trainer makes its optimizer and its schedule; every method may be overridden."""

    def create_optimizer_and_scheduler(self: TrainerLike, num_training_steps: int) -> None:
        """Set up the optimizer, then the schedule."""
        _resolve.create(self, num_training_steps)

    def create_optimizer(self: TrainerLike, model: nn.Module | None = None) -> Optimizer | None:
        """Set ``optimizer``, and return it: a torch optimizer, or a transform of `trainfn.optim`."""
        return _resolve.create_optimizer(self, model)

    def create_scheduler(
        self: TrainerLike, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> Scheduler | None:
        """Set ``lr_scheduler``, and return it: a torch schedule, or a function of `trainfn.schedules`."""
        return _resolve.create_scheduler(self, num_training_steps, optimizer)

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: nn.Module | None = None
    ) -> tuple[Callable[..., torch.optim.Optimizer], Values]:
        """The class of ``args.optim``, and the arguments with which `create_optimizer` makes the optimizer."""
        return cls_and_kwargs(args, model)

    def get_decay_parameter_names(self: TrainerLike, model: nn.Module) -> list[str]:
        """The names of the parameters that decay: not those of norms, not biases."""
        return _resolve.decay_parameter_names(model)

    def get_num_trainable_parameters(self: TrainerLike) -> int:
        """The number of numbers that are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def get_learning_rates(self: TrainerLike) -> list[float]:
        """The learning rate of each parameter group."""
        return [group["lr"] for group in _resolve.optimizer_of(self).param_groups]

    def get_optimizer_group(
        self: TrainerLike, param: str | nn.Parameter | None = None
    ) -> Values | list[list[Tensor]] | None:
        """The optimizer's group with a parameter; by default the parameters of each group."""
        groups = _resolve.optimizer_of(self).param_groups
        if param is None:
            return [group["params"] for group in groups]
        return next((group for group in groups if any(param is each for each in group["params"])), None)

    def _get_learning_rate(self: TrainerLike) -> float:
        """The learning rate of the first group, which is logged."""
        return _resolve.learning_rate(self)
