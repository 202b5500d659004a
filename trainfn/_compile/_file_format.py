"""The file of a compiled step: a zip of a description, libraries and constants, with checksums; and what it needs.

The members are stored, not packed: a library is machine code that is loaded as it is.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from trainfn.errors import CheckpointError

Description = dict[str, Any]  # as JSON has it

FORMAT = 1
HEADER = "step.json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")  # no separator, no "..", nothing hidden
_DATE = (1980, 1, 1, 0, 0, 0)  # the same step makes the same bytes
_AGAIN = "Save it again here: `tfn.jit(step).save(path, state, batch)`."


def write_file(path: Path, header: Description, members: Mapping[str, bytes]) -> None:
    """Write a file whole or not at all: beside its place, flushed, then renamed."""
    files = {name: {"size": len(data), "sha256": _digest(data)} for name, data in members.items()}
    text = json.dumps({**header, "files": files}, indent=1).encode()
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with open(new, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name, data in {HEADER: text, **members}.items():
                    archive.writestr(zipfile.ZipInfo(name, _DATE), data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_file(path: Path) -> tuple[Description, dict[str, bytes]]:
    """Return the description and the members of a file.

    Raises:
        CheckpointError: If it is not whole; the message names the part that is damaged.
        ValueError: If it was made by another version or for another machine; the message names what differs.
    """
    part = "the file"
    try:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            part = HEADER
            header = json.loads(archive.read(HEADER))
            check_fits(path, header)
            members: dict[str, bytes] = {}
            for part, written in header["files"].items():
                if not _NAME.fullmatch(part):
                    raise zipfile.BadZipFile("its name is not one that is written")
                members[part] = archive.read(part)
                if len(members[part]) != written["size"] or _digest(members[part]) != written["sha256"]:
                    raise zipfile.BadZipFile("its bytes are not those that were written (SHA-256)")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"tfn.load_step({str(path)!r}): there is no such file. `tfn.jit(step).save(...)` writes one."
        ) from None
    except (zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError, KeyError, EOFError, NotImplementedError) as e:
        raise CheckpointError(
            f"tfn.load_step({str(path)!r}): the file is damaged, or not one of a step: {part}: {e}. {_AGAIN}"
        ) from e
    return header, members


# --- what a file needs --------------------------------------------------------------------------------------------


def versions() -> Description:
    """Return the versions that a file is made by."""
    return {"format": FORMAT, "trainfn": sys.modules["trainfn"].__version__, "torch": torch.__version__}


def machine(kinds: Iterable[str]) -> Description:
    """Return what compiled code depends on: the processor, and the GPU if one of the device types is ``"cuda"``.

    Code for a CPU is cut for a number of threads.
    """
    found: Description = {
        "system": platform.system(),
        "machine": platform.machine(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
    }
    if "cuda" not in kinds:
        return {**found, "threads": torch.get_num_threads()}
    if not torch.cuda.is_available():
        return {**found, "CUDA": None}
    return {
        **found,
        "CUDA": torch.version.cuda,
        "GPU": torch.cuda.get_device_name(),
        "compute capability": list(torch.cuda.get_device_capability()),
    }


def features() -> list[str]:
    """Return the names of this processor's instruction sets."""
    known = getattr(torch.cpu, "get_capabilities", Description)()
    return sorted(name for name, value in known.items() if value is True)


def check_fits(path: Path, header: Description) -> None:
    """Raise if a file was made by other versions, or for another machine."""
    call, kinds = f"tfn.load_step({str(path)!r})", header.get("devices", ())
    here = {**versions(), **machine(kinds)}
    for field, value in {**header["versions"], **header["machine"]}.items():
        if here.get(field) != value:
            raise ValueError(f"{call}: {field}: the file was made with {value!r}, and here it is {here.get(field)!r}. "
                             + _remedy(field, value))  # fmt: skip
    lacking = sorted(set(header["features"]) - set(features()))
    if lacking:
        raise ValueError(f"{call}: CPU features: the file may use {lacking}, which this machine lacks. {_AGAIN}")


def _remedy(field: str, value: object) -> str:
    return f"Write `torch.set_num_threads({value})` before, or save it again here." if field == "threads" else _AGAIN
