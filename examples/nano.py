"""Train a small GPT on the source code of Python's standard library, and let it write some.

    python examples/nano.py            # about 3 minutes on 2 cores, compilation included
    python examples/nano.py            # again: resumes from the checkpoint; Ctrl-C stops and saves
    python examples/nano.py --help

The whole loop is here: text → batches → model → loss → optimizer → step → fit → evaluate → sample.
"""

import argparse
import os
import shutil
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trainfn as tfn

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=1500, help="optimizer updates in all (default: %(default)s)")
parser.add_argument("--rows", type=int, default=32, help="rows in a batch (default: %(default)s)")
parser.add_argument("--length", type=int, default=64, help="bytes in a row (default: %(default)s)")
parser.add_argument("--width", type=int, default=96, help="width of the model (default: %(default)s)")
parser.add_argument("--layers", type=int, default=2, help="blocks of the model (default: %(default)s)")
parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per update (default: %(default)s)")
parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate (default: %(default)s)")
parser.add_argument("--seed", type=int, default=0, help="of everything (default: %(default)s)")
parser.add_argument("--eager", action="store_true", help="run the same step without compiling it")
parser.add_argument("--out", type=Path, default=Path("runs/nano"), help="checkpoint folder (default: %(default)s)")


# --- text: every .py file of the standard library as bytes; each 20th file is held out --------------------------------
def read_library() -> tuple[Tensor, ...]:
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    files = [f for f in files if not {"site-packages", "dist-packages", "test", "tests"} & set(f.parts)]
    held_out = b"".join(f.read_bytes() for f in files[::20])
    train = b"".join(f.read_bytes() for i, f in enumerate(files) if i % 20)
    return tuple(torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (train, held_out))


def windows(text: Tensor, starts: Tensor, length: int) -> dict[str, Tensor]:
    rows = text[starts[:, None] + torch.arange(length + 1)].long()
    return {"x": rows[:, :-1], "y": rows[:, 1:]}


def bigram_entropy(text: Tensor) -> float:
    """Nats per byte that no model seeing only the previous byte can beat."""
    pairs = torch.bincount(text[:-1].long() * 256 + text[1:].long(), minlength=256**2).view(256, 256).double()
    joint, given = pairs / pairs.sum(), pairs / pairs.sum(1, keepdim=True).clamp(min=1)
    return -(joint * given.clamp(min=1e-30).log()).sum().item()


# --- model: an ordinary nn.Module -------------------------------------------------------------------------------------
class Block(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # x[B, T, D]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm_1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.byte, self.place = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:  # x[B, T] -> logits[B, T, 256]
        h = self.byte(x) + self.place(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(h)))


# --- loss: a total and a weight, divided once -------------------------------------------------------------------------
def loss(model: GPT, batch: dict[str, Tensor]) -> tuple[tfn.Mean, tfn.Metrics]:
    logits = model(batch["x"])
    return tfn.losses.cross_entropy(logits, batch["y"]), {"accuracy": tfn.metrics.accuracy(logits, batch["y"])}


@torch.no_grad()
def sample(model: GPT, prompt: bytes, count: int, length: int, seed: int) -> str:
    generator, text = torch.Generator().manual_seed(seed), list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([text[-length:]]))[0, -1]
        text.append(int(torch.multinomial(torch.softmax(logits / 0.8, -1), 1, generator=generator)))
    return bytes(text).decode("utf-8", errors="replace")


def main() -> None:
    args = parser.parse_args()
    train, held_out = read_library()
    torch.manual_seed(args.seed)
    model = GPT(args.width, args.layers, args.length)
    schedule = tfn.schedules.cosine(args.lr, args.steps, warmup_steps=args.steps // 30)
    optimizer = tfn.optim.chain(tfn.optim.clip_by_global_norm(1.0), tfn.optim.adamw(schedule, weight_decay=0.1))
    state = tfn.init(model, optimizer, seed=args.seed)
    checkpoints = tfn.Checkpoints(args.out, every=500, keep=2)  # `fit` resumes from the newest one

    def batch(n: int) -> dict[str, Tensor]:  # a function of the step number, so that a run resumes exactly
        key = tfn.random.fold_in(state.key, n)
        return windows(train, tfn.random.randint(key, 0, len(train) - args.length, (args.rows,)), args.length)

    tokens, start = args.rows * args.length, max(checkpoints.steps(), default=0)
    yardstick = bigram_entropy(held_out)
    print(f"text      {len(train):,} bytes, {len(held_out):,} held out; bigram entropy {yardstick:.3f} nats/byte")
    print(f"model     {sum(p.numel() for p in state.params.values()):,} parameters")
    print(f"run       steps {start} to {args.steps}, {tokens:,} bytes each in {args.accumulate} micro-batch(es):"
          f" {max(args.steps - start, 0) * tokens:,} bytes")  # fmt: skip
    if start >= args.steps:
        print(f"          already done; `--steps {2 * args.steps}` goes on, `--out` elsewhere starts anew")

    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if not compiler and not args.eager:
        print("eager     no C++ compiler found, which torch.compile needs: the same step runs uncompiled, slower")
    compiled = bool(compiler) and not args.eager
    step = tfn.jit(tfn.train_step(loss, optimizer, accumulate=args.accumulate), donate=True, compile=compiled)
    began = time.perf_counter()
    progress = tfn.callbacks.progress(per_step={"bytes": tokens})
    state = tfn.fit(step, state, batch, until=args.steps, callbacks=[progress], checkpoints=checkpoints)
    if int(state.step) > start:
        print(f"trained   in {time.perf_counter() - began:.0f} s; {step.explain()}")
        print(f"saved     {args.out}")

    starts = torch.arange(0, len(held_out) - args.length, args.length)[:4096]
    batches = [windows(held_out, s, args.length) for s in starts.split(256)]
    metrics = tfn.callbacks.values(tfn.evaluate(tfn.eval_step(loss), state, batches))
    below = yardstick - metrics["loss"]
    print(f"held out  loss {metrics['loss']:.3f} nats/byte, {below:.3f} below the bigram entropy\n")
    print(sample(tfn.export(state).eval(), b"def ", 400, args.length, args.seed))


if __name__ == "__main__":
    main()
