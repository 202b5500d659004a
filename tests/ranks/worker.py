"""Run by torchrun: each case on all ranks, against the same in one process; what deviates goes into a JSON file."""

import contextlib
import io
import json
import re
import sys
import traceback
import warnings

import torch
import torch.distributed as dist

import trainfn as tfn
from tests.optim.table import OPTIMIZERS, net

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
LLAMA_RULES = ((r"(q|k|v|gate|up)_proj", "columns"), (r"(o|down)_proj", "rows"))
RESULTS = {}


def deviation(a, b):
    """The largest difference of two trees."""
    pairs = zip(tfn.tree.leaves(a), tfn.tree.leaves(b), strict=True)
    return max([float((x.double() - y.double()).abs().max()) for x, y in pairs if x.numel()], default=0.0)


def squared(model, batch):
    return tfn.Mean.of((model(batch["x"]) - batch["y"]) ** 2, batch["w"])


def rows(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randint(0, 7, (n,), generator=g),
        "y": torch.randn(n, generator=g),
        "w": torch.rand(n, generator=g),
    }


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


def model_case(
    make,
    plan,
    accumulate=1,
    checkpointing=False,
    transform=None,
    loss=None,
    batches=None,
    steps=3,
    sizes=5,
    compile=False,
):
    from tests.compile.test_transformers_models import batch as hf_batch
    from tests.compile.test_transformers_models import loss as hf_loss

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
    step = tfn.jit(step, compile=compile)
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


def compiled_case(optimizer, plan, accumulate=1):
    """Compiled, with donation: the same as eager in one process; no second graph, and parameters are gathered twice."""
    alone = tfn.init(net(), optimizer)
    state = tfn.shard(tfn.init(net(), optimizer), plan)
    one = tfn.train_step(squared, optimizer)
    step = tfn.jit(tfn.train_step(squared, optimizer, plan=plan, accumulate=accumulate), donate=True)
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
    forward, backward = max(gathers)
    assert (backward > 0) == (plan.stage == 3 and plan.reshard), gathers
    assert forward >= (3 if plan.stage == 3 else 0), gathers  # the matrices
    return deviation(tfn.gather(state).params, alone.params)


def gathers_in(graph):
    """How often a graph gathers something before and after its backward pass began."""
    names = [(str(node.target), node.meta.get("autograd_backward", False)) for node in graph.nodes]
    found = [(name, back) for name, back in names if "all_gather_into_tensor" in name]
    return sum(not back for _, back in found), sum(back for _, back in found)


ADAMW = tfn.optim.chain(tfn.optim.clip_by_global_norm(0.5), tfn.optim.adamw(0.01))


def compiled():
    run("compiled: zero 3", compiled_case, ADAMW, tfn.Plan.zero(3))
    run("compiled: zero 2, in 2", compiled_case, ADAMW, tfn.Plan.zero(2), 2)


def compiled_more():
    run("compiled: zero 3 without reshard", compiled_case, ADAMW, tfn.Plan.zero(3, reshard=False))
    run("compiled: zero 3, in 2", compiled_case, ADAMW, tfn.Plan.zero(3), 2)
    run("compiled: zero 1", compiled_case, ADAMW, tfn.Plan.zero(1))
    run("compiled: replicated, in 2", compiled_case, ADAMW, tfn.Plan.replicated(), 2)
    run("compiled: adafactor", compiled_case, tfn.optim.adafactor(), tfn.Plan.zero(3))
    run("compiled: galore", compiled_case, tfn.optim.galore_adamw(0.01, rank=2), tfn.Plan.zero(3))
    split = tfn.Plan(tensor=2, rules=LLAMA_RULES)
    run("compiled: tensor", model_case, split_llama, split, compile=True, sizes=6)
    run("compiled: lomo", compiled_case, tfn.optim.lomo(0.01, clip_grad_norm=1.0), tfn.Plan.zero(3))


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


def raises(match, fn):
    try:
        fn()
    except (ValueError, RuntimeError) as error:
        assert re.search(match, str(error)), error
        return 0.0
    raise AssertionError(f"nothing was raised; expected {match}")


