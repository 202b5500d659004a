"""Write a checkpoint to the disk: all of it, or nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from trainfn._checkpoint import _disk
from trainfn._checkpoint._contents import Contents
from trainfn._checkpoint._disk import Written
from trainfn._checkpoint._format import LIMIT, MANIFEST, Leaf, Manifest, header, manifest_bytes
from trainfn._checkpoint._pieces import bytes_of
from trainfn._checkpoint._snapshot import Gathered
from trainfn._ranks._group import ALONE, Ranks
from trainfn.errors import CheckpointError


def write(target: Path, contents: Contents, ranks: Ranks = ALONE, prepare: Callable[[], object] = lambda: None) -> None:
    """Write a checkpoint to ``target``, in place of one that may be there; all ranks write their files together.

    Rank 0 calls ``prepare()`` and makes the folder. When all ranks have written, it writes the manifest and publishes
    the folder.

    Raises:
        CheckpointError: On all ranks, if any of them can't write; ``target`` is then as it was before.
    """
    beside = target.with_name(f".{target.name}.writing-{os.getpid()}")

    def begin() -> str:
        with _explaining(target, contents):
            prepare()
            if contents.adopt != target:
                _check_replaceable(target)
            if beside.exists():
                _disk.discard(beside)
            if contents.adopt is None:
                _disk.make_folder(beside)
            else:
                _disk.adopt(contents.adopt, beside, [MANIFEST, *contents.texts, *contents.manifest.by_file()])
        return beside.name

    def fill() -> dict[str, Written]:
        with _explaining(target, contents):
            return _fill(target.with_name(name), contents, ranks)

    def finish() -> None:
        with _explaining(target, contents):
            for files in of_each[1:]:
                _check_visible(beside, files)
            # The manifest comes last, for it makes a folder a checkpoint. The folder is flushed before it is renamed.
            _seal(beside, contents.manifest._replace(files={n: w for files in of_each for n, w in files.items()}))
            _disk.flush_folder(beside)
            _disk.publish(beside, target)

    try:
        # Each line ends on all ranks before the next begins on any, and an error of one rank ends it on all.
        name = ranks.first(begin)
        of_each = ranks.everyone(fill)
        ranks.first(finish)
    finally:
        with contextlib.suppress(OSError):
            if ranks.rank == 0 and beside.exists():
                _disk.discard(beside)


@contextlib.contextmanager
def _explaining(target: Path, contents: Contents) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(explained(error, target, contents.nbytes)) from error


def _check_replaceable(target: Path) -> None:
    """Raise if ``target`` exists and is not a checkpoint, complete or not."""
    if not os.path.lexists(target) or (not target.is_symlink() and (target / MANIFEST).exists()):
        return
    ours = target.is_dir() and all(path.suffix in (".safetensors", ".json") for path in target.iterdir())
    if target.is_symlink() or not ours:
        raise CheckpointError(
            f"{str(target)!r} exists and is not a checkpoint (a folder with a {MANIFEST}), so it is not replaced. Give"
            " a folder that does not exist yet, such as one below it."
        )


def _fill(folder: Path, contents: Contents, ranks: Ranks) -> dict[str, Written]:
    """Write this rank's files."""
    if ranks.rank > 0 and contents.mine and not folder.is_dir():
        raise CheckpointError(_not_shared(folder, f"which rank 0 made, is not seen by rank {ranks.rank}"))
    by_file = contents.manifest.by_file()
    values = contents.leaves
    if contents.full:
        values = Gathered(values, [name for leaves in by_file.values() for name in leaves])
    try:
        files: dict[str, Written] = {}
        if ranks.rank == 0:
            files = _beside(folder, contents.texts)
        for name in contents.mine:
            files[name] = _disk.write(folder / name, _file(by_file[name], values))
        if ranks.rank > 0 and contents.mine:
            _disk.flush_folder(folder)
        return files
    finally:
        # After an error of this rank's disk too: each gather is a collective, which the other ranks would wait in.
        if isinstance(values, Gathered):
            values.drain()


def _beside(folder: Path, texts: Mapping[str, bytes]) -> dict[str, Written]:
    """Write the files that hold no leaf, and the folders that they are in."""
    inner = sorted({(folder / name).parent for name in texts} - {folder})
    for path in inner:
        _disk.make_folders(path)
    files = {name: _disk.write(folder / name, [text]) for name, text in texts.items()}
    for path in inner:
        _disk.flush_folder(path)
    return files


def _check_visible(folder: Path, files: dict[str, Written]) -> None:
    for name, written in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != written.size:
            raise CheckpointError(_not_shared(path, "which another rank wrote, is not seen by rank 0"))


def _not_shared(path: Path, why: str) -> str:
    return (
        f"{str(path)!r}, {why}. The ranks write one checkpoint together: give all of them the same folder, on a disk"
        " that they share."
    )


def _seal(folder: Path, manifest: Manifest) -> None:
    data = manifest_bytes(manifest)
    if len(data) > LIMIT:
        raise ValueError(
            f"save to {folder.parent}: the manifest has {len(data):,} bytes, and at most {LIMIT:,} are read. Put less"
            " into `extra`; save a state in very many pieces with `full=True`."
        )
    _disk.write(folder / MANIFEST, [data])


def _file(leaves: dict[str, Leaf], values: Mapping[str, Tensor]) -> Iterator[memoryview | bytes]:
    yield header(leaves)
    for name in leaves:
        yield bytes_of(values[name].detach().cpu().contiguous().resolve_conj().resolve_neg())


# --- what an earlier crash left -----------------------------------------------------------------------------------

_LEFT = re.compile(r"\.(?P<name>.+)\.(writing|removing)-(?P<pid>[0-9]+)")


def sweep(folder: Path, name: str) -> None:
    """Remove what dead processes left unfinished of the folders whose name matches the pattern ``name``."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            left = _LEFT.fullmatch(path.name)
            if left and re.fullmatch(name, left["name"]) and not _alive(int(left["pid"])) and not path.is_symlink():
                _disk.discard(path)


def _alive(pid: int) -> bool:
    """Whether another process has this number. This one's own leftovers are not in use: it writes one at a time."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


# --- errors -------------------------------------------------------------------------------------------------------


def explained(error: OSError, target: Path, needed: int) -> str:
    """The message of an error of the file system: what failed, and how to go on."""
    folder = target.parent
    intact = "The training state in memory is intact, and so are the earlier checkpoints."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            free = f"{shutil.disk_usage(folder).free:,} free"
        except OSError:
            free = "less free"
        why = f"the disk is full: {needed:,} bytes needed, {free}. Make room, save elsewhere, or keep fewer (`keep=`)"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        why = f"the folder can't be written to ({error.strerror}). Change its permissions, or save elsewhere"
    elif error.errno in (errno.ENOENT, errno.ENOTDIR) and not folder.is_dir():
        why = f"its folder {str(folder)!r} has vanished. Bring it back, or save elsewhere"
        intact = "The training state in memory is intact."
    else:
        why = f"{error.strerror or error}"
    return f"the checkpoint {str(target)!r} could not be written: {why}. {intact}"
