"""Notes on an error among several processes: the rank it happened on, its cause, and where to look."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Generator

import torch

_WAITED = re.compile(r"timed? ?out|timeout", re.IGNORECASE)
_LEFT = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|communicator was aborted|remote (process|error)",
    re.IGNORECASE,
)
_CAUSE = "trainfn/cause"


@contextlib.contextmanager
def explained(where: str) -> Generator[None]:
    """Add the rank to errors of this block; see `explain`."""
    try:
        yield
    except StopIteration:
        raise
    except (Exception, KeyboardInterrupt) as error:
        explain(error, where)
        raise


def explain(error: BaseException, where: str = "") -> None:
    """Add a note to an error: its rank and, if the rank waited for another in vain, the error of that one.

    Nothing is added in a world of one process, or for the second time.

    Args:
        error: Any error; its class and text stay.
        where: Such as ``", in step 3,"``.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    if any(note.startswith("trainfn: rank ") for note in getattr(error, "__notes__", ())):
        return
    rank = distributed.get_rank()
    error.add_note(f"trainfn: rank {rank} of {distributed.get_world_size()}{where} {_meaning(error, rank, where)}")


def _meaning(error: BaseException, rank: int, where: str) -> str:
    text = str(error)
    if isinstance(error, RuntimeError) and _LEFT.search(text):
        cause = _first_error()
        if cause is not None:
            return f"was waiting for another rank, which has ended: {cause}"
        return (
            "was waiting for another rank, which has ended: its own error, or that it was killed, is in its output and"
            " in the launcher's summary."
        )
    if isinstance(error, RuntimeError) and _WAITED.search(text):
        _report(f"rank {rank} waited for the others in vain{where.rstrip(',')}")
        return (
            "waited for the other ranks in vain. Every rank must call the same steps, `tfn.shard`, `tfn.gather` and"
            " evaluations in the same order, also those that print or save nothing; `py-spy dump --pid N` shows where"
            " each is. If one of them needs longer, write `tfn.launch.settings(timeout=seconds)`, or for a Trainer"
            " `TrainingArguments(ddp_timeout=seconds)`."
        )
    _report(f"rank {rank}: {type(error).__name__}: {text}")
    return "raised this; the other ranks end with it."


def _report(cause: str) -> None:
    """Write the cause into the store where the ranks met, for those that wait for this one; the first one counts."""
    with contextlib.suppress(Exception):  # the rank that holds the store may have ended
        torch.distributed.distributed_c10d._get_default_store().compare_set(_CAUSE, "", cause)


def _first_error() -> str | None:
    with contextlib.suppress(Exception):
        store = torch.distributed.distributed_c10d._get_default_store()
        if store.check([_CAUSE]):
            return store.get(_CAUSE).decode()
    return None


def launched() -> int:
    """Return the number of processes of this job, or the number that a launcher exported."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    names = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 1)
