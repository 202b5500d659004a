"""A step on N ranks, out of a step on one: gradients of this rank's rows, their sum over ranks, the update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainfn import tree
from trainfn._plan._layout import Layout
from trainfn._plan._place import gradient_placements, is_sharded, placements
from trainfn._types import Batch, Gradients, Loss, Mean, Metrics, TrainState, Tree


class Idle(NamedTuple):
    """Rows that a rank computes and that count for nothing, because it has none of its own left.

    Attributes:
        rows: A batch of which only the shapes matter.
    """

    rows: Batch


def idle(loss: Loss) -> Loss:
    """The loss, which of `Idle` rows is 0 of weight 0."""

    def counted(model: Any, batch: Batch) -> Any:
        if not isinstance(batch, Idle):
            return loss(model, batch)
        out = loss(model, batch.rows)
        if isinstance(out, Tensor):  # a bare scalar: a mean over rows, of which there are none
            return Mean(out * 0.0, torch.zeros((), device=out.device))
        mean, metrics = out if isinstance(out, tuple) and not isinstance(out, Mean) else (out, None)
        none = _nothing(mean)
        return none if metrics is None else (none, {name: _nothing(m) for name, m in metrics.items()})

    return counted


def _nothing(mean: Mean) -> Mean:
    return Mean(mean.total * 0.0, mean.weight * 0.0)


def gradients_on(plan: Layout, gradients: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """A gradient function of the rows of this rank; its sums are not added over ranks yet, except where split."""

    def of_this_rank(state: TrainState, batch: Batch, first_row: Tensor | int | None = None, /) -> Gradients:
        if plan.world == 1:
            with _computing(plan, state):
                return gradients(state, batch, 0 if first_row is None else first_row)
        from trainfn._plan._gathering import gathering

        check_laid_out(plan, state)
        if first_row is None:
            first_row, _ = first_rows(plan, state, batch)
        with gathering(plan, training=True), _computing(plan, state):
            sums = gradients(state, batch, first_row)
        if isinstance(batch, Idle):
            sums = sums._replace(buffers=state.buffers)
        return sums._replace(grads={name: _kept(plan, state.params[name], g) for name, g in sums.grads.items()})

    return of_this_rank


def _kept(plan: Layout, param: Any, grad: Any) -> Any:
    """A gradient as the plan keeps it; that of a parameter which this rank's rows did not touch is 0."""
    from torch.distributed.tensor import DTensor

    wanted = gradient_placements(plan, param)
    if grad.placements == wanted:
        return grad
    if any(p.is_partial() for p in wanted):
        local = torch.zeros_like(
            grad.redistribute(placements=[p if p.is_shard() else _whole() for p in wanted]).to_local()
        )
        return DTensor.from_local(
            local, grad.device_mesh, wanted, run_check=False, shape=grad.shape, stride=grad.stride()
        )
    return grad.redistribute(placements=wanted)


def _whole() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


def update_on(plan: Layout, update: Callable[..., Any]) -> Callable[..., Any]:
    """An update by the sums over all ranks, each rank computing the part of it that the plan gives it."""

    def of_all_ranks(state: TrainState, sums: Gradients) -> tuple[TrainState, Metrics]:
        if plan.world == 1:
            return update(state, sums)
        check_laid_out(plan, state)
        reduced = reduce_means(plan, state, {"loss": sums.loss, **sums.metrics})
        total = sums._replace(loss=reduced.pop("loss"), metrics=reduced, buffers={})
        total = total._replace(buffers=_agreed(plan, state, sums, total))
        if plan.stage == 0 and plan.shape(plan.world)["tensor"] == 1:
            return _update_everywhere(plan, update, state, total)
        where = {name: placements(plan, name, tuple(p.shape), "opt_state") for name, p in state.params.items()}
        parts: Any = state.params
        split = {name: p.redistribute(placements=where[name]) for name, p in parts.items()}
        grads = _reduced(plan, state, sums.grads, where)
        new, metrics = update(state._replace(params=split), total._replace(grads=grads))
        return placed_like(new, state), metrics

    return of_all_ranks


