"""What an eager step costs beside a hand-written loop, on models so small that little else is left.

    python perf/eager_overhead.py              # a minute; prints a table
    python perf/eager_overhead.py --profile    # where the time of a step goes, by function

Both train the same model on the same batch with AdamW and clipping, on one CPU thread, in turns. The parts of our step
are also timed alone: the gradients (bare: the same loss without our code), the update, and the keyed mode. Time is that
of the processor, so that others on the machine count little.
"""

import argparse
import cProfile
import pstats
import statistics
import time
import warnings

import gpt
import torch
import torch.nn.functional as F
import workloads
from torch import nn

import trainfn as tfn

RATE, DECAY, NORM = workloads.LEARNING_RATE, workloads.WEIGHT_DECAY, workloads.MAX_NORM


def mlp():
    torch.manual_seed(0)
    batch = {"x": torch.randn(16, 8), "y": torch.randint(4, (16,))}
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), batch


def dropped():
    model, batch = mlp()
    return nn.Sequential(nn.Dropout(0.1), *model), batch


def tiny_gpt():
    work = workloads.Work(workloads.SIZES["tiny"], "fp32", False)
    x, y = next(iter(work.torch_batches()))
    return gpt.model(work), {"x": x, "y": y}


MODELS = {"MLP": mlp, "MLP, dropout": dropped, "GPT tiny": tiny_gpt}


def loss(model, batch):
    logits = model(batch["x"])
    return tfn.losses.cross_entropy(logits, batch["y"])


def plain_loss(model, batch):
    return F.cross_entropy(model(batch["x"]).flatten(0, -2), batch["y"].flatten())


def by_hand(make, **kwargs):
    """The loop that one writes in torch."""
    model, batch = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, **kwargs)

    def run():
        optimizer.zero_grad()
        plain_loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), NORM)
        optimizer.step()

    return run


def ours(make, donate=False):
    model, batch = make()
    optimizer = tfn.optim.chain(tfn.optim.clip_by_global_norm(NORM), tfn.optim.adamw(RATE, weight_decay=DECAY))
    state = tfn.init(model, optimizer)
    step = tfn.jit(tfn.train_step(loss, optimizer), compile=False, donate=donate)
    latest = [state]

    def run():
        latest[0], _ = step(latest[0], batch)

    return run


def parts(make):
    """The pieces of our step, and what each would cost at the least."""
    model, batch = make()
    optimizer = tfn.optim.chain(tfn.optim.clip_by_global_norm(NORM), tfn.optim.adamw(RATE, weight_decay=DECAY))
    state = tfn.init(model, optimizer)
    step = tfn.train_step(loss, optimizer)
    sums = step.gradients(state, batch)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def bare():
        torch.autograd.grad(plain_loss(model, batch), parameters)

    def under_the_mode():
        with tfn.keyed(state.key):
            bare()

    return {
        "gradients, bare": bare,
        "gradients, bare, keyed": under_the_mode,
        "gradients": lambda: step.gradients(state, batch),
        "update": lambda: step.update(state, sums),
        "fold_in": lambda: tfn.random.fold_in(state.key, state.step),
    }


def measured(runs, rounds, calls):
    """Microseconds a call: the least and the median of all rounds, the rivals in turns."""
    times = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(20):
            run()
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.thread_time()
            for _ in range(calls):
                run()
            times[name].append(1e6 * (time.thread_time() - began) / calls)
    return {name: (min(t), statistics.median(t)) for name, t in times.items()}


def profile(make):
    run = ours(make)
    for _ in range(20):
        run()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(300):
        run()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--only", choices=sorted(MODELS))
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for title, make in MODELS.items():
        if given.only not in (None, title):
            continue
        if given.profile:
            profile(make)
            continue
        runs = {
            "by hand": by_hand(make),
            "by hand, fused AdamW": by_hand(make, fused=True),
            "trainfn, eager": ours(make),
            "trainfn, donating": ours(make, donate=True),
            **parts(make),
        }
        found = measured(runs, given.rounds, given.calls)
        base = found["by hand"]
        print(f"\n{title:24} {'least':>9} {'median':>9} {'ratio':>6}")
        for name, (least, median) in found.items():
            print(f"  {name:22} {least:6.0f} µs {median:6.0f} µs {least / base[0]:6.2f}")


if __name__ == "__main__":
    main()
