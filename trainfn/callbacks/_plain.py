"""Plain functions in the role of a callback."""

from __future__ import annotations

from collections.abc import Callable

from trainfn._types import Callback, StepInfo, Stop


class _Plain(Callback):
    def __init__(self, function: Callable[[StepInfo], object]) -> None:
        self.function = function

    def __call__(self, info: StepInfo) -> Stop | None:
        answer = self.function(info)
        return answer if isinstance(answer, Stop) else None

    def __repr__(self) -> str:
        return repr(self.function)


def callback_of(given: Callable[[StepInfo], object]) -> Callback:
    """A user's function or object, in the role of a callback.

    Raises:
        TypeError: If it can't be called, or has a method of the role that would not be called on a plain function.

    >>> callback_of(lambda info: print(info.n))(StepInfo(3, None, {}, 0.0))
    3
    """
    if isinstance(given, Callback):
        return given
    name = getattr(given, "__name__", type(given).__name__)
    if not callable(given):
        raise TypeError(f"callbacks=[{given!r}]: it can't be called. Give a function of a `tfn.StepInfo`.")
    if isinstance(given, type):
        raise TypeError(
            f"callbacks=[{name}]: it is a class, and would be made anew after each step. Write `{name}(...)`."
        )
    for method in ("begin", "state_dict", "load_state_dict", "__enter__"):
        if hasattr(given, method):
            raise TypeError(
                f"callbacks=[{given!r}]: it has `{method}`, which is called on a `tfn.Callback` only. Write"
                f" `class {name}(tfn.Callback)`."
            )
    return _Plain(given)
