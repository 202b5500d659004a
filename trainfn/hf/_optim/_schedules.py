"""The schedule of a run: a scheduler of torch or of transformers, which writes the rates into the optimizer's groups.

It steps in Python after each update, as in transformers. The rates reach a captured step through the state; see
`trainfn.hf._optim._groups`.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from typing import TypeGuard, cast

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from transformers.optimization import Adafactor, AdafactorSchedule, GreedyLR, get_scheduler
from transformers.utils import logging

import trainfn as tfn
from trainfn.errors import nearest
from trainfn.hf._types import Steps, Values

logger = logging.get_logger(__name__)
Arguments = transformers.TrainingArguments


class Follow(LRScheduler):
    """The rates of a function of the step, such as those of `trainfn.schedules`.

    Args:
        optimizer: The optimizer, whose groups all get the same rate.
        schedule: ``step -> rate``, with the number of completed updates as ``int64[]``.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    >>> scheduler = Follow(optimizer, tfn.schedules.linear(0.5, 2))
    >>> scheduler.get_last_lr()
    [0.5]
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: tfn.Schedule) -> None:
        self.schedule = schedule
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The rates after the present step."""
        rate = self.schedule(torch.tensor(self.last_epoch))
        return [float(rate)] * len(self.optimizer.param_groups)


def make_scheduler(
    args: Arguments, optimizer: torch.optim.Optimizer, num_training_steps: int
) -> LRScheduler | ReduceLROnPlateau | GreedyLR:
    """The scheduler of ``lr_scheduler_type``, its ``lr_scheduler_kwargs`` and the warm-up, as transformers makes it.

    Args:
        args: The fields ``lr_scheduler_type, lr_scheduler_kwargs, warmup_steps``, and ``greater_is_better`` where the
            rate follows a metric.
        optimizer: The optimizer; each of its groups starts from its own rate.
        num_training_steps: Updates in the whole run.

    Raises:
        ValueError: If ``lr_scheduler_kwargs`` has a key that the schedule doesn't take, or lacks one it needs.

    >>> from trainfn.hf import TrainingArguments
    >>> args = TrainingArguments(warmup_steps=0.25, use_cpu=True)
    >>> scheduler = make_scheduler(args, torch.optim.SGD([torch.zeros(1)], lr=1.0), 8)
    >>> scheduler.get_last_lr()
    [0.0]
    """
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    kwargs = _kwargs(args, name)
    if name in FOLLOWS_METRIC:
        kwargs.setdefault("mode", "max" if args.greater_is_better else "min")
    warmup = args.get_warmup_steps(num_training_steps)
    try:
        return cast("LRScheduler", get_scheduler(name, optimizer, warmup, num_training_steps, kwargs))
    except TypeError as error:  # a key that the schedule requires is missing
        raise ValueError(
            f"`TrainingArguments(lr_scheduler_type={name!r}, lr_scheduler_kwargs={args.lr_scheduler_kwargs!r})`"
            f" can't work: {error}. Write for example `lr_scheduler_kwargs={_EXAMPLES.get(name, {})!r}`."
        ) from error


def as_scheduler(given: object, optimizer: torch.optim.Optimizer) -> Steps:
    """Make a user's schedule a scheduler that writes into the optimizer's groups.

    Raises:
        TypeError: If it is neither a scheduler nor a function of the step.
    """
    if callable(getattr(given, "step", None)) and callable(getattr(given, "get_last_lr", None)):
        return cast("Steps", given)
    if callable(given):
        return Follow(optimizer, cast("tfn.Schedule", given))
    raise TypeError(
        f"`Trainer(optimizers=(..., schedule))` can't work: the schedule is a {type(given).__name__}. Pass a"
        " torch LR scheduler, or a function of the step: `tfn.schedules.cosine(1e-3, total_steps)`."
    )


def follows_metric(scheduler: object) -> TypeGuard[ReduceLROnPlateau | GreedyLR]:
    """Whether the scheduler steps after an evaluation, with its metric, and not after each update."""
    return isinstance(scheduler, ReduceLROnPlateau | GreedyLR)


# --- in checkpoints -------------------------------------------------------------------------------------------------


def state_of(scheduler: Steps) -> Values:
    """The state of a scheduler as JSON; what JSON can't hold, such as functions, is left out.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    >>> state_of(torch.optim.lr_scheduler.StepLR(optimizer, 3))["step_size"]
    3
    """
    made: Callable[[], Values] | None = getattr(scheduler, "state_dict", None)
    if made is None:
        return {}
    state = made()
    found = cast("Values", to_json(state))
    lost = [name for name, value in state.items() if name not in found and not callable(value)]
    if lost:
        logger.warning_once(
            f"`{type(scheduler).__name__}.state_dict()`: {lost[0]!r} is a {type(state[lost[0]]).__name__}, which the"
            " JSON of a checkpoint can't hold. So a resumed run begins with its first value. Keep numbers, strings,"
            " lists and dicts in it."
        )
    return found


def load_state(scheduler: Steps, saved: Values) -> None:
    """Restore a scheduler to the state of a checkpoint."""
    load: Callable[[Values], None] | None = getattr(scheduler, "load_state_dict", None)
    if load is not None and saved:
        load(cast("Values", from_json(saved)))


def closed_form(scheduler: object) -> list[float] | None:
    """The rates after the present step of a scheduler that computes them from the step alone, or None.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    >>> closed_form(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5))
    [1.0]
    """
    if isinstance(scheduler, Follow):
        return [float(rate) for rate in scheduler.get_lr()]
    if type(scheduler) is LambdaLR:
        pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        return [float(base * factor(scheduler.last_epoch)) for base, factor in pairs]
    return None


def go_to(scheduler: Steps, optimizer: torch.optim.Optimizer, n: int) -> None:
    """Bring a new scheduler to the place after ``n`` updates."""
    if follows_metric(scheduler):
        return
    if isinstance(scheduler, LRScheduler) and closed_form(scheduler) is not None:
        scheduler.last_epoch, scheduler._step_count = n, n + 1
        write_rates(scheduler, optimizer)
        return
    for _ in range(n):
        optimizer._opt_called = True  # type: ignore[attr-defined]  # see `stepped`
        scheduler.step()


def write_rates(scheduler: LRScheduler, optimizer: torch.optim.Optimizer) -> None:
    """Write the rates that the scheduler has at its present step."""
    rates = closed_form(scheduler)
    assert rates is not None
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = list[float | Tensor](rates)


def stepped(scheduler: Steps, optimizer: torch.optim.Optimizer) -> None:
    """Make the scheduler's step after an update."""
    # Torch counts the calls of `optimizer.step`, and would warn that there was none.
    for each in (optimizer, getattr(scheduler, "optimizer", optimizer)):  # a callback's schedule may have the one shown
        each._opt_called = True  # type: ignore[attr-defined]
    if isinstance(scheduler, AdafactorSchedule) and all(group["relative_step"] for group in optimizer.param_groups):
        _show_relative(scheduler, optimizer)
    else:
        scheduler.step()


