"""A plan: frozen data by which ranks hold, compute and reduce their parts of a state.

::

    axis        splits                             so that N ranks
    replicate   the rows of a batch                hold the same, and add up their gradients
    shard       the rows, and what `stage` says    hold 1/N of the optimizer state, gradients, parameters
    tensor      weight matrices, by `rules`        compute 1/N of each block on the same rows

Rank r is at ``(replicate, shard, tensor)``, the last one counting fastest.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Literal, get_args

import torch

from trainfn import tree
from trainfn._ranks._errors import launched

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh

AXES = ("replicate", "shard", "tensor")
Rule = Literal["replicate", "columns", "rows"]
Stage = Literal[0, 1, 2, 3]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """The dtypes of a run; None stands for the dtype of the parameters.

    Attributes:
        param: The dtype of the parameters in the state.
        compute: The dtype of the forward and backward pass. Parameters are cast before they are gathered, and the rest
            runs under `torch.autocast`.
        reduce: The dtype of the sum of gradients over ranks.

    >>> Precision(compute=torch.bfloat16).compute
    torch.bfloat16
    """

    param: torch.dtype | None = None
    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The fields of `Plan`, which adds steps to them; see `Plan`."""

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    stage: Stage = 0
    rules: tuple[tuple[str, Rule], ...] = ()
    reshard: bool = True
    precision: Precision = Precision()
    offload: tuple[Literal["opt_state", "params"], ...] = ()

    def __post_init__(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, size in sizes.items():
            if type(size) is not int or (size < 1 and size != -1):
                raise ValueError(f"Plan({axis}={size!r}): a number of ranks from 1 on, or -1 for those that are left.")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"Plan({_listed(sizes)}): only one axis can take the ranks that are left, -1.")
        if self.stage not in get_args(Stage):
            raise ValueError(f"Plan(stage={self.stage!r}): 0, 1, 2 or 3; see `Plan`.")
        for rule in self.rules:
            if not (isinstance(rule, tuple) and len(rule) == 2 and rule[1] in get_args(Rule)):
                raise ValueError(f"Plan(rules=(..., {rule!r})): (pattern, rule) with one of {get_args(Rule)}.")
        for what in self.offload:
            if what not in ("opt_state", "params"):
                raise ValueError(f'Plan(offload=(..., {what!r})): "opt_state" or "params".')

    # --- where this rank is ---------------------------------------------------------------------------------------

    def shape(self, world: int) -> dict[str, int]:
        """Return the size of every axis when there are ``world`` ranks.

        Raises:
            ValueError: If the sizes don't multiply to ``world``.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        known = functools.reduce(lambda a, b: a * b, (size for size in sizes.values() if size != -1))
        if -1 in sizes.values():
            sizes = {axis: world // known if size == -1 else size for axis, size in sizes.items()}
        if world % known or functools.reduce(lambda a, b: a * b, sizes.values()) != world:
            raise ValueError(
                f"Plan({_listed({a: getattr(self, a) for a in AXES})}) is for {known} ranks or a multiple, and there"
                f" {'is 1 process' if world == 1 else f'are {world} processes'}. Launch as many, or change the sizes."
            )
        return sizes

    @property
    def world(self) -> int:
        """The number of ranks."""
        return world_size()

    @property
    def data_size(self) -> int:
        """The number of parts that the rows of a batch are divided into."""
        sizes = self.shape(self.world)
        return sizes["replicate"] * sizes["shard"]

    @property
    def data_rank(self) -> int:
        """The part of a batch's rows that this rank has: ``loader.shard(plan.data_rank, plan.data_size)``."""
        return rank() // self.shape(self.world)["tensor"]

    def mesh(self, device: str) -> DeviceMesh:
        """Return the mesh of ranks with the axes that are longer than 1; made once. All ranks call this."""
        sizes = {axis: size for axis, size in self.shape(self.world).items() if size > 1}
        return _mesh(device, tuple((sizes or {"replicate": 1}).items()))

    def rule(self, name: str) -> Rule | None:
        """The rule for a parameter's name."""
        return next((rule for pattern, rule in self.rules if tree.matches(name, pattern)), None)


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())


@functools.lru_cache(maxsize=64)
def _mesh(device: str, axes: tuple[tuple[str, int], ...]) -> DeviceMesh:
    from torch.distributed import init_device_mesh

    # Makes a process group for each axis, once for each plan: a few round trips between the ranks, no data.
    return init_device_mesh(device, tuple(n for _, n in axes), mesh_dim_names=tuple(name for name, _ in axes))


def world_size() -> int:
    """Return the number of processes of this job.

    Raises:
        RuntimeError: If a launcher started several processes and they have not met.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    if launched() > 1:
        raise RuntimeError(
            f"{launched()} processes were launched (WORLD_SIZE={launched()}), and this one believes that it is alone:"
            " each would train by itself. Write `plan = tfn.launch.plan()` first of all, which brings them together, or"
            " `torch.distributed.init_process_group()`; on a machine without GPUs, launch with"
            " `ACCELERATE_USE_CPU=true accelerate launch ...`."
        )
    return 1


def rank() -> int:
    """Return the number of this process."""
    return torch.distributed.get_rank() if world_size() > 1 else 0
