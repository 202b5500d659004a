"""`Ranks`: the processes of a job, and their exchanges on the host.

Decisions of a run need all of its processes: one process saw an error, one got a signal, only rank 0 reads a file. Such
small messages go over a gloo group of their own. They don't wait for a device, and they never mix with the collectives
of a step. An exchange takes about a millisecond on one machine. It happens between steps, never inside one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from trainfn.errors import CheckpointError, TrainfnError

T = TypeVar("T")


class Ranks:
    """The processes of a job. This class is a job of one process; `trainfn.launch.ranks` returns the present job.

    Every rank makes the same calls in the same order. A call that raises on one rank raises on all of them.

    Attributes:
        rank: This process's number.
        size: The number of processes.

    >>> import trainfn as tfn
    >>> ranks = tfn.launch.ranks()
    >>> ranks.first(lambda: "read by rank 0"), ranks.gathered("from each"), ranks.sums([1.5]), ranks.any([True, False])
    ('read by rank 0', ['from each'], [1.5], [True, False])
    """

    rank: int = 0
    size: int = 1

    def first(self, call: Callable[[], T]) -> T:
        """Call ``call`` on rank 0 alone, and return its result on every rank."""
        return call()

    def everyone(self, call: Callable[[], T]) -> list[T]:
        """Call ``call`` on each rank, and return all results in the order of the ranks."""
        return [call()]

    def agreed(self, call: Callable[[], T]) -> T:
        """Call ``call`` on each rank, and return this rank's result once every rank has succeeded."""
        return call()

    def gathered(self, value: T) -> list[T]:
        """Return the value of each rank, in order."""
        return self.everyone(lambda: value)

    def any(self, flags: Iterable[bool]) -> list[bool]:
        """Return for each flag whether it is set on any rank."""
        return list(flags)

    def sums(self, numbers: Iterable[float]) -> list[float]:
        """Return the sum of each number over the ranks, added in float64."""
        return list(numbers)

    def wait(self) -> None:
        """Wait until every rank has called this."""

    def another(self) -> Ranks:
        """Return the same ranks for another thread, whose exchanges must not mix with those of this one."""
        return self


ALONE = Ranks()


class Group(Ranks):
    """Several processes, which exchange over a gloo group.

    Args:
        timeout: How long a rank waits for the others; None for gloo's own 30 minutes.
    """

    def __init__(self, timeout: timedelta | None) -> None:
        self._timeout = timeout
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    @functools.cached_property
    def _group(self) -> Any:
        # Opens a socket to each other rank, once: at the first exchange, to which all ranks come.
        return distributed.new_group(backend="gloo", timeout=self._timeout)

    def first(self, call: Callable[[], T]) -> T:
        """See `Ranks`."""
        value, mine = _tried(call) if self.rank == 0 else (None, None)
        sent: list[Any] = [(value, _reported(mine))]
        # Two broadcasts, of the pickle's length and of the pickle. Other ranks must not read the file themselves,
        # because it may change between two reads.
        with _reaching():
            distributed.broadcast_object_list(sent, src=0, group=self._group)
        value, failed = sent[0]
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
        # Two gathers, of the pickles' lengths and of the pickles, each padded to the longest. A result travels with the
        # error, so that a rank that failed does not leave the others waiting.
        with _reaching():
            distributed.all_gather_object(found, (value, _reported(mine)), group=self._group)
        failed = {rank: reported for rank, (_, reported) in enumerate(found) if reported is not None}
        if failed:
            raise _error(failed, self.size) from mine
        return [value for value, _ in found]

    def any(self, flags: Iterable[bool]) -> list[bool]:
        """See `Ranks`."""
        votes = torch.tensor(list(flags), dtype=torch.int32)
        # 4 bytes a flag, after each step: a signal that one rank gets must end the run on all after the same step.
        with _reaching():
            distributed.all_reduce(votes, op=distributed.ReduceOp.MAX, group=self._group)
        return votes.bool().tolist()

    def sums(self, numbers: Iterable[float]) -> list[float]:
        """See `Ranks`."""
        total = torch.tensor(list(numbers), dtype=torch.float64)
        # 8 bytes a number: counts of the run, which exist on the host only.
        with _reaching():
            distributed.all_reduce(total, group=self._group)
        return total.tolist()

    def wait(self) -> None:
        """See `Ranks`."""
        # A barrier, without data: one rank has written to a disk, and the others read it next.
        with _reaching():
            distributed.barrier(group=self._group)

    def another(self) -> Ranks:
        """See `Ranks`."""
        other = Group(self._timeout)
        # All ranks must make groups in the same order. A thread would make its group at any time, so it is made now.
        _ = other._group
        return other


def _job_timeout() -> timedelta | None:
    """Return how long the job's ranks wait for each other; None if no backend on the host has a timeout."""
    try:
        world: Any = distributed.group.WORLD
        return world._get_backend(torch.device("cpu")).options._timeout
    except (RuntimeError, AttributeError):
        return None


def _tried(call: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return call(), None
    except Exception as error:
        return None, error


def _reported(error: Exception | None) -> tuple[str, str] | None:
    """Return the class and the text of an error, because the error itself may not be picklable."""
    if error is None:
        return None
    kind = type(error).__name__
    return kind, str(error) if isinstance(error, TrainfnError | ValueError | TypeError) else f"{kind}: {error}"


def _error(failed: dict[int, tuple[str, str]], size: int) -> Exception:
    """Return the same error on every rank; it names the ranks that failed, unless all failed alike."""
    texts: dict[str, list[int]] = {}
    for rank, (_, text) in failed.items():
        texts.setdefault(text, []).append(rank)
    kinds = {kind for kind, _ in failed.values()}
    kind = {"ValueError": ValueError, "TypeError": TypeError}.get(kinds.pop() if len(kinds) == 1 else "")
    if len(texts) == 1 and len(failed) == size:
        return (kind or CheckpointError)(next(iter(texts)))
    lines = (f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in texts.items())
    return (kind or CheckpointError)("\n".join(lines))


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


_made: list[tuple[Any, Ranks]] = []  # the default group and its ranks; at most one, for a group may be destroyed


def ranks(*, timeout: float | None = None) -> Ranks:
    """Return the processes of this job, for the main thread; in a world of several, all of them call this.

    Args:
        timeout: Seconds to wait for another rank; by default, the job's own. The first call decides.

    >>> import trainfn as tfn
    >>> tfn.launch.ranks().size
    1
    """
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return ALONE
    world = distributed.group.WORLD
    if not _made or _made[0][0] is not world:
        _made[:] = [(world, Group(_job_timeout() if timeout is None else timedelta(seconds=timeout)))]
    return _made[0][1]
