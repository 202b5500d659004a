"""Signals between steps, never inside one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Generator


class Held:
    """Whether the signal came inside the block."""

    pressed = False


@contextlib.contextmanager
def uninterrupted() -> Generator[Held]:
    """Hold back Ctrl-C until the block has ended; a second one is raised at once.

    A donating step overwrites the old state as it goes: interrupted half-way, it would leave neither.
    """
    held = Held()

    def hold(number: int, frame: object) -> None:
        if held.pressed:
            raise KeyboardInterrupt
        held.pressed = True

    with _handled(signal.SIGINT, hold):
        yield held


@contextlib.contextmanager
def termination() -> Generator[Held]:
    """Only take note of SIGTERM, by which a cluster says that the machine is about to go."""
    held = Held()

    def note(number: int, frame: object) -> None:
        held.pressed = True

    with _handled(signal.SIGTERM, note):
        yield held


@contextlib.contextmanager
def _handled(number: signal.Signals, handler: signal._HANDLER) -> Generator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
