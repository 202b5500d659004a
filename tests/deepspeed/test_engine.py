"""DeepSpeed's engine behind a step: the numbers of one process with the whole batch, whatever the stage and the ranks.

Most of it needs `pip install "trainfn[deepspeed]"`. All engines run in one job of two processes
(`worker.py`), for importing DeepSpeed takes longer than all of them.
"""

import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import trainfn as tfn
from tests.deepspeed.worker import AUTO, BF16, CLIP, OPTIMIZERS, STEPS, VALUES, batch, config, loss, net
from tests.processes import succeeded, torchrun
from trainfn.deepspeed import _engine

INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not INSTALLED, reason='needs DeepSpeed: pip install "trainfn[deepspeed]"')
HERE = Path(__file__).parent

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
EXACT = [  # in float32
    *({"name": f"adamw-{s}-{a}", "config": config(s, a)} for s in range(4) for a in (1, 3)),
    *({"name": f"sgd-{s}-{a}", "config": config(s, a), "optimizer": "sgd"} for s in range(4) for a in (1, 3)),
    *({"name": f"unclipped-{s}", "config": config(s, 3, clip=0.0), "optimizer": "sgd"} for s in range(4)),
    {"name": "offload-2", "config": config(2, 3, zero=OFFLOAD), "optimizer": "sgd"},
    {"name": "offload-3", "config": config(3, 3, zero=OFFLOAD | {"offload_param": {"device": "cpu"}})},
    {"name": "sum", "config": config(2, 3, gradient_allreduce_op="sum"), "optimizer": "sgd"},
    {"name": "predivide", "config": config(0, 3, prescale_gradients=True, gradient_predivide_factor=2.0)},
    {"name": "two-calls", "config": config(3, 3), "optimizer": "sgd", "twice": True},
    {"name": "auto", "config": AUTO, "values": {**VALUES, "bf16.enabled": False}, "optimizer": None},
]
HALF = [
    *({"name": f"bf16-{s}-{a}", "config": config(s, a, **BF16), "optimizer": "sgd"} for s in range(4) for a in (1, 3)),
    {
        "name": "bf16-1-sums",
        "config": config(1, 3, data_types={"grad_accum_dtype": "fp32"}, **BF16),
        "optimizer": "sgd",
    },
]
KEYED = [
    {"name": f"dropout-{s}-{a}", "config": config(s, a), "dropout": 0.3} for s, a in ((0, 1), (2, 1), (2, 3), (3, 3))
] + [
    {"name": "recomputed", "config": config(3, 3), "dropout": 0.3, "recompute": True},
    {"name": "schedule", "config": config(2), "schedule": True},
]
RESUMED = [{"name": f"resumed-{s}", "kind": "resumed", "config": config(s, 2)} for s in range(4)] + [
    {"name": "resumed-bf16", "kind": "resumed", "config": config(2, 2, **BF16)}
]
OTHERS = [
    {"name": "loop", "kind": "loop", "config": config(2)},
    {"name": "errors", "kind": "errors", "config": config(2, 2)},
]


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=[case["name"] for case in cases])


def ran(launcher, job, folder):
    """Run a job under a launcher to its clean end; the folder has what came out."""
    folder.mkdir()
    torch.save(job, folder / "job")
    succeeded(*launcher, HERE / "worker.py", folder / "job", folder, timeout=400)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    job = [*EXACT, *HALF, *KEYED, *RESUMED, *OTHERS]
    folder = ran(torchrun(2), job, tmp_path_factory.mktemp("deepspeed") / "job")
    return lambda case: torch.load(folder / f"{case['name']}.pt")


def by_hand(optimizer="adamw", *, clip=CLIP, half=False):
    """One process, the whole batch, torch's optimizer: the module and what each step saw."""
    model = net()
    computing = net().bfloat16() if half else model
    rule = OPTIMIZERS[optimizer or "adamw"](model.parameters())
    seen = []
    for n in range(STEPS):
        with torch.no_grad():
            for low, master in zip(computing.parameters(), model.parameters(), strict=True):
                low.copy_(master)
                low.grad = None
        whole = batch(n)
        mean, metrics = loss(computing, {**whole, "x": whole["x"].to(computing.first.weight.dtype)})
        mean.value.backward()
        for low, master in zip(computing.parameters(), model.parameters(), strict=True):
            master.grad = None if low.grad is None else low.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
        rule.step()
        seen.append({"loss": mean.value.item(), "grad_norm": norm.item(), "accuracy": metrics["accuracy"].value.item()})
    return model, seen


def gap(weights, model):
    want = model.state_dict()
    assert weights.keys() == want.keys()
    return max((weights[name].float() - value).abs().max().item() for name, value in want.items())


# --- the numbers ---------------------------------------------------------------------------------------------------


