"""Where each leaf of a state is: `shard` spreads a state over ranks, `gather` makes it full again."""

from __future__ import annotations

import functools
import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainfn import tree
from trainfn._dtensor import full, is_distributed
from trainfn._plan._layout import Layout, rank
from trainfn._types import TrainState, Tree

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


_SMALL = 2**16  # numbers: vectors below this size are full on every rank


def placements(plan: Layout, name: str, shape: tuple[int, ...], what: str) -> tuple[Placement, ...]:
    """The placements of a parameter, or of its optimizer state, on each axis of the mesh.

    Args:
        plan: The plan.
        name: The parameter's name.
        shape: Its global shape.
        what: ``"params"`` or ``"opt_state"``.
    """
    return _placements(plan, name, shape, what)


@functools.lru_cache(maxsize=100_000)
def _placements(plan: Layout, name: str, shape: tuple[int, ...], what: str) -> tuple[Placement, ...]:
    from torch.distributed.tensor import Replicate, Shard

    rule = plan.rule(name)
    sizes = {axis: size for axis, size in plan.shape(plan.world).items() if size > 1} or {"replicate": 1}
    tensor = _tensor_dim(rule, shape, sizes.get("tensor", 1))
    split = sharded_dim(shape, sizes.get("shard", 1), tensor)
    if rule == "replicate" or plan.stage < {"params": 3, "opt_state": 1}[what]:
        split = None
    dims = {"tensor": tensor, "shard": split, "replicate": None}
    return tuple(Replicate() if dims[axis] is None else Shard(dims[axis]) for axis in sizes)


def gradient_placements(plan: Layout, param: DTensor) -> tuple[Placement, ...]:
    """The placements of the sum of gradients until the update: sharded, or a summand that is not added up yet."""
    from torch.distributed.tensor import Partial, Shard

    axes = dict(zip(param.device_mesh.mesh_dim_names or (), param.placements, strict=True))
    now = axes.get("tensor")
    taken = now.dim if isinstance(now, Shard) else None
    found = {axis: Partial() if axis != "tensor" else placement for axis, placement in axes.items()}
    if "shard" in axes and plan.stage >= 2:
        split = sharded_dim(tuple(param.shape), param.device_mesh["shard"].size(), taken)
        found["shard"] = Partial() if split is None else Shard(split)
    return tuple(found.values())


def sharded_dim(shape: tuple[int, ...], ranks: int, taken: int | None) -> int | None:
    """The dimension that is split over the axis ``shard``: the first that divides evenly, or else is long enough.

    None for small vectors such as biases. They hold a thousandth of the numbers, and would be most of the messages.
    """
    if len(shape) < 2 and math.prod(shape) < _SMALL:
        return None
    free = [dim for dim, size in enumerate(shape) if dim != taken and size >= ranks]
    return next((dim for dim in free if shape[dim] % ranks == 0), free[0] if free else None)


def _tensor_dim(rule: str | None, shape: tuple[int, ...], ranks: int) -> int | None:
    """The dimension of ``weight[out, in]`` or ``bias[out]`` that is split over the axis ``tensor``."""
    if ranks == 1 or rule not in ("columns", "rows") or not shape:
        return None
    return 0 if rule == "columns" else 1 if len(shape) > 1 else None


def shard(state: TrainState, plan: Layout) -> TrainState:
    """Spread a state over the ranks by ``plan``; every rank calls this with a state of the same model.

    The values are those of rank 0; the leaves of other ranks may be on the meta device. Parameters become `DTensor`
    leaves, and so do leaves of their shapes in the optimizer's state. Counts, the key and the buffers are full on every
    rank. In one process nothing changes.

    Args:
        state: From `trainfn.init`.
        plan: The plan that the step is given too.

    Raises:
        ValueError: If the plan does not fit the number of processes, a rule matches no parameter, or the state is
            sharded already.

    >>> import torch, trainfn as tfn
    >>> state = tfn.init(torch.nn.Linear(2, 1), tfn.optim.adam(1e-3))
    >>> shard(state, tfn.Plan.fsdp())
    TrainState(Linear, step=0, params=2 tensors / 3 numbers)
    """
    if is_sharded(state):
        raise ValueError(
            "shard(state, plan): the state is sharded already. Write `tfn.shard(tfn.gather(state), plan)`."
        )
    _check_rules(plan, state)
    _check_offload(plan, state.step.device.type)
    if plan.precision.param is not None:
        state = state._replace(params=tree.cast(state.params, plan.precision.param))
    if plan.world == 1:
        plan.shape(1)
        return state
    _warn_batch_statistics(plan, state)
    mesh = plan.mesh(_device(state))
    names = {name: tuple(p.shape) for name, p in state.params.items()}
    params = {
        name: _distributed(p, mesh, placements(plan, name, names[name], "params")) for name, p in state.params.items()
    }
    return state._replace(
        step=_same(state.step, mesh),
        key=_same(state.key, mesh),
        params=params,
        buffers={name: _same(b, mesh) for name, b in state.buffers.items()},
        opt_state=_kept(state.opt_state, plan, mesh, names, "opt_state"),
        extra=_kept(state.extra, plan, mesh, names, "params"),
    )


def _device(state: TrainState) -> str:
    """The kind of device of the state; of one on the meta device, the accelerator of this machine."""
    if not state.step.is_meta:
        return state.step.device.type
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def is_sharded(tree_: Tree) -> bool:
    """Whether any leaf is a `DTensor`."""
    return any(map(is_distributed, tree.leaves(tree_)))


