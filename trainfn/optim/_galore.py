"""GaLore: moments of gradients that are projected onto their own main directions."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from trainfn import tree
from trainfn._types import NOTHING, Params, Transform, Tree
from trainfn.optim._adafactor import scale_by_factored_rms
from trainfn.optim._clip import clip_by_block_rms
from trainfn.optim._combine import around, chain, identity, masked
from trainfn.optim._masks import Mask, select
from trainfn.optim._math import (
    Rate,
    Scalar,
    average,
    fraction,
    no_complex,
    nonnegative,
    plus,
    positive,
    square,
    times,
    unbias,
    zero_count,
)
from trainfn.optim._scale import ScaleByAdamState, scale_by_learning_rate
from trainfn.optim._wrappers import ema

Projection = Literal["std", "reverse_std", "left", "right", "full"]


class GaloreState(NamedTuple):
    """Count of completed updates, ``int64[]``, the bases, and the state of the inner rule.

    Matrices ``[R, C]`` have the orthonormal columns ``left[R, rank]`` and rows ``right[rank, C]``, in the dtype of the
    parameter. Each holds the names that it concerns. ``late`` holds how many updates a parameter missed, ``int64[]`` by
    name; empty if none missed any.
    """

    count: Tensor  # type: ignore[assignment]  # shadows tuple.count
    left: Params
    right: Params
    inner: Tree
    late: Params = NOTHING


class DecayAtRateState(NamedTuple):
    """The state of the learning rate that the decay follows."""

    rate: Tree


def galore(
    inner: Transform,
    *,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: Scalar = 0.25,
    proj_type: Projection = "std",
    align: bool = False,
    targets: Mask = None,
) -> Transform:
    """Let a rule work on projections of the gradients of matrices, and project back what it makes of them.

    Zhao et al. 2024, https://arxiv.org/abs/2403.03507; the arithmetic of the package galore-torch. With the
    singular value decomposition ``U S Vᵀ`` of a gradient ``g[R, C]``, and ``r = min(rank, R, C)``, its bases are
    ``L = U[:, :r]`` and ``Q = Vᵀ[:r]``:

    ================= ============================================ =================== =======================
    proj_type         for                                          the rule sees       the update is
    ================= ============================================ =================== =======================
    ``"right"``       all; ``"std"`` if R ≥ C, else reverse_std    ``g Qᵀ``            ``scale · u Q``
    ``"left"``        all; ``"std"`` if R < C, else reverse_std    ``Lᵀ g``            ``scale · L u``
    ``"full"``        all                                          ``Lᵀ g Qᵀ``         ``scale · L u Q``
    ================= ============================================ =================== =======================

    The rule sees the gradient itself of all other tensors. Bases are computed from the gradient of the first step and
    of every ``update_proj_gap``-th after it. Moments are kept as they are, in the coordinates of the old basis.
    Compiled, the decomposition is one branch of a `torch.cond` over all matrices: part of the step's one graph, and run
    at those steps only. On a GPU, that branch makes each step wait for the one before it.

    Args:
        inner: A rule that looks at gradients alone, such as `scale_by_adam`. Rules that depend on the parameters, such
            as a decay, belong after `galore`: inside, they would see projections.
        rank: Size of the bases; at most the smaller side of a matrix.
        update_proj_gap: Steps from one basis to the next.
        scale: Times what is projected back.
        proj_type: Which sides to project; see above.
        align: Whether a new basis vector points to the side of the one that it replaces. A decomposition chooses
            signs at will, and those of a gradient without full rank by its rounding errors; where a sign turns, a
            first moment points backwards. galore-torch leaves it so, and the default is its arithmetic.
        targets: Which matrices are projected, see `masked`; None for all tensors of two dimensions.

    Raises:
        ValueError: If ``rank`` or ``update_proj_gap`` is below 1, ``proj_type`` unknown, or a target not a matrix.

    >>> from trainfn.optim import scale_by_adam
    >>> rule = galore(scale_by_adam(), rank=1, scale=1.0)
    >>> params = {"w": torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])}
    >>> updates, state = rule.update(params, rule.init(params), params)
    >>> updates["w"].abs().round()
    tensor([[1., 0.],
            [0., 0.],
            [0., 0.]])
    >>> state.inner.mu["w"].shape
    torch.Size([3, 1])
    """
    positive("galore", rank=rank, update_proj_gap=update_proj_gap)
    nonnegative("galore", scale=scale)
    if proj_type not in get_args(Projection):
        raise ValueError(
            f"`galore(proj_type={proj_type!r})` can't work: there is no such projection. Write one of"
            f" {list(get_args(Projection))}."
        )

    def init(params: Params) -> Tree:
        no_complex("galore", params)
        left, right = _zero_bases(_matrices(targets, params), rank, proj_type)
        return GaloreState(zero_count(params), left, right, inner.init(_project(params, left, right)))

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        left, right = _refresh(state.count % update_proj_gap == 0, updates, state.left, state.right, align)
        for name, missed in state.late.items():
            due = (state.count - missed) % update_proj_gap == 0
            mine = [{name: held[name]} if name in held else {} for held in (state.left, state.right)]
            new_left, new_right = _refresh(due, updates, mine[0], mine[1], align)
            left, right = {**left, **new_left}, {**right, **new_right}
        low, new = inner.update(_project(updates, left, right), state.inner, _project(params, left, right))
        return _project_back(low, left, right, scale), GaloreState(state.count + 1, left, right, new, state.late)

    return around(Transform(init, update), inner)


def _matrices(targets: Mask, params: Params) -> Params:
    if targets is None:
        return {name: p for name, p in params.items() if p.dim() == 2}
    names = select("galore", targets, params, "targets")
    chosen = {name: p for name, p in params.items() if name in names}
    for name, param in chosen.items():
        if param.dim() != 2:
            raise ValueError(
                f"`galore` projects matrices, and {name!r} among its targets has the shape {list(param.shape)}. Write"
                " `galore(..., targets=lambda name, p: p.dim() == 2)`, or leave `targets` out, which is the same."
            )
    return chosen


def _zero_bases(matrices: Params, rank: int, proj_type: Projection) -> tuple[Params, Params]:
    left: Params = {}
    right: Params = {}
    for name, p in matrices.items():
        (rows, columns), size = p.shape, min(rank, *p.shape)
        tall = {"std": rows >= columns, "reverse_std": rows < columns}.get(proj_type)
        if tall is False or proj_type in ("left", "full"):
            left[name] = torch.zeros(rows, size, dtype=p.dtype, device=p.device)
        if tall is True or proj_type in ("right", "full"):
            right[name] = torch.zeros(size, columns, dtype=p.dtype, device=p.device)
    return left, right


def _refresh(due: Tensor, grads: Params, left: Params, right: Params, align: bool) -> tuple[Params, Params]:
    """New bases if ``due``, else the old ones. One condition for all matrices: an accelerator waits for each."""
    given = ({name: grads[name] for name in {**left, **right}}, left, right)
    if not given[0]:
        return left, right

    def fresh(grads: Params, left: Params, right: Params) -> tuple[Params, Params]:
        new_left, new_right = _decompose(grads, left, right)
        return (_aligned(new_left, left, 0), _aligned(new_right, right, 1)) if align else (new_left, new_right)

    def kept(grads: Params, left: Params, right: Params) -> tuple[Params, Params]:
        return tree.copy((left, right))  # a branch may not return what it was given

    if tree.is_traced(due):
        # What is split over ranks is whole here at every step: a branch can't gather it.
        bases = torch.cond(due, fresh, kept, tree.map(tree.full, given))
        return tree.map(tree.split_like, bases, (left, right))
    return fresh(*given) if due.is_meta or bool(due) else (left, right)


def _decompose(grads: Params, left: Params, right: Params) -> tuple[Params, Params]:
    new_left: Params = {}
    new_right: Params = {}
    for name, grad in grads.items():
        # A NaN would be an error of the decomposition; it reaches the update all the same, by the projection.
        wide = torch.nan_to_num(grad.to(torch.promote_types(grad.dtype, torch.float32)), 0.0, 0.0, 0.0)
        u, _, vh = torch.linalg.svd(wide, full_matrices=False)
        if name in left:
            new_left[name] = _dense(u[:, : left[name].shape[1]], left[name])
        if name in right:
            new_right[name] = _dense(vh[: right[name].shape[0]], right[name])
    return new_left, new_right


def _dense(part: Tensor, like: Tensor) -> Tensor:
    return part.to(like.dtype).clone(memory_format=torch.contiguous_format)


def _aligned(new: Params, old: Params, along: int) -> Params:
    def turned(x: Tensor, y: Tensor) -> Tensor:
        return torch.where((x * y).sum(along, keepdim=True) < 0, -x, x)

    return {name: turned(x, old[name]) for name, x in new.items()}


def _project(full: Params, left: Params, right: Params) -> Params:
    def low(name: str, x: Tensor) -> Tensor:
        x = left[name].to(x.dtype).T @ x if name in left else x
        return x @ right[name].to(x.dtype).T if name in right else x

    return {name: low(name, x) for name, x in full.items()}


def _project_back(low: Params, left: Params, right: Params, scale: Scalar) -> Params:
    def full(name: str, x: Tensor) -> Tensor:
        if name not in left and name not in right:
            return x
        x = left[name].to(x.dtype) @ x if name in left else x
        x = x @ right[name].to(x.dtype) if name in right else x
        return times(x, scale)

    return {name: full(name, x) for name, x in low.items()}


def galore_adamw(
    learning_rate: Rate,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    *,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: Scalar = 0.25,
    proj_type: Projection = "std",
    align: bool = False,
    targets: Mask = None,
) -> Transform:
    """AdamW with the moments of projected gradients, see `galore`; the arithmetic of galore-torch's ``GaLoreAdamW``.

    That differs a little from `adamw`: ``eps`` is added to the root of the uncorrected second moment, and a weight
    decays after its step. The moments of a matrix ``[R, C]`` take ``rank · max(R, C)`` numbers each instead of
    ``R · C``; they are never quantized, so this stands in for ``GaLoreAdamW8bit`` too. The whole gradient exists, as
    in any step; a layer-wise GaLore takes the same steps.

    Args:
        learning_rate: A number, a 0-dim tensor, or a function of the number of completed updates.
        b1: Share of the past in the first moment.
        b2: Share of the past in the second moment.
        eps: Keeps the quotient finite; in the unit of the gradient.
        weight_decay: Share of a weight that a step of learning rate 1 takes away.
        mask: Which parameters decay; see `masked`.
        rank: Size of the bases; at most the smaller side of a matrix.
        update_proj_gap: Steps from one basis to the next.
        scale: Times what is projected back.
        proj_type: Which sides to project; see `galore`.
        align: Whether new basis vectors point to the side of the old ones; see `galore`.
        targets: Which matrices are projected, see `masked`; None for all tensors of two dimensions.

    Raises:
        ValueError: If a number is out of its range, ``proj_type`` unknown, or a target not a matrix.

    >>> optimizer = galore_adamw(1e-2, rank=1, targets="fc.weight")
    >>> params = {"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> updates["fc.bias"]
    tensor([-0.0100, -0.0100])
    """
    nonnegative("galore_adamw", learning_rate=learning_rate, eps=eps, weight_decay=weight_decay)
    fraction("galore_adamw", b1=b1, b2=b2)
    sizes: dict[str, Any] = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale}
    return chain(
        galore(_scale_by_uncorrected_adam(b1, b2, eps), **sizes, proj_type=proj_type, align=align, targets=targets),
        scale_by_learning_rate(learning_rate),
        masked(_decay_at(scale_by_learning_rate(learning_rate), weight_decay, after=True), mask),
    )


def _scale_by_uncorrected_adam(b1: Scalar, b2: Scalar, eps: Scalar) -> Transform:
    """Adam in the order of Kingma & Ba 2015, end of section 2: ``mu / (√nu + eps) · √(1 - b2^t) / (1 - b1^t)``."""

    def init(params: Params) -> Tree:
        return ScaleByAdamState(zero_count(params), tree.zeros_like(params), tree.zeros_like(params))

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        count = state.count + 1
        mu, nu = average(state.mu, updates, b1), average(state.nu, square(updates), b2)

        def root(count: Tensor) -> Tensor:
            return torch.rsqrt(unbias(torch.ones((), device=count.device), b2, count))

        step = tree.div(unbias(mu, b1, count, state.late), plus(tree.sqrt(nu), eps))
        step = {**times(step, root(count)), **{n: times(step[n], root(count - by)) for n, by in state.late.items()}}
        return tree.cast_like(step, updates), ScaleByAdamState(count, mu, nu, state.late)

    return Transform(init, update)


def _decay_at(rate: Transform, weight_decay: Scalar, *, after: bool) -> Transform:
    """Take ``weight_decay · learning_rate`` of the parameters, as they are, or as the updates leave them."""
    if not isinstance(weight_decay, Tensor) and weight_decay == 0:
        return identity()

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        lost, new = rate.update(tree.add(params, updates) if after else params, state.rate, params)
        return tree.add(updates, tree.cast_like(times(lost, weight_decay), updates)), DecayAtRateState(new)

    return Transform(lambda params: DecayAtRateState(rate.init(params)), update)


def galore_adafactor(
    learning_rate: Rate,
    *,
    decay_rate: Scalar = -0.8,
    eps: Scalar = 1e-30,
    clip_threshold: Scalar = 1.0,
    b1: Scalar | None = None,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: Scalar = 0.25,
    proj_type: Projection = "std",
    align: bool = False,
    targets: Mask = None,
) -> Transform:
    """Adafactor on projected gradients, see `galore`; the arithmetic of galore-torch's ``GaLoreAdafactor``.

    That with ``scale_parameter=False, relative_step=False``, as the Trainer of transformers has it.

    Args:
        learning_rate: A number, a 0-dim tensor, or a function of the number of completed updates.
        decay_rate: The second moment forgets as ``t^decay_rate``.
        eps: Added to the squared gradient.
        clip_threshold: The largest root mean square of a projected update, before the rate.
        b1: Share of the past in a moving average of the projected updates; None for none, and no memory for it.
        weight_decay: Share of a weight that a step of learning rate 1 takes away; decoupled.
        mask: Which parameters decay; see `masked`.
        rank: Size of the bases; at most the smaller side of a matrix.
        update_proj_gap: Steps from one basis to the next.
        scale: Times what is projected back.
        proj_type: Which sides to project; see `galore`.
        align: Whether new basis vectors point to the side of the old ones; see `galore`.
        targets: Which matrices are projected, see `masked`; None for all tensors of two dimensions.

    Raises:
        ValueError: If a number is out of its range, ``proj_type`` unknown, or a target not a matrix.

    >>> optimizer = galore_adafactor(1e-2, rank=1)
    >>> params = {"w": torch.ones(2, 2)}
    >>> optimizer.update(params, optimizer.init(params), params)[0]["w"]
    tensor([[-0.0018, -0.0018],
            [-0.0018, -0.0018]])
    """
    nonnegative("galore_adafactor", learning_rate=learning_rate, eps=eps, weight_decay=weight_decay)
    fraction("galore_adafactor", b1=b1)
    sizes: dict[str, Any] = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale}
    rule = chain(
        scale_by_factored_rms(decay_rate, eps),
        clip_by_block_rms(clip_threshold),
        scale_by_learning_rate(learning_rate),
        identity() if b1 is None else ema(b1, debias=False),
    )
    return chain(
        galore(rule, **sizes, proj_type=proj_type, align=align, targets=targets),
        masked(_decay_at(scale_by_learning_rate(learning_rate), weight_decay, after=False), mask),
    )
