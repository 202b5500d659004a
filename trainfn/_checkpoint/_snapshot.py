"""A copy of a state in host memory, for a write that goes on while the state is trained further."""

from __future__ import annotations

import torch
from torch import Tensor


class Snapshot:
    """Host memory of the size of a state, kept from one save to the next.

    Copying into memory that is there already is one pass over the values. New memory takes several times as long: the
    system hands it out page by page.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """The leaves' values as they are now. Waits for the device; valid until the next call."""
        self._held = {name: _place(self._held.get(name), leaf) for name, leaf in leaves.items()}
        for name, leaf in leaves.items():
            self._held[name].copy_(leaf.detach(), non_blocking=True)
        for device in {leaf.device for leaf in leaves.values() if leaf.device.type != "cpu"}:
            torch.accelerator.synchronize(device)
        return self._held


def _place(held: Tensor | None, leaf: Tensor) -> Tensor:
    if held is not None and held.shape == leaf.shape and held.dtype == leaf.dtype:
        return held
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu", pin_memory=leaf.is_cuda)
