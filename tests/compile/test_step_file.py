"""A compiled step as a file: the same numbers in a new process, without a compiler; and what does not fit."""

import json
import re
import shutil
import sys
import tempfile
import textwrap
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import trainfn as tfn
from tests.compile.step_file_things import BUCKETS, batch_of, things
from tests.helpers import assert_close, assert_identical, quick
from tests.processes import succeeded
from trainfn._compile import _file_describe as describe
from trainfn._compile import _file_format
from trainfn._compile._file_save import check_loads
from trainfn._compile._structure import Other, flatten
from trainfn.errors import CheckpointError, DonatedStateError

pytestmark = pytest.mark.usefixtures("untouched_rng")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("step")


@pytest.fixture(scope="module")
def saved(folder):
    """The file of a donating step, made for two sizes."""
    step, state = things()
    before = tfn.digest(state)
    tfn.jit(step, donate=True, buckets=BUCKETS).save(folder / "one.step", state, batch_of(0), batch_of(0, rows=3))
    assert tfn.digest(state) == before  # nothing was run
    return folder / "one.step"


@pytest.fixture(scope="module")
def saved_accumulating(folder):
    """The file of an accumulating step."""
    step, state = things(accumulate=2)
    tfn.jit(step).save(folder / "two.step", state, batch_of(0))
    return folder / "two.step"


# --- the same numbers -------------------------------------------------------------------------------------------------


def test_a_loaded_step_computes_what_the_eager_step_does(saved):
    step, (eager, state) = tfn.load_step(saved), things()
    twin = state = tfn.copy(state)
    twin = tfn.copy(twin)
    for n, rows in enumerate((8, 3, 8, 4)):  # padded to two sizes
        state, metrics = step(state, batch_of(n, rows))
        twin, expected = eager(twin, BUCKETS.apply(batch_of(n, rows)))
        assert list(metrics) == ["loss", "grad_norm", "twice"]
        assert_close(metrics, expected)
    assert_close(state, twin)
    assert type(state) is type(twin)
    assert step.explain().graphs == 2
    assert "step: 2 graphs" in repr(step)
    assert step.signature[0]["batch/x"] == "float32[8, 4] on cpu, stride [4, 1]"


def test_the_old_state_is_consumed_and_its_memory_taken_over(saved):
    step, (_, state) = tfn.load_step(saved), things()
    state = tfn.copy(state)
    weight = state.params["0.weight"]
    new, _ = step(state, batch_of(0))
    assert new.params["0.weight"] is weight
    with pytest.raises(DonatedStateError, match=re.escape("step(state, batch): this state was given")):
        step(state, batch_of(0))


def test_accumulation_has_two_programs_and_the_numbers_of_the_eager_step(saved_accumulating):
    step, (eager, state) = tfn.load_step(saved_accumulating), things(accumulate=2)
    first, twin = state, state
    for n in range(3):
        state, metrics = step(state, batch_of(n))
        twin, expected = eager(twin, batch_of(n))
        assert_close(metrics, expected)
    assert_close(state, twin)
    assert int(first.step) == 0  # not donated
    assert step.accumulate == 2
    assert "gradients: 1 graphs, update: 1 graphs" in repr(step)


def test_a_batch_with_other_strides_is_copied(saved_accumulating):
    step, (_, state) = tfn.load_step(saved_accumulating), things()
    batch = batch_of(0)
    other = {**batch, "x": batch["x"].t().contiguous().t()}
    assert other["x"].stride() != batch["x"].stride()
    assert_identical(step(state, other), step(state, batch))


def test_the_order_of_names_does_not_matter(saved, saved_accumulating):
    state, batch = things()[1], batch_of(0)
    turned = {name: batch[name] for name in reversed(batch)}
    other = state._replace(params={name: state.params[name] for name in reversed(state.params)})
    for path in (saved, saved_accumulating):
        expected = tfn.load_step(path)(tfn.copy(state), batch)
        assert_identical(expected, tfn.load_step(path)(tfn.copy(state), turned))
        new, metrics = tfn.load_step(path)(tfn.copy(other), turned)
        assert_identical(expected[1], metrics)
        assert tfn.digest(new) == tfn.digest(expected[0])


