"""What an `SFTTrainer` keeps to itself."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

import trainfn as tfn
from trainfn.hf._types import TrainerLike

if TYPE_CHECKING:  # the files that define these import this one
    from trainfn.hf._sft._config import SFTConfig
    from trainfn.hf._sft._data import Preparation


@dataclasses.dataclass(eq=False)
class SFTRecord:
    """What is private on an `SFTTrainer`, all under the one name ``_trainfn_sft``.

    Attributes:
        prepare: Makes rows of tokens of a dataset.
        separation: How the model keeps the sequences of a pack apart: by ``"positions"`` or a ``"mask"``.
        evaluated: The loss's own metrics, of the evaluation that is under way.
    """

    prepare: Preparation
    separation: str | None = None
    evaluated: dict[str, tfn.Mean] | None = None


class SFTLike(TrainerLike, Protocol):
    """An `SFTTrainer`, to the functions that do its work."""

    _trainfn_sft: SFTRecord

    @property
    def args(self) -> SFTConfig: ...
