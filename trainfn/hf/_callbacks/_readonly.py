"""A read-only view of the Trainer's state, for callbacks.

An assignment to the view raises an error, and so does a change of the log history. `copy.copy`, `dict(...)` and
`list(...)` return copies that may be changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NoReturn, SupportsIndex, cast

from transformers import TrainerState

_FIELDS = frozenset(field.name for field in dataclasses.fields(TrainerState))


class StateView(TrainerState):
    """A `TrainerState` that shows another one's present values and can't be assigned to.

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

    def __getattr__(self, name: str) -> object:  # attributes that a subclass of the Trainer adds to its state
        return freeze(getattr(object.__getattribute__(self, "_source"), name))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(
            f"`state.{name} = {value!r}` can't work: a callback reads the Trainer's state, and returns its decisions."
            ' Write `return {"should_training_stop": True}`, or keep the value on the callback:'
            f" `self.{name} = {value!r}`."
        )

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"`del state.{name}` can't work: a callback only reads the Trainer's state. Leave it out.")

    def __reduce__(self) -> tuple[object, ...]:
        source = object.__getattribute__(self, "_source")
        return TrainerState, tuple(getattr(source, field.name) for field in dataclasses.fields(TrainerState))


def freeze(value: object) -> object:
    """Return a list or dict as one that can't be changed; any other value as it is.

    >>> freeze([{"loss": 0.5}])[-1]["loss"]
    0.5
    """
    if type(value) is list:
        return FrozenList(cast("list[object]", value))
    return FrozenDict(cast("dict[str, object]", value)) if type(value) is dict else value


def _refuse(self: object, *_: object, **__: object) -> NoReturn:
    raise TypeError(
        "`state.log_history`, and all else in a callback's `state`, can't be changed there: the other callbacks and"
        ' trainer_state.json show it too. Write `trainer.log({"my_metric": 1.0})` outside of callbacks, or change the'
        " copy `list(state.log_history)`."
    )


class FrozenList(list[object]):
    """A list that can be read and copied; its items are frozen when they are read, so to make one costs little."""

    append = extend = insert = pop = remove = clear = sort = reverse = _refuse  # type: ignore[assignment]
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse  # type: ignore[assignment]

    def __getitem__(self, index: SupportsIndex | slice) -> object:  # type: ignore[override]
        """Return the item, or the slice, frozen."""
        return freeze(list.__getitem__(self, index))

    def __iter__(self) -> Iterator[object]:
        return map(freeze, list.__iter__(self))

    def __reversed__(self) -> Iterator[object]:
        return map(freeze, list.__reversed__(self))

    def copy(self) -> list[object]:
        """Return an ordinary list; its items stay frozen."""
        return list(self)

    def __reduce__(self) -> tuple[object, ...]:
        return list, (list(list.__iter__(self)),)


class FrozenDict(dict[str, object]):
    """A dict that can be read and copied."""

    pop = popitem = clear = update = setdefault = _refuse  # type: ignore[assignment]
    __setitem__ = __delitem__ = __ior__ = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[object, ...]:
        return dict, (dict(self),)
