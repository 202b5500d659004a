"""The launcher of the documentation's TPU command, on processes of the CPU."""

import runpy
import sys
from pathlib import Path

import pytest

from tests.processes import succeeded

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, sys, torch, torch.distributed as dist

def _mp_fn(index):
    dist.init_process_group("gloo")
    total = torch.tensor(float(index + 1))
    dist.all_reduce(total)
    open(f"{sys.argv[1]}-{index}", "w").write(f"{int(total)} {dist.get_world_size()} {sys.argv[2:]}")
    dist.destroy_process_group()
"""


def test_processes_of_the_cpu(tmp_path):
    script = tmp_path / "trained.py"
    script.write_text(SCRIPT)
    arguments = ("--num_cores", 2, "--cpu", script, tmp_path / "out", "--do_train", "--lr", "1e-3")
    succeeded(ROOT / "examples" / "xla_spawn.py", *arguments)
    for index in range(2):
        assert (tmp_path / f"out-{index}").read_text() == "3 2 ['--do_train', '--lr', '1e-3']"


def test_what_is_missing_is_reported(tmp_path, monkeypatch):
    script = tmp_path / "trained_elsewhere.py"
    script.write_text("")
    monkeypatch.setattr(sys, "argv", ["xla_spawn.py", str(script)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    launcher = runpy.run_path(str(ROOT / "examples" / "xla_spawn.py"))
    with pytest.raises(SystemExit, match="there is no script"):
        launcher["loaded"](tmp_path / "none.py")
    with pytest.raises(SystemExit, match=r"has no function `_mp_fn\(index\)`"):
        launcher["loaded"](script)
    with pytest.raises(SystemExit, match=r"pip install torch==2\.9\.0 torch_xla\[tpu\]==2\.9\.0"):
        launcher["main"]()
