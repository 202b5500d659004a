"""What several processes decide together on the host: which saw an error, which asks for an end, what rank 0 read.

Everything goes over a gloo group of its own, so that nothing here waits for a device or meets a collective of a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from trainfn.errors import CheckpointError, TrainfnError

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
        self._group: Any = distributed.new_group(backend="gloo", timeout=_patience())
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def first(self, call: Callable[[], T]) -> T:
        """See `Ranks`."""
        value, mine = _tried(call) if self.rank == 0 else (None, None)
        found: list[Any] = [(value, _told(mine))]
        with _reaching():
            distributed.broadcast_object_list(found, src=0, group=self._group)
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
            distributed.all_gather_object(found, (value, _told(mine)), group=self._group)
        failed = {rank: told for rank, (_, told) in enumerate(found) if told is not None}
        if failed:
            raise _error(failed, self.size) from mine
        return [value for value, _ in found]

    def any(self, flags: Iterable[bool]) -> list[bool]:
        """See `Ranks`."""
        votes = torch.tensor(list(flags), dtype=torch.int32)
        with _reaching():
            distributed.all_reduce(votes, op=distributed.ReduceOp.MAX, group=self._group)
        return votes.bool().tolist()

    def another(self) -> Ranks:
        """See `Ranks`."""
        return Together()


def _patience() -> timedelta | None:
    """How long the job's ranks wait for each other, if it is told."""
    try:
        world: Any = distributed.group.WORLD
        return world._get_backend(torch.device("cpu")).options._timeout
    except (RuntimeError, AttributeError):  # a job that has no backend on the host, or one that does not tell
        return None


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
            " not make the same calls: `tfn.fit`, `tfn.evaluate`, `tfn.save`, `tfn.restore` and `tfn.Checkpoints` are"
            f" for all ranks. ({error})"
        ) from error


# --- the world ----------------------------------------------------------------------------------------------------


_made: list[tuple[Any, Ranks]] = []  # the default group, and its ranks: at most one, for a group may be destroyed


def together() -> Ranks:
    """All processes of this job, for the main thread. In a world of several, all of them call this together."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return ALONE
    world = distributed.group.WORLD
    if not _made or _made[0][0] is not world:
        _made[:] = [(world, Together())]
    return _made[0][1]