@pytest.mark.slow
def test_any_function_of_a_state_and_a_batch_can_be_saved(folder):
    def evaluate(model, batch):
        mean = tfn.losses.cross_entropy(model(batch["x"]), batch["y"])
        return mean, {"number": tfn.Mean.of(batch["x"] * batch["scale"])}

    (_, state), batch = things(), {**batch_of(0), "scale": 2.5}
    step = tfn.eval_step(evaluate)
    tfn.jit(step).save(folder / "eval.step", state, batch)
    loaded = tfn.load_step(folder / "eval.step")
    assert_close(loaded(state, batch), step(state, batch))
    with pytest.raises(ValueError, match=r"batch/scale is 3.5, and was 2.5 when the step was saved"):
        loaded(state, {**batch, "scale": 3.5})


def test_fit_runs_a_loaded_step_with_checkpoints(saved, tmp_path):
    store = tfn.Checkpoints(tmp_path, every=2)
    run = lambda until: tfn.fit(  # noqa: E731
        tfn.load_step(saved), tfn.copy(things()[1]), batch_of, until=until, checkpoints=store
    )
    run(2)
    state, twin = run(4), tfn.copy(things()[1])
    step = tfn.load_step(saved)
    for n in range(4):
        twin, _ = step(twin, batch_of(n))
    assert_identical(state, twin)


# --- a new process ----------------------------------------------------------------------------------------------------

NEW_PROCESS = """
import os, sys
os.environ["PATH"] = ""  # no compiler
import torch
torch.set_num_threads(1)
import trainfn as tfn
from tests.compile.step_file_things import things, batch_of
step = tfn.load_step({path!r})
_, state = things()
state, metrics = step(tfn.copy(state), batch_of(0))
heavy = [n for n in sys.modules if n.startswith(("torch._dynamo", "torch._inductor", "sympy"))]
print(tfn.digest((state, metrics)).total, *heavy)
"""


def in_a_new_process(code):
    return succeeded("-c", textwrap.dedent(code)).out.split()


def test_a_new_process_needs_no_tracer_and_no_compiler(saved):
    (here,) = [tfn.digest(tfn.load_step(saved)(tfn.copy(things()[1]), batch_of(0))).total]
    assert in_a_new_process(NEW_PROCESS.format(path=str(saved))) == [here]


def test_loading_takes_milliseconds(saved):
    """Of the processor, so that a busy machine changes nothing."""

    def seconds():
        before = time.process_time()
        assert tfn.load_step(saved).seconds > 0
        return time.process_time() - before

    assert min(seconds() for _ in range(3)) < 0.05


def test_the_hash_of_the_graph_is_the_same_in_every_process(saved):
    code = """
    from tests.compile.step_file_things import batch_of, graph_hash_of, things
    print(graph_hash_of(batch_of(0)), graph_hash_of(batch_of(0, rows=4)))
    """
    assert in_a_new_process(code) == list(tfn.load_step(saved).graphs)


# --- calls that a file is not for -------------------------------------------------------------------------------------


def called(path, state=None, batch=None):
    tfn.load_step(path)(tfn.copy(things()[1]) if state is None else state, batch_of(0) if batch is None else batch)


def test_another_shape_or_dtype_names_the_leaf(saved):
    wide = {**batch_of(0), "x": torch.ones(8, 5)}
    with pytest.raises(
        ValueError, match=re.escape("batch/x is float32[8, 5] on cpu, stride [5, 1], and was float32[8, 4]")
    ):
        called(saved, batch=wide)
    with pytest.raises(ValueError, match=r"batch/x is float64\[8, 4\].*save it for these, too, `tfn.jit\(step\).save"):
        called(saved, batch={**batch_of(0), "x": torch.ones(8, 4, dtype=torch.float64)})


def test_another_structure_names_the_leaf(saved):
    with pytest.raises(ValueError, match=r"batch/z is float32\[1\] on cpu, stride \[1\], and was absent"):
        called(saved, batch={**batch_of(0), "z": torch.ones(1)})
    state = tfn.copy(things()[1])
    with pytest.raises(ValueError, match=r"state/extra/ema is int64\[2\].*, and was absent when the step was saved"):
        called(saved, state=state._replace(extra={"ema": state.key}))
    with pytest.raises(ValueError, match=r"its containers are list, and were tuple when the step was saved"):
        called(saved, state=state._replace(opt_state=list(state.opt_state)))


