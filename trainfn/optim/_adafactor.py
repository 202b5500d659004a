"""Adafactor: second moments in the memory of two vectors per matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainfn import tree
from trainfn._types import NOTHING, Params, Transform, Tree
from trainfn.optim._clip import clip_by_block_rms, rms
from trainfn.optim._combine import EmptyState, chain, identity, masked
from trainfn.optim._masks import Mask
from trainfn.optim._math import Rate, Scalar, average, fraction, no_complex, nonnegative, zero_count
from trainfn.optim._scale import scale, scale_by_schedule
from trainfn.optim._wrappers import ema


class ScaleByFactoredRmsState(NamedTuple):
    """Count of completed updates, ``int64[]``; second moments, at least float32.

    Tensors ``[..., R, C]`` have the means over columns, ``row[..., R]``, and over rows, ``col[..., C]``. Vectors and
    scalars have the moment itself, ``full``. Each holds the names that it concerns. ``late`` holds how many updates a
    parameter missed, ``int64[]`` by name; empty if none missed any.
    """

    count: Tensor  # type: ignore[assignment]  # shadows tuple.count
    row: Params
    col: Params
    full: Params
    late: Params = NOTHING


class AddScaledDecayState(NamedTuple):
    """The state of the transform that sizes the decay."""

    inner: Tree


def scale_by_factored_rms(decay_rate: Scalar = -0.8, eps: Scalar = 1e-30) -> Transform:
    """Divide the updates by the root of a moving mean square, factored into rows and columns.

    ::

        b2 = 1 - t^decay_rate
        R ← b2 · R + (1 - b2) · mean_columns(g² + eps)
        C ← b2 · C + (1 - b2) · mean_rows(g² + eps)
        update = g / √(R Cᵀ / mean(R))

    Algorithm 4 of Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235. Vectors and scalars keep the mean
    square itself. The arithmetic is float32 or wider.

    >>> rule = scale_by_factored_rms()
    >>> params = {"w": torch.tensor([[1.0, 2.0], [2.0, 4.0]])}
    >>> rule.update(params, rule.init(params), params)[0]["w"]
    tensor([[1., 1.],
            [1., 1.]])
    """

    def init(params: Params) -> Tree:
        no_complex("adafactor", params)
        wide = {name: _widen(param) for name, param in params.items()}
        row = {name: torch.zeros_like(p[..., 0]) for name, p in wide.items() if p.dim() >= 2}
        col = {name: torch.zeros_like(p[..., 0, :]) for name, p in wide.items() if p.dim() >= 2}
        full = {name: torch.zeros_like(p) for name, p in wide.items() if p.dim() < 2}
        return ScaleByFactoredRmsState(zero_count(params), row, col, full)

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        count = state.count + 1
        square = {name: _widen(g) ** 2 + eps for name, g in updates.items()}

        def averaged(old: Params, new: Params) -> Params:
            mixed = average(old, new, 1.0 - count.float() ** decay_rate)
            for name in state.late.keys() & old.keys():
                b2 = 1.0 - (count - state.late[name]).float() ** decay_rate
                mixed[name] = average(old[name], new[name], b2)
            return mixed

        row = averaged(state.row, {name: square[name].mean(-1) for name in state.row})
        col = averaged(state.col, {name: square[name].mean(-2) for name in state.col})
        full = averaged(state.full, {name: square[name] for name in state.full})

        def root(name: str) -> Tensor:
            if name in full:
                return torch.rsqrt(full[name])
            share = row[name] / row[name].mean(-1, keepdim=True)
            return torch.rsqrt(share).unsqueeze(-1) * torch.rsqrt(col[name]).unsqueeze(-2)

        step = {name: (root(name) * g).to(g.dtype) for name, g in updates.items()}
        return step, ScaleByFactoredRmsState(count, row, col, full, state.late)

    return Transform(init, update)


def scale_by_param_rms(eps: Scalar = 1e-3) -> Transform:
    """Multiply each update by the root mean square of its parameter, at least ``eps``: relative step sizes.

    Shazeer & Stern 2018, section 8, https://arxiv.org/abs/1804.04235.

    >>> rule = scale_by_param_rms()
    >>> params = {"w": torch.tensor([2.0, -2.0]), "b": torch.zeros(1)}
    >>> rule.update({"w": torch.ones(2), "b": torch.ones(1)}, rule.init(params), params)[0]
    {'w': tensor([2., 2.]), 'b': tensor([0.0010])}
    """

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        return tree.map(lambda u, p: (u * torch.clamp(rms(p), min=eps)).to(u.dtype), updates, params), state

    return Transform(lambda params: EmptyState(), update)


def adafactor(
    learning_rate: Rate | None = None,
    *,
    decay_rate: Scalar = -0.8,
    eps: Scalar = 1e-30,
    eps_param: Scalar = 1e-3,
    clip_threshold: Scalar = 1.0,
    b1: Scalar | None = None,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
    scale_parameter: bool = True,
    warmup_init: bool = False,
) -> Transform:
    """Adafactor; the arithmetic of `transformers.optimization.Adafactor` for all its options.

    That is Algorithms 4-6 of Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235. `torch.optim.Adafactor`
    is another reading: it bounds the moment by eps instead of adding it, and multiplies any rate by the
    parameter's scale.

    ================================================== ==================================================
    transformers                                       here
    ================================================== ==================================================
    ``relative_step=True, lr=None``                    ``learning_rate=None``
    ``relative_step=False, lr=1e-3``                   ``learning_rate=1e-3``
    ``eps=(1e-30, 1e-3)``, ``beta1``                   ``eps=1e-30, eps_param=1e-3``, ``b1``
    ================================================== ==================================================

    Args:
        learning_rate: A number, a 0-dim tensor, or a function of the number of completed updates; None for
            the relative step ``min(1e-2, 1 / √t)``.
        decay_rate: The second moment forgets as ``t^decay_rate``.
        eps: Added to the squared gradient.
        eps_param: The least scale of a parameter.
        clip_threshold: The largest root mean square of an update, before the rate.
        b1: Share of the past in a moving average of the updates; None for none, and no memory for it.
        weight_decay: Share of a weight that a step of rate 1 takes away; decoupled.
        mask: Which parameters decay; see `masked`.
        scale_parameter: Whether the rate is relative to each parameter's root mean square.
        warmup_init: Whether the relative step rises from ``1e-6 · t``.

    Raises:
        ValueError: If a number is out of its range, or ``warmup_init`` comes with a learning rate.

    >>> optimizer = adafactor(1e-3, scale_parameter=False)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params)[0]
    {'w': tensor([-0.0010])}
    """
    nonnegative("adafactor", learning_rate=learning_rate, eps=eps, eps_param=eps_param, weight_decay=weight_decay)
    fraction("adafactor", b1=b1)
    if warmup_init and learning_rate is not None:
        raise ValueError(
            f"`adafactor({learning_rate!r}, warmup_init=True)` can't work: that warm-up belongs to the"
            " relative step, which a learning rate replaces. Write `adafactor(warmup_init=True)`, or pass a"
            " schedule with a warm-up."
        )
    rate = _relative_step(warmup_init) if learning_rate is None else learning_rate
    size = chain(
        scale_by_schedule(rate, own=learning_rate is None),
        scale_by_param_rms(eps_param) if scale_parameter else identity(),
    )
    return chain(
        scale_by_factored_rms(decay_rate, eps),
        clip_by_block_rms(clip_threshold),
        size,
        identity() if b1 is None else ema(b1, debias=False),
        masked(_add_scaled_decay(weight_decay, size), mask),
        scale(-1.0),
    )


def _relative_step(warmup_init: bool) -> Rate:
    def schedule(count: Tensor) -> Tensor:
        t = (count + 1).float()
        most = 1e-6 * t if warmup_init else torch.full_like(t, 1e-2)
        return torch.minimum(most, torch.rsqrt(t))

    return schedule


def _add_scaled_decay(weight_decay: Scalar, size: Transform) -> Transform:
    """Add ``weight_decay · size(params)``: decay at the rate of each parameter, outside of the average."""
    if not isinstance(weight_decay, Tensor) and weight_decay == 0:
        return identity()

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        decay, inner = size.update(params, state.inner, params)
        return tree.add(updates, scale(weight_decay).update(decay, None, params)[0]), AddScaledDecayState(inner)

    return Transform(lambda params: AddScaledDecayState(size.init(params)), update)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
