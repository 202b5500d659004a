"""Cases of checkpoints of states on several ranks, run by `test_sharded.py`. Each case forks its ranks."""

import contextlib
import errno
import io
import os
import shutil
import signal
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import trainfn as tfn
from tests.ranks.forked import on
from trainfn._checkpoint import Checkpoints, _disk
from trainfn.errors import CheckpointError

LONG = os.environ.get("TRAINFN_LONG") == "1"
RULES = (("^a", "columns"), ("^b", "rows"))
PLANS = {
    1: {"alone": tfn.Plan()},
    2: {
        "replicated": tfn.Plan.replicated(),
        "zero 1": tfn.Plan.zero(1),
        "zero 2": tfn.Plan.zero(2),
        "fsdp": tfn.Plan.fsdp(),
        "tensor": tfn.Plan(tensor=2, rules=RULES),
    },
    4: {
        "fsdp 4": tfn.Plan.fsdp(),
        "hybrid": tfn.Plan.fsdp(replicate=2),
        "fsdp and tensor": tfn.Plan.fsdp(shard=2, tensor=2, rules=RULES),
    },
}
OPTIMIZER = tfn.optim.chain(tfn.optim.clip_by_global_norm(1.0), tfn.optim.adamw(1e-2))
AVERAGE = tfn.transforms.ema(0.9)