def test_a_state_with_other_strides_can_not_be_overwritten(saved):
    state = tfn.copy(things()[1])
    params = {**state.params, "0.weight": state.params["0.weight"].t().contiguous().t()}
    with pytest.raises(ValueError, match=r"state/params/0.weight is .* stride \[1, 6\], and was .* stride \[4, 1\]"):
        called(saved, state=state._replace(params=params))


def test_other_settings_of_torch_are_named(saved):
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(
            ValueError,
            match=re.escape('torch.is_autocast_enabled("cpu") was False when the step was saved, and is True'),
        ),
    ):
        called(saved)


# --- files that are not for this machine, or damaged ------------------------------------------------------------------


def rewritten(path, new, **changes):
    """A copy of a file whose description says something else."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = json.loads(members.pop(_file_format.HEADER))
    for place, value in changes.items():
        part, _, field = place.partition("__")
        if field:
            header[part][field.replace("_", " ")] = value
        else:
            header[part] = value
    _file_format.write_file(new, header, members)
    return new


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"versions__torch": "2.0.0"}, r"torch: the file was made with '2.0.0', and here it is '2.*Save it again here"),
        ({"versions__trainfn": "0.0.1"}, r"trainfn: the file was made with '0.0.1', and here it is"),
        ({"versions__format": 99}, r"format: the file was made with 99, and here it is 1"),
        ({"machine__machine": "vax"}, r"machine: the file was made with 'vax'"),
        ({"machine__CPU_capability": "AVX9"}, r"CPU capability: the file was made with 'AVX9'"),
        ({"machine__threads": 77}, r"threads: the file was made with 77, .* Write `torch.set_num_threads\(77\)`"),
        ({"features": ["avx9000"]}, r"CPU features: the file may use \['avx9000'\], which this machine lacks"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_file_of_another_version_or_machine_names_the_field(saved, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        tfn.load_step(rewritten(saved, tmp_path / "other.step", **change))


def test_a_file_for_a_gpu_is_refused_where_there_is_none(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    new = rewritten(saved, tmp_path / "other.step", devices=["cpu", "cuda"], machine={"CUDA": "13.0"})
    with pytest.raises(ValueError, match=r"CUDA: the file was made with '13.0', and here it is None"):
        tfn.load_step(new)


def test_a_damaged_file_is_named(saved, tmp_path):
    data, new = saved.read_bytes(), tmp_path / "damaged.step"
    for size in (0, 10, len(data) // 2, len(data) - 1):
        new.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"damaged.step'\): the file is damaged, or not one of a step"):
            tfn.load_step(new)
    for place in (len(data) // 2, len(data) // 3, 200, 60):
        new.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises((CheckpointError, ValueError), match="damaged"):
            tfn.load_step(new)


def test_a_library_that_is_not_the_one_that_was_written_is_named(saved, tmp_path):
    with zipfile.ZipFile(saved) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "swapped.step", "w") as archive:
        for name, data in {**members, "0.wrapper.so": b"another"}.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match=r"0.wrapper.so: its bytes are not those that were written \(SHA-256\)"):
        tfn.load_step(tmp_path / "swapped.step")


def test_a_library_that_the_system_can_not_load_is_reported(saved, tmp_path):
    with zipfile.ZipFile(saved) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = json.loads(members.pop(_file_format.HEADER))
    _file_format.write_file(tmp_path / "odd.step", header, {**members, "0.wrapper.so": b"no library"})
    with pytest.raises(CheckpointError, match="this system can't load its machine code"):
        tfn.load_step(tmp_path / "odd.step")


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.step'\): there is no such file"):
        tfn.load_step(tmp_path / "absent.step")


def test_nothing_is_pickled_and_nothing_is_left_behind(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    called(saved)
    assert list(tmp_path.iterdir()) == []
    with zipfile.ZipFile(saved) as archive:
        names = archive.namelist()
    assert {Path(name).suffix for name in names} == {".json", ".so", ".safetensors"}
    assert [f.name for f in saved.parent.iterdir() if f.name.startswith(".")] == []


def test_a_save_that_fails_leaves_the_old_file(saved, tmp_path, monkeypatch):
    path = tmp_path / "kept.step"
    path.write_text("old")

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(_file_format.os, "replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        _file_format.write_file(path, {}, {"a": b"b"})
    assert [f.name for f in tmp_path.iterdir()] == ["kept.step"]
    assert path.read_text() == "old"


# --- steps that can't be saved ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"compile": False},
            r"step.save\('x.step', state, batch\): .* this step has compile=False. Write `tfn.jit\(step\)`",
        ),
        ({"backend": "eager"}, r"this step has backend='eager'. Leave that out: `tfn.jit\(step\)`"),
        ({"dynamic": True}, r"this step has dynamic=True. Save `tfn.jit\(step\)` with a batch of each size"),
    ],
)
def test_settings_that_no_file_has_are_refused(settings, message):
    step, state = things()
    with pytest.raises(ValueError, match=message):
        tfn.jit(step, **settings).save("x.step", state, batch_of(0))


def test_a_plan_of_several_ranks_is_refused(monkeypatch):
    _, state = things()
    step = tfn.jit(tfn.train_step(lambda m, b: tfn.Mean.of(m(b["x"])), tfn.optim.sgd(0.1), plan=tfn.Plan()))
    monkeypatch.setattr(tfn.Plan, "world", 2)
    with pytest.raises(ValueError, match=r"this step's plan has 2 ranks.* Call `tfn.jit\(step\)` on each rank"):
        step.save("x.step", state, batch_of(0))


def test_a_consumed_state_is_refused():
    step, state = things()
    consumed = tfn.copy(state)
    quick(step, donate=True)(consumed, batch_of(0))
    with pytest.raises(DonatedStateError):
        tfn.jit(step).save("x.step", consumed, batch_of(0))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (OrderedDict(a=torch.ones(1)), "a file can't name the container PyTreeSpec"),
        ({(1, 2): torch.ones(1)}, r"a file can't name the key \(1, 2\) of a dict. Use strings"),
        (torch.float32, r"a file can't hold a dtype, torch.float32. Give and return tensors, numbers and strings"),
    ],
    ids=["container", "key", "value"],
)
def test_what_json_can_not_say_is_refused(extra, message):
    step, state = things()
    with pytest.raises(ValueError, match=message):
        tfn.jit(step).save("x.step", state, {**batch_of(0), "extra": extra})


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor | None


def test_structures_come_back_from_their_description():
    tree = (things()[1], {"a": [1, (2, None)], 3: Pair(torch.ones(1), None), "m": tfn.Mean(1, 2)})
    _, form = flatten(tree)
    told = json.loads(json.dumps(describe.containers(form, "")))
    assert describe.structure_of(told, type(tree[0])) == form
    assert isinstance(form.children[1].children[1].children[1], Other)  # None


def test_a_name_in_a_file_imports_nothing():
    told = {"kind": "antigravity:Nothing", "items": []}
    with pytest.raises(ValueError, match=r"returns a antigravity:Nothing.*Import the module 'antigravity'"):
        describe.structure_of(told, tfn.TrainState)
    with pytest.raises(ValueError, match="there is no such NamedTuple"):
        describe.structure_of({"kind": "os:system", "items": []}, tfn.TrainState)
    assert "antigravity" not in sys.modules


def test_a_file_that_cannot_be_loaded_is_removed(tmp_path, saved):
    """A library for a GPU is loaded once, in a process of its own, before it is said to be saved."""
    good, bad = tmp_path / "good.step", tmp_path / "bad.step"
    shutil.copy(saved, good)
    check_loads(good, "step.save(path, state, batch)")
    assert good.exists()
    bad.write_bytes(b"not a file of a step")
    with pytest.raises(
        tfn.errors.CaptureError, match=r"step.save\(path, state, batch\): the library .* can't be loaded"
    ):
        check_loads(bad, "step.save(path, state, batch)")
    assert not bad.exists()
