"""A disk that fails at every call of a save: the state is intact, what was there is there, and the error says why."""

import errno
import os
import resource
import shutil

import pytest

import trainfn as tfn
from tests.checkpoint.states import assert_same, small
from trainfn._checkpoint import Checkpoints, _disk
from trainfn.errors import CheckpointError

MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
ERRORS = {
    errno.ENOSPC: r"the disk is full: [\d,]+ bytes needed, [\d,]+ free. Make room, save elsewhere, or keep fewer",
    errno.EROFS: r"can't be written to \(Read-only file system\). Change its permissions, or save elsewhere",
    errno.EIO: r"Input/output error",
}


@pytest.fixture
def calls(monkeypatch):
    """Every change of the disk, in order."""
    seen = []
    monkeypatch.setattr(_disk, "hook", lambda call, path: seen.append((call, path.name)))
    return seen


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def run(folder, *, asynchronous, steps):
    with Checkpoints(folder, keep=1, asynchronous=asynchronous) as checkpoints:
        for n in steps:
            state = small(n)
            checkpoints.save(state)
            checkpoints.wait()
    return checkpoints, state


@MODES
@pytest.mark.parametrize("number", ERRORS, ids=lambda number: errno.errorcode[number])
def test_each_call_may_fail(number, asynchronous, tmp_path, monkeypatch, calls):
    run(tmp_path / "count", asynchronous=asynchronous, steps=[1])
    start = len(calls)
    run(tmp_path / "count", asynchronous=asynchronous, steps=[2])
    script = calls[start:]
    assert len(script) > 15
    for k, (_, at) in enumerate(script):
        folder = tmp_path / str(k)
        run(folder, asynchronous=asynchronous, steps=[1])
        left = [k]

        def hook(call, path, left=left):
            left[0] -= 1
            if left[0] == -1:
                raise OSError(number, os.strerror(number))

        monkeypatch.setattr(_disk, "hook", hook)
        state = small(2)
        checkpoints = Checkpoints(folder, keep=1, asynchronous=asynchronous)
        renamed = script.index(("rename", "checkpoint-2"))
        if k > renamed + 1:  # what follows only removes the old one
            with pytest.warns(UserWarning, match="could not be removed, and is kept"):
                checkpoints.save(state, wait=True)
        else:
            with pytest.raises(CheckpointError, match=ERRORS[number]) as caught:
                checkpoints.save(state, wait=True)
            assert "The training state in memory is intact" in str(caught.value)
            assert visible(folder) == (["checkpoint-1"] if k <= renamed else ["checkpoint-1", "checkpoint-2"]), (k, at)
        monkeypatch.setattr(_disk, "hook", lambda call, path: None)
        assert_same(state, small(2))
        found, _ = checkpoints.restore(small())
        assert_same(found, small(1 if k <= renamed else 2))
        checkpoints.save(small(3), wait=True)  # the disk is well again, and so is all the rest
        assert visible(folder) == ["checkpoint-3"]


def test_each_call_of_a_save_over_another_may_fail(tmp_path, monkeypatch, calls):
    tfn.save(tmp_path / "count", small(1))
    start = len(calls)
    tfn.save(tmp_path / "count", small(2))
    for k in range(len(calls) - start):
        left = [k]

        def hook(call, path, left=left):
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.EIO, "Input/output error")

        folder = tmp_path / str(k)
        monkeypatch.setattr(_disk, "hook", lambda call, path: None)
        tfn.save(folder / "c", small(1))
        monkeypatch.setattr(_disk, "hook", hook)
        try:
            tfn.save(folder / "c", small(2))
            saved = True
        except CheckpointError:
            saved = False
        monkeypatch.setattr(_disk, "hook", lambda call, path: None)
        found = tfn.restore(folder / "c", like=small())
        assert_same(found, small(int(found.step)))
        assert int(found.step) == 2 or not saved
        tfn.save(folder / "c", small(3))
        assert visible(folder) == ["c"]


def test_what_is_renamed_is_flushed_and_nothing_goes_before_the_new_one_stays(tmp_path, calls):
    """A power cut may undo whatever was not flushed, in any order."""
    run(tmp_path, asynchronous=False, steps=[1, 2])
    second = calls[max(i for i, (call, _) in enumerate(calls) if call == "mkdir") :]
    beside = second[0][1]
    files = [name for call, name in second if call == "create"]
    assert files[-1] == "manifest.json"
    place = second.index(("rename", "checkpoint-2"))
    for name in files:
        calls_on = [call for call, at in second[:place] if at == name]
        assert calls_on == ["create", *["write"] * (len(calls_on) - 2), "fsync"]
    assert all(second.index(("fsync", name)) < place for name in [*files, beside])
    assert second.index(("fsync", "manifest.json")) > max(second.index(("fsync", name)) for name in files[:-1])
    assert second[place + 1] == ("fsync", tmp_path.name)
    assert min(i for i, (call, name) in enumerate(second) if "removing" in name or call == "unlink") > place + 1


def test_a_file_cut_short_by_the_system(tmp_path):
    """A real one: the kernel writes a part of what it is given, and then refuses."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            tfn.save(tmp_path / "c", small(1, w=tfn.random.uniform(tfn.random.key(0), (999,))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert visible(tmp_path) == []


@MODES
def test_a_folder_that_vanishes(asynchronous, tmp_path):
    with Checkpoints(tmp_path / "run", asynchronous=asynchronous) as checkpoints:
        checkpoints.save(small(1), wait=True)
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(CheckpointError, match=r"its folder '.*run' has vanished. Bring it back, or save elsewhere"):
            checkpoints.save(small(2), wait=True)
        (tmp_path / "run").mkdir()
        checkpoints.save(small(3), wait=True)
        assert checkpoints.steps() == [3]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_can_not_be_written_to(tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match=r"can't be written to \(Permission denied\)"):
        Checkpoints(tmp_path / "run").save(small(1))
    with pytest.raises(CheckpointError, match=r"can't be written to \(Permission denied\)"):
        tfn.save(tmp_path / "run" / "c", small(1))


def test_a_folder_below_a_file(tmp_path):
    (tmp_path / "run").write_text("x")
    for save in (Checkpoints(tmp_path / "run").save, lambda state: tfn.save(tmp_path / "run" / "c", state)):
        with pytest.raises(CheckpointError, match=r"could not be written: .*(File exists|Not a directory|vanished)"):
            save(small(1))