class Net(nn.Module):
    """Leaves that are split evenly, unevenly, and so that of 4 ranks the last has nothing of them; buffers."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 8)
        self.norm = nn.BatchNorm1d(5)
        self.b = nn.Linear(8, 3)
        self.uneven = nn.Parameter(torch.randn(5, 3).bfloat16())
        self.register_buffer("positions", torch.arange(4), persistent=False)

    def forward(self, x):
        return self.b(self.a(self.norm(nn.functional.dropout(x, 0.1))).relu()) + self.uneven.float().sum(0)


def fresh(plan):
    torch.manual_seed(0)
    return tfn.shard(AVERAGE.init(tfn.init(Net(), OPTIMIZER, seed=5)), plan)


def step_of(plan):
    return AVERAGE(tfn.train_step(lambda m, x: tfn.losses.mse(m(x), torch.zeros(len(x), 3)), OPTIMIZER, plan=plan))


def batch_of(plan):
    def batch(n):
        rows = torch.randn(8, 5, generator=torch.Generator().manual_seed(n))
        return rows.tensor_split(plan.data_size)[plan.data_rank]

    return batch


def trained(plan, steps=2):
    state, step, batch = fresh(plan), step_of(plan), batch_of(plan)
    for n in range(steps):
        state, _ = step(state, batch(n))
    return state


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def refused(error, call):
    """The message of the error that a call must raise."""
    try:
        call()
    except error as found:
        return str(found)
    raise AssertionError(f"no {error.__name__}")


def same(found):
    """What all ranks returned, which must be one."""
    assert all(one == found[0] for one in found), found
    return found[0]


# --- every layout to every other ----------------------------------------------------------------------------------


def write_all(folder, plans):
    found = {}
    for name, plan in plans.items():
        state = trained(plan)
        tfn.save(Path(folder) / name, state)
        tfn.save(Path(folder) / f"{name}, full", state, full=True)
        found[name] = tfn.digest(state).total
        whole = tfn.gather(state)
        assert tfn.digest(whole).total == found[name]
        if rank() == 0 and dist.is_initialized():
            tfn.save(Path(folder) / f"{name}, gathered", whole)
    return found


def read_all(folder, plans, digests):
    count, order = 0, [name for named in PLANS.values() for name in named]
    for reader, plan in plans.items():
        like = fresh(plan)
        for name, digest in digests.items():
            if not LONG and (order.index(reader) + order.index(name)) % 3:
                continue
            for kind in ("", ", full"):
                state = tfn.restore(Path(folder) / (name + kind), like=like)
                assert tfn.digest(state).total == digest, (name, kind, plan)
                layouts = zip(tfn.tree.leaves(state), tfn.tree.leaves(like), strict=True)
                assert all(getattr(x, "placements", None) == getattr(y, "placements", None) for x, y in layouts)
                count += 1
    return count


def numbers(folder):
    return sum(t.numel() for file in folder.glob("*.safetensors") for t in load_file(file).values())


def case_every_layout(folder):
    """Saved in each layout, restored in each: the same to the bit, in the layout asked for.

    Each is restored in three layouts, and each restores three, of one, two and four ranks; with the full product, nine.
    """
    digests = {}
    for world, plans in PLANS.items():
        digests |= same(on(world, write_all, folder, plans))
    counts = [same(on(world, read_all, folder, plans, digests)) for world, plans in PLANS.items()]
    assert sum(counts) == 9 * (9 if LONG else 3) * 2
    files = {path.name: sorted(p.name for p in path.iterdir()) for path in Path(folder).iterdir()}
    assert files["replicated"] == ["manifest.json", "model.safetensors", "state.safetensors"]
    parts = [f"rank-{r}-of-4.safetensors" for r in range(4)]
    assert files["fsdp 4"] == ["manifest.json", *parts, "state.safetensors"]
    assert files["hybrid"] == files["fsdp 4"]  # of two ranks with the same piece, each writes some
    assert "model.safetensors" in files["zero 1"] and "rank-1-of-2.safetensors" in files["zero 1"]
    for name in digests:  # what every rank holds is written once
        sizes = {kind: numbers(Path(folder) / (name + kind)) for kind in ("", ", full")}
        assert sizes[""] == sizes[", full"], (name, sizes)
    for path in Path(folder).glob("*, gathered"):
        full = path.with_name(path.name.replace("gathered", "full"))
        assert {p.name: p.read_bytes() for p in path.iterdir()} == {p.name: p.read_bytes() for p in full.iterdir()}
    held = load_file(Path(folder) / "fsdp 4" / "rank-3-of-4.safetensors")
    assert held["model/a.weight"].shape == (2, 5) and "model/uneven" not in held
    return sum(counts)


# --- runs ---------------------------------------------------------------------------------------------------------


def run(plan, folder, until, options, callbacks=()):
    checkpoints = Checkpoints(folder, **options)
    options = {"until": until, "checkpoints": checkpoints, "callbacks": callbacks}
    step = tfn.jit(step_of(plan), donate=True, compile=False)  # what is saved in the background is overwritten
    state = tfn.fit(step, fresh(plan), batch_of(plan), **options)
    return [tfn.digest(state).total, int(state.step), checkpoints.steps()]


def said(call, *args):
    """What is returned, and what is said on the way."""
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        return [*call(*args), text.getvalue()]


WAYS = [{"every": 1}, {"every": 2, "asynchronous": False, "full": True, "keep": 1}, {"full": True}]


def goes_on(plans, folder):
    for i, (name, plan) in enumerate(plans.items()):
        base, options = Path(folder) / name, WAYS[i % 3]
        one_go = run(plan, base / "a", 5, options)
        run(plan, base / "b", 3, options)
        *found, text = said(run, plan, base / "b", 5, options)
        assert found[:2] == one_go[:2], name
        assert ("resuming from" in text) if rank() == 0 else text == ""
    return True


def case_a_run_goes_on(folder):
    """Ended and begun again on ranks: the bits of a run in one go; and on another number of them it goes on too."""
    for world in (2, 4):
        assert same(on(world, goes_on, PLANS[world], folder))
    for world, plans in PLANS.items():
        copy = Path(folder) / f"copy {world}"
        shutil.copytree(Path(folder) / "fsdp 4" / "a", copy)
        _, step, steps, text = on(world, said, run, next(iter(plans.values())), copy, 7, {"every": 1, "keep": 2})[0]
        assert (step, steps) == (7, [6, 7]) and "until was 5, is 7" in text


def signalled(plan, folder):
    """SIGTERM, Ctrl-C and a callback's Stop, each on rank 1 only."""

    def send(info):
        if info.n == 3 and rank() == 1:
            if number is None:
                return tfn.Stop("enough")
            os.kill(os.getpid(), number)
        return None

    found = []
    for asynchronous in (False, True):
        for number in (signal.SIGTERM, signal.SIGINT, None):
            path, options = f"{folder}/{asynchronous}{number}", {"asynchronous": asynchronous}
            text = io.StringIO()
            with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(text):
                warnings.simplefilter("always")
                try:
                    end = run(plan, path, 9, options, [send])[1:]
                except SystemExit as stopped:
                    end = stopped.code
            found.append([end, Checkpoints(path).steps(), text.getvalue(), [str(w.message) for w in caught]])
    return found


