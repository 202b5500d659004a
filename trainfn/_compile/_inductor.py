"""Compile one flat graph with inductor, past AOTAutograd where the graph needs none of it."""

from __future__ import annotations

import contextlib
import logging
import operator
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from trainfn._compile import _recipes
from trainfn._compile._atoms import inputs, owner
from trainfn._compile._blocks import assemble, pieces
from trainfn._compile._leafwise import leafwise
from trainfn._compile._onefile import few_files
from trainfn._compile._structure import Function
from trainfn._compile._twins import merge_twins

_COPY: Any = torch.ops.aten.copy_.default
# `few_files` replaces functions of inductor for the whole process, so one thread compiles at a time. The others wait.
_ONE = threading.Lock()


def compile_graph(graph: fx.GraphModule) -> Function:
    """Compile a flat graph (see `cut`) with inductor, equal parts once and all C++ in a few files.

    Some versions of inductor have faults in the kernels that combine the leaves of a list. A graph that fails is
    compiled again without lists, and at last as one graph by inductor's front door.
    """
    examples = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    key = _recipes.key_of(graph, examples)
    ways: list[Callable[[], Function]] = [
        lambda: _recipes.follow(key),
        lambda: _in_pieces(graph, key),
        lambda: _in_pieces(_without_lists(graph), key),
        lambda: _spread(_by_the_front_door(_without_lists(graph), examples)),
    ]
    first: Exception | None = None
    for compiled in ways:
        try:
            with _ONE, few_files():
                return compiled()
        except _recipes.Absent:
            continue
        except Exception as error:
            first = first or error
            logging.getLogger("trainfn").info("inductor could not compile the graph, and gets another form: %s", error)
    assert first is not None
    raise first


def _in_pieces(graph: fx.GraphModule, key: str | None) -> Callable[..., Any]:
    source, ready = pieces(graph, inductor)
    if key is not None:
        _recipes.keep(key, source, ready)
    return assemble(source, ready)


def _without_lists(graph: fx.GraphModule) -> fx.GraphModule:
    return fx.GraphModule(graph, leafwise(graph, everywhere=True))


def _spread(compiled: Callable[[list[Tensor]], Sequence[Any]]) -> Callable[..., Sequence[Any]]:
    return lambda *args: compiled(list(args))


def inductor(module: fx.GraphModule, examples: list[Tensor]) -> _recipes.Piece:
    """Compile a flat graph whose examples are fake tensors. What is returned takes a list and empties it."""
    from torch._guards import TracingContext, detect_fake_mode, tracing
    from torch._inductor import config

    if not config.triton.cudagraphs and not config.max_autotune and _is_flat(module):
        kept, count = _seeds_kept(module)
        with torch.no_grad(), tracing(TracingContext(detect_fake_mode(examples))), _repeatable(examples):
            with contextlib.suppress(ImportError, TypeError):  # another torch: by its front door
                compiled = _past_autograd(kept, examples)
                return _recipes.Piece(compiled, count, getattr(compiled, "_fx_graph_cache_key", None))
    return _by_the_front_door(module, examples)


def _by_the_front_door(module: fx.GraphModule, examples: list[Tensor]) -> _recipes.Piece:
    from torch._guards import TracingContext, detect_fake_mode, tracing
    from torch._inductor.compile_fx import compile_fx

    module, count = _seeds_kept(module)
    # `view` raises where strides do not allow it, and `reshape` copies there.
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default  # a decomposition may give other strides
    module.recompile()
    with torch.no_grad(), tracing(TracingContext(detect_fake_mode(examples))), _repeatable(examples):
        whole: Any = compile_fx(module, examples)
        return _recipes.Piece(lambda args: whole(*args), count)


def _seeds_kept(module: fx.GraphModule) -> tuple[fx.GraphModule, int]:
    """Return a graph that also returns the seeds of its attention kernels, and the number of its own outputs.

    Fake tensors say that the seeds are on the GPU. The kernels put them on the processor where nothing is dropped,
    and inductor would write a later result of the GPU into that memory. It does not write into what is returned.
    """
    out = next(iter(reversed(module.graph.nodes)))
    seeds = [node for node in module.graph.nodes if node.target is operator.getitem and _is_seed(node)]
    if not seeds:
        return module, len(out.args[0])
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, values)
    own = [values[x] if isinstance(x, fx.Node) else x for x in out.args[0]]
    graph.output([*own, *(values[seed] for seed in seeds)])
    return fx.GraphModule(module, graph), len(own)


