"""Run by torchrun: each case on all ranks, against the same in one process; what deviates goes into a JSON file."""

import json
import sys
import traceback

import torch
import torch.distributed as dist
from optimizers import OPTIMIZERS, net

import trainfn as tfn

PLANS = {
    "replicated": tfn.Plan.replicated(),
    "zero 1": tfn.Plan.zero(1),
    "zero 2": tfn.Plan.zero(2),
    "zero 3": tfn.Plan.zero(3),
}
RESULTS = {}


def deviation(a, b):
    """The largest difference of two trees."""
    pairs = zip(tfn.tree.leaves(a), tfn.tree.leaves(b), strict=True)
    return max([float((x.double() - y.double()).abs().max()) for x, y in pairs if x.numel()], default=0.0)


def squared(model, batch):
    return tfn.Mean.of((model(batch["x"]) - batch["y"]) ** 2, batch["w"])


def rows(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"x": torch.randint(0, 7, (n,), generator=g), "y": torch.randn(n, generator=g), "w": torch.rand(n, generator=g)}


def mine(batch, plan, cuts=None):
    """This rank's rows: as even as can be, or cut at ``cuts``."""
    parts = {k: torch.tensor_split(v, plan.data_size if cuts is None else cuts) for k, v in batch.items()}
    return {k: v[plan.data_rank] for k, v in parts.items()}


def optimizer_case(optimizer, plan, steps=4):
    alone = tfn.init(net(), optimizer)
    state = tfn.shard(tfn.init(net(), optimizer), plan)
    one, step = tfn.train_step(squared, optimizer), tfn.train_step(squared, optimizer, plan=plan)
    with torch.no_grad():
        for n in range(steps):
            batch = rows(7, n)
            alone, expected = one(alone, batch)
            state, metrics = step(state, mine(batch, plan))
            assert abs(metrics["loss"].value - expected["loss"].value) < 1e-5, n
            assert abs(metrics["grad_norm"].value - expected["grad_norm"].value) < 1e-5, n
    return deviation(tfn.gather(state).params, alone.params)


def model_case(make, plan, accumulate=1, checkpointing=False, transform=None, loss=None, batches=None, steps=3, sizes=5):
    from test_transformers_models import batch as hf_batch
    from test_transformers_models import loss as hf_loss

    optimizer = tfn.optim.chain(tfn.optim.clip_by_global_norm(1.0), tfn.optim.adamw(1e-3))
    torch.manual_seed(0)
    model = make()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    loss = loss or hf_loss
    wrap = transform or tfn.transforms.StepTransform(lambda s: s, lambda s: s)
    alone, state = (wrap.init(tfn.init(model, optimizer)) for _ in range(2))
    state = tfn.shard(state, plan)
    one = wrap(tfn.train_step(loss, optimizer))
    step = wrap(tfn.train_step(loss, optimizer, plan=plan, accumulate=accumulate))
    with torch.no_grad():
        for n in range(steps):
            batch = (batches or hf_batch)(sizes, n)
            alone, expected = one(alone, batch)
            part = mine(batch, plan)
            state, metrics = step(state, iter([part]) if accumulate == "stream" else part)
            for name in expected:
                assert abs(metrics[name].value - expected[name].value) < 1e-5, (n, name, metrics, expected)
        seen = tfn.eval_step(loss, plan=plan)(state, part)["loss"].value
        assert abs(seen - tfn.eval_step(loss)(alone, batch)["loss"].value) < 1e-5
    whole = tfn.gather(state)
    assert deviation(whole.buffers, alone.buffers) < 1e-6
    return max(deviation(whole.params, alone.params), deviation(whole.extra, alone.extra) if alone.extra else 0)


def run(name, case, *args, **options):
    if len(sys.argv) > 2 and sys.argv[2] not in name:
        return
    try:
        RESULTS[name] = case(*args, **options)
    except Exception:
        RESULTS[name] = traceback.format_exc()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for plan_name, plan in PLANS.items():
        for name, optimizer, _ in OPTIMIZERS:
            run(f"{plan_name}: {name}", optimizer_case, optimizer, plan)
        from test_transformers_models import bert, gpt2, llama, t5

        for make in (bert, gpt2, llama, t5):
            run(f"{plan_name}: {make.__name__}", model_case, make, plan)
            run(f"{plan_name}: {make.__name__}, in 2", model_case, make, plan, 2)
        run(f"{plan_name}: llama checkpointed", model_case, llama, plan, checkpointing=True)
        run(f"{plan_name}: llama stream", model_case, llama, plan, "stream")
        run(f"{plan_name}: gpt2 scaled", model_case, gpt2, plan, transform=tfn.transforms.dynamic_loss_scale())
        run(f"{plan_name}: gpt2 averaged", model_case, gpt2, plan, transform=tfn.transforms.ema(0.9))
        run(f"{plan_name}: a rank without rows", model_case, llama, plan, 3, sizes=3)
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(RESULTS, file)
    dist.barrier()
    dist.destroy_process_group()
