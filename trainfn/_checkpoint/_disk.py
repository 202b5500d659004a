"""Every change of the file system, one small function each; no other file of this folder writes, renames or removes.

A crash at any moment must leave a complete checkpoint. Three orders make sure of it:

1. Each file is flushed before its folder, and the folder before it is renamed. Otherwise a power cut could keep the
   name and lose the bytes.
2. The old folder is renamed away before the new one takes its name, for no system call swaps two folders everywhere.
   Between the two renames `located` finds the old one.
3. A folder is renamed before it is deleted, so that no half of it ever has the name of a checkpoint.
"""

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
    """The size and the checksum that a file must have when it is read again."""

    size: int
    sha256: str


def write(path: Path, pieces: Iterable[memoryview | bytes]) -> Written:
    """Write a new file with these bytes, hash them on the way, and flush it to the disk."""
    # SHA-256 and not a CRC: `sha256sum` checks it, a damaged copy can't pass by chance, and processors since 2019 have
    # instructions for it (1.9 GB/s; zlib's CRC-32 has 4.1, BLAKE2b 1.3).
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
        os.fsync(file.fileno())  # before the folder is published: a name must never outlive the bytes
    return Written(size, digest.hexdigest())


def _parts(data: memoryview) -> Iterable[memoryview]:
    return (data[i : i + CHUNK] for i in range(0, len(data), CHUNK))


def make_folders(path: Path) -> None:
    """Make a folder and those above it, where they don't exist."""
    if not path.is_dir():
        hook("mkdir", path)
        path.mkdir(parents=True, exist_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder in one that exists."""
    hook("mkdir", path)
    path.mkdir()


def adopt(written: Path, path: Path, names: Iterable[str]) -> None:
    """Rename a folder that other code has written, and flush its files; those of these names give way to a save's."""
    _rename(written, path)
    for name in names:
        (path / name).unlink(missing_ok=True)
    for file in path.rglob("*"):
        if file.is_symlink():
            continue
        if file.is_dir():
            flush_folder(file)
        else:
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())


def flush_folder(path: Path) -> None:
    """Make what was created, renamed or removed in a folder survive a power cut."""
    if os.name == "nt":  # Windows can't flush a folder
        return
    hook("fsync", path)
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def publish(new: Path, target: Path) -> None:
    """Give a finished folder its name. After a crash at any moment `located(target)` is the old folder or the new."""
    old = replaced(target)
    if target.exists():
        if old.exists():  # left by a save that was killed after its second rename
            discard(old)
        _rename(target, old)
    try:
        _rename(new, target)
    except OSError:
        if old.exists():
            _rename(old, target)
        raise
    flush_folder(target.parent)  # before the old one is deleted: until then a power cut may undo the renames
    if old.exists():
        with contextlib.suppress(OSError):  # the next save tries again
            discard(old)


def replaced(target: Path) -> Path:
    """The name of a folder while another takes its place."""
    return target.with_name(f".{target.name}.replaced")


def located(target: Path) -> Path:
    """``target``, or the folder that it replaces, if a save was killed between the two renames."""
    return target if target.exists() or not replaced(target).exists() else replaced(target)


def remove(folder: Path) -> None:
    """Remove a folder; it loses its name first, so that no part of it is taken for a checkpoint."""
    doomed = folder.with_name(f".{folder.name.lstrip('.')}.removing-{os.getpid()}")
    if doomed.exists():
        discard(doomed)
    _rename(folder, doomed)
    flush_folder(folder.parent)  # or a power cut could restore the name of a folder that is half deleted
    discard(doomed)


def discard(folder: Path) -> None:
    """Delete a folder; symbolic links in it are deleted, not followed."""
    if folder.is_symlink():
        raise NotADirectoryError(f"{folder} is a symbolic link")
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
    """Open the file that carries the lock, and return its descriptor."""
    hook("create", path)
    return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _rename(old: Path, new: Path) -> None:
    hook("rename", new)
    old.rename(new)


# --- the lock -------------------------------------------------------------------------------------------------------


class Lock:
    """A lock on a folder, so that one run at a time saves there: two would remove each other's checkpoints.

    It is a lock of the operating system (flock) and not a file that exists. The system releases it whenever the
    process ends, so a killed run leaves no lock behind, but only its file. `close` removes the file.
    """

    _number: int | None = None

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._number = _open_lock(self._path)
        try:
            _lock(self._number)
            while not _is_open(self._path, self._number):  # the run before removed it between the two lines above
                os.close(self._number)
                self._number = _open_lock(self._path)
                _lock(self._number)
        except BlockingIOError:
            holder = os.read(self._number, 100).decode(errors="replace")
            self._leave()
            raise CheckpointError(
                f"{str(folder)!r}: another run saves its checkpoints here (process {holder or '?'}). Two runs would"
                " remove each other's checkpoints: give this one a folder of its own, or end the other."
            ) from None
        os.ftruncate(self._number, 0)
        os.write(self._number, str(os.getpid()).encode())
        # A forked child, such as a data loader's worker, inherits the descriptor, and with it the lock. It closes it at
        # once: otherwise an orphaned worker of a killed run would still hold the lock.
        this = weakref.ref(self)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=lambda: (lock := this()) and lock._leave())

    @property
    def held(self) -> bool:
        """Whether this process holds the lock."""
        return self._number is not None

    def close(self) -> None:
        """Release the folder, and remove the file."""
        if self._number is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()  # before the release: afterwards it may be the lock of the next run
        self._leave()

    def _leave(self) -> None:
        number, self._number = self._number, None
        if number is not None:
            os.close(number)

    def __del__(self) -> None:
        self.close()


def _is_open(path: Path, number: int) -> bool:
    """Whether a path still is the file that is open under a number."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(number))
    except FileNotFoundError:
        return False


def _lock(number: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has no flock: there is no lock
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # some network file systems have no locks: to save without one is better than not to save
        return
