"""A leaf of a state that is filled from a checkpoint, whatever parts it is in there and here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainfn._checkpoint._format import DTYPES, Leaf, Piece
from trainfn._checkpoint._pieces import box_of, local
from trainfn._checkpoint._write import bytes_of
from trainfn._dtensor import spread_like


class Goal:
    """One leaf, or this rank's part of it.

    Args:
        leaf: What the checkpoint says of it.
        like: What it is to be like; of the same shape and dtype.
    """

    def __init__(self, leaf: Leaf, like: Tensor) -> None:
        self._like, self._dtype = like, DTYPES[leaf.dtype]
        self._box = box_of(like)
        self.parts = [part for part in leaf.parts if part.box == self._box or part.box.overlap(self._box)]
        self._direct = [part.box for part in self.parts] == [self._box]
        # Parts are read by several threads: each into its own place.
        self._value = torch.empty(() if self._direct else self._box.shape, dtype=self._dtype, device="cpu")

    def read(self, part: Piece, fill: Callable[[memoryview], None]) -> None:
        """Read a part that stands in a file; what is not of this rank's box is dropped."""
        value = torch.empty(part.shape, dtype=self._dtype, device="cpu")
        fill(bytes_of(value))
        if self._direct:
            self._value = self._placed(value)  # at once, so that host memory holds few leaves at a time
            return
        common = part.box.overlap(self._box)
        assert common is not None
        self._value[common.within(self._box)] = value[common.within(part.box)]

    @property
    def value(self) -> Tensor:
        """The leaf; only when all of its parts are read, and their files' checksums were right."""
        value = self._value if self._direct else self._placed(self._value)
        return spread_like(value, self._like)

    def _placed(self, value: Tensor) -> Tensor:
        like = local(self._like)
        place = torch.empty_like(like, device="meta")  # of `like` only its order of dimensions is kept, not its gaps
        if like.device.type == "cpu" and place.stride() == value.stride():
            return value
        return torch.empty_like(like).copy_(value)