def stepping(plan, batches, alone, evaluate=False, **options):
    """`fit`, or `evaluate`, on this rank's batches, against the same in one process on ``alone``."""
    optimizer = tfn.optim.adamw(1e-2)
    one, state = tfn.init(net(), optimizer), tfn.shard(tfn.init(net(), optimizer), plan)
    if evaluate:
        ours = tfn.evaluate(tfn.eval_step(squared, plan=plan), state, batches)["loss"]
        theirs = tfn.evaluate(tfn.eval_step(squared), one, alone)["loss"]
        return float((ours.total - theirs.total).abs() + (ours.weight - theirs.weight).abs())
    one = stepped(tfn.train_step(squared, optimizer), one, alone)
    state = tfn.fit(tfn.train_step(squared, optimizer, plan=plan, **options), state, batches)
    return deviation(tfn.gather(state).params, one.params)


def stepped(step, state, batches):
    """As in one process, for which `fit` would not take a rank."""
    with torch.no_grad():
        for batch in batches:
            state, _ = step(state, batch)
    return state


def the_same_rows(plan):
    """Which are a mistake more often than not."""
    state = tfn.shard(tfn.init(net(), tfn.optim.sgd(0.1)), plan)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tfn.evaluate(tfn.eval_step(squared, plan=plan), state, [rows(4)])
        tfn.evaluate(tfn.eval_step(squared, plan=plan), state, [rows(4, dist.get_rank())])
    said = [str(w.message) for w in told if "all ranks have the same rows" in str(w.message)]
    assert len(said) == (dist.get_rank() == 0) and all("every row counts 2 times" in line for line in said), said
    return 0.0