@needs_deepspeed
@each(EXACT)
def test_two_ranks_follow_the_whole_batch(results, case):
    out = results(case)
    clip = case["config"]["gradient_clipping"]
    model, seen = by_hand(case.get("optimizer", "adamw"), clip=CLIP if clip == "auto" else clip)
    assert out["world"] == 2
    assert gap(out["weights"], model) < 5e-7
    for got, want in zip(out["seen"], seen, strict=True):
        assert got == pytest.approx(want, rel=1e-6)


@needs_deepspeed
@each(HALF)
def test_bfloat16_follows_the_whole_batch(results, case):
    """To bfloat16's 8 bits. A mean of means would be off by a quarter, one division too many by a factor of 2 or 3."""
    out = results(case)
    model, seen = by_hand(case["optimizer"], half=True)
    assert gap(out["weights"], model) < 2e-3 < 0.05 * gap(net().state_dict(), model)
    for got, want in zip(out["seen"], seen, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=2e-3)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=5e-3)


@needs_deepspeed
@each(KEYED)
def test_dropout_and_schedules_are_those_of_one_process(results, case):
    out = results(case)
    rate = tfn.schedules.linear(2e-2, total_steps=8) if case.get("schedule") else 2e-2
    optimizer = tfn.optim.chain(tfn.optim.clip_by_global_norm(CLIP), tfn.optim.adamw(rate, weight_decay=0.1))
    state = tfn.init(net(case.get("dropout", 0.0)), optimizer, seed=5)
    step = tfn.train_step(loss, optimizer)
    for n in range(STEPS):
        state, metrics = step(state, batch(n))
        assert out["seen"][n] == pytest.approx({name: mean.value.item() for name, mean in metrics.items()}, rel=1e-6)
    assert gap(out["weights"], tfn.export(state)) < 5e-7
    held_out = tfn.evaluate(tfn.eval_step(loss), state, [batch(9), batch(10)])
    assert out["eval"] == pytest.approx({name: mean.value.item() for name, mean in held_out.items()}, rel=1e-6)


@needs_deepspeed
@each(RESUMED)
def test_a_restored_run_resumes_bit_for_bit(results, case):
    out = results(case)
    assert out["restored"] == 2
    for name, value in out["want"].items():
        assert torch.equal(out["got"][name], value), name
        assert torch.equal(out["again"][name], value), name  # on the same engine


@needs_deepspeed
@each(RESUMED[1:])
def test_weights_are_those_of_zero_to_fp32(results, case):
    out = results(case)
    learned = {name for name, value in net().named_parameters() if value.requires_grad}
    assert learned <= out["converted"].keys() <= out["kept"].keys()  # stage 1 leaves the frozen ones out, and the tied
    for name, value in out["converted"].items():
        assert torch.equal(out["kept"][name], value), name


@needs_deepspeed
def test_fit_runs_it_and_a_callback_saves(results):
    out = results({"name": "loop"})
    model, _ = by_hand()
    assert (out["step"], out["saved"]) == (STEPS, ["global_step2", "global_step4"])
    assert gap(out["weights"], model) < 5e-7


# --- launchers -----------------------------------------------------------------------------------------------------

YAML = """
compute_environment: LOCAL_MACHINE
deepspeed_config:
{plan}
distributed_type: DEEPSPEED
downcast_bf16: 'no'
machine_rank: 0
main_process_port: {port}
main_training_function: main
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
use_cpu: false
"""
PLUGIN = f"""\
  gradient_accumulation_steps: 1
  gradient_clipping: {CLIP}
  offload_optimizer_device: cpu
  offload_param_device: cpu
  zero3_init_flag: true
  zero_stage: 2
"""


def launched(folder, plan, port, case):
    folder.joinpath("launch.yaml").write_text(YAML.format(plan=plan.rstrip(), port=port))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", folder / "launch.yaml"]
    return torch.load(ran(launcher, [{"name": "launched", "config": None, **case}], folder / "out") / "launched.pt")


@needs_deepspeed
def test_accelerate_launch_with_a_plugin_in_its_yaml(tmp_path):
    case = {"values": {"train_micro_batch_size_per_gpu": 4}, "optimizer": "sgd"}
    out = launched(tmp_path, PLUGIN + "mixed_precision: bf16\n", 29618, case)
    model, _ = by_hand("sgd", half=True)
    assert (out["world"], out["kind"]) == (2, "DeepSpeedZeroOptimizer")
    assert gap(out["weights"], model) < 2e-3


@needs_deepspeed
def test_accelerate_launch_with_the_json_its_yaml_names(tmp_path):
    tmp_path.joinpath("ds.json").write_text(json.dumps(AUTO))
    plan = f"  deepspeed_config_file: {tmp_path}/ds.json\n  zero3_init_flag: true\n"
    out = launched(tmp_path, plan, 29619, {"values": VALUES, "optimizer": None})
    model, _ = by_hand()
    assert (out["world"], out["kind"]) == (2, "DeepSpeedZeroOptimizer_Stage3")
    assert gap(out["weights"], model) < 5e-7


