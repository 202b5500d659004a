"""Bounds on the updates."""

from __future__ import annotations

from typing import Any

import torch

from trainfn import tree
from trainfn._types import Params, Transform, Tree
from trainfn.optim._combine import EmptyState
from trainfn.optim._math import Scalar, on_parts, positive, times


def clip_by_global_norm(max_norm: Scalar) -> Transform:
    """Shrink all updates by one factor, so that their 2-norm as one vector is at most ``max_norm``.

    The arithmetic is that of `torch.nn.utils.clip_grad_norm_`: times ``min(1, max_norm / (norm + 1e-6))``.
    Pascanu, Mikolov & Bengio 2013, https://arxiv.org/abs/1211.5063.

    Raises:
        ValueError: If ``max_norm`` is not above 0.

    >>> rule = clip_by_global_norm(1.0)
    >>> rule.update({"w": torch.tensor([3.0, 4.0])}, rule.init({}), {})[0]
    {'w': tensor([0.6000, 0.8000])}
    """
    positive("clip_by_global_norm", max_norm=max_norm)

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        factor = torch.clamp(max_norm / (tree.global_norm(updates) + 1e-6), max=1.0)
        return times(updates, factor), state

    return Transform(lambda params: EmptyState(), update)


def clip_by_value(max_value: Scalar) -> Transform:
    """Clip every number of the updates to ``[-max_value, max_value]``.

    Raises:
        ValueError: If ``max_value`` is not above 0.

    >>> rule = clip_by_value(1.0)
    >>> rule.update({"w": torch.tensor([-3.0, 0.5])}, rule.init({}), {})[0]
    {'w': tensor([-1.0000,  0.5000])}
    """
    positive("clip_by_value", max_value=max_value)
    bound: Any = max_value

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        return tree.map(lambda u: torch.clamp(u, -bound, bound).to(u.dtype), updates), state

    return Transform(lambda params: EmptyState(), on_parts(update))


def clip_by_block_rms(threshold: Scalar) -> Transform:
    """Shrink each update, so that its root mean square is at most ``threshold``.

    Shazeer & Stern 2018, section 6, https://arxiv.org/abs/1804.04235.

    Raises:
        ValueError: If ``threshold`` is not above 0.

    >>> rule = clip_by_block_rms(1.0)
    >>> rule.update({"w": torch.tensor([2.0, -2.0]), "b": torch.tensor([0.5])}, rule.init({}), {})[0]
    {'w': tensor([ 1., -1.]), 'b': tensor([0.5000])}
    """
    positive("clip_by_block_rms", threshold=threshold)

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        return tree.map(lambda u: (u / torch.clamp(rms(u) / threshold, min=1.0)).to(u.dtype), updates), state

    return Transform(lambda params: EmptyState(), on_parts(update))


def rms(x: torch.Tensor) -> torch.Tensor:
    """The root mean square of all numbers in ``x``, at least in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dtype=wide) / max(x.numel(), 1) ** 0.5
