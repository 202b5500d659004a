"""The conditions under which a step is captured, and what to say when it can't be."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Generator
from typing import Any

import optree
import torch

from trainfn._keyed import HANDLERS
from trainfn.errors import CaptureError

# Which cause a message of torch's points to, and the remedy. The first that matches is told.
_UNKEYED = "draws from torch's global generator"
_REMEDIES = (
    (
        rf"{_UNKEYED}|does not support RNG ops in recompute regions",
        "torch computes this part on behalf of another function (a checkpoint, an autograd.Function, a condition),"
        " where its random functions, attention among them, can't be rerouted to state.key. Draw outside of that part.",
    ),
    (
        r"InvalidCxxCompiler|No working C\+\+ compiler|CppCompileError",
        "torch's compiler needs a C++ compiler on this machine and found none that works. Install g++ or clang++, or"
        " name one in the environment variable CXX.",
    ),
    (
        r"\.item\(\)|Tensor\.item|_local_scalar_dense|__float__|__int__|tolist|\.numpy\(\)",
        "a number was taken out of a tensor. Keep it a tensor; what should be logged goes into the metrics,"
        ' `return mean, {"name": tfn.Mean.of(x)}`, and reaches the callbacks as a number.',
    ),
    (
        r"[Dd]ata-dependent|torch\.cond|dynamic control flow|Data dependent",
        "a branch depends on a tensor's values. Choose with `torch.where(condition, a, b)`.",
    ),
    (
        r"nonzero|masked_select|dynamic shape operator|boolean|unique",
        "a shape depends on a tensor's values. Keep the shape and weigh with a mask: `tfn.Mean.of(values, mask)`.",
    ),
    (
        r"print|logging",
        "it prints. Return a metric and print it in a callback: `tfn.callbacks.every(100, print)`.",
    ),
)


@contextlib.contextmanager
def capturing(*, regather: bool = False) -> Generator[None]:
    """Settings of torch's tracer for the time of one compilation; all are put back afterwards."""
    from torch._dynamo.variables.torch import get_overridable_functions  # the tracer takes seconds to import

    quiet = {getattr(logging.Logger, name) for name in dir(logging.Logger) if not name.startswith("_")}
    config = torch._dynamo.config
    # A warning or a log line of a library's forward pass can't run in a graph; it would be all that breaks it.
    settings: dict[str, Any] = {
        "trace_autograd_ops": True,  # the backward pass is part of the graph
        "recompile_limit": 10_000,  # `max_graphs` is the budget, and its message says more
        "ignore_logging_functions": config.ignore_logging_functions | quiet | {warnings.warn},
    }
    overridable = get_overridable_functions()
    hidden = {function for function in HANDLERS if function not in overridable}  # torch shows these to modes in eager
    overridable.update(hidden)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(config.patch(settings))
            if regather:
                from trainfn._compile._regather import installed  # imports inductor

                stack.enter_context(installed())
            yield
    finally:
        overridable.difference_update(hidden)


def check_no_sync(graph: torch.fx.GraphModule) -> None:
    """Raise if the graph takes a number out of a tensor, for itself or as a size: it would wait for the device.

    Such a graph compiles, for torch has symbols for the numbers; it is the promise of a step without syncs that it
    would break.
    """
    known: set[Any] = set()
    for node in graph.graph.nodes:
        symbols = set[Any]().union(*map(_free_symbols, optree.tree_leaves(node.meta.get("example_value"))))
        if node.op == "placeholder":
            known |= symbols
        elif symbols - known:
            what = "Tensor.item()" if node.target == "item" else "a dynamic shape operator"
            raise RuntimeError(f"{what}\n{node.stack_trace}")


def check_keyed(graph: torch.fx.GraphModule) -> None:
    """Raise if the graph draws from torch's own generator: where torch turned our mode off while it traced.

    It does so for what is traced on behalf of another function: a custom autograd.Function, a branch of torch.cond.
    """
    nodes = [node for part in graph.modules() if isinstance(part, torch.fx.GraphModule) for node in part.graph.nodes]
    for node in nodes:
        function = getattr(torch.Tensor, node.target, None) if node.op == "call_method" else node.target
        if node.op.startswith("call_") and (
            _is_random_kernel(function) or (function in HANDLERS and not _draws_nothing(node))
        ):
            raise RuntimeError(f"{getattr(function, '__name__', function)} {_UNKEYED}\n{node.stack_trace}")


def _is_random_kernel(function: Any) -> bool:
    packet = getattr(function, "overloadpacket", function)
    if not isinstance(packet, torch._ops.OpOverloadPacket) or "attention" in packet.__name__:
        return False  # attention is marked as random, dropout or not
    return any(torch.Tag.nondeterministic_seeded in getattr(packet, name).tags for name in packet.overloads())


def _draws_nothing(node: torch.fx.Node) -> bool:
    """Whether a random function is asked not to be random: attention without dropout, dropout not in training."""
    off = (node.args[2:3], node.kwargs.get("training"), node.kwargs.get("train"))
    if node.target is torch.nn.functional.scaled_dot_product_attention:
        return bool((*node.args[4:5], node.kwargs.get("dropout_p", 0.0))[0] == 0.0)
    return "rnn" in str(node.target) or off[0] == (False,) or False in off[1:]


def _free_symbols(value: Any) -> set[Any]:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols  # imports sympy

    symbolic = isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | torch.Tensor)
    return set(free_unbacked_symbols(value)) if symbolic else set()


def capture_error(error: Exception) -> CaptureError:
    """The error for a step that runs eagerly but can't be captured."""
    text = str(error)
    lines = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)', text)
    own = [line for line in lines if "/trainfn/" not in line[0]] or lines
    place = f"\n\n  {own[-1][0]}:{own[-1][1]}, in {own[-1][2]}\n    {own[-1][3]}\n" if own else "\n"
    cause = next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, text)), None)
    said = text.strip().removeprefix("backend='counted' raised:\n").splitlines()[0]
    reason = cause or f"torch says: {said}"
    return CaptureError(
        f"this step runs, but can't be compiled as one graph:{place}\n{reason[0].upper() + reason[1:]}"
        "\nTo run it as it is, without compiling: `tfn.jit(step, compile=False)`."
    )
