"""Python in a process of its own, alone or on several ranks."""

import os
import subprocess
import sys


def printed(*command, timeout, cwd=None, **variables):
    """What ``python *command`` prints on its way to a clean end, with these environment variables."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=timeout, check=False, cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def torchrun(ranks):
    """The start of a command that runs on so many ranks."""
    return "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"