def _warn_batch_statistics(plan: Layout, state: TrainState) -> None:
    module = state.module
    found = () if module is None or plan.data_size == 1 else module.named_modules()
    kinds = (torch.nn.modules.batchnorm._BatchNorm,)
    name = next((name for name, m in found if isinstance(m, kinds) and m.training), None)
    if name is not None and rank() == 0:
        warnings.warn(
            f"shard(state, plan): {name!r} normalizes by the statistics of its batch, and each rank has only its own"
            f" rows. So {plan.world} ranks do not update as one process does. Write `torch.nn.GroupNorm`, which has no"
            " such statistics; or keep the statistics, by `.eval()` of the module before `tfn.init`.",
            stacklevel=3,
        )


def _check_rules(plan: Layout, state: TrainState) -> None:
    for pattern, rule in plan.rules:
        if not any(tree.matches(name, pattern) for name in state.params):
            raise ValueError(
                f"shard(state, plan): the rule ({pattern!r}, {rule!r}) matches none of the parameters, such as"
                f" {next(iter(state.params))!r}."
            )
    check_split(state, plan, plan.shape(plan.world)["tensor"])


def _check_offload(plan: Layout, device: str) -> None:
    if plan.offload and device != "cpu":
        raise ValueError(
            f"shard(state, plan): Plan(offload={plan.offload!r}) on {device!r} is not there: a compiled step keeps its"
            " state on one device. Write `Plan.fsdp()`, which shards the state over more ranks; or take DeepSpeed's"
            " engine, `tfn.deepspeed`, which offloads."
        )


def check_split(state: TrainState, plan: Layout, ranks: int) -> None:
    """Raise if the layers can't be split over the axis ``tensor``."""
    if ranks == 1:
        return
    for name, param in state.params.items():
        dim = _tensor_dim(plan.rule(name), tuple(param.shape), ranks)
        if dim is not None and param.shape[dim] % ranks:
            raise ValueError(
                f"shard(state, plan): {name!r} of shape {list(param.shape)} can't be split into {ranks} equal"
                f" {plan.rule(name)} (Plan(tensor={ranks}))."
            )
    config = getattr(state.module, "config", None)
    for name, rate in (config.to_dict() if hasattr(config, "to_dict") else {}).items():  # pyright: ignore
        if tree.matches(name, "att.*(dropout|drop)") and isinstance(rate, float) and rate > 0:
            raise ValueError(
                f"Plan(tensor={ranks}): with model.config.{name}={rate}, ranks would drop the same weights in different"
                f" heads. Set `model.config.{name} = 0.0` before the model is made."
            )
    if not any(plan.rule(name) in ("columns", "rows") for name in state.params):
        raise ValueError(
            f"Plan(tensor={ranks}): no rule names the layers to split. Write `rules=tfn.launch.tensor_rules(model)` or"
            ' such as `rules=((r"(q|k|v|gate|up)_proj", "columns"), (r"(o|down)_proj", "rows"))`.'
        )


def _distributed(leaf: Tensor, mesh: DeviceMesh, where: tuple[Placement, ...]) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    if leaf.is_meta:
        leaf = torch.empty_like(leaf, device=mesh.device_type)
    # A scatter of the leaf's bytes from rank 0 over each axis that splits it, and a broadcast over the others. Once a
    # run, because the ranks may have been initialized differently.
    return distribute_tensor(leaf.detach(), mesh, where)


def _same(leaf: Tensor, mesh: DeviceMesh) -> Tensor:
    """A plain tensor with the value of rank 0."""
    from torch.distributed.tensor import Replicate

    return _distributed(leaf, mesh, (Replicate(),) * mesh.ndim).to_local()  # type: ignore[attr-defined]


def _kept(kept: Tree, plan: Layout, mesh: DeviceMesh, shapes: dict[str, tuple[int, ...]], what: str) -> Tree:
    """A tree whose leaves are placed like the parameter of their name and shape; other leaves are full everywhere."""
    from torch.distributed.tensor import Replicate

    everywhere = (Replicate(),) * mesh.ndim

    def place(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        name = _owner(path, shapes)
        if name is not None and shapes[name] == tuple(leaf.shape):
            return _distributed(leaf, mesh, placements(plan, name, shapes[name], what))
        return _same(leaf, mesh) if leaf.dim() == 0 else _distributed(leaf, mesh, everywhere)

    return tree.with_leaves(kept, {path: place(path, leaf) for path, leaf in tree.named_leaves(kept).items()})


def _owner(path: str, names: dict[str, tuple[int, ...]]) -> str | None:
    """The parameter that a leaf belongs to: its path ends in the name."""
    parts = path.split("/")
    return next((name for i in range(len(parts)) if (name := "/".join(parts[i:])) in names), None)


def gather(state: Tree) -> Tree:
    """Return the state with full tensors, as in one process; every rank calls this and gets all of them.

    One gather of each sharded leaf's bytes, so every rank needs the memory of the full state.

    >>> import torch, trainfn as tfn
    >>> state = tfn.init(torch.nn.Linear(2, 1), tfn.optim.adam(1e-3))
    >>> gather(shard(state, tfn.Plan.fsdp()))
    TrainState(Linear, step=0, params=2 tensors / 3 numbers)
    """
    return tree.map(full, state)
