"""A sampler: which rows a step sees, as a function of the step's number.

An `Order` says which row stands in which slot of which epoch. A `Sampler` cuts the slots into batches and decides how
an epoch ends. Both are frozen data: a step in the past or in the future is asked for like any other.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import operator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt

from trainfn import random
from trainfn.data._bits import Ints

if TYPE_CHECKING:
    from trainfn.data._packing import Packing

Last = Literal["drop", "pad", "short"]
MAX_ROWS = 2**62  # the pairs of a Feistel network over more would not fit into 64 bits


class Rows(NamedTuple):
    """The rows of one batch, all of length ``[batch]``.

    Attributes:
        indices: Rows of the dataset, ``int64``.
        weights: 1, or 0 where a row only fills the batch, ``float32``.
        visits: How often each row came before, ``int64``: the epoch, or for draws with replacement the number of
            the draw. A row's own randomness is keyed by (seed, visit, row).

    >>> Rows(np.array([3]), np.ones(1, np.float32), np.array([0])).indices.tolist()
    [3]
    """

    indices: Ints
    weights: npt.NDArray[np.float32]
    visits: Ints

    def part(self, of: slice) -> Rows:
        """Some of the rows, in order."""
        return Rows(self.indices[of], self.weights[of], self.visits[of])


class Order(Protocol):
    """The order of the rows: a frozen dataclass of numbers and arrays that knows which row stands in which slot.

    Attributes:
        kind: The name of the factory that makes it.
        mixable: Whether any of its slots may be taken alone; not so where whole batches are arranged.
    """

    kind: ClassVar[str]
    mixable: ClassVar[bool]

    @property
    def num_rows(self) -> int:
        """The rows of the dataset it is an order of."""
        ...

    @property
    def size(self) -> int | None:
        """Slots in an epoch; None if there are no epochs."""
        ...

    @property
    def seed(self) -> int:
        """Where its randomness comes from."""
        ...

    def at(self, epoch: int, slots: Ints) -> tuple[Ints, Ints]:
        """The rows and their visits in these slots of an epoch; row -1 where a slot is empty."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A function from a step to its rows; `shuffled`, `mixture` and the other factories of `trainfn.data` make it.

    Attributes:
        order: The row in each slot of an epoch.
        batch_size: Rows of a whole (global) batch, whatever the number of ranks.
        last: How the last rows of an epoch are used, when they don't fill a batch: ``"drop"``; ``"pad"`` fills
            the batch with rows of weight 0; ``"short"`` makes a smaller batch.
        packing: What `packed` adds: the rows that each of the sampler's "rows" consists of.

    >>> import trainfn as tfn
    >>> sampler = tfn.data.shuffled(10, 4, seed=0, last="pad")
    >>> sampler.steps_per_epoch, sampler.epoch(5), len(sampler.indices(10_000_000))
    (3, 1, 4)
    >>> sampler.weights(2).tolist()
    [1.0, 1.0, 0.0, 0.0]
    """

    order: Order
    batch_size: int
    last: Last = "drop"
    packing: Packing | None = None

    def __post_init__(self) -> None:
        call = f"{self.order.kind}(batch_size={self.batch_size!r}, last={self.last!r})"
        object.__setattr__(self, "batch_size", natural(call, "batch_size", self.batch_size))  # an int for JSON
        if self.last not in get_args(Last):
            raise ValueError(f'`{call}`: the end of an epoch is handled by last="drop", "pad" or "short".')
        if self.steps_per_epoch == 0:
            raise ValueError(
                f'`{call}` drops every row: an epoch has {self.order.size}, fewer than a batch. Use last="pad", which'
                " fills the batch with rows of weight 0, or a smaller batch_size."
            )

    @property
    def num_rows(self) -> int:
        """The rows of the dataset that the sampler is for."""
        return self.order.num_rows if self.packing is None else len(self.packing.rows)

    @property
    def seed(self) -> int:
        """The seed of the order; 0 for `sequential`."""
        return self.order.seed

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches in an epoch; None for a sampler without epochs."""
        if self.order.size is None:
            return None
        return self.order.size // self.batch_size if self.last == "drop" else -(-self.order.size // self.batch_size)

    def epoch(self, step: int) -> int:
        """The epoch that a step is in; 0 for a sampler without epochs."""
        return self._place(step)[0]

    def indices(self, step: int) -> Ints:
        """The rows of the dataset in the global batch of a step, ``int64[batch_size]``."""
        return self.rows(step).indices

    def weights(self, step: int) -> npt.NDArray[np.float32]:
        """The weight of each row of a step, 1 or 0, ``float32[batch_size]``."""
        return self.rows(step).weights

    def rows(self, step: int) -> Rows:
        """The rows, weights and visits of a step, in time that depends on the batch size only."""
        epoch, first = self._place(step)
        slots = first + np.arange(self.batch_size, dtype=np.int64)
        if self.order.size is not None:
            slots = slots[slots < self.order.size]
        indices, visits = self.order.at(epoch, slots)
        taken = indices >= 0
        return filled(indices[taken], visits[taken], self.batch_size if self.last == "pad" else int(taken.sum()))

    def describe(self) -> dict[str, Any]:
        """The description of the sampler, for JSON: arrays as digests. Equal descriptions mean equal batches."""
        out = {**described(self.order), "batch_size": self.batch_size, "last": self.last}
        return out if self.packing is None else {**out, "packing": described(self.packing)}

    def _place(self, step: int) -> tuple[int, int]:
        """The epoch of a step and the step's first slot there."""
        step = natural("sampler.indices(step)", "step", step, least=0)
        epoch, step = (0, step) if self.steps_per_epoch is None else divmod(step, self.steps_per_epoch)
        return epoch, step * self.batch_size