def _show_relative(scheduler: AdafactorSchedule, optimizer: torch.optim.Optimizer) -> None:
    """Make the step of a schedule that shows the rates which Adafactor computes; it looks for them in its moments."""
    scheduler.last_epoch += 1
    scheduler._step_count += 1
    for group in optimizer.param_groups:
        first = cast("Tensor", group["params"][0]).detach().float()
        held = {"step": scheduler.last_epoch, "RMS": float(first.square().mean().sqrt())}
        group["lr"] = float(Adafactor._get_lr(group, held))
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


_LEFT_OUT = object()


def to_json(value: object) -> object:
    """The value with marks where JSON would change its type; what it can't hold is left out of dicts.

    >>> to_json({"at": collections.Counter({3: 1}), "function": print})
    {'at': {'Counter': [[3, 1]]}}
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple):
        items = [to_json(each) for each in cast("list[object]", value)]
        if any(each is _LEFT_OUT for each in items):
            return _LEFT_OUT
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        pairs = [(k, to_json(v)) for k, v in cast("dict[object, object]", value).items()]
        kept = [(k, v) for k, v in pairs if v is not _LEFT_OUT]
        if isinstance(value, collections.Counter):
            return {"Counter": [list(pair) for pair in kept]}
        if all(isinstance(k, str) for k, _ in kept):
            return dict(kept)
        plain = all(type(k) in (int, float, str) for k, _ in kept)
        return {"dict": [list(pair) for pair in kept]} if plain else _LEFT_OUT
    return _LEFT_OUT


def from_json(value: object) -> object:
    """Undo `to_json`.

    >>> from_json({"at": {"Counter": [[3, 1]]}})
    {'at': Counter({3: 1})}
    """
    if isinstance(value, list):
        return [from_json(each) for each in cast("list[object]", value)]
    if not isinstance(value, dict):
        return value
    held = cast("dict[str, object]", value)
    if held.keys() == {"tuple"}:
        return tuple(cast("list[object]", from_json(held["tuple"])))
    if held.keys() == {"dict"}:
        pairs = cast("list[tuple[int | float, object]]", held["dict"])
        return {k: from_json(v) for k, v in pairs}
    if held.keys() == {"Counter"}:
        return collections.Counter({k: v for k, v in cast("list[tuple[int, int]]", held["Counter"])})
    return {k: from_json(v) for k, v in held.items()}


# --- its options ----------------------------------------------------------------------------------------------------


def _kwargs(args: Arguments, name: str) -> Values:
    given = args.lr_scheduler_kwargs or {}
    kwargs: Values = json.loads(given) if isinstance(given, str) else dict(given)
    known = _KWARGS[name]
    for key in kwargs:
        if key not in known:
            raise ValueError(
                f"`TrainingArguments(lr_scheduler_type={name!r}, lr_scheduler_kwargs={kwargs!r})` can't work: this"
                f" schedule has no {key!r}, only {list(known) or 'what all schedules have'}."
                f" {nearest(key, known, 'Write {!r}.', otherwise='Leave it out.')}"
            )
    return kwargs


FOLLOWS_METRIC = frozenset(("reduce_lr_on_plateau", "greedy"))
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
