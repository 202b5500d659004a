"""The first steps run eagerly while a second process compiles; which ones is said beforehand.

What runs depends on ``state.step`` alone, not on how long compiling takes: a run that is repeated, or resumed, has the
same bits.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

from trainfn._compile._ahead import Helper
from trainfn._compile._program import Program
from trainfn._dtensor import held
from trainfn._types import TrainState

EAGER_STEPS = 100  # of ``warm="eager"``


def check_warm(warm: object, backend: object, dynamic: object) -> None:
    """Raise if ``warm`` does not say how many steps are eager, or if a second process can't compile for this one."""
    if warm is None:
        return
    if warm != "eager" and (not isinstance(warm, int) or isinstance(warm, bool) or warm < 1):
        raise ValueError(
            f"jit(step, warm={warm!r}): say how many steps run eagerly while a second process compiles, as in"
            f' `warm=200`; `warm="eager"` is {EAGER_STEPS}.'
        )
    if backend != "inductor":
        raise ValueError(
            f"jit(step, warm={warm!r}, backend={backend!r}): a second process leaves its work in the caches of torch's"
            ' "inductor", and other backends have none. Leave out `warm=` or `backend=`.'
        )
    if dynamic:
        raise ValueError(
            f"jit(step, warm={warm!r}, dynamic={dynamic!r}): torch's caches do not find a graph of symbolic sizes again"
            " in another process. Leave out `warm=`; or pad to exact sizes, `buckets=tfn.Buckets(...)`."
        )


class Warm:
    """A step that is eager until ``state.step`` reaches a number, and compiled from then on.

    Args:
        run: The compiled step.
        early: The same step, eagerly; its programs are captured and given to their `helper` at the first call.
        programs: The programs of both.
        warm: The number of the first step that is compiled, or "eager".
    """

    def __init__(
        self,
        run: Callable[[Any, Any], Any],
        early: Callable[[Any, Any], Any],
        programs: Sequence[Program],
        warm: int | Literal["eager"],
    ) -> None:
        self.run, self.early, self.programs = run, early, programs
        self.until = EAGER_STEPS if warm == "eager" else warm
        self._helps = False
        self._passed: Callable[[], Any] = lambda: None

    def __call__(self, state: Any, *rest: Any) -> Any:
        """Run the step."""
        if self._is_early(state):
            if not self._helps:
                self._start()
            return self.early(state, *rest)
        if self._helps:
            self._stop()
        out = self.run(state, *rest)
        if isinstance(out, tuple) and out and isinstance(out[0], TrainState):
            self._passed = weakref.ref(out[0].step)
        return out

    def _is_early(self, state: Any) -> bool:
        """Whether the state's count is below the number. It is read once, where each state comes from the last one."""
        if not isinstance(state, TrainState):
            raise TypeError(
                f"jit(step, warm={self.until}) goes by `state.step`, and this state is a {type(state).__name__}. Make"
                " one with `tfn.init`, or leave out `warm=`."
            )
        if state.step is self._passed():
            return False
        if int(held(state.step)) < self.until:
            return True
        self._passed = weakref.ref(state.step)
        return False

    def _start(self) -> None:
        self._helps = True
        try:
            helper = Helper()
        except (OSError, TypeError) as error:  # `sys.executable` may be None
            warnings.warn(
                f"jit(step, warm={self.until}): a second process could not be started: {error}. This one compiles the"
                " step, after the eager ones. If it happens in each run, leave out `warm=`.",
                stacklevel=4,
            )
            return
        for program in self.programs:
            program.helper = helper

    def _stop(self) -> None:
        self._helps = False
        for program in self.programs:
            if program.helper is not None:
                program.helper.last()
                program.helper = None
