"""Changes to a captured graph, and questions about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, fx

from trainfn._keyed import draws

_FRESH = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default)


def name_inputs(graph: fx.GraphModule, paths: list[str]) -> None:
    """Call the inputs of a graph by their paths: ``params_weight``, ``batch_x``."""
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, path in zip(nodes, paths, strict=True):
        argument, _, rest = path.partition("/")
        words = [word for word in ({"0": "", "1": "batch"}.get(argument, f"argument{argument}"), rest) if word]
        node._rename(re.sub(r"\W", "_", "_".join(words)) or "state")


def lift_constants(graph: fx.GraphModule, fake: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Make inputs of the tensors that a graph holds, and return them; numbers written in the code stay in it.

    A tensor that a step read from a closure is then passed by reference, so a later write to it is seen. And two
    graphs that differ only in such tensors are the same program.
    """
    constants: list[Tensor] = []
    last = next((n for n in reversed(graph.graph.nodes) if n.op == "placeholder"), None)
    for node in [n for n in graph.graph.nodes if n.op == "get_attr"]:
        value = _attribute(graph, node.target)
        if not isinstance(value, Tensor):
            continue
        if value.numel() == 1 and all(user.target in _FRESH for user in node.users):
            for user in list(node.users):
                _replace_number(graph.graph, user, value)
        else:
            with graph.graph.inserting_after(last) if last else graph.graph.inserting_before(None):
                made = graph.graph.placeholder(f"constant_{len(constants)}")
            made.meta = {**node.meta, "val": fake(value)}
            last = made
            node.replace_all_uses_with(made)
            constants.append(value)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return constants


def _attribute(graph: fx.GraphModule, target: Any) -> Any:
    value: Any = graph
    for name in str(target).split("."):
        value = getattr(value, name)
    return value


def _replace_number(graph: fx.Graph, node: fx.Node, value: Tensor) -> None:
    """Write a number where it is used. What copies it to another device is the number there: nothing is moved."""
    for copy in [user for user in node.users if user.target is torch.ops.aten._to_copy.default]:
        options: dict[str, Any] = {"dtype": value.dtype, "device": value.device, **copy.kwargs}
        if options["dtype"] == value.dtype or (options["dtype"].is_floating_point and value.is_floating_point()):
            _write_number(graph, copy, value, options["dtype"], options["device"])
    _write_number(graph, node, value, value.dtype, value.device)


def _write_number(graph: fx.Graph, node: fx.Node, value: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    options: dict[str, Any] = {"dtype": dtype, "device": device, "pin_memory": False}
    with graph.inserting_before(node):
        made = graph.call_function(torch.ops.aten.full.default, (list(value.shape), value.item()), options)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def canonical(graph: fx.GraphModule) -> Hashable:
    """Return a value that is equal for equal graphs: the same operations on inputs of the same kind."""
    numbers: dict[fx.Node, int] = {}
    rows: list[Hashable] = []
    for node in graph.graph.nodes:
        numbers[node] = len(numbers)
        if node.op == "placeholder":
            rows.append(("placeholder", *_kind(node.meta.get("val"))))
            continue
        target: Any = node.target
        if node.op == "get_attr":
            inner = _attribute(graph, target)
            target = canonical(inner) if isinstance(inner, fx.GraphModule) else ("object", id(inner))
        rows.append((node.op, target, _plain(node.args, numbers), _plain(node.kwargs, numbers)))
    return tuple(rows)


def _kind(value: object) -> tuple[Hashable, ...]:
    if not isinstance(value, Tensor):
        return (str(value),)
    sizes = (tuple(str(n) for n in value.shape), tuple(str(n) for n in value.stride()), str(value.storage_offset()))
    return (*sizes, value.dtype, value.device, value.requires_grad, value.layout)


def _plain(value: object, numbers: dict[fx.Node, int]) -> Hashable:
    if isinstance(value, fx.Node):
        return ("node", numbers[value])
    if isinstance(value, list | tuple):
        return tuple(_plain(item, numbers) for item in value)
    if isinstance(value, dict):
        return tuple((name, _plain(item, numbers)) for name, item in value.items())
    if isinstance(value, slice):
        return ("slice", *(_plain(item, numbers) for item in (value.start, value.stop, value.step)))
    if isinstance(value, float):
        return ("float", value.hex())
    try:
        hash(value)
    except TypeError:
        return ("object", repr(value))
    return (type(value), value)


def drawing(graph: fx.GraphModule) -> fx.Node | None:
    """Return the first node that draws from torch's own generator, here or where a compiler takes it apart."""
    parts = [part for part in graph.modules() if isinstance(part, fx.GraphModule)]
    nodes = (node for part in parts for node in part.graph.nodes if node.op == "call_function")
    return next((node for node in nodes if draws(node.target, node.args, node.kwargs)), None)
