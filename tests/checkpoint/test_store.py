"""`Checkpoints`: saving behind the training, what is kept, which is gone on from, and one run in a folder."""

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import trainfn as tfn
from tests.checkpoint.states import assert_same, small
from tests.processes import succeeded
from trainfn._checkpoint import Checkpoints, _disk
from trainfn.errors import CheckpointError

MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def flip(file, at=-1):
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


@pytest.fixture
def slow_disk(monkeypatch):
    """Writes stop until the event is set."""
    event = threading.Event()
    monkeypatch.setattr(_disk, "hook", lambda call, path: call == "write" and event.wait(20))
    yield event
    event.set()


@MODES
def test_what_is_saved_is_restored(asynchronous, tmp_path):
    extra = {"sampler": {"seed": 3, "epochs": [1, 2.5, None, True, float("inf")]}, "é": "ü"}
    with Checkpoints(tmp_path / "a" / "b", asynchronous=asynchronous) as checkpoints:
        assert checkpoints.restore(small()) is None and checkpoints.newest() is None and checkpoints.steps() == []
        checkpoints.save(small(7), extra)
        state, found = checkpoints.restore(small())
    assert_same(state, small(7))
    assert found == extra
    assert checkpoints.newest() == tmp_path / "a" / "b" / "checkpoint-7"
    assert_same(tfn.restore(checkpoints.newest(), like=small()), small(7))


def test_when_one_is_due(tmp_path):
    assert [n for n in range(1, 10) if Checkpoints(tmp_path, every=3).due(n)] == [3, 6, 9]
    assert not any(Checkpoints(tmp_path).due(n) for n in range(10))


# --- in the background --------------------------------------------------------------------------------------------


def test_the_write_runs_in_the_background_and_keeps_what_was_given(tmp_path, slow_disk):
    state = small(1)
    extra = {"list": [1]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, extra)
        assert not (tmp_path / "checkpoint-1").exists()  # `save` has returned, and nothing is there yet
        for leaf in tfn.tree.leaves(state):
            leaf.fill_(9)
        extra["list"].append(2)
        slow_disk.set()
    got, found = checkpoints.restore(small())
    assert_same(got, small(1))
    assert found == {"list": [1]}


def test_a_donating_step_does_not_reach_what_is_being_written(tmp_path, slow_disk):
    optimizer = tfn.optim.sgd(0.1)
    state = tfn.init({"w": torch.ones(100)}, optimizer)
    step = tfn.jit(tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), optimizer), donate=True, compile=False)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        for _ in range(3):
            state, _ = step(state, torch.ones(100))
        slow_disk.set()
        checkpoints.wait()
        checkpoints.save(state)  # in the same host memory
    like = tfn.init({"w": torch.zeros(100)}, optimizer)
    assert torch.equal(checkpoints.restore(like, step=0)[0].params["w"], torch.ones(100))
    assert torch.equal(checkpoints.restore(like)[0].params["w"], state.params["w"])


def test_one_write_at_a_time(tmp_path, slow_disk):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(small(1))
        timer = threading.Timer(0.2, slow_disk.set)
        timer.start()
        checkpoints.save(small(2))  # waits for the first
        assert (tmp_path / "checkpoint-1").exists()
        assert sum(thread.name == "checkpoint" for thread in threading.enumerate()) <= 1
    assert checkpoints.steps() == [1, 2]
    timer.join()


