"""A run that is killed anywhere and resumed ends with the same bits. See `kill_training.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_training.py")


def run(kills, timeout):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--kills", str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every run ended with the bits of the run in one go" in done.stdout
    return done.stdout


def test_a_killed_run_ends_with_the_same_bits():
    run(16, 120)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("TRAINFN_LONG"), reason="takes minutes: set TRAINFN_LONG=1 to run it")
def test_a_run_killed_anywhere_ends_with_the_same_bits():
    run(400, 1200)
