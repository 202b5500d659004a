"""The leaves of a state by name, and back.

What the module holds is ``model/<the module's own name>``, be it trained or not: freezing a layer does not rename it.
All else has its path: ``step``, ``opt_state/0/mu/<name>``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainfn import tree
from trainfn._dtensor import is_distributed
from trainfn._types import TrainState

MODEL = "model/"


def named(state: TrainState, call: str) -> dict[str, Tensor]:
    """Every leaf of a state; ``call`` is for the errors."""
    rest = tree.named_leaves(_without_model(state))
    found = {**{MODEL + name: t for name, t in {**state.buffers, **state.params}.items()}, **rest}
    if len(found) != len(tree.leaves(state)):
        raise ValueError(
            f"{call}: two leaves of the state have one name. Names of dict keys are joined with '/', so a key that"
            " contains one can meet another leaf's path; and params and buffers may not share a name."
        )
    for name, leaf in found.items():
        where = _place(state, name)
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{call}: {where} is {leaf!r}, not a tensor. Make it `torch.tensor(...)`.")
        if leaf.layout != torch.strided or leaf.is_meta or leaf.is_quantized:
            kind = "has no values (meta device)" if leaf.is_meta else "is sparse or quantized"
            raise TypeError(f"{call}: {where} {kind}; only dense tensors are saved. See `.to_dense()`.")
        if is_distributed(leaf):
            _check_layout(leaf, f"{call}: {where}")
    return found


def _check_layout(leaf: Any, which: str) -> None:
    world = torch.distributed.get_world_size()
    if not all(p.is_shard() or p.is_replicate() for p in leaf.placements) or leaf.device_mesh.size() != world:
        raise TypeError(
            f"{which} is laid out as {tuple(leaf.placements)} over {leaf.device_mesh.size()} of {world} ranks. Only"
            " what `tfn.shard` makes can be saved and restored in parts: Shard(dim) and Replicate() over all ranks."
            " Bring it together first: `tfn.gather(state)`."
        )


def refilled(like: TrainState, values: Mapping[str, Tensor]) -> TrainState:
    """A state of the structure of ``like`` with these leaves."""
    params = {name: values[MODEL + name] for name in like.params}
    buffers = {name: values[MODEL + name] for name in like.buffers}
    return tree.with_leaves(_without_model(like), values)._replace(params=params, buffers=buffers)


def _without_model(state: TrainState) -> TrainState:
    return state._replace(params={}, buffers={})


def _place(state: TrainState, name: str) -> str:
    """Where a user finds a leaf."""
    if not name.startswith(MODEL):
        return f"state.{name}"
    own = name.removeprefix(MODEL)
    return f"state.{'params' if own in state.params else 'buffers'}[{own!r}]"


def unsaved_buffers(state: TrainState) -> set[str]:
    """Leaves of the module that its own state_dict leaves out (``persistent=False``), so that no one else expects."""
    kept = {site.name for site in state.sites if site.attribute not in site.owner._non_persistent_buffers_set}
    return {MODEL + site.name for site in state.sites if site.name not in kept}