def _reduced(plan: Layout, state: TrainState, grads: Any, where: dict[str, Any]) -> dict[str, Any]:
    """The gradients' sums over ranks, laid out as the update needs them."""
    from torch.distributed.tensor import DTensor

    def added(name: str) -> bool:  # to be the same on all ranks that have different rows
        axes = [(was, to) for was, to in zip(grads[name].placements, where[name], strict=True) if was != to]
        return bool(axes) and len(axes) == len(_data_axes(plan)) and all(not to.is_shard() for _, to in axes)

    small = _summed(plan, state, {name: g.to_local() for name, g in grads.items() if added(name)})
    done: dict[str, Any] = {}
    for name, g in grads.items():
        if name not in small:
            done[name] = g.redistribute(placements=where[name])
            continue
        mesh, to = g.device_mesh, where[name]
        done[name] = DTensor.from_local(small[name], mesh, to, run_check=False, shape=g.shape, stride=g.stride())
    return done


def _update_everywhere(plan: Layout, update: Callable[..., Any], state: TrainState, sums: Gradients) -> Any:
    """The update where every rank holds everything: on plain tensors, which cost nothing to dispatch."""
    plain = state._replace(**{field: tree.map(_local, getattr(state, field)) for field in _LAID_OUT})
    new, metrics = update(plain, sums._replace(grads=_summed(plan, state, tree.map(_local, sums.grads))))
    return new._replace(**{f: tree.map(_everywhere, getattr(new, f), getattr(state, f)) for f in _LAID_OUT}), metrics


_LAID_OUT = ("params", "opt_state", "extra")
_BUCKET = 25 * 2**20  # bytes: large enough to fill a link, as in torch's DDP


def _local(x: Any) -> Any:
    return x.to_local() if hasattr(x, "placements") else x


def _everywhere(new: Any, like: Any) -> Any:
    if not hasattr(like, "placements"):
        return new
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(new, like.device_mesh, like.placements, run_check=False)


