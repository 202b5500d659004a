"""The hooks of Parameters, on the gradients of their stand-ins.

A hook sees the gradient of a mean, as in a loop of torch, where a step has that of a sum. On ranks it sees a plain
tensor of the full shape. Where the plan keeps full gradients, as DDP does, it sees the gradient of the rank's own rows,
as under DDP. Where the plan splits them, it sees the gradient of all ranks' rows, as one process does. Each call then
takes a gather of that gradient, and of the parameter if the hook is one of `register_post_accumulate_grad_hook`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainfn._dtensor import full, is_distributed, is_split, local, split_like, spread_like, sum_of_rows

_WRITES = (
    "step(state, batch): a hook of `register_post_accumulate_grad_hook` writes into its parameter, and on ranks it has"
    " a copy of it. Change the gradient, `p.grad`, or change parameters after the step, by `tfn.transforms.after`."
)


class Weighted(Protocol):
    """A pass whose gradients are sums.

    Attributes:
        weight: By which a gradient is to be divided to be that of a mean.
    """

    weight: Tensor | None


def carry_hooks(run: Weighted, old: Tensor, leaf: Tensor) -> None:
    """Let the hooks of a Parameter see the gradients of its stand-in."""

    def before(hook: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
        def seen(grad: Tensor) -> Tensor | None:
            weight = _weight(run, grad)
            out = hook(_shown(grad) / weight)
            return None if out is None else _spread(out * weight, grad)

        return seen

    def after(hook: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def seen(leaf: Tensor) -> None:
            grad = leaf.grad
            assert grad is not None
            weight, one = _weight(run, grad), _whole(leaf)
            version, one.grad = one._version, _shown(grad) / weight
            hook(one)
            if one is not leaf and one._version != version:
                raise ValueError(_WRITES)
            leaf.grad = None if one.grad is None else _spread(one.grad * weight, grad)

        return seen

    hooks: Any = old
    for hook in (hooks._backward_hooks or {}).values():
        leaf.register_hook(before(hook))
    for hook in (hooks._post_accumulate_grad_hooks or {}).values():
        leaf.register_post_accumulate_grad_hook(after(hook))


def _weight(run: Weighted, grad: Tensor) -> Tensor | float:
    weight = run.weight
    if weight is None:
        return 1.0
    # 4 bytes for each axis and call: a gradient that is split is that of all ranks' rows already.
    weight = sum_of_rows(weight, grad) if is_split(grad) else weight
    return torch.where(weight == 0, torch.ones_like(weight), weight)


def _whole(leaf: Tensor) -> Tensor:
    """The parameter for a hook to look at."""
    if not is_distributed(leaf):
        return leaf
    with torch.no_grad():
        return nn.Parameter(full(leaf).clone())


def _shown(grad: Tensor) -> Tensor:
    return full(grad) if is_split(grad) else local(grad)


def _spread(grad: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_shown`. Where a gradient is not added up yet, one rank has all of it, and the others zeros."""
    if not is_split(like):
        return spread_like(grad, like)
    return split_like(grad, like)
