"""The cases of `test_plan.py`: each runs on every rank, and returns by how much it deviates from one process."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # before the fork, as the next
import torch.distributed.tensor

import trainfn as tfn
from tests.compile.test_transformers_models import SIZES, LlamaConfig, LlamaForCausalLM, bert, gpt2, llama, t5
from tests.compile.test_transformers_models import batch as hf_batch
from tests.compile.test_transformers_models import loss as hf_loss
from tests.optim.table import OPTIMIZERS, net
from tests.ranks import driving, modules
from tests.ranks.driving import deviation, mine, rows, squared

PLANS = {
    "replicated": tfn.Plan.replicated(),
    "zero 1": tfn.Plan.zero(1),
    "zero 2": tfn.Plan.zero(2),
    "zero 3": tfn.Plan.zero(3),
}
FOUR = {
    "hybrid": tfn.Plan.fsdp(replicate=2),
    "hybrid zero 1": tfn.Plan.zero(1, replicate=2),
    "hybrid zero 2": tfn.Plan.zero(2, replicate=2),
}
torch.set_num_threads(1)
LLAMA_RULES = ((r"(q|k|v|gate|up)_proj", "columns"), (r"(o|down)_proj", "rows"))


class Case(NamedTuple):
    world: int  # how many ranks
    call: Callable[[], float]  # the deviation
    quick: bool = True  # else it takes TRAINFN_LONG


# The kinds of optimizer state, in the order of the table; the others' is elementwise.
KINDS = {
    "factored": [name for name, *_ in OPTIMIZERS if name.startswith(("adafactor", "adalomo"))],
    "matrix": [name for name, *_ in OPTIMIZERS if name.startswith("muon")],
    "low-rank": [name for name, *_ in OPTIMIZERS if name.startswith("galore")],
    "nested": ["adamw clipped", "adamw masked", "lomo clipped", "lookahead", "ema", "partition"],
}
KINDS["elementwise"] = [name for name, *_ in OPTIMIZERS if not any(name in kind for kind in KINDS.values())]


def covering(plan):
    """The optimizers that always run under a plan: all if it splits states as it does parameters, else in turn."""
    if plan == "zero 3":
        return [name for name, *_ in OPTIMIZERS]
    turn = list(PLANS).index(plan)
    return [name for kind in KINDS.values() for name in kind[turn::3] or kind[:1]]


@cache
def alone(name, *args):
    """What one process computes by a function of this module: on rank 0, once for all plans, and sent to the others."""
    found = [globals()[name](*args) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def optimizer_alone(optimizer, steps):
    state, step, expected = tfn.init(net(), optimizer), tfn.train_step(squared, optimizer), []
    with torch.no_grad():
        for n in range(steps):
            state, metrics = step(state, rows(7, n))
            expected.append({name: mean.value for name, mean in metrics.items()})
    return state.params, expected


def optimizer_case(optimizer, plan, steps=4):
    params, expected = alone("optimizer_alone", optimizer, steps)
    state, step = tfn.shard(tfn.init(net(), optimizer), plan), tfn.train_step(squared, optimizer, plan=plan)
    with torch.no_grad():
        for n in range(steps):
            state, metrics = step(state, mine(rows(7, n), plan))
            assert abs(metrics["loss"].value - expected[n]["loss"]) < 1e-5, n
            assert abs(metrics["grad_norm"].value - expected[n]["grad_norm"]) < 1e-5, n
    return deviation(tfn.gather(state).params, params)


MODELS = tfn.optim.chain(tfn.optim.clip_by_global_norm(1.0), tfn.optim.adamw(1e-3))
PLAIN = tfn.transforms.StepTransform(lambda s: s, lambda s: s)


def made(make, checkpointing):
    torch.manual_seed(0)
    model = make()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def model_alone(make, checkpointing, transform, steps, sizes):
    state = transform.init(tfn.init(made(make, checkpointing), MODELS))
    step, expected = transform(tfn.train_step(hf_loss, MODELS)), []
    with torch.no_grad():
        for n in range(steps):
            state, metrics = step(state, hf_batch(sizes, n))
            expected.append({name: mean.value for name, mean in metrics.items()})
        seen = tfn.eval_step(hf_loss)(state, hf_batch(sizes, steps - 1))["loss"].value
    return {"params": state.params, "buffers": state.buffers, "extra": state.extra}, expected, seen


def model_case(make, plan, accumulate=1, checkpointing=False, transform=PLAIN, steps=3, sizes=5, compile=False):
    one, expected, loss = alone("model_alone", make, checkpointing, transform, steps, sizes)
    state = tfn.shard(transform.init(tfn.init(made(make, checkpointing), MODELS)), plan)
    step = transform(tfn.train_step(hf_loss, MODELS, plan=plan, accumulate=accumulate))
    step = tfn.jit(step, compile=compile)
    with torch.no_grad():
        for n in range(steps):
            part = mine(hf_batch(sizes, n), plan)
            state, metrics = step(state, iter([part]) if accumulate == "stream" else part)
            for name, value in expected[n].items():
                assert abs(metrics[name].value - value) < 1e-5, (n, name, metrics, expected)
        seen = tfn.eval_step(hf_loss, plan=plan)(state, part)["loss"].value
        assert abs(seen - loss) < 1e-5
    whole = tfn.gather(state)
    assert deviation(whole.buffers, one["buffers"]) < 1e-6
    return max(deviation(whole.params, one["params"]), deviation(whole.extra, one["extra"]) if one["extra"] else 0)


def compiled_case(optimizer, plan, accumulate=1, backend="inductor"):
    """Compiled, with donation: the same as eager in one process; no second graph, and parameters are gathered twice."""
    alone = tfn.init(net(), optimizer)
    state = tfn.shard(tfn.init(net(), optimizer), plan)
    one = tfn.train_step(squared, optimizer)
    step = tfn.jit(tfn.train_step(squared, optimizer, plan=plan, accumulate=accumulate), donate=True, backend=backend)
    gathers = []
    counting = torch._inductor.config.patch(post_grad_custom_post_pass=lambda graph: gathers.append(gathers_in(graph)))
    for n in range(3):
        batch = rows(8, n)
        with torch.no_grad():
            alone, _ = one(alone, batch)
        with counting:
            state, _ = step(state, mine(batch, plan))
    report = step.explain()
    assert (report.graphs, report.breaks) == (1 if accumulate == 1 else 2, 0), report
    if backend != "inductor":  # the captured graph runs itself
        return deviation(tfn.gather(state).params, alone.params)
    forward, backward = max(gathers)
    assert (backward > 0) == (plan.stage == 3 and plan.reshard), gathers
    assert forward >= (3 if plan.stage == 3 else 0), gathers  # the matrices
    return deviation(tfn.gather(state).params, alone.params)


def gathers_in(graph):
    """How often a graph gathers something before and after its backward pass began."""
    names = [(str(node.target), node.meta.get("autograd_backward", False)) for node in graph.nodes]
    found = [(name, back) for name, back in names if "all_gather_into_tensor" in name]
    return sum(not back for _, back in found), sum(back for _, back in found)


def golden_case(kind, plan, steps=4):
    """Ours against a loop with torch's own DDP or FSDP2, where theirs is right: equal rows and weights."""
    model = net()
    if kind == "DDP":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for block in (model.fc1, model.ln, model.conv):
            torch.distributed.fsdp.fully_shard(block, mesh=mesh)
        model.temperature.requires_grad_(False)  # a scalar, which FSDP2 refuses to split
        wrapped = torch.distributed.fsdp.fully_shard(model, mesh=mesh, ignored_params={model.temperature})
    adamw = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], 0.01, weight_decay=0.1)
    ours = net()
    ours.temperature.requires_grad_(kind == "DDP")
    optimizer = tfn.optim.chain(tfn.optim.clip_by_global_norm(0.5), tfn.optim.adamw(0.01, weight_decay=0.1))
    state = tfn.shard(tfn.init(ours, optimizer), plan)
    step = tfn.train_step(squared, optimizer, plan=plan)
    for n in range(steps):
        part = mine({**rows(8, n), "w": torch.ones(8)}, plan)
        value = ((wrapped(part["x"]) - part["y"]) ** 2).mean()
        value.backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 0.5)
        adamw.step()
        adamw.zero_grad()
        with torch.no_grad():
            state, _ = step(state, part)
    theirs = {k: p.full_tensor() if hasattr(p, "full_tensor") else p for k, p in model.named_parameters()}
    whole = tfn.gather(state).params
    return deviation(whole, {name: theirs[name].detach() for name in whole})