def _is_seed(node: fx.Node) -> bool:
    """Whether a node is a small result of an attention kernel, beside the attention and its sums."""
    source, part = node.args
    assert isinstance(part, int)
    attention = isinstance(source, fx.Node) and "_scaled_dot_product_" in str(source.target)
    value = node.meta.get("val")
    return attention and part >= 2 and isinstance(value, Tensor) and value.dim() < 2


@contextlib.contextmanager
def _repeatable(examples: list[Tensor]) -> Generator[None]:
    """Same inputs, same bits: no kernel of an accelerator adds up in the order in which its threads arrive."""
    flag, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if all(not isinstance(x, Tensor) or x.device.type == "cpu" for x in examples):
        yield
        return
    try:
        torch.use_deterministic_algorithms(True, warn_only=not flag or warn_only)
        yield
    finally:
        torch.use_deterministic_algorithms(flag, warn_only=warn_only)


def _is_flat(module: fx.GraphModule) -> bool:
    """Whether the graph has no graphs in it, such as the branches of `torch.cond`."""
    return not any(isinstance(part, fx.GraphModule) for part in module.children())


def _writes_last(module: fx.GraphModule) -> bool:
    """Whether the graph writes nothing but new values of its inputs, and reads none of them afterwards."""
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
    # AOTAutograd would trace the graph twice more, for a backward pass and for writes. The backward pass is in the
    # graph already, and writes are at its end.
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
        # Inductor may choose other strides for what nobody sees. The next state must have those of this one.
        out.meta["user_visible_output_idxs"] = [n for n, x in enumerate(out.args[0]) if isinstance(x, fx.Node)]
        compiled: Any = compile_fx_inner(graph, examples, is_inference=True)
    return compiled


def _decomposed(module: fx.GraphModule, examples: list[Tensor]) -> fx.GraphModule:
    """The graph in the operations that inductor lowers; it writes at its end."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx import traceback
    from torch.fx.experimental.proxy_tensor import make_fx

    table = select_decomp_table()
    out = next(iter(reversed(module.graph.nodes)))
    wanted = [x.meta["val"] if isinstance(x, fx.Node) else None for x in out.args[0]]

    def run(*args: Any) -> list[Any]:
        found = _Reshaping(module).run(*args)
        return [x if like is None else _laid_out(x, like) for x, like in zip(found, wanted, strict=True)]

    writes_within = not _writes_last(module)  # such as `add_`, in an unrolled RNN
    functional = torch.func.functionalize(run, remove="mutations") if writes_within else run
    with traceback.preserve_node_meta():  # which nodes are of the backward pass
        graph = make_fx(functional, table, _allow_non_fake_inputs=True)(*examples)
    merge_twins(graph.graph)
    out = next(iter(reversed(graph.graph.nodes)))
    # The writes into the old state go to the end: inductor may then put any read of it where it likes.
    for node in list(graph.graph.nodes):
        if node.target is _COPY and node.args[0].op == "placeholder":
            out.prepend(node)
    graph.recompile()
    return graph


class _Reshaping(fx.Interpreter):
    """Runs a graph; a view that a decomposition's strides do not allow becomes a copy."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.view.default:
            target = torch.ops.aten.reshape.default
        return super().call_function(target, args, kwargs)


def _laid_out(x: Any, like: Any) -> Any:
    """The tensor with the strides of another one of its shape: a decomposition may give others."""
    if not isinstance(x, Tensor) or x.numel() == 0 or any(isinstance(n, torch.SymInt) for n in like.shape):
        return x
    if all(a == b or n == 1 for n, a, b in zip(x.shape, x.stride(), like.stride(), strict=True)):
        return x
    order = sorted(range(x.dim()), key=lambda d: (-like.stride(d), d))
    back = [order.index(d) for d in range(x.dim())]
    return x.permute(order).contiguous().permute(back)
