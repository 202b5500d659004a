"""The Trainer on several processes: the same as in one, with the same rows in all."""

import shutil

import pytest
import torch

from tests.hf import ranks_worker as worker

CASES = {name: rest for name, *rest in worker.cases()}
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("one", "two"):
        (folder / name).mkdir()
    return folder


@pytest.fixture(scope="module")
def one(folder):
    """The result of a case in one process, which is the same for all plans."""
    found = {}

    def one(name):
        kind = "saved" if name == worker.CARRIED else name.rpartition(",")[0]
        if kind not in found:
            _, case, options = next(rest for other, rest in CASES.items() if other.rpartition(",")[0] == kind)
            found[kind] = case(folder / "one" / kind, {}, **options)
        return found[kind]

    return one


@pytest.fixture(scope="module")
def two(folder, ranks, one):
    """On each of two ranks, the result of a case, what was printed, and how many runs came to their end."""
    found = {}

    def two(name):
        if name == worker.CARRIED:
            one(name)
            shutil.copytree(folder / "one" / "saved" / "cut", folder / "two" / name / "cut", dirs_exist_ok=True)
        if name not in found:
            runs = ranks(worker.__name__, 2, [name, str(folder / "two")])
            results = [torch.load(folder / "two" / f"found {name}.{rank}") for rank in range(2)]
            told = [(folder / "two" / f"printed {name}.{rank}").read_text() for rank in range(2)]
            found[name] = list(zip(results, told, runs, strict=True))
        return found[name]

    return two


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


@pytest.mark.parametrize("name", CASES)
def test_ranks_are_one_process(name, one, two):
    (first, printed, runs), (second, silent, _) = two(name)
    expected = one(name)
    worst, where = differs(expected if name != worker.CARRIED else {"params": expected["params"]}, first)
    assert worst < TOLERANCE.get(name.split(",")[0], 1e-6), where
    assert differs(first, second)[0] == 0.0
    assert printed.count("'train_runtime'") == runs  # rank 0 prints the end of each run, and no other rank does
    assert "'train_runtime'" not in silent


def test_each_ranks_stream_resumes_by_its_state(two):
    for found, *_ in two("placed, ddp"):
        assert found["reads"] == [12, 8]
        assert differs(found["whole"], found["params"])[0] == 0.0


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("planned", "configured"))])
def test_a_deepspeed_configuration_is_reported_once(name, two):
    """By the arguments or by a launcher, and on rank 0 alone."""
    (_, printed, _), (_, silent, _) = two(name)
    assert printed.count("this run is native, with a plan of the same ZeRO stage") == 1
    assert printed.count("Launch(rank 0 of 2") == 1
    assert "this run is native" not in silent and "Launch(" not in silent


def test_one_process_resumes_from_the_checkpoint_of_two(one, two, folder, tmp_path):
    two("saved, fsdp")
    shutil.copytree(folder / "two" / "saved, fsdp" / "cut", tmp_path / "cut")
    found = worker.carried_on(tmp_path, {})
    assert differs({"params": one("saved, fsdp")["params"]}, found)[0] < 1e-6
