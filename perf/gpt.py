"""The GPT of the torch competitors."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workloads import Size, Work


class Block(nn.Module):
    def __init__(self, s: Size) -> None:
        super().__init__()
        self.heads = s.heads
        self.norm1, self.norm2 = nn.LayerNorm(s.width), nn.LayerNorm(s.width)
        self.qkv = nn.Linear(s.width, 3 * s.width, bias=False)
        self.out = nn.Linear(s.width, s.width, bias=False)
        self.up = nn.Linear(s.width, 4 * s.width, bias=False)
        self.down = nn.Linear(4 * s.width, s.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Pre-norm, learned positions, untied head."""

    def __init__(self, s: Size) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(s.vocab, s.width), nn.Embedding(s.length, s.width)
        self.blocks = nn.ModuleList([Block(s) for _ in range(s.layers)])
        self.norm, self.head = nn.LayerNorm(s.width), nn.Linear(s.width, s.vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def model(work: Work) -> GPT:
    """The GPT with the workload's weights, on its device."""
    if work.device != "cpu":
        torch.set_float32_matmul_precision("high")  # what is left in float32 in TF32, as jax has it
    gpt = GPT(work.size)
    gpt.load_state_dict({name: torch.from_numpy(w) for name, w in work.weights().items()})
    return gpt.to(work.device)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def autocast(work: Work) -> contextlib.AbstractContextManager:
    """Mixed precision for the torch competitors: bf16 matrix products, float32 parameters and moments."""
    return torch.autocast(work.device, torch.bfloat16) if work.bf16 else contextlib.nullcontext()