def filled(indices: Ints, visits: Ints, size: int) -> Rows:
    """The rows, and again from the first with weight 0 until there are ``size``."""
    weights = (np.arange(size) < len(indices)).astype(np.float32)
    return Rows(np.resize(indices, size), weights, np.resize(visits, size))


def described(value: Any) -> Any:
    """A frozen dataclass as JSON-able data, arrays by shape and digest."""
    if isinstance(value, np.ndarray):
        digest = hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()[:16]
        return f"{value.dtype}{list(value.shape)} {digest}"
    if isinstance(value, Sampler):
        return value.describe()
    if isinstance(value, tuple):
        return [described(item) for item in value]
    if isinstance(value, functools.partial):
        return {"kind": named(value), **{name: described(x) for name, x in value.keywords.items()}}
    if isinstance(value, dict):
        return {str(name): described(x) for name, x in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = getattr(value, "kind", type(value).__qualname__)
        return {"kind": kind, **{f.name: described(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    return value if isinstance(value, int | float | str | None) else named(value)


def named(value: Any) -> str | None:
    """A function by its name, anything else by its type's."""
    if value is None:
        return None
    value = getattr(value, "func", value)  # of a functools.partial
    owner = value if hasattr(value, "__qualname__") else type(value)
    return f"{owner.__module__}.{owner.__qualname__}"


def natural(call: str, name: str, value: Any, *, least: int = 1) -> int:
    """The value as a Python int, if it is one and at least ``least``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"`{call}`: {name}={value!r} is not a whole number; write {name}=int({name}).") from None
    if isinstance(value, bool) or number < least:
        raise ValueError(f"`{call}`: {name}={value!r} is not {least} or more.")
    if number > MAX_ROWS:
        raise ValueError(f"`{call}`: {name}={value!r} is more than 2**62, and would overflow 64 bits.")
    return number


def seeded(call: str, seed: Any) -> int:
    """The seed as a Python int, if it is one of 64 bits."""
    try:
        seed = operator.index(seed)
    except TypeError:
        raise TypeError(f"`{call}`: seed={seed!r} is not a whole number; write seed=0.") from None
    random._signed(seed)  # for its error
    return seed


def column(call: str, name: str, values: Any, dtype: type[Any]) -> npt.NDArray[Any]:
    """One number per row as a read-only array of our own."""
    array = np.asarray(values)
    if array.ndim != 1 or len(array) == 0 or array.dtype.kind not in ("iu" if dtype is np.int64 else "iuf"):
        raise ValueError(
            f"`{call}`: {name} must hold one {'whole ' if dtype is np.int64 else ''}number per row, and is"
            f" {array.dtype}{list(array.shape)}. Write np.array([... for row in dataset])."
        )
    array = array.astype(dtype)
    array.flags.writeable = False
    return array