def case_signals(folder):
    """What one rank is told ends the run on all of them after the same step, with that step saved."""
    first, second = on(2, signalled, PLANS[2]["fsdp"], folder)
    assert [f[:2] for f in first] == [f[:2] for f in second] == [[143, [3]], [[3, [3]], [3]], [[3, [3]], [3]]] * 2
    assert all(f[2:] == ["", []] for f in second)
    for terminated, interrupted, stopped in (first[:3], first[3:]):
        assert terminated[2].startswith("trainfn: SIGTERM: saved") and "checkpoint-3, and stopped" in terminated[2]
        assert "interrupted: the state after step 3 is returned" in interrupted[3][-1]  # after what BatchNorm is told
        assert stopped[2] == "trainfn: stopped after step 3: a callback of another rank\n"


def kept(plan, folder):
    state = fresh(plan)
    with Checkpoints(folder, keep=1, keep_every=4, best="loss", mode="min") as checkpoints:
        for n, loss in enumerate([5.0, 1.0, 3.0, 2.0, 7.0, 8.0]):
            checkpoints.save(state._replace(step=torch.tensor(n)), {"rank": rank()}, metrics={"loss": loss})
    _, extra = checkpoints.restore(like=state)
    return [checkpoints.steps(), checkpoints.newest().name, extra]


def case_rotation(folder):
    """Rank 0 counts and removes; all see the same."""
    assert same(on(2, kept, PLANS[2]["zero 1"], folder)) == [[0, 1, 4, 5], "checkpoint-5", {"rank": 0}]


# --- what goes wrong ----------------------------------------------------------------------------------------------


