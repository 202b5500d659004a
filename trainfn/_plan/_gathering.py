"""Parameters where they are used: gathered for one operation, and not kept.

A module runs on `DTensor` parameters. A function that is called on one gets its full value, which exists for that call.
Autograd does not keep the value: the backward pass gathers it again, and reduces the gradient as soon as it is known. A
captured step has all of this as operations of its graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from trainfn._keyed import COMPOSITES
from trainfn._plan import _tensor
from trainfn._plan._layout import Layout
from trainfn._plan._place import gradient_placements

_ASKED = ("shape", "dtype", "device", "requires_grad", "ndim", "is_leaf", "grad", "grad_fn", "layout", "is_meta",
          "is_cuda")  # fmt: skip
# Questions about a parameter, for which its values are not needed.
_QUESTIONS = {
    *(getattr(Tensor, name).__get__ for name in _ASKED),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point, Tensor.is_complex),
    *(
        Tensor._version.__get__,  # pyright: ignore[reportAttributeAccessIssue]
        Tensor.register_hook,
        Tensor.register_post_accumulate_grad_hook,
    ),
    *(getattr(Tensor.grad, change) for change in ("__set__", "__delete__")),
    *(Tensor.requires_grad_, Tensor.__len__, Tensor.is_contiguous, Tensor.element_size, torch.is_floating_point),
}
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


class Usage(NamedTuple):
    """Placements of a parameter and of its gradient, on each axis of the mesh.

    Attributes:
        used: The placements of the value that a function computes with.
        local: The placements of the gradient that the function's backward pass returns on this rank.
        kept: The placements of the gradient that is kept until the update.
    """

    used: tuple[Any, ...]
    local: tuple[Any, ...]
    kept: tuple[Any, ...]


def usage(plan: Layout, param: DTensor, *, tensor_parallel: bool) -> Usage:
    """The usage of one parameter; ``tensor_parallel`` if the operation works on this rank's part of it."""
    named = list(zip(param.device_mesh.mesh_dim_names or (), param.placements, strict=True))
    part = [axis == "tensor" and tensor_parallel for axis, _ in named]
    return Usage(
        used=tuple(now if p else Replicate() for p, (_, now) in zip(part, named, strict=True)),
        local=tuple(
            Partial() if axis != "tensor" else now if p else Replicate()
            for p, (axis, now) in zip(part, named, strict=True)
        ),
        kept=gradient_placements(plan, param),
    )


