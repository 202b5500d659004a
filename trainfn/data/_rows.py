"""Reading rows: from columns, lists, torch's and Hugging Face's datasets."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from trainfn import tree
from trainfn._types import Batch
from trainfn.data._bits import Ints
from trainfn.data._sampler import named


class Source(Protocol):
    """Rows by number."""

    @property
    def draws(self) -> bool:
        """Whether reading a row may draw random numbers; then rows are read one by one, each with its own."""
        ...

    def __len__(self) -> int:
        """The number of rows."""
        ...

    def rows(self, indices: Ints) -> Sequence[Any]:
        """These rows."""
        ...


class Columns:
    """A tree of arrays or tensors of one length; row i is item i of each."""

    draws = False

    def __init__(self, columns: Batch) -> None:
        leaves = tree.named_leaves(columns)
        for name, x in leaves.items():
            if not isinstance(x, Tensor | np.ndarray) or x.ndim == 0 or (x.dtype == object):
                raise TypeError(
                    f"loader(dataset): a mapping holds the columns, arrays or tensors of one item per row, and"
                    f" {name or 'this'!r} is {_kind(x)}. Write np.asarray(column), a list of dicts, or choose a split:"
                    ' dataset["train"].'
                )
        sizes = {name: len(x) for name, x in leaves.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"loader(dataset): the columns must have the same number of rows, and have {sizes}.")
        self.columns, self.size = columns, next(iter(sizes.values()))

    def __len__(self) -> int:
        return self.size

    def batch(self, indices: Ints) -> Batch:
        """These rows at once, as a copy."""
        at = torch.from_numpy(indices)
        return tree.map(lambda x: x[at] if isinstance(x, Tensor) else torch.from_numpy(np.asarray(x[indices])),
                        self.columns)  # fmt: skip

    def rows(self, indices: Ints) -> Sequence[Any]:
        """See `Source`; of a copy, so that a transform may write into its row."""
        batch = self.batch(indices)
        return [tree.map(lambda x, i=i: x[i], batch) for i in range(len(indices))]


def _kind(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if isinstance(x, np.ndarray | Tensor) else f"of type {type(x).__name__}"


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """Anything with ``dataset[i]``; many rows in one call of ``__getitems__`` if asked to."""

    dataset: Any
    getitems: bool
    draws: bool

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, indices: Ints) -> Sequence[Any]:
        """See `Source`."""
        if self.getitems:
            return self.dataset.__getitems__(indices.tolist())
        read = [self.dataset[i] for i in indices.tolist()]
        # The rows of a list are the dataset itself: a transform that sets a field must not set it for the next epoch.
        return [dict(row) if type(row) is dict else row for row in read]


def source(dataset: Any, getitems: bool = False) -> Source:
    """The dataset as a `Source`.

    Rows are read one by one where reading may draw random numbers, so that they don't depend on their neighbours. That
    is the case for datasets of unknown classes, and for Hugging Face datasets with a transform. The others are read in
    one go.
    """
    if isinstance(dataset, Items | Columns | Concat):
        return dataset
    if type(dataset) is TensorDataset:
        return Columns(dataset.tensors)
    if isinstance(dataset, Mapping | np.ndarray | Tensor):
        return Columns(dict(dataset) if isinstance(dataset, Mapping) else dataset)
    if isinstance(dataset, tuple) and dataset and all(isinstance(x, np.ndarray | Tensor) for x in dataset):
        return Columns(dataset)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"loader(dataset, sampler): a {type(dataset).__name__} has no rows by number (`dataset[i]` and"
            " `len(dataset)`). Use tfn.data.stream(dataset, batch_size) for what can only be iterated."
        )
    if getitems and not hasattr(dataset, "__getitems__"):
        raise TypeError(f"loader(getitems=True): a {type(dataset).__name__} has no `__getitems__`; leave it out.")
    if isinstance(dataset, list | tuple):
        return Items(dataset, getitems=False, draws=False)
    plain = is_huggingface(dataset) and dataset.format["type"] != "custom"
    return Items(dataset, getitems=getitems or plain, draws=not (getitems or plain))


def is_huggingface(dataset: Any) -> bool:
    """Whether it is of the library `datasets`, which is not imported to find out."""
    return any(cls.__module__.split(".")[0] == "datasets" for cls in type(dataset).__mro__)


class Concat:
    """Several datasets as one; made by `concat`."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.draws = any(source.draws for source in sources)
        self.ends = list(itertools.accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> Any:
        return self.rows(np.array([range(len(self))[i]]))[0]

    def rows(self, indices: Ints) -> Sequence[Any]:
        """See `Source`."""
        which = [bisect.bisect_right(self.ends, i) for i in indices.tolist()]
        out: list[Any] = [None] * len(indices)
        for k in sorted(set(which)):
            places = [place for place, w in enumerate(which) if w == k]
            first = self.ends[k] - len(self.sources[k])
            for place, row in zip(places, self.sources[k].rows(indices[places] - first), strict=True):
                out[place] = row
        return out


def concat(*datasets: Any) -> Concat:
    """Datasets put one behind the other, of any kinds that a `loader` takes: what a `mixture` is read from.

    Raises:
        TypeError: If one of them has no rows by number.

    >>> both = concat([{"x": 1}, {"x": 2}], {"x": np.array([10, 20])})
    >>> len(both), both[0]["x"], int(both[3]["x"])
    (4, 1, 20)
    """
    if not datasets:
        raise TypeError("concat() takes one dataset or more: concat(code, text).")
    return Concat([source(dataset) for dataset in datasets])


def describe_dataset(dataset: Any) -> dict[str, Any]:
    """Its type and number of rows, and the fingerprint of a Hugging Face dataset."""
    out = {"type": named(type(dataset)), "rows": len(source(dataset))}
    fingerprint = getattr(dataset, "_fingerprint", None)
    return out if fingerprint is None else {**out, "fingerprint": str(fingerprint)}
