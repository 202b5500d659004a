"""A model that the caller writes by itself, inside of a checkpoint."""

import errno

import pytest
import torch

import trainfn as tfn
from trainfn._checkpoint import _disk

STATE = tfn.init(torch.nn.Linear(2, 1), tfn.optim.adam(0.1), seed=3)


def at(n):
    return STATE._replace(step=torch.tensor(n), params={k: v + n for k, v in STATE.params.items()})


@pytest.mark.parametrize("place", ["checkpoint-1", "elsewhere"])
def test_the_callers_files_are_part_of_the_checkpoint(place, tmp_path):
    mine = tmp_path / place
    (mine / "1_Pooling").mkdir(parents=True)
    for name in ("model.safetensors", "1_Pooling/config.json", "config.json", "note.txt", "manifest.json"):
        (mine / name).write_text("mine")
    with tfn.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(1), {"n": 1}, files={"note.txt": "theirs"}, adopt=mine)
    folder = tmp_path / "checkpoint-1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "1_Pooling", "config.json", "manifest.json", "model.safetensors", "note.txt", "state.safetensors",
    ]  # fmt: skip
    texts = {name: (folder / name).read_text() for name in ("model.safetensors", "config.json", "note.txt")}
    assert texts == {"model.safetensors": "mine", "config.json": "mine", "note.txt": "theirs"}
    assert (folder / "1_Pooling" / "config.json").read_text() == "mine"
    restored, extra = checkpoints.restore(like=STATE)
    assert tfn.diff(restored, at(1)) == tfn.diff(STATE, STATE)
    assert extra == {"n": 1}


def full(call, path):
    if call == "write":
        raise OSError(errno.ENOSPC, "full")


def test_a_save_that_fails_leaves_the_older_checkpoint_of_that_step(tmp_path, monkeypatch):
    with tfn.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(1), {"n": 1})
        checkpoints.wait()
        mine = tmp_path / "mine"
        mine.mkdir()
        monkeypatch.setattr(_disk, "hook", full)
        with pytest.raises(tfn.errors.CheckpointError, match="the disk is full"):
            checkpoints.save(at(1), {"n": 2}, adopt=mine, wait=True)
    assert checkpoints.restore(like=STATE)[1] == {"n": 1}


def test_a_run_that_ends_leaves_no_lock(tmp_path):
    with tfn.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(1))
        assert (tmp_path / ".lock").exists()
        with pytest.raises(tfn.errors.CheckpointError, match="another run saves its checkpoints here"):
            tfn.Checkpoints(tmp_path).save(at(2))
        assert (tmp_path / ".lock").exists()  # the one that was refused leaves that of the other
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
