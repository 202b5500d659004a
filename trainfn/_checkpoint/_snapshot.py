"""The values of a state before they are written: copied to host memory, or gathered over ranks one leaf at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from trainfn._checkpoint._pieces import full


class Snapshot:
    """Host memory of the size of a state, kept from one save to the next.

    A copy into memory that exists is one pass over the values. New memory takes several times as long, because the
    system provides it page by page.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the values of the leaves. Waits for the device; the copies are valid until the next call."""
        held: dict[str, Tensor] = {}
        devices: set[torch.device] = set()
        for name in leaves:
            leaf = leaves[name]
            held[name] = _place(self._held.get(name), leaf).copy_(leaf.detach(), non_blocking=True)
            devices.add(leaf.device)
        for device in devices:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        self._held = held
        return held


def _place(held: Tensor | None, leaf: Tensor) -> Tensor:
    if held is not None and held.shape == leaf.shape and held.dtype == leaf.dtype:
        return held
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu", pin_memory=leaf.is_cuda)


class Gathered(Mapping[str, Tensor]):
    """Leaves that are split over ranks, each gathered when it is read.

    Each read is a collective, so every rank reads all leaves in the same ``order``. One leaf at a time is gathered, so
    that a rank needs memory for its part and one full leaf, not for the full state.
    """

    def __init__(self, leaves: Mapping[str, Tensor], order: Sequence[str]) -> None:
        self._leaves, self._order, self._left = leaves, order, iter(order)

    def __getitem__(self, name: str) -> Tensor:
        following = next(self._left)
        assert following == name, (following, name)
        return full(self._leaves[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def drain(self) -> None:
        """Gather the leaves that were not read here: other ranks wait for this rank's part of them."""
        for name in self._left:
            full(self._leaves[name])
