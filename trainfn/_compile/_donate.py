"""Donation: the new state takes the old one's memory, and the old one says so if it is used again.

Tensors in dicts and lists are overwritten in place. Those in tuples (the step count, the key, an optimizer's
counters) are small and come back fresh. `overwrite` runs inside the compiled program, `reclaim` after it: both walk
the state in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from torch import Tensor

from trainfn._types import TrainState, Tree
from trainfn.errors import DonatedStateError

_MESSAGE = (
    "this state was given to a step with donate=True, which reused its memory for the new state. Keep what the step"
    " returns, `state, metrics = step(state, batch)`; to keep the old state as well, give the step a copy:"
    " `step(trainfn.copy(state), batch)`, or compile with `trainfn.jit(step, donate=False)`."
)


class _Donated:
    """Stands in a consumed state where a tensor was; whatever is done with it raises."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)  # Python's own questions about an object's kind
        raise DonatedStateError(f"`.{name}` of a donated tensor: {_MESSAGE}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise DonatedStateError(f"`{getattr(func, '__name__', func)}` of a donated tensor: {_MESSAGE}")

    def _refuse(self, *_: object) -> NoReturn:
        raise DonatedStateError(f"arithmetic with a donated tensor: {_MESSAGE}")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _refuse
    __matmul__ = __rmatmul__ = __pow__ = __getitem__ = __len__ = __float__ = __int__ = __bool__ = _refuse  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "<donated>"


DONATED = _Donated()


def check_alive(state: object) -> None:
    """Raise if ``state`` was consumed by a donating step."""
    if isinstance(state, TrainState) and next(iter(state.params.values()), None) is DONATED:
        raise DonatedStateError(f"step(state, batch): {_MESSAGE}")


def overwrite(old: Tree, new: Tree) -> list[Tensor]:
    """Copy the new tensors over the old ones; return those that take no old one's place."""
    fresh: list[Tensor] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    _pair(old, new, pairs, fresh, replaceable=False)
    # A new tensor that *is* another old one must be read before that one is overwritten.
    olds = {tensor: None for tensor, _ in pairs}
    pairs = [(a, b.clone() if b in olds and b is not a else b) for a, b in pairs]
    fresh = [tensor.clone() if tensor in olds else tensor for tensor in fresh]
    for a, b in pairs:
        if b is not a:
            a.copy_(b)
    return fresh


def _pair(
    old: Tree,
    new: Tree,
    pairs: list[tuple[Tensor, Tensor]],
    fresh: list[Tensor],
    *,
    replaceable: bool,
) -> None:
    if isinstance(old, Tensor):
        _same(isinstance(new, Tensor) and new.shape == old.shape and new.dtype == old.dtype)
        if replaceable:
            pairs.append((old, new))
        else:
            fresh.append(new)
    elif isinstance(old, dict):
        _same(isinstance(new, dict) and len(new) == len(old))
        for name, value in old.items():
            _same(name in new)
            _pair(value, new[name], pairs, fresh, replaceable=True)
    elif isinstance(old, list | tuple):
        _same(isinstance(new, list | tuple) and len(new) == len(old))
        for a, b in zip(old, new, strict=True):
            _pair(a, b, pairs, fresh, replaceable=isinstance(old, list))


def _same(same: bool) -> None:
    if not same:
        raise ValueError(
            "a step with donate=True returned a state of another structure, shape or dtype than the one it got, so it"
            " can't take its place. Let `init` make the final structure, or compile with `donate=False`."
        )


def reclaim(old: Tree, fresh: Iterator[Tensor]) -> Tree:
    """The new state, made of the old one's overwritten tensors and the fresh ones; the old one is emptied."""
    if isinstance(old, Tensor):
        return next(fresh)
    if isinstance(old, dict):
        new = {k: v if isinstance(v, Tensor) else reclaim(v, fresh) for k, v in old.items()}
        old.update({k: DONATED for k, v in old.items() if isinstance(v, Tensor)})
        return new
    if isinstance(old, list):
        new_list = [v if isinstance(v, Tensor) else reclaim(v, fresh) for v in old]
        old[:] = [DONATED if isinstance(v, Tensor) else v for v in old]
        return new_list
    if isinstance(old, tuple):
        items = [reclaim(v, fresh) for v in old]
        return type(old)(*items) if hasattr(old, "_fields") else tuple(items)
    return old
