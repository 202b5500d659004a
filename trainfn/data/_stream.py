"""`stream`: batches of what can only be iterated, with the same protocol as a loader."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import numpy as np

from trainfn._plan import no_rows
from trainfn._types import Batch
from trainfn.data import _batch, _bits, _seeding, _workers
from trainfn.data._batch import Transform
from trainfn.data._collate import Collate, stack
from trainfn.data._reading import Cursor, Reading, has_state
from trainfn.data._rows import is_huggingface
from trainfn.data._sampler import Last, described, filled, named, natural, seeded

_END = object()


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Batches of an iterable; made by `stream`.

    ``stream.start(n)`` iterates from step n on; ``stream(n)`` is one batch by itself, at the cost of getting there.

    >>> import trainfn as tfn
    >>> batches = tfn.data.stream(lambda first: iter(range(first, 9)), 3)
    >>> [batch.tolist() for batch in batches.start(1)]
    [[3, 4, 5], [6, 7, 8]]
    """

    source: Any = dataclasses.field(repr=False)
    batch_size: int
    last: Last
    shuffle: int
    seed: int
    length: int | None
    epochs: int | None
    transform: Transform | None
    collate: Collate
    weights: str
    num_workers: int
    prefetch: int
    rank: int = 0
    world: int = 1
    even: bool = True  # whether every rank has as many rows
    own_shards: bool = False  # whether `source` is one rank's part of it
    first_epoch: int = 0  # the number of the first pass, for who counts epochs outside

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches in a pass over the source, or None if its length is not known."""
        if self.length is None:
            return None
        return self.length // self.batch_size if self.last == "drop" else -(-self.length // self.batch_size)

    @property
    def steps(self) -> int | None:
        """The number of batches, or None if it is not known or infinite."""
        per_epoch = self.steps_per_epoch
        return None if per_epoch is None or self.epochs is None else per_epoch * self.epochs

    def __iter__(self) -> Iterator[Batch]:
        return self.start(0)

    def start(self, step: int = 0, state: Any = None) -> Reading:
        """The batches of step ``step`` and all later ones.

        Costs what the source's own skipping costs, and the reading of less than ``shuffle`` rows. A source that can't
        skip is read up to there, which a warning says.

        Args:
            step: The number of the first batch.
            state: The `Reading.state` after the batch before it. The source resumes by it, and no earlier row is read.

        Raises:
            ValueError: If the state is that of another number of workers.
        """
        return Reading(self, natural("stream.start(step)", "step", step, least=0), state)

    def __call__(self, n: int) -> Batch:
        """Batch ``n`` by itself, read in this process.

        Raises:
            IndexError: If there are not so many.
        """
        n = natural("stream(n)", "n", n, least=0)
        for batch in self.batches(n) if self.num_workers <= 1 else self.start(n):
            return batch
        raise IndexError(f"stream({n}): the source ends before this batch.")

    def shard(self, rank: int, world: int, *, by: str = "rows", even: bool = True) -> Stream:
        """One rank's part of the batches.

        Args:
            rank: From 0 to ``world - 1``.
            world: The number of ranks.
            by: ``"rows"``: this rank's rows of each global batch. The batches don't depend on the number of ranks;
                every rank reads the whole source, and transforms its own rows only. ``"shards"``: this rank's files,
                by ``source.shard(num_shards=, index=)`` as Hugging Face has it. Every rank reads its own files only,
                the batches depend on the number of ranks, and ranks may end at different steps: say ``until=``.
            even: See `Loader.shard`.

        Raises:
            ValueError: If ranks would get batches of different shapes.
            TypeError: If the source has no shards.
        """
        call = f"stream.shard(rank={rank}, world={world}, by={by!r})"
        _batch.check_share(call, self.batch_size, self.last if even or by != "rows" else "pad", rank, world)
        if by == "rows":
            return dataclasses.replace(self, rank=rank, world=world, even=even)
        if by != "shards":
            raise ValueError(f'`{call}`: shard by="rows" or by="shards".')
        if not hasattr(self.source, "shard"):
            raise TypeError(f'`{call}`: a {type(self.source).__name__} has no method `shard`. Use by="rows".')
        part = self.source.shard(num_shards=world, index=rank)
        seed = int(_bits.fold_in(_bits.key(self.seed), rank)[0])  # row 0 of every rank is another row
        size = -(-self.batch_size // world)
        return dataclasses.replace(
            self, source=part, batch_size=size, seed=seed, length=None, epochs=1, own_shards=True
        )

    def describe(self) -> dict[str, Any]:
        """The description of all batches, for JSON."""
        fields = ("batch_size", "last", "shuffle", "seed", "length", "epochs")
        return {
            "kind": "stream",
            "source": named(self.source),
            **{name: getattr(self, name) for name in fields},
            "transform": named(self.transform),
            "collate": described(self.collate),
        }

    def batches(self, step: int, cursor: Cursor | None = None) -> Iterator[Batch]:
        """The batches from a step on, read in this process.

        Args:
            step: The number of the first batch.
            cursor: The place in the source: the state that it resumes by, and later the source itself.
        """
        cursor = Cursor() if cursor is None else cursor
        per_epoch = self.steps_per_epoch
        epoch, number = (0, step) if per_epoch is None else divmod(step, per_epoch)
        epoch += self.first_epoch
        while self.epochs is None or epoch < self.first_epoch + self.epochs:
            rows = self._rows(epoch, number * self.batch_size, cursor)
            while read := list(itertools.islice(rows, self.batch_size)):
                if len(read) == self.batch_size or self.last != "drop":
                    yield self._batch(epoch, number, step, read)
                    number, step = number + 1, step + 1
            epoch, number = epoch + 1, 0

    def _batch(self, epoch: int, number: int, step: int, read: list[Any]) -> Batch:
        """Batch ``number`` of an epoch, in all batch ``step``, of the rows that were read for it."""
        first = number * self.batch_size
        places = np.arange(first, first + len(read))
        rows = filled(places, np.full_like(places, epoch), self.batch_size if self.last == "pad" else len(read))
        everything = rows
        rows, offset = _batch.share(rows, self.batch_size, self.rank, self.world, self.even)
        none = len(rows.indices) == 0
        rows = everything.part(slice(1)) if none else rows
        try:
            mine: list[Any] = [read[i] for i in (rows.indices - first).tolist()]
            if self.transform is not None:
                keys = _seeding.row_keys(self.seed, rows.visits, rows.indices)
                mine = _batch.transformed(self.transform, mine.__getitem__, rows.indices, keys, seeding=True)
            batch = _batch.collated(self.collate, mine, self.seed, step, offset)
            batch = no_rows(batch) if none else batch
        except Exception as error:
            error.add_note(f"In the batch of step {step}, of the rows from {first} on of epoch {epoch}.")
            raise
        return _batch.weighted(batch, rows.weights, self.weights) if self.last == "pad" else batch

    def part_of_worker(self, worker: int) -> Stream:
        """The stream of one worker among several: a pass over the rows that the source gives to it."""
        seed = int(_bits.fold_in(_bits.key(self.seed), worker)[0])  # row 0 of each worker is another row
        return dataclasses.replace(self, seed=seed, length=None, epochs=1)

    def _rows(self, epoch: int, first: int, cursor: Cursor) -> Iterator[Any]:
        """The rows of an epoch from the first-th on, shuffled in blocks if asked to."""
        size = self.shuffle or self.batch_size
        block, skip = divmod(first, size)
        draws = not is_huggingface(self.source)
        source, start = opened(self.source, epoch, block * size, cursor)
        cursor.exact = not self.shuffle  # rows of a block are read before they are used
        if start < block * size:
            _warn(block * size)
        for k in range(start // size, block):
            self._take(source, epoch, k * size, size, draws)
        while rows := self._take(source, epoch, block * size, size, draws):
            if self.shuffle:
                key = _bits.fold_in(_bits.fold_in(_bits.key(self.seed), epoch), block)
                rows = [rows[i] for i in _bits.permute(key, len(rows), np.arange(len(rows))).tolist()]
            yield from rows[skip:]
            block, skip = block + 1, 0

    def _take(self, source: Iterator[Any], epoch: int, first: int, count: int, draws: bool) -> list[Any]:
        """The next rows; what a source draws for a row from the global generators is keyed by the row."""
        count = count if self.length is None else min(count, self.length - first)
        if draws:
            places = np.arange(first, first + count)
            keys = _seeding.row_keys(self.seed, np.full_like(places, epoch), places)
            with _seeding.borrowed() as seed:
                read = [seed(key) or next(source, _END) for key in keys]
            rows = [row for row in read if row is not _END]
        else:
            rows = list(itertools.islice(source, count))
        if self.length is not None and len(rows) < count:
            raise ValueError(f"stream(length={self.length}): the source ended after {first + len(rows)} rows. Say"
                             f" length={first + len(rows)}.")  # fmt: skip
        return rows


def opened(source: Any, epoch: int, first: int, cursor: Cursor) -> tuple[Iterator[Any], int]:
    """The source from row ``first`` on if it can start there, else from row 0; and which of the two."""
    state, cursor.state = cursor.state, None
    if not hasattr(source, "__iter__"):
        if _batch.takes(source, "first"):
            return iter(source(first=first)), first
        source, cursor.has_epoch = source(), False
    if hasattr(source, "set_epoch") and not cursor.has_epoch:
        source.set_epoch(epoch)
    if state is not None:
        # Hugging Face's streams keep the state for all later passes with this epoch's number, so it goes to a copy.
        source = copy.copy(source) if is_huggingface(source) else source
        source.load_state_dict(state)
    cursor.source = source if has_state(source) else None
    if state is None and first > 0 and hasattr(source, "skip"):
        cursor.source = None  # its state would be that of the result of `skip`
        return iter(source.skip(first)), first
    return iter(source), 0 if state is None else first


def _warn(rows: int) -> None:
    warnings.warn(
        f"stream: {rows} rows are read and dropped to get to the step to start from. Give the source a method"
        " `skip(rows)` that returns the rest, or pass a function: stream(lambda first: rows_from(first), ...).",
        stacklevel=2,
    )


def stream(
    source: Any,
    batch_size: int,
    *,
    last: Last = "drop",
    shuffle: int = 0,
    seed: int = 0,
    length: int | None = None,
    epochs: int | None = 1,
    transform: Transform | None = None,
    collate: Collate = stack,
    weights: str = "weights",
    num_workers: int = 0,
    prefetch: int | None = None,
) -> Stream:
    """The batches of an iterable: batch n is rows ``n * batch_size`` and on.

    A row's randomness is that of a `loader`, keyed by (seed, epoch, place in the stream). What the source itself
    draws while a row is read is keyed too, except in Hugging Face streams, which draw from their own generators.

    Args:
        source: An iterable that can be iterated again, such as an ``IterableDataset`` of torch or Hugging Face; a
            function that returns one; or a function ``first=`` that returns the rows from number ``first`` on, which
            makes any position as near as the first. A source with ``skip(rows)``, as Hugging Face has it, is skipped
            with that. Otherwise rows are read and dropped to get to a step.
        batch_size: Rows of a global batch.
        last: How the last rows of a pass are used; see `Sampler`.
        shuffle: Shuffle blocks of so many rows, keyed by (seed, epoch, block); 0 for not. A block is held in memory,
            and starting inside of one costs reading it.
        seed: Any 64-bit integer.
        length: Rows in a pass; by default ``len(source)`` if it has one. With it, any step of any epoch is known.
        epochs: How many passes; None for endless. Other than 1, ``length`` must be known.
        transform: See `loader`, as for ``collate`` and ``weights``.
        collate: The same.
        weights: The same.
        num_workers: 1 to read and transform in another process, which overlaps with the step; 0 for not. Each of
            several workers iterates over the source and makes batches of its own, which come in turn, as from torch's
            ``DataLoader``. The source divides its rows by ``torch.utils.data.get_worker_info()``, as Hugging Face's
            streams do with files; a source that does not gives each row once for each worker.
        prefetch: Batches a worker is ahead, 2 by default.

    Raises:
        TypeError: If the source can be read only once.
        ValueError: If there are several workers, and several passes or a length; or if the number of rows is needed and
            not known.

    >>> batches = stream([{"x": i} for i in range(6)], 2, shuffle=6, seed=1)
    >>> sorted(int(x) for batch in batches for x in batch["x"])
    [0, 1, 2, 3, 4, 5]
    """
    call = f"stream(batch_size={batch_size!r}, epochs={epochs!r}, num_workers={num_workers!r})"
    if isinstance(source, Iterator) or not (isinstance(source, Iterable) or callable(source)):
        raise TypeError(
            f"`{call}`: a {type(source).__name__} can be read once at most, so a run over it could not be resumed."
            " Pass the function that makes it: stream(read_rows, ...), not stream(read_rows(), ...)."
        )
    batch_size, shuffle = natural(call, "batch_size", batch_size), natural(call, "shuffle", shuffle, least=0)
    epochs = None if epochs is None else natural(call, "epochs", epochs)
    ahead = _workers.checked(call, num_workers, prefetch)
    if num_workers > 1 and (epochs, length) != (1, None):
        raise ValueError(f"`{call}`: of several workers each ends at a step of its own, so no step of a later pass is"
                         " known. Say num_workers=1, or epochs=1 without a length.")  # fmt: skip
    if length is None and isinstance(source, Sized) and num_workers <= 1:
        length = len(source)
    if last not in ("drop", "pad", "short"):
        raise ValueError(f'`{call}`: the end of a pass is handled by last="drop", "pad" or "short", not {last!r}.')
    if epochs != 1 and length is None:
        raise ValueError(f"`{call}`: how many rows a pass has is not known, and so not which step begins a new one."
                         " Say length=100_000.")  # fmt: skip
    if length is not None and length < (batch_size if last == "drop" else 1):
        raise ValueError(f'`{call}`: a pass of {length} rows has no batch. Use last="pad", or a smaller batch_size.')
    seed = seeded(call, seed)
    return Stream(
        source, batch_size, last, shuffle, seed, length, epochs, transform, collate, weights, num_workers, ahead
    )
