"""The private record of an `SFTTrainer`."""

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
    """The private attributes of an `SFTTrainer`, all under the one name ``_trainfn_sft``.

    Attributes:
        prepare: The function that turns a dataset into rows of tokens.
        separation: The way in which the model separates the sequences of a pack: ``"positions"`` or a ``"mask"``.
        auxiliary: The coefficient of the load-balancing loss of a mixture of experts.
        evaluated: The loss's own metrics in the present evaluation; None outside of one.
    """

    prepare: Preparation
    separation: str | None = None
    auxiliary: float = 0.0
    evaluated: dict[str, tfn.Mean] | None = None


class SFTLike(TrainerLike, Protocol):
    """The part of an `SFTTrainer` that its functions use."""

    _trainfn_sft: SFTRecord

    @property
    def args(self) -> SFTConfig: ...
