"""What a step may be made of: each row is a module, a loss and a batch, and has to be captured to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import trainfn as tfn
from tests.helpers import generator


class Row(NamedTuple):
    name: str
    module: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss: Callable[..., Any]

    def __repr__(self) -> str:
        return self.name


def numbers(*shape: int, classes: int = 3) -> Callable[[], Any]:
    def batch() -> Any:
        x = torch.randn(4, *shape, generator=generator(0))
        return {"x": x, "y": torch.randint(classes, (4,), generator=generator(1))}

    return batch


def classified(model, batch):
    return tfn.losses.cross_entropy(model(batch["x"]), batch["y"])


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn, self.head = kind(5, 6, batch_first=True, **options), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class UNet(nn.Module):
    """Down, up, a skip, group norm, a time embedding: what a diffusion model is made of."""

    def __init__(self):
        super().__init__()
        self.time = nn.Linear(1, 8)
        self.inner, self.down = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.norm, self.up = nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.out = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x, t):
        skip = F.silu(self.inner(x)) + self.time(t[:, None])[:, :, None, None]
        h = F.silu(self.norm(self.down(skip)))
        return self.out(torch.cat([F.interpolate(h, scale_factor=2.0) + self.up(h), skip], 1))


def denoises(model, batch):
    """The noise and the times are drawn in the step, from the state's key."""
    noise, t = torch.randn_like(batch["x"]), torch.rand(batch["x"].shape[0])
    scale = t[:, None, None, None]
    return tfn.losses.mse(model(batch["x"] * (1 - scale) + noise * scale, t), noise)


class Experts(nn.Module):
    """Keeps its auxiliary loss on itself, as mixtures of experts do."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList([nn.Linear(4, 3) for _ in range(2)])

    def forward(self, x):
        p = self.gate(x).softmax(-1)
        self.aux = (p.mean(0) ** 2).sum()
        return sum(p[:, i, None] * expert(x) for i, expert in enumerate(self.experts))


def with_auxiliary_loss(model, batch):
    mean = classified(model, batch)
    return tfn.Mean(mean.total + 0.1 * model.aux * mean.weight, mean.weight)


class Blocks(nn.Module):
    """Attention and dropout inside a checkpoint."""

    def __init__(self, **how):
        super().__init__()
        self.how, self.head = how, nn.Linear(8, 3)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True) for _ in range(2)])

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, **self.how) if self.how else block(x)
        return self.head(x.mean(1))


def hooked():
    """Its activations are kept by a hook."""
    module, kept = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), {}
    module[1].register_forward_hook(lambda module, given, out: kept.__setitem__("h", out))
    return module


def pruned():
    module = nn.Linear(4, 3)
    prune.l1_unstructured(module, "weight", amount=0.3)
    return module


class Caches(nn.Module):
    """Makes a mask at its first call and uses it from then on."""

    def __init__(self):
        super().__init__()
        self.head, self.mask = nn.Linear(4, 3), None

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.linspace(0.5, 1.5, 4)
        return self.head(x * self.mask)


def per_sample(model, batch):
    """`torch.func.vmap` of a gradient inside the loss."""
    weight = model.weight
    norms = torch.func.vmap(lambda x: torch.func.grad(lambda w: (w @ x).square().sum())(weight).norm())(batch["x"])
    return tfn.Mean.of(norms)


def gradient_penalty(model, batch):
    """A backward pass through a backward pass."""
    x = batch["x"].detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    mean = classified(model, batch)
    return mean + tfn.Mean((slope.norm(dim=1) - 1).square().sum(), torch.zeros(()))


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class Quantized(nn.Linear):
    def forward(self, x):
        return super().forward(Straight.apply(x * 4) / 4)


def branches(model, batch):
    """`torch.cond`, whose branches torch's own tracer reads."""
    out = torch.cond(batch["x"].sum() > 0, lambda x: x * 2.0, lambda x: x - 1.0, (batch["x"],))
    return tfn.losses.cross_entropy(model(out), batch["y"])


def autocast(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return tfn.losses.cross_entropy(model(batch["x"]).float(), batch["y"])


def sampled(model, batch):
    """A distribution of torch's, with its checks of arguments."""
    mean, spread = model(batch["x"]).chunk(2, -1)
    z = torch.distributions.Normal(mean, F.softplus(spread) + 0.1).rsample()
    return tfn.Mean.of(z.square())


ROWS = [
    Row("lstm", lambda: Recurrent(nn.LSTM, bidirectional=True), numbers(7, 5), classified),
    Row("gru", lambda: Recurrent(nn.GRU, bidirectional=True), numbers(7, 5), classified),
    Row("rnn of two layers", lambda: Recurrent(nn.RNN, num_layers=2, bidirectional=True), numbers(7, 5), classified),
    Row("u-net", UNet, numbers(1, 8, 8), denoises),
    Row("auxiliary loss", Experts, numbers(4), with_auxiliary_loss),
    Row("blocks", Blocks, numbers(5, 8), classified),
    Row("checkpoint", lambda: Blocks(use_reentrant=False), numbers(5, 8), classified),
    Row("hook", hooked, numbers(4), classified),
    Row("pruned", pruned, numbers(4), classified),
    Row("weight norm", lambda: parametrizations.weight_norm(nn.Linear(4, 3)), numbers(4), classified),
    Row("spectral norm", lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), numbers(4), classified),
    Row("cache", Caches, numbers(4), classified),
    Row("vmap", lambda: nn.Linear(4, 3, bias=False), numbers(4), per_sample),
    Row("double backward", lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), numbers(4),
        gradient_penalty),
    Row("autograd.Function", lambda: Quantized(4, 3), numbers(4), classified),
    Row("cond", lambda: nn.Linear(4, 3), numbers(4), branches),
    Row("autocast", lambda: nn.Linear(4, 3), numbers(4), autocast),
    Row("distribution", lambda: nn.Linear(4, 6), numbers(4), sampled),
    Row("batch norm", lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3)),
        numbers(2, 6), classified),
    Row("compiled before", lambda: nn.Sequential(torch.compile(nn.Linear(4, 6), backend="eager"), nn.Linear(6, 3)),
        numbers(4), classified),
]  # fmt: skip
