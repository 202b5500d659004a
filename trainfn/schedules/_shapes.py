"""Schedules by name: a warm-up, and the shape of what follows.

All are functions of the number of completed updates, ``int64[]``, and return a ``float32[]`` on its device.
At equal arguments the numbers are those of transformers' ``get_*_schedule`` up to ``total_steps``; beyond
it, where theirs may rise again, ours keep their last value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from trainfn._types import Schedule
from trainfn.schedules._combine import check_steps, precise, warmup

Ramp = Literal["linear", "cosine", "1-sqrt"]


def constant(value: float | Tensor) -> Schedule:
    """The same value at every step.

    >>> constant(0.1)(torch.tensor(7))
    tensor(0.1000)
    """
    return precise(lambda s: torch.ones_like(s) * value)


def constant_with_warmup(peak: float | Tensor, warmup_steps: int = 0) -> Schedule:
    """Rise linearly from 0 to ``peak``, and stay.

    >>> schedule = constant_with_warmup(1.0, 4)
    >>> [schedule(torch.tensor(n)).item() for n in (0, 1, 4, 100)]
    [0.0, 0.25, 1.0, 1.0]
    """
    return warmup(constant(peak), warmup_steps)


def linear(peak: float | Tensor, total_steps: int, warmup_steps: int = 0) -> Schedule:
    """Rise linearly from 0 to ``peak``, then fall linearly to 0 at ``total_steps``.

    Raises:
        ValueError: If not ``0 <= warmup_steps <= total_steps``.

    >>> schedule = linear(1.0, 12, warmup_steps=4)
    >>> [schedule(torch.tensor(n)).item() for n in (0, 1, 4, 8, 12)]
    [0.0, 0.25, 1.0, 0.5, 0.0]
    """
    return _decay("linear", peak, total_steps, warmup_steps, lambda p: 1.0 - p)


def cosine(peak: float | Tensor, total_steps: int, warmup_steps: int = 0, *, num_cycles: float = 0.5) -> Schedule:
    """Rise linearly from 0 to ``peak``, then follow a cosine: by default half a period, down to 0.

    Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983.

    Raises:
        ValueError: If not ``0 <= warmup_steps <= total_steps``.

    >>> schedule = cosine(1.0, 12, warmup_steps=4)
    >>> [round(schedule(torch.tensor(n)).item(), 4) for n in (0, 1, 4, 8, 12)]
    [0.0, 0.25, 1.0, 0.5, 0.0]
    """
    return _decay("cosine", peak, total_steps, warmup_steps, lambda p: _cosine(p, num_cycles))


def cosine_with_restarts(
    peak: float | Tensor, total_steps: int, warmup_steps: int = 0, *, num_cycles: int = 1
) -> Schedule:
    """Rise linearly from 0 to ``peak``, then fall to 0 along a half cosine ``num_cycles`` times.

    SGDR: Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983, with periods of equal length.

    Raises:
        ValueError: If not ``0 <= warmup_steps <= total_steps``.

    >>> schedule = cosine_with_restarts(1.0, 8, num_cycles=2)
    >>> [round(schedule(torch.tensor(n)).item(), 4) for n in (0, 2, 4, 6, 8)]
    [1.0, 0.5, 1.0, 0.5, 0.0]
    """

    def shape(p: Tensor) -> Tensor:
        return torch.where(p < 1.0, _cosine((num_cycles * p) % 1.0, 0.5), 0.0)

    return _decay("cosine_with_restarts", peak, total_steps, warmup_steps, shape)


def cosine_with_min_lr(
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    *,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    num_cycles: float = 0.5,
) -> Schedule:
    """Rise linearly from 0 to ``peak``, then follow a cosine down to a minimum.

    Args:
        peak: The highest value.
        total_steps: Where the minimum is reached.
        warmup_steps: Length of the linear rise, part of ``total_steps``.
        min_lr: The lowest value; give this
        min_lr_rate: or this, its share of ``peak``.
        num_cycles: Periods of the cosine.

    Raises:
        ValueError: If not exactly one of ``min_lr`` and ``min_lr_rate`` is given, or not
            ``0 <= warmup_steps <= total_steps``.

    >>> schedule = cosine_with_min_lr(1.0, 8, min_lr=0.1)
    >>> [round(schedule(torch.tensor(n)).item(), 4) for n in (0, 4, 8)]
    [1.0, 0.55, 0.1]
    """
    floor = _floor("cosine_with_min_lr", peak, min_lr, min_lr_rate)

    def shape(p: Tensor) -> Tensor:
        return (_cosine(p, num_cycles) * (1 - floor) + floor).clamp(min=0.0)

    return _decay("cosine_with_min_lr", peak, total_steps, warmup_steps, shape)


def cosine_warmup_with_min_lr(
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    *,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
    num_cycles: float = 0.5,
) -> Schedule:
    """Like `cosine_with_min_lr`, but one step ahead: the first value is not 0, the last step has the minimum.

    Args:
        peak: The highest value.
        total_steps: Length; the minimum is reached at the last step, ``total_steps - 1``.
        warmup_steps: Length of the linear rise, part of ``total_steps``.
        min_lr: The lowest value; give this
        min_lr_rate: or this, its share of ``peak``.
        warmup_lr_rate: The first value's share of ``peak``; None for ``1 / warmup_steps``.
        num_cycles: Periods of the cosine.

    Raises:
        ValueError: If not exactly one of ``min_lr`` and ``min_lr_rate`` is given, or not
            ``0 <= warmup_steps <= total_steps``.

    >>> schedule = cosine_warmup_with_min_lr(1.0, 8, 2, min_lr=0.1)
    >>> [round(schedule(torch.tensor(n)).item(), 4) for n in (0, 1, 4, 7)]
    [0.5, 1.0, 0.55, 0.1]
    """
    check_steps("cosine_warmup_with_min_lr", total_steps, warmup_steps)
    floor = _floor("cosine_warmup_with_min_lr", peak, min_lr, min_lr_rate)

    def shape(s: Tensor) -> Tensor:
        if warmup_lr_rate is None:
            rise = (s + 1) / max(1, warmup_steps)
        else:
            rise = warmup_lr_rate + (1 - warmup_lr_rate) * s / max(1, warmup_steps - 1)
        p = ((s - warmup_steps + 1) / max(1, total_steps - warmup_steps)).clamp(0.0, 1.0)
        fall = (_cosine(p, num_cycles) * (1 - floor) + floor).clamp(min=0.0)
        return peak * torch.where(s < warmup_steps, rise, fall)

    return precise(shape)


def polynomial(
    peak: float | Tensor,
    total_steps: int,
    warmup_steps: int = 0,
    *,
    end_value: float = 1e-7,
    power: float = 1.0,
) -> Schedule:
    """Rise linearly from 0 to ``peak``, then fall to ``end_value`` as a power of the steps left.

    Raises:
        ValueError: If ``end_value`` is not below ``peak``, or not ``0 <= warmup_steps <= total_steps``.

    >>> schedule = polynomial(1.0, 12, warmup_steps=4, end_value=0.0, power=2.0)
    >>> [schedule(torch.tensor(n)).item() for n in (0, 4, 8, 12)]
    [0.0, 1.0, 0.25, 0.0]
    """
    if not isinstance(peak, Tensor) and end_value >= peak:
        raise ValueError(
            f"`polynomial({peak}, …, end_value={end_value})` can't work: it falls from its first argument to"
            f" end_value, which is not below it. Write `polynomial({peak}, …, end_value=0.0)`."
        )

    def fall(s: Tensor) -> Tensor:
        left = 1.0 - _progress(s, total_steps - warmup_steps)
        return (peak - end_value) * left**power + end_value

    check_steps("polynomial", total_steps, warmup_steps)
    return warmup(precise(fall), warmup_steps)


def inverse_sqrt(peak: float | Tensor, warmup_steps: int = 0, *, timescale: int | None = None) -> Schedule:
    """Rise linearly from 0 to ``peak``, then fall as ``1 / √steps``.

    Zhai et al. 2022, https://arxiv.org/abs/2106.04560.

    Args:
        peak: The highest value.
        warmup_steps: Length of the linear rise.
        timescale: In ``3 · timescale`` steps after the warm-up the value halves; None for ``warmup_steps``,
            or 10,000 without warm-up.

    Raises:
        ValueError: If ``warmup_steps`` is negative, or ``timescale`` below 1.

    >>> schedule = inverse_sqrt(1.0, 4)
    >>> [schedule(torch.tensor(n)).item() for n in (0, 1, 4, 16)]
    [0.0, 0.25, 1.0, 0.5]
    """
    scale = (warmup_steps or 10_000) if timescale is None else timescale
    if scale < 1:
        raise ValueError(
            f"`inverse_sqrt({peak}, timescale={timescale})` can't work: the value falls as √(timescale /"
            " steps). Write `timescale=10_000`, or None."
        )
    return warmup(precise(lambda s: peak / torch.sqrt((s + scale) / scale)), warmup_steps)


def warmup_stable_decay(
    peak: float | Tensor,
    total_steps: int | None = None,
    warmup_steps: int = 0,
    *,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    warmup_type: Ramp = "linear",
    decay_type: Ramp = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> Schedule:
    """Rise to ``peak``, stay, and fall to a minimum at the end.

    Hu et al. 2024 (MiniCPM), https://arxiv.org/abs/2404.06395; the types of ramp: Hägele et al. 2024,
    https://arxiv.org/abs/2405.18392.

    Args:
        peak: The highest value.
        total_steps: Where the minimum is reached; give this
        warmup_steps: Length of the rise.
        num_decay_steps: Length of the fall.
        num_stable_steps: or this: length of the stretch at ``peak``.
        warmup_type: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``.
        decay_type: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``.
        min_lr_ratio: First and last value, as a share of ``peak``.
        num_cycles: Periods of a falling cosine.

    Raises:
        ValueError: If not exactly one of ``total_steps`` and ``num_stable_steps`` is given, a type is
            unknown, or the three stretches are longer than ``total_steps``.

    >>> schedule = warmup_stable_decay(1.0, 12, 4, num_decay_steps=4, decay_type="linear")
    >>> [schedule(torch.tensor(n)).item() for n in (0, 2, 4, 8, 10, 12)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    """
    _check_ramps(warmup_type, decay_type)
    stable = _stable_steps(total_steps, warmup_steps, num_stable_steps, num_decay_steps)
    decay_at = warmup_steps + stable

    def shape(s: Tensor) -> Tensor:
        rise = _RISE[warmup_type](_progress(s, warmup_steps))
        fall = _FALL[decay_type](_progress(s - decay_at, num_decay_steps), num_cycles)
        fall = torch.where(s < decay_at + num_decay_steps, fall, 0.0)
        factor = torch.where(s < warmup_steps, rise, torch.where(s < decay_at, 1.0, fall))
        return peak * (factor * (1 - min_lr_ratio) + min_lr_ratio).clamp(min=0.0)

    return precise(shape)


_RISE: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda p: p,
    "cosine": lambda p: 0.5 * (1 - torch.cos(math.pi * p)),
    "1-sqrt": lambda p: 1 - torch.sqrt(1 - p),
}
_FALL: dict[str, Callable[[Tensor, float], Tensor]] = {
    "linear": lambda p, _: 1 - p,
    "cosine": lambda p, num_cycles: _cosine(p, num_cycles),
    "1-sqrt": lambda p, _: 1 - torch.sqrt(p),
}


def _decay(
    call: str, peak: float | Tensor, total_steps: int, warmup_steps: int, shape: Callable[[Tensor], Tensor]
) -> Schedule:
    """``peak · shape(progress)`` after a warm-up, progress going from 0 to 1."""
    check_steps(call, total_steps, warmup_steps)
    return warmup(precise(lambda s: peak * shape(_progress(s, total_steps - warmup_steps))), warmup_steps)


def _progress(s: Tensor, steps: int) -> Tensor:
    return (s / max(1, steps)).clamp(0.0, 1.0)


def _cosine(p: Tensor, num_cycles: float) -> Tensor:
    return 0.5 * (1.0 + torch.cos(math.pi * num_cycles * 2.0 * p))


def _floor(call: str, peak: float, min_lr: float | None, min_lr_rate: float | None) -> float:
    if (min_lr is None) == (min_lr_rate is None):
        raise ValueError(
            f"`{call}({peak}, min_lr={min_lr}, min_lr_rate={min_lr_rate})` needs exactly one of the two: the"
            f" lowest value, or its share of {peak}. Write `min_lr={0.1 * peak:g}` or `min_lr_rate=0.1`."
        )
    return min_lr_rate if min_lr is None else min_lr / peak  # type: ignore[return-value]


def _check_ramps(warmup_type: str, decay_type: str) -> None:
    for name, value in {"warmup_type": warmup_type, "decay_type": decay_type}.items():
        if value not in _RISE:
            raise ValueError(
                f"`warmup_stable_decay({name}={value!r})`: there is no such type of ramp. Write one of {list(_RISE)}."
            )


def _stable_steps(total: int | None, rise: int, stable: int | None, fall: int) -> int:
    if (total is None) == (stable is None):
        raise ValueError(
            f"`warmup_stable_decay(total_steps={total}, num_stable_steps={stable})` needs exactly one of the"
            " two: each follows from the other. Write `warmup_stable_decay(peak, total_steps, warmup_steps,"
            " num_decay_steps=…)`."
        )
    length = total - rise - fall if total is not None else stable
    assert length is not None
    if min(length, rise, fall) < 0:
        raise ValueError(
            f"`warmup_stable_decay(total_steps={total}, warmup_steps={rise}, num_decay_steps={fall},"
            f" num_stable_steps={stable})` can't work: no stretch can have a negative length, and warm-up"
            f" and decay have to fit into the total. Write total_steps={abs(rise) + abs(fall)} or more."
        )
    return length
