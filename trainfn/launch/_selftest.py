"""The program of ``trainfn test``: the configured plan on N ranks, against one process without a plan."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Any

import torch
from torch import Tensor, nn

from trainfn import optim, transforms, tree
from trainfn._compile import jit
from trainfn._module import init
from trainfn._plan import Plan, Precision, gather, shard
from trainfn._step import train_step
from trainfn._types import Mean, TrainState
from trainfn.launch._fields import is_true
from trainfn.launch._settings import Launch, settings
from trainfn.process import generators_kept
from trainfn.transforms import StepTransform

UPDATES = 3
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Net(nn.Module):
    """A small module, with a layer to split by columns and one to split by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both layers."""
        return self.down(torch.nn.functional.gelu(self.up(x)))


def loss(model: Any, batch: dict[str, Tensor]) -> Mean:
    """A loss of weighted rows: a mean of the ranks' means would be another number."""
    return Mean.of(((model(batch["x"]) - batch["y"]) ** 2).mean(-1), batch["weight"])


def rows(count: int) -> dict[str, Tensor]:
    """The same batch on every rank."""
    numbers = torch.linspace(-1.0, 1.0, count * 13).reshape(count, 13)
    return {"x": numbers[:, :8].sin(), "y": numbers[:, 8:12].cos(), "weight": 1.0 + torch.arange(count) % 3}


def trained(launch: Launch, plan: Plan | None) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and parameters after some updates, of this rank's rows with a plan, or of all rows without one."""
    optimizer = optim.chain(optim.clip_by_global_norm(launch.clip or 1.0), optim.adamw(1e-2))
    with generators_kept():
        torch.default_generator.manual_seed(0)
        net = Net().to(launch.device)
    scaling = None if launch.loss_scale is None else transforms.dynamic_loss_scale(**launch.loss_scale)
    step: Any = train_step(loss, optimizer, plan=plan)
    state = init(net, optimizer)
    state, step = (state, step) if scaling is None else _scaled(scaling, state, step)
    batch = tree.map(lambda x: x.to(launch.device), rows(7 * launch.world + 1))
    if plan is not None:
        state = shard(state, plan)
        batch = tree.map(lambda x: x.tensor_split(plan.data_size)[plan.data_rank], batch)
        step = step if launch.compile is None else jit(step, **launch.compile)
    losses: list[float] = []
    for _ in range(UPDATES):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"].value))
    return losses, {name: p.detach().cpu() for name, p in gather(state.params).items()}


def _scaled(scaling: StepTransform, state: TrainState, step: Any) -> tuple[TrainState, Any]:
    return scaling.init(state), scaling(step)


def difference(launch: Launch, precision: str) -> float:
    """The largest difference between N ranks and one process, in the losses and the parameters."""
    compute = _DTYPES.get(precision)
    one = dataclasses.replace(launch, loss_scale=launch.loss_scale if precision == "fp16" else None)
    rules = (("up", "columns"), ("down", "rows")) if launch.plan.tensor != 1 else ()
    plan = dataclasses.replace(launch.plan, precision=Precision(compute=compute), rules=rules)
    losses, params = trained(one, plan)
    with contextlib.nullcontext() if compute is None else torch.autocast(launch.device.type, dtype=compute):
        expected, weights = trained(one, None)
    apart = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(losses, expected, strict=True))
    return max(apart, *(float((params[name] - w).abs().max()) for name, w in weights.items()))


def main() -> None:
    """Compare; exit with an error if the numbers differ."""
    native = is_true(os.environ.get("ACCELERATE_USE_DEEPSPEED"))
    launch = settings(deepspeed="native" if native else None, timeout=120.0)
    if launch.rank == 0 and not native:
        print(launch)
    # In 16 bits each rank rounds its own sums, and Adam divides by them.
    allowed = {"no": 1e-5} if launch.mixed_precision == "no" else {"no": 1e-5, launch.mixed_precision: 3e-2}
    apart = {precision: difference(launch, precision) for precision in allowed}
    listed = ", ".join(f"{'fp32' if name == 'no' else name} {value:.1e}" for name, value in apart.items())
    wrong = any(not value <= allowed[name] for name, value in apart.items())
    who = f"{launch.world} ranks on {launch.device.type}" if launch.world > 1 else f"1 process on {launch.device.type}"
    if wrong:
        raise SystemExit(f"trainfn test: rank {launch.rank} of {who} differs from one process: {listed}.")
    if launch.rank == 0:
        print(f"trainfn test: success. {who}: the numbers of one process, apart by at most {listed}.")


if __name__ == "__main__":
    main()
