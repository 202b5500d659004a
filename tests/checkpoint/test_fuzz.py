"""Thousands of damaged and hostile checkpoints: each is refused, or is what was saved; no crash, no half a state."""

import random
import time
import warnings

import pytest
import torch

import trainfn as tfn
from tests.checkpoint.damage import Target
from tests.checkpoint.states import same, small
from trainfn._checkpoint import Checkpoints
from trainfn.errors import CheckpointError

STATE = {"w": torch.arange(12.0).reshape(3, 4), "half": torch.arange(5).bfloat16(), "none": torch.ones(0, 2)}


@pytest.fixture
def target(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("x")
    tfn.save(tmp_path / "c", small(3, **STATE), max_shard_size=40)
    found = Target(tmp_path / "c", outside)
    assert len(found.files) == 5  # two shards, their index, the state, the manifest
    return found


@pytest.fixture
def little_memory(monkeypatch):
    """Whatever a file says, no tensor is made that is larger than those of the state."""
    empty = torch.empty

    def watched(shape, *args, **kwargs):
        assert torch.Size(shape).numel() <= 12
        return empty(shape, *args, **kwargs)

    monkeypatch.setattr(torch, "empty", watched)


def restored(folder, like, **options):
    """The state; or None if it is refused, as it should be."""
    try:
        return tfn.restore(folder, like=like, **options)
    except CheckpointError as error:
        assert str(folder) in str(error)
        return None


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("first", range(0, 2000, 500))
def test_an_accident_is_noticed(first, target):
    like, original = small(0, **STATE), small(3, **STATE)
    began, refused = time.perf_counter(), 0
    for seed in range(first, first + 500):
        r = random.Random(seed)
        damage = r.choice(target.ACCIDENTS)
        damage(target, r)
        intact = {path.name: path.read_bytes() for path in target.folder.iterdir()} == target.files
        found = restored(target.folder, like)
        assert (found is not None) == intact, f"seed {seed}: {damage.__name__}"
        assert found is None or same(found, original)
        refused += found is None
        target.mend()
    assert refused > 490
    assert time.perf_counter() - began < 60  # nothing hangs, nothing explodes


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("first", range(10_000, 12_000, 500))
def test_harm_is_refused(first, target):
    """One who sets the checksums right can forge values; but only values, and nothing else happens."""
    like = small(0, **STATE)
    kinds = {name: (leaf.dtype, leaf.shape, leaf.stride()) for name, leaf in tfn.tree.named_leaves(like).items()}
    secret = {path.name for path in target.outside.parent.iterdir()}
    refused = 0
    for seed in range(first, first + 500):
        r = random.Random(seed)
        damage = r.choice(target.HARM)
        damage(target, r)
        found = restored(target.folder, like)
        if found is not None:
            named = tfn.tree.named_leaves(found)
            assert {name: (leaf.dtype, leaf.shape, leaf.stride()) for name, leaf in named.items()} == kinds
            assert damage.__name__ in ("values", "manifest", "header"), f"seed {seed}: {damage.__name__}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            restored(target.folder, like, strict=False)
        refused += found is None
        target.mend()
    assert refused > 300
    assert {path.name for path in target.outside.parent.iterdir()} == secret
    assert (target.outside / "secret").read_text() == "x"


def test_the_run_resumes_from_the_checkpoint_before(tmp_path):
    original, like = small(2, **STATE), small(0, **STATE)
    with Checkpoints(tmp_path / "run", asynchronous=False) as checkpoints:
        checkpoints.save(small(1, **STATE))
        checkpoints.save(original)
    (tmp_path / "outside").mkdir()
    target = Target(tmp_path / "run" / "checkpoint-2", tmp_path / "outside")
    for seed in range(300):
        r = random.Random(seed)
        r.choice([*target.ACCIDENTS, target.__class__.relink, target.__class__.bomb])(target, r)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found, _ = checkpoints.restore(like)
        if int(found.step) == 2:
            assert same(found, original) and not caught
        else:
            assert same(found, small(1, **STATE))
            assert "checkpoint-2': " in str(caught[0].message) and len(caught) == 1
        target.mend()
