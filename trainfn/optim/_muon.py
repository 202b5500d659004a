"""Muon: steps of equal length in every direction of a weight matrix."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from trainfn import tree
from trainfn._types import Params, Transform, Tree
from trainfn.optim._aliases import adamw
from trainfn.optim._combine import EmptyState, chain, partition
from trainfn.optim._decay import add_decayed_weights
from trainfn.optim._masks import Labels, Mask
from trainfn.optim._math import Rate, Scalar, average, fraction, no_complex, nonnegative
from trainfn.optim._scale import scale_by_learning_rate

Coefficients = tuple[float, float, float]
Adjust = Literal["match_rms_adamw", "original"]

NOT_MUON = r"(^|[._])(\w*emb(ed)?(ding)?s?(_\w+)?|wte|wpe|tok|pos|(lm_)?head|classifier|score)([._]|$)"
"""The names of matrices that `muon_labels` leaves to AdamW: those that read tokens or write logits."""


class ScaleByMuonState(NamedTuple):
    """Momentum, like the parameters."""

    mu: Params


def muon_labels(name: str, param: Tensor) -> str:
    """Who updates a parameter under `muon`: ``"muon"`` if it is a hidden matrix, else ``"adamw"``.

    Hidden matrices have two dimensions, and no name that matches `NOT_MUON`.

    >>> [muon_labels(name, torch.zeros(4, 4)) for name in ("blocks.0.attn.weight", "lm_head.weight")]
    ['muon', 'adamw']
    """
    return "muon" if param.dim() == 2 and not tree.matches(name, NOT_MUON) else "adamw"


def orthogonalize(
    matrix: Tensor,
    *,
    steps: int = 5,
    coefficients: Coefficients = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
) -> Tensor:
    """Replace the singular values of ``matrix[R, C]`` by numbers near 1.

    A Newton-Schulz iteration in bfloat16: with ``X = U S Vᵀ``, each step applies ``a s + b s³ + c s⁵`` to S;
    five land between about 0.7 and 1.2. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.

    >>> q = orthogonalize(torch.diag(torch.tensor([1.0, 0.5]))).float()
    >>> bool((torch.linalg.svdvals(q) - 1).abs().max() < 0.35)
    True
    """
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = (matrix.T if tall else matrix).bfloat16()
    x = x / x.norm().clamp(min=eps)  # a spectral norm of at most 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def scale_by_muon(
    momentum: Scalar = 0.95,
    *,
    nesterov: bool = True,
    steps: int = 5,
    coefficients: Coefficients = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
) -> Transform:
    """Orthogonalize the moving average of the updates.

    ::

        mu ← momentum · mu + (1 - momentum) · g
        update = orthogonalize(momentum · mu + (1 - momentum) · g)        without nesterov: orthogonalize(mu)

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.

    Raises:
        ValueError: If ``momentum`` is outside [0, 1), or a parameter isn't a matrix.

    >>> rule = scale_by_muon()
    >>> params = {"w": torch.eye(2)}
    >>> rule.update(params, rule.init(params), params)[0]["w"].shape
    torch.Size([2, 2])
    """
    fraction("scale_by_muon", momentum=momentum)

    def init(params: Params) -> Tree:
        no_complex("muon", params)
        for name, param in params.items():
            if param.dim() != 2:
                raise ValueError(
                    f"`scale_by_muon` orthogonalizes matrices, and {name!r} has the shape"
                    f" {list(param.shape)}. Write `muon(learning_rate)`, which leaves all but matrices to"
                    " AdamW, or `partition` the parameters."
                )
        return ScaleByMuonState(tree.zeros_like(params))

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        mu = average(state.mu, updates, momentum)
        mixed = average(mu, updates, momentum) if nesterov else mu
        options: Any = {"steps": steps, "coefficients": coefficients, "eps": eps}
        step = tree.map(lambda m: tree.on_full(lambda x: orthogonalize(x, **options), m), mixed)
        return tree.cast_like(step, updates), ScaleByMuonState(mu)

    return Transform(init, update)


def scale_by_shape(adjust: Adjust = "match_rms_adamw") -> Transform:
    """Scale orthogonal updates of matrices ``[R, C]`` by their shape.

    ======================= ========================= =====================================================
    adjust                  factor                    so that
    ======================= ========================= =====================================================
    ``"match_rms_adamw"``   ``0.2 √max(R, C)``        AdamW's rates and decays can be used: Liu et al. 2025,
                                                      https://arxiv.org/abs/2502.16982, equation 4
    ``"original"``          ``√max(1, R / C)``        as Jordan et al. do, with rates about 0.02
    ======================= ========================= =====================================================

    Raises:
        ValueError: If ``adjust`` is neither.

    >>> rule = scale_by_shape("original")
    >>> rule.update({"w": torch.ones(4, 1)}, rule.init({}), {})[0]["w"].flatten()
    tensor([2., 2., 2., 2.])
    """
    factors = {
        "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
        "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    }
    if adjust not in factors:
        raise ValueError(f"`scale_by_shape({adjust!r})`: there is no such rule. Write one of {list(factors)}.")

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        return tree.map(lambda u: u * factors[adjust](*u.shape), updates), state

    return Transform(lambda params: EmptyState(), update)


def muon(
    learning_rate: Rate,
    *,
    weight_decay: Scalar = 0.1,
    momentum: Scalar = 0.95,
    nesterov: bool = True,
    adjust: Adjust = "match_rms_adamw",
    steps: int = 5,
    coefficients: Coefficients = (3.4445, -4.7750, 2.0315),
    mask: Mask = None,
    labels: Labels = muon_labels,
    others: Transform | None = None,
) -> Transform:
    """Muon for hidden matrices, AdamW for all other parameters.

    The arithmetic for matrices is that of `torch.optim.Muon`, whose default of ``adjust`` is ``"original"``.
    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Liu et al. 2025,
    https://arxiv.org/abs/2502.16982.

    Args:
        learning_rate: A number, a 0-dim tensor, or a function of the number of completed updates.
        weight_decay: Share of a weight that a step of learning rate 1 takes away.
        momentum: Share of the past in the average that is orthogonalized.
        nesterov: Whether the step looks ahead.
        adjust: How a step's size follows from a matrix's shape; see `scale_by_shape`.
        steps: Newton-Schulz iterations.
        coefficients: The coefficients of the Newton-Schulz polynomial.
        mask: Which of each group's parameters decay; see `masked`.
        labels: ``"muon"`` or ``"adamw"`` for every parameter, as in `partition`.
        others: What updates the parameters labelled ``"adamw"``; None for `adamw` with the same learning
            rate and weight decay, which suits ``adjust="match_rms_adamw"``.

    Raises:
        ValueError: If a number is out of its range, or ``adjust`` unknown.

    >>> optimizer = muon(1e-3)
    >>> params = {"fc.weight": torch.eye(2), "fc.bias": torch.ones(2)}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> updates["fc.bias"]
    tensor([-0.0011, -0.0011])
    """
    nonnegative("muon", learning_rate=learning_rate, weight_decay=weight_decay)
    fraction("muon", momentum=momentum)
    matrices = chain(
        scale_by_muon(momentum, nesterov=nesterov, steps=steps, coefficients=coefficients),
        scale_by_shape(adjust),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
    rest = adamw(learning_rate, weight_decay=weight_decay, mask=mask) if others is None else others
    return partition({"muon": matrices, "adamw": rest}, labels)
