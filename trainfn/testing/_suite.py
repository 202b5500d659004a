"""Everything that applies to a step, in one call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from trainfn._compile import Compiled
from trainfn._step import TrainStep
from trainfn._types import Batch, TrainState
from trainfn.errors import CaptureError, LawViolation, RecompileError
from trainfn.testing._compiled_laws import QUICK, check_donation, check_eager_equals_compiled, check_single_graph
from trainfn.testing._state_laws import check_roundtrip
from trainfn.testing._step_laws import (
    AnyStep,
    check_deterministic,
    check_dtype_stable,
    check_keyed,
    check_no_host_sync,
    check_pure,
    run,
)


class Laws(NamedTuple):
    """The laws that a step was found to obey.

    Attributes:
        held: Their names, in the order they were checked.
    """

    held: tuple[str, ...]

    def __repr__(self) -> str:
        return f"{len(self.held)} laws hold: " + ", ".join(name.removeprefix("check_") for name in self.held)


def check_step(
    step: AnyStep,
    state: TrainState,
    batches: Batch | Sequence[Batch],
    *,
    backend: str | Callable[..., Any] = QUICK,
) -> Laws:
    """Check every law of a step: purity, determinism, keys, dtypes, host syncs, graphs, donation, round trip.

    Whether its loss adds up over rows is a question to the loss: `check_row_additive`.

    Args:
        step: ``(state, batch) -> (state, metrics)``, compiled or not.
        state: Where to start; it is not changed.
        batches: A batch, or a list of batches of one shape.
        backend: The backend of ``torch.compile``; ``"inductor"`` includes the code generator, and takes its time.

    Raises:
        LawViolation: With the reports of all laws that are broken.

    >>> import torch, trainfn as tfn
    >>> optimizer = tfn.optim.adam(0.1)
    >>> step = tfn.train_step(lambda p, x, mean=tfn.Mean.of: mean(p["w"] * x), optimizer)
    >>> check_step(step, tfn.init({"w": torch.ones(1)}, optimizer), torch.ones(2))  # doctest: +ELLIPSIS
    9 laws hold: pure, deterministic, keyed, dtype_stable, no_host_sync, single_graph, eager_equals_compiled, ...
    """
    listed = batches if isinstance(batches, list) else [batches]
    first = listed[0]
    laws: list[tuple[str, Callable[[], object]]] = [
        ("check_pure", lambda: check_pure(step, state, first)),
        ("check_deterministic", lambda: check_deterministic(step, state, first)),
        ("check_keyed", lambda: check_keyed(step, state, first)),
        ("check_dtype_stable", lambda: check_dtype_stable(step, state, first)),
        ("check_no_host_sync", lambda: check_no_host_sync(step, state, first)),
        ("check_single_graph", lambda: check_single_graph(step, state, listed, backend=backend)),
        ("check_eager_equals_compiled", lambda: check_eager_equals_compiled(step, state, first, backend=backend)),
        ("check_donation", lambda: check_donation(step, state, first)),
        ("check_roundtrip", lambda: check_roundtrip(run(step, state, first)[0])),
    ]
    if _streams(step):
        laws = [law for law in laws if law[0] in ("check_dtype_stable", "check_roundtrip")]
    held, broken, crashed = list[str](), list[LawViolation](), list[Exception]()
    for name, law in laws:
        try:
            law()
            held.append(name)
        except LawViolation as error:
            broken.append(error)
        except (CaptureError, RecompileError) as error:
            if not any(str(one).startswith("check_single_graph") for one in broken):
                crashed.append(error)
        except Exception as error:  # perhaps the consequence of a law that is broken, and that says more
            crashed.append(error)
    if len(broken) == 1:
        raise broken[0]
    if broken:
        numbered = (f"({n}) {error}" for n, error in zip(itertools.count(1), broken, strict=False))
        raise LawViolation(f"check_step: {len(broken)} laws are broken.\n\n" + "\n\n".join(numbered))
    if crashed:
        raise crashed[0]
    return Laws(tuple(held))


def _streams(step: Any) -> bool:
    inner = step.step if isinstance(step, Compiled) else step
    return isinstance(inner, TrainStep) and inner.accumulate == "stream"
