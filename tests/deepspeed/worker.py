"""What every rank of a DeepSpeed run does: `python worker.py JOB FOLDER`, started by a launcher.

Each case trains a small model for a few steps; the first rank writes what came out to FOLDER/<case>.pt.
"""

import sys
import warnings
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

import trainfn as tfn

STEPS, WIDTH, CLIP = 4, 6, 0.05
ROWS = [(5, 3), (4, 6), (3, 3), (7, 4)]  # of each rank in each step


class Net(torch.nn.Module):
    def __init__(self, dropout=0.0, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.first = torch.nn.Linear(WIDTH, 8)
        self.dropout = torch.nn.Dropout(dropout)
        self.last = self.also_last = torch.nn.Linear(8, 3)  # tied: one tensor, two names
        self.gain = torch.nn.Parameter(torch.full((3,), 1.5), requires_grad=False)
        self.register_buffer("shift", torch.full((8,), 0.1))
        self.tag = "the module's own"

    def forward(self, x):
        h = checkpoint(self.hidden, x, use_reentrant=False) if self.recompute else self.hidden(x)
        return self.gain * self.last(h)

    def hidden(self, x):
        return self.dropout(torch.tanh(self.first(x) + self.shift.to(x.dtype)))


def net(dropout=0.0, recompute=False):
    torch.manual_seed(3)
    return Net(dropout, recompute)


def batch(step):
    """The global batch: ragged weights, and a row that does not count."""
    draw = torch.Generator().manual_seed(100 + step)
    rows = sum(ROWS[step % len(ROWS)])
    weight = torch.randint(1, 9, (rows,), generator=draw).float() ** 2
    weight[0] = 0
    return {
        "x": torch.randn(rows, WIDTH, generator=draw),
        "y": torch.randint(3, (rows,), generator=draw),
        "weight": weight,
    }


def local(step, rank, world):
    whole = batch(step)
    if world == 1:
        return whole
    first = ROWS[step % len(ROWS)][0]
    cut = slice(0, first) if rank == 0 else slice(first, None)
    return {name: value[cut] for name, value in whole.items()}


def loss(model, batch):
    assert model.tag == "the module's own"
    logits = model(batch["x"]).float()
    values = torch.nn.functional.cross_entropy(logits, batch["y"], reduction="none")
    return tfn.Mean.of(values, batch["weight"]), {"accuracy": tfn.metrics.accuracy(logits, batch["y"])}


def twice(model, batch):
    halves = [model(x) for x in batch["x"].tensor_split(2)]
    return loss(type("Done", (), {"tag": model.tag, "__call__": lambda self, x: torch.cat(halves)})(), batch)


def adamw(params):
    return torch.optim.AdamW(params, lr=2e-2, weight_decay=0.1)


def sgd(params):
    """Unlike Adam's, its update grows with the gradient: a wrong factor shows."""
    return torch.optim.SGD(params, lr=1.0, momentum=0.5)


BF16 = {"bf16": {"enabled": True}}
OPTIMIZERS = {"adamw": adamw, "sgd": sgd, None: None}


def config(stage, accumulate=1, clip=CLIP, **more):
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, **more.pop("zero", {})},
        **more,
    }


AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": "auto",
    },
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
}
VALUES = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 3,
    "gradient_clipping": CLIP,
    "optimizer.params.lr": 2e-2,
    "optimizer.params.weight_decay": 0.1,
}


def train(state, step, steps=range(STEPS)):
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    seen = []
    for n in steps:
        state, metrics = step(state, local(n, rank, world))
        seen.append({name: mean.value.item() for name, mean in metrics.items()})
    return state, seen


def plain(case, folder):
    """Train with the given configuration; say what came out."""
    model, optimizer = (
        net(case.get("dropout", 0.0), case.get("recompute", False)),
        OPTIMIZERS[case.get("optimizer", "adamw")],
    )
    schedule = tfn.schedules.linear(2e-2, total_steps=8) if case.get("schedule") else None
    state = tfn.deepspeed.init(
        model, optimizer, config=case["config"], values=case.get("values"), schedule=schedule, seed=5
    )
    state, seen = train(state, tfn.deepspeed.train_step(twice if case.get("twice") else loss))
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    held_out = tfn.evaluate(tfn.deepspeed.eval_step(loss), state, [local(n, rank, world) for n in (9, 10)])
    out = {
        "seen": seen,
        "eval": {name: mean.value.item() for name, mean in held_out.items()},
        "weights": tfn.deepspeed.weights(state),
        "kind": type(state.engine.optimizer).__name__,
        "world": world,
    }
    return state, out


