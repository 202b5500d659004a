"""The bytes of the files: the safetensors layout, and the manifest.

A safetensors file is the length of its header (8 bytes, little-endian), the header, and the tensors' bytes. The header
is JSON with the dtype, shape and place of each tensor. Such files are written here because the library can neither hash
a file as it writes nor flush it. A header is never parsed: a reader makes it again from the manifest and compares.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from trainfn._checkpoint._disk import Written
from trainfn._checkpoint._pieces import Box, check_grid, whole_box

FORMAT, SPLIT_FORMAT = 2, 3  # 3 if a leaf is in pieces, else 2
MANIFEST = "manifest.json"
STATE_FILE = "state.safetensors"
MODEL = "model/"  # begins the names of what the module holds
RANK_FILE = re.compile(r"rank-[0-9]+-of-[0-9]+\.safetensors")  # the pieces of split leaves that one rank wrote
LIMIT = 64 * 2**20  # bytes of a manifest or a header: a hundred leaves of a megabyte each, or half a million small ones

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Piece(NamedTuple):
    """The manifest's entry of one part of a leaf that was split over ranks."""

    file: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def box(self) -> Box:
        """The part of the leaf that it holds."""
        return Box(self.offsets, self.shape)


class Leaf(NamedTuple):
    """The manifest's entry of one leaf, which is in one file, or in pieces in several."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    pieces: tuple[Piece, ...] = ()

    @property
    def nbytes(self) -> int:
        """The size of its values in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def parts(self) -> tuple[Piece, ...]:
        """Its pieces; a leaf that was not split is one piece."""
        return self.pieces or (Piece(self.file, *whole_box(self.shape)),)


class Manifest(NamedTuple):
    """A checkpoint without its values."""

    step: int
    metrics: dict[str, float]
    files: dict[str, Written]
    tree: dict[str, Leaf]
    extra: dict[str, Any]
    versions: dict[str, str]

    def leaves_of(self, file: str) -> dict[str, Leaf]:
        """The leaves in a file, in the order of their bytes: the widest dtype first, so that all are aligned."""
        return self.by_file().get(file, {})

    def by_file(self) -> dict[str, dict[str, Leaf]]:
        """`leaves_of` each file that holds any; a piece of a leaf appears as a leaf of the piece's shape."""
        found: dict[str, dict[str, Leaf]] = {part.file: {} for leaf in self.tree.values() for part in leaf.parts}
        for name, leaf in sorted(self.tree.items(), key=lambda item: (-DTYPES[item[1].dtype].itemsize, item[0])):
            for part in leaf.parts:
                found[part.file][name] = Leaf(leaf.dtype, part.shape, part.file)
        return found


def header(leaves: Mapping[str, Leaf]) -> bytes:
    """The beginning of a safetensors file, up to the first tensor's bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, leaf in leaves.items():
        key = name if leaf.file == STATE_FILE or RANK_FILE.fullmatch(leaf.file) else name.removeprefix(MODEL)
        if key in entries:
            raise ValueError(f"two tensors are called {key!r}")
        begin, end = end, end + leaf.nbytes
        entries[key] = {"dtype": leaf.dtype, "shape": leaf.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# --- the manifest -------------------------------------------------------------------------------------------------

_SEAL = re.compile(rb',\n"sha256": "([0-9a-f]{64})"\n}\n\Z')
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}"  # no "..", nothing hidden
NAME = re.compile(rf"(?:{_PART}/)?{_PART}")  # in the checkpoint's folder, or in a folder there
OWN = re.compile(r"(?:model|state|rank)\b[^/]*\.safetensors")  # the files that hold leaves
_DIGEST = re.compile(r"[0-9a-f]{64}")


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as JSON, one line for each leaf; the last line is the checksum of all bytes before it."""
    fields = {
        "format": SPLIT_FORMAT if any(leaf.pieces for leaf in manifest.tree.values()) else FORMAT,
        "step": manifest.step,
        "versions": manifest.versions,
        "metrics": manifest.metrics,
        "extra": manifest.extra,
        "files": {name: written._asdict() for name, written in manifest.files.items()},
        "tree": {name: _entry(leaf) for name, leaf in manifest.tree.items()},
    }
    lines = [f"{json.dumps(name)}: {_lines(value) if name in ('files', 'tree') else json.dumps(value)}"
             for name, value in fields.items()]  # fmt: skip
    body = ("{\n" + ",\n".join(lines)).encode()
    return body + f',\n"sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def _entry(leaf: Leaf) -> dict[str, Any]:
    if not leaf.pieces:
        return {"dtype": leaf.dtype, "shape": leaf.shape, "file": leaf.file}
    return {"dtype": leaf.dtype, "shape": leaf.shape, "pieces": [piece._asdict() for piece in leaf.pieces]}


