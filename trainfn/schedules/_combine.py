"""Schedules from schedules: one after the other, after a warm-up, or scaled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainfn._types import Schedule


def precise(shape: Callable[[Tensor], Tensor]) -> Schedule:
    """A schedule from a function of the step as a float64.

    For float32 can't count beyond 2^24 = 16,777,216. Devices without float64 (MPS) get float32.
    """

    def schedule(count: Tensor) -> Tensor:
        return shape(count.to(torch.float32 if count.device.type == "mps" else torch.float64)).to(torch.float32)

    return schedule


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """Follow one schedule after the other; each begins at its own 0.

    Args:
        schedules: In order.
        boundaries: The first step of each but the first schedule, increasing.

    Raises:
        ValueError: If there isn't one boundary between each two schedules, or they don't increase.

    >>> from trainfn.schedules import constant
    >>> schedule = join([constant(1.0), constant(0.1)], [100])
    >>> [round(schedule(torch.tensor(n)).item(), 4) for n in (0, 99, 100)]
    [1.0, 1.0, 0.1]
    """
    if len(boundaries) != len(schedules) - 1:
        raise ValueError(
            f"`join(<{len(schedules)} schedules>, boundaries={list(boundaries)})` can't work: there must be"
            f" one boundary between each two schedules, {max(len(schedules) - 1, 0)} in all. A boundary is"
            " the first step of the next schedule."
        )
    if any(b < a for a, b in zip([0, *boundaries], boundaries, strict=False)):
        raise ValueError(
            f"`join(…, boundaries={list(boundaries)})` can't work: boundaries are steps counted from the"
            f" start, and must not decrease. Write `boundaries={sorted(abs(b) for b in boundaries)}`."
        )

    def schedule(count: Tensor) -> Tensor:
        value = schedules[0](count)
        for following, boundary in zip(schedules[1:], boundaries, strict=True):
            value = torch.where(count < boundary, value, following(count - boundary))
        return value

    return schedule


def warmup(schedule: Schedule, steps: int, *, start: float = 0.0) -> Schedule:
    """Rise linearly to the first value of a schedule, then follow it.

    Goyal et al. 2017, https://arxiv.org/abs/1706.02677.

    Args:
        schedule: Begins, at its own 0, after the warm-up.
        steps: Length of the rise; 0 for none.
        start: The share of the first value to start from.

    Raises:
        ValueError: If ``steps`` is negative.

    >>> schedule = warmup(lambda count: 1.0 / (count + 1), 2)
    >>> [schedule(torch.tensor(n)).item() for n in range(4)]
    [0.0, 0.5, 1.0, 0.5]
    """
    if steps < 0:
        raise ValueError(f"`warmup(schedule, {steps})` can't work: it is a number of steps. Write 0 for no warm-up.")
    if steps == 0:
        return schedule

    def warm(count: Tensor) -> Tensor:
        share = precise(lambda s: start + (1.0 - start) * s / steps)(count)
        return torch.where(count < steps, share * schedule(torch.zeros_like(count)), schedule(count - steps))

    return warm


def scale(schedule: Schedule, factor: float | Tensor) -> Schedule:
    """Multiply a schedule by a number.

    >>> scale(lambda count: count.float(), 0.5)(torch.tensor(3))
    tensor(1.5000)
    """
    return lambda count: (schedule(count) * factor).to(torch.float32)


def check_steps(call: str, total_steps: int, warmup_steps: int) -> None:
    """Raise a ValueError unless ``0 <= warmup_steps <= total_steps``."""
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"`{call}(…, total_steps={total_steps}, warmup_steps={warmup_steps})` can't work: the warm-up is"
            f" the first part of the total, so it has between 0 and {max(total_steps, 0)} steps. Write for"
            f" example `warmup_steps={max(total_steps, 0) // 10}`."
        )
