"""The process around a run: its signals, and the global generators of Python, NumPy and torch.

A step touches neither: its randomness is in the state. What surrounds it does: a donating step must not be interrupted
half-way, and a user's collator may draw from a global generator. This module is the only one that sets a signal's
handler, or saves and restores a generator's state.

::

    with tfn.process.uninterrupted() as ctrl_c, tfn.process.termination() as sigterm:
        for batch in batches:
            state, metrics = step(state, batch)
            if ctrl_c.arrived or sigterm.arrived:
                break
"""

from __future__ import annotations

import contextlib
import random
import signal
import threading
from collections.abc import Generator
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from trainfn._ranks._group import ALONE, Ranks


class Pending:
    """Whether a signal has arrived since its block began.

    Attributes:
        arrived: False until the signal comes, then True.

    >>> with termination() as sigterm:
    ...     signal.raise_signal(signal.SIGTERM)
    >>> sigterm.arrived
    True
    """

    arrived = False


@contextlib.contextmanager
def uninterrupted() -> Generator[Pending]:
    """Hold back Ctrl-C until the block has ended, or the block around it; a second one is raised at once.

    A donating step overwrites the old state as it computes the new one: an interrupt half-way would leave neither.
    Where Ctrl-C is ignored it stays ignored: a shell starts its background jobs so, and the key is meant for another
    process. Outside the main thread, which alone receives signals, the block changes nothing.

    >>> with uninterrupted() as ctrl_c:
    ...     signal.raise_signal(signal.SIGINT)
    >>> ctrl_c.arrived
    True
    """
    before = signal.getsignal(signal.SIGINT)
    outer = getattr(before, "pending", None)
    if outer is not None and threading.current_thread() is threading.main_thread():
        yield outer
        return
    pending = Pending()
    if before is signal.SIG_IGN:
        yield pending
        return

    def hold(number: int, frame: object) -> None:
        if pending.arrived:  # the user insists: better no state than a program that can't be ended
            raise KeyboardInterrupt
        pending.arrived = True

    hold.pending = pending  # type: ignore[attr-defined]
    with _handled(signal.SIGINT, hold):
        yield pending


@contextlib.contextmanager
def termination() -> Generator[Pending]:
    """Take note of SIGTERM instead of dying by it: a cluster sends it before it takes the machine away.

    >>> with termination() as sigterm:
    ...     sigterm.arrived
    False
    """
    pending = Pending()

    def note(number: int, frame: object) -> None:
        pending.arrived = True

    with _handled(signal.SIGTERM, note):
        yield pending


class Requests:
    """Ctrl-C and SIGTERM of a run, on one process or on any of several, answered between steps.

    Several processes must stop after the same step, or the others wait for one that has left. So their Ctrl-C is held
    back in the whole block, and after each step all of them hear what each was asked. One process holds nothing back
    here: `uninterrupted` does, inside a step.

    Args:
        ranks: The processes that run the step together.

    Attributes:
        interrupted: Whether Ctrl-C was pressed on any rank, as all ranks know.
        terminated: Whether SIGTERM came to any rank, as all ranks know.

    >>> with Requests() as requests, requests.termination():
    ...     signal.raise_signal(signal.SIGTERM)
    ...     requests.agree(False, True)
    [False, True]
    >>> requests.terminated
    True
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.interrupted = self.terminated = False
        self._sigterm = self._ctrl_c = Pending()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self.ranks.size > 1:
            self._ctrl_c = self._stack.enter_context(uninterrupted())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        # Ctrl-C may have come after the last step. All ranks leave without an error here, so all raise or none does.
        if error is None and not self.interrupted and self.ranks.any([self._ctrl_c.arrived])[0]:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def termination(self) -> Generator[None]:
        """Take note of SIGTERM in the block, whose code can save; without it, SIGTERM ends the process."""
        with termination() as self._sigterm:
            yield

    def agree(self, *others: bool) -> list[bool]:
        """Exchange what the ranks were asked to do, after a step.

        Returns:
            Whether each of ``others`` is set on any rank, in their order.
        """
        # One reduction of a few flags between hosts: 0.25 ms on one machine, and no device waits for it. It is made
        # after every step and not only before a save: SIGTERM leaves half a minute, and the next save may be an hour
        # away.
        interrupted = self.interrupted or self._ctrl_c.arrived
        self.interrupted, self.terminated, *found = self.ranks.any([interrupted, self._sigterm.arrived, *others])
        return found


@contextlib.contextmanager
def _handled(number: signal.Signals, handler: signal._HANDLER) -> Generator[None]:
    # Only the main thread may set a handler. One that was set from C reads as None and could not be put back.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) is None:
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


# --- generators ---------------------------------------------------------------------------------------------------


class Generators(NamedTuple):
    """The states of the global generators of Python, NumPy and torch (on the CPU).

    Attributes:
        python: The state of `random`.
        numpy: The state of `numpy.random`.
        torch: The state of `torch.default_generator`.

    >>> saved = Generators.now()
    >>> first = torch.rand(())
    >>> saved.restore()
    >>> bool(torch.rand(()) == first)
    True
    """

    python: Any
    numpy: Any
    torch: Tensor

    @staticmethod
    def now() -> Generators:
        """The states at this moment."""
        return Generators(random.getstate(), np.random.get_state(), torch.default_generator.get_state())

    def restore(self) -> None:
        """Put these states back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.default_generator.set_state(self.torch)


@contextlib.contextmanager
def generators_kept(device: torch.device | None = None) -> Generator[None]:
    """Restore the global generators after a block, whatever it draws or seeds.

    Args:
        device: An accelerator whose generator is restored too.

    >>> before = Generators.now()
    >>> with generators_kept():
    ...     _ = torch.manual_seed(0)
    >>> bool((Generators.now().torch == before.torch).all())
    True
    """
    of_device: Any = None if device is None or device.type == "cpu" else torch.get_device_module(device)
    kept, held = Generators.now(), of_device and of_device.get_rng_state(device)
    try:
        yield
    finally:
        kept.restore()
        if of_device is not None:
            of_device.set_rng_state(held, device)
