"""The leaves of a state by name; which leaf of a checkpoint fills which leaf of a state.

A leaf of the module is ``model/<the module's own name>``, trained or not: freezing a layer does not rename it. Every
other leaf has its path: ``step``, ``opt_state/0/mu/<name>``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainfn import tree
from trainfn._checkpoint._format import DTYPES, MODEL, Leaf
from trainfn._dtensor import is_distributed
from trainfn._ranks._group import Ranks
from trainfn._reached import late_in, settled
from trainfn._text import closest, nearest, shortened
from trainfn._types import TrainState
from trainfn.errors import CheckpointError

Only = str | Collection[str] | Callable[[str], bool] | None
Rename = Mapping[str, str] | Callable[[str], str] | None
_SHOWN = 20


def named(state: TrainState, call: str) -> dict[str, Tensor]:
    """Every leaf of a state by name; errors begin with ``call``."""
    rest = tree.named_leaves(_without_model(state))
    found = {**{MODEL + name: t for name, t in {**state.buffers, **state.params}.items()}, **rest}
    if len(found) != len(tree.leaves(state)):
        raise ValueError(
            f"{call}: two leaves of the state have the same name. A key with '/' in it can equal another leaf's path,"
            " for keys are joined by '/'; or a parameter and a buffer share a name. Rename one of them."
        )
    for name, leaf in found.items():
        where = _place(state, name)
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{call}: {where} is {leaf!r}, not a tensor. Make it `torch.tensor(...)`.")
        if leaf.layout != torch.strided or leaf.is_meta or leaf.is_quantized:
            kind, remedy = "is sparse", "Make it dense: `x.to_dense()`"
            if leaf.is_quantized:
                kind, remedy = "is quantized", "Make it floating-point numbers: `x.dequantize()`"
            if leaf.is_meta:
                kind, remedy = "has no values (meta device)", "Load the model's weights before `tfn.init`"
            raise TypeError(f"{call}: {where} {kind}, and only dense tensors with values are saved. {remedy}.")
        if is_distributed(leaf):
            _check_layout(leaf, f"{call}: {where}")
    return found


def alike(state: TrainState, ranks: Ranks) -> TrainState:
    """The state with the leaves that it has on any rank.

    A rank counts the updates that a parameter missed from the first one on that its own rows did not reach. Until then
    the count is 0.
    """
    if ranks.size == 1:
        return state
    names = frozenset[str]().union(*ranks.everyone(lambda: late_in(state.opt_state)))
    return state._replace(opt_state=settled(state.opt_state, names)) if names else state


def _check_layout(leaf: Any, which: str) -> None:
    world = torch.distributed.get_world_size()
    if not all(p.is_shard() or p.is_replicate() for p in leaf.placements) or leaf.device_mesh.size() != world:
        raise TypeError(
            f"{which} is placed as {tuple(leaf.placements)} over {leaf.device_mesh.size()} of {world} ranks. Only"
            " the layouts of `tfn.shard` can be saved and restored in parts: Shard(dim) and Replicate() over all ranks."
            " Gather it first: `tfn.gather(state)`."
        )


def refilled(like: TrainState, values: Mapping[str, Tensor]) -> TrainState:
    """The state with the structure of ``like`` and these leaves."""
    params = {name: values[MODEL + name] for name in like.params}
    buffers = {name: values[MODEL + name] for name in like.buffers}
    return tree.with_leaves(_without_model(like), values)._replace(params=params, buffers=buffers)


def _without_model(state: TrainState) -> TrainState:
    return state._replace(params={}, buffers={})


def _place(state: TrainState, name: str) -> str:
    """The expression by which a user finds a leaf."""
    if not name.startswith(MODEL):
        return f"state.{name}"
    own = name.removeprefix(MODEL)
    return f"state.{'params' if own in state.params else 'buffers'}[{own!r}]"


def unsaved_buffers(state: TrainState) -> set[str]:
    """The buffers that the module's own state_dict leaves out (``persistent=False``); transformers expects none."""
    kept = {site.name for site in state.sites if site.attribute not in site.owner._non_persistent_buffers_set}
    return {MODEL + site.name for site in state.sites if site.name not in kept}


# --- which leaf fills which ---------------------------------------------------------------------------------------