def batch_statistics(plan):
    """Running statistics are of the rows there are; that a rank's are its own is told."""
    optimizer = tfn.optim.sgd(0.1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    one = tfn.init(model, optimizer)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        state = tfn.shard(one, plan)
    assert [("'1' normalizes by" in str(w.message)) for w in told] == [True] * (dist.get_rank() == 0)

    def loss(model, batch):
        return tfn.Mean.of((model(batch["y"][:, None])[:, 0] - batch["w"]) ** 2)

    batches = [rows(4, n) for n in range(3)]
    one = stepped(tfn.train_step(loss, optimizer), one, batches)
    state = tfn.fit(tfn.train_step(loss, optimizer, plan=plan), state, batches if dist.get_rank() == 0 else [])
    return deviation([tfn.gather(state).params, state.buffers], [one.params, one.buffers])


def join(batches):
    return {k: torch.cat([b[k] for b in batches if b is not None]) for k in ("x", "y", "w")}


def meta_case(plan):
    """Only rank 0 has values."""
    optimizer = tfn.optim.adamw(1e-2)
    alone = tfn.init(net(), optimizer)
    model = net() if dist.get_rank() == 0 else net().to("meta")
    return deviation(tfn.gather(tfn.shard(tfn.init(model, optimizer), plan)), alone)


def nan_case(plan, skip=False):
    """A NaN among one rank's rows concerns all."""
    optimizer = tfn.optim.adamw(1e-2)
    state = tfn.shard(tfn.init(net(), optimizer), plan)
    step = tfn.train_step(squared, optimizer, plan=plan)
    bad = rows(4) if plan.data_rank == 0 else {**rows(4), "y": torch.full((4,), float("nan"))}
    if not skip:
        return raises("the loss of step 1 is NaN", lambda: tfn.fit(step, state, [bad]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = tfn.fit(tfn.transforms.skip_nonfinite()(step), state, [bad])
    return deviation(tfn.gather(after).params, tfn.gather(state).params)


def callbacks_case(plan, loader):
    """Evaluation, early stopping and the best state, as in one process."""
    outcome = []
    for p in (None, plan):
        optimizer = tfn.optim.adamw(0.2)
        state = tfn.init(net(), optimizer)
        state = state if p is None else tfn.shard(state, p)
        best = tfn.callbacks.keep_best("eval_loss")
        stop = tfn.callbacks.early_stopping("eval_loss", patience=1)
        seen = tfn.callbacks.evaluation(tfn.eval_step(squared, plan=p), [rows(9, 99)], every=1, then=[best, stop])
        step = tfn.train_step(squared, optimizer, plan=p)
        batches = tfn.data.loader(rows(24), tfn.data.shuffled(24, 6, seed=1), epochs=5)
        with contextlib.redirect_stderr(io.StringIO()):
            last = tfn.fit(step, state, batches, callbacks=[seen])
        outcome.append((int(last.step), tfn.gather(best.state).params))
    assert outcome[0][0] == outcome[1][0] < 20, outcome
    return deviation(outcome[0][1], outcome[1][1])


def driving(plan):
    """What the driver does for ranks."""
    rank, size = plan.data_rank, plan.data_size
    data = {**rows(23), "w": torch.ones(23)}
    loader = tfn.data.loader(data, tfn.data.shuffled(23, 6, seed=1, last="pad"), epochs=2, weights="row")
    name = f"driving, stage {plan.stage}"

    def weighted(model, batch):
        return tfn.Mean.of((model(batch["x"]) - batch["y"]) ** 2, batch["row"])

    def with_loader(batches, whole=None):
        optimizer = tfn.optim.adamw(1e-2)
        one, state = tfn.init(net(), optimizer), tfn.shard(tfn.init(net(), optimizer), plan)
        one = stepped(tfn.train_step(weighted, optimizer), one, batches if whole is None else whole)
        state = tfn.fit(tfn.train_step(weighted, optimizer, plan=plan), state, batches)
        return deviation(tfn.gather(state).params, one.params)

    run(f"{name}: a loader is divided", with_loader, loader)
    run(f"{name}: a divided loader", with_loader, loader.shard(rank, size), loader)
    for last in ("drop", "short"):  # of 5 and, at the end, 3 rows
        odd = tfn.data.loader(
            {**rows(23), "row": torch.ones(23)}, tfn.data.shuffled(23, 5, seed=1, last=last), epochs=1
        )
        run(f"{name}: a loader of uneven batches, {last}", with_loader, odd)
    run(f"{name}: the same rows", the_same_rows, plan)
    wrong = loader.shard((rank + 1) % size, size)
    run(f"{name}: another's part", raises, r"the loader is part \d of 2", lambda: with_loader(wrong, []))
    # Ranks with batches of 5 and 2 rows; of 3 rows and none; a batch only on rank 0; one of 0 rows on rank 1.
    parts = [[rows(5, 1), rows(2, 2)], [rows(3, 3), None], [rows(2, 4), None]]
    own = [part[rank] for part in parts if part[rank] is not None]
    whole = [join(part) for part in parts]
    run(f"{name}: unequal", stepping, plan, own, whole)
    run(f"{name}: unequal, evaluated", stepping, plan, own, whole, evaluate=True)
    empty = {k: v[:0] for k, v in rows(1).items()}
    run(f"{name}: empty", stepping, plan, [rows(4, 5) if rank == 0 else empty], [rows(4, 5)])
    run(f"{name}: none on one rank", stepping, plan, [rows(4, 5)] if rank == 0 else [], [rows(4, 5)])
    micro = [[rows(2, 6), rows(3, 7), rows(1, 8)], [rows(2, 9)]]
    joined = join([micro[0][0], micro[1][0], *micro[0][1:]])
    run(f"{name}: streams", stepping, plan, [iter(micro[rank])], [joined], accumulate="stream")
    other = [rows(4) if rank == 0 else {**rows(4), "z": torch.ones(4)}]
    run(
        f"{name}: kinds",
        raises,
        r"different kinds:\n  rank 0: .*\n  rank 1: .*'z'",
        lambda: stepping(plan, other, other),
    )

    def apart(**changes):
        state = tfn.shard(tfn.init(net(), tfn.optim.sgd(0.1)), plan)
        step = tfn.train_step(squared, tfn.optim.sgd(0.1), plan=plan)
        if rank == 1:
            state = state._replace(**changes)
        tfn.fit(step, state, [rows(4)])

    run(f"{name}: steps", raises, r"Their step:\n  rank 0: 0\n  rank 1: 7", lambda: apart(step=torch.tensor(7)))
    run(f"{name}: keys", raises, r"Their key:\n  rank 0", lambda: apart(key=tfn.random.key(5)))
    state = tfn.init(net(), tfn.optim.sgd(0.1))
    step = tfn.train_step(squared, tfn.optim.sgd(0.1), plan=plan)
    run(f"{name}: not laid out", raises, r"tfn\.shard\(state, plan\)", lambda: step(state, rows(4)))
    twice = tfn.shard(state, plan)
    alone = tfn.train_step(squared, tfn.optim.sgd(0.1))
    for call in (alone, tfn.eval_step(squared), tfn.jit(alone)):
        run(f"{name}: no plan, {type(call).__name__}", raises, "the step has no plan", lambda f=call: f(twice, rows(4)))
    run(f"{name}: fit without a plan", raises, "2 processes were launched", lambda: tfn.fit(alone, state, [rows(4)]))
    run(f"{name}: laid out twice", raises, "laid out already", lambda: tfn.shard(twice, plan))
    another = tfn.shard(state, tfn.Plan.fsdp() if plan.stage < 3 else tfn.Plan.zero(1))
    run(f"{name}: by another plan", raises, "laid out by another plan", lambda: step(another, rows(4)))
    run(f"{name}: sizes", raises, "is for 3 ranks", lambda: tfn.shard(state, tfn.Plan(shard=3, stage=1)))
    run(f"{name}: rule", raises, "matches none", lambda: tfn.shard(state, tfn.Plan.fsdp(rules=(("zz", "rows"),))))
    split = tfn.Plan(tensor=2, rules=(("conv.weight", "columns"),))
    run(f"{name}: columns", raises, "can't be split into 2 equal columns", lambda: tfn.shard(state, split))
    run(f"{name}: no rule", raises, "no rule says which layers", lambda: tfn.shard(state, tfn.Plan(tensor=2)))


def run(name, case, *args, **options):

    if len(sys.argv) > 3 and sys.argv[3] not in name:  # by hand
        return
    try:
        RESULTS[name] = case(*args, **options)
    except Exception:
        RESULTS[name] = traceback.format_exc()


def two():
    from tests.compile.test_transformers_models import bert, gpt2, llama, t5

    for plan_name, plan in PLANS.items():
        for name, optimizer, _ in OPTIMIZERS:
            run(f"{plan_name}: {name}", optimizer_case, optimizer, plan)
        for make in (bert, gpt2, llama, t5):
            run(f"{plan_name}: {make.__name__}", model_case, make, plan, accumulate=2 if make is bert else 1)
        run(f"{plan_name}: llama checkpointed", model_case, llama, plan, checkpointing=True)
        run(f"{plan_name}: llama stream", model_case, llama, plan, "stream")
        run(f"{plan_name}: gpt2 scaled", model_case, gpt2, plan, transform=tfn.transforms.dynamic_loss_scale())
        run(f"{plan_name}: gpt2 averaged", model_case, gpt2, plan, transform=tfn.transforms.ema(0.9))
        run(f"{plan_name}: a rank without rows", model_case, llama, plan, 3, sizes=3)
        if plan_name in ("replicated", "zero 3"):
            driving(plan)
            run(f"{plan_name}: batch statistics", batch_statistics, plan)
    run("golden: DDP", golden_case, "DDP", tfn.Plan.replicated())
    run("golden: DDP, zero 2", golden_case, "DDP", tfn.Plan.zero(2))
    run("golden: FSDP2", golden_case, "FSDP2", tfn.Plan.fsdp())
    run("memory: zero 3", memory_case, tfn.Plan.zero(3), 1)
    run("memory: zero 3 without reshard", memory_case, tfn.Plan.zero(3, reshard=False), 5)
    run("tensor: llama", model_case, split_llama, tfn.Plan(tensor=2, rules=LLAMA_RULES))
    run(
        "tensor: llama checkpointed", model_case, split_llama, tfn.Plan(tensor=2, rules=LLAMA_RULES), checkpointing=True
    )


def four():
    from tests.compile.test_transformers_models import bert

    for plan_name, plan in FOUR.items():
        run(f"{plan_name}: bert", model_case, bert, plan)
        run(f"{plan_name}: bert, in 2", model_case, bert, plan, 2, sizes=11)
        run(f"{plan_name}: muon", optimizer_case, tfn.optim.muon(0.01), plan)
    for stage in (0, 1, 2, 3):
        plan = tfn.Plan(shard=2, tensor=2, stage=stage, rules=LLAMA_RULES)
        run(f"tensor 2 x zero {stage}: llama", model_case, split_llama, plan)
        run(f"tensor 2 x zero {stage}: llama, in 2", model_case, split_llama, plan, 2)
    plan = tfn.Plan(replicate=2, tensor=2, rules=LLAMA_RULES)
    run("tensor 2 x replicated: llama", model_case, split_llama, plan)


def compiled_four():
    plan = tfn.Plan(shard=2, tensor=2, stage=3, rules=LLAMA_RULES)
    run("compiled: tensor 2 x zero 3", model_case, split_llama, plan, compile=True, sizes=6)
    run("compiled: hybrid", compiled_case, ADAMW, tfn.Plan.fsdp(replicate=2))


def split_llama():
    """Heads for two ranks, and no dropout in the attention."""
    from tests.compile.test_transformers_models import SIZES, LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, attention_dropout=0.0))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    {"two": two, "four": four, "compiled": compiled, "compiled more": compiled_more, "compiled four": compiled_four}[
        sys.argv[2]
    ]()
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(RESULTS, file)
    dist.barrier()
    dist.destroy_process_group()
