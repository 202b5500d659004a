"""What each plan costs on N ranks: time per step, bytes sent, memory; beside torch's DDP and FSDP2.

    python perf/scaling.py                      # all three on 2 ranks: about 15 minutes on 2 cores
    python perf/scaling.py --only volume        # or time, memory
    python perf/scaling.py --ranks 4 --eager    # without compiling

Time: all competitors live in the same processes and take turns, a burst of steps each. Volume: the bytes that one rank
sends in a step, counted from the collectives in the compiled graph as a ring sends them, beside the least possible.
Memory: processes of their own; what a step adds to the resident memory at its peak, and the state's own bytes.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from gpt import GPT, mean_loss
from workloads import Size

import trainfn as tfn

TIMED = Size(256, 128, 4, 4, 64, 8, warmup=3, burst=5, rounds=9)  # 0.9 M parameters, rows per rank
LARGE = Size(1024, 512, 8, 8, 64, 1, warmup=2, burst=1, rounds=3)  # 26 M: 105 MB of parameters, few activations
PLANS = {
    "replicated": tfn.Plan.replicated(),
    "zero 1": tfn.Plan.zero(1),
    "zero 2": tfn.Plan.zero(2),
    "zero 3": tfn.Plan.zero(3),
    "zero 3, no reshard": tfn.Plan.zero(3, reshard=False),
}


def optimizer():
    return tfn.optim.chain(tfn.optim.clip_by_global_norm(1.0), tfn.optim.adamw(1e-3, weight_decay=0.01))


def loss(model, tokens):
    return tfn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])


def tokens(size, n):
    g = torch.Generator().manual_seed(1000 * n + dist.get_rank())
    return torch.randint(size.vocab, (size.rows, size.length + 1), generator=g)


def made(size):
    torch.manual_seed(0)
    return GPT(size)


# --- competitors: a function of the step's number -----------------------------------------------------------------


def ours(plan, size, compile):
    state = [tfn.shard(tfn.init(made(size), optimizer(), storage="adopt"), plan)]
    step = tfn.jit(tfn.train_step(loss, optimizer(), plan=plan), donate=True, compile=compile)

    def run(n):
        state[0], metrics = step(state[0], tokens(size, n))
        return metrics["loss"].value

    return run, state


def theirs(kind, size):
    """A loop as PyTorch's documentation writes it."""
    model = made(size)
    if kind == "DDP":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    adamw = torch.optim.AdamW(wrapped.parameters(), 1e-3, weight_decay=0.01, foreach=True)

    def run(n):
        batch = tokens(size, n)
        value = mean_loss(wrapped(batch[:, :-1]), batch[:, 1:])
        value.backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        return value.detach()

    return run, [list(wrapped.parameters()), adamw.state]


# --- what the processes do ----------------------------------------------------------------------------------------


def timed(given):
    rivals = {f"trainfn {name}, eager": ours(plan, TIMED, False)[0] for name, plan in PLANS.items()}
    if not given.eager:
        rivals |= {f"trainfn {name}, compiled": ours(plan, TIMED, True)[0] for name, plan in PLANS.items()}
    rivals |= {f"torch {kind}": theirs(kind, TIMED)[0] for kind in ("DDP", "FSDP2")}
    took = {name: [] for name in rivals}
    for n in range(TIMED.warmup):
        for run in rivals.values():
            run(n)
    for _ in range(TIMED.rounds):
        for name, run in rivals.items():
            dist.barrier()
            start = time.perf_counter()
            for n in range(TIMED.burst):
                run(n)
            dist.barrier()
            took[name].append((time.perf_counter() - start) / TIMED.burst * 1e3)
    base = {"eager": "torch DDP", "FSDP2": "torch FSDP2"}
    rows = []
    for name, ms in took.items():
        ratios = {
            who: statistics.median(a / b for a, b in zip(ms, took[peer], strict=True)) for who, peer in base.items()
        }
        rows.append([name, statistics.median(ms), min(ms), ratios["eager"], ratios["FSDP2"]])
    return {"columns": ["", "median ms", "min ms", "÷ DDP", "÷ FSDP2"], "rows": rows}


