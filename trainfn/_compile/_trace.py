"""A step as a graph: run once on fake tensors, and every operation written down, as jax does.

The graph is flat: it takes the tensors of ``(state, batch, ...)`` one by one and returns tensors one by one. What
Python did while it ran is fixed; see `_outside.py` for what is done about that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Generator, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import make_fx

from trainfn._compile._donate import check_result, check_same, overwrite
from trainfn._compile._graph import canonical, lift_constants, name_inputs
from trainfn._compile._lines import Lines
from trainfn._compile._structure import Function, Leaves, Structure, flatten, leaf_names
from trainfn._dtensor import Spec, held, spec_of
from trainfn._keyed import phases


class Output(NamedTuple):
    """Where one leaf of a step's result comes from.

    Attributes:
        kind: ``"graph"``: output ``place`` of the graph. ``"input"``: leaf ``place`` of the arguments, untouched or
            overwritten in place. ``"value"``: the Python value itself.
        place: See above.
        layout: The layout of a tensor that is spread over ranks.
        value: See above.
    """

    kind: str
    place: int = 0
    layout: Spec | None = None
    value: Any = None


@dataclasses.dataclass(frozen=True)
class Trace:
    """A captured function.

    Attributes:
        graph: Takes the tensors among the leaves of the arguments, then ``constants``; returns a list of tensors.
        constants: Tensors that the function read from elsewhere, such as a closure; passed by reference.
        inputs: The indices of the leaves that the graph takes.
        outputs: Where each leaf of the result comes from.
        structure: The result's structure.
        key: Two traces with equal keys are the same program.
        mode: The fake mode of the graph's example values.
        sharded: Whether a tensor that goes in or comes out is spread over ranks.
        reads_host: Whether the graph has branches, whose conditions are read on the host.
    """

    graph: fx.GraphModule
    constants: list[Tensor]
    inputs: list[int]
    outputs: list[Output]
    structure: Structure
    key: Hashable
    mode: Any
    sharded: bool
    reads_host: bool


class _Run:
    """The function as `make_fx` sees it: flat tensors in, flat tensors out."""

    def __init__(self, fn: Function, leaves: Sequence[Any], form: Structure, donated: list[bool]) -> None:
        self.fn, self.leaves, self.structure, self.donated = fn, leaves, form, donated
        self.inputs = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.layouts = {i: spec_of(leaves[i]) for i in self.inputs}
        self.outputs: list[Output] = []
        self.result: Structure | None = None

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        whole = dict(zip(self.inputs, tensors, strict=True))
        for i, layout in self.layouts.items():
            whole[i] = whole[i] if layout is None else layout.of_local(whole[i])
        leaves = [whole.get(i, leaf) for i, leaf in enumerate(self.leaves)]
        out = self.fn(*self.structure.build(iter(leaves)))
        if self.donated:
            new, self.result = donation(self.donated, self.structure, leaves, out)
            overwrite(self.donated, leaves, new)
        else:
            new, self.result = flatten(out)
        return self._flat(leaves, new)

    def _flat(self, old: Leaves, new: Leaves) -> list[Tensor]:
        # The first place of a tensor counts. An output that is an input is passed through by the caller.
        # It is not an output of the graph, where inductor would copy it.
        places = {id(leaf): i for i, leaf in reversed(list(enumerate(old))) if isinstance(leaf, Tensor)}
        self.outputs, tensors = [], list[Tensor]()
        for leaf in new:
            if not isinstance(leaf, Tensor):
                value = int(leaf) if isinstance(leaf, torch.SymInt) else leaf
                self.outputs.append(Output("value", value=value))
            elif id(leaf) in places:
                self.outputs.append(Output("input", places[id(leaf)]))
            else:
                self.outputs.append(Output("graph", len(tensors), spec_of(leaf)))
                tensors.append(held(leaf))
        return tensors


def donation(
    donated: list[bool], given: Structure, old: Sequence[Any], out: Any, buffers: range = range(0)
) -> tuple[Leaves, Structure]:
    """Return the leaves of a donating step's result, and its structure; ``buffers`` may have other shapes.

    Raises:
        TypeError, ValueError: If the new state can't take the old one's place.
    """
    check_result(out)
    new, form = flatten(out)
    check_same(donated, old, new if form.children[0] == given.children[0] else [], buffers)  # type: ignore[union-attr]
    return new, form


def trace(
    fn: Function,
    leaves: Sequence[Any],
    form: Structure,
    *,
    donated: list[bool],
    dynamic: Mapping[int, Sequence[int]] | None = None,
    modules: nn.Module | None = None,
    lines: Lines | None = None,
) -> Trace:
    """Run a function once on fake tensors and return what it computes as a graph.

    Args:
        fn: Any pure function.
        leaves: The leaves of its arguments; those that are tensors become inputs of the graph.
        form: The structure of its arguments, a tuple.
        donated: For each leaf of the first argument, whether its new value takes the old one's memory; or empty.
        dynamic: For leaves of any size: which of their dimensions.
        modules: The module whose paths the nodes are given.
        lines: Records the user's line of each operation.
    """
    run = _Run(fn, leaves, form, donated)
    mode, fakes = _fakes([held(leaves[i]) for i in run.inputs], run.inputs, dynamic or {})
    lines = lines or Lines()
    try:
        with _conditions(mode), lines.recorded(modules):
            # Tensors that the function reads from outside its arguments are real. They become inputs below.
            graph = make_fx(run, _allow_non_fake_inputs=True)(*fakes)
    finally:
        torch.clear_autocast_cache()  # autocast may have cached low-precision copies of fake parameters
    assert run.result is not None
    names = leaf_names(form)
    name_inputs(graph, [names[i] for i in run.inputs])
    constants = lift_constants(graph, mode.from_tensor)
    layouts = [*run.layouts.values(), *(output.layout for output in run.outputs)]
    sharded = any(layout is not None for layout in layouts)
    branches = any(isinstance(part, fx.GraphModule) for part in graph.children())
    key = canonical(graph)
    return Trace(graph, constants, run.inputs, run.outputs, run.result, key, mode, sharded, branches)


def _fakes(tensors: list[Tensor], places: list[int], dynamic: Mapping[int, Sequence[int]]) -> tuple[Any, list[Tensor]]:
    from torch._subclasses import FakeTensorMode

    # A tensor that stands in two places is two inputs: at the next call they may differ.
    first = {id(x): i for i, x in reversed(list(enumerate(tensors)))}
    tensors = [x if first[id(x)] == i else x.detach().requires_grad_(x.requires_grad) for i, x in enumerate(tensors)]
    if not dynamic:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        return mode, [mode.from_tensor(x) for x in tensors]
    from trainfn._compile._sizes import symbolic

    return symbolic(tensors, places, dynamic)


@contextlib.contextmanager
def _conditions(mode: Any) -> Generator[None]:
    mkldnn, cudnn, validated = (
        torch._C._get_mkldnn_enabled(),
        torch._C._get_cudnn_enabled(),
        Distribution._validate_args,
    )
    try:
        # The recurrent kernels of oneDNN and cuDNN have no fake backward pass; the plain ones are unrolled.
        torch._C._set_mkldnn_enabled(False)
        torch._C._set_cudnn_enabled(False)
        Distribution.set_default_validate_args(False)  # there are no numbers to validate
        # One thread for the backward pass, since modes are per thread.
        # With symbols for sizes, torch's decompositions in Python: some of those in C++ ask for numbers.
        symbols = contextlib.nullcontext() if mode.shape_env is None else enable_python_dispatcher()
        with (
            mode,
            symbols,
            phases(apart=False),
            _uncompiled(),
            torch.autograd.set_multithreading_enabled(False),
            torch.no_grad(),
        ):
            yield
    finally:
        torch._C._set_mkldnn_enabled(mkldnn)
        torch._C._set_cudnn_enabled(cudnn)
        Distribution.set_default_validate_args(validated)


@contextlib.contextmanager
def _uncompiled() -> Generator[None]:
    """Run functions that a user compiled with `torch.compile` uncompiled: as a part of this graph."""
    if "torch._dynamo" not in sys.modules:  # it takes a second to import, and nothing is compiled without it
        yield
        return
    # Its tracer reads the branches of `torch.cond`; it would make symbols of sizes that it has seen vary elsewhere.
    settings = {"error_on_nested_fx_trace": False, "automatic_dynamic_shapes": False}
    with torch._dynamo.config.patch(settings):
        yield
