"""Cases of `test_plan.py` about modules: hooks, writes into parameters, losses that differentiate, missed updates."""

import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import trainfn as tfn
from tests.module_kinds import KINDS, WRITES, Kind, floats, hooked, ids, squares, twins
from tests.ranks.driving import deviation, raises

OPTIMIZER = tfn.optim.adamw(1e-2, weight_decay=0.1)


def part_of(batch, plan):
    return tfn.tree.map(lambda x: x.tensor_split(plan.data_size)[plan.data_rank] if torch.is_tensor(x) else x, batch)


def trains(kind, plan, steps=4, compile=False, between=lambda model: None):
    """A module on ranks, and in one process."""
    ours, other = twins(kind)
    alone = tfn.init(other, OPTIMIZER)
    state = tfn.shard(tfn.init(ours, OPTIMIZER), plan)
    one, step = tfn.train_step(kind.loss, OPTIMIZER), tfn.train_step(kind.loss, OPTIMIZER, plan=plan)
    step = tfn.jit(step, backend="eager") if compile else step
    for n in range(steps):
        if n == 2:
            between(ours), between(other)
        alone, _ = one(alone, kind.batch(n))
        state, _ = step(state, part_of(kind.batch(n), plan))
    whole = tfn.gather(state)
    return max(deviation(whole.params, alone.params), deviation(whole.buffers, alone.buffers))


def hook_under_ddp():
    """A hook that is not linear sees the gradient of each rank's rows."""
    plan, kind = tfn.Plan.replicated(), KINDS["hook: clamp"]
    ours, theirs = twins(kind)
    state = tfn.shard(tfn.init(ours, OPTIMIZER), plan)
    step = tfn.train_step(squares, OPTIMIZER, plan=plan)
    wrapped = torch.nn.parallel.DistributedDataParallel(theirs)
    adamw = torch.optim.AdamW(theirs.parameters(), 1e-2, weight_decay=0.1)
    for n in range(4):
        part = part_of(ids(n), plan)
        adamw.zero_grad()
        squares(wrapped, part).value.backward()
        adamw.step()
        state, _ = step(state, part)
    return deviation(tfn.gather(state).params, {name: p.detach() for name, p in theirs.named_parameters()})


class Writing(torch.nn.Module):
    def __init__(self, how):
        super().__init__()
        self.lin, self.w, self.how = torch.nn.Linear(4, 4), torch.nn.Parameter(torch.ones(4)), how

    def forward(self, x):
        with torch.no_grad():
            WRITES[self.how](self.w)
        return self.lin(x) * self.w


def writes(how, plan):
    return raises(
        "the forward pass writes into a parameter", lambda: trains(Kind(lambda: Writing(how), squares, floats), plan)
    )


def max_norm(plan):
    kind = KINDS["embedding with max_norm"]
    return raises("the forward pass writes into a parameter, by `embedding`", lambda: trains(kind, plan))


def hook_that_writes(plan):
    def made():
        model = torch.nn.Linear(4, 1)
        model.weight.register_post_accumulate_grad_hook(lambda p: p.add_(p.grad))
        return model

    return raises("hook .*writes into its parameter", lambda: trains(Kind(made, squares, floats), plan))


def forces(model, batch):
    """A loss that differentiates by its input, as those of energies do."""
    x = batch.clone().requires_grad_()
    (force,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
    return tfn.Mean.of(((force - batch) ** 2).sum(1))


def penalty(model, batch):
    """A gradient penalty between the rows, as of WGAN-GP."""
    x = (0.5 * batch + 0.5).requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True)
    return tfn.Mean.of(out[:, 0] + 10.0 * (slope.norm(2, dim=1) - 1) ** 2)


def mlp():
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Softplus(), torch.nn.Linear(5, 1))


def late(plan, other):
    """Counts of missed updates that differ between ranks are one count; a state is restored in another layout."""
    kind, differ = KINDS["heads by task"], max(plan.stage, other.stage) < 2

    def rows(n):
        # The first step misses "b". Later ones miss a head on each rank, or "a" where all ranks must call the same.
        task = "a" if n == 0 or (plan.data_rank == 0 and differ) else "b"
        return {"x": floats(n), "task": task}

    def of(plan):
        return tfn.shard(tfn.init(twins(kind)[0], OPTIMIZER), plan), tfn.train_step(kind.loss, OPTIMIZER, plan=plan)

    state, step = of(plan)
    for n in range(3):
        state, _ = step(state, rows(n))
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    tfn.save(Path(folder[0]) / "c", state)
    store = tfn.Checkpoints(folder[0] + "/all", asynchronous=False)
    store.save(state)
    counts = {name: int(x) for name, x in tfn.gather(state).opt_state[0].late.items() if int(x)}
    missed = {"heads.b": 1, "pooler": 3} if differ else {"heads.a": 2, "heads.b": 1, "pooler": 3}
    assert counts == {f"{part}.{x}": n for part, n in missed.items() for x in ("weight", "bias")}, counts
    fresh, again = of(other)
    back = tfn.restore(Path(folder[0]) / "c", like=fresh)
    assert not tfn.diff(tfn.gather(back).params, tfn.gather(state).params)
    assert {n: int(x) for n, x in back.opt_state[0].late.items() if int(x)} == counts
    found = store.restore(fresh)
    assert found is not None and not tfn.diff(tfn.gather(found[0]), tfn.gather(back))
    for n in range(3, 5):
        state, _ = step(state, rows(n))
        back, _ = again(back, rows(n))
    return deviation(tfn.gather(back).params, tfn.gather(state).params)


def apart(plan):
    """Ranks that call different submodules exchange gradients of different parameters."""
    kind = KINDS["heads by task"]
    state, step = tfn.shard(tfn.init(kind.make(), OPTIMIZER), plan), tfn.train_step(kind.loss, OPTIMIZER, plan=plan)
    match = r"the rows of other ranks reach 'heads\..*Take `tfn.Plan.zero\(1\)`"
    return raises(match, lambda: step(state, {"x": floats(0), "task": "ab"[plan.data_rank]}))


def cases(plan, other):
    """What modules do on ranks: each name, and its case."""
    for how in ("mask", "after", "dropped", "module"):
        yield f"hook, {how}", partial(trains, Kind(partial(hooked, how), squares, ids), plan)
    yield "hook, compiled", partial(trains, KINDS["hook: after"], plan, compile=True)
    if plan.stage >= 2:
        yield "hook, clamp", partial(trains, KINDS["hook: clamp"], plan)
    yield "hook that writes", partial(hook_that_writes, plan)
    yield from ((f"writes by {how}", partial(writes, how, plan)) for how in WRITES)
    yield "max_norm", partial(max_norm, plan)
    yield (
        "frozen later",
        partial(trains, KINDS["plain"], plan, between=lambda model: model.weight.requires_grad_(False)),
    )
    yield "forces", partial(trains, Kind(mlp, forces, floats), plan)
    yield "gradient penalty", partial(trains, Kind(mlp, penalty, floats), plan)
    if plan.stage >= 2:
        yield "different submodules", partial(apart, plan)
    yield "missed updates", partial(late, plan, other)
