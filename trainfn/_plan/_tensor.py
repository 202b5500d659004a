"""Linear layers that several ranks compute together: each has some columns, or some rows, of the weight.

Between a layer split by columns and the next one split by rows, a rank holds only its part of the activations. Nothing
is communicated there. Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, autograd
from torch.distributed.tensor import DTensor

from trainfn import tree


class Enter(autograd.Function):
    """The input of a split layer, the same on all ranks; backward, the sum of the gradients of the ranks' parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Any) -> Tensor:
        """Return the input."""
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Add up the gradients of the ranks' parts."""
        # An all-reduce of the activation's bytes over ``tensor``, in each backward pass: each rank has differentiated
        # its columns only.
        return tree.sum_over(grads[0].contiguous(), ctx.mesh), None


class Leave(autograd.Function):
    """The sum of all ranks' parts; backward, the same gradient for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Any) -> Tensor:
        """Add up the ranks' parts."""
        # An all-reduce of the activation's bytes over ``tensor``, in each forward pass: each rank has multiplied its
        # rows only.
        return tree.sum_over(x.contiguous(), mesh)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradient."""
        return grads[0], None


def split_dim(weight: Any) -> int | None:
    """The dimension of a weight that is split over the axis ``tensor``."""
    if not isinstance(weight, DTensor):
        return None
    names = weight.device_mesh.mesh_dim_names or ()
    named: Any = zip(names, weight.placements, strict=True)
    return next((placement.dim for axis, placement in named if axis == "tensor" and placement.is_shard()), None)


def linear(use: Callable[..., Tensor], x: Tensor, weight: DTensor, bias: Any = None) -> Tensor:
    """`torch.nn.functional.linear` of a weight that is split; ``use(param, part=True)`` is this rank's part of one."""
    mesh = weight.device_mesh["tensor"]
    if split_dim(weight) == 0:
        part = use(bias, part=True) if isinstance(bias, DTensor) else bias
        return F.linear(Enter.apply(x, mesh), use(weight, part=True), part)
    rows = weight.shape[1] // mesh.size()
    if x.shape[-1] != rows:
        raise ValueError(
            f"Plan(rules=...): a layer of weight {list(weight.shape)} is split by rows, so each rank expects {rows} of"
            f" its inputs, and gets {x.shape[-1]}. What comes before it must be split by columns."
        )
    out = Leave.apply(F.linear(x, use(weight, part=True)), mesh)
    return out if bias is None else out + (use(bias) if isinstance(bias, DTensor) else bias)
