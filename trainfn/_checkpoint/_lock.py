"""One run in a folder at a time."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from trainfn._checkpoint import _disk
from trainfn.errors import CheckpointError


class Lock:
    """A lock on a folder, held until it is closed or this process ends, however it ends."""

    _number: int | None = None

    def __init__(self, folder: Path) -> None:
        self._number = _disk.open_lock(folder / ".lock")
        try:
            _lock(self._number)
        except BlockingIOError:
            holder = os.read(self._number, 100).decode(errors="replace")
            self.close()
            raise CheckpointError(
                f"{str(folder)!r}: another run saves its checkpoints here (process {holder or '?'}). Two would remove"
                " each other's: give this one a folder of its own, or end the other."
            ) from None
        os.ftruncate(self._number, 0)
        os.write(self._number, str(os.getpid()).encode())
        # A forked child, such as a data loader's worker, has the file open as well: it would hold the lock on when this
        # process is killed, and the next run would find it taken.
        this = weakref.ref(self)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=lambda: (lock := this()) and lock.close())

    @property
    def held(self) -> bool:
        """By this process."""
        return self._number is not None

    def close(self) -> None:
        """Let the folder go."""
        number, self._number = self._number, None
        if number is not None:
            os.close(number)

    def __del__(self) -> None:
        self.close()


def _lock(number: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: no lock
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a network file system without locks
        return
