"""What an error of one rank of several says; the ranks themselves are in `test_launch.py`."""

import pytest
import torch

from trainfn._explain import explain, explained

SAID = {  # what torch says, and what is added
    "[pair.cc:553] Connection closed by peer [127.0.0.1]:644": "was waiting for another rank, which has ended",
    "Read error [127.0.0.1]:35025: Connection reset by peer": "was waiting for another rank, which has ended",
    "NCCL communicator was aborted on rank 0": "was waiting for another rank, which has ended",
    "Timed out waiting 3000ms for recv operation to complete": "waited for the other ranks in vain",
    "wait timeout after 3000ms, keys: /default_pg/0": "waited for the other ranks in vain",
    "mat1 and mat2 shapes cannot be multiplied": "raised this",
}


@pytest.fixture
def two_ranks(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)


@pytest.mark.parametrize("said", SAID)
def test_errors_of_collectives_are_explained(said, two_ranks):
    error = RuntimeError(said)
    explain(error, ", in step 3,")
    explain(error)
    (note,) = error.__notes__
    assert note.startswith(f"trainfn: rank 0 of 2, in step 3, {SAID[said]}")


def test_an_error_is_the_ranks_own_unless_torch_raised_it(two_ranks):
    with pytest.raises(TimeoutError, match="timed out") as caught, explained(", in step 1,"):
        raise TimeoutError("the data server timed out")
    assert caught.value.__notes__ == ["trainfn: rank 0 of 2, in step 1, raised this; the other ranks end with it."]


def test_nothing_is_added_in_one_process_or_when_batches_end(two_ranks, monkeypatch):
    with pytest.raises(StopIteration) as caught, explained(""):
        next(iter(()))
    assert not hasattr(caught.value, "__notes__")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    with pytest.raises(ValueError, match="rows") as caught, explained(""):
        raise ValueError("rows")
    assert not hasattr(caught.value, "__notes__")
