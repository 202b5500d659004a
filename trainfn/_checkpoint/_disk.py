"""Every change of the file system, one small function each: nothing else here writes, renames or removes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from trainfn.errors import CheckpointError

CHUNK = 8 * 2**20  # bytes to a system call: few calls, and still in the cache when they are hashed

# Called before each system call that changes the disk. Tests crash or fail there.
hook: Callable[[str, Path], object] = lambda call, path: None  # noqa: E731


class Written(NamedTuple):
    """What a file must be when it is read again."""

    size: int
    sha256: str


def write(path: Path, pieces: Iterable[memoryview | bytes]) -> Written:
    """A new file with these bytes, flushed to the disk; hashed on the way."""
    # SHA-256 and not a CRC: `sha256sum` checks it, processors since 2019 have instructions for it (1.9 GB/s here, where
    # zlib's CRC-32 has 4.1 and BLAKE2b 1.3), and a copy gone wrong can't pass by chance.
    digest, size = hashlib.sha256(), 0
    hook("create", path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags, 0o666), "wb", buffering=0) as file:
        for piece in pieces:
            for part in _parts(memoryview(piece)):
                digest.update(part)
                size += len(part)
                while len(part) > 0:
                    hook("write", path)
                    part = part[file.write(part) :]
        hook("fsync", path)
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def _parts(data: memoryview) -> Iterable[memoryview]:
    return (data[i : i + CHUNK] for i in range(0, len(data), CHUNK))


def make_folders(path: Path) -> None:
    """The folder and those above it, where they don't exist."""
    if not path.is_dir():
        hook("mkdir", path)
        path.mkdir(parents=True, exist_ok=True)


def make_folder(path: Path) -> None:
    """A new folder in one that exists."""
    hook("mkdir", path)
    path.mkdir()


def flush_folder(path: Path) -> None:
    """Make what was created, renamed or removed in a folder last through a power cut."""
    if os.name == "nt":  # which has no way to say it
        return
    hook("fsync", path)
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def publish(new: Path, target: Path) -> None:
    """Give a finished folder its name. Whatever the moment of a crash, `located(target)` is the old or the new one."""
    old = replaced(target)
    if target.exists():
        if old.exists():  # of a save that was killed after its last rename
            discard(old)
        _rename(target, old)
    try:
        _rename(new, target)
    except OSError:
        if old.exists():
            _rename(old, target)
        raise
    flush_folder(target.parent)
    if old.exists():
        with contextlib.suppress(OSError):  # the next save tries again
            discard(old)


def replaced(target: Path) -> Path:
    """Where a folder goes while another takes its name."""
    return target.with_name(f".{target.name}.replaced")


def located(target: Path) -> Path:
    """``target``, or what it was before a save over it was killed between two renames."""
    return target if target.exists() or not replaced(target).exists() else replaced(target)


def remove(folder: Path) -> None:
    """Remove a folder; from the first moment on, none of it is left under its name."""
    doomed = folder.with_name(f".{folder.name.lstrip('.')}.removing-{os.getpid()}")
    if doomed.exists():
        discard(doomed)
    _rename(folder, doomed)
    flush_folder(folder.parent)
    discard(doomed)


def discard(folder: Path) -> None:
    """Delete a folder; links in it are deleted, not followed."""
    if folder.is_symlink():
        raise NotADirectoryError(f"{folder} is a link")
    with os.scandir(folder) as entries:
        for entry in entries:
            hook("unlink", Path(entry.path))
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
    hook("rmdir", folder)
    folder.rmdir()


def _open_lock(path: Path) -> int:
    """A file to hold a lock on: its number."""
    hook("create", path)
    return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _rename(old: Path, new: Path) -> None:
    hook("rename", new)
    old.rename(new)


# --- the lock -------------------------------------------------------------------------------------------------------


class Lock:
    """A lock on a folder, held until it is closed or this process ends, however it ends."""

    _number: int | None = None

    def __init__(self, folder: Path) -> None:
        self._number = _open_lock(folder / ".lock")
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
