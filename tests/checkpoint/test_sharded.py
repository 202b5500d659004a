"""Checkpoints of states on several ranks: gloo processes on this machine."""

import re

import pytest

from tests.checkpoint.ranks import CASES

# What each mistake is answered with.
MISTAKES = {
    "folders": r"Checkpoints\('.*/0'\): the ranks of one job save together, and they have different folders: '.*/0',"
    r" '.*/1'. Give all of them the same folder",
    "not shared": r"rank 1: '.c.writing-\d+', which rank 0 made, is not seen by rank 1. .* on a disk that they share",
    "extra": r"rank 1: Checkpoints.save\(state\): extra\['x'\] is a tuple, which JSON can't return as it was",
    "shape": r"the checkpoint does not fit the state:\n  missing in the checkpoint: model/weight",
    "partial": r"state.params\['a.weight'\] is placed as \(Partial\(sum\),\) over 2 of 2 ranks. Only the layouts"
    r" of `tfn.shard` can be saved and restored in parts.*`tfn.gather\(state\)`",
    "nowhere": r"nowhere': no checkpoint there \(no manifest.json, which is written last\)",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "mistakes"])
def test_on_ranks(case, ranks, tmp_path):
    ranks("tests.checkpoint.ranks", 1, [case, str(tmp_path)], seconds=600)


@pytest.fixture(scope="module")
def mistakes(ranks, tmp_path_factory):
    (found,) = ranks("tests.checkpoint.ranks", 1, ["mistakes", str(tmp_path_factory.mktemp("mistakes"))])
    assert found.keys() == MISTAKES.keys()
    return found


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_on_all_ranks(mistake, mistakes):
    assert re.search(f"(?s){MISTAKES[mistake]}", mistakes[mistake]), mistakes[mistake]
