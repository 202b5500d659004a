"""Donation: the new state takes the old one's memory, and the old one says so if it is used again.

Tensors in dicts and lists are overwritten in place. Tensors in tuples (the step count, the key, an optimizer's
counters) are small and come back fresh. `overwrite` is part of the captured graph; what empties the old state is
`Structure.retire`, after the graph has run.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NoReturn

from torch import Tensor

from trainfn._dtensor import held, spec_of
from trainfn._types import TrainState
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
    def __torch_function__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> NoReturn:
        raise DonatedStateError(f"`{getattr(func, '__name__', func)}` of a donated tensor: {_MESSAGE}")

    def _refuse(self, *_: object) -> NoReturn:
        raise DonatedStateError(f"arithmetic with a donated tensor: {_MESSAGE}")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _refuse
    __matmul__ = __rmatmul__ = __pow__ = __getitem__ = __len__ = __float__ = __int__ = __bool__ = _refuse  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "<donated>"


DONATED = _Donated()


def is_alive(state: object) -> bool:
    """Whether ``state`` is a state that no donating step has consumed."""
    return isinstance(state, TrainState) and next(iter(state.params.values()), None) is not DONATED


def check_alive(state: object) -> None:
    """Raise if ``state`` was consumed by a donating step."""
    if isinstance(state, TrainState) and not is_alive(state):
        raise DonatedStateError(f"step(state, batch): {_MESSAGE}")


def overwrite(donated: list[bool], old: list[Any], new: list[Any]) -> None:
    """Copy the donated leaves of the new state over the old ones, which take their place in ``new``.

    Args:
        donated: For each leaf of the state, whether its memory is taken over.
        old: The leaves of the old state, in order, and more.
        new: The leaves of the new state, in order, and more.
    """
    memory = {_storage(old[i]) for i, yes in enumerate(donated) if yes and isinstance(old[i], Tensor)}
    # Two passes: all new values that lie in old memory are copied out before any old memory is written.
    for i, yes in enumerate(donated):
        kept = new[i] is old[i] if yes else not isinstance(new[i], Tensor)
        # A new leaf that shares memory with an old one is read before that one is overwritten.
        if not kept and _storage(new[i]) in memory:
            new[i] = new[i].clone()
    for i, yes in enumerate(donated):
        if yes and new[i] is not old[i]:
            held(old[i]).copy_(held(new[i]))
            new[i] = old[i]


def _storage(x: Any) -> int:
    return held(x).untyped_storage()._cdata


def without_grown(donated: list[bool], buffers: range, old: Sequence[Any], new: Sequence[Any]) -> list[bool]:
    """Return which leaves are overwritten: a buffer that has grown, or shrunk, has memory of its own."""
    others = {i for i in buffers if _has_other_shape(old[i], new[i])} if len(new) >= len(donated) else ()
    return [yes and i not in others for i, yes in enumerate(donated)] if others else donated


def _has_other_shape(old: object, new: object) -> bool:
    if not (isinstance(old, Tensor) and isinstance(new, Tensor)):
        return False
    return old.shape != new.shape and old.dtype == new.dtype


def check_same(donated: list[bool], old: Sequence[Any], new: Sequence[Any], buffers: range = range(0)) -> None:
    """Raise if a new leaf can't take an old one's place; ``buffers`` may have other shapes."""
    triples = enumerate(zip(old, new, donated, strict=False))
    odd = next(
        ((a, b) for i, (a, b, _) in triples if _kind(a) != _kind(b) and not (i in buffers and _has_other_shape(a, b))),
        None,
    )
    if len(new) < len(donated) or odd is not None:
        found = "" if odd is None else f": {_shown(odd[0])} became {_shown(odd[1])}"
        raise ValueError(
            "jit(step, donate=True): the step returned a state of another structure, shape or dtype than the one it"
            f" got{found}. So it can't take its memory. Let `init` make the final structure, or write"
            " `jit(step, donate=False)`."
        )


def _shown(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}".removeprefix("torch.") if isinstance(x, Tensor) else repr(x)


def _kind(x: object) -> Hashable:
    if not isinstance(x, Tensor):
        return type(x)
    spec = spec_of(x)
    return x.shape, x.dtype, None if spec is None else spec.placements


def _text(out: object) -> str:
    kinds = [type(x).__name__ for x in out] if isinstance(out, tuple) else None  # type: ignore[misc]
    return f"({', '.join(kinds)})" if kinds is not None else f"a value of type {type(out).__name__}"


def check_result(out: object) -> None:
    """Raise if what a donating step returned is not a new state and metrics."""
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], TrainState)):
        raise TypeError(
            f"jit(step, donate=True) needs a step that returns (state, metrics), and this one returned {_text(out)}."
            " Only a new state can take the old one's memory. For another function, write `jit(step, donate=False)`."
        )