def volume(given):
    """Bytes that a rank sends in one step, from the graph."""
    import torch._inductor.config as inductor

    ranks, rows = dist.get_world_size(), []
    size = dataclasses.replace(TIMED, layers=2)
    nbytes = sum(p.nbytes for p in made(size).parameters())
    for name, plan in PLANS.items():
        graphs = []
        with inductor.patch(post_grad_custom_post_pass=lambda graph, graphs=graphs: graphs.append(sent(graph, ranks))):
            ours(plan, size, True)[0](0)
        least = {0: 2, 1: 2, 2: 2, 3: 3 if plan.reshard else 2}[plan.stage] * (ranks - 1) / ranks * nbytes
        total = sum(sum(kinds.values()) for kinds in graphs)
        each = ", ".join(f"{kind} {b / 1e6:.2f}" for graph in graphs for kind, b in graph.items())
        rows.append([name, total / 1e6, least / 1e6, total / least, each])
    return {"columns": ["", "MB sent", "least possible", "÷", "by kind"], "rows": rows}


def sent(graph, ranks):
    """By kind of collective, as a ring sends it."""
    factor = {"all_gather": ranks - 1, "reduce_scatter": (ranks - 1) / ranks, "all_reduce": 2 * (ranks - 1) / ranks}
    found = {}
    for node in graph.nodes:
        kind = next((k for k in factor if f"c10d_functional.{k}" in str(node.target)), None)
        if kind is None:
            continue
        given = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
        nbytes = sum(x.meta["val"].nbytes for x in given)  # what this rank puts in
        found[kind] = found.get(kind, 0) + nbytes * factor[kind]
    return found


def memory(given):
    """The peak of one competitor, in processes of its own."""
    kind, _, name = given.memory.partition(": ")
    if kind == "torch":
        run, held = theirs(name, LARGE)
    else:
        run, held = ours(PLANS[name], LARGE, kind == "compiled")
    for n in range(LARGE.warmup):
        run(n)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    run(9)
    leaves = [x for x in torch.utils._pytree.tree_leaves(held) if isinstance(x, torch.Tensor)]
    if kind == "torch":
        leaves = [*held[0], *[x for s in held[1].values() for x in s.values()]]
    local = [x.to_local() if hasattr(x, "to_local") else x for x in leaves]
    return {"state": sum(x.nbytes for x in local) / 1e6, "peak": resident("VmHWM") - before}


def resident(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


# --- the launching side -------------------------------------------------------------------------------------------


def launched(given, what, *more):
    with tempfile.NamedTemporaryFile() as out:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={given.ranks}", "--standalone"]
        options = [*(["--eager"] if given.eager else []), "--worker", what, "--out", out.name, *more]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, __file__, *options], env=env, check=True, stderr=subprocess.DEVNULL)
        return json.loads(Path(out.name).read_text())


def table(columns, rows):
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[f"{x:.2f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", choices=["time", "volume", "memory"])
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--worker")
    parser.add_argument("--memory")
    parser.add_argument("--out")
    given = parser.parse_args()
    if given.worker:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        found = {"time": timed, "volume": volume, "memory": memory}[given.worker](given)
        if dist.get_rank() == 0:
            Path(given.out).write_text(json.dumps(found))
        dist.barrier()
        dist.destroy_process_group()
        return
    print(f"torch {torch.__version__}, {given.ranks} gloo ranks of one thread each\n", flush=True)
    for what in ("time", "volume") if given.only is None else {given.only} & {"time", "volume"}:
        print(f"{what}\n\n{table(**launched(given, what))}\n", flush=True)
    if given.only in (None, "memory"):
        kinds = ["eager"] if given.eager else ["eager", "compiled"]
        names = [f"{kind}: {name}" for kind in kinds for name in PLANS] + ["torch: DDP", "torch: FSDP2"]
        rows = []
        for name in names:
            found = launched(given, "memory", "--memory", name)
            rows.append([name, found["state"], found["peak"]])
        nbytes = sum(p.nbytes for p in made(LARGE).parameters()) / 1e6
        print(f"memory per rank, MB; the parameters alone are {nbytes:.0f}\n")
        print(table(["", "state", "peak of a step above"], rows))


if __name__ == "__main__":
    main()
