"""Checkpoints of states on several ranks: gloo processes on this machine, many cases to a launch."""

import json
from pathlib import Path

import pytest

from tests.helpers import takes_long
from tests.processes import printed

HERE = Path(__file__).parent
CASES = (
    *("every_layout", "a_run_goes_on", "signals", "rotation", "a_full_disk", "mistakes", "damage", "another_run"),
    "values",
)
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


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    printed("-m", "tests.checkpoint.ranks", folder / "results.json", folder, timeout=600)
    found = json.loads((folder / "results.json").read_text())
    assert set(found) == set(CASES)
    return found


@pytest.mark.parametrize("case", CASES)
def test_on_ranks(case, results):
    assert "error" not in results[case], results[case]["error"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported(mistake, results):
    with pytest.raises(Exception, match=f"(?s){MISTAKES[mistake]}"):
        raise Exception(results["mistakes"]["found"][mistake])


def test_a_rank_that_is_killed_takes_nothing_with_it():
    out = printed("-m", "tests.checkpoint.kill_ranks", "--kills", 6, timeout=300)
    assert "every run ended with the bits of the run in one go" in out


@pytest.mark.slow
@takes_long
def test_a_rank_killed_anywhere_takes_nothing_with_it():
    printed("-m", "tests.checkpoint.kill_ranks", "--kills", 180, "--seed", 1, timeout=1800)
