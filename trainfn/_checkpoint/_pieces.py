"""Which part of a leaf is where: boxes in it, on ranks and in files."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainfn import _dtensor
from trainfn._dtensor import is_distributed


class Box(NamedTuple):
    """A part of a leaf."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many values."""
        return math.prod(self.shape)

    def overlap(self, other: Box) -> Box | None:
        """What is in both."""
        begins = [max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True)]
        ends = [
            min(a + n, b + m)
            for a, n, b, m in zip(self.offsets, self.shape, other.offsets, other.shape, strict=True)
        ]  # fmt: skip
        if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
            return None
        return Box(tuple(begins), tuple(end - begin for begin, end in zip(begins, ends, strict=True)))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Where this is in a tensor of the values of ``outer``."""
        places = zip(self.offsets, self.shape, outer.offsets, strict=True)
        return tuple(slice(begin - first, begin - first + size) for begin, size, first in places)


def whole_box(shape: Sequence[int]) -> Box:
    """All of a leaf."""
    return Box((0,) * len(shape), tuple(shape))


def is_split(leaf: Any) -> bool:
    """Whether no rank has all of it. A leaf without values is not: there is nothing to split."""
    return _dtensor.is_split(leaf) and leaf.numel() > 0


def local(leaf: Any) -> Tensor:
    """This rank's part of it."""
    with torch.no_grad():  # so that one that is still on its way here is waited for
        return _dtensor.local(leaf)


def full(leaf: Any) -> Tensor:
    """All of it. Every rank calls this."""
    with torch.no_grad():
        return _dtensor.full(leaf)


def box_of(leaf: Any) -> Box:
    """Which part this rank has."""
    if not is_distributed(leaf):
        return whole_box(leaf.shape)
    return _boxes(*_layout(leaf))[leaf.device_mesh.mesh.flatten().tolist().index(_rank())]


def holders(leaf: Any) -> dict[Box, tuple[int, ...]]:
    """The parts of a split leaf that are not empty, and the ranks that have each."""
    return _holders(*_layout(leaf), tuple(leaf.device_mesh.mesh.flatten().tolist()))


def _layout(leaf: Any) -> tuple[tuple[int, ...], tuple[int | None, ...], tuple[int, ...]]:
    dims = tuple(p.dim if p.is_shard() else None for p in leaf.placements)
    return tuple(leaf.shape), dims, tuple(leaf.device_mesh.mesh.shape)


def _rank() -> int:
    from torch import distributed

    return distributed.get_rank()


@functools.lru_cache(maxsize=10_000)
def _boxes(shape: tuple[int, ...], dims: tuple[int | None, ...], sizes: tuple[int, ...]) -> tuple[Box, ...]:
    """The part of each place in a mesh, the last axis counting fastest."""
    return tuple(_box(shape, dims, sizes, place) for place in itertools.product(*map(range, sizes)))


def _box(shape: Sequence[int], dims: Sequence[int | None], sizes: Sequence[int], place: Sequence[int]) -> Box:
    """As `DTensor` has it: along each axis of the mesh, equal parts, rounded up; the last ones get less, or nothing."""
    offsets, size = [0] * len(shape), list(shape)
    for dim, ranks, at in zip(dims, sizes, place, strict=True):
        if dim is not None:
            part = -(-size[dim] // ranks)
            first = min(at * part, size[dim])
            offsets[dim], size[dim] = offsets[dim] + first, min(part, size[dim] - first)
    return Box(tuple(offsets), tuple(size))


@functools.lru_cache(maxsize=10_000)
def _holders(
    shape: tuple[int, ...], dims: tuple[int | None, ...], sizes: tuple[int, ...], ranks: tuple[int, ...]
) -> dict[Box, tuple[int, ...]]:
    found: dict[Box, tuple[int, ...]] = {}
    for rank, box in zip(ranks, _boxes(shape, dims, sizes), strict=True):
        if box.numel:
            found[box] = (*found.get(box, ()), rank)
    return found


def check_grid(shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """Raise unless these are the cells of a grid over a leaf: every value is in exactly one of them.

    Whatever a mesh splits is such a grid, and a grid is checked in one pass, however many cells it says it has.

    Raises:
        ValueError: That says what is wrong.
    """
    cells = 1
    for dim, size in enumerate(shape):
        cuts = sorted({(box.offsets[dim], box.shape[dim]) for box in boxes})
        end = 0
        for begin, length in cuts:
            if length < 1 or begin != end:
                raise ValueError("overlap, or leave a gap" if length > 0 else "are empty")
            end = begin + length
        if end != size:
            raise ValueError("do not end where it does")
        cells *= len(cuts)
    if len(boxes) != cells or len(set(boxes)) != cells:
        raise ValueError("are not each part of it once")