def matched(
    call: str,
    found: Mapping[str, Leaf],
    like: Mapping[str, Tensor],
    *,
    strict: bool = True,
    only: Only = None,
    rename: Rename = None,
) -> dict[str, str]:
    """For each leaf of the state to be filled, the name of its leaf in the checkpoint.

    Raises:
        CheckpointError: With the name of each leaf that does not fit, if ``strict``; or if no leaf fits.
        ValueError: If ``only`` or ``rename`` match no leaf, or give two leaves one name.
    """
    sources = _renamed(call, found, rename)
    chosen = _chosen(call, only, [*like, *(name for name in sources if name not in like)])
    have = {name: found[sources[name]] for name in chosen if name in sources}
    problems = {name: why for name in chosen if (why := _problem(name, have.get(name), like.get(name)))}
    fitting = {name: sources[name] for name in chosen if name not in problems}
    if problems and (strict or not fitting):
        raise CheckpointError(_refusal(call, problems, have, like, nothing=not fitting))
    if problems:
        warnings.warn(
            f"{call}: {len(fitting)} leaves restored; these were not restored, and are as in `like`:\n  "
            + shortened(problems.values(), _SHOWN, str, "\n  "),
            stacklevel=3,
        )
    return fitting


def _problem(name: str, have: Leaf | None, want: Tensor | None) -> str | None:
    if have is None:
        return f"missing in the checkpoint: {name}"
    if want is None:
        return f"not in the state: {name}"
    if have.shape != tuple(want.shape):
        return f"shape of {name}: {list(have.shape)} in the checkpoint, {list(want.shape)} in the state"
    if DTYPES[have.dtype] != want.dtype:
        return f"dtype of {name}: {DTYPES[have.dtype]} in the checkpoint, {want.dtype} in the state"
    return None


def _refusal(
    call: str, problems: dict[str, str], have: Mapping[str, Any], like: Mapping[str, Any], *, nothing: bool
) -> str:
    missing = [name for name in problems if name not in have]
    unexpected = [name for name in problems if name not in like]
    for name in missing[:_SHOWN]:
        problems[name] += nearest(name, unexpected[:500], " (nearest there: {})", likeness=0.6)
    if nothing:
        return (
            f"{call}: no leaf of the checkpoint fits the state:\n  "
            + shortened(problems.values(), _SHOWN, str, "\n  ")
            + '\nNames can be changed as they are read: `rename={"old prefix": "new prefix"}`.'
        )
    return (
        f"{call}: the checkpoint does not fit the state:\n  "
        + shortened(problems.values(), _SHOWN, str, "\n  ")
        + "\nBuild `like` with the model and optimizer that wrote it. Or take a part of it.\n"
        "  All that fits: `tfn.restore(path, like=state, strict=False)`.\n"
        '  Leaves whose name matches: `tfn.restore(path, like=state, only=r"^model/")`.\n'
        '  Leaves under other names: `tfn.restore(path, like=state, rename={"old": "new"})`.'
    )


def _renamed(call: str, found: Iterable[str], rename: Rename) -> dict[str, str]:
    """The checkpoint's own names, by what they are called in the state."""
    if rename is None:
        return {name: name for name in found}
    change = rename if callable(rename) else _prefixes(rename)
    sources: dict[str, str] = {}
    changed = False
    for name in found:
        new = change(name)
        if new in sources:
            raise ValueError(
                f"{call}: rename= gives {sources[new]!r} and {name!r} one name, {new!r}. A leaf can't be filled twice."
                " Rename one of them to another name."
            )
        sources[new] = name
        changed |= new != name
    if not changed:
        names = shortened(sources, 3, str)
        raise ValueError(f"{call}: rename= changes no name. There are {names}; a key is the beginning of one.")
    return sources


def _prefixes(rename: Mapping[str, str]) -> Callable[[str], str]:
    """A function from name to name: ``{"encoder.": "body."}`` also changes ``opt_state/0/mu/encoder.weight``."""
    patterns = [(re.compile(rf"(^|/){re.escape(old)}"), new) for old, new in rename.items()]

    def change(name: str) -> str:
        for pattern, new in patterns:
            if pattern.search(name):
                return pattern.sub(lambda match, new=new: match[1] + new, name)
        return name

    return change


def _chosen(call: str, only: Only, names: list[str]) -> list[str]:
    if only is None:
        return names
    if isinstance(only, str):
        choose = re.compile(only).search
    elif callable(only):
        choose = only
    else:
        unknown = sorted(set(only) - set(names))
        if unknown:
            near = ", ".join(closest(unknown[0], names, 3, likeness=0.3))
            raise ValueError(
                f"{call}: only= has {unknown[0]!r}, which is neither in the state nor in the checkpoint. Near it:"
                f" {near}. Leave it out, or write one of these."
            )
        choose = set(only).__contains__
    chosen = [name for name in names if choose(name)]
    if not chosen:
        raise ValueError(
            f"{call}: only= matches none of the {len(names)} leaves: {shortened(names, 3, str)}. Write a pattern of"
            ' such a name, as in `only=r"^model/"`.'
        )
    return chosen
