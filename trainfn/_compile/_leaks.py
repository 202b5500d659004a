"""Tensors of a trace that stay behind: on a module, in a list, in a variable.

Such a tensor has no numbers. One that is merely kept, as the auxiliary loss of a mixture of experts is, does no harm;
whatever uses it later gets an error that names the place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor

from trainfn._compile._outside import ABSENT, Change
from trainfn.errors import LeakedError


class Leaked:
    """Stands where a step left a tensor while it was captured; whatever is done with it raises."""

    def __init__(self, name: str) -> None:
        self.__dict__["_name"] = name

    def _message(self) -> str:
        return (
            f"{self.__dict__['_name']} was written while a step was captured, so it has no numbers: a compiled step"
            ' does not run Python again. Return it as a metric, `return mean, {"name": tfn.Mean.of(x)}`; or keep it'
            " in a buffer, `module.register_buffer(...)`, which is part of the state; or run without compiling,"
            " `tfn.jit(step, compile=False)`."
        )

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise LeakedError(self._message())

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)  # Python's own questions about an object's kind
        raise LeakedError(self._message())

    @classmethod
    def __torch_function__(
        cls, func: object, types: object, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> NoReturn:
        """Refuse."""
        found = next((a for a in _all((*args, *(kwargs or {}).values())) if isinstance(a, Leaked)), None)
        raise LeakedError((found or Leaked("A tensor that is used here"))._message())

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _refuse
    __matmul__ = __rmatmul__ = __pow__ = __getitem__ = __len__ = __float__ = __int__ = __bool__ = __iter__ = _refuse

    def __repr__(self) -> str:
        return "<a tensor of a captured step>"


def _all(values: Iterable[object]) -> Iterable[object]:
    for value in values:
        yield value
        if isinstance(value, list | tuple):
            yield from _all(value)


def seal(changes: Iterable[Change], mode: object) -> list[str]:
    """Put `Leaked` in the place of each tensor that a trace left behind; return what these places are called."""
    found: list[str] = []
    for change in changes:
        new = change.new
        if change.place[1] is None:  # the items of a container, or a variable
            holder = change.holder
            if isinstance(holder, list):
                items: Iterable[Any] = range(len(holder))
            elif isinstance(holder, dict):
                items = list(holder)
            else:
                continue
            for key in items:
                if _is_fake(holder[key], mode):
                    holder[key] = Leaked(change.name)
                    found.append(change.name)
        elif _contains_fake(new, mode):
            change.holder[change.place[1]] = _sealed(new, change.name, mode)
            found.append(change.name)
    return list(dict.fromkeys(found))


def _sealed(value: Any, name: str, mode: object) -> Any:
    if _is_fake(value, mode):
        return Leaked(name)
    if type(value) in (list, tuple):
        return type(value)(_sealed(item, name, mode) for item in value)
    if type(value) is dict:
        return {key: _sealed(item, name, mode) for key, item in value.items()}
    return value


def undo(changes: Iterable[Change]) -> None:
    """Put back what was in the places where a trace left tensors behind."""
    for change in changes:
        key, holder = change.place[1], change.holder
        if key is not None and isinstance(holder, dict):
            if change.old is ABSENT:
                holder.pop(key, None)
            else:
                holder[key] = change.old


def _is_fake(value: object, mode: object) -> bool:
    return isinstance(value, Tensor) and getattr(value, "fake_mode", None) is mode


def _contains_fake(value: object, mode: object) -> bool:
    items = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else ()
    return _is_fake(value, mode) or any(_contains_fake(item, mode) for item in items)
