"""A run that is killed anywhere and resumed ends with the same bits. See `kill_training.py` and `kill_ranks.py`."""

import pytest

from tests.helpers import long


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runs", "kills", "seed"),
    [
        ("kill_training", 16, 0),
        ("kill_ranks", 6, 0),
        long("kill_training", 400, 0),
        long("kill_ranks", 180, 1),
    ],
)
def test_a_killed_run_ends_with_the_same_bits(runs, kills, seed, ranks):
    (hits,) = ranks(f"tests.checkpoint.{runs}", 1, [kills, seed], seconds=30 + 10 * kills)
    assert hits >= kills // 2, "too few of them hit"
