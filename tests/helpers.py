"""The tables that the laws of the core run over: nets with their batches and losses."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trainfn as tfn

LONG = os.environ.get("TRAINFN_LONG") == "1"
takes_long = pytest.mark.skipif(not LONG, reason="the full product, and what takes minutes: TRAINFN_LONG=1 runs it")


def long(*values: Any) -> Any:
    """A row of a table that runs with the full product only; `tests/README.md` says what proves it otherwise."""
    return pytest.param(*values, marks=takes_long)


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """What ``make`` returns with torch's generator seeded, and the generator as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class MLP(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x)


class Convnet(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout2d(dropout), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x)).relu()).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        # No bias that normalization or the softmax cancels: Adam makes a step of lr out of its rounding errors.
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim), nn.Dropout(dropout))
        self.dropout = dropout

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Tied weights; the mask of attention as a buffer is not needed, the positions are."""

    def __init__(self, dropout: float, vocab: int = 11, dim: int = 8, length: int = 6) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, dim), nn.Embedding(length, dim)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList([Block(dim, dropout)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.tok.weight
        self.register_buffer("positions", torch.arange(length), persistent=False)

    def forward(self, x):
        x = self.drop(self.tok(x) + self.pos(self.positions[: x.shape[1]]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Mixed(nn.Module):
    """All that a module may hold besides fp32 parameters that learn."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4).requires_grad_(False)
        self.shift = nn.Parameter(torch.tensor([1]), requires_grad=False)
        self.register_buffer("order", torch.tensor([3, 2, 1, 0]))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_parameter("absent", None)
        self.unused = nn.Parameter(torch.ones(2, 2))
        self.low = nn.Linear(4, 6, dtype=torch.bfloat16)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(6, 3)

    def forward(self, x):
        if self.training:
            self.calls += 1
        x = self.embed((x + self.shift) % 7)[..., self.order].mean(1)
        return self.head(self.drop(self.low(x.bfloat16()).float().tanh()))


def classes(rows: int, seed: int, ignored: float = 0.0) -> torch.Tensor:
    y = torch.randint(3, (rows,), generator=generator(seed))
    return y.masked_fill(torch.rand(rows, generator=generator(seed + 1)) < ignored, -100)


def floats(*shape: int):
    def batch(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
        x = torch.randn(rows, *shape, generator=generator(seed))
        return {"x": x, "y": classes(rows, seed, ignored=0.3)}

    return batch


def tokens(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(11, (rows, 7), generator=generator(seed))
    lengths = torch.randint(2, 7, (rows, 1), generator=generator(seed + 1))
    return {"x": ids[:, :-1], "y": ids[:, 1:].masked_fill(torch.arange(6) >= lengths, -100)}


def integers(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"x": torch.randint(7, (rows, 5), generator=generator(seed)), "y": classes(rows, seed)}


def cross_entropy(model, batch):
    logits = model(batch["x"])
    correct = logits.argmax(-1) == batch["y"]
    return tfn.losses.cross_entropy(logits, batch["y"]), {"accuracy": tfn.Mean.of(correct, batch["y"] != -100)}


class Net(NamedTuple):
    name: str
    make: Callable[[float], nn.Module]
    batch: Callable[..., dict[str, torch.Tensor]]
    rowwise: bool = True  # whether a row's output depends on no other row
    loss: Callable[..., Any] = cross_entropy

    def module(self, dropout: float = 0.25) -> nn.Module:
        return seeded(lambda: self.make(dropout))


NETS = [
    Net("mlp", MLP, floats(4)),
    Net("convnet", Convnet, floats(1, 5, 5), rowwise=False),
    Net("gpt", GPT, tokens),
    Net("mixed", Mixed, integers),
]
EACH_NET = pytest.mark.parametrize("net", [pytest.param(net, id=net.name) for net in NETS])
MLP_NET, CONV_NET, GPT_NET, MIXED_NET = NETS


def adamw(lr: Any = 1e-2) -> tfn.Transform:
    return tfn.optim.chain(tfn.optim.clip_by_global_norm(1.0), tfn.optim.adamw(lr, weight_decay=0.1))


def quick(step: Any, **kwargs: Any) -> tfn.Compiled:
    """Run the captured graph itself: all of `jit` but the code generator, in a fraction of a second."""
    return tfn.jit(step, **{"backend": "eager", **kwargs})


def assert_identical(a: Any, b: Any) -> None:
    """Two trees have the same structure, and their leaves the same bits."""
    assert tfn.tree.named_leaves(a).keys() == tfn.tree.named_leaves(b).keys()
    for (name, x), y in zip(tfn.tree.named_leaves(a).items(), tfn.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        same = torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())
        assert torch.equal(x, y) or same, name


def assert_close(a: Any, b: Any, tolerance: float = 1e-6, dtype: bool = True) -> None:
    """Two trees agree: no element differs by more than ``tolerance`` of its leaf's largest."""
    assert tfn.tree.named_leaves(a).keys() == tfn.tree.named_leaves(b).keys()
    for (name, x), y in zip(tfn.tree.named_leaves(a).items(), tfn.tree.leaves(b), strict=True):
        assert x.shape == y.shape and (x.dtype == y.dtype or not dtype), name
        x, y = x.detach().double(), y.detach().double()
        assert torch.equal(x.isfinite(), y.isfinite()), name
        scale = max(1.0, float(y.abs().max())) if y.numel() else 1.0
        worst = float((x - y).abs().max()) if y.numel() else 0.0
        assert worst <= tolerance * scale, f"{name}: {worst:.3g} > {tolerance:g} * {scale:.3g}"