def resumed(case, folder):
    """Save in the middle, spoil the engine, go back, and train the rest: as if nothing had happened."""
    step = tfn.deepspeed.train_step(loss)
    straight, _ = train(tfn.deepspeed.init(net(0.2), adamw, config=case["config"], seed=5), step)
    want = tfn.deepspeed.weights(straight)
    state, _ = train(tfn.deepspeed.init(net(0.2), adamw, config=case["config"], seed=5), step, range(2))
    at = str(folder / f"ckpt-{case['name']}")
    tfn.deepspeed.save(at, state)
    fresh = tfn.deepspeed.init(net(0.2), adamw, config=case["config"], seed=0)
    fresh = tfn.deepspeed.restore(at, fresh)
    restored = int(fresh.step)
    kept, converted = tfn.deepspeed.weights(fresh), None
    if case["config"]["zero_optimization"]["stage"] > 0 and torch.distributed.get_rank() == 0:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        converted = {name: value.clone() for name, value in get_fp32_state_dict_from_zero_checkpoint(at).items()}
    after, _ = train(fresh, step, range(2, STEPS))
    got = tfn.deepspeed.weights(after)
    again = tfn.deepspeed.restore(at, after)  # the same engine, back
    back, _ = train(again, step, range(2, STEPS))
    again = tfn.deepspeed.weights(back)
    return back, {"want": want, "got": got, "again": again, "restored": restored, "kept": kept, "converted": converted}


def loop(case, folder):
    """The driver: `fit` with a callback that saves."""
    rank, world = torch.distributed.get_rank, torch.distributed.get_world_size
    state = tfn.deepspeed.init(net(), adamw, config=case["config"])
    at = folder / "fit"
    state = tfn.fit(
        tfn.deepspeed.train_step(loss),
        state,
        lambda n: local(n, rank(), world()),
        until=STEPS,
        callbacks=[tfn.deepspeed.saving(at, every=2)],
    )
    saved = sorted(path.name for path in at.iterdir() if path.is_dir())
    return state, {"weights": tfn.deepspeed.weights(state), "step": int(state.step), "saved": saved}


def errors(case, folder):
    """What can only go wrong with an engine."""
    said = {}

    def note(name, call):
        try:
            call()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    step = tfn.deepspeed.train_step(loss)
    old = tfn.deepspeed.init(net(), adamw, config=case["config"])
    state, _ = step(old, local(0, rank, world))
    note("stale", lambda: step(old, local(1, rank, world)))
    note("stale eval", lambda: tfn.deepspeed.eval_step(loss)(old, local(1, rank, world)))
    note("stale engine", lambda: old.engine)
    note("copy", lambda: __import__("copy").deepcopy(state))
    note("kind", lambda: step(object(), None))
    note("no checkpoint", lambda: tfn.deepspeed.restore("/nonexistent", state))
    tfn.deepspeed.save(folder / "errors", state)
    note("no tag", lambda: tfn.deepspeed.restore(folder / "errors", state, tag="global_step7"))
    few = {name: value[:1] for name, value in local(1, rank, world).items()} if rank == 0 else local(1, rank, world)
    note("few rows", lambda: step(state, few))
    said["repr"] = f"{old!r} {state!r}"
    more = tfn.deepspeed.init(net(), adamw, config={**case["config"], "gradient_accumulation_steps": 1})
    note(
        "frozen",
        lambda: tfn.deepspeed.train_step(lambda m, b: tfn.Mean.of(m(b["x"]).detach()))(more, local(0, rank, world)),
    )
    part = tfn.deepspeed.train_step(lambda m, b: tfn.Mean.of(m.last(torch.ones(len(b["x"]), 8))))
    note("part", lambda: part(more, local(0, rank, world)))

    store = tfn.Checkpoints(folder / "store")
    note("store", lambda: tfn.fit(step, state, lambda n: local(n, rank, world), until=3, checkpoints=store))
    note("tfn.save", lambda: tfn.save(folder / "plain", state))
    calls = []

    def fails(model, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise ArithmeticError("on purpose")
        return loss(model, batch)

    note("halfway", lambda: tfn.deepspeed.train_step(fails)(state, local(1, rank, world)))
    note("after halfway", lambda: step(state, local(1, rank, world)))
    note("restore after halfway", lambda: tfn.deepspeed.restore(folder, state))
    return more, {"said": said}


def main():
    job, folder = torch.load(sys.argv[1]), Path(sys.argv[2])
    warnings.simplefilter("ignore")
    grouped = len(job) > 1  # with one case, `init` makes the process group, and `close` ends it
    if grouped:
        torch.distributed.init_process_group("gloo")
    for case in job:
        kind = KINDS[case.get("kind", "plain")]
        state, out = kind(case, folder)
        if torch.distributed.get_rank() == 0:
            torch.save(out, folder / f"{case['name']}.pt")
        tfn.deepspeed.close(state)
    if grouped:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    assert not torch.distributed.is_initialized()


KINDS = {"plain": plain, "resumed": resumed, "loop": loop, "errors": errors}

if __name__ == "__main__":
    main()
