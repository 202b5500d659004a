"""The learning rate that `TrainingArguments` describe, as a function of the step."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import transformers
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

import trainfn as tfn
from trainfn.errors import nearest
from trainfn.hf._types import Values

Kwargs = Values
Arguments = transformers.TrainingArguments


class Scheduled(NamedTuple):
    """How the learning rate moves: with the step, or with a metric.

    Attributes:
        schedule: A function of the number of completed updates; with a controller, the first learning rate.
        controller: The controller that changes the rate after each evaluation; None for a function of the step.
    """

    schedule: tfn.Schedule | float
    controller: tfn.schedules.Controller | None = None


def make_schedule(args: Arguments, num_training_steps: int) -> Scheduled:
    """The learning rate of ``lr_scheduler_type``, its ``lr_scheduler_kwargs`` and the warm-up.

    At each step it equals the rate that the optimizer uses there with `transformers.get_scheduler`.

    Args:
        args: The fields ``learning_rate, lr_scheduler_type, lr_scheduler_kwargs, warmup_steps``, and
            ``greater_is_better`` where the rate follows a metric.
        num_training_steps: Updates in the whole run.

    Raises:
        ValueError: If ``lr_scheduler_kwargs`` has a key that the schedule doesn't take, or lacks one it needs.

    >>> from trainfn.hf import TrainingArguments
    >>> args = TrainingArguments(learning_rate=1.0, warmup_steps=0.25, use_cpu=True)
    >>> rate = make_schedule(args, 8).schedule
    >>> [round(rate(torch.tensor(n)).item(), 4) for n in range(8)]
    [0.0, 0.5, 1.0, 0.8333, 0.6667, 0.5, 0.3333, 0.1667]
    """
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    kwargs = _kwargs(args, name)
    try:
        if name in _CONTROLLERS:
            kwargs.setdefault("mode", "max" if args.greater_is_better else "min")
            return Scheduled(args.learning_rate, _CONTROLLERS[name](args.learning_rate, **kwargs))
        warmup = args.get_warmup_steps(num_training_steps)
        return Scheduled(_SCHEDULES[name](args.learning_rate, num_training_steps, warmup, kwargs))
    except TypeError as error:  # a key that the schedule requires is missing
        raise ValueError(
            f"`TrainingArguments(lr_scheduler_type={name!r}, lr_scheduler_kwargs={args.lr_scheduler_kwargs!r})`"
            f" can't work: {error}. Write for example `lr_scheduler_kwargs={_EXAMPLES.get(name, {})!r}`."
        ) from error


def for_groups(args: Arguments, optimizer: torch.optim.Optimizer, num_training_steps: int) -> list[Scheduled]:
    """The schedule of the arguments for a torch optimizer: each parameter group starts from its own rate.

    As in transformers, ``args.learning_rate`` has no effect then.

    Args:
        args: As for `make_schedule`.
        optimizer: The torch optimizer, whose groups have the first rates.
        num_training_steps: Updates in the whole run.

    >>> from trainfn.hf import TrainingArguments
    >>> groups = [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 4.0}]
    >>> scheduled = for_groups(TrainingArguments(use_cpu=True), torch.optim.SGD(groups, lr=1.0), 2)
    >>> [one.schedule(torch.tensor(1)).item() for one in scheduled]
    [0.5, 2.0]
    """
    peak = float(optimizer.defaults.get("lr") or args.learning_rate)
    changed = copy.copy(args)
    changed.learning_rate = peak
    rates = [float(group.get("initial_lr", group["lr"]) or peak) for group in optimizer.param_groups]
    made = make_schedule(changed, num_training_steps)
    if made.controller is not None:
        return [Scheduled(rate, made.controller) for rate in rates]
    return [Scheduled(tfn.schedules.scale(cast("tfn.Schedule", made.schedule), rate / peak)) for rate in rates]


def from_lambda_lr(scheduler: LRScheduler, num_training_steps: int) -> list[tfn.Schedule]:
    """The learning rates of a torch scheduler, one function of the step per parameter group.

    A scheduler is Python that changes an optimizer, so it can't be part of a compiled step. But its rates are
    known beforehand: a copy of it runs through the whole training on a stand-in optimizer, and the rates become a
    table. Neither the scheduler nor its optimizer is changed.

    Args:
        scheduler: Any scheduler whose rates depend on the step alone.
        num_training_steps: Length of the table; after it, the last rate stays.

    Raises:
        ValueError: If the scheduler reacts to a metric, or changes more than the rate.

    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    >>> halving = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    >>> (rate,) = from_lambda_lr(halving, 3)
    >>> [rate(torch.tensor(n)).item() for n in range(4)]
    [1.0, 0.5, 0.25, 0.125]
    """
    if isinstance(scheduler, ReduceLROnPlateau) or not hasattr(scheduler, "optimizer"):
        raise ValueError(
            f"`optimizers=(..., {type(scheduler).__name__}(...))` can't work: this scheduler reacts to a metric,"
            " so its rates are not known before the run. Write `TrainingArguments(lr_scheduler_type="
            "'reduce_lr_on_plateau', lr_scheduler_kwargs={...}, eval_strategy='epoch')` and no scheduler."
        )
    groups = [
        {**{k: copy.deepcopy(v) for k, v in group.items() if k != "params"}, "params": [torch.zeros(1)]}
        for group in scheduler.optimizer.param_groups
    ]
    stand_in = torch.optim.SGD(groups, lr=0.0)
    runner = copy.deepcopy(scheduler, {id(scheduler.optimizer): stand_in})
    rows = [_rates(stand_in)]
    rest = _rest(stand_in)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch counts the optimizer's steps, and would miss them here
        for _ in range(num_training_steps):
            stand_in.step()
            runner.step()
            rows.append(_rates(stand_in))
            if _rest(stand_in) != rest:
                raise ValueError(
                    f"`optimizers=(..., {type(scheduler).__name__}(...))` can't work: this scheduler changes the"
                    " momentum of the optimizer too, and a schedule sets only the learning rate. Write"
                    " `cycle_momentum=False`."
                )
    return [
        _table(column, group["params"][0].device)
        for column, group in zip(zip(*rows, strict=True), scheduler.optimizer.param_groups, strict=True)
    ]


def _table(rates: tuple[float, ...], device: torch.device) -> tfn.Schedule:
    """A schedule that reads its values from a table on the parameters' device; after the end, the last one stays."""
    table = torch.tensor(rates, dtype=torch.float32, device=device)

    def schedule(count: Tensor) -> Tensor:
        at = count.clamp(max=len(rates) - 1).reshape(1)  # a 0-dim index would be read on the host
        return table.to(count.device).index_select(0, at).reshape(())

    return schedule