def test_the_host_memory_is_used_again(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        places = []
        for n in range(3):
            checkpoints.save(small(n), wait=True)
            places.append({name: t.data_ptr() for name, t in checkpoints._snapshot._held.items()})
        assert places[0] == places[1] == places[2]
        checkpoints.save(small(3, w=torch.ones(8)), wait=True)  # and may be of another size
    assert checkpoints._snapshot._held == {}


def test_no_generator_is_touched(tmp_path, untouched_rng):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(small(1))


def fail(call, path):
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("then", ["check", "wait", "save", "exit"])
def test_an_error_in_the_background_is_raised_at_the_next_occasion(then, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"checkpoint-1' could not be written: Input/output"):
        with Checkpoints(tmp_path) as checkpoints:
            monkeypatch.setattr(_disk, "hook", fail)
            checkpoints.save(small(1))
            if then == "check":
                for _ in range(1000):
                    checkpoints.check()
                    time.sleep(0.01)
            elif then == "save":
                checkpoints.save(small(2))
            elif then == "wait":
                checkpoints.wait()
    monkeypatch.undo()
    checkpoints.check()  # once
    checkpoints.save(small(3), wait=True)
    assert checkpoints.steps() == [3]


def test_it_does_not_mask_another_error(tmp_path, monkeypatch):
    with pytest.raises(ZeroDivisionError) as caught, Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(_disk, "hook", fail)
        checkpoints.save(small(1))
        raise ZeroDivisionError
    assert "A checkpoint was not written" in caught.value.__notes__[0]


def test_the_end_of_the_program_waits(tmp_path):
    program = f"""
import sys, time
from tests.checkpoint.states import small
from trainfn._checkpoint import Checkpoints, _disk
_disk.hook = lambda call, path: time.sleep(0.02)
Checkpoints({str(tmp_path)!r}).save(small(1))
"""
    succeeded("-c", program)
    assert Checkpoints(tmp_path).steps() == [1]


# --- what is kept -------------------------------------------------------------------------------------------------


@MODES
def test_the_newest_and_the_best_are_kept(asynchronous, tmp_path):
    losses = [5, 3, 1, 4, float("nan"), 2, 6]
    with Checkpoints(tmp_path, keep=2, best="loss", asynchronous=asynchronous) as checkpoints:
        for n, loss in enumerate(losses):
            checkpoints.save(small(n), metrics={"loss": tfn.Mean.of(torch.tensor([float(loss)]))})
    assert checkpoints.steps() == [2, 5, 6]
    with Checkpoints(tmp_path, keep=1, best="loss", mode="max") as checkpoints:
        checkpoints.save(small(7))
    assert checkpoints.steps() == [6, 7]


def test_every_so_many_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=1, keep_every=4) as checkpoints:
        for n in range(1, 11):
            checkpoints.save(small(n))
    assert checkpoints.steps() == [4, 8, 10]


