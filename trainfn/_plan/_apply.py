"""A step on N ranks, made of a step on one: gradients of this rank's rows, their sum over ranks, the update.

Rows are spread over the axes ``replicate`` and ``shard``. The ranks of the axis ``tensor`` have the same rows, so no
sum here goes over it. Each comment at a collective names its reason, its bytes and how often it happens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from trainfn import tree
from trainfn._dtensor import Spec, full, is_distributed, local, spread_like
from trainfn._grad import any_of, divided
from trainfn._marks import split_batch
from trainfn._plan._layout import Layout
from trainfn._plan._no_rows import Idle
from trainfn._plan._place import gradient_placements, is_sharded, placements
from trainfn._reached import Unsettled, is_settled
from trainfn._types import Batch, Gradients, Mean, Metrics, TrainState, Tree

_SHARDED = ("params", "opt_state", "extra")  # the fields of a state that have `DTensor` leaves
_REACHED = " reached"  # no name of a metric
_BUCKET = 25 * 2**20  # bytes: large enough to fill a link, as in torch's DDP


def gradients_on(plan: Layout, gradients: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Return the gradient function of this rank's rows.

    Its sums are not added up over ranks yet. Only gradients that the plan shards are: each rank keeps one shard.
    """

    def of_this_rank(state: TrainState, batch: Batch, first_row: Tensor | int | None = None, /) -> Gradients:
        if plan.world == 1:
            with _computing(plan, state):
                return gradients(state, batch, 0 if first_row is None else first_row)
        from trainfn._plan._gathering import gathering

        check_sharded(plan, state)
        if first_row is None:
            first_row, _ = first_rows(plan, state, batch)
        with split_batch(), gathering(plan, training=True), _computing(plan, state):
            sums = gradients(state, batch, first_row)
        if isinstance(batch, Idle):
            sums = sums._replace(buffers=state.buffers)
        kept, *terms = (
            {n: None if g is None else _kept(plan, state.params[n], g) for n, g in grads.items()}
            for grads in (sums.grads, *sums.terms)
        )
        return sums._replace(grads=kept, terms=tuple(terms))

    return of_this_rank


def _kept(plan: Layout, param: Any, grad: Any) -> Any:
    """A gradient with the placements that the plan keeps; zeros if this rank's rows did not touch the parameter."""
    from torch.distributed.tensor import Replicate

    wanted = gradient_placements(plan, param)
    if grad.placements == wanted:
        return grad
    if any(p.is_partial() for p in wanted):
        # No communication: a gradient that no rank has computed is replicated zeros, and each rank cuts its shard.
        zeros = grad.redistribute(placements=[p if p.is_shard() else Replicate() for p in wanted]).to_local()
        return spread_like(torch.zeros_like(zeros), grad, wanted)
    return grad.redistribute(placements=wanted)  # the same zeros, cut


def _zeros(plan: Layout, param: Any) -> Any:
    """A gradient of zeros, with the placements that the plan keeps."""
    from torch.distributed.tensor import DTensor, Replicate

    none = torch.zeros(param.shape, dtype=param.dtype, device=param.device)
    everywhere = [Replicate()] * param.device_mesh.ndim
    return _kept(plan, param, DTensor.from_local(none, param.device_mesh, everywhere, run_check=False))