def _rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _rest(optimizer: torch.optim.Optimizer) -> list[tuple[object, object]]:
    return [(group.get("momentum"), group.get("betas")) for group in optimizer.param_groups]


def _kwargs(args: Arguments, name: str) -> Kwargs:
    given = args.lr_scheduler_kwargs or {}
    kwargs: Kwargs = json.loads(given) if isinstance(given, str) else dict(given)
    known = _KWARGS[name]
    for key in kwargs:
        if key not in known:
            raise ValueError(
                f"`TrainingArguments(lr_scheduler_type={name!r}, lr_scheduler_kwargs={kwargs!r})` can't work: this"
                f" schedule has no {key!r}, only {list(known) or 'what all schedules have'}."
                f" {nearest(key, known, 'Write {!r}.', otherwise='Leave it out.')}"
            )
    return kwargs


def _linear(peak: float, total: int, warmup: int, kwargs: Kwargs) -> tfn.Schedule:
    # A run shorter than its warm-up ends on the way up, in transformers too.
    return tfn.schedules.linear(peak, max(total, warmup), warmup)


def _shape(shape: Callable[..., tfn.Schedule], **renamed: str) -> Callable[..., tfn.Schedule]:
    def make(peak: float, total: int, warmup: int, kwargs: Kwargs) -> tfn.Schedule:
        return shape(peak, max(total, warmup), warmup, **{renamed.get(k, k): v for k, v in kwargs.items()})

    return make


def _stable(peak: float, total: int, warmup: int, kwargs: Kwargs) -> tfn.Schedule:
    length = None if kwargs.get("num_stable_steps") is not None else total  # of the two, the former counts
    return tfn.schedules.warmup_stable_decay(peak, length, warmup, **kwargs)


_SCHEDULES: dict[str, Callable[[float, int, int, Kwargs], tfn.Schedule]] = {
    "linear": _linear,
    "cosine": _shape(tfn.schedules.cosine),
    "cosine_with_restarts": _shape(tfn.schedules.cosine_with_restarts),
    "polynomial": _shape(tfn.schedules.polynomial, lr_end="end_value"),
    "constant": lambda peak, total, warmup, kwargs: tfn.schedules.constant(peak),
    "constant_with_warmup": lambda peak, total, warmup, kwargs: tfn.schedules.constant_with_warmup(peak, warmup),
    "inverse_sqrt": lambda peak, total, warmup, kwargs: tfn.schedules.inverse_sqrt(peak, warmup, **kwargs),
    "cosine_with_min_lr": _shape(tfn.schedules.cosine_with_min_lr),
    "cosine_warmup_with_min_lr": _shape(tfn.schedules.cosine_warmup_with_min_lr),
    "warmup_stable_decay": _stable,
}
_CONTROLLERS: dict[str, Callable[..., tfn.schedules.Controller]] = {
    "reduce_lr_on_plateau": tfn.schedules.reduce_on_plateau,
    "greedy": tfn.schedules.greedy,
}
_FLOOR = ("num_cycles", "min_lr", "min_lr_rate")
_PLATEAU = ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "eps")
_KWARGS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": _FLOOR,
    "cosine_warmup_with_min_lr": (*_FLOOR, "warmup_lr_rate"),
    "warmup_stable_decay": (
        *("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
    ),
    "reduce_lr_on_plateau": _PLATEAU,
    "greedy": (*_PLATEAU, "warmup", "max_lr", "smooth", "window_size", "reset_start"),
}
_EXAMPLES = {"warmup_stable_decay": {"num_decay_steps": 100}}