def test_other_things_in_the_folder_are_left_alone(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoint-1").symlink_to(outside)
    for name in ("checkpoint-02", "checkpoint-x", "notes", "checkpoint-3.txt"):
        (folder / name).mkdir()
    with Checkpoints(folder, keep=1) as checkpoints:
        for n in range(4, 7):
            checkpoints.save(small(n))
    assert checkpoints.steps() == [6]
    assert (outside / "kept").exists() and len(list(folder.iterdir())) == 6


def test_a_checkpoint_that_can_not_be_removed_is_kept_with_a_warning(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=1, asynchronous=False) as checkpoints:
        checkpoints.save(small(1))
        monkeypatch.setattr(_disk, "hook", lambda call, path: "removing" in path.name and fail(call, path))
        with pytest.warns(UserWarning, match=r"checkpoint-1' could not be removed, and is kept: .* Remove it by hand"):
            checkpoints.save(small(2))
    assert checkpoints.steps() == [1, 2]


class Rotation(RuleBasedStateMachine):
    """Saves, damages, restarts and resumes in any order: a good checkpoint is never lost to rotation."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.good: set[int] = set()  # written and not damaged since
        self.best: tuple[float, int] | None = None
        self.damages = self.n = 0
        self.restart(1)

    @rule(keep=st.integers(1, 3))
    def restart(self, keep):
        self.keep = keep if self.n == 0 else min(self.keep, keep)
        self.checkpoints = Checkpoints(self.folder, keep=self.keep, best="loss", asynchronous=False)

    @rule(value=st.floats(0, 1) | st.none() | st.just(float("nan")), ahead=st.integers(1, 3))
    def save(self, value, ahead):
        self.n += ahead
        self.checkpoints.save(small(self.n), metrics=None if value is None else {"loss": value})
        self.good = {step for step in {*self.good, self.n} if (self.folder / f"checkpoint-{step}").exists()}
        if value is not None and value == value:
            self.best = min(self.best or (value, self.n), (value, self.n))
        assert self.n in self.good
        if not self.damages:
            newest = sorted(self.good)[-self.keep :]
            assert self.good == {*newest, *([self.best[1]] if self.best else [])}

    def everything(self):
        return {int(path.name.split("-")[1]) for path in self.folder.glob("checkpoint-*")}

    @precondition(lambda self: self.good)
    @rule(data=st.data())
    def damage(self, data):
        step = data.draw(st.sampled_from(sorted(self.good)))
        file = data.draw(st.sampled_from(["model.safetensors", "state.safetensors", "manifest.json"]))
        flip(self.folder / f"checkpoint-{step}" / file)
        self.good.discard(step)
        self.damages += 1

    @rule()
    def resume(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = self.checkpoints.restore(small())
            except CheckpointError:
                assert not self.good
                return
        assert (found is None) == (not self.everything())
        if found is not None:
            self.n = int(found[0].step)
            assert self.n == max(self.good)
            assert_same(found[0], small(self.n))

    @invariant()
    def nothing_is_left_beside(self):
        assert all(path.name == ".lock" or path.name[0] != "." for path in self.folder.iterdir())


TestRotation = Rotation.TestCase
TestRotation.settings = settings(stateful_step_count=20, max_examples=40)


# --- which one is gone on from ------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors", "manifest.json"])
def test_a_damaged_newest_falls_back_and_says_so(file, tmp_path):
    with Checkpoints(tmp_path, keep=1, keep_every=1) as checkpoints:
        for n in range(1, 4):
            checkpoints.save(small(n))
        checkpoints.wait()
        flip(tmp_path / "checkpoint-3" / file)
        with pytest.warns(UserWarning, match=rf"checkpoint-2' is used instead:\n.*checkpoint-3'.*damaged: {file}"):
            state, _ = checkpoints.restore(small())
        with pytest.warns(UserWarning, match=r"checkpoint-2' is used instead"):
            assert checkpoints.newest() == tmp_path / "checkpoint-2"
        assert_same(state, small(2))
        with pytest.raises(CheckpointError, match=rf"checkpoint-3'.*damaged: {file}"):
            checkpoints.restore(small(), step=3)
        assert checkpoints.steps() == [1, 2]
        checkpoints.save(small(3), wait=True)  # in its place
        assert_same(checkpoints.restore(small())[0], small(3))


def test_all_damaged_is_an_error_and_not_a_new_beginning(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(small(1), wait=True)
        flip(tmp_path / "checkpoint-1" / "state.safetensors")
        with pytest.raises(
            CheckpointError, match=r"no checkpoint can be read:\n.*state.safetensors[\s\S]*\nBring back a copy"
        ):
            checkpoints.restore(small())
        with pytest.warns(UserWarning, match=r"there is no earlier checkpoint:\n.*state.safetensors"):
            assert checkpoints.newest() is None


def test_a_checkpoint_under_the_name_of_another_is_damaged(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for n in (1, 2):
            checkpoints.save(small(n))
    (tmp_path / "checkpoint-2").rename(tmp_path / "checkpoint-9")
    with pytest.warns(
        UserWarning, match=r"checkpoint-9': the checkpoint is damaged: its manifest is of step 2\. .*`checkpoint-2`"
    ):
        assert int(checkpoints.restore(small())[0].step) == 1


def test_one_that_does_not_fit_is_an_error_and_no_reason_to_take_an_older_one(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(small(1))
        checkpoints.save(small(2, other=torch.ones(1)))
    with pytest.raises(CheckpointError, match=r"checkpoint-2', like=state\): the checkpoint does not fit"):
        checkpoints.restore(small())
    assert int(checkpoints.restore(small(), step=1)[0].step) == 1


def test_a_step_that_is_not_there(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(small(1))
    with pytest.raises(
        CheckpointError, match=r"there is no checkpoint of step 2; complete are: 1\. Give `restore` one of these steps"
    ):
        checkpoints.restore(small(), step=2)


def test_going_back_in_time_needs_a_folder_of_its_own(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for n in (1, 2, 3):
            checkpoints.save(small(n))
        checkpoints.wait()
        with pytest.raises(ValueError, match=r"is at step 2, and '.*' has a checkpoint of step 3"):
            checkpoints.save(small(2))


def test_a_new_run_does_not_overwrite_an_old_one(tmp_path):
    Checkpoints(tmp_path, resume=False)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(small(4))
    with pytest.raises(ValueError, match=r"resume=False\): there are checkpoints of a run here, the last of step 4"):
        Checkpoints(tmp_path, resume=False)


def test_a_save_over_another_survives_a_crash_between_its_renames(tmp_path):
    """The only moment at which there is no folder of the name."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(small(1), {"n": 1})
    os.rename(tmp_path / "checkpoint-1", tmp_path / ".checkpoint-1.replaced")
    assert checkpoints.restore(small())[1] == {"n": 1}
    assert int(tfn.restore(tmp_path / "checkpoint-1", like=small()).step) == 1
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(small(1), {"n": 2})
    assert checkpoints.restore(small())[1] == {"n": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]


# --- one run in a folder ------------------------------------------------------------------------------------------


def test_two_runs_in_one_folder(tmp_path):
    with Checkpoints(tmp_path) as first:
        first.save(small(1))
        with pytest.raises(CheckpointError, match=rf"another run saves its checkpoints here \(process {os.getpid()}\)"):
            Checkpoints(tmp_path).save(small(2))
        first.wait()
        assert Checkpoints(tmp_path).restore(small()) is not None  # reading is free
    with Checkpoints(tmp_path) as second:
        second.save(small(2))
    unfinished = Checkpoints(tmp_path)
    unfinished.save(small(3), wait=True)
    del unfinished
    gc.collect()
    Checkpoints(tmp_path).save(small(4), wait=True)


def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    """A data loader's worker may live on for seconds when the run is killed."""
    checkpoints = Checkpoints(tmp_path).__enter__()
    (read, end), (begun, begin) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(end)
        os.write(begin, b"x")
        os.read(read, 1)  # until the parent is done
        os._exit(0)
    os.read(begun, 1)
    checkpoints.__exit__(None, None, None)
    with Checkpoints(tmp_path) as again:
        again.save(small(1))
    for number in (read, end, begun, begin):
        os.close(number)
    os.waitpid(child, 0)


def test_what_dead_processes_left_is_removed_and_what_the_living_write_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    kept = {f".checkpoint-3.writing-{os.getppid()}", ".other.writing-1", "checkpoint-6"}
    gone = {f".checkpoint-3.writing-{dead.pid}", f".checkpoint-4.removing-{dead.pid}"}
    gone |= {f".checkpoint-5.writing-{os.getpid()}", f".checkpoint-5.writing-{10**30}"}
    for name in (kept | gone) - {"checkpoint-6"}:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(small(6))
    assert {path.name for path in tmp_path.iterdir()} == kept


# --- arguments ----------------------------------------------------------------------------------------------------


class Strange:
    pass


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({"a": {"b": [1, Strange()]}}, r"extra\['a'\]\['b'\]\[1\] is a Strange"),
        ({"a": torch.ones(1)}, r"extra\['a'\] is a Tensor, .* \(put tensors into the state\)"),
        ({"a": (1, 2)}, r"extra\['a'\] is a tuple, .* \(a tuple comes back as a list"),
        ({"a": {1: 2}}, r"extra\['a'\] has the key 1; .* Use `str\(1\)`"),
    ],
)
def test_extra_is_plain_json(extra, match, tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError, match=match):
        checkpoints.save(small(1), extra)
    assert checkpoints.steps() == []


