"""Cases of `test_plan.py` about the driver: loaders and rows that differ from rank to rank, and mistakes."""

import contextlib
import io
import re
import warnings
from functools import partial

import torch
import torch.distributed as dist

import trainfn as tfn
from tests.optim.table import net


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


def raises(match, fn):
    try:
        fn()
    except (ValueError, RuntimeError, tfn.errors.TrainfnError) as error:
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
    buffers = deviation(state.buffers, one.buffers) if dist.get_rank() == 0 else 0.0  # rank 1 had no rows
    return max(buffers, deviation(tfn.gather(state).params, one.params))


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


def called_back(plan):
    """The last step, and the best parameters, of a run with evaluation, early stopping and the best state."""
    optimizer = tfn.optim.adamw(0.2)
    state = tfn.shard(tfn.init(net(), optimizer), plan)
    best = tfn.callbacks.keep_best("eval_loss")
    stop = tfn.callbacks.early_stopping("eval_loss", patience=1)
    seen = tfn.callbacks.evaluation(tfn.eval_step(squared, plan=plan), [rows(9, 99)], every=1, then=[best, stop])
    batches = tfn.data.loader(rows(24), tfn.data.shuffled(24, 6, seed=1), epochs=5)
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all ranks evaluate the same rows
        last = tfn.fit(tfn.train_step(squared, optimizer, plan=plan), state, batches, callbacks=[seen])
    return int(last.step), {name: p.tolist() for name, p in tfn.gather(best.state).params.items()}


def loading(plan, batches, whole=None):
    """`fit` on a loader, against the same in one process on all of it."""

    def weighted(model, batch):
        return tfn.Mean.of((model(batch["x"]) - batch["y"]) ** 2, batch["row"])

    optimizer = tfn.optim.adamw(1e-2)
    one, state = tfn.init(net(), optimizer), tfn.shard(tfn.init(net(), optimizer), plan)
    one = stepped(tfn.train_step(weighted, optimizer), one, batches if whole is None else whole)
    state = tfn.fit(tfn.train_step(weighted, optimizer, plan=plan), state, batches)
    return deviation(tfn.gather(state).params, one.params)


def divided(plan):
    whole = padded()
    return loading(plan, whole.shard(plan.data_rank, plan.data_size), whole)


def divided_wrongly(plan):
    wrong = padded().shard((plan.data_rank + 1) % plan.data_size, plan.data_size)
    return raises(r"the loader is part \d of 2", lambda: loading(plan, wrong, []))


def padded():
    data = {**rows(23), "w": torch.ones(23)}
    return tfn.data.loader(data, tfn.data.shuffled(23, 6, seed=1, last="pad"), epochs=2, weights="row")


def uneven(last):
    """Batches of 5 and, at the end, 3 rows."""
    data = {**rows(23), "row": torch.ones(23)}
    return tfn.data.loader(data, tfn.data.shuffled(23, 5, seed=1, last=last), epochs=1)


def unequal(plan, evaluate=False):
    """Ranks with batches of 5 and 2 rows; of 3 rows and none; a batch only on rank 0."""
    parts = [[rows(5, 1), rows(2, 2)], [rows(3, 3), None], [rows(2, 4), None]]
    own = [part[plan.data_rank] for part in parts if part[plan.data_rank] is not None]
    return stepping(plan, own, [join(part) for part in parts], evaluate=evaluate)


def empty(plan):
    """A batch of 0 rows on rank 1."""
    none = {k: v[:0] for k, v in rows(1).items()}
    return stepping(plan, [rows(4, 5) if plan.data_rank == 0 else none], [rows(4, 5)])


def none_on_one_rank(plan):
    return stepping(plan, [rows(4, 5)] if plan.data_rank == 0 else [], [rows(4, 5)])


def streams(plan):
    micro = [[rows(2, 6), rows(3, 7), rows(1, 8)], [rows(2, 9)]]
    joined = join([micro[0][0], micro[1][0], *micro[0][1:]])
    return stepping(plan, [iter(micro[plan.data_rank])], [joined], accumulate="stream")


