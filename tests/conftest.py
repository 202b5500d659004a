"""What every test of the suite runs under."""

import logging
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# One compile cache for all tests of this user, kept between runs: a second run compiles little.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"trainfn-tests-{os.getuid()}"))

# The processes that tests start find the package and the tests' helpers, wherever they are started.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.processes import LAUNCHERS
from tests.ranks.server import Server
from trainfn.testing import register_profiles

torch.set_num_threads(1)
logging.getLogger("torch.__trace").propagate = False  # thousands of empty lines in the report of a failure

# What the tests' own launcher has said, as `mixed_precision`, is not passed on to the processes that they start.
LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MIXED_PRECISION", "NPROC")
for said in [name for name in os.environ if name in LAUNCHED or name.startswith(LAUNCHERS)]:
    if said != "ACCELERATE_USE_CPU":
        del os.environ[said]

register_profiles()
settings.load_profile("trainfn-ci" if os.environ.get("CI") else "trainfn-dev")


# The files that take longest, which begin first: so that no process works alone at the end. The quick look at style and
# types, which is the whole of `tests/test_lint.py`, is before them.
FIRST = (
    *("test_lint.py", "compile/test_step_file.py", "compile/test_capture.py", "ranks/test_plan.py", "test_guides.py"),
    *("checkpoint/test_sharded.py", "hf/test_ranks.py", "compile/test_transformers_models.py", "test_device.py"),
    *("launch/test_launch.py", "hf/test_launched.py", "optim/test_optim.py", "hf/test_trainer.py"),
    *("compile/test_warm.py", "compile/test_jit.py", "test_examples.py", "test_device_trainer.py"),
)


def pytest_collection_modifyitems(items):
    place = {Path(__file__).parent / name: n for n, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(FIRST)))


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_is_heard():
    """Tests press Ctrl-C, and so do the processes they start; a shell has its background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Torch's tracer settings and the modes in force are what they were before the test."""
    config = torch._dynamo.config.get_config_copy()
    grad, mode = torch.is_grad_enabled(), torch._C._len_torch_function_stack()
    filters, imported = list(warnings.filters), set(sys.modules)
    state = torch.get_rng_state()
    yield
    assert torch._dynamo.config.get_config_copy() == config
    assert (torch.is_grad_enabled(), torch._C._len_torch_function_stack()) == (grad, mode)
    # A library that was imported meanwhile may have added one for its own warnings, as `pkg_resources` does.
    assert [f for f in warnings.filters if f in filters or f[2].__module__ in imported] == filters
    torch.set_rng_state(state)  # what a test seeds, it seeds for itself


@pytest.fixture(autouse=True)
def accelerate_as_it_was():
    """Accelerate's states, of which a process has one each, are those before the test."""
    state = sys.modules.get("accelerate.state")
    kinds = () if state is None else (state.PartialState, state.AcceleratorState, state.GradientState)
    before = [dict(kind._shared_state) for kind in kinds]
    yield
    for kind, held in zip(kinds, before, strict=True):
        kind._shared_state.clear()
        kind._shared_state.update(held)


@pytest.fixture(scope="session")
def ranks():
    """`tests/ranks/server.py`, for all files that this process runs."""
    server = Server()
    yield server
    server.close()


@pytest.fixture
def untouched_rng():
    """The global generators of torch, NumPy and Python are neither read nor changed by the test."""
    import random

    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    words, *position = np.random.get_state()[1:]  # the words change every 624 draws only
    assert (words == before[1][1]).all() and tuple(position) == before[1][2:]
    assert random.getstate() == before[2]
