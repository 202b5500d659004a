"""Weight decay, as a term of the update."""

from __future__ import annotations

from trainfn import tree
from trainfn._types import Params, Transform, Tree
from trainfn.optim._combine import EmptyState, masked
from trainfn.optim._masks import Mask
from trainfn.optim._math import Scalar, nonnegative, times


def add_decayed_weights(weight_decay: Scalar, mask: Mask = None) -> Transform:
    """Add ``weight_decay · params`` to the updates.

    After an adaptive rule it is decoupled weight decay (Loshchilov & Hutter 2019,
    https://arxiv.org/abs/1711.05101); before one, the gradient of an L2 penalty, as the ``weight_decay`` of
    `torch.optim.Adam` and `torch.optim.SGD` is.

    Args:
        weight_decay: Per step, before the learning rate.
        mask: Which parameters decay; see `masked`. `decay_mask` spares biases and norms.

    Raises:
        ValueError: If ``weight_decay`` is negative.

    >>> import torch
    >>> from trainfn.optim import decay_mask
    >>> rule = add_decayed_weights(0.1, mask=decay_mask)
    >>> params = {"fc.weight": torch.full((1, 1), 2.0), "fc.bias": torch.full((1,), 2.0)}
    >>> rule.update(tree.zeros_like(params), rule.init(params), params)[0]
    {'fc.weight': tensor([[0.2000]]), 'fc.bias': tensor([0.])}
    """
    nonnegative("add_decayed_weights", weight_decay=weight_decay)

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        return tree.add(updates, tree.cast_like(times(params, weight_decay), updates)), state

    rule = Transform(lambda params: EmptyState(), update)
    return rule if mask is None else masked(rule, mask)
