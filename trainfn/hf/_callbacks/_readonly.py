"""What a callback sees: the Trainer's state, to be read and not written.

Assigning to it raises, and so does changing the log history. `copy.copy`, `dict(...)` and `list(...)` give what
may be changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NoReturn, SupportsIndex, cast

from transformers import TrainerState

_FIELDS = frozenset(field.name for field in dataclasses.fields(TrainerState))


class StateView(TrainerState):
    """A `TrainerState` that always shows another one's present values and can't be assigned to.

    >>> import transformers
    >>> state = transformers.TrainerState(global_step=3)
    >>> view = StateView(state)
    >>> state.global_step += 1
    >>> view.global_step, isinstance(view, transformers.TrainerState)
    (4, True)
    """

    def __init__(self, source: TrainerState) -> None:  # the fields stay in `source`
        object.__setattr__(self, "_source", source)

    def __getattribute__(self, name: str) -> object:
        if name in _FIELDS:
            return freeze(getattr(object.__getattribute__(self, "_source"), name))
        return object.__getattribute__(self, name)

    def __getattr__(self, name: str) -> object:  # what a Trainer's subclass keeps in its state
        return freeze(getattr(object.__getattribute__(self, "_source"), name))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(
            f"`state.{name} = {value!r}` can't work: a callback sees the Trainer's state, and what it decides it"
            ' returns. Write `return {"should_training_stop": True}`, or keep the value on the callback:'
            f" `self.{name} = {value!r}`."
        )

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"`del state.{name}` can't work: a callback sees the Trainer's state. Write nothing.")

    def __reduce__(self) -> tuple[object, ...]:
        source = object.__getattribute__(self, "_source")
        return TrainerState, tuple(getattr(source, field.name) for field in dataclasses.fields(TrainerState))


def freeze(value: object) -> object:
    """A list or dict as one that refuses to change; anything else as it is.

    >>> freeze([{"loss": 0.5}])[-1]["loss"]
    0.5
    """
    if type(value) is list:
        return FrozenList(cast("list[object]", value))
    return FrozenDict(cast("dict[str, object]", value)) if type(value) is dict else value


def _refuse(self: object, *_: object, **__: object) -> NoReturn:
    raise TypeError(
        "`state.log_history`, and all else in a callback's `state`, can't be changed there: the other callbacks and"
        ' trainer_state.json show it too. Write `trainer.log({"my_metric": 1.0})` outside of callbacks, or change a'
        " copy: `list(state.log_history)`."
    )


class FrozenList(list[object]):
    """A list that can be read and copied; its items are frozen as they are read, so that making one costs little."""

    append = extend = insert = pop = remove = clear = sort = reverse = _refuse  # type: ignore[assignment]
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse  # type: ignore[assignment]

    def __getitem__(self, index: SupportsIndex | slice) -> object:  # type: ignore[override]
        """The item, or the slice, frozen."""
        return freeze(list.__getitem__(self, index))

    def __iter__(self) -> Iterator[object]:
        return map(freeze, list.__iter__(self))

    def __reversed__(self) -> Iterator[object]:
        return map(freeze, list.__reversed__(self))

    def copy(self) -> list[object]:
        """A list like any other; its items stay frozen."""
        return list(self)

    def __reduce__(self) -> tuple[object, ...]:
        return list, (list(list.__iter__(self)),)


class FrozenDict(dict[str, object]):
    """A dict that can be read and copied."""

    pop = popitem = clear = update = setdefault = _refuse  # type: ignore[assignment]
    __setitem__ = __delitem__ = __ior__ = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[object, ...]:
        return dict, (dict(self),)
