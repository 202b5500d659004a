"""Sizes that may vary: a graph for any of them, and the conditions under which it holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from trainfn._compile._structure import Structure, leaf_names

Dynamic = bool | Sequence[int] | Mapping[str, Sequence[int]] | Literal["auto"] | None


def check_dynamic(dynamic: object) -> None:
    """Raise if ``dynamic`` declares no dimensions."""
    ints = isinstance(dynamic, Sequence) and not isinstance(dynamic, str) and all(isinstance(d, int) for d in dynamic)
    if dynamic in (None, "auto") or isinstance(dynamic, bool | Mapping) or ints:
        return
    raise TypeError(
        f"jit(step, dynamic={dynamic!r}): say which dimensions of the batch vary in size. Write `dynamic=True` for all,"
        ' `dynamic=(1,)` for the second of every leaf, `dynamic={"input_ids": (0, 1)}`, or `dynamic="auto"` for those'
        " that are seen to vary."
    )


def dimensions(dynamic: Dynamic, form: Structure, leaves: Sequence[Any]) -> dict[int, tuple[int, ...]]:
    """Return which dimensions vary of which leaves of ``(state, batch, ...)``.

    Raises:
        ValueError: If ``dynamic`` names a leaf that the batch does not have.
    """
    if not dynamic or isinstance(dynamic, str):
        return {}
    names = leaf_names(form)
    batch = {name.partition("/")[2]: i for i, name in enumerate(names) if name.partition("/")[0] == "1"}
    if isinstance(dynamic, Mapping):
        unknown = sorted(set(dynamic) - set(batch))
        if unknown:
            raise ValueError(
                f"jit(step, dynamic=...) names {unknown}, and the batch has {sorted(batch)}. Only a dimension of these"
                " can vary. Write their names, or `dynamic=True` for all of them."
            )
        wanted = {batch[name]: tuple(dims) for name, dims in dynamic.items()}
    else:
        wanted = {i: tuple(range(8)) if dynamic is True else tuple(dynamic) for i in batch.values()}
    # Sizes 0 and 1 are cases of their own for torch: they broadcast.
    return {
        i: found
        for i, dims in wanted.items()
        if isinstance(leaves[i], Tensor) and (found := tuple(d for d in dims if _varies(leaves[i], d)))
    }


class Seen:
    """The sizes of batches so far, for ``dynamic="auto"``."""

    def __init__(self) -> None:
        self._shapes: dict[str, torch.Size] = {}
        self.varied: dict[str, tuple[int, ...]] = {}

    def note(self, form: Structure, leaves: Sequence[Any]) -> None:
        """Add a batch of ``(state, batch, ...)``; from then on `varied` has the dimensions that differ from before."""
        for name, x in zip(leaf_names(form), leaves, strict=True):
            argument, _, path = name.partition("/")
            if argument != "1" or not isinstance(x, Tensor):
                continue
            first = self._shapes.setdefault(path, x.shape)
            if len(first) == x.dim():
                dims = {d for d, (a, b) in enumerate(zip(first, x.shape, strict=True)) if a != b}
                if dims:
                    self.varied[path] = tuple(sorted(dims.union(self.varied.get(path, ()))))

    def dimensions(self, form: Structure, leaves: Sequence[Any]) -> dict[int, tuple[int, ...]]:
        """As `dimensions`, for those that have varied."""
        names = {name.partition("/")[2] for name in leaf_names(form) if name.partition("/")[0] == "1"}
        return dimensions({name: dims for name, dims in self.varied.items() if name in names}, form, leaves)


def _varies(x: Tensor, dim: int) -> bool:
    return -x.dim() <= dim < x.dim() and x.shape[dim] > 1 and x.is_contiguous()


def symbolic(
    tensors: Sequence[Tensor], places: Sequence[int], dynamic: Mapping[int, Sequence[int]]
) -> tuple[Any, list[Tensor]]:
    """Return a fake mode, and fake tensors of which some sizes are symbols."""
    from torch._dynamo.source import ConstantSource
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    env = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False, duck_shape=False)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    fakes: list[Tensor] = []
    for place, x in zip(places, tensors, strict=True):
        dims = {d % x.dim() for d in dynamic.get(place, ())}
        kinds = [DimDynamic.DYNAMIC if d in dims else DimDynamic.STATIC for d in range(x.dim())]
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        fakes.append(mode.from_tensor(x, source=ConstantSource(f"leaf{place}"), symbolic_context=context))
    return mode, fakes


def conditions(mode: Any, graph: torch.fx.GraphModule) -> Callable[[Sequence[Tensor]], bool]:
    """Return a test of whether a graph of symbolic sizes holds for given inputs."""
    from torch.utils._sympy.printers import PythonPrinter

    where: dict[str, tuple[int, int]] = {}
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for i, node in enumerate(placeholders):
        value = node.meta["val"]
        for d, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, torch.SymInt):
                name = str(size.node._expr)
                if name.isidentifier():
                    where.setdefault(name, (i, d))
    terms = [PythonPrinter().doprint(guard.expr) for guard in mode.shape_env.guards]
    code = f"lambda {', '.join(where)}: {' and '.join(f'({term})' for term in terms) or 'True'}"
    holds = eval(code, {"math": math, "torch": torch})
    spots = list(where.values())
    return lambda inputs: bool(holds(*[inputs[i].shape[d] for i, d in spots]))