def test_extra_that_contains_itself(tmp_path):
    extra = {}
    extra["self"] = extra
    with pytest.raises(ValueError, match=r"nested too deep, or contains itself, .* a few levels of dicts"):
        Checkpoints(tmp_path).save(small(1), extra)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(extra=st.dictionaries(st.text(max_size=3), JSON, max_size=3))
def test_any_json_comes_back(extra, tmp_path_factory):
    with Checkpoints(tmp_path_factory.mktemp("json"), asynchronous=False) as checkpoints:
        checkpoints.save(small(1), extra)
    assert checkpoints.restore(small())[1] == extra
    text = (checkpoints.folder / "checkpoint-1" / "manifest.json").read_text()
    assert json.loads(text)["extra"] == extra


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every": 0}, r"every=0\): this is a count. Give a whole number from 1 on"),
        ({"keep": -1}, r"keep=-1\)"),
        ({"keep": True}, r"keep=True\)"),
        ({"keep_every": 1.5}, r"keep_every=1.5\)"),
        ({"max_shard_size": "5GB"}, r"max_shard_size='5GB'\)"),
        ({"mode": "least"}, r"mode='least'\): .* Write `mode='min'` or `mode='max'`"),
    ],
)
def test_arguments_that_make_no_sense(options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        Checkpoints(tmp_path, **options)


def test_metrics_are_numbers_and_name_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, best="eval_loss")
    with pytest.raises(
        ValueError, match=r"the metrics \['eval/loss', 'n'\]. Did you mean 'eval/loss'\? .* give `save` such a metric"
    ):
        checkpoints.save(small(1), metrics={"eval/loss": 1.0, "n": 2})
    with pytest.raises(TypeError, match=r"metrics\['eval_loss'\] is 'low', not a number, .* such as `float\(x\)`"):
        checkpoints.save(small(1), metrics={"eval_loss": "low"})
    with pytest.raises(TypeError, match=r"metrics\['eval_loss'\] is .*, not a number"):
        checkpoints.save(small(1), metrics={"eval_loss": torch.ones(2)})


