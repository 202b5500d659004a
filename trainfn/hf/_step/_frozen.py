"""Parameters that are unfrozen while a run goes on: as in transformers, its optimizer does not have them."""

from __future__ import annotations

import warnings

from torch import nn


class Frozen:
    """The parameters that were frozen when a run's optimizer was made; they stay frozen to its end."""

    def __init__(self) -> None:
        self._held: list[tuple[str, nn.Parameter]] = []
        self._asked: dict[str, nn.Parameter] = {}

    def see(self, model: nn.Module) -> None:
        """Note the frozen parameters of a model."""
        self._held = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]

    def keep(self) -> None:
        """Freeze again what was unfrozen since, and say so once."""
        asked = {name: p for name, p in self._held if p.requires_grad}
        if not asked:
            return
        for p in asked.values():
            p.requires_grad_(False)
        if not self._asked:
            name = next(iter(asked))
            warnings.warn(
                f"{name!r} was frozen when `train` made the optimizer, and has `requires_grad=True` now ({len(asked)}"
                " such parameters). They do not train in this run, as in transformers, for the optimizer does not have"
                " them. To unfreeze parameters during a run, begin it with `requires_grad=True` and freeze them in"
                " `on_train_begin`.",
                stacklevel=2,
            )
        self._asked |= asked

    def release(self) -> None:
        """Leave the model's parameters as the callbacks wanted them."""
        for p in self._asked.values():
            p.requires_grad_(True)