class Use(torch.autograd.Function):
    """A parameter's value on this rank; backward, the sum of its gradient, with the placements that the plan keeps."""

    @staticmethod
    def forward(ctx: Any, param: DTensor, plan: Layout, how: Usage) -> Tensor:
        """Gather."""
        ctx.spec = param.device_mesh, param.dtype, param.shape, param.stride()
        ctx.plan, ctx.how = plan, how
        return gathered(param, plan, how)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Reduce."""
        mesh, dtype, shape, stride = ctx.spec
        grad = grads[0].to(ctx.plan.precision.reduce or dtype)
        sums = DTensor.from_local(grad, mesh, ctx.how.local, run_check=False, shape=shape, stride=stride)
        # Stages 2 and 3: a reduce-scatter of the gradient's bytes over ``shard``, in each backward pass. So a rank
        # never holds more than one full gradient. Stages 0 and 1: none; the gradient stays a summand until the update.
        kept = sums.redistribute(placements=ctx.how.kept)
        if kept.dtype != dtype:
            part = kept.to_local().to(dtype)
            kept = DTensor.from_local(part, mesh, ctx.how.kept, run_check=False, shape=shape, stride=stride)
        return kept, None, None


def gathered(param: DTensor, plan: Layout, how: Usage) -> Tensor:
    """The value that this rank computes with.

    Stage 3: an all-gather of the parameter's bytes in the dtype of the computation, for each use in the forward pass.
    With ``reshard``, the backward pass gathers it once more. Stages 0 to 2: no communication, the parameter is full.
    """
    compute = plan.precision.compute
    if compute is not None and param.is_floating_point():
        return param.to(compute).redistribute(placements=how.used).to_local()  # type: ignore[attr-defined]
    return param.redistribute(placements=how.used).to_local()


class Gathering(TorchFunctionMode):
    """Functions that are called in this block get the values of parameters, not `DTensor`s."""

    def __init__(self, plan: Layout, training: bool) -> None:
        super().__init__()
        self.plan, self.training = plan, training
        self.live: dict[int, tuple[StorageWeakRef, DTensor, Usage]] = {}
        self.values: dict[int, StorageWeakRef] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Gather the parameters that the function is called on."""
        if func in _QUESTIONS:
            return func(*args, **(kwargs or {}))
        if func in COMPOSITES:  # the backward pass, which may compute a checkpointed module again
            return COMPOSITES[func](self, *args, **(kwargs or {}))
        if func is F.linear:
            given = _linear(*args, **(kwargs or {}))
            if _tensor.split_dim(given[1]) is not None:
                return _tensor.linear(self.value, *given)
        if any(self._is_ours(x) for x in _written(func, args, kwargs or {})):
            how = ".data = ..." if func.__name__ == "__set__" else func.__name__
            raise ValueError(
                f"step(state, batch): the forward pass writes into a parameter, by `{how}`, and each rank would write"
                " into a copy. Keep it in a buffer, `module.register_buffer(...)`, or change it after the step, by"
                " `tfn.transforms.after`."
            )
        args = tuple(self._use(x) for x in args)
        return func(*args, **{name: self._use(x) for name, x in (kwargs or {}).items()})

    def _use(self, x: Any) -> Any:
        if isinstance(x, DTensor):
            return self.value(x) if self._is_parameter(x) else x
        if type(x) is list or type(x) is tuple:
            return type(x)(self._use(item) for item in x)
        return x

    def _is_parameter(self, x: DTensor) -> bool:
        """Whether it is a parameter, trained or frozen, and not a gradient."""
        return x.requires_grad or not self.training or isinstance(x, nn.Parameter)

    def _is_ours(self, x: Any) -> bool:
        """Whether it is a parameter, its value on this rank, or a view of that."""
        if isinstance(x, DTensor):
            return self._is_parameter(x)
        return type(x) is Tensor and StorageWeakRef(x.untyped_storage()).cdata in self.values

    def value(self, param: DTensor, *, part: bool = False) -> Tensor:
        """The value that this rank computes with: a full parameter, or its part along the axis ``tensor``."""
        how = usage(self.plan, param, tensor_parallel=part)
        grads = torch.is_grad_enabled()
        value = Use.apply(param, self.plan, how) if grads else gathered(param, self.plan, how)
        storage = StorageWeakRef(value.untyped_storage())
        self.values[storage.cdata] = storage
        if grads:
            self.live[storage.cdata] = storage, param, how
        return value

    # --- instead of the values that autograd would keep -----------------------------------------------------------

    def pack(self, kept: Tensor) -> Any:
        """The parameter to gather again, in place of a gathered value or a view of it."""
        found = self.live.get(StorageWeakRef(kept.untyped_storage()).cdata)
        if found is None:
            return kept
        _, param, how = found
        return param.detach(), how, kept.shape, kept.stride(), kept.storage_offset()

    def unpack(self, kept: Any) -> Tensor:
        """Gather it again."""
        if isinstance(kept, Tensor):
            return kept
        param, how, shape, stride, offset = kept
        with torch.no_grad():
            return gathered(param, self.plan, how).as_strided(shape, stride, offset)


_SETS = frozenset(f"__{name}__" for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod",
                                             "ipow", "iand", "ior", "ixor", "ilshift", "irshift"))  # fmt: skip


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """The tensors that a function writes into, by torch's rule for names."""
    name = getattr(func, "__name__", "")
    out = kwargs.get("out") if kwargs else None
    if func is F.embedding and kwargs.get("max_norm") is not None:
        yield args[1]
    elif (name.endswith("_") and not name.endswith("__")) or name in _SETS or func == _SET_DATA:
        given = args[0] if args else None
        yield from given if isinstance(given, list | tuple) else (given,)
    elif out is not None:
        yield from out if isinstance(out, list | tuple) else (out,)


def _linear(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


@contextlib.contextmanager
def gathering(plan: Layout, *, training: bool) -> Generator[None]:
    """Run modules on `DTensor` parameters in this block."""
    mode = Gathering(plan, training)
    with contextlib.ExitStack() as stack:
        if training and plan.stage == 3 and plan.reshard:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(mode.pack, mode.unpack))
        stack.enter_context(mode)
        yield
