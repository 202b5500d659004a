"""The keyed mode around a step: on while it is needed, off where nothing is drawn.

Under the mode every function of torch takes a microsecond or more longer. A loss that drew nothing under the mode runs
without it from then on. Should it draw after all, torch's generators have moved: they are put back, and the loss, which
is pure, runs again under the mode.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Callable, Generator
from typing import TypeVar

import torch
from torch import Tensor

from trainfn import random
from trainfn._keyed import _elsewhere, _generators
from trainfn._keyed._draws import Draws, rerouted
from trainfn._keyed._rows import Doubts
from trainfn._keyed._vmap import functorch
from trainfn._types import TrainState

T = TypeVar("T")

# Every so many runs without the mode there is one with it. It finds what torch's generators don't show: `generator=`.
_AGAIN = 64


# The losses that have run in a step that several losses make up, in their order; None outside of such a step.
_PHASES: contextvars.ContextVar[list[Randomness] | None] = contextvars.ContextVar("phases", default=None)


@contextlib.contextmanager
def phases(*, apart: bool = True) -> Generator[None]:
    """Give each loss that runs in the block draws of its own; not ``apart``, those that it has alone."""
    token = _PHASES.set([] if apart else None)
    try:
        yield
    finally:
        _PHASES.reset(token)


class Randomness:
    """Runs one function of states, keyed by ``fold_in(state.key, state.step)``.

    In a block of `phases` the index of the function is folded in too, from the second one on.

    >>> import torch, trainfn as tfn
    >>> state = tfn.init({"w": torch.ones(1)}, tfn.optim.sgd(0.1))
    >>> run = Randomness()
    >>> run(state, lambda: torch.rand(3)).equal(run(state, lambda: torch.rand(3)))
    True
    """

    def __init__(self) -> None:
        # How often it ran since it drew last, by the type of the state, which stands for the module.
        self._quiet: weakref.WeakKeyDictionary[type, int] = weakref.WeakKeyDictionary()
        self._doubts: weakref.WeakKeyDictionary[type, Doubts] = weakref.WeakKeyDictionary()
        self._elsewhere: weakref.WeakSet[type] = weakref.WeakSet()  # those with draws of NumPy or Python

    def __call__(self, state: TrainState, body: Callable[[], T], *, rows: int = 0, first_row: Tensor | int = 0) -> T:
        """Run ``body``, perhaps twice: it must not change what it finds.

        Args:
            state: What draws nothing for one is expected to draw nothing for others of its type.
            body: A function of nothing.
            rows: See `keyed`.
            first_row: See `keyed`.

        Raises:
            RandomnessError: If it draws in a way that can't be rerouted; or, in a captured step, from NumPy's or
                Python's generator.
        """
        if type(state) in self._elsewhere and _elsewhere.can_be_keyed(state.key):
            key = random.fold_in(self._key(state), first_row)
            with _elsewhere.keyed(key):
                return self._run(state, body, rows, first_row)
        first = _elsewhere.positions()
        out = self._run(state, body, rows, first_row)
        if not _elsewhere.moved(first):
            return out
        del out
        with _elsewhere.kept():
            before = _elsewhere.positions()  # once more: it may have been another thread
            out = self._run(state, body, rows, first_row)
            moved = _elsewhere.moved(before)
        if not moved:
            return out
        if not _elsewhere.can_be_keyed(state.key):
            _elsewhere.refuse(moved)
        del out
        _elsewhere.restore(first)
        self._elsewhere.add(type(state))
        return self(state, body, rows=rows, first_row=first_row)

    def _run(self, state: TrainState, body: Callable[[], T], rows: int, first_row: Tensor | int) -> T:
        runs = self._quiet.get(type(state), 0)
        if runs % _AGAIN and _shows_draws(state.step):
            out, drew = _without_mode(body)
            if not drew:
                self._quiet[type(state)] = runs + 1
                return out
            del out
        doubts = self._doubts.get(type(state))
        if doubts is None:
            doubts = self._doubts[type(state)] = Doubts()
        draws = Draws(self._key(state), rows, first_row, doubts, state.module)
        with rerouted(draws):
            out = body()
        self._quiet[type(state)] = 0 if draws.drew else runs + 1
        return out

    def _key(self, state: TrainState) -> Tensor:
        key, known = random.fold_in(state.key, state.step), _PHASES.get()
        if known is None:
            return key
        index = next((i for i, phase in enumerate(known) if phase is self), len(known))
        if index == len(known):
            known.append(self)
        return random.fold_in(key, index) if index else key


def _without_mode(body: Callable[[], T]) -> tuple[T, bool]:
    """Run ``body``; return its result, and whether it drew from torch's generators. If so, they are put back."""
    before = _generators.found()
    drew = True
    try:
        out = body()
        drew = _generators.moved(before)
    finally:
        if drew:
            _generators.restore(before)
    return out, drew


def _shows_draws(like: Tensor) -> bool:
    """Whether a draw would move a generator that we can see: not on other devices, nor where torch only traces."""
    return (
        like.device.type in ("cpu", "cuda")
        and torch._C._len_torch_dispatch_stack() == 0
        and functorch.peek_interpreter_stack() is None
        and not (like.is_cuda and torch.cuda.is_current_stream_capturing())
    )
