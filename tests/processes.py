"""Python in a process of its own, alone or on several ranks."""

import os
import subprocess
import sys
from typing import NamedTuple

LAUNCHERS = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")  # how their variables begin


class Ended(NamedTuple):
    """How a process ended, and what it printed."""

    status: int
    out: str
    err: str


def ended(*command, timeout=120, cwd=None, **variables):
    """How ``python *command`` ends, with these environment variables beside those of the tests.

    A `TrainingArguments` of an earlier test has left variables of a launcher, which are not passed on.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=timeout, check=False, cwd=cwd,
        env={**kept, "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)


def succeeded(*command, **options):
    """As `ended`, of a process that must end well."""
    done = ended(*command, **options)
    assert done.status == 0, done.out[-2000:] + done.err[-6000:]
    return done


def printed(*command, **options):
    """What a process that must end well prints, to both of its streams."""
    done = succeeded(*command, **options)
    return done.out + done.err


def torchrun(ranks):
    """The start of a command that runs on so many ranks."""
    return "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"
