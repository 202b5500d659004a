"""The Trainer on several processes: the same as in one, with the same rows in all."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.hf import ranks_worker as worker
from tests.processes import printed, torchrun

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of each case: in one process, on rank 0, on rank 1. And what the ranks printed, and the folder."""
    folder = tmp_path_factory.mktemp("ranks")
    one = {}
    for name, _, case, options in worker.cases():
        again = next((n for n in one if n.rpartition(",")[0] == name.rpartition(",")[0]), None)
        if name != worker.CARRIED:
            one[name] = one[again] if again else case(folder / "one" / name, {}, **options)
    one[worker.CARRIED] = one["saved, fsdp"]
    shutil.copytree(folder / "one" / "saved, ddp" / "cut", folder / "two" / worker.CARRIED / "cut")
    command = (*torchrun(2), HERE / "ranks_worker.py", folder / "out", folder / "two")
    told = printed(*command, timeout=300)
    two = [torch.load(f"{folder / 'out'}.{rank}") for rank in range(2)]
    return one, two, told, folder


def differs(expected, found, name=""):
    """The largest difference of two results, and where."""
    if isinstance(expected, dict):
        assert expected.keys() == found.keys(), name
        return max([differs(v, found[k], f"{name}/{k}") for k, v in expected.items()], default=(0.0, name))
    if isinstance(expected, list):
        assert len(expected) == len(found), (name, expected, found)
        return max([differs(a, b, f"{name}/{i}") for i, (a, b) in enumerate(zip(expected, found, strict=True))],
                   default=(0.0, name))  # fmt: skip
    if isinstance(expected, torch.Tensor):
        assert expected.shape == found.shape, name
        return float((expected.double() - found.double()).abs().max()), name
    if isinstance(expected, float):
        return abs(expected - found) / max(1.0, abs(expected)), name
    assert expected == found, (name, expected, found)
    return 0.0, name


TOLERANCE = {"half": 2e-2, "scaled": 2e-2}  # sums of 16-bit numbers in another order


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, *_ in worker.cases()])
def test_ranks_are_one_process(name, results):
    one, two, _, _ = results
    for found in two:
        assert name in found, "an earlier case failed"
        assert not isinstance(found[name], str), found[name]
    worst, where = differs(one[name] if name != worker.CARRIED else {"params": one[name]["params"]}, two[0][name])
    assert worst < TOLERANCE.get(name.split(",")[0], 1e-6), where
    assert differs(two[0][name], two[1][name])[0] == 0.0


@pytest.mark.slow
def test_only_rank_0_prints(results):
    _, _, printed, _ = results
    finals = printed.count("'train_runtime'")
    trained = sum(printed.count(f"'train_runtime': '{x}") for x in "0123456789")
    assert 0 < finals == trained <= 60  # each run once


@pytest.mark.slow
def test_a_deepspeed_configuration_is_reported_once(results):
    _, _, printed, _ = results
    # Two are of arguments, one is of a launcher.
    assert printed.count("this run is native, with a plan of the same ZeRO stage") == 3
    assert printed.count("Launch(rank 0 of 2") == 3 and "Launch(rank 1" not in printed


@pytest.mark.slow
def test_one_process_resumes_from_the_checkpoint_of_two(results, tmp_path):
    one, _, _, folder = results
    shutil.copytree(folder / "two" / "saved, fsdp" / "cut", tmp_path / "cut")
    found = worker.carried_on(tmp_path, {})
    assert differs({"params": one["saved, fsdp"]["params"]}, found)[0] < 1e-6
