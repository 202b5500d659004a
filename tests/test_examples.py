"""The examples do what they say."""

import runpy
import sys
import warnings
from pathlib import Path

import pytest

from tests.processes import succeeded, torchrun

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example in this process, and return what it prints."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])  # as Python does for a script
        with warnings.catch_warnings():  # an example may set filters of its own
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_property_test_your_loss_finds_the_bug(run):
    printed = run("property_test_your_loss.py")
    assert "wrong: check_row_additive: the loss is not a sum over the rows." in printed
    assert "split           row 0 | row 1" in printed  # two rows, cut in two: nothing smaller breaks it
    assert "normalized by something" in printed and "`tfn.Mean.of(values, w)`" in printed
    assert printed.endswith("right: holds\n")


def test_laws_on_peers(run):
    lines = run("laws_on_peers.py", "trainfn", "BERT classes").splitlines()
    assert lines[1].split() == ["trainfn", "holds", "holds"]
    assert "FAILS  8 x 1 rows: step 8.00 x as long" in lines[2]


def test_ranks_print_what_one_process_prints(run, tmp_path):
    """The second half on two processes, each with half of the state, from the checkpoint that one process left."""
    one = run("ranks.py", "--steps", "20", "--save", str(tmp_path / "one")).splitlines()
    run("ranks.py", "--steps", "10", "--save", str(tmp_path / "two"))
    command = (EXAMPLES / "ranks.py", "--steps", 20, "--zero", 3, "--save", tmp_path / "two")
    two = succeeded(*torchrun(2), *command, timeout=300).out.splitlines()
    assert one[-1] == two[-1] and one[-1].startswith("held out: loss ")
    held = [int(printed[-2].split(", ", 1)[1].split()[0].replace(",", "")) for printed in (one, two)]
    assert held[1] < 0.6 * held[0]
