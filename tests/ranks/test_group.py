"""`tfn.launch.Ranks`: what processes exchange on the host, on two of them and on one."""

import pytest

import trainfn as tfn
from tests.ranks.forked import on


def exchange():
    ranks = tfn.launch.ranks()
    raised = []

    def fails_on(rank, error):
        def call():
            if ranks.rank == rank:
                raise error
            return ranks.rank

        return call

    for call in (ranks.first, ranks.everyone, ranks.agreed):
        try:
            call(fails_on(0, ValueError("no such folder")))
        except ValueError as error:
            raised.append(str(error))
    ranks.wait()
    return {
        "same": tfn.launch.ranks() is ranks,
        "first": ranks.first(lambda: ranks.rank),
        "everyone": ranks.everyone(lambda: ranks.rank),
        "agreed": ranks.agreed(lambda: ranks.rank),
        "gathered": ranks.gathered(ranks.rank + 5),
        "any": ranks.any([ranks.rank == 1, False]),
        "sums": ranks.sums([ranks.rank + 0.5, 2.0**53]),
        "another": ranks.another().gathered(ranks.rank),
        "raised": raised,
    }


def test_two_ranks():
    zero, one = on(2, exchange)
    common = {"same": True, "first": 0, "everyone": [0, 1], "gathered": [5, 6], "any": [True, False]}
    common |= {"sums": [2.0, 2.0**54], "another": [0, 1]}
    every = ["rank 0: no such folder"] * 2
    assert zero == {**common, "agreed": 0, "raised": ["no such folder", *every]}
    assert one == {**common, "agreed": 1, "raised": ["no such folder", *every]}


def test_one_process():
    ranks = tfn.launch.ranks(timeout=5.0)
    assert (ranks.rank, ranks.size, ranks.another() is ranks) == (0, 1, True)
    assert (ranks.first(lambda: 3), ranks.everyone(lambda: 3), ranks.agreed(lambda: 3)) == (3, [3], 3)
    assert (ranks.gathered("a"), ranks.any([True, False]), ranks.sums([1, 2.5])) == (["a"], [True, False], [1, 2.5])
    with pytest.raises(ValueError, match="no such folder"):
        ranks.first(lambda: (_ for _ in ()).throw(ValueError("no such folder")))