def kinds(plan):
    other = [rows(4) if plan.data_rank == 0 else {**rows(4), "z": torch.ones(4)}]
    return raises(r"different kinds:\n  rank 0: .*\n  rank 1: .*'z'", lambda: stepping(plan, other, other))


def apart(plan, match, **changes):
    """A field of rank 1's state differs."""
    state, step = laid_out(plan)
    if plan.data_rank == 1:
        state = state._replace(**changes)
    return raises(match, lambda: tfn.fit(step, state, [rows(4)]))


def laid_out(plan):
    optimizer = tfn.optim.sgd(0.1)
    return tfn.shard(tfn.init(net(), optimizer), plan), tfn.train_step(squared, optimizer, plan=plan)


def not_sharded(plan):
    _, step = laid_out(plan)
    state = tfn.init(net(), tfn.optim.sgd(0.1))
    return raises(r"tfn\.shard\(state, plan\)", lambda: step(state, rows(4)))


def no_plan(plan, make):
    call, (state, _) = make(), laid_out(plan)
    return raises("the step has no plan", lambda: call(state, rows(4)))


def fit_without_a_plan(plan):
    state = tfn.init(net(), tfn.optim.sgd(0.1))
    return raises("2 processes were launched", lambda: tfn.fit(alone(), state, [rows(4)]))


def alone():
    return tfn.train_step(squared, tfn.optim.sgd(0.1))


def sharded_twice(plan):
    state, _ = laid_out(plan)
    return raises("sharded already", lambda: tfn.shard(state, plan))


def by_another_plan(plan):
    _, step = laid_out(plan)
    other, _ = laid_out(tfn.Plan.fsdp() if plan.stage < 3 else tfn.Plan.zero(1))
    return raises("sharded by another plan", lambda: step(other, rows(4)))


def refused(plan, match):
    return raises(match, lambda: laid_out(plan))


def cases(plan):
    """What the driver does for ranks: each name, and its case."""
    yield "a loader is divided", lambda: loading(plan, padded())
    yield "a divided loader", partial(divided, plan)
    yield "a loader of uneven batches, drop", lambda: loading(plan, uneven("drop"))
    yield "a loader of uneven batches, short", lambda: loading(plan, uneven("short"))
    yield "the same rows", partial(the_same_rows, plan)
    yield "another's part", partial(divided_wrongly, plan)
    yield "unequal", partial(unequal, plan)
    yield "unequal, evaluated", partial(unequal, plan, evaluate=True)
    yield "empty", partial(empty, plan)
    yield "none on one rank", partial(none_on_one_rank, plan)
    yield "streams", partial(streams, plan)
    yield "kinds", partial(kinds, plan)
    yield "steps", partial(apart, plan, r"Their step:\n  rank 0: 0\n  rank 1: 7", step=torch.tensor(7))
    yield "keys", partial(apart, plan, r"Their key:\n  rank 0", key=tfn.random.key(5))
    yield "not sharded", partial(not_sharded, plan)
    yield "no plan, a step", partial(no_plan, plan, alone)
    yield "no plan, an evaluation", partial(no_plan, plan, lambda: tfn.eval_step(squared))
    yield "no plan, compiled", partial(no_plan, plan, lambda: tfn.jit(alone()))
    yield "fit without a plan", partial(fit_without_a_plan, plan)
    yield "sharded twice", partial(sharded_twice, plan)
    yield "by another plan", partial(by_another_plan, plan)
    yield "sizes", partial(refused, tfn.Plan(shard=3, stage=1), "is for 3 ranks")
    yield "rule", partial(refused, tfn.Plan.fsdp(rules=(("zz", "rows"),)), "matches none")
    split = tfn.Plan(tensor=2, rules=(("conv.weight", "columns"),))
    yield "columns", partial(refused, split, "can't be split into 2 equal columns")
    yield "no rule", partial(refused, tfn.Plan(tensor=2), "no rule names the layers")
    yield "batch statistics", partial(batch_statistics, plan)
    yield "values on rank 0 alone", partial(meta_case, plan)
    yield "NaN on one rank", partial(nan_case, plan)
    yield "NaN on one rank, skipped", partial(nan_case, plan, skip=True)
