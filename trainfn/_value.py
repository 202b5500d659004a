"""A state as a value: compare two, hash one, fork one."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainfn import random, tree
from trainfn._dtensor import full
from trainfn._types import TrainState, Tree


class Difference(NamedTuple):
    """How a leaf of one tree differs from that of another.

    Attributes:
        what: The difference in words.
        largest: The largest absolute difference of an element, where both have the same shape.
        relative: ``largest`` divided by the largest element of the first.
    """

    what: str
    largest: float | None = None
    relative: float | None = None


class Diff(Mapping[str, Difference]):
    """The leaves in which two trees differ, by path; empty, and so false, if they are the same to the bit."""

    def __init__(self, differences: Mapping[str, Difference], leaves: int) -> None:
        self._differences, self.leaves = dict(differences), leaves

    def __getitem__(self, name: str) -> Difference:
        return self._differences[name]

    def __iter__(self) -> Any:
        return iter(self._differences)

    def __len__(self) -> int:
        return len(self._differences)

    def __repr__(self) -> str:
        if not self:
            return f"the same to the bit ({self.leaves} leaves)"
        width = max(map(len, self))
        lines = [f"  {name:<{width}}  {difference.what}" for name, difference in self.items()]
        return "\n".join([f"{len(self)} of {self.leaves} leaves differ", *lines])

    def _repr_html_(self) -> str:
        """A table, in a notebook."""
        if not self:
            return html.escape(repr(self))
        rows = "".join(
            f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(difference.what)}</td></tr>"
            for name, difference in self.items()
        )
        return f"{len(self)} of {self.leaves} leaves differ<table>{rows}</table>"


def diff(a: Tree, b: Tree) -> Diff:
    """Return the leaves in which two states, or two trees, differ in any bit.

    Sharded leaves are gathered, one at a time; then every rank calls this.

    >>> import torch, trainfn as tfn
    >>> state = tfn.init({"w": torch.ones(2)}, tfn.optim.sgd(0.1))
    >>> diff(state, state._replace(params={"w": torch.tensor([1.0, 3.0])}))
    1 of 3 leaves differ
      params/w  1 of 2 elements, by up to 2 (2 of the largest)
    """
    left, right = tree.named_leaves(a), tree.named_leaves(b)
    found: dict[str, Difference] = {}
    for name in {**left, **right}:
        if name not in right:
            found[name] = Difference("only in the first")
        elif name not in left:
            found[name] = Difference("only in the second")
        else:
            difference = _difference(full(left[name]), full(right[name]))
            if difference is not None:
                found[name] = difference
    return Diff(found, len({**left, **right}))


def _difference(x: Any, y: Any) -> Difference | None:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return None if type(x) is type(y) and not isinstance(x, Tensor) and x == y else Difference(f"{x!r} and {y!r}")
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return Difference(f"{_kind(x)} and {_kind(y)}")
    y = y.to(x.device)
    if _bytes(x) == _bytes(y):
        return None
    if not (x.is_floating_point() or x.is_complex()) and x.numel() == 1:
        return Difference(f"{x.item()} and {y.item()}", float(abs(x.item() - y.item())))
    gap = torch.where(x == y, 0.0, (x.double() - y.double()).abs().nan_to_num(nan=float("inf")))
    largest, scale = float(gap.max()), float(torch.where(x.isfinite(), x.double(), 0.0).abs().max())
    count = int((gap > 0).sum())
    if count == 0:
        return Difference("equal, but not in its bits (the sign of a zero, or the kind of a NaN)", 0.0, 0.0)
    relative = largest / scale if scale > 0 else float("inf")
    return Difference(
        f"{count} of {x.numel()} elements, by up to {largest:.3g} ({relative:.3g} of the largest)", largest, relative
    )


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


class Digest(NamedTuple):
    """Fingerprints of a tree.

    Attributes:
        total: The fingerprint of all leaves, whatever their order.
        leaves: The fingerprint of each leaf, by path.
    """

    total: str
    leaves: dict[str, str]

    def __repr__(self) -> str:
        return f"Digest({self.total[:16]}…, {len(self.leaves)} leaves)"


def digest(state: Tree) -> Digest:
    """Return fingerprints of a state, or of any tree of tensors: BLAKE2b of each leaf's dtype, shape and bytes.

    Two states with equal totals are the same to the bit. A fingerprint does not depend on the machine, the device or
    the layout over ranks. Every rank calls this for a sharded state, whose leaves are gathered one at a time.

    >>> import torch, trainfn as tfn
    >>> one, other = {"a": torch.ones(2), "b": torch.zeros(1)}, {"b": torch.zeros(1), "a": torch.ones(2)}
    >>> digest(one) == digest(other)
    True
    """
    leaves = {name: _hash(full(leaf)) for name, leaf in sorted(tree.named_leaves(state).items())}
    joined = "\n".join(f"{name} {value}" for name, value in leaves.items())
    return Digest(hashlib.blake2b(joined.encode(), digest_size=16).hexdigest(), leaves)


def _hash(leaf: Any) -> str:
    made = hashlib.blake2b(digest_size=16)
    made.update((_kind(leaf) if isinstance(leaf, Tensor) else type(leaf).__name__).encode())
    made.update(_bytes(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode())
    return made.hexdigest()


def fork(state: TrainState, name: int = 0) -> TrainState:
    """Return an independent copy of a state with another key: a second run from the same point.

    Args:
        state: It is not changed, and a donating step of one run can't overwrite the other.
        name: A number of the fork; forks of equal numbers have equal keys.

    >>> import torch, trainfn as tfn
    >>> state = tfn.init({"w": torch.ones(2)}, tfn.optim.sgd(0.1))
    >>> list(diff(state, fork(state, 1)))
    ['key']
    """
    return tree.copy(state)._replace(key=random.fold_in(state.key, name))
