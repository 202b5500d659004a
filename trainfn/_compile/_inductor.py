"""Compile one flat graph with inductor, past AOTAutograd where the graph needs none of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from trainfn._compile._atoms import inputs, owner
from trainfn._compile._blocks import compile_pieces
from trainfn._compile._onefile import few_files
from trainfn._compile._twins import merge_twins

_COPY: Any = torch.ops.aten.copy_.default


def compile_graph(graph: fx.GraphModule) -> Callable[..., Any]:
    """Compile a flat graph (see `cut`) with inductor, equal parts once and all C++ in a few files."""
    with few_files():
        return compile_pieces(graph, inductor)


def inductor(module: fx.GraphModule, examples: list[Tensor]) -> Callable[[list[Tensor]], Sequence[Any]]:
    """Compile a flat graph whose examples are fake tensors. What is returned takes a list and empties it."""
    from torch._guards import TracingContext, detect_fake_mode, tracing
    from torch._inductor import config

    with torch.no_grad(), tracing(TracingContext(detect_fake_mode(examples))):
        if not config.triton.cudagraphs and _writes_last(module):
            with contextlib.suppress(ImportError, TypeError):  # another torch: by its front door
                return _past_autograd(module, examples)
        from torch._inductor.compile_fx import compile_fx

        whole: Any = compile_fx(module, examples)
        return lambda args: whole(*args)


def _writes_last(module: fx.GraphModule) -> bool:
    """Whether all that the graph writes are new values of its inputs, which nobody reads afterwards."""
    written: set[fx.Node] = set()
    for node in module.graph.nodes:
        if any(owner(used) in written for used in inputs(node)):
            return False
        if node.op != "call_function" or not getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            continue
        if node.target is not _COPY or node.args[0].op != "placeholder" or node.users:
            return False
        written.add(node.args[0])
    return True


def _past_autograd(module: fx.GraphModule, examples: list[Tensor]) -> Callable[[list[Tensor]], Sequence[Any]]:
    from torch._dispatch.python import enable_python_dispatcher
    from torch._guards import detect_fake_mode
    from torch._inductor.compile_fx import _recursive_joint_graph_passes, compile_fx_inner
    from torch._inductor.virtualized import V

    mode: Any = detect_fake_mode(examples)
    with V.set_fake_mode(mode), enable_python_dispatcher():
        with mode:
            graph = _decomposed(module, examples)
        device = next((t.device for t in examples if t.device.type != "cpu"), torch.device("cpu"))
        graph = _recursive_joint_graph_passes(graph, input_device=device)
        out = next(iter(reversed(graph.graph.nodes)))
        out.meta["user_visible_output_idxs"] = [n for n, x in enumerate(out.args[0]) if isinstance(x, fx.Node)]
        compiled: Any = compile_fx_inner(graph, examples, is_inference=True)
    return compiled


def _decomposed(module: fx.GraphModule, examples: list[Tensor]) -> fx.GraphModule:
    """The graph in the operations that inductor lowers; it writes at its end."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(fx.Interpreter(module).run, select_decomp_table(), _allow_non_fake_inputs=True)(*examples)
    merge_twins(graph.graph)
    out = next(iter(reversed(graph.graph.nodes)))
    for node in list(graph.graph.nodes):
        if node.target is _COPY and node.args[0].op == "placeholder":
            out.prepend(node)
    graph.recompile()
    return graph
