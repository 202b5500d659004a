"""Parameters that a forward pass gathered are gathered again for the backward pass, not kept in between.

In eager mode autograd's saved tensors do it (`_plan/_gathering.py`). A compiled step is one graph, where a gathered
parameter would live from its first use to its last: this pass gives the backward nodes a copy of the gather.
"""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

_GATHERS = ("all_gather_into_tensor", "all_gather_into_tensor_coalesced")
# What follows a gather to make a parameter of it: no arithmetic.
_RESHAPING = {
    *(
        "wait_tensor",
        "view",
        "_unsafe_view",
        "reshape",
        "permute",
        "transpose",
        "t",
        "slice",
        "split",
        "getitem",
        "cat",
    ),
    *(
        "unsqueeze",
        "squeeze",
        "expand",
        "alias",
        "detach",
        "clone",
        "as_strided",
        "split_with_sizes",
        "chunk",
        "select",
    ),
    *("convert_element_type", "_to_copy", "narrow", "contiguous"),
}


class Regather(CustomGraphPass):
    """The pass; see above."""

    def __init__(self, then: Any = None) -> None:
        self.then = then  # another pass that was set

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph in place."""
        regather(graph)
        if self.then is not None:
            self.then(graph)

    def uuid(self) -> Any:
        """For torch's compile cache."""
        own = hashlib.sha256(inspect.getsource(inspect.getmodule(Regather) or Regather).encode()).hexdigest()
        return own if self.then is None else (own, self.then.uuid()) if hasattr(self.then, "uuid") else None


def regather(graph: fx.Graph) -> None:
    """Give each backward node that uses a gathered parameter its own gather, right before it."""
    backward = _backward(graph)
    made = _gathered(graph, backward)
    again: dict[fx.Node, fx.Node] = {}
    for node in backward:
        for used in [n for n in node.all_input_nodes if n in made]:
            with graph.inserting_before(node):
                node.replace_input_with(used, _copied(graph, used, made, again))
    graph.eliminate_dead_code(lambda node: node.op == "output" or (node not in made and node.is_impure()))


def _backward(graph: fx.Graph) -> dict[fx.Node, None]:
    """The nodes of the backward pass, and all that follows from them; a constant belongs to no pass."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if any(n in found for n in inputs) or (inputs and node.meta.get("autograd_backward")):
            found[node] = None
    return found


def _gathered(graph: fx.Graph, backward: dict[fx.Node, None]) -> dict[fx.Node, None]:
    """The nodes of the forward pass that gather a parameter, or only reshape one that is gathered."""
    made: dict[fx.Node, None] = {}
    for node in graph.nodes:
        name = _name(node.target) if node.op == "call_function" and node not in backward else ""
        if name in _GATHERS or (
            name in _RESHAPING and node.all_input_nodes and all(n in made for n in node.all_input_nodes)
        ):
            made[node] = None
    return made


def _name(target: Any) -> str:
    packet = getattr(target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(target, "__name__", "")


def _copied(graph: fx.Graph, node: fx.Node, made: dict[fx.Node, None], again: dict[fx.Node, fx.Node]) -> fx.Node:
    """A copy of a gathered parameter for the backward pass, made at its first use there."""
    if node not in made:
        return node
    if node not in again:
        copy = graph.node_copy(node, lambda n: _copied(graph, n, made, again))
        copy.meta["autograd_backward"] = True
        again[node] = copy
    return again[node]


def installed() -> Any:
    """What to set in inductor's configuration while a step is compiled."""
    from torch._inductor import config as inductor

    config: Any = inductor
    then = config.post_grad_custom_pre_pass
    return config.patch(post_grad_custom_pre_pass=then if isinstance(then, Regather) else Regather(then))
