"""What each plan costs, on paper: bytes that a rank sends in a step, and memory that it needs; prints `costs.md`.

python perf/costs.py > perf/costs.md
"""

import dataclasses

GPUS = (8, 64, 512)
FAST, SLOW = 400e9, 50e9  # bytes a second: within a node of 8 (NVLink), between nodes (400 Gb/s per GPU)
HEAD = """# What a plan costs, on paper

Made by `costs.py`. P parameters, N ranks; parameters and Adam's two moments in float32, gathered and computed in
bfloat16 (`Precision(compute=torch.bfloat16)`), gradients reduced in float32 (`reduce=None`) or bfloat16.
`scaling.py` counts the bytes in the compiled graph and measures the memory; `results/` has what it found.

## Formulas

A ring all-gather or reduce-scatter of B bytes sends B (N-1)/N from each rank; an all-reduce is both. The forward pass
gathers a parameter where it is used, and the backward pass gathers it again; with k micro-batches all that is done k
times in stage 3, and the reduction k times in stages 2 and 3, once otherwise.

| plan | sent per rank and step, in numbers | parameters | gradients | moments |
| --- | --- | --- | --- | --- |
| `Plan.replicated()` | 2 P (N-1)/N | 4 P | 4 P | 8 P |
| `Plan.zero(1)` | reduce P + gather P | 4 P | 4 P | 8 P / N |
| `Plan.zero(2)` | k reduce P + gather P | 4 P | 4 P / N | 8 P / N |
| `Plan.fsdp()` = `zero(3)` | k (2 gather P + reduce P) | 4 P / N | 4 P / N | 8 P / N |
| `Plan.fsdp(reshard=False)` | k (gather P + reduce P) | 4 P / N, and 2 P in a step | 4 P / N | 8 P / N |
| `Plan.fsdp(replicate=R)` | as fsdp on N/R ranks, + 2 P R/N (R-1)/R once | 4 P R/N | 4 P R/N | 8 P R/N |
| `Plan(tensor=T)` | per layer and micro-batch 4 all-reduces of the activations | 4 P / T | 4 P / T | 8 P / T |

A gather moves what is computed with (2 bytes in bfloat16), a reduction what `reduce` says (4, or 2). In stages 1 and 2
the new parameters are gathered in the dtype that they are kept in (4). Besides there is one gathered parameter at a
time, the activations, and what the optimizer's update needs in between (with `donate=True` about one leaf).

"""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one plan: gigabytes per rank."""

    state: float
    sent: float
    seconds: float


def cost(plan, params, gpus, replicas=1):
    """State (with gradients), bytes sent in a step of one micro-batch, and seconds of that at the wires' speed."""
    n = gpus // replicas
    ring = (n - 1) / n
    gather16, reduce32, gather32 = 2 * params * ring, 4 * params * ring, 4 * params * ring
    state, sent = {
        "replicated": (16 * params, 2 * reduce32),
        "zero 1": (8 * params + 8 * params / n, reduce32 + gather32),
        "zero 2": (4 * params + 12 * params / n, reduce32 + gather32),
        "fsdp": (16 * params / n, 2 * gather16 + reduce32),
        "hybrid": (16 * params / n, 2 * gather16 + reduce32),
    }[plan]
    seconds = sent / (FAST if n <= 8 else SLOW)
    if replicas > 1:
        between = 2 * 4 * params / n * (replicas - 1) / replicas
        sent, seconds = sent + between, seconds + between / SLOW
    return Cost(state / 1e9, sent / 1e9, seconds)


def main():
    print(HEAD, end="")
    for billions in (7, 70):
        print(f"## {billions} billion parameters\n")
        print(f"Per GPU: GB of state and gradients; GB sent in a step; seconds of it at {FAST / 1e9:.0f} GB/s within a")
        print(f"node of 8 and {SLOW / 1e9:.0f} GB/s between nodes, if nothing overlapped.\n")
        print("| plan | " + " | ".join(f"{n} GPUs" for n in GPUS) + " |")
        print("| --- |" + " ---: |" * len(GPUS))
        for plan in ("replicated", "zero 1", "zero 2", "fsdp", "hybrid"):
            cells = []
            for n in GPUS:
                if plan == "hybrid" and n == 8:
                    cells.append("= fsdp")
                    continue
                c = cost(plan, billions * 1e9, n, n // 8 if plan == "hybrid" else 1)
                cells.append(f"{c.state:,.0f} · {c.sent:,.0f} · {c.seconds:.2f} s")
            name = "hybrid, within nodes" if plan == "hybrid" else plan
            print(f"| {name} | " + " | ".join(cells) + " |")
        print()
    print(TAIL, end="")


TAIL = """## Reading it

* 7 billion parameters replicated need 112 GB before the first activation: no 80 GB GPU holds that; `zero(2)` on 8 fits
  (38 GB), `fsdp()` leaves room for activations (14 GB).
* 70 billion: only `fsdp()` on 64 and more (18 GB). 8 GPUs hold no plan of it, and hybrid within nodes needs 140 GB too.
  `Plan.fsdp(replicate=8)` on 512 is 64 ranks to a copy: 18 GB each; between copies goes the reduction of 1/64 of the
  gradients.
* Sending takes as long as computing when tokens per rank and step are few. A step computes about 6 P tokens FLOP; at
  400 TFLOP/s and 7 billion, 8,192 tokens per rank take 0.86 s. `fsdp()` over nodes sends for 1.1 s: more tokens per
  step, or hybrid within nodes (0.24 s), is what makes it efficient.
* Accumulation of k micro-batches multiplies what `fsdp()` sends by k, and not what `zero(1)` and `replicated` send.
"""

if __name__ == "__main__":
    main()
