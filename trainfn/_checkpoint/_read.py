"""Read a checkpoint. Every byte is checked before it is used, and none of it is run.

A file is read once: its bytes are hashed as they go into the tensors, and the tensors are returned when the checksum is
right. Memory is taken only for leaves that have the shape of the state to fill.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from trainfn._checkpoint import _disk, _leaves
from trainfn._checkpoint._format import DTYPES, LIMIT, MANIFEST, MODEL, Leaf, Manifest, Piece, header, parsed_manifest
from trainfn._checkpoint._pieces import box_of, bytes_of, local
from trainfn._dtensor import spread_like
from trainfn._ranks._group import ALONE, Ranks
from trainfn._types import TrainState
from trainfn.errors import CheckpointError


class _Damage(Exception):
    """One file is damaged; the text says how."""


def inspect(folder: Path) -> Manifest:
    """The manifest of a checkpoint, once every file is found in its size.

    Raises:
        CheckpointError: If there is no checkpoint, or a file of it is damaged, with its name.
    """
    name = MANIFEST
    try:
        if not folder.is_dir() or not os.path.lexists(folder / MANIFEST):
            raise CheckpointError(
                f"{str(folder)!r}: no checkpoint there (no {MANIFEST}, which is written last). `tfn.save` writes one."
            )
        with _opened(folder, name) as file:
            data = file.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise _Damage(f"it has more than the {LIMIT:,} bytes that are read")
        manifest = parsed_manifest(data)
        for name, written in manifest.files.items():
            with _opened(folder, name) as file:
                size = os.fstat(file.fileno()).st_size
            if size != written.size:
                raise _Damage(f"it has {size:,} bytes, and {written.size:,} were written")
        return manifest
    except (OSError, ValueError, _Damage) as error:
        raise _damaged(folder, name, error) from error


def verify(folder: Path, manifest: Manifest | None = None, ranks: Ranks = ALONE) -> Manifest:
    """Like `inspect`, with every checksum; given a ``manifest``, with this rank's share of the checksums.

    Raises:
        CheckpointError: The same.
    """
    manifest = inspect(folder) if manifest is None else manifest
    _read(folder, manifest, list(manifest.files)[ranks.rank :: ranks.size], {})
    return manifest


def filled(
    folder: Path, manifest: Manifest, like: TrainState, expected: dict[str, Tensor], sources: dict[str, str]
) -> TrainState:
    """``like`` with the leaves named in ``sources`` read from the checkpoint, and copies of the others."""
    values: dict[str, Any] = read_leaves(folder, manifest, {old: expected[new] for new, old in sources.items()})
    found = {new: values[old] for new, old in sources.items()}
    _check_quantized(folder, like, expected, found)
    kept = {name: leaf.detach().clone() for name, leaf in expected.items() if name not in found}
    return _leaves.refilled(like, {**kept, **found})


def _check_quantized(folder: Path, like: TrainState, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raise if quantized weights change: their scales are attributes of the Parameters, which no checkpoint has."""
    for site in like.sites:
        held, name = site.owner._parameters.get(site.attribute), MODEL + site.name
        if held is None or type(held) is nn.Parameter or held.is_floating_point() or held.is_complex():
            continue
        if name in found and not torch.equal(found[name], expected[name]):
            raise CheckpointError(
                f"{str(folder)!r}: the checkpoint was made with another base model. {site.name!r} is a quantized weight"
                f" ({type(held).__name__}) with scales of its own, which the checkpoint does not have, and its numbers"
                " differ. Load the base model that was trained; or keep this one: `restore(path, like=state,"
                " only=...)` with the names of the adapters."
            )


