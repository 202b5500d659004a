"""Parameters that the loss does not reach: the optimizer leaves them as they are, as torch does where ``grad is None``.

A trace of a step says which parameters these are. The optimizer sees a gradient of zeros for each of them. What it
makes of it is dropped: the parameter, its moments and everything else under its name stay.

A rule that counts its updates has one count for all parameters, as long as they all have had the same updates. Where a
parameter missed some, ``late`` of the rule's state holds how many, by name. The entry is there, as 0, before the first
step that misses the parameter. `Unsettled` asks for it; the caller of the step adds it by `settled` and calls again.
So a state that goes into a step has the structure of the one that comes out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trainfn._marks import Again
from trainfn._types import NOTHING, TrainState, Tree
from trainfn.optim._combine import PartitionState

_LATE = re.compile(r"/late/(.+)$")


class Unsettled(Again):
    """The optimizer's state has no place for the updates that some parameters miss."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def prepared(self, state: TrainState) -> TrainState:
        """The state with these places."""
        return state._replace(opt_state=settled(state.opt_state, self.names))


def settled(opt_state: Tree, names: frozenset[str]) -> Tree:
    """The same optimizer state, in which every rule that counts has a count of missed updates for ``names``."""
    if type(opt_state) is dict:
        return {key: settled(value, names) for key, value in opt_state.items()}
    if type(opt_state) is list or type(opt_state) is tuple:
        return type(opt_state)(settled(value, names) for value in opt_state)
    if not isinstance(opt_state, tuple) or not hasattr(opt_state, "_fields"):
        return opt_state
    state: Any = opt_state
    fields = {field: settled(value, names) for field, value in zip(state._fields, state, strict=True)}
    if "late" in fields:
        added = {name: torch.zeros_like(state.count) for name in sorted(_lacking(state, names))}
        fields["late"] = {**state.late, **added}
    return type(state)(**fields)


def settled_like(state: TrainState, leaves: Iterable[str]) -> TrainState:
    """The state, with a count of missed updates for every parameter that has one among ``leaves``, names of leaves."""
    names = late_names(leaves)
    return state._replace(opt_state=settled(state.opt_state, names)) if names else state


def late_names(leaves: Iterable[str]) -> frozenset[str]:
    """The parameters that have a count of missed updates among ``leaves``, names of leaves.

    >>> late_names(["opt_state/0/count", "opt_state/0/late/fc.weight"])
    frozenset({'fc.weight'})
    """
    return frozenset(match[1] for leaf in leaves if (match := _LATE.search(leaf)))


def is_settled(opt_state: Tree, names: frozenset[str]) -> bool:
    """Whether `settled` has nothing to add."""
    if type(opt_state) is dict:
        return all(is_settled(value, names) for value in opt_state.values() if not isinstance(value, Tensor))
    if not isinstance(opt_state, list | tuple):
        return True
    if hasattr(opt_state, "late") and _lacking(opt_state, names):
        return False
    return all(is_settled(value, names) for value in opt_state)


def _lacking(state: Any, names: frozenset[str]) -> frozenset[str]:
    """The parameters that the rule concerns and that have no count of missed updates yet."""
    others = [value for field, value in zip(state._fields, state, strict=True) if field != "late"]
    held = [value for value in others if isinstance(value, dict)]
    mine = names & {name for value in held for name in value} if held else names
    return mine - state.late.keys()


def without_late(state: TrainState) -> TrainState:
    """The state for a function that does not count: of one structure, whatever was missed."""
    return state._replace(opt_state=_unsettled(state.opt_state)) if late_in(state.opt_state) else state


def _unsettled(opt_state: Tree) -> Tree:
    if type(opt_state) is dict:
        return {key: value if isinstance(value, Tensor) else _unsettled(value) for key, value in opt_state.items()}
    if not isinstance(opt_state, list | tuple):
        return opt_state
    items = [_unsettled(value) for value in opt_state]
    if not hasattr(opt_state, "_fields"):
        return type(opt_state)(items)
    made: Any = type(opt_state)(*items)
    return made._replace(late=NOTHING) if hasattr(made, "late") else made


def late_in(opt_state: Tree) -> frozenset[str]:
    """The parameters that have a count of missed updates in an optimizer's state."""
    if type(opt_state) is dict:
        if isinstance(next(iter(opt_state.values()), None), Tensor):
            return frozenset()
        return frozenset[str]().union(*map(late_in, opt_state.values()))
    if not isinstance(opt_state, list | tuple):
        return frozenset()
    return frozenset(getattr(opt_state, "late", ())).union(*map(late_in, opt_state))


def kept(old: Tree, new: Tree, reached: dict[str, Tensor | None]) -> Tree:
    """The new tree, with the old values under the names of parameters that were missed.

    Args:
        old: The optimizer's state before the update, or the parameters.
        new: After it.
        reached: The names in question: None for a parameter that is missed, or a ``bool[]`` that says whether.
    """
    if type(new) is dict:
        return {
            key: _chosen(old[key], value, reached[key]) if key in reached else kept(old[key], value, reached)
            for key, value in new.items()
        }
    if isinstance(new, PartitionState):  # its names are labels
        return PartitionState({label: kept(old.inner[label], value, reached) for label, value in new.inner.items()})
    if type(new) is list or type(new) is tuple:
        return type(new)(kept(a, b, reached) for a, b in zip(old, new, strict=True))
    if not isinstance(new, tuple) or not hasattr(new, "_fields"):
        return new
    state: Any = new
    fields = {f: kept(a, b, reached) for f, a, b in zip(state._fields, old, state, strict=True)}
    if "late" in fields:
        fields["late"] = {name: _later(name, old, state, reached) for name in state.late}
    return type(state)(**fields)


def _later(name: str, old: Any, new: Any, reached: dict[str, Tensor | None]) -> Tensor:
    if name not in reached:
        return old.late[name]
    more, here = new.count - old.count, reached[name]
    return old.late[name] + (more if here is None else torch.where(here, 0, more))


def _chosen(old: Tree, new: Tree, here: Tensor | None) -> Tree:
    if here is None or not isinstance(new, Tensor):
        return old
    return torch.where(here, new, old)
