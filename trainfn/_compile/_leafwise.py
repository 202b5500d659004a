"""Update leaf by leaf: a graph without lists of tensors, so that equal leaves are equal parts of it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

_ELEMENTWISE = {"List": "Tensor", "Scalar": "Scalar", "ScalarList": "Scalar", "Tensor": "Tensor"}
_BY_VALUE = {"Scalar": "default", "ScalarList": "default"}
_POWERS = {"List": "Tensor_Tensor", "Scalar": "Tensor_Scalar", "ScalarList": "Tensor_Scalar"}
_BOUNDS = {"List": "Tensor", "Scalar": "default", "ScalarList": "default"}
# Per list operation and overload, the overload for one leaf. Operations of one list alone keep name and overload.
_OVERLOADS: dict[str, dict[str, str]] = {
    **dict.fromkeys(("add", "sub", "mul", "div", "lerp"), _ELEMENTWISE),
    **dict.fromkeys(("addcmul", "addcdiv"), _BY_VALUE),
    **dict.fromkeys(("clamp_min", "clamp_max"), _BOUNDS),
    "maximum": {"List": "default"},
    "minimum": {"List": "default"},
    "pow": _POWERS,
    "norm": {"Scalar": "default"},
}
_NAMES = {"norm": "linalg_vector_norm"}
# These arguments a list operation takes by position, and the operation of one leaf by name.
_KEYWORDS = {"addcmul": {3: "value"}, "addcdiv": {3: "value"}, "norm": {2: "dtype"}}


def leafwise(module: fx.GraphModule, *, everywhere: bool = False) -> fx.Graph:
    """A copy of the graph with a node per leaf for each node of lists; ``meta["lane"]`` numbers the leaves' chains.

    Args:
        module: A flat graph.
        everywhere: Split the lists of every device, not the processor's alone.
    """
    graph, env, leaves = fx.Graph(), dict[fx.Node, Any](), set[fx.Node]()
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is operator.getitem and isinstance(env[node.args[0]], list):
            env[node] = env[node.args[0]][node.args[1]]
        elif (leaf := _of_one_leaf(node, everywhere)) is not None:
            env[node] = _split(graph, node, leaf, env)
            leaves.update(env[node])
        elif node.target is operator.getitem:  # one node per part of a result, or it would have two names
            source, part = env[node.args[0]], node.args[1]
            known = (user for user in source.users if user.target is operator.getitem and user.args[1] == part)
            env[node] = next(known, None) or graph.node_copy(node, env.__getitem__)
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
    _number(graph, leaves)
    return graph


def _number(graph: fx.Graph, leaves: set[fx.Node]) -> None:
    """Number the leaves' chains: operations of one leaf, and what uses those of just one leaf."""
    joined: dict[int, int] = {}  # to the chain that another one has met
    lanes: dict[fx.Node, int] = {}

    def root(lane: int) -> int:
        while lane in joined:
            lane = joined[lane]
        return lane

    for at, node in enumerate(graph.nodes):
        met = sorted({root(lanes[used]) for used in node.all_input_nodes if used in lanes})
        if node in leaves:
            lanes[node] = met[0] if met else at
            joined |= dict.fromkeys(met[1:], lanes[node])
        elif len(met) == 1:
            lanes[node] = met[0]
    for node in graph.nodes:
        node.meta["lane"] = root(lanes[node]) if node in lanes else None


def _of_one_leaf(node: fx.Node, everywhere: bool) -> OpOverload | None:
    """The operation that does for one leaf what the node does for a list, if there is one."""
    target = node.target
    if not isinstance(target, OpOverload) or not target.__name__.startswith("_foreach_"):
        return None
    if any(user.target is not operator.getitem for user in node.users) or not (everywhere or _on_cpu(node.args[0])):
        return None
    packet = target.__name__.split(".")[0].removeprefix("_foreach_")
    name, suffix = packet.removesuffix("_"), packet[len(packet.removesuffix("_")) :]
    overloads = _OVERLOADS.get(name, {"default": "default"} if len(target._schema.arguments) <= 3 else {})
    overload = overloads.get(target._overloadname)
    single = getattr(torch.ops.aten, _NAMES.get(name, name) + suffix, None)
    return getattr(single, overload, None) if single is not None and overload is not None else None


def _on_cpu(tensors: object) -> bool:
    """Whether a list is of the processor's tensors. For a GPU inductor makes one kernel of a list: it stays whole."""
    return isinstance(tensors, list | tuple) and all(t.meta["val"].device.type == "cpu" for t in tensors)


def _split(graph: fx.Graph, node: fx.Node, leaf: OpOverload, env: dict[fx.Node, Any]) -> list[fx.Node]:
    args: Any = fx.map_arg(node.args, env.__getitem__)
    kwargs = fx.map_arg(node.kwargs, env.__getitem__)
    base = str(node.target).split(".")[1].removeprefix("_foreach_").removesuffix("_")
    named = _KEYWORDS.get(base, {})
    lists = isinstance(node.meta.get("val"), list | tuple)
    out: list[fx.Node] = []
    for i, first in enumerate(args[0]):
        mine = [arg[i] if isinstance(arg, list | tuple) else arg for arg in args]
        extra = {named[n]: arg for n, arg in enumerate(mine) if n in named}
        extra |= {k: arg[i] if isinstance(arg, list | tuple) else arg for k, arg in kwargs.items()}
        new = graph.call_function(leaf, tuple(arg for n, arg in enumerate(mine) if n not in named), extra)
        new.meta["val"] = node.meta["val"][i] if lists else first.meta["val"]
        out.append(new)
    return out
