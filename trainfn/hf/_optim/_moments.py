"""The state of an optimizer by parameter, as torch's optimizers have it, and back.

A transform keeps dicts by parameter's name in named tuples. Torch keeps for each parameter a dict by its own names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

import trainfn as tfn
from trainfn.hf._types import OptState, Values

_TORCH = {  # what torch calls the fields of a state; the others keep their names
    (tfn.optim.ScaleByAdamState, "mu"): "exp_avg",
    (tfn.optim.ScaleByAdamState, "nu"): "exp_avg_sq",
    (tfn.optim.ScaleByLionState, "mu"): "exp_avg",
    (tfn.optim.TraceState, "trace"): "momentum_buffer",
    (tfn.optim.ScaleByRmsState, "nu"): "square_avg",
    (tfn.optim.ScaleByRmsState, "mu"): "grad_avg",
    (tfn.optim.ScaleByAdagradState, "total"): "sum",
    (tfn.optim.EmaState, "ema"): "exp_avg",
    (tfn.optim.ScaleByFactoredRmsState, "row"): "exp_avg_sq_row",
    (tfn.optim.ScaleByFactoredRmsState, "col"): "exp_avg_sq_col",
    (tfn.optim.ScaleByFactoredRmsState, "full"): "exp_avg_sq",
}


def entries(opt_state: OptState, name: str) -> Values:
    """The state of one parameter by torch's names; empty before the first step.

    >>> rule = tfn.optim.sgd(0.1, momentum=0.9)
    >>> params = {"w": torch.ones(1)}
    >>> entries(rule.update(params, rule.init(params), params)[1], "w")
    {'momentum_buffer': tensor([1.])}
    """
    found: Values = fields(opt_state, name)
    steps = 0
    for part in _parts(opt_state):
        if isinstance(part, tfn.optim.InjectState):
            steps = max(steps, int(part.count))
        elif isinstance(getattr(part, "count", None), Tensor) and any(name in held for held in _dicts(part).values()):
            steps = int(part.count) - int(getattr(part, "late", {}).get(name, 0))
    if found.keys() - {"momentum_buffer"}:  # SGD does not count
        found["step"] = torch.tensor(float(steps))
    return found if steps else {}


def fields(opt_state: OptState, name: str) -> dict[str, Tensor]:
    """The tensors of one parameter by torch's names."""
    return {
        _TORCH.get((type(part), field), field): tensors[name]
        for part in _parts(opt_state)
        for field, tensors in _dicts(part).items()
        if name in tensors
    }


def with_entries(opt_state: OptState, states: Mapping[str, Values]) -> OptState:
    """A state with the moments and counts of torch's, by name of the parameter.

    A parameter without an entry has made no step; its moments stay as they are.

    >>> rule = tfn.optim.sgd(0.1, momentum=0.9)
    >>> state = rule.init({"w": torch.ones(1)})
    >>> with_entries(state, {"w": {"momentum_buffer": torch.ones(1)}})[0].trace
    {'w': tensor([1.])}
    """
    if type(opt_state) is dict:
        return {key: with_entries(value, states) for key, value in cast("Values", opt_state).items()}
    if type(opt_state) is tuple:
        return tuple(with_entries(part, states) for part in cast("tuple[OptState, ...]", opt_state))
    if not isinstance(opt_state, tuple) or not hasattr(opt_state, "_fields"):
        return opt_state
    state: OptState = opt_state
    if isinstance(state, tfn.optim.PartitionState | tfn.optim.MaskedState):
        return state._replace(inner=with_entries(state.inner, states))
    if isinstance(state, tfn.optim.InjectState):
        most = max((_steps(each) for each in states.values()), default=0)
        return state._replace(count=torch.full_like(state.count, most), inner=with_entries(state.inner, states))
    fields = {
        field: {n: _filled(x, states.get(n, {}).get(_TORCH.get((type(state), field), field))) for n, x in held.items()}
        for field, held in _dicts(state).items()
    }
    if not isinstance(getattr(state, "count", None), Tensor):
        return state._replace(**fields)
    names = {name for held in fields.values() for name in held} or set(states)
    steps = {name: _steps(states.get(name, {})) for name in names}
    most = max(steps.values(), default=0)
    if "late" in state._fields and len(set(steps.values())) > 1:
        fields["late"] = {name: torch.full_like(state.count, most - made) for name, made in sorted(steps.items())}
    return state._replace(count=torch.full_like(state.count, most), **fields)


def _steps(entry: Values) -> int:
    """The steps that a parameter made. SGD does not count them, and only whether there was one matters there."""
    return int(entry["step"]) if "step" in entry else int(entry.get("momentum_buffer") is not None)


def _filled(mine: Tensor, given: object) -> Tensor:
    if not isinstance(given, Tensor):
        return mine
    if isinstance(mine, DTensor) and not isinstance(given, DTensor):
        whole = given.to(device=mine.device, dtype=mine.dtype)
        return distribute_tensor(whole, mine.device_mesh, mine.placements)
    return given.detach().to(device=mine.device, dtype=mine.dtype, copy=True)  # a step may reuse the state's memory


def _dicts(part: OptState) -> dict[str, dict[str, Tensor]]:
    """The fields of a named tuple that hold tensors by parameter."""
    fields = zip(part._fields, part, strict=True)
    return {f: v for f, v in fields if type(v) is dict and f not in ("late", "hyperparams", "scheduled", "inner")}


def _parts(opt_state: OptState) -> Iterator[OptState]:
    """All named tuples in a state."""
    if isinstance(opt_state, tuple) and hasattr(opt_state, "_fields"):
        yield opt_state
    inner = cast("Values", opt_state).values() if type(opt_state) is dict else opt_state
    if isinstance(opt_state, tuple) or type(opt_state) is dict:
        for part in inner:
            yield from _parts(part)
