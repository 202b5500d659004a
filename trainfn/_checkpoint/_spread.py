"""Which rank writes what, so that all write at once: each part of a leaf once, by one of the ranks that have it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from trainfn._checkpoint._format import Piece
from trainfn._checkpoint._pieces import holders


def spread(
    split: Mapping[str, Tensor], leaves: Mapping[str, Tensor], places: Mapping[str, str], ranks: int
) -> tuple[dict[str, tuple[Piece, ...]], dict[str, int]]:
    """The pieces of each leaf that is split, and the rank that writes each file.

    Every rank finds the same without asking the others: the next one to write is always one with the least to write.
    """
    load = [0] * ranks
    pieces: dict[str, tuple[Piece, ...]] = {}
    writers: dict[str, int] = {}
    for name, leaf in split.items():
        found: list[Piece] = []
        for box, having in holders(leaf).items():
            rank = min(having, key=lambda r: (load[r], r))
            load[rank] += box.numel * leaf.dtype.itemsize
            found.append(Piece(f"rank-{rank}-of-{ranks}.safetensors", box.offsets, box.shape))
            writers[found[-1].file] = rank
        pieces[name] = tuple(found)
    sizes: dict[str, int] = {}
    for name, file in places.items():
        if file:
            sizes[file] = sizes.get(file, 0) + leaves[name].numel() * leaves[name].dtype.itemsize
    for file, size in sizes.items():  # what is whole on every rank, any rank can write
        rank = min(range(ranks), key=lambda r: (load[r], r))
        load[rank] += size
        writers[file] = rank
    return pieces, writers
