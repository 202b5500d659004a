"""Where the rows of a draw are, and a warning where they seem to be elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from trainfn.errors import SplitWarning


def rows_first(shape: Sequence[int], at: int) -> tuple[int, ...]:
    """The shape with the dimension ``at`` moved to the front."""
    return (shape[at], *shape[:at], *shape[at + 1 :])


class Doubts:
    """Notices draws of a module whose rows seem not to be in dimension 0, and names the first one."""

    def __init__(self) -> None:
        self._told = False
        self._time_major: bool | None = None

    def see(self, module: nn.Module | None, shape: Sequence[int], rows: int) -> None:
        """Warn if a draw of this shape for so many rows seems to have them elsewhere."""
        if self._told or len(shape) < 2:
            return
        at = next((i for i, size in enumerate(shape) if size == rows and i), None) if rows > 1 else 1
        if at is None or (shape[0] % rows == 0 and not self._is_time_major(module, shape, rows)):
            return
        self._told = True
        warnings.warn(
            f"A random draw of shape {list(shape)} seems to have the batch's {rows} rows in dimension {at}. Draws are"
            " keyed by the rows in dimension 0, so this step depends on how a batch is split into micro-batches or over"
            f" ranks. Set `batch_first=True`, or write `with tfn.random.rows_at({at}):` around the call;"
            " `rows_at(None)` for a draw that has no rows.",
            SplitWarning,
            stacklevel=2,
        )

    def _is_time_major(self, module: nn.Module | None, shape: Sequence[int], rows: int) -> bool:
        """Whether rows may be in dimension 1, where dimension 0 fits too: the module has layers that put them there."""
        if len(shape) < 3 or shape[1] != rows or shape[0] == rows == 1 or module is None:
            return False
        if self._time_major is None:
            self._time_major = any(_batch_first(part) is False for part in module.modules())
        return self._time_major


def _batch_first(part: Any) -> bool | None:
    return part.batch_first if isinstance(part, nn.RNNBase | nn.MultiheadAttention) else None
