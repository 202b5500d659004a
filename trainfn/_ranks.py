"""What an error means where several processes work together: which of them it happened to, and where to look."""

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


@contextlib.contextmanager
def explained(where: str) -> Generator[None]:
    """Errors of this block say which rank they are of; see `explain`."""
    try:
        yield
    except StopIteration:
        raise
    except Exception as error:
        explain(error, where)
        raise


def explain(error: BaseException, where: str = "") -> None:
    """Add to an error which rank it is of and, if it waited for another in vain, what to look at.

    Nothing is added in a world of one, or twice.

    Args:
        error: Any; it stays what it is.
        where: Such as ``", in step 3,"``.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    who = f"rank {distributed.get_rank()} of {distributed.get_world_size()}"
    if any(note.startswith("trainfn: rank ") for note in getattr(error, "__notes__", ())):
        return
    error.add_note(f"trainfn: {who}{where}{_meaning(error)}")


def _meaning(error: BaseException) -> str:
    said = str(error)
    if not isinstance(error, RuntimeError):
        return " raised this; the other ranks end with it."
    if _LEFT.search(said):
        return (
            " was waiting for another rank, which has ended: its own error, or that it was killed, is in its output and"
            " in the launcher's summary."
        )
    if _WAITED.search(said):
        return (
            " waited for the other ranks in vain. Every rank must call the same steps, `tfn.shard`, `tfn.gather` and"
            " evaluations in the same order, also those that print or save nothing; `py-spy dump --pid N` shows where"
            " each is. If one of them just needs longer, `tfn.launch.settings(timeout=seconds)`."
        )
    return " raised this; the other ranks end with it."


def launched() -> int:
    """The number of processes that a launcher says it has started."""
    names = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 1)
