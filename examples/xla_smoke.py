"""Check that a step computes the same on an XLA device as on the CPU, dropout included.

The check is optional, and not part of the tests::

    python3 -m venv xla && xla/bin/pip install torch==2.9.0 torch_xla==2.9.0 numpy optree safetensors tqdm accelerate
    xla/bin/pip install --no-deps . && PJRT_DEVICE=CPU xla/bin/python examples/xla_smoke.py

The last torch_xla is for torch 2.9, which is older than trainfn requires, hence `--no-deps`. Eager steps work, `jit`
does not. `PJRT_DEVICE=TPU` is the same check on a TPU, which has not been run yet.
"""

import copy
import os

os.environ.setdefault("PJRT_DEVICE", "CPU")

import torch
from torch import Tensor, nn

import trainfn as tfn


def loss(model: nn.Module, batch: dict[str, Tensor]) -> tfn.Mean:
    return tfn.losses.cross_entropy(model(batch["x"]), batch["y"])


def main() -> None:
    import torch_xla

    device = torch_xla.device()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 3))
    optimizer = tfn.optim.chain(tfn.optim.clip_by_global_norm(1.0), tfn.optim.adamw(1e-2))
    here, there = tfn.init(copy.deepcopy(model), optimizer), tfn.init(model.to(device), optimizer)
    step = tfn.train_step(loss, optimizer)
    x = torch.randn(32, 8)
    batch = {"x": x, "y": x[:, :3].argmax(-1)}
    for n in range(5):
        here, expected = step(here, batch)
        there, metrics = step(there, {name: value.to(device) for name, value in batch.items()})
        torch_xla.sync()
        print(f"step {n + 1}  CPU {expected['loss'].value:.7f}  {device} {metrics['loss'].value:.7f}")
    apart = max(float((p - there.params[name].cpu()).abs().max()) for name, p in here.params.items())
    print(f"parameters apart by {apart:.1e}")
    if apart > 1e-6:
        raise SystemExit("the two devices differ by more than the order of additions")


if __name__ == "__main__":
    main()
