"""The workload: one GPT, one stream of batches, one optimizer, for every competitor the same numbers.

Weights and batches are numpy arrays made from a seed, so competitors that share no code still start from the same
point and see the same tokens: their losses can be compared step by step.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class Size:
    """A GPT and its batch; ``rounds`` bursts of ``burst`` steps each are timed after ``warmup`` steps."""

    vocab: int
    width: int
    heads: int
    layers: int
    length: int
    rows: int
    warmup: int
    burst: int
    rounds: int


SIZES = {
    "micro": Size(128, 32, 2, 1, 16, 4, warmup=2, burst=3, rounds=2),  # to try the script
    "tiny": Size(256, 64, 2, 2, 64, 8, warmup=20, burst=20, rounds=15),  # 0.14 M parameters: overhead
    "small": Size(2048, 256, 8, 6, 256, 8, warmup=3, burst=3, rounds=8),  # 5.8 M: memory and compute
    "compute": Size(256, 512, 8, 4, 128, 4, warmup=3, burst=4, rounds=8),  # 12.9 M: matrix products
    "deep12": Size(256, 64, 2, 12, 64, 8, warmup=5, burst=5, rounds=8),  # tiny with more layers: compiling
    "deep24": Size(256, 64, 2, 24, 64, 8, warmup=5, burst=5, rounds=8),
    "gpt2": Size(50304, 768, 12, 12, 1024, 16, warmup=4, burst=11, rounds=4),  # 163 M, its head untied: for GPUs
}
USUAL = ("tiny", "small", "compute")
DTYPES = ("fp32", "bf16")

# AdamW on every parameter, after clipping the gradient to norm 1.
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS, MAX_NORM = 1e-3, 0.01, (0.9, 0.999), 1e-8, 1.0

_BATCHES = 8


@dataclasses.dataclass(frozen=True)
class Work:
    """What one competitor is to do."""

    size: Size
    dtype: str
    compile: bool
    device: str = "cpu"
    mode: str | None = None

    @property
    def bf16(self) -> bool:
        return self.dtype == "bf16"

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.size.rows * self.size.length

    @property
    def flops(self) -> float:
        """Of a step's matrix products, forward and backward; of attention the half below the diagonal."""
        s = self.size
        return self.tokens * (6 * (12 * s.layers * s.width**2 + s.vocab * s.width) + 6 * s.layers * s.width * s.length)

    def weights(self) -> dict[str, np.ndarray]:
        """The first weights by name, float32."""
        s, draw = self.size, np.random.default_rng(0)
        normal = lambda *shape: (0.02 * draw.standard_normal(shape)).astype(np.float32)  # noqa: E731
        norm = lambda name: {  # noqa: E731
            f"{name}.weight": np.ones(s.width, np.float32),
            f"{name}.bias": np.zeros(s.width, np.float32),
        }
        out = {"tokens.weight": normal(s.vocab, s.width), "positions.weight": normal(s.length, s.width)}
        for i in range(s.layers):
            b = f"blocks.{i}"
            out |= norm(f"{b}.norm1") | {
                f"{b}.qkv.weight": normal(3 * s.width, s.width),
                f"{b}.out.weight": normal(s.width, s.width),
            }
            out |= norm(f"{b}.norm2") | {
                f"{b}.up.weight": normal(4 * s.width, s.width),
                f"{b}.down.weight": normal(s.width, 4 * s.width),
            }
        return out | norm("norm") | {"head.weight": normal(s.vocab, s.width)}

    def batches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """A few batches of inputs and targets, ``int64[rows, length]``; competitors go round and round."""
        s, draw = self.size, np.random.default_rng(1)
        rows = [draw.integers(0, s.vocab, (s.rows, s.length + 1)) for _ in range(_BATCHES)]
        return [(np.ascontiguousarray(r[:, :-1]), np.ascontiguousarray(r[:, 1:])) for r in rows]

    def torch_batches(self) -> Iterator:
        """The batches as tensors, for ever."""
        import torch

        put = lambda x: torch.from_numpy(x).to(self.device)  # noqa: E731
        return itertools.cycle([(put(x), put(y)) for x, y in self.batches()])
