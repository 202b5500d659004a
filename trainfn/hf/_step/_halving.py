"""Smaller micro-batches for a device without enough memory. The update is the same for every split."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.utils import logging

import trainfn as tfn
from trainfn.hf._types import Batch

logger = logging.get_logger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the allocator of the CPU, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and any(part in str(error) for part in ("out of memory", "can't allocate memory"))
    )


class Halving:
    """A step that halves its micro-batches until they fit into memory.

    Memory runs out while gradients are computed, which changes no state, so a failed step can be repeated.

    Args:
        step: A step over a list of micro-batches.
    """

    def __init__(self, step: Callable[..., tuple[tfn.TrainState, tfn.Metrics]]) -> None:
        self.step, self.pieces = step, 1

    def __call__(self, state: tfn.TrainState, window: list[Batch]) -> tuple[tfn.TrainState, tfn.Metrics]:
        """Make a step, in as many pieces as the memory needs."""
        while True:
            try:
                return self.step(state, self._cut(window))
            except Exception as error:
                if not is_out_of_memory(error) or all(_rows(micro) <= self.pieces for micro in window):
                    raise
            # Not inside the handler: there the error's traceback still holds the memory of the failed step.
            self.pieces *= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.warning(
                f"Out of memory: every micro-batch is cut into {self.pieces} pieces. The updates stay the same."
            )

    def _cut(self, window: list[Batch]) -> list[Batch]:
        if self.pieces == 1:
            return window
        return [piece for micro in window for piece, _ in tfn.tree.split(micro, min(self.pieces, _rows(micro)))]


def _rows(micro: Batch) -> int:
    return tfn.tree.row_count(micro)