@needs_deepspeed
def test_plain_python_is_a_world_of_one(tmp_path):
    case = {"name": "alone", "config": config(3, 3)}
    out = torch.load(ran([], [case], tmp_path / "out") / "alone.pt")
    model, _ = by_hand()
    assert out["world"] == 1
    assert gap(out["weights"], model) < 5e-7


# --- errors --------------------------------------------------------------------------------------------------------

SAID = {
    "stale": r"DonatedStateError: step\(state, batch\): this state, of step 0, has been used.*newest one",
    "stale eval": r"DonatedStateError: eval_step\(state, batch\): this state",
    "stale engine": r"DonatedStateError: state\.engine: this state",
    "copy": r"TypeError: a state of tfn\.deepspeed is a handle.*tfn\.deepspeed\.save\(path, state\)",
    "tfn.save": r"TypeError: a state of tfn\.deepspeed is a handle",
    "store": r"TypeError: fit\(\.\.\., checkpoints=\.\.\.\).*tfn\.deepspeed\.saving\(folder, every=100\)",
    "kind": r"TypeError: step\(state, batch\) got a value of type object.*tfn\.deepspeed\.init\(model",
    "no checkpoint": r"CheckpointError: restore\('/nonexistent', state\): there is no checkpoint.*`latest`",
    "no tag": r"CheckpointError: .*tag='global_step7'.*has \['global_step",
    "few rows": r"ValueError: .*a rank has 1 rows, and gradient_accumulation_steps=2.*values=",
    "frozen": r"ValueError: step\(state, batch\): the loss does not depend on any parameter",
    "part": r"ValueError: step\(state, batch\): the loss did not call the model.*Call `model\(\.\.\.\)`",
    "halfway": r"ArithmeticError: on purpose",
    "after halfway": r"DonatedStateError: step\(state, batch\): a step failed halfway.*tfn\.deepspeed\.restore",
    "restore after halfway": r"DonatedStateError: restore\(path, state\): a step failed halfway",
}


@needs_deepspeed
@pytest.mark.parametrize("name", SAID)
def test_errors_with_an_engine(results, name):
    said = results({"name": "errors"})["said"]
    assert re.match(SAID[name], said[name], re.DOTALL), said[name]


@needs_deepspeed
def test_a_state_shows_its_step_and_whether_it_was_used(results):
    assert results({"name": "errors"})["said"]["repr"] == "EngineState(Net, step=0, used) EngineState(Net, step=1)"


@pytest.fixture
def stub(monkeypatch):
    """A DeepSpeed of which only the names are asked for."""
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    package = types.SimpleNamespace(PipelineModule=torch.nn.Sequential)
    monkeypatch.setattr(_engine, "package", lambda: package)


INIT = [
    (net(), tfn.optim.adamw(1e-3), {}, TypeError, r"can't run a trainfn transform.*lambda params: torch\.optim\.AdamW"),
    (object(), None, {}, TypeError, r"init\(model, \.\.\.\) takes an nn\.Module, not object"),
    (torch.nn.Sequential(), None, {}, TypeError, r"got a PipelineModule.*train_batch\(\)"),
    (net(), 3, {}, TypeError, r"int is not a torch optimizer"),
    (net(), None, {"config": config(1)}, ValueError, r"the optimizer is missing.*optimizer"),
    (net(), "adamw", {"config": {**config(1), "optimizer": {"type": "Adam"}}}, ValueError, "and among the arguments"),
    (
        net(),
        "adamw",
        {"schedule": abs, "config": {**config(1), "scheduler": {"type": "WarmupLR"}}},
        ValueError,
        "WarmupLR",
    ),
    (net(), "adamw", {}, ValueError, r"without `config`, it takes the one that `accelerate launch` exports"),
]


@pytest.mark.parametrize(("model", "optimizer", "more", "kind", "match"), INIT)
def test_what_init_refuses(stub, model, optimizer, more, kind, match):
    with pytest.raises(kind, match=match):
        tfn.deepspeed.init(model, OPTIMIZERS.get(optimizer, optimizer), **more)


def test_processes_that_do_not_know_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    with pytest.raises(ValueError, match=r"2 processes were launched, and this one's process group has 1"):
        _engine._joined(types.SimpleNamespace())


def test_a_second_engine_after_the_group_has_ended(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    ended = types.SimpleNamespace(comm=types.SimpleNamespace(comm=types.SimpleNamespace(cdb=object())))
    with pytest.raises(ValueError, match=r"make the group yourself, before the first `init`"):
        _engine._joined(ended)


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ImportError, match=r"pip install 'trainfn\[deepspeed\]'"):
        tfn.deepspeed.init(net(), config=config(1))


def test_rows_of_earlier_batches_come_first():
    from types import SimpleNamespace

    from trainfn.deepspeed import _step

    run = SimpleNamespace(group=None, engine=SimpleNamespace(device="cpu"))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert (_step._rows(run, 3), _step._rows(run, 3, 5)) == ((0, 3), (5, 3))
    finally:
        torch.distributed.destroy_process_group()