def test_files_may_be_in_folders_and_stand_for_the_models_own(tmp_path):
    """Adapters are written by the package that made them; then no file looks like the full model."""
    model = torch.nn.Linear(2, 1)
    model.config = types.SimpleNamespace(to_json_string=lambda: "{}")
    state = tfn.init(model, tfn.optim.sgd(0.1))
    store = tfn.Checkpoints(tmp_path, model=False, keep=1)
    store.save(state, files={"adapter.safetensors": b"x", "b/adapter.safetensors": b"y"}, wait=True)
    folder = store.newest()
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert found == {"manifest.json", "state.safetensors", "adapter.safetensors", "b", "b/adapter.safetensors"}
    assert_same(tfn.restore(folder, like=state), state)
    (tmp_path / "elsewhere").mkdir()
    (folder / "b").rename(tmp_path / "elsewhere" / "b")
    (folder / "b").symlink_to(tmp_path / "elsewhere" / "b")
    with pytest.warns(UserWarning, match=r"b/adapter\.safetensors: it is a symbolic link"):
        assert store.newest() is None


def test_text_files_stand_beside_the_state_and_are_sealed(tmp_path):
    state = tfn.init({"w": torch.ones(2)}, tfn.optim.sgd(0.1))
    store = tfn.Checkpoints(tmp_path)
    store.save(state, files={"trainer_state.json": '{"epoch": 1.0}'}, wait=True)
    file = store.newest() / "trainer_state.json"
    assert file.read_text() == '{"epoch": 1.0}'
    file.write_text('{"epoch": 2.0}')
    with pytest.warns(UserWarning, match=r"trainer_state\.json: checksum mismatch"):
        assert store.newest() is None
    own = ("manifest.json", "state.safetensors", "model-1.safetensors")
    for name in (*own, "../x.json", ".hidden", "a/b/c", "a/../b", "/b"):
        with pytest.raises(ValueError, match=r"is not a valid name for a file"):
            store.save(state._replace(step=state.step + 1), files={name: ""})
