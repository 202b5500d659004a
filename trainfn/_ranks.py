"""What an error means where several processes work together: which of them it happened to, and where to look."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

import torch

from trainfn.errors import CheckpointError, TrainfnError

_WAITED = re.compile(r"timed? ?out|timeout", re.IGNORECASE)
_LEFT = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|communicator was aborted|remote (process|error)",
    re.IGNORECASE,
)
_CAUSE = "trainfn/cause"


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
    """Add to an error which rank it is of; and, if it waited for another in vain, that one's error or what to look at.

    Nothing is added in a world of one, or twice.

    Args:
        error: Any; it stays what it is.
        where: Such as ``", in step 3,"``.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    if any(note.startswith("trainfn: rank ") for note in getattr(error, "__notes__", ())):
        return
    rank = distributed.get_rank()
    error.add_note(f"trainfn: rank {rank} of {distributed.get_world_size()}{where} {_meaning(error, rank)}")


def _meaning(error: BaseException, rank: int) -> str:
    said = str(error)
    if isinstance(error, RuntimeError) and _LEFT.search(said):
        cause = _first_error()
        if cause is not None:
            return f"was waiting for another rank, which has ended: {cause}"
        return (
            "was waiting for another rank, which has ended: its own error, or that it was killed, is in its output and"
            " in the launcher's summary."
        )
    if isinstance(error, RuntimeError) and _WAITED.search(said):
        return (
            "waited for the other ranks in vain. Every rank must call the same steps, `tfn.shard`, `tfn.gather` and"
            " evaluations in the same order, also those that print or save nothing; `py-spy dump --pid N` shows where"
            " each is. If one of them just needs longer, `tfn.launch.settings(timeout=seconds)`."
        )
    _tell(f"rank {rank}: {type(error).__name__}: {said}")
    return "raised this; the other ranks end with it."


def _tell(cause: str) -> None:
    """Leave word where the ranks met, for those that this one leaves waiting. The first to do so is the cause."""
    with contextlib.suppress(Exception):  # whoever held the store may be gone
        torch.distributed.distributed_c10d._get_default_store().compare_set(_CAUSE, "", cause)


def _first_error() -> str | None:
    with contextlib.suppress(Exception):
        store = torch.distributed.distributed_c10d._get_default_store()
        if store.check([_CAUSE]):
            return store.get(_CAUSE).decode()
    return None


def launched() -> int:
    """The number of processes that work together, or that a launcher says it has started."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    names = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 1)


T = TypeVar("T")


class Ranks:
    """One process by itself: whatever it does, all have done."""

    rank, size = 0, 1

    def first(self, call: Callable[[], T]) -> T:
        """What ``call`` returns on rank 0, which alone calls it; if it raises, all ranks do."""
        return call()

    def everyone(self, call: Callable[[], T]) -> list[T]:
        """What ``call`` returns on each rank; if it raises on any, all ranks do."""
        return [call()]

    def agreed(self, call: Callable[[], T]) -> T:
        """What ``call`` returns on this rank; if it raises on any, all ranks do."""
        return call()

    def any(self, flags: Iterable[bool]) -> list[bool]:
        """Of each flag, whether it is set on any rank."""
        return list(flags)

    def another(self) -> Ranks:
        """The same ranks, for another thread."""
        return self


ALONE = Ranks()


class Together(Ranks):
    """Several processes; all of them make the same calls in the same order."""

    def __init__(self) -> None:
        from torch import distributed

        self._distributed = distributed
        self._group: Any = distributed.new_group(backend="gloo")
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def first(self, call: Callable[[], T]) -> T:
        """See `Ranks`."""
        value, mine = _tried(call) if self.rank == 0 else (None, None)
        found: list[Any] = [(value, _told(mine))]
        with _reaching():
            self._distributed.broadcast_object_list(found, src=0, group=self._group)
        value, failed = found[0]
        if mine is not None:
            raise mine
        if failed is not None:
            raise _error({0: failed}, 1)
        return value

    def everyone(self, call: Callable[[], T]) -> list[T]:
        """See `Ranks`."""
        value, mine = _tried(call)
        return self._exchanged(value, mine)

    def agreed(self, call: Callable[[], T]) -> T:
        """See `Ranks`."""
        value, mine = _tried(call)
        self._exchanged(None, mine)
        return value  # type: ignore[return-value]

    def _exchanged(self, value: Any, mine: Exception | None) -> list[Any]:
        found: list[Any] = [None] * self.size
        with _reaching():
            self._distributed.all_gather_object(found, (value, _told(mine)), group=self._group)
        failed = {rank: told for rank, (_, told) in enumerate(found) if told is not None}
        if failed:
            raise _error(failed, self.size) from mine
        return [value for value, _ in found]

    def any(self, flags: Iterable[bool]) -> list[bool]:
        """See `Ranks`."""
        votes = torch.tensor(list(flags), dtype=torch.int32)
        with _reaching():
            self._distributed.all_reduce(votes, op=self._distributed.ReduceOp.MAX, group=self._group)
        return votes.bool().tolist()

    def another(self) -> Ranks:
        """See `Ranks`."""
        return Together()


def _tried(call: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return call(), None
    except Exception as error:
        return None, error


def _told(error: Exception | None) -> tuple[str, str] | None:
    if error is None:
        return None
    kind = type(error).__name__
    return kind, str(error) if isinstance(error, TrainfnError | ValueError | TypeError) else f"{kind}: {error}"


def _error(failed: dict[int, tuple[str, str]], size: int) -> Exception:
    """The same error on every rank: which rank it comes from, unless all say the same."""
    texts: dict[str, list[int]] = {}
    for rank, (_, text) in failed.items():
        texts.setdefault(text, []).append(rank)
    kinds = {kind for kind, _ in failed.values()}
    kind = {"ValueError": ValueError, "TypeError": TypeError}.get(kinds.pop() if len(kinds) == 1 else "")
    if len(texts) == 1 and len(failed) == size:
        return (kind or CheckpointError)(next(iter(texts)))
    said = (f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in texts.items())
    return (kind or CheckpointError)("\n".join(said))


@contextlib.contextmanager
def _reaching() -> Generator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "the ranks can't reach each other any more: another one has ended, and its own output says why. Or they did"
            f" not make the same calls: `tfn.save`, `tfn.restore` and `tfn.Checkpoints` are for all ranks. ({error})"
        ) from error


# --- the world ----------------------------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this process is the one of its job that prints."""
    from torch import distributed

    return not distributed.is_available() or not distributed.is_initialized() or distributed.get_rank() == 0


_made: list[tuple[Any, Ranks]] = []  # the default group, and its ranks: at most one, for a group may be destroyed


def ranks() -> Ranks:
    """All processes of this job, for the main thread. In a world of several, all of them call this together."""
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return ALONE
    world = distributed.group.WORLD
    if not _made or _made[0][0] is not world:
        _made[:] = [(world, Together())]
    return _made[0][1]
