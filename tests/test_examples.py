"""The examples do what they say."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_property_test_your_loss_finds_the_bug():
    printed = run("property_test_your_loss.py")
    assert "wrong: check_row_additive: the loss is not a sum over the rows." in printed
    assert "split           row 0 | row 1" in printed  # two rows, cut in two: nothing smaller breaks it
    assert "normalized by something" in printed and "`tfn.Mean.of(values, w)`" in printed
    assert printed.endswith("right: holds\n")


def test_laws_on_peers():
    lines = run("laws_on_peers.py", "trainfn", "BERT classes").splitlines()
    assert lines[1].split() == ["trainfn", "holds", "holds"]
    assert "FAILS  8 x 1 rows: step 8.00 x as long" in lines[2]
