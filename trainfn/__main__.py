"""The command ``trainfn``, also as ``python -m trainfn``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_DESCRIPTION = """\
Launch as `accelerate launch` would, and check that N ranks compute what one process does. A small model takes three
updates by the configured plan, in float32 and in the configured precision. Run it once after `accelerate config`.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status.

    Args:
        arguments: By default, the ones of the command line.
    """
    parser = argparse.ArgumentParser(prog="trainfn")
    commands = parser.add_subparsers(dest="command", required=True)
    test = commands.add_parser(
        "test", help="check that the configured ranks compute what one does", description=_DESCRIPTION
    )
    test.add_argument("--config_file", help="an Accelerate yaml; by default, the one that `accelerate config` wrote")
    known, flags = parser.parse_known_args(arguments)
    return _test(known.config_file, flags)


def _test(config: str | None, flags: Sequence[str]) -> int:
    from accelerate.commands.config.config_args import default_config_file

    file = Path(config or default_config_file)
    if config is not None or file.is_file():
        try:
            _name_what_is_lost(file)
        except ValueError as error:
            print(f"trainfn test: {error}", file=sys.stderr)
            return 2
    elif not flags:
        print(
            f"trainfn test: there is no {file}. Run `accelerate config` first, or say what to launch: `trainfn test"
            " --multi_gpu --num_processes 2`. One process is tested now.",
            file=sys.stderr,
        )
    chosen = [] if config is None else ["--config_file", config]
    script = ["--module", "trainfn.launch._selftest"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *chosen, *flags, *script]
    return subprocess.run(command, check=False).returncode


def _name_what_is_lost(file: Path) -> None:
    """Keys of a section that the launcher drops without a word never reach a process: they are named here."""
    from trainfn.launch._settings import fields_of

    lost = [field for field in fields_of(file) if field.fate == "ignored"]
    if lost:
        listed = "; ".join(f"{field.name}={field.value} ({field.detail})" for field in lost)
        print(f"trainfn test: of {file}, not honoured: {listed}.", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
