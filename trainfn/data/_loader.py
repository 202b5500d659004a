"""`loader`: a dataset and a sampler, and out come batches. Batch n is a function of n."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trainfn._plan import no_rows
from trainfn._text import shortened
from trainfn._types import Batch
from trainfn.data import _batch, _seeding, _workers
from trainfn.data._batch import Transform
from trainfn.data._collate import Collate, stack
from trainfn.data._rows import Columns, Source, describe_dataset, source
from trainfn.data._sampler import Rows, Sampler, described, named, natural, seeded


@dataclasses.dataclass(frozen=True, eq=False)
class Loader:
    """Batches by number; made by `loader`.

    ``loader(n)`` is the batch that step n sees; ``loader.start(n)`` iterates from there with the workers' help, and
    ``len(loader)`` is the number of batches where that is finite.

    >>> import trainfn as tfn
    >>> batches = tfn.data.loader({"x": np.arange(6)}, tfn.data.sequential(6, 2), epochs=1)
    >>> len(batches), batches(1)["x"].tolist(), [batch["x"].tolist() for batch in batches.start(2)]
    (3, [2, 3], [[4, 5]])
    """

    dataset: Any = dataclasses.field(repr=False)
    sampler: Sampler
    transform: Transform | None
    collate: Collate
    seed: int
    epochs: int | None
    weights: str
    num_workers: int
    prefetch: int
    getitems: bool
    rank: int = 0
    world: int = 1
    even: bool = True  # whether every rank has as many rows

    @functools.cached_property
    def source(self) -> Source:
        """The dataset, read by row numbers."""
        return source(self.dataset, self.getitems)

    @property
    def steps(self) -> int | None:
        """The number of batches, or None if they never end."""
        per_epoch = self.sampler.steps_per_epoch
        return None if self.epochs is None or per_epoch is None else self.epochs * per_epoch

    def __len__(self) -> int:
        if self.steps is None:
            raise TypeError("len(loader): it never ends. Say how long: loader(..., epochs=1), or fit(..., until=1000).")
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        return self.start(0)

    def start(self, step: int = 0) -> Iterator[Batch]:
        """The batches of step ``step`` and all later ones; nothing is read to get there.

        Args:
            step: Completed steps. At the end or past it, there are no batches.
        """
        step = natural("loader.start(step)", "step", step, least=0)
        numbers = itertools.count(step) if self.steps is None else range(step, self.steps)
        return _workers.each(self, numbers, self.num_workers, self.prefetch)

    def __call__(self, n: int) -> Batch:
        """Batch ``n`` by itself, read in this process.

        Raises:
            IndexError: If there are not so many.
        """
        if self.steps is not None and n >= self.steps:
            raise IndexError(f"loader({n}): there are {self.steps} batches, the last one is loader({self.steps - 1}).")
        everything = self.sampler.rows(n)
        rows, first = _batch.share(everything, self.sampler.batch_size, self.rank, self.world, self.even)
        try:
            if len(rows.indices) == 0:
                return no_rows(self._collated(everything.part(slice(1)), n, first))
            batch = self._collated(rows, n, first)
        except Exception as error:
            error.add_note(f"In the batch of step {n}, of the rows {shortened(rows.indices.tolist())}.")
            raise
        return batch if self.sampler.last != "pad" else _batch.weighted(batch, rows.weights, self.weights)

    def shard(self, rank: int, world: int, *, even: bool = True) -> Loader:
        """The same batches, of each only the rows of one rank: those of all ranks, in order, are the global batch.

        With ``last="pad"`` every rank gets as many rows, with weight 0 where there are none left.

        Args:
            rank: From 0 to ``world - 1``.
            world: The number of ranks.
            even: False if ranks may get batches of different sizes. If a batch does not divide, the first ranks get one
                row more. If it has fewer rows than ranks, the last ranks get a batch of no rows.

        Raises:
            ValueError: If ``even``, and ranks would get batches of different shapes.

        >>> import trainfn as tfn
        >>> batches = tfn.data.loader(np.arange(8), tfn.data.sequential(8, 4))
        >>> [batches.shard(rank, 2)(0).tolist() for rank in range(2)]
        [[0, 1], [2, 3]]
        """
        last = self.sampler.last if even else "pad"
        _batch.check_share(f"loader.shard(rank={rank}, world={world})", self.sampler.batch_size, last, rank, world)
        return dataclasses.replace(self, rank=rank, world=world, even=even)

    def describe(self) -> dict[str, Any]:
        """The description of all batches, for JSON. Workers and ranks are not in it: they change nothing."""
        return {
            "sampler": self.sampler.describe(),
            "dataset": describe_dataset(self.dataset),
            "seed": self.seed,
            "epochs": self.epochs,
            "transform": named(self.transform),
            "collate": described(self.collate),
        }

    def _collated(self, rows: Rows, n: int, first: int) -> Batch:
        if (
            isinstance(self.source, Columns)
            and not self.transform
            and self.collate is stack
            and not self.sampler.packing
        ):
            return self.source.batch(rows.indices)
        read = self._packed(rows) if self.sampler.packing else self._read(rows)
        return _batch.collated(self.collate, read, self.seed, n, first)

    def _packed(self, rows: Rows) -> Sequence[Any]:
        packing = self.sampler.packing
        assert packing is not None
        members = [packing.members(pack) for pack in rows.indices.tolist()]
        visits = np.repeat(rows.visits, [len(pack) for pack in members])
        read = iter(self._read(Rows(np.concatenate(members), rows.weights, visits)))
        return [packing.join(list(itertools.islice(read, len(pack))), packing.length) for pack in members]

    def _read(self, rows: Rows) -> Sequence[Any]:
        """The rows, transformed, each with its own randomness."""
        keys = _seeding.row_keys(self.seed, rows.visits, rows.indices)
        if self.source.draws:
            return _batch.transformed(self.transform, lambda i: self._one(rows, i), rows.indices, keys, seeding=True)
        read = self.source.rows(rows.indices)
        if self.transform is None:
            return read
        seeding = not _batch.takes(self.transform, "key")
        return _batch.transformed(self.transform, read.__getitem__, rows.indices, keys, seeding=seeding)

    def _one(self, rows: Rows, place: int) -> Any:
        return self.source.rows(rows.indices[place : place + 1])[0]


def loader(
    dataset: Any,
    sampler: Sampler,
    *,
    transform: Transform | None = None,
    collate: Collate = stack,
    seed: int | None = None,
    epochs: int | None = None,
    weights: str = "weights",
    num_workers: int = 0,
    prefetch: int | None = None,
    getitems: bool = False,
) -> Loader:
    """The batches of a dataset in the order of a sampler.

    While a row is read and transformed, the global generators of Python, NumPy and torch (on the CPU) are seeded from
    (seed, epoch, row). Afterwards they are restored. Augmentations that use them are the same for any number of workers
    and ranks, and after a resume. A collate function of your own draws by (seed, step) and place in the global batch.

    Args:
        dataset: A dict or tuple of arrays or tensors, an array, a list of rows, a ``torch.utils.data.Dataset`` or a
            Hugging Face ``Dataset``. It has ``dataset[i]`` and ``len``.
        sampler: For as many rows as the dataset has.
        transform: ``row -> row``, or ``(row, key) -> row`` with a key for `trainfn.random` instead of seeded
            generators.
        collate: ``rows -> batch``: `stack`, `pad_collate`, or your own, such as one of transformers.
        seed: The seed of the rows' randomness; by default the sampler's.
        epochs: When to end; by default never.
        weights: With ``last="pad"``, the field of the batch that holds the rows' weights, ``float32[batch]``. A
            tuple gets them as its last item.
        num_workers: Processes that make batches ahead of time, as torch's ``DataLoader`` has them; 0 for none.
        prefetch: Batches that each worker is ahead, 2 by default.
        getitems: Read a batch with one call of ``dataset.__getitems__``. Only for a dataset that draws no random
            numbers; it is the default where that is known.

    Raises:
        TypeError: If the dataset has no rows by number.
        ValueError: If the sampler is for another number of rows.

    >>> import torch, trainfn as tfn
    >>> rows = [{"x": float(i)} for i in range(5)]
    >>> jitter = lambda row: {"x": row["x"] + 0.1 * torch.rand(())}
    >>> batches = tfn.data.loader(rows, tfn.data.shuffled(5, 2, seed=0, last="pad"), transform=jitter)
    >>> torch.equal(batches(7)["x"], batches(7)["x"]), batches(2)["weights"].tolist()
    (True, [1.0, 0.0])
    """
    call = f"loader(num_workers={num_workers!r}, prefetch={prefetch!r}, epochs={epochs!r})"
    ahead = _workers.checked(call, num_workers, prefetch)
    if epochs is not None:
        epochs = natural(call, "epochs", epochs)
        if sampler.steps_per_epoch is None:
            raise ValueError(f"`{call}`: a {sampler.order.kind} has no epochs. Say how long in fit(..., until=1000).")
    size = len(source(dataset, getitems))
    if size != sampler.num_rows:
        raise ValueError(
            f"loader(dataset, sampler): the dataset has {size} rows and the sampler is for {sampler.num_rows}. Make the"
            f" sampler with {size} rows, or choose rows: `torch.utils.data.Subset(dataset,"
            f" range({min(size, sampler.num_rows)}))`."
        )
    seed = sampler.seed if seed is None else seeded(call, seed)
    return Loader(dataset, sampler, transform, collate, seed, epochs, weights, num_workers, ahead, getitems)
