"""A state for a module that has changed since its state was made."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainfn._module import init
from trainfn._reached import settled
from trainfn._types import Params, TrainState, Transform, Tree


def adapt(
    state: TrainState, model: nn.Module | Params, optimizer: Transform, *, storage: Literal["copy", "adopt"] = "copy"
) -> TrainState:
    """Carry a state over to a module that was changed: frozen or unfrozen, pruned, given a new head or another mode.

    What has the same name and shape before and after keeps its numbers: parameters, buffers, the optimizer's moments,
    and averages in ``extra``. The step, the key and the counts go on. What is new starts as `init` starts it, with the
    numbers of the module, and counts its own updates from 0. The step is to be made anew, with the same optimizer.

    Args:
        state: It is not changed, and shares its tensors with the new state.
        model: The module as it is now.
        optimizer: As for `init`.
        storage: What is done with the memory of tensors that are new: see `init`.

    Raises:
        TypeError, ValueError: As `init` does.

    >>> import torch, trainfn as tfn
    >>> model, optimizer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)), tfn.optim.adam(0.1)
    >>> state = tfn.init(model, optimizer)
    >>> model[1] = torch.nn.Linear(2, 3)
    >>> state = adapt(state, model, optimizer)
    >>> state.params["1.weight"].shape, state.params["0.weight"] is not model[0].weight
    (torch.Size([3, 2]), True)
    """
    fresh = init(model, optimizer, storage=storage)
    before = {**state.buffers, **state.params}
    params = _carried(before, fresh.params)
    new = frozenset(name for name in params if name not in state.params or not _alike(state.params[name], params[name]))
    opt_state = settled(fresh.opt_state, new) if int(state.step) else fresh.opt_state
    return fresh._replace(
        step=state.step,
        key=state.key,
        params=params,
        buffers=_carried(before, fresh.buffers),
        opt_state=_continued(state.opt_state, opt_state, new),
        extra={name: _average(value, state.params, params) for name, value in state.extra.items()},
    )


def _carried(old: Params, new: Params) -> Params:
    return {name: old[name] if name in old and _alike(old[name], x) else x for name, x in new.items()}


def _alike(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)


def _continued(old: Tree, new: Tree, fresh: frozenset[str]) -> Tree:
    """The new optimizer state with the old one's values, as far as the two are alike."""
    if type(new) is dict:
        if not isinstance(old, dict):
            return new
        return {k: v if k in fresh or k not in old else _continued(old[k], v, fresh) for k, v in new.items()}
    if isinstance(new, tuple | list):
        if type(old) is not type(new) or len(old) != len(new):
            return new
        items = [_continued(a, b, fresh) for a, b in zip(old, new, strict=True)]
        if not hasattr(new, "_fields"):
            return type(new)(items)
        made = type(new)(*items)
        return _counted(old, made, fresh) if hasattr(new, "late") else made
    return old if _alike(old, new) else new


def _counted(old: Any, new: Any, fresh: frozenset[str]) -> Any:
    """A new parameter has missed all updates so far, and an old one those that it had missed before."""
    late = {**old.late, **{name: new.count.clone() for name in new.late if name in fresh}}
    held = {name for field, value in zip(new._fields, new, strict=True) if field != "late" and isinstance(value, dict)
            for name in value}  # fmt: skip
    return new._replace(late={name: count for name, count in late.items() if name in held or not held})


def _average(value: Tree, old: Params, new: Params) -> Tree:
    """An average of the parameters goes on with those that there are now; anything else stays."""
    if not isinstance(value, dict) or value.keys() != old.keys():
        return value
    return {
        name: value[name] if name in value and _alike(value[name], p) else torch.clone(p) for name, p in new.items()
    }
