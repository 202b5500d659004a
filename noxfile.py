"""The tests under other versions than those that `pyproject.toml` pins: `nox -s newest`."""

import nox

nox.options.sessions = ["newest"]

EXTRAS = "hf,testing,scripts"  # with bounds alone; the extra `test` is pinned
TOOLS = ("pytest", "pytest-xdist")
VERSIONS = "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
# Where a new release of torch or transformers shows first: few of the tests compile, and none starts processes.
QUICK = (
    *("tests/test_step.py", "tests/test_module.py", "tests/test_losses.py", "tests/test_optim.py"),
    *("tests/test_hf_arguments.py", "tests/test_hf_evaluation.py", "tests/test_hf_seq2seq.py"),
    "tests/test_hf_trainer.py",
)


def quick(session: nox.Session, *requirements: str) -> None:
    """Install the package with these requirements, and the newest of all else; run the quick tests, or those named."""
    session.install("--upgrade", "-e", f".[{EXTRAS}]", *TOOLS, *requirements)
    session.run("python", "-c", VERSIONS)
    session.run("python", "-m", "pytest", "-q", "-m", "not slow", *(session.posargs or QUICK))


@nox.session
def newest(session: nox.Session) -> None:
    """The newest releases of everything that the package accepts."""
    quick(session)


# A session `versions` belongs here: `quick(session, "torch==...", "transformers==...")` for each row of a table, by
# `@nox.parametrize`, so that the lower bounds of pyproject.toml are tried as well.