def _over_ranks(plan: Layout, state: TrainState, sums: Gradients) -> Gradients:
    """The sums of numbers over all ranks, and which parameters the rows of any rank reach.

    Each rank knows which parameters its own rows reach, and asks all ranks for the others. The question is a row of
    zeros and ones. It goes along with the losses, so it costs no further message.
    """
    known = any_of(sums.terms) if sums.terms else sums.grads
    missed = {name: i for i, (name, grad) in enumerate(known.items()) if grad is None}
    if not is_settled(state.opt_state, frozenset(missed)):
        raise Unsettled(missed)  # before the first message, for other ranks may miss nothing
    flags = torch.ones(len(known), device=state.step.device)
    for i in missed.values():
        flags[i] = 0.0
    reduced = reduce_means(plan, state, {"loss": sums.loss, **sums.metrics, _REACHED: Mean(flags, flags[:1])})
    found = reduced.pop(_REACHED).total > 0
    if plan.stage >= 2 and missed and not tree.is_traced(state.step):
        _check_alike(plan, [name for name, i in missed.items() if found[i]])
    sums = divided(sums._replace(loss=reduced.pop("loss")))  # each rank divides its part by the weights of all ranks
    grads = {name: _zeros(plan, state.params[name]) if name in missed else g for name, g in sums.grads.items()}
    reached = {name: found[i] for name, i in missed.items()}
    return sums._replace(metrics=reduced, buffers={}, grads=grads, reached=reached)


def _check_alike(plan: Layout, others: list[str]) -> None:
    """Raise if other ranks' rows reach parameters that this rank's rows do not: messages have been mixed up."""
    if others:
        raise ValueError(
            f"step(state, batch): the rows of other ranks reach {others[0]!r}, and those of this rank do not"
            f" ({len(others)} such parameters). With stage={plan.stage} the ranks exchange each gradient as it is"
            " computed, so all of them must call the same submodules. Take `tfn.Plan.zero(1)` or"
            " `tfn.Plan.replicated()`; or add 0 times what the other submodules return to the loss."
        )


def update_on(plan: Layout, update: Callable[..., Any]) -> Callable[..., Any]:
    """Return the update by the sums over all ranks; each rank computes the shard that the plan gives it."""

    def of_all_ranks(state: TrainState, sums: Gradients) -> tuple[TrainState, Metrics]:
        if plan.world == 1:
            return update(state, sums)
        check_sharded(plan, state)
        total = _over_ranks(plan, state, sums)
        total = total._replace(buffers=_mean_buffers(plan, state, sums, total))
        if plan.stage == 0 and plan.shape(plan.world)["tensor"] == 1:
            return _update_everywhere(plan, update, state, total)
        where = {name: placements(plan, name, tuple(p.shape), "opt_state") for name, p in state.params.items()}
        params: Any = state.params
        # No communication: a parameter that is full on this rank is cut to the shard of its optimizer state.
        cut = {name: p.redistribute(placements=where[name]) for name, p in params.items()}
        grads = _reduced(plan, state, total.grads, where)
        new, metrics = update(state._replace(params=cut), total._replace(grads=grads))
        return placed_like(new, state), metrics

    return of_all_ranks


def _reduced(plan: Layout, state: TrainState, grads: Any, where: dict[str, Any]) -> dict[str, Any]:
    """The gradients' sums over ranks, with the placements that the update needs."""

    def is_added(name: str) -> bool:  # to the same full sum on all ranks that have different rows
        axes = [(was, to) for was, to in zip(grads[name].placements, where[name], strict=True) if was != to]
        return bool(axes) and len(axes) == len(_data_axes(plan)) and all(not to.is_shard() for _, to in axes)

    small = _summed(plan, state, {name: g.to_local() for name, g in grads.items() if is_added(name)})
    done: dict[str, Any] = {}
    for name, g in grads.items():
        if name in small:
            done[name] = spread_like(small[name], g, where[name])
        else:
            # A reduce-scatter of the gradient's bytes, once an update: the sum is only needed where its optimizer
            # state is. With stages 2 and 3 the backward pass has done it, and only ``replicate`` is left to add up.
            done[name] = g.redistribute(placements=where[name])
    return done


def _update_everywhere(plan: Layout, update: Callable[..., Any], state: TrainState, sums: Gradients) -> Any:
    """The update where every rank holds everything: on plain tensors, which cost nothing to dispatch."""
    plain = state._replace(**{field: tree.map(local, getattr(state, field)) for field in _SHARDED})
    new, metrics = update(plain, sums._replace(grads=_summed(plan, state, tree.map(local, sums.grads))))
    return new._replace(**{f: tree.map(_everywhere, getattr(new, f), getattr(state, f)) for f in _SHARDED}), metrics


