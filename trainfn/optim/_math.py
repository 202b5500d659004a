"""Parts of every rule: arithmetic with numbers that may be tensors, the step count, checks of arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from trainfn import tree
from trainfn._types import Params, Schedule, Tree

Scalar: TypeAlias = float | Tensor
"""A number: a float, or a ``float32[]`` tensor that may change without a recompile."""

Update: TypeAlias = Callable[[Params, Tree, Params], tuple[Params, Tree]]

Rate: TypeAlias = float | Tensor | Schedule
"""A learning rate: a `Scalar`, or a function of the number of completed updates."""


def times(a: Tree, scalar: Scalar) -> Tree:
    """``scalar * a`` in the dtypes of ``a``.

    A 0-dim leaf times a 0-dim tensor would be promoted: hence the cast, which is free for all other leaves.
    """
    return tree.cast_like(tree.mul(a, scalar), a) if isinstance(scalar, Tensor) else tree.mul(a, scalar)


def plus(a: Tree, scalar: Scalar) -> Tree:
    """``a + scalar``, in the dtypes of ``a``."""
    return tree.map(lambda x: (x + scalar).to(x.dtype), a) if isinstance(scalar, Tensor) else tree.add(a, scalar)


def average(old: Tree, new: Tree, decay: Scalar) -> Tree:
    """``decay * old + (1 - decay) * new`` in the dtypes of ``old``.

    `torch._foreach_lerp` would read a tensor's value on the host: a sync, and a graph break.
    """
    new = tree.cast_like(new, old)
    if isinstance(decay, Tensor):
        return tree.add(old, times(tree.sub(new, old), 1 - decay))
    return tree.lerp(old, new, 1 - decay)


def on_parts(update: Update) -> Update:
    """An update that takes the real and the imaginary part of a complex number as two numbers, as torch's rules do."""

    def parts(tree_of: Tree) -> Tree:
        return tree.map(lambda x: torch.view_as_real(x) if x.is_complex() else x, tree_of)

    def whole(tree_of: Tree, like: Tree) -> Tree:
        return tree.map(lambda x, y: torch.view_as_complex(x) if y.is_complex() else x, tree_of, like)

    def of_parts(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        if not any(map(torch.is_complex, tree.leaves(updates))):
            return update(updates, state, params)
        out, new = update(parts(updates), parts(state), parts(params))
        return whole(out, updates), whole(new, state)

    return of_parts


def no_complex(call: str, params: Params) -> None:
    """Raise a ValueError if a parameter is complex, which the rule has no meaning for."""
    name = next((name for name, param in params.items() if param.is_complex()), None)
    if name is not None:
        raise ValueError(
            f"`{call}` can't work: {name!r} is complex. Write `partition` with another rule for it, such as `adam`."
        )


def square(a: Tree) -> Tree:
    """``a²``, leaf by leaf."""
    return tree.mul(a, a)


def unbias(moment: Tree, decay: Scalar, count: Tensor, late: Params | None = None) -> Tree:
    """``moment / (1 - decay^count)``: a moving average that started at 0, corrected (Kingma & Ba, section 3).

    ``expm1`` keeps all digits where ``1 - 0.999^1`` in float32 keeps four. ``late`` says which parameters have had
    fewer updates than the count, and how many fewer.
    """
    if late:
        own = {name: unbias(moment[name], decay, count - missed) for name, missed in late.items() if name in moment}
        return {**unbias(moment, decay, count), **own}
    wide = any(x.dtype == torch.float64 for x in optree.tree_leaves(moment))
    t = count.to(torch.float64 if wide else torch.float32)
    log_decay = torch.log(decay) if isinstance(decay, Tensor) else math.log(decay) if decay else -math.inf
    correction = -torch.expm1(t * log_decay)
    return tree.cast_like(tree.div(moment, correction), moment)


def device_of(params: Tree) -> torch.device:
    """Where the first leaf lives; the CPU if there is none."""
    leaves = optree.tree_leaves(params)
    return leaves[0].device if leaves else torch.device("cpu")


def zero_count(params: Tree) -> Tensor:
    """The number of completed updates before the first: ``int64[]``, on the parameters' device."""
    return torch.zeros((), dtype=torch.int64, device=device_of(params))


def nonnegative(call: str, **values: Any) -> None:
    """Raise a ValueError for every number below 0 (tensors and schedules are not looked at)."""
    _check(call, values, lambda v: v >= 0, "it must be 0 or more", abs)


def fraction(call: str, **values: Any) -> None:
    """Raise a ValueError for every number outside [0, 1)."""
    _check(
        call,
        values,
        lambda v: 0 <= v < 1,
        "it is the share of the past that a step keeps, in [0, 1)",
        lambda _: 0.9,
    )


def positive(call: str, **values: Any) -> None:
    """Raise a ValueError for every number that is not above 0."""
    _check(call, values, lambda v: v > 0, "it must be above 0", lambda v: abs(v) or 1.0)


def _check(
    call: str, values: dict[str, Any], good: Callable[[Any], bool], why: str, instead: Callable[[Any], Any]
) -> None:
    for name, value in values.items():
        if isinstance(value, int | float) and not good(value):
            raise ValueError(
                f"`{call}({name}={value!r})` can't work: {why}. Write for example `{call}({name}={instead(value)!r})`."
            )