def full_disk(plan, folder, victim, asynchronous):
    state = trained(plan)
    with Checkpoints(folder, asynchronous=asynchronous) as checkpoints:
        checkpoints.save(state._replace(step=torch.tensor(1)), wait=True)

    def hook(call, path):
        if rank() == victim and call == "write" and path.name.startswith("rank-"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _disk.hook = hook
    with checkpoints:
        found = [refused(CheckpointError, lambda: checkpoints.save(state, wait=True))]
    found.append(refused(CheckpointError, lambda: tfn.save(f"{folder}/c", state)))
    found.append(refused(CheckpointError, lambda: run(plan, folder, 9, {"every": 2, "asynchronous": asynchronous})))
    _disk.hook = lambda call, path: None
    dist.barrier()  # rank 0 removes what there is of it while the others raise already
    visible = sorted(p.name for p in Path(folder).iterdir())
    back, _ = checkpoints.restore(like=state)
    assert not tfn.diff(back._replace(step=state.step), state)
    dist.barrier()
    with checkpoints:
        checkpoints.save(state, wait=True)
    return [found, visible, checkpoints.steps()]


def full_disks(plan, folder):
    ways = [(victim, asynchronous) for victim in (0, 1) for asynchronous in (False, True)]
    return [[victim, *full_disk(plan, f"{folder}/{victim}{way}", victim, way)] for victim, way in ways]


def case_a_full_disk(folder):
    """One rank's disk error is raised on all; nothing is published, nothing is left, and the next save works."""
    for victim, errors, visible, steps in same(on(2, full_disks, PLANS[2]["fsdp"], folder)):
        for text in errors:
            assert text.startswith(f"rank {victim}: the checkpoint") and "the disk is full" in text, text
        assert (visible, steps) == (["checkpoint-1"], [1, 2])


def mistakes(folder):
    plan = PLANS[2]["fsdp"]
    state = fresh(plan)
    found = {"folders": refused(ValueError, Checkpoints(f"{folder}/{rank()}").steps)}
    here = Path(folder) / str(rank())
    here.mkdir()
    os.chdir(here)
    found["not shared"] = refused(CheckpointError, lambda: tfn.save("c", state))
    extra = {"x": 1} if rank() == 0 else {"x": (1,)}
    found["extra"] = refused(TypeError, lambda: Checkpoints(f"{folder}/run").save(state, extra))
    tfn.save(f"{folder}/c", state)
    found["shape"] = refused(CheckpointError, lambda: tfn.restore(f"{folder}/c", like=tfn.shard(other(), plan)))
    weight = state.params["a.weight"]
    summed = torch.distributed.tensor.DTensor.from_local(
        torch.ones(8, 5), weight.device_mesh, [torch.distributed.tensor.Partial()]
    )
    odd = state._replace(params={**state.params, "a.weight": summed})
    found["partial"] = refused(TypeError, lambda: tfn.save(f"{folder}/d", odd))
    found["nowhere"] = refused(CheckpointError, lambda: tfn.restore(f"{folder}/nowhere", like=state))
    return [sorted(p.name for p in Path(folder).iterdir()), found]


def other():
    return AVERAGE.init(tfn.init(nn.Linear(4, 4), OPTIMIZER))


def case_mistakes(folder):
    """Each is told on all ranks, and nobody waits for anybody."""
    left, found = same(on(2, mistakes, folder))
    assert left == ["0", "1", "c", "run"], left
    return found


def damaged(plan, folder):
    state = trained(plan, 1)
    with Checkpoints(folder, asynchronous=False) as checkpoints:
        for n in (1, 2):
            checkpoints.save(state._replace(step=torch.tensor(n)))
    if rank() == 0:
        path = Path(folder) / "checkpoint-2" / "rank-1-of-2.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    dist.barrier()
    error = refused(CheckpointError, lambda: tfn.restore(f"{folder}/checkpoint-2", like=state))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        back, _ = checkpoints.restore(like=state)
        newest = Checkpoints(folder).newest().name
        went_on = run(plan, folder, 4, {"every": 1, "keep": 2})[1:]
    return [error, int(back.step), newest, went_on, [str(w.message) for w in caught]]


def case_damage(folder):
    """Damage of one rank's file is named, and no rank goes on from that checkpoint."""
    found = on(2, damaged, PLANS[2]["fsdp"], folder)
    error, step, newest, went_on, _ = same([[*f[:4], None] for f in found])
    assert "rank-1-of-2.safetensors: checksum mismatch" in error and error.startswith("rank 1")
    assert (step, newest, went_on) == (1, "checkpoint-1", [4, [3, 4]])
    told, silent = (f[4] for f in found)
    assert "checkpoint-1' is used instead" in told[0] and "rank-1-of-2" in told[0] and silent == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert on(1, whole_of, f"{folder}/checkpoint-4") == [4]


def whole_of(path):
    return int(tfn.restore(path, like=fresh(tfn.Plan())).step)


def locked(folder):
    return refused(CheckpointError, lambda: Checkpoints(folder).__enter__())


def case_another_run(folder):
    """Rank 0 can't lock the folder: all ranks say so."""
    with Checkpoints(folder):
        assert "another run saves its checkpoints here" in same(on(2, locked, folder))


# --- a state as a value -------------------------------------------------------------------------------------------


def values(plans):
    for plan in plans.values():
        state, later = trained(plan), trained(plan, 3)
        whole = tfn.gather(state)
        assert tfn.digest(state) == tfn.digest(whole) and not tfn.diff(state, whole)
        assert list(tfn.diff(state, tfn.fork(state, 1))) == ["key"]
        model = tfn.export(state)
        assert torch.equal(model.a.weight, whole.params["a.weight"])
        into = tfn.export(state, Net())
        assert torch.equal(into.uneven, whole.params["uneven"]) and type(into.uneven.data) is torch.Tensor
        assert repr(tfn.diff(state, later)) == repr(tfn.diff(whole, tfn.gather(later))) != ""
    return tfn.digest(state).total


def case_values(folder):
    """Fingerprints, differences, forks and exports of a state that is laid out are those of the whole one."""
    for world in (2, 4):
        same(on(world, values, PLANS[world]))


CASES = {name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")}


def call(case):
    """On one process, which forks the ranks, a case by its name in a folder."""
    name, folder = case
    return CASES[name](folder)
