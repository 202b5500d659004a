"""Numbers of an optimizer as part of its state: a new learning rate without a recompile."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import optree
import torch
from torch import Tensor

from trainfn import tree
from trainfn._types import Params, Schedule, Transform, Tree
from trainfn.optim._combine import around
from trainfn.optim._math import zero_count

T = TypeVar("T")


class InjectState(NamedTuple):
    """The state of an optimizer made by `inject_hyperparams`.

    Attributes:
        count: Completed updates, ``int64[]``.
        hyperparams: The numbers, ``float32[]`` by name; `set_hyperparams` changes them.
        scheduled: What the schedules said at the last update, ``float32[]`` by name.
        inner: The optimizer's own state.
    """

    count: Tensor  # type: ignore[assignment]  # shadows tuple.count
    hyperparams: dict[str, Tensor]
    scheduled: dict[str, Tensor]
    inner: Tree


def inject_hyperparams(factory: Callable[..., Transform]) -> Callable[..., Transform]:
    """Make the numbers of an optimizer part of its state, as ``float32[]`` tensors.

    ======================================== ========================================================
    argument, defaults included              becomes
    ======================================== ========================================================
    a float, a 0-dim tensor, an int          a hyperparameter (not an int that is annotated ``int``)
    a function of one argument               a schedule, called with the number of completed updates
    anything else (bool, None, str, a mask)  stays what it is
    ======================================== ========================================================

    Args:
        factory: Such as `adamw`; called again in every update, with tensors, so it must not look at their
            values.

    Raises:
        ValueError: As the factory does, when it is called with these arguments.

    >>> from trainfn.optim import sgd
    >>> optimizer = inject_hyperparams(sgd)(learning_rate=0.1)
    >>> params = {"w": torch.ones(1)}
    >>> state = set_hyperparams(optimizer.init(params), learning_rate=0.5)
    >>> optimizer.update({"w": torch.ones(1)}, state, params)[0]
    {'w': tensor([-0.5000])}
    """
    signature = inspect.signature(factory)

    def make(*args: Any, **kwargs: Any) -> Transform:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return _injected(factory, *_sort(bound, signature))

    return make


def _sort(
    bound: inspect.BoundArguments, signature: inspect.Signature
) -> tuple[dict[str, float | Tensor], dict[str, Schedule], dict[str, Any]]:
    """Sort the arguments into numbers, schedules and the rest."""
    numbers: dict[str, float | Tensor] = {}
    schedules: dict[str, Schedule] = {}
    rest: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            raise ValueError(
                f"`inject_hyperparams({signature})` can't work: `{parameter}` hides the names of the"
                " hyperparameters. Wrap the factory in a function that spells them out."
            )
        if _is_number(value, parameter):
            numbers[name] = value
        elif _arity(value) == 1:
            schedules[name] = value
        else:
            rest[name] = value
    return numbers, schedules, rest


def _injected(
    factory: Callable[..., Transform],
    numbers: Mapping[str, float | Tensor],
    schedules: Mapping[str, Schedule],
    rest: Mapping[str, Any],
) -> Transform:
    sample = factory(**rest, **numbers, **{name: torch.ones(()) for name in schedules})  # raises what it would later

    def init(params: Params) -> Tree:
        count = zero_count(params)
        values = {name: torch.as_tensor(value).to(count.device, torch.float32) for name, value in numbers.items()}
        values = tree.copy(values)  # a donated state must not overwrite the caller's tensor
        scheduled = {name: schedule(count) for name, schedule in schedules.items()}
        return InjectState(count, values, scheduled, factory(**rest, **values, **scheduled).init(params))

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        scheduled = {name: schedule(state.count) for name, schedule in schedules.items()}
        rule = factory(**rest, **state.hyperparams, **scheduled)
        updates, inner = rule.update(updates, state.inner, params)
        return updates, InjectState(state.count + 1, state.hyperparams, scheduled, inner)

    return around(Transform(init, update), sample)


def get_hyperparams(state: Tree) -> dict[str, Tensor]:
    """The hyperparameters in an optimizer's state or a whole `TrainState`, by name.

    Hyperparameters that follow a schedule have the value of the last update. Where several optimizers share a name, the
    names are led by the optimizer's path in the tree.

    Raises:
        ValueError: If the state has none.

    >>> from trainfn.optim import adam
    >>> optimizer = inject_hyperparams(adam)(1e-3)
    >>> {name: round(value.item(), 4) for name, value in get_hyperparams(optimizer.init({})).items()}
    {'learning_rate': 0.001, 'b1': 0.9, 'b2': 0.999, 'eps': 0.0}
    """
    found = _find(state)
    if not found:
        raise ValueError(_none_there("get_hyperparams(state)"))
    names = [name for inject in found.values() for name in (*inject.hyperparams, *inject.scheduled)]
    return {
        name if names.count(name) == 1 else f"{path}/{name}": value
        for path, inject in found.items()
        for name, value in {**inject.hyperparams, **inject.scheduled}.items()
    }


def set_hyperparams(state: T, **values: float | Tensor) -> T:
    """A state with other hyperparameters: an optimizer's state or a whole `TrainState`, made anew.

    The tensors are of the same shape and type as before, so a compiled step is not compiled again.

    Args:
        state: Any tree with the state of an `inject_hyperparams` optimizer somewhere in it.
        values: By name. A name that several optimizers share is changed in all of them; ``**{"path/name":
            …}`` with a name from `get_hyperparams` changes it in one.

    Raises:
        ValueError: If a name is unknown, or follows a schedule.

    >>> from trainfn.optim import sgd
    >>> state = inject_hyperparams(sgd)(0.1).init({})
    >>> get_hyperparams(set_hyperparams(state, learning_rate=0.5))["learning_rate"]
    tensor(0.5000)
    """
    call = f"set_hyperparams(state, {', '.join(f'{name}={value!r}' for name, value in values.items())})"
    found = _find(state)
    if not found:
        raise ValueError(_none_there(call))
    free = {name for path, i in found.items() for name in i.hyperparams for name in (name, f"{path}/{name}")}
    driven = {name for path, i in found.items() for name in i.scheduled for name in (name, f"{path}/{name}")}
    for name in values:
        if name in driven - free:
            raise ValueError(
                f"`{call}` can't work: {name!r} follows a schedule, which would set it again at the next"
                f" update. Give `inject_hyperparams` a number for it, and set that."
            )
        if name not in free:
            known = sorted({name for i in found.values() for name in i.hyperparams})
            raise ValueError(f"`{call}`: the state has no hyperparameter {name!r}. It has {', '.join(known)}.")

    def change(path: str, inject: InjectState) -> InjectState:
        new = {
            name: torch.as_tensor(values.get(f"{path}/{name}", values.get(name, old))).to(old).clone()
            for name, old in inject.hyperparams.items()
        }
        return inject._replace(hyperparams=new)

    return _replace(state, {path: change(path, inject) for path, inject in found.items()})


def _find(state: Tree) -> dict[str, InjectState]:
    """Every `InjectState` in a tree by path, in optree's order."""
    paths, nodes, _ = optree.tree_flatten_with_path(state, is_leaf=_is_inject)
    return {
        "/".join(str(p) for p in path) or "optimizer": node
        for path, node in zip(paths, nodes, strict=True)
        if _is_inject(node)
    }


def _replace(state: Tree, changed: dict[str, InjectState]) -> Tree:
    nodes, treedef = optree.tree_flatten(state, is_leaf=_is_inject)
    new = iter(changed.values())
    return optree.tree_unflatten(treedef, [next(new) if _is_inject(node) else node for node in nodes])


def _is_inject(node: Any) -> bool:
    return isinstance(node, InjectState)


def _is_number(value: Any, parameter: inspect.Parameter) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0
    if isinstance(value, bool):
        return False
    return isinstance(value, float) or (isinstance(value, int) and parameter.annotation not in ("int", int))


def _arity(function: Any) -> int:
    """The number of arguments that a function has to be given; -1 if it doesn't say."""
    if not callable(function):
        return -1
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return -1
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _none_there(call: str) -> str:
    return (
        f"`{call}`: this state has no hyperparameters, only the optimizer's closure does. Make the optimizer"
        " with `inject_hyperparams`: `optimizer ="
        " tfn.optim.inject_hyperparams(tfn.optim.adamw)(learning_rate=3e-4)`."
    )