def memory_case(plan, most):
    """How many gathered parameters of six equal ones exist at one time; autograd's saved tensors count."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from trainfn._plan import _gathering

    model = torch.nn.Sequential(*[torch.nn.Linear(32, 32, bias=False) for _ in range(6)])
    state = tfn.shard(tfn.init(model, tfn.optim.sgd(0.1)), plan)
    step = tfn.train_step(lambda m, x: tfn.Mean.of(m(x).square().sum(1)), tfn.optim.sgd(0.1), plan=plan)
    seen, peak, gathered = [], [0], _gathering.gathered

    def watched(*args):
        out = gathered(*args)
        seen.append(StorageWeakRef(out.untyped_storage()))
        peak[0] = max(peak[0], sum(not ref.expired() for ref in seen))
        return out

    _gathering.gathered = watched
    try:
        step(state, torch.ones(3, 32))
    finally:
        _gathering.gathered = gathered
    # The first layer's weight is not needed again: its input needs no gradient.
    assert len(seen) == (11 if plan.reshard else 6), len(seen)
    assert peak[0] == most, peak
    return 0.0


def split_llama():
    """Heads for two ranks, and no dropout in the attention."""
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, attention_dropout=0.0))


ADAMW = tfn.optim.chain(tfn.optim.clip_by_global_norm(0.5), tfn.optim.adamw(0.01))


def two_losses(model, batch):
    """Two losses whose weights differ on each rank and in each micro-batch."""
    found = model(batch["x"])
    near = tfn.Mean.of((found - batch["y"]).abs(), batch["w"] > 0.7)
    return tfn.losses.total({"square": squared(model, batch), "near": 3 * near})


def total_case(plan, accumulate):
    optimizer = tfn.optim.adamw(1e-2)
    one, state = tfn.init(net(), optimizer), tfn.shard(tfn.init(net(), optimizer), plan)
    alone_, step = (
        tfn.train_step(two_losses, optimizer, **options) for options in ({}, {"plan": plan, "accumulate": accumulate})
    )
    worst = 0.0
    with torch.no_grad():
        for n in range(3):
            one, expected = alone_(one, rows(9, n))
            state, metrics = step(state, mine(rows(9, n), plan, cuts=[4]))
            worst = max(worst, *(float((metrics[k].value - m.value).abs()) for k, m in expected.items()))
    return max(worst, deviation(tfn.gather(state).params, one.params))


SCALED, AVERAGED = tfn.transforms.dynamic_loss_scale(), tfn.transforms.ema(0.9)


def of_models(plan):
    yield from ((make.__name__, partial(model_case, make, plan)) for make in (gpt2, llama, t5))
    yield "bert", partial(model_case, bert, plan, accumulate=2)
    yield "llama checkpointed", partial(model_case, llama, plan, checkpointing=True)
    yield "llama stream", partial(model_case, llama, plan, "stream")
    yield "gpt2 scaled", partial(model_case, gpt2, plan, transform=SCALED)
    yield "gpt2 averaged", partial(model_case, gpt2, plan, transform=AVERAGED)
    yield "a rank without rows", partial(model_case, llama, plan, 3, sizes=3)


def of_two():
    for plan_name, plan in PLANS.items():
        quick = set(covering(plan_name))
        for name, optimizer, _ in OPTIMIZERS:
            yield f"{plan_name}: {name}", Case(2, partial(optimizer_case, optimizer, plan), name in quick)
        yield from ((f"{plan_name}: {name}", Case(2, case)) for name, case in of_models(plan))
        yield f"{plan_name}: a total of losses", Case(2, partial(total_case, plan, 2 if plan.stage in (0, 3) else 1))
        if plan_name in ("replicated", "zero 3"):
            yield from ((f"driving, {plan_name}: {name}", Case(2, case)) for name, case in driving.cases(plan))
    for plan_name, other in (("replicated", "zero 1"), ("zero 3", "zero 1")):
        found = modules.cases(PLANS[plan_name], PLANS[other])
        yield from ((f"modules, {plan_name}: {name}", Case(2, case)) for name, case in found)
    yield "golden: a hook under DDP", Case(2, modules.hook_under_ddp)
    yield "golden: DDP", Case(2, partial(golden_case, "DDP", tfn.Plan.replicated()))
    yield "golden: DDP, zero 2", Case(2, partial(golden_case, "DDP", tfn.Plan.zero(2)))
    yield "golden: FSDP2", Case(2, partial(golden_case, "FSDP2", tfn.Plan.fsdp()))
    yield "memory: zero 3", Case(2, partial(memory_case, tfn.Plan.zero(3), 1))
    yield "memory: zero 3 without reshard", Case(2, partial(memory_case, tfn.Plan.zero(3, reshard=False), 5))
    split = tfn.Plan(tensor=2, rules=LLAMA_RULES)
    yield "tensor: llama", Case(2, partial(model_case, split_llama, split))
    yield "tensor: llama checkpointed", Case(2, partial(model_case, split_llama, split, checkpointing=True))


def of_four():
    """Each plan is run always, accumulating or not."""
    for n, (plan_name, plan) in enumerate(FOUR.items()):
        yield f"{plan_name}: bert", Case(4, partial(model_case, bert, plan), n % 2 == 1)
        yield f"{plan_name}: bert, in 2", Case(4, partial(model_case, bert, plan, 2, sizes=11), n % 2 == 0)
        yield f"{plan_name}: muon", Case(4, partial(optimizer_case, tfn.optim.muon(0.01), plan))
    for stage in (0, 1, 2, 3):
        plan = tfn.Plan(shard=2, tensor=2, stage=stage, rules=LLAMA_RULES)
        yield f"tensor 2 x zero {stage}: llama", Case(4, partial(model_case, split_llama, plan), stage % 2 == 0)
        yield (
            f"tensor 2 x zero {stage}: llama, in 2",
            Case(4, partial(model_case, split_llama, plan, 2), stage % 2 == 1),
        )
    plan = tfn.Plan(replicate=2, tensor=2, rules=LLAMA_RULES)
    yield "tensor 2 x replicated: llama", Case(4, partial(model_case, split_llama, plan))


def of_compilers():
    def case(optimizer, plan, accumulate=1, world=2, quick=False):
        return Case(world, partial(compiled_case, optimizer, plan, accumulate), quick)

    def tensor(plan, world):
        return Case(world, partial(model_case, split_llama, plan, compile=True, sizes=6), quick=False)

    yield "compiled: zero 3", case(ADAMW, tfn.Plan.zero(3), quick=True)
    yield "captured: zero 2, in 2", Case(2, partial(compiled_case, ADAMW, tfn.Plan.zero(2), 2, backend="eager"))
    yield "compiled: zero 2, in 2", case(ADAMW, tfn.Plan.zero(2), 2)
    yield "compiled: zero 3 without reshard", case(ADAMW, tfn.Plan.zero(3, reshard=False))
    yield "compiled: zero 3, in 2", case(ADAMW, tfn.Plan.zero(3), 2)
    yield "compiled: zero 1", case(ADAMW, tfn.Plan.zero(1))
    yield "compiled: replicated, in 2", case(ADAMW, tfn.Plan.replicated(), 2)
    yield "compiled: adafactor", case(tfn.optim.adafactor(), tfn.Plan.zero(3))
    yield "compiled: galore", case(tfn.optim.galore_adamw(0.01, rank=2), tfn.Plan.zero(3))
    yield "compiled: lomo", case(tfn.optim.lomo(0.01, clip_grad_norm=1.0), tfn.Plan.zero(3))
    yield "compiled: tensor", tensor(tfn.Plan(tensor=2, rules=LLAMA_RULES), 2)
    yield "compiled: tensor 2 x zero 3", tensor(tfn.Plan(shard=2, tensor=2, stage=3, rules=LLAMA_RULES), 4)
    yield "compiled: hybrid", case(ADAMW, tfn.Plan.fsdp(replicate=2), world=4)


CASES = dict([*of_two(), *of_four(), *of_compilers()])


def call(name):
    """On a rank, a case; or by the name of a plan, how a run with callbacks ends."""
    torch.set_grad_enabled(True)
    return driving.called_back(PLANS[name]) if name in PLANS else CASES[name].call()
