"""Parameters that the optimizer has and the model does not, such as those of a loss with a head.

They are trained as the model's are. A checkpoint has them under the path of the Trainer's attribute that holds them.
The state of a run is made from one module, which here is the model with more children. Each child shares the dict of
parameters of the module that owns them. So a step puts its stand-ins where the loss looks for them.
"""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from trainfn.hf._types import TrainerLike, Values

_PREFIX = "outside_of_the_model"
_Owner = tuple[str, nn.Module]


class _Attribute(dict[str, object]):
    """An attribute of an object as a dict of one item, through which a step replaces it."""

    def __init__(self, holder: object, name: str) -> None:
        super().__init__({name: None})
        self._held = vars(holder)

    def __getitem__(self, name: str) -> object:
        return self._held[name]

    def __setitem__(self, name: str, value: object) -> None:
        self._held[name] = value

    def items(self) -> list[tuple[str, object]]:  # type: ignore[override]  # the present one, not a copy
        """The attribute with its present value."""
        return [(name, self._held[name]) for name in self]


def trained_module(trainer: TrainerLike, optimizer: torch.optim.Optimizer) -> nn.Module:
    """The model; or if the optimizer has parameters of other modules, the model with these as children.

    The second is a shallow copy of the outermost module, which shares all tensors.

    Raises:
        ValueError: If no module holds a parameter of the optimizer, so that no step could change it.
    """
    own = {id(p) for p in trainer.model.parameters()}
    missing = {id(p): p for group in optimizer.param_groups for p in group["params"] if id(p) not in own}
    if not missing:
        return trainer.model
    owners = list(_owners(trainer, missing))
    for parameter in missing.values():
        raise ValueError(
            f"`{type(optimizer).__name__}(...)` can't work in a Trainer: a tensor of shape {list(parameter.shape)} in"
            " its groups is not a parameter of the model or of another module. Build the optimizer from"
            " `model.parameters()`, after the last change of the model. Or keep"
            " the parameter in a module, such as `self.head = nn.Linear(8, 2)`."
        )
    root = copy.copy(trainer.model)
    root._modules = dict(trainer.model._modules)
    for path, owner in owners:
        _put(root, path if path.partition(".")[0] not in trainer.model._modules else f"{_PREFIX}.{path}", owner)
    return root


def _owners(trainer: TrainerLike, missing: dict[int, nn.Parameter]) -> Iterator[_Owner]:
    """The modules that hold the missing parameters, with a path for each; what is found is missing no more."""
    for path, module in itertools.chain(_of_trainer(trainer), _anywhere(missing)):
        mine = [p for p in module._parameters.values() if p is not None and id(p) in missing]
        for parameter in mine:
            del missing[id(parameter)]
        if mine:
            yield path, module


def _of_trainer(trainer: TrainerLike) -> Iterator[_Owner]:
    attributes: Values = {}
    for kind in reversed(type(trainer).__mro__):
        attributes.update(vars(kind))
    for key, value in {**attributes, **vars(trainer)}.items():
        if key == "model" or key.startswith("__"):
            continue
        held = cast("dict[object, object]", value) if isinstance(value, dict) else {}
        held = dict(enumerate(cast("list[object]", value))) if isinstance(value, list | tuple) else held
        for path, each in [(key, value), *((f"{key}.{name}", each) for name, each in held.items())]:
            if isinstance(each, nn.Parameter) and path in vars(trainer):
                holder = nn.Module()
                holder._parameters[path] = each
                vars(holder)["attribute"] = _Attribute(trainer, path)  # a step looks for it there, too
                yield f"{_PREFIX}.{path}", holder
            elif isinstance(each, nn.Module):
                yield from ((f"{path}.{name}".rstrip("."), module) for name, module in each.named_modules())


def _anywhere(missing: dict[int, nn.Parameter]) -> Iterator[_Owner]:
    """All modules in this process, asked for only while a parameter is missing."""
    if missing:
        found = [
            each for each in gc.get_objects() if issubclass(type(each), nn.Module)
        ]  # not `isinstance`, which proxies answer
        for number, module in enumerate(m for m in found if any(id(p) in missing for p in m._parameters.values())):
            yield f"{_PREFIX}.{number}", module


def _put(root: nn.Module, path: str, owner: nn.Module) -> None:
    """Add a child at a path, whose parameters are those of the owner, in the owner's own dict."""
    module = root
    for name in path.split("."):
        if name not in module._modules:
            module._modules[name] = nn.Module()
        module = cast("nn.Module", module._modules[name])
    module._parameters = owner._parameters
    if isinstance(held := vars(owner).get("attribute"), _Attribute):
        vars(module)["attribute"] = held