def read_leaves(folder: Path, manifest: Manifest, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of the leaves in ``wanted``, each on the device and in the memory format of its tensor there.

    A file without any of these leaves is not read. Any other is read to its end, for a file has one checksum.

    Args:
        folder: The checkpoint's.
        manifest: The checkpoint's.
        wanted: By name, a tensor of the leaf's shape and dtype, or a `DTensor` of which this rank's part is filled.

    Raises:
        CheckpointError: If a file is not what was written.
    """
    goals = {name: Goal(manifest.tree[name], like) for name, like in wanted.items()}
    needed = {part.file for goal in goals.values() for part in goal.parts}
    idle = {part.file for leaf in manifest.tree.values() for part in leaf.parts} - needed
    _read(folder, manifest, [name for name in manifest.files if name not in idle], goals)
    return {name: goal.value for name, goal in goals.items()}


def _read(folder: Path, manifest: Manifest, names: list[str], goals: Mapping[str, Goal]) -> None:
    by_file = manifest.by_file()

    def one(name: str) -> None:
        try:
            with _opened(folder, name) as file:
                hashed = _Hashed(file)
                _fill(hashed, by_file.get(name, {}), name, goals)
                hashed.end(manifest.files[name])
        except (OSError, _Damage) as error:
            raise _damaged(folder, name, error) from error

    # Four threads, because SHA-256 takes longer than the disk does; both release Python's lock.
    with ThreadPoolExecutor(max_workers=4) as pool:
        for _ in pool.map(one, names):
            pass


def _fill(file: _Hashed, leaves: Mapping[str, Leaf], name: str, goals: Mapping[str, Goal]) -> None:
    """Read the wanted leaves of one file, and skip the others."""
    if leaves:
        expected = header(leaves)
        if file.take(len(expected)) != expected:
            raise _Damage("its header is not the one that follows from the manifest")
    for leaf_name, leaf in leaves.items():
        goal = goals.get(leaf_name)
        part = next((part for part in goal.parts if part.file == name), None) if goal is not None else None
        if goal is None or part is None:
            file.skip(leaf.nbytes)
        else:
            goal.read(part, file.fill)


# --- a leaf that is filled, and a file that is hashed -------------------------------------------------------------


class Goal:
    """A leaf of a state, or this rank's part of it, that is filled from the pieces of a checkpoint.

    Args:
        leaf: Its entry in the checkpoint's manifest.
        like: A tensor of the same shape and dtype, on the device and in the layout of the result.
    """

    def __init__(self, leaf: Leaf, like: Tensor) -> None:
        self._like, self._dtype = like, DTYPES[leaf.dtype]
        self._box = box_of(like)
        self.parts = [part for part in leaf.parts if part.box == self._box or part.box.overlap(self._box)]
        self._direct = [part.box for part in self.parts] == [self._box]
        # Threads read the parts, each into a place of its own, so no lock is needed.
        self._value = torch.empty(() if self._direct else self._box.shape, dtype=self._dtype, device="cpu")

    def read(self, part: Piece, fill: Callable[[memoryview], None]) -> None:
        """Read one part from a file, and keep what overlaps with this rank's box."""
        value = torch.empty(part.shape, dtype=self._dtype, device="cpu")
        fill(bytes_of(value))
        if self._direct:
            self._value = self._placed(value)  # to the device now, so that host memory holds few leaves at a time
            return
        common = part.box.overlap(self._box)
        assert common is not None
        self._value[common.within(self._box)] = value[common.within(part.box)]

    @property
    def value(self) -> Tensor:
        """The leaf, valid once all of its parts are read and their files' checksums were right."""
        value = self._value if self._direct else self._placed(self._value)
        return spread_like(value, self._like)

    def _placed(self, value: Tensor) -> Tensor:
        like = local(self._like)
        place = torch.empty_like(like, device="meta")  # of `like` only its order of dimensions is kept, not its gaps
        if like.device.type == "cpu" and place.stride() == value.stride():
            return value
        return torch.empty_like(like).copy_(value)


class _Hashed:
    """A file, read from its beginning to its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._scratch = file, hashlib.sha256(), memoryview(b"")

    def fill(self, place: memoryview) -> None:
        for i in range(0, len(place), _disk.CHUNK):
            part = place[i : i + _disk.CHUNK]
            while len(part):
                count = self._file.readinto(part)  # type: ignore[attr-defined]
                if not count:
                    raise _Damage("it ends too early")
                self._digest.update(part[:count])
                part = part[count:]

    def take(self, size: int) -> bytes:
        place = bytearray(size)
        self.fill(memoryview(place))
        return bytes(place)

    def skip(self, size: int) -> None:
        self._scratch = self._scratch or memoryview(bytearray(_disk.CHUNK))
        for i in range(0, size, _disk.CHUNK):
            self.fill(self._scratch[: min(_disk.CHUNK, size - i)])

    def end(self, written: _disk.Written) -> None:
        """Read the rest of the file, which is all of a file without leaves, and compare the checksum."""
        while data := self._file.read(_disk.CHUNK):
            self._digest.update(data)
        if self._digest.hexdigest() != written.sha256:
            raise _Damage("checksum mismatch: its bytes are not those that were written (SHA-256)")


def _opened(folder: Path, name: str) -> BinaryIO:
    """Open a regular file for reading; a symbolic link could lead anywhere, and a pipe would never end."""
    path = folder / name
    if stat.S_ISLNK(os.lstat(path).st_mode) or ("/" in name and path.parent.is_symlink()):
        raise _Damage("it is a symbolic link")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    number = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise _Damage("it is not a regular file")
    return open(number, "rb", buffering=0)


def _damaged(folder: Path, name: str, why: Exception) -> CheckpointError:
    if isinstance(why, FileNotFoundError):
        text = "it is missing"
    elif isinstance(why, OSError):
        text = f"it can't be read: {why.strerror or why}"
    else:
        text = str(why)
    return CheckpointError(f"{str(folder)!r}: the checkpoint is damaged: {name}: {text}.")
