"""`Reading`: the batches of a stream from a step on, with the state by which its source resumes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trainfn._types import Batch
from trainfn.data import _workers
from trainfn.data._rows import is_huggingface

if TYPE_CHECKING:
    from trainfn.data._stream import Stream


@dataclasses.dataclass
class Cursor:
    """The place of one reader in its source.

    Attributes:
        state: The state that the source resumes by, until it is opened.
        source: The source that is being read, if it has a state.
        exact: Whether the source has given only rows that are used.
        has_epoch: Whether the source knows the number of the epoch.
    """

    state: Any = None
    source: Any = None
    exact: bool = True
    has_epoch: bool = False

    def now(self) -> Any:
        """The state of the source after the rows that it has given, or None if it has none."""
        return self.source.state_dict() if self.source is not None and self.exact else None


class Reading(Iterator[Batch]):
    """The batches of a stream from a step on; made by `Stream.start`.

    Args:
        stream: The stream.
        step: The number of the first batch.
        state: The state after the batch before it, or None.

    >>> import trainfn as tfn
    >>> batches = tfn.data.stream([1, 2, 3], 1).start()
    >>> next(batches).tolist(), batches.state()  # a list has no state
    ([1], None)
    """

    def __init__(self, stream: Stream, step: int, state: Any) -> None:
        self._stream, self._count = stream, max(stream.num_workers, 1)
        readers: list[Any] = [None] * self._count if state is None else state["readers"]
        turn = 0 if state is None else state["next"]
        if len(readers) != self._count:
            raise ValueError(
                f"`stream.start(step={step}, state=...)` can't work: the state is that of {len(readers)} readers, and"
                f" this stream has {self._count}. Write `num_workers={len(readers)}`, or leave `state` out."
            )
        self._readers, self._next = list(readers), turn
        self._cursor = Cursor()
        if stream.num_workers == 0:
            self._cursor.state = readers[0] and readers[0]["source"]
            self._batches = iter(stream.batches(step, self._cursor))
            return
        if stream.num_workers > 1 and state is None and step:
            warnings.warn(f"stream: {step} batches are read and dropped to get to the step to start from: several"
                          " workers read it, and its source has no `state_dict()`.", stacklevel=4)  # fmt: skip
        if stream.num_workers > 1 and hasattr(stream.source, "set_epoch"):
            # Hugging Face's streams hold it in memory that all workers share, so these must not set it together.
            stream.source.set_epoch(stream.first_epoch)
        make = functools.partial(_of_worker, stream, step, self._readers, turn)
        self._batches = self._from_workers(_workers.streamed(make, self._count, stream.prefetch))
        if stream.num_workers > 1 and state is None:
            for _ in itertools.islice(self, step):
                pass

    def __next__(self) -> Batch:
        return next(self._batches)

    def state(self) -> Any:
        """The state after the newest batch, by which `Stream.start` resumes; None if the source has none.

        It is that of the rows in the batches so far, and not of rows that workers have read ahead.
        """
        if self._stream.num_workers == 0:
            source = self._cursor.now()
            return None if source is None else {"readers": [{"batches": 0, "source": source}], "next": 0}
        found = [reader for reader in self._readers if reader is not None]
        if not found or any(reader["source"] is None for reader in found):
            return None
        return {"readers": list(self._readers), "next": self._next}

    def close(self) -> None:
        """End the workers."""
        self._batches.close()  # type: ignore[attr-defined]

    def _from_workers(self, given: Iterator[Any]) -> Iterator[Batch]:
        try:
            for worker, batch, reader in given:
                if reader is not None:  # else it only keeps the turns of the workers
                    self._readers[worker], self._next = reader, (worker + 1) % self._count
                    yield batch
        finally:
            given.close()  # type: ignore[attr-defined]


def _of_worker(stream: Stream, step: int, readers: list[Any], turn: int, worker: int) -> Iterator[Any]:
    """The batches of one worker, each with the number of the worker and the state of its source."""
    if worker < turn:
        yield worker, None, None
    reader, several = readers[worker], stream.num_workers > 1
    cursor = Cursor(has_epoch=several)
    if reader is not None:
        cursor.state = reader["source"]
    if several:
        stream, step = stream.part_of_worker(worker), 0 if reader is None else reader["batches"]
    for count, batch in enumerate(stream.batches(step, cursor), step + 1):
        yield worker, batch, {"batches": count, "source": cursor.now()}


def has_state(source: Any) -> bool:
    """Whether a source resumes exactly by its own state.

    A Hugging Face stream with a shuffle buffer does not: its state is that of the rows that went into the buffer.

    >>> has_state([1, 2, 3])
    False
    """
    if not all(callable(getattr(source, name, None)) for name in ("state_dict", "load_state_dict")):
        return False
    return not (is_huggingface(source) and _has_buffer(getattr(source, "_ex_iterable", None)))


def _has_buffer(rows: Any) -> bool:
    inner = [getattr(rows, "ex_iterable", None), *(getattr(rows, "ex_iterables", None) or ())]
    return "Buffer" in type(rows).__name__ or any(_has_buffer(each) for each in inner if each is not None)