def _everywhere(new: Any, like: Any) -> Any:
    if not is_distributed(like):
        return new
    return Spec(like.device_mesh, like.placements, new.shape, new.stride()).of_local(new)


def _summed(plan: Layout, state: TrainState, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums over ranks of many tensors, in few reductions."""
    done: dict[str, Tensor] = {}
    bucket: list[str] = []

    def flush() -> None:
        # An all-reduce of up to 25 MB, once an update for each bucket. A collective for each parameter would spend
        # more time on starting than on sending.
        flat = _sum(plan, state, torch.cat([grads[name].reshape(-1) for name in bucket]))
        parts = flat.split([grads[name].numel() for name in bucket])
        done.update({name: part.view(grads[name].shape) for name, part in zip(bucket, parts, strict=True)})
        bucket.clear()

    for name, grad in grads.items():
        if bucket and (grads[bucket[0]].dtype != grad.dtype or sum(grads[b].nbytes for b in bucket) > _BUCKET):
            flush()
        bucket.append(name)
    if bucket:
        flush()
    return {name: done[name] for name in grads}


def placed_like(new: TrainState, old: TrainState) -> TrainState:
    """The new state, with the placements of the old one."""

    def place(now: Any, then: Any) -> Any:
        if is_distributed(then):
            # Stages 1 and 2: an all-gather of the parameter's bytes, once an update, for the next forward pass needs
            # it full. Stage 3 and the optimizer state are in place already: no communication.
            return now.redistribute(placements=then.placements)
        return full(now)  # of scalars, at most

    return new._replace(
        step=place(new.step, old.step),
        params={name: place(p, old.params[name]) for name, p in new.params.items()},
        opt_state=tree.map(place, new.opt_state, old.opt_state),
    )


# --- scalars, buffers and rows ------------------------------------------------------------------------------------


def _data_axes(plan: Layout) -> list[str]:
    """The axes that rows are spread over, which sums go over."""
    return [axis for axis, size in plan.shape(plan.world).items() if axis != "tensor" and size > 1]


def _sum(plan: Layout, state: TrainState, x: Tensor) -> Tensor:
    mesh = mesh_of(state)
    for axis in _data_axes(plan):
        x = tree.sum_over(x, mesh[axis])  # the bytes of `x` for each axis, so twice for a hybrid plan
    return x


def largest(plan: Layout, state: TrainState, weight: Tensor) -> Tensor:
    """The largest of all ranks' weights, where the same number is needed everywhere."""
    if plan.world == 1:
        return weight
    from torch.distributed import _functional_collectives as collectives

    for axis in _data_axes(plan):
        # 4 bytes for each axis, once a micro-batch, and only with a loss scale: ranks must scale their sums alike.
        weight = collectives.wait_tensor(collectives.all_reduce(weight, "max", mesh_of(state)[axis]))
    return weight


def mesh_of(state: TrainState) -> Any:
    """The mesh that a state is sharded over."""
    return next(iter(state.params.values())).device_mesh  # type: ignore[attr-defined]


def reduce_means(plan: Layout, state: TrainState, means: Metrics) -> Metrics:
    """Totals and weights over all ranks."""
    leaves = {(name, i): x for name, mean in means.items() for i, x in enumerate(mean)}
    done: dict[tuple[str, int], Tensor] = {}
    for dtype in dict.fromkeys(x.dtype for x in leaves.values()):
        keys = [key for key, x in leaves.items() if x.dtype == dtype]
        # 8 bytes a metric in float32, one all-reduce a step and dtype. The gradients are divided by the weight of the
        # rows of all ranks, and metrics are means over these rows.
        flat = _sum(plan, state, torch.cat([leaves[key].reshape(-1) for key in keys]))
        sizes = [leaves[key].numel() for key in keys]
        done.update({key: x.reshape(leaves[key].shape) for key, x in zip(keys, flat.split(sizes), strict=True)})
    return {name: type(mean)(done[name, 0], done[name, 1]) for name, mean in means.items()}


def _mean_buffers(plan: Layout, state: TrainState, mine: Gradients, total: Gradients) -> dict[str, Tensor]:
    """Running statistics: their mean over ranks, weighted by the ranks' rows. Frozen parameters are equal already."""
    buffers = mine.buffers
    own = {site.name for site in state.sites if not site.is_parameter}
    names = [name for name, b in buffers.items() if name in own and b.is_floating_point()]
    if not names:
        return buffers
    even, weight = 1.0 / plan.data_size, total.loss.weight
    share = torch.where(weight > 0, mine.loss.weight / torch.where(weight > 0, weight, 1.0), even).float().mean()
    # The bytes of all floating-point buffers in float32, one all-reduce a step. Without it each rank would keep the
    # statistics of its own rows. A model without such buffers does not pay it.
    flat = _sum(plan, state, share * torch.cat([buffers[name].float().reshape(-1) for name in names]))
    parts = flat.split([buffers[name].numel() for name in names])
    shaped = {
        name: x.reshape(buffers[name].shape).to(buffers[name].dtype) for name, x in zip(names, parts, strict=True)
    }
    return {**buffers, **shaped}


def first_rows(plan: Layout, state: TrainState, batch: Batch) -> tuple[Tensor, Tensor]:
    """The number of rows on the ranks before this one, and on all ranks; ``int64[]`` both."""
    from torch.distributed import _functional_collectives as collectives

    _all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor  # until torch 2.12
    rows = 0 if isinstance(batch, Idle) else tree.row_count(batch)
    counts = torch.full((1,), rows, dtype=torch.int64, device=state.step.device)
    mesh = mesh_of(state)
    for axis in reversed(_data_axes(plan)):
        # 8 bytes a rank, once a batch. Dropout is drawn by a row's number in the batch of all ranks, and the ranks may
        # have different numbers of rows.
        counts = collectives.wait_tensor(_all_gather(counts, 0, mesh[axis]))
    return counts[: plan.data_rank].sum(), counts.sum()


def metrics_on(plan: Layout, evaluate: Callable[..., Metrics]) -> Callable[..., Metrics]:
    """Return the function that computes the metrics of all ranks' rows."""

    def of_all_ranks(state: TrainState, batch: Batch, before: Tensor | int = 0, /) -> Metrics:
        if plan.world == 1:
            with _computing(plan, state):
                return evaluate(state, batch, before)
        from trainfn._plan._gathering import gathering

        check_sharded(plan, state)
        first, _ = first_rows(plan, state, batch)
        with gathering(plan, training=False), _computing(plan, state):
            means = evaluate(state, batch, before + first)
        return reduce_means(plan, state, means)

    of_all_ranks.plan = plan  # type: ignore[attr-defined]
    return of_all_ranks


@contextlib.contextmanager
def _computing(plan: Layout, state: TrainState) -> Generator[None]:
    if plan.precision.compute is None:
        yield
        return
    with torch.autocast(state.step.device.type, dtype=plan.precision.compute):
        yield


def check_sharded(plan: Layout, state: TrainState) -> None:
    """Raise if the state is not sharded by the plan of the step."""
    params: Tree = state.params
    if not is_sharded(params):
        raise ValueError(
            "step(state, batch): the step has a plan, and the state is not sharded by it. Before the first step, write"
            " `state = tfn.shard(state, plan)`."
        )
    for name, param in params.items():
        shape = tuple(param.shape)
        axes = tuple(axis for axis, size in plan.shape(plan.world).items() if size > 1)
        if param.device_mesh.mesh_dim_names != axes or param.placements != placements(plan, name, shape, "params"):
            raise ValueError(
                f"step(state, batch): the state is sharded by another plan: {name!r} is {param.placements} on"
                f" {param.device_mesh.mesh_dim_names}. Shard it by the plan of the step:"
                " `tfn.shard(tfn.gather(state), plan)`."
            )
