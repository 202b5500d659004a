"""Compute once what a graph computes twice."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from trainfn._compile._atoms import inputs, owner, written_positions

_RANDOM = torch.Tag.nondeterministic_seeded


def merge_twins(graph: fx.Graph) -> None:
    """Let the first of several equal operations on equal inputs stand for all, where nobody writes to what they use."""
    first_write = _first_writes(graph)
    shown = {owner(n) for n in inputs(next(iter(reversed(graph.nodes))))}
    kept: dict[Any, fx.Node] = {}
    for at, node in enumerate(list(graph.nodes)):
        if not _is_pure(node) or _values(node) & first_write.keys():
            continue
        if any(first_write.get(owner(used), at) < at for used in inputs(node)):
            continue
        twin = kept.setdefault(_key(node), node)
        two_outputs = _values(node) & shown and _values(twin) & shown  # they stay two tensors
        if twin is not node and (node.target is operator.getitem or not two_outputs):
            seen = bool(_values(node) & shown)
            node.replace_all_uses_with(twin)
            graph.erase_node(node)
            shown |= _values(twin) if seen else set()


def _values(node: fx.Node) -> set[fx.Node]:
    """The tensors that an operation makes, or whose views it makes."""
    return {owner(value) for value in (node, *(user for user in node.users if user.target is operator.getitem))}


def _first_writes(graph: fx.Graph) -> dict[fx.Node, int]:
    out: dict[fx.Node, int] = {}
    for at, node in enumerate(graph.nodes):
        for n in written_positions(node.target) if node.op == "call_function" else ():
            arg: Any = node.args[n]
            for written in arg if isinstance(arg, list | tuple) else [arg]:
                out.setdefault(owner(written), at)
    return out


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function" or node.is_impure():
        return False
    if node.target is operator.getitem:
        return True
    target = node.target
    return isinstance(target, OpOverload) and target.namespace == "aten" and _RANDOM not in target.tags


def _key(node: fx.Node) -> Any:
    return node.target, _form(node.args), _form(node.kwargs)


def _form(arg: Any) -> Any:
    if isinstance(arg, list | tuple):
        return tuple(_form(a) for a in arg)
    if isinstance(arg, dict):
        return tuple((k, _form(v)) for k, v in arg.items())
    return arg if isinstance(arg, fx.Node) else (type(arg).__name__, repr(arg))