def _summed(plan: Layout, state: TrainState, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums over ranks of many tensors, in few reductions."""
    done: dict[str, Tensor] = {}
    bucket: list[str] = []

    def flush() -> None:
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
    """The new state, laid out as the old one."""

    def place(now: Any, then: Any) -> Any:
        if hasattr(then, "placements"):
            return now.redistribute(placements=then.placements)
        return now.full_tensor() if hasattr(now, "full_tensor") else now

    return new._replace(
        step=place(new.step, old.step),
        params={name: place(p, old.params[name]) for name, p in new.params.items()},
        opt_state=tree.map(place, new.opt_state, old.opt_state),
    )


# --- what is not a parameter --------------------------------------------------------------------------------------


def _data_axes(plan: Layout) -> list[str]:
    """The axes that rows are spread over, which sums go over."""
    return [axis for axis, size in plan.shape(plan.world).items() if axis != "tensor" and size > 1]


def _sum(plan: Layout, state: TrainState, x: Tensor) -> Tensor:
    mesh = mesh_of(state)
    for axis in _data_axes(plan):
        x = tree.sum_over(x, mesh[axis])
    return x


def largest(plan: Layout, state: TrainState, weight: Tensor) -> Tensor:
    """The largest of all ranks' weights, for what must be the same number everywhere."""
    if plan.world == 1:
        return weight
    from torch.distributed import _functional_collectives as collectives

    for axis in _data_axes(plan):
        weight = collectives.wait_tensor(collectives.all_reduce(weight, "max", mesh_of(state)[axis]))
    return weight


def mesh_of(state: TrainState) -> Any:
    """The mesh that a state is laid out on."""
    return next(iter(state.params.values())).device_mesh  # type: ignore[attr-defined]


def reduce_means(plan: Layout, state: TrainState, means: Metrics) -> Metrics:
    """Totals and weights over all ranks: one reduction for all scalars of a dtype."""
    leaves = {(name, i): x for name, mean in means.items() for i, x in enumerate(mean)}
    done: dict[tuple[str, int], Tensor] = {}
    for dtype in dict.fromkeys(x.dtype for x in leaves.values()):
        keys = [key for key, x in leaves.items() if x.dtype == dtype]
        flat = _sum(plan, state, torch.cat([leaves[key].reshape(-1) for key in keys]))
        sizes = [leaves[key].numel() for key in keys]
        done.update({key: x.reshape(leaves[key].shape) for key, x in zip(keys, flat.split(sizes), strict=True)})
    return {name: Mean(done[name, 0], done[name, 1]) for name in means}


def _agreed(plan: Layout, state: TrainState, mine: Gradients, total: Gradients) -> dict[str, Tensor]:
    """Running statistics: the mean over ranks, by the weight of their rows. Frozen parameters are the same already."""
    buffers = mine.buffers
    own = {site.name for site in state.sites if not site.is_parameter}
    names = [name for name, b in buffers.items() if name in own and b.is_floating_point()]
    if not names:
        return buffers
    even, weight = 1.0 / plan.data_size, total.loss.weight
    share = torch.where(weight > 0, mine.loss.weight / torch.where(weight > 0, weight, 1.0), even).float()
    flat = _sum(plan, state, share * torch.cat([buffers[name].float().reshape(-1) for name in names]))
    parts = flat.split([buffers[name].numel() for name in names])
    shaped = {
        name: x.reshape(buffers[name].shape).to(buffers[name].dtype) for name, x in zip(names, parts, strict=True)
    }
    return {**buffers, **shaped}


def first_rows(plan: Layout, state: TrainState, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of all ranks' rows in order: how many come before this rank's, and how many there are; ``int64[]`` both."""
    from torch.distributed import _functional_collectives as collectives

    _all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor  # until torch 2.12
    rows = 0 if isinstance(batch, Idle) else tree.row_count(batch)
    counts = torch.full((1,), rows, dtype=torch.int64, device=state.step.device)
    mesh = mesh_of(state)
    for axis in reversed(_data_axes(plan)):
        counts = collectives.wait_tensor(_all_gather(counts, 0, mesh[axis]))
    return counts[: plan.data_rank].sum(), counts.sum()


def metrics_on(plan: Layout, evaluate: Callable[..., Metrics]) -> Callable[[TrainState, Batch], Metrics]:
    """The metrics of all ranks' rows."""

    def of_all_ranks(state: TrainState, batch: Batch, /) -> Metrics:
        if plan.world == 1:
            with _computing(plan, state):
                return evaluate(state, batch)
        from trainfn._plan._gathering import gathering

        check_laid_out(plan, state)
        first, _ = first_rows(plan, state, batch)
        with gathering(plan, training=False), _computing(plan, state):
            means = evaluate(state, batch, first)
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


def check_laid_out(plan: Layout, state: TrainState) -> None:
    """Raise if a step of a plan got a state that is not laid out so."""
    params: Tree = state.params
    if not is_sharded(params):
        raise ValueError(
            "step(state, batch): the step has a plan, and the state is not laid out by it. Before the first step:"
            " `state = tfn.shard(state, plan)`."
        )
    for name, param in params.items():
        shape = tuple(param.shape)
        axes = tuple(axis for axis, size in plan.shape(plan.world).items() if size > 1)
        if param.device_mesh.mesh_dim_names != axes or param.placements != placements(plan, name, shape, "params"):
            raise ValueError(
                f"step(state, batch): the state is laid out by another plan: {name!r} is {param.placements} on"
                f" {param.device_mesh.mesh_dim_names}. Lay it out by the step's: `tfn.shard(tfn.gather(state), plan)`."
            )
