"""Tensors that are spread over ranks, `DTensor`: whether one is, this rank's part of it, and the full tensor.

No other file asks these questions. The class is not imported, for that takes a second: only it has ``placements``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_distributed(x: Any) -> TypeGuard[DTensor]:
    """Return whether a value is a `DTensor`.

    >>> is_distributed(torch.zeros(2))
    False
    """
    return isinstance(x, Tensor) and hasattr(x, "placements")


def is_split(x: Any) -> bool:
    """Return whether a value is a `DTensor` of which no rank holds everything.

    >>> is_split(torch.zeros(2))
    False
    """
    return is_distributed(x) and any(placement.is_shard() for placement in x.placements)


def local(x: Any) -> Any:
    """Return this rank's part of a `DTensor`, with its derivative; any other value as it is.

    >>> local(torch.zeros(2))
    tensor([0., 0.])
    """
    return x.to_local() if is_distributed(x) else x


def held(x: Any) -> Any:
    """Return the tensor that holds this rank's part of a `DTensor`, without a derivative; any other value as it is."""
    return x._local_tensor if hasattr(x, "placements") else x  # no second call: a step asks it of every leaf


def full(x: Any) -> Any:
    """Return all values of a `DTensor` as a plain tensor, on every rank; any other value as it is.

    One gather of the full tensor's bytes for each axis that splits it. Every rank calls this.

    >>> full(torch.zeros(2))
    tensor([0., 0.])
    """
    if not is_distributed(x):
        return x
    from torch.distributed.tensor import Replicate

    return x.redistribute(placements=[Replicate()] * x.device_mesh.ndim).to_local()


class Spec(NamedTuple):
    """How a `DTensor` is spread over ranks.

    Attributes:
        mesh: The ranks, by axes.
        placements: For each axis, whether it splits the tensor, repeats it, or holds summands of it.
        shape: The shape of the full tensor.
        stride: The same.
    """

    mesh: Any
    placements: Any
    shape: Any
    stride: Any

    def of_local(self, part: Tensor, placements: Sequence[Any] | None = None) -> DTensor:
        """Return the `DTensor` of which ``part`` is this rank's part; nothing is communicated or checked."""
        from torch.distributed.tensor import DTensor

        where = self.placements if placements is None else placements
        return DTensor.from_local(part, self.mesh, where, run_check=False, shape=self.shape, stride=self.stride)


def spec_of(x: Any) -> Spec | None:
    """Return how a `DTensor` is spread over ranks, and None for any other value."""
    return Spec(x.device_mesh, x.placements, x.shape, x.stride()) if is_distributed(x) else None


def spread_like(part: Tensor, like: Any, placements: Sequence[Any] | None = None) -> Any:
    """Return the `DTensor` with this rank's part, spread as ``like`` is; ``part`` itself if ``like`` is plain.

    >>> spread_like(torch.zeros(2), torch.ones(2))
    tensor([0., 0.])
    """
    spec = spec_of(like)
    return part if spec is None else spec.of_local(part, placements)


def split_like(x: Tensor, like: Any) -> Any:
    """Return this rank's part of a full tensor, spread as ``like`` is: the inverse of `full`.

    Nothing is communicated: each rank cuts its part out of ``x``. Where ``like`` has summands on an axis, the first
    rank of the axis has all of them, and the others have zeros.

    >>> split_like(torch.zeros(2), torch.ones(2))
    tensor([0., 0.])
    """
    if not is_distributed(like):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * like.device_mesh.ndim
    spread = DTensor.from_local(x, like.device_mesh, everywhere, run_check=False)
    if not any(placement.is_partial() for placement in like.placements):
        return spread.redistribute(placements=like.placements)
    part = spread.redistribute(placements=[p if p.is_shard() else Replicate() for p in like.placements]).to_local()
    at: Any = like.device_mesh.get_coordinate()
    others = any(here for here, p in zip(at, like.placements, strict=True) if p.is_partial())
    return spread_like(torch.zeros_like(part) if others else part, like)


def on_full(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``fn(x)`` of the full tensor, spread as ``x`` is; the result has its shape.

    For functions whose numbers depend on how the work is cut, such as products of matrices in low precision.

    >>> on_full(torch.sin, torch.zeros(2))
    tensor([0., 0.])
    """
    return split_like(fn(full(x)), x)


def sum_over(x: Tensor, group: Any) -> Tensor:
    """Return the sum of ``x`` over the ranks of a group, such as a mesh of one axis; in a graph it is one node.

    One all-reduce of the bytes of ``x``. Every rank of the group calls this.

    >>> import trainfn as tfn
    >>> log = lambda x, mesh: tfn.tree.sum_over(x, mesh["replicate"])
    """
    from torch.distributed import _functional_collectives as collectives  # takes a second to import

    return collectives.wait_tensor(collectives.all_reduce(x, "sum", group))


def sum_of_rows(x: Tensor, like: Any) -> Tensor:
    """Return the sum of a number over the ranks that have different rows; ``like`` is a `DTensor`, or nothing is done.

    >>> sum_of_rows(torch.ones(()), torch.zeros(2))
    tensor(1.)
    """
    if is_distributed(like):
        for axis, name in enumerate(like.device_mesh.mesh_dim_names or ()):
            x = x if name == "tensor" else sum_over(x, (like.device_mesh, axis))
    return x


def norm(tensors: Sequence[Any]) -> Tensor:
    """Return the 2-norm of `DTensor`s seen as one vector, ``float32[]``; the same number on every rank."""
    alike: dict[Any, list[Tensor]] = {}
    for x in tensors:
        alike.setdefault(x.placements, []).append(x.to_local())
    squares: list[Tensor] = []
    for placements, parts in alike.items():
        square = torch.stack([n.float() for n in torch._foreach_norm(parts)]).square().sum()
        for axis, placement in enumerate(placements):
            if placement.is_shard():
                # 4 bytes for each axis that splits, once for all tensors that are spread alike: the rest of the vector
                # is on other ranks.
                square = sum_over(square, (tensors[0].device_mesh, axis))
        squares.append(square)
    return torch.stack(squares).sum().sqrt()
