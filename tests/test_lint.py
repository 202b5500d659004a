"""The linter, the formatter and the type checker have nothing to say; what the tests install is pinned."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.processes import succeeded

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["basedpyright", "--pythonpath", sys.executable, "trainfn"],
    ],
    ids=["check", "format", "types"],
)
def test_clean(command):
    succeeded("-m", *command, cwd=ROOT, timeout=300)


def test_a_release_of_a_dependency_changes_nothing_here():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = [re.fullmatch(r"([\w-]+)==[\d.]+", requirement) for requirement in extras["test"]]
    assert all(pinned), extras["test"]
    wide = [*project["dependencies"], *extras["hf"], *extras["testing"], *extras["scripts"]]
    assert {re.match(r"[\w-]+", requirement)[0] for requirement in wide} <= {pin[1] for pin in pinned}
