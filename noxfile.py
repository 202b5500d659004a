"""The tests under other versions than those that `pyproject.toml` pins: `nox -s newest`, `nox -s versions`."""

import nox

nox.options.sessions = ["newest"]

EXTRAS = "hf,testing,scripts"  # with bounds alone; the extra `test` is pinned
TOOLS = ("pytest", "pytest-xdist")
VERSIONS = "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
# Where a new release of torch or transformers shows first: few of the tests compile, and none starts processes.
QUICK = (
    "tests/compile/test_capture.py",
    "tests/compile/test_jit.py",
    "tests/hf/test_arguments.py",
    "tests/hf/test_evaluation.py",
    "tests/hf/test_names.py",
    "tests/hf/test_seq2seq.py",
    "tests/hf/test_trainer.py",
    "tests/keyed/test_random.py",
    "tests/losses/test_every.py",
    "tests/optim/test_optim.py",
    "tests/test_device.py",
    "tests/test_device_trainer.py",
    "tests/test_grad.py",
    "tests/test_module.py",
    "tests/test_step.py",
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


TABLE = [
    nox.param("3.11", "2.11.0", "5.17.0", id="python 3.11, torch 2.11, transformers 5.17"),  # the lower bounds
    *(
        nox.param("3.11", torch, None, id=f"python 3.11, torch {torch}")
        for torch in ("2.12.1", "2.13.0", "2.14.1", "2.15.0")
    ),
    *(nox.param(python, "2.13.0", None, id=f"python {python}, torch 2.13.0") for python in ("3.12", "3.13")),
]


@nox.session
@nox.parametrize(("python", "torch", "transformers"), TABLE)
def versions(session: nox.Session, torch: str, transformers: str | None) -> None:
    """The table of versions; transformers is the newest where none is named."""
    named = [f"transformers=={transformers}"] if transformers else []
    quick(session, f"torch=={torch}", *named)
