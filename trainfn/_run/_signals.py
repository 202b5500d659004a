"""Signals between steps, never inside one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Generator
from types import TracebackType
from typing import Self

from trainfn._ranks._group import ALONE, Ranks


class Held:
    """Whether the signal came inside the block."""

    pressed = False


class Requests(contextlib.ExitStack):
    """What a run was asked to do after the step at hand, by signals: on one process, or on any of several.

    Several processes must save and stop after the same step, or the others would wait for one that has gone. So after
    each step they tell each other: the largest of five numbers each, between hosts, which takes 0.25 ms on one machine
    and no device waits for. Not only when a save is due: who gets SIGTERM has half a minute, and a save may be due in
    an hour. Until then Ctrl-C is held back, also between steps; a second one is raised at once.

    Args:
        ranks: The processes that run the step together.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self.ranks = ranks
        self.interrupted = self.terminated = False
        self._between = Held()
        self.end = Held()  # SIGTERM; taken note of by who can save

    def __enter__(self) -> Self:
        """Take note of Ctrl-C, where there are several processes."""
        super().__enter__()
        if self.ranks.size > 1:
            self._between = self.enter_context(uninterrupted())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raise a Ctrl-C that came after the last step."""
        super().__exit__(kind, error, trace)
        if error is None and self._between.pressed and not self.interrupted:
            raise KeyboardInterrupt

    def agree(self, *others: bool) -> list[bool]:
        """After a step: hear from all ranks what is asked; of each of the others, whether any rank says so."""
        interrupted = self.interrupted or self._between.pressed
        self.interrupted, self.terminated, *found = self.ranks.any([interrupted, self.end.pressed, *others])
        return found


@contextlib.contextmanager
def uninterrupted() -> Generator[Held]:
    """Hold back Ctrl-C until the block has ended, or the one around it; a second one is raised at once.

    A donating step overwrites the old state as it goes: interrupted half-way, it would leave neither. Where Ctrl-C is
    ignored it stays so: a shell starts its background jobs like this, and the key is meant for another process.
    """
    before = signal.getsignal(signal.SIGINT)
    outer = getattr(before, "held", None)
    if outer is not None and threading.current_thread() is threading.main_thread():
        yield outer
        return
    held = Held()
    if before is signal.SIG_IGN:
        yield held
        return

    def hold(number: int, frame: object) -> None:
        if held.pressed:
            raise KeyboardInterrupt
        held.pressed = True

    hold.held = held  # type: ignore[attr-defined]
    with handled(signal.SIGINT, hold):
        yield held


@contextlib.contextmanager
def termination() -> Generator[Held]:
    """Only take note of SIGTERM, by which a cluster says that the machine is about to go."""
    held = Held()

    def note(number: int, frame: object) -> None:
        held.pressed = True

    with handled(signal.SIGTERM, note):
        yield held


@contextlib.contextmanager
def handled(number: signal.Signals, handler: signal._HANDLER) -> Generator[None]:
    """Have a signal handled for a block, by the thread that receives signals.

    A handler that Python has not set stays, for it could not be put back.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) is None:
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
