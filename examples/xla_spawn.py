"""Run a training script on N TPU cores, or, to try it anywhere, on N processes of the CPU.

    python examples/xla_spawn.py --num_cores 8 run_summarization.py --model_name_or_path t5-small --do_train ...
    python examples/xla_spawn.py --num_cores 2 --cpu script.py ...

The script needs a function `_mp_fn(index)`, as those in `pytorch/` have it. TPU cores need torch_xla, whose last
release is for torch 2.9: see `xla_smoke.py`. It has been tested on processes of the CPU, and not on a TPU.
"""

import argparse
import importlib
import importlib.util
import os
import socket
import sys
from pathlib import Path


def parsed():
    """This launcher's arguments, the script, and the script's own arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_cores", type=int, default=1, help="how many TPU cores, or processes")
    parser.add_argument("--cpu", action="store_true", help="processes of the CPU instead of TPU cores")
    parser.add_argument("script", help="the training script, a path")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="its arguments")
    return parser.parse_args()


def loaded(path):
    """The script as a module."""
    path = Path(path).resolve()
    if not path.is_file():
        raise SystemExit(f"xla_spawn.py: there is no script {str(path)!r}.")
    sys.path.insert(0, str(path.parent))
    module = importlib.import_module(path.stem)
    if not hasattr(module, "_mp_fn"):
        raise SystemExit(f"xla_spawn.py: {path.name} has no function `_mp_fn(index)`. Add: def _mp_fn(index): main()")
    return module


def on_cpu(index, path, arguments, cores, port):
    """Run one of several processes of the CPU, with the variables of a launcher."""
    os.environ |= {
        "RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(cores), "LOCAL_WORLD_SIZE": str(cores),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    sys.argv = arguments
    loaded(path)._mp_fn(index)


def main():
    given = parsed()
    arguments = [given.script, *given.rest]
    if given.cpu:
        import torch.multiprocessing as processes

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes.spawn(on_cpu, (given.script, arguments, given.num_cores, port), nprocs=given.num_cores)
        return
    if importlib.util.find_spec("torch_xla") is None:
        raise SystemExit(
            "xla_spawn.py: TPU cores need torch_xla: `pip install torch==2.9.0 torch_xla[tpu]==2.9.0`. To try the"
            f" script on this machine: python {sys.argv[0]} --num_cores {given.num_cores} --cpu {given.script} ..."
        )
    import torch_xla.distributed.xla_multiprocessing as cores

    script = loaded(given.script)
    sys.argv = [*arguments, "--tpu_num_cores", str(given.num_cores)]
    cores.spawn(script._mp_fn, args=(), nprocs=None if given.num_cores > 1 else 1)  # PJRT takes all cores, or one


if __name__ == "__main__":
    main()
