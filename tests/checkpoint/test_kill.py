"""A run that is killed anywhere and resumed ends with the same bits. See `kill_training.py`."""

from pathlib import Path

import pytest

from tests.helpers import takes_long
from tests.processes import printed

SCRIPT = Path(__file__).with_name("kill_training.py")


def run(kills, timeout):
    text = printed("-m", "tests.checkpoint.kill_training", "--kills", kills, timeout=timeout)
    assert "every run ended with the bits of the run in one go" in text


def test_a_killed_run_ends_with_the_same_bits():
    run(16, 120)


@pytest.mark.slow
@takes_long
def test_a_run_killed_anywhere_ends_with_the_same_bits():
    run(400, 1200)
