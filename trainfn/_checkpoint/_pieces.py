"""Parts of a leaf, on ranks and in files: each is a box of the leaf's index space."""

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
    """A rectangular part of a leaf."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    def overlap(self, other: Box) -> Box | None:
        """The box of the values in both; None if there are none."""
        begins = [max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True)]
        ends = [
            min(a + n, b + m)
            for a, n, b, m in zip(self.offsets, self.shape, other.offsets, other.shape, strict=True)
        ]  # fmt: skip
        if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
            return None
        return Box(tuple(begins), tuple(end - begin for begin, end in zip(begins, ends, strict=True)))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """The slices of this box in a tensor that holds the box ``outer``."""
        places = zip(self.offsets, self.shape, outer.offsets, strict=True)
        return tuple(slice(begin - first, begin - first + size) for begin, size, first in places)


def whole_box(shape: Sequence[int]) -> Box:
    """The box of a full leaf."""
    return Box((0,) * len(shape), tuple(shape))


def is_split(leaf: Any) -> bool:
    """Whether no rank holds the full leaf; False for a leaf without values, which needs no pieces."""
    return _dtensor.is_split(leaf) and leaf.numel() > 0


def local(leaf: Any) -> Tensor:
    """This rank's part of a leaf."""
    with torch.no_grad():  # with a derivative, `to_local` of a leaf that is still being gathered would not wait for it
        return _dtensor.local(leaf)


def full(leaf: Any) -> Tensor:
    """The full leaf, gathered. Every rank calls this."""
    with torch.no_grad():
        return _dtensor.full(leaf)


def box_of(leaf: Any) -> Box:
    """The part of a leaf that this rank holds."""
    if not is_distributed(leaf):
        return whole_box(leaf.shape)
    return _boxes(*_layout(leaf))[leaf.device_mesh.mesh.flatten().tolist().index(_rank())]


def holders(leaf: Any) -> dict[Box, tuple[int, ...]]:
    """The parts of a split leaf that are not empty, and the ranks that hold each."""
    return _holders(*_layout(leaf), tuple(leaf.device_mesh.mesh.flatten().tolist()))


def _layout(leaf: Any) -> tuple[tuple[int, ...], tuple[int | None, ...], tuple[int, ...]]:
    dims = tuple(p.dim if p.is_shard() else None for p in leaf.placements)
    return tuple(leaf.shape), dims, tuple(leaf.device_mesh.mesh.shape)


def _rank() -> int:
    from torch import distributed

    return distributed.get_rank()


@functools.lru_cache(maxsize=10_000)
def _boxes(shape: tuple[int, ...], dims: tuple[int | None, ...], sizes: tuple[int, ...]) -> tuple[Box, ...]:
    """The part of each place in a mesh, in row-major order of the places."""
    return tuple(_box(shape, dims, sizes, place) for place in itertools.product(*map(range, sizes)))


def _box(shape: Sequence[int], dims: Sequence[int | None], sizes: Sequence[int], place: Sequence[int]) -> Box:
    """The part of one place, as `DTensor` splits: equal parts, rounded up; the last ones get less, or nothing."""
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
    """Check that boxes are the cells of a grid over a leaf, so that every value is in exactly one of them.

    Every split by a mesh is such a grid. The check takes one pass, however many cells an untrusted manifest lists.

    Raises:
        ValueError: If they are not; the text continues "the pieces of a leaf ...".
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


def bytes_of(value: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    flat = value.as_strided((value.numel(),), (1,))  # `reshape(-1)` would keep any stride of a dimension of size 1
    return flat.view(torch.uint8).numpy().data