def _lines(value: Any) -> str:
    return "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n}"


def parsed_manifest(data: bytes) -> Manifest:
    """The manifest of these bytes; every field is checked.

    Raises:
        ValueError: If a field is missing or wrong, or the checksum does not match.
    """
    fields = _json(data)
    kind = fields.get("format")
    if type(kind) is not int or kind not in (FORMAT, SPLIT_FORMAT):
        raise ValueError(f"format {kind!r}; this version of trainfn reads {FORMAT} and {SPLIT_FORMAT}")
    seal = _SEAL.search(data)
    if seal is None or hashlib.sha256(data[: seal.start()]).hexdigest().encode() != seal[1]:
        raise ValueError("checksum mismatch: its last line is not the SHA-256 of the lines before it")
    files = {_file_name(name): _written(entry) for name, entry in _field(fields, "files", dict).items()}
    found = Manifest(
        step=_count(fields.get("step"), "step"),
        metrics={name: _number(value) for name, value in _field(fields, "metrics", dict).items()},
        files=files,
        tree={name: _leaf(name, entry, files, kind) for name, entry in _field(fields, "tree", dict).items()},
        extra=_field(fields, "extra", dict),
        versions=_field(fields, "versions", dict),
    )
    for name, leaves in found.by_file().items():
        written = files[name]
        if written.size != len(header(leaves)) + sum(leaf.nbytes for leaf in leaves.values()):
            raise ValueError(f"{name} has {written.size} bytes, which is not the size of the leaves in it")
    return found


def _json(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data, object_pairs_hook=_no_twins)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a name twice")
    return found


def _field(fields: dict[str, Any], name: str, kind: type) -> Any:
    if not isinstance(fields.get(name), kind):
        raise ValueError(f"{name!r} is missing, or is not a {kind.__name__}")
    return fields[name]


def _count(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{what} is {str(value)[:40]}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"a metric is {str(value)[:40]}")
    return float(value)


def _file_name(name: str) -> str:
    if not NAME.fullmatch(name) or name.lower() == MANIFEST:
        raise ValueError(f"{name[:80]!r} is not a valid name for a file of a checkpoint")
    return name


def _written(entry: Any) -> Written:
    digest = _field(entry, "sha256", str) if isinstance(entry, dict) else ""
    if not _DIGEST.fullmatch(digest):
        raise ValueError("a file has no checksum")
    return Written(_count(entry.get("size"), "the size of a file"), digest)


def _leaf(name: str, entry: Any, files: dict[str, Written], kind: int) -> Leaf:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape = _field(entry, "dtype", str), _field(entry, "shape", list)
    split = kind == SPLIT_FORMAT and "pieces" in entry
    file = "" if split else _field(entry, "file", str)
    if dtype not in DTYPES or len(shape) > 64 or not (split or _holds_tensors(file, files)):
        raise ValueError(f"{name[:80]!r} has an invalid dtype, shape or file")
    shape = _sizes(name, shape)
    return Leaf(dtype, shape, file, _pieces(name, shape, entry, files) if split else ())


def _pieces(name: str, shape: tuple[int, ...], entry: dict[str, Any], files: dict[str, Written]) -> tuple[Piece, ...]:
    pieces = [_piece(name, piece, len(shape), files) for piece in _field(entry, "pieces", list)]
    if not pieces or "file" in entry:
        raise ValueError(f"{name[:80]!r} is in pieces, but has no piece, or has a file as well")
    if len({piece.file for piece in pieces}) != len(pieces):
        raise ValueError(f"{name[:80]!r} has two pieces in one file")
    try:
        check_grid(shape, [piece.box for piece in pieces])
    except ValueError as why:
        raise ValueError(f"the pieces of {name[:80]!r} {why}") from None
    return tuple(pieces)


def _piece(name: str, entry: Any, dims: int, files: dict[str, Written]) -> Piece:
    entry = entry if isinstance(entry, dict) else {}
    file, offsets, shape = _field(entry, "file", str), _field(entry, "offsets", list), _field(entry, "shape", list)
    if not _holds_tensors(file, files) or len(offsets) != dims or len(shape) != dims:
        raise ValueError(f"a piece of {name[:80]!r} has invalid offsets, an invalid shape or an invalid file")
    return Piece(file, _sizes(name, offsets), _sizes(name, shape))


def _holds_tensors(file: str, files: dict[str, Written]) -> bool:
    return file in files and file.endswith(".safetensors")


def _sizes(name: str, sizes: list[Any]) -> tuple[int, ...]:
    return tuple(_count(size, f"a dimension of {name[:80]!r}") for size in sizes)
