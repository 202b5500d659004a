"""Whether a module is still the one that its state was made from."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from trainfn._module import identities, sites_of
from trainfn._types import TrainState

_ADAPT = (
    "Carry the state over: `state = tfn.adapt(state, model, optimizer)`, and make the step anew; if the model is to"
    " have the state's numbers, `tfn.export(state)` before the change."
)


class _Registrations:
    """How many parameters and submodules any modules have registered since a state was first used."""

    def __init__(self) -> None:
        self.count, self._hooked = 0, False

    def start(self) -> None:
        """Begin to count."""
        if not self._hooked:
            self._hooked = True
            register_module_parameter_registration_hook(self._note)
            register_module_module_registration_hook(self._note)

    def _note(self, module: nn.Module, name: str, value: Any) -> None:
        self.count += 1


_REGISTRATIONS = _Registrations()


def check_unchanged(state: TrainState) -> None:
    """Raise if the state's module has other parameters, buffers or submodules than the state was made for.

    It takes no time unless some module registered something since the last look.

    Raises:
        ValueError: Naming what has changed, and the line to write.
    """
    kind: Any = type(state)
    if state.module is None or kind.looked == _REGISTRATIONS.count:
        return
    _REGISTRATIONS.start()
    kind.looked = _REGISTRATIONS.count
    now = sites_of(state.module)
    if now == state.sites and kind.held in (None, identities(now)):
        return
    kind.looked = -1
    then, new = ({site.name: None for site in sites} for sites in (state.sites, now))
    more, less = [name for name in new if name not in then], [name for name in then if name not in new]
    what = [f"{name!r} is new" for name in more[:3]] + [f"{name!r} is gone" for name in less[:3]]
    if not what:
        before = dict(zip((site for site in state.sites if site.is_parameter), kind.held or (), strict=True))
        at = zip((site for site in now if site.is_parameter), identities(now), strict=True)
        what = [f"{site.name!r} was replaced" for site, one in at if before.get(site) != one][:3]
    said = ", ".join(what) or "it holds its tensors elsewhere"
    raise ValueError(f"step(state, batch): the module has changed since `init`: {said}. {_ADAPT}")


def unfrozen(name: str) -> ValueError:
    """The error for a parameter that was frozen at `init`, and is trainable now."""
    return ValueError(
        f"step(state, batch): {name!r} was frozen at `init`, and has `requires_grad=True` now. {_ADAPT} To leave it"
        f" frozen: `model.get_parameter({name!r}).requires_grad_(False)`."
    )


def check_modes(state: TrainState) -> None:
    """Warn, once, if a submodule was put into eval mode after `init`: the steps do not know of it."""
    kind: Any = type(state)
    if state.module is None or not state.module.training or kind.warned:
        return
    name = next((n for (n, m), (_, mode) in zip(state.module.named_modules(), state.modes, strict=False)
                 if mode and not m.training), None)  # fmt: skip
    if name is not None:
        kind.warned = True
        warnings.warn(
            f"step(state, batch): {name!r} was put into eval mode after `init`; steps run it in training mode all the"
            f" same. {_ADAPT}",
            stacklevel=2,
        )
