"""Ctrl-C between steps, never inside one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Generator


class Held:
    """Whether Ctrl-C was pressed inside the block."""

    pressed = False


@contextlib.contextmanager
def uninterrupted() -> Generator[Held]:
    """Hold back Ctrl-C until the block has ended; a second one is raised at once.

    A donating step overwrites the old state as it goes: interrupted half-way, it would leave neither.
    """
    held = Held()
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield held
        return

    def hold(number: int, frame: object) -> None:
        if held.pressed:
            raise KeyboardInterrupt
        held.pressed = True

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, before)
