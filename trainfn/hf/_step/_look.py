"""A trial of the loss before the first steps of a run."""

from __future__ import annotations

import trainfn as tfn
from trainfn.hf._parallel import _parameters
from trainfn.hf._step._additive import examine, share_findings
from trainfn.hf._step._counting import find_shift, may_shift
from trainfn.hf._types import Batch, TrainerLike


class Look:
    """A trial of the loss on the first rows: whether it shifts labels, and what it is divided by."""

    def __init__(self, trainer: TrainerLike) -> None:
        self.trainer, self.known = trainer, False
        alone = trainer.args.gradient_accumulation_steps == 1 and trainer._trainfn.world.plan is None
        self.splits = not alone

    def __call__(self, window: list[Batch]) -> None:
        """Try the loss on the first micro-batches, if anything is unknown yet; all ranks call this."""
        trainer = self.trainer
        record, world = trainer._trainfn, trainer._trainfn.world
        if self.known and (record.examined or not self.splits):
            return
        with _parameters.whole(trainer):
            if not tfn.data.is_empty(window[0]):
                find_shift(trainer, window[0])
                if self.splits:
                    examine(trainer, window, training=True)
        # A rank without rows can't try, and all ranks must compile the same step: so they share what they found.
        # It costs a few gathers of a flag, until one rank knows or none ever can.
        share_findings(trainer)
        self.known = record.shifts is not None or not any(world.ranks.gathered(may_shift(trainer, window[0])))
