"""Declared shapes: a batch is padded to the next size that the step is compiled for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from trainfn import tree
from trainfn._types import Batch


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Sizes for one dimension of a batch, and what to pad with; so many sizes, so many compilations.

    Padding must not change the loss: pad targets with what it ignores, masks with 0.

    Args:
        sizes: The sizes, ascending.
        pad: Padding value by leaf name, as in ``{"input_ids": 0, "attention_mask": 0, "labels": -100}``; leaves that
            are not named are left alone.
        dim: The dimension.

    Raises:
        ValueError: If a batch is larger than the largest size, or has no leaf of a given name.

    >>> import torch
    >>> Buckets((4, 8), pad={"x": 0}).apply({"x": torch.ones(1, 3)})["x"]
    tensor([[1., 1., 1., 0.]])
    """

    sizes: Sequence[int]
    pad: Mapping[str, float]
    dim: int = 1

    def __post_init__(self) -> None:
        if not self.sizes or list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(
                f"Buckets(sizes={self.sizes!r}): a batch is padded to the next size, so sizes ascend, and there is at"
                " least one. Write `Buckets((64, 128), pad=...)`."
            )

    def apply(self, batch: Batch) -> Batch:
        """Pad a batch to the smallest size that holds it."""
        named = tree.named_leaves(batch)
        missing = sorted(set(self.pad) - set(named))
        if missing:
            raise ValueError(
                f"Buckets(pad=...) names {missing}, and the batch has {sorted(named)}: only a leaf of the batch can be"
                " padded. Leave the other names out of `pad`."
            )
        longest = max(named[name].shape[self.dim] for name in self.pad)
        size = next((size for size in self.sizes if size >= longest), None)
        if size is None:
            raise ValueError(
                f"Buckets(sizes={list(self.sizes)}): a batch of size {longest} in dimension {self.dim} fits no bucket."
                f" Write `Buckets({(*self.sizes, longest)}, ...)`, or cut the batch."
            )
        padded = {name: self._padded(named[name], size, value) for name, value in self.pad.items()}
        return tree.with_leaves(batch, {**named, **padded})

    def _padded(self, x: Tensor, size: int, value: float) -> Tensor:
        dims = x.dim() - self.dim if self.dim >= 0 else -self.dim
        return F.pad(x, [0, 0] * (dims - 1) + [0, size - x.shape[self.dim]], value=value)
