"""The examples do what they say."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *arguments, start=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, *start, str(EXAMPLES / name), *arguments]
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


def test_ranks_print_what_one_process_prints(tmp_path):
    """The second half on two processes, each with half of the state, from the checkpoint that one process left."""
    one = run("ranks.py", "--steps", "20", "--save", str(tmp_path / "one")).splitlines()
    run("ranks.py", "--steps", "10", "--save", str(tmp_path / "two"))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    two = run("ranks.py", "--steps", "20", "--zero", "3", "--save", str(tmp_path / "two"), start=torchrun).splitlines()
    assert one[-1] == two[-1] and one[-1].startswith("held out: loss ")
    held = [int(printed[-2].split(", ", 1)[1].split()[0].replace(",", "")) for printed in (one, two)]
    assert held[1] < 0.6 * held[0]
