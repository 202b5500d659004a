"""What an error of one rank of several says; the ranks themselves are in `tests/launch/test_launch.py`."""

from datetime import timedelta

import pytest
import torch

from trainfn._ranks import _errors as _explain
from trainfn._ranks._errors import explain, explained
from trainfn._ranks._group import Group, _job_timeout

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


def test_a_rank_that_waited_in_vain_or_was_interrupted_reports_it(two_ranks, monkeypatch):
    words = []
    monkeypatch.setattr(_explain, "_report", words.append)
    error = RuntimeError("Timed out waiting 3000ms for recv operation to complete")
    explain(error, ", in step 3,")
    assert words == ["rank 0 waited for the others in vain, in step 3"]
    assert "tfn.launch.settings(timeout=seconds)" in error.__notes__[0] and "ddp_timeout=seconds" in error.__notes__[0]
    with pytest.raises(KeyboardInterrupt), explained(", in step 4,"):
        raise KeyboardInterrupt
    assert words[1].startswith("rank 0: KeyboardInterrupt")


def test_what_ranks_exchange_has_the_timeout_of_the_job():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=77)
    )
    try:
        group = Group(_job_timeout())._group._get_backend(torch.device("cpu"))
        assert group.options._timeout == timedelta(seconds=77)
    finally:
        torch.distributed.destroy_process_group()
