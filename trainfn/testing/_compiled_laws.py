"""Laws of a compiled step: the same numbers, one graph, a state that is used up cleanly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from trainfn import tree
from trainfn._compile import Compiled, jit
from trainfn._types import Batch, TrainState
from trainfn.errors import CaptureError, DonatedStateError, RecompileError
from trainfn.process import generators_kept
from trainfn.testing._step_laws import AnyStep, _numbers, run
from trainfn.testing._sums import gap
from trainfn.testing._violation import differences, listed, violation

QUICK = "eager"  # runs the captured graph itself: a second instead of a minute


def _eager(step: AnyStep) -> AnyStep:
    return step.step if isinstance(step, Compiled) else step


def check_eager_equals_compiled(
    step: AnyStep,
    state: TrainState,
    batch: Batch,
    *,
    backend: str | Callable[..., Any] = "inductor",
    steps: int = 2,
    tolerance: float = 1e-4,
) -> None:
    """Law: compiled, a step gives the numbers it gives eagerly, up to the order of floating-point operations.

    Args:
        step: ``(state, batch) -> (state, metrics)``.
        state: Where to start; it is not changed.
        batch: A batch for it.
        backend: The backend of ``torch.compile``; ``"eager"`` runs the captured graph itself: quick.
        steps: How many to take.
        tolerance: The largest deviation, relative to the largest element of a leaf.

    Raises:
        LawViolation: Naming the leaf that deviates most.
        CaptureError: If the step can't be compiled.

    >>> import torch, trainfn as tfn
    >>> optimizer = tfn.optim.adam(0.1)
    >>> step = tfn.train_step(lambda p, x, mean=tfn.Mean.of: mean(p["w"] * x), optimizer)
    >>> state = tfn.init({"w": torch.ones(1)}, optimizer)
    >>> check_eager_equals_compiled(step, state, torch.ones(2), backend="eager")
    """
    eager, compiled = _eager(step), jit(_eager(step), backend=backend)
    one, two = state, state
    for n in range(1, steps + 1):
        one, expected = run(eager, one, batch)
        two, got = run(compiled, two, batch)
        found, wanted = _numbers((two, got)), _numbers((one, expected))
        worst = gap(found, wanted)
        if worst.size > tolerance:
            raise violation(
                "check_eager_equals_compiled",
                "the compiled step computes something else.",
                {"step": str(n), "differs": str(worst)},
                "a Python branch or variable was frozen when the step was traced; or numbers so close to a jump, or"
                " gradients so close to 0 under Adam, that rounding decides.",
                "branch with `torch.where`, keep counters in the state; compare in float64 to rule rounding out",
            )


def check_single_graph(
    step: AnyStep,
    state: TrainState,
    batches: Batch | Sequence[Batch],
    *,
    max_graphs: int = 1,
    backend: str | Callable[..., Any] = QUICK,
) -> None:
    """Law: a step compiles as one graph, and further steps and batches do not compile again.

    A step with accumulation has two programs, of so many graphs each.

    Args:
        step: ``(state, batch) -> (state, metrics)``.
        state: Where to start; it is not changed.
        batches: A batch, or a list of them; their shapes may differ if ``max_graphs`` allows for it.
        max_graphs: Graphs per program.
        backend: The backend of ``torch.compile``.

    Raises:
        LawViolation: With the line that can't be captured, or with what made torch compile again.

    >>> import torch, trainfn as tfn
    >>> optimizer = tfn.optim.adam(0.1)
    >>> step = tfn.train_step(lambda p, x, mean=tfn.Mean.of: mean(p["w"] * x), optimizer)
    >>> check_single_graph(step, tfn.init({"w": torch.ones(1)}, optimizer), [torch.ones(2), torch.zeros(2)])
    """
    compiled = jit(_eager(step), backend=backend, max_graphs=max_graphs)
    try:
        for batch in batches if isinstance(batches, list) else [batches]:
            for _ in range(2):
                state, _ = run(compiled, state, batch)
    except (CaptureError, RecompileError) as error:
        headline = "it compiles again." if isinstance(error, RecompileError) else "the step is not a single graph."
        raise violation(
            "check_single_graph",
            headline,
            {"torch.compile": str(error)},
            "see above.",
            "the message names the line or the argument; `step.explain()` of a compiled step counts its graphs",
        ) from error


def check_donation(step: AnyStep, state: TrainState, batch: Batch, *, steps: int = 3) -> None:
    """Law: a step may overwrite its state: it gives the same bits, and the old state says so when used.

    Args:
        step: ``(state, batch) -> (state, metrics)``.
        state: Where to start; it is not changed.
        batch: A batch for it.
        steps: How many to take.

    Raises:
        LawViolation: If the results differ, memory is shared, or a used state can be used again.

    >>> import torch, trainfn as tfn
    >>> optimizer = tfn.optim.adam(0.1)
    >>> step = tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), optimizer)
    >>> check_donation(step, tfn.init({"w": torch.ones(1)}, optimizer), torch.ones(2))
    """
    plain, donating = _eager(step), jit(_eager(step), donate=True, compile=False)
    expected: list[Any] = []
    theirs, mine = state, _copied(state)
    for _ in range(steps):
        expected.append(run(plain, theirs, batch))
        theirs = expected[-1][0]
    for n, wanted in enumerate(expected, 1):  # on its own: what the step keeps elsewhere must be of this run
        old = mine
        with generators_kept():
            mine, got = donating(mine, tree.copy(batch))
        found = differences((mine, got), wanted)
        if found:
            raise violation(
                "check_donation",
                f"step {n} differs once the state's memory is reused.",
                {"differs": listed(found)},
                "two leaves of the state share memory, such as an average that starts as the parameters themselves; or"
                " the step keeps a tensor of its state elsewhere.",
                "copy when a leaf starts as another: `tfn.tree.copy(state.params)`",
            )
        _must_be_dead(donating, old, batch)


def _copied(state: TrainState) -> TrainState:
    """A copy in which two leaves share memory where they did."""
    copies: dict[Any, Any] = {}

    def copied(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.numel():
            return x
        return copies.setdefault((x.data_ptr(), x.dtype, x.shape, x.stride()), x.clone())

    return tree.map(copied, state)


def _must_be_dead(step: AnyStep, state: TrainState, batch: Batch) -> None:
    try:
        step(state, tree.copy(batch))
    except DonatedStateError:
        return
    raise violation(
        "check_donation",
        "a state that was given away can be used again.",
        {"state": repr(state)},
        "the state holds no tensors in dicts, so there is nothing to give.",
        "make states with `tfn.init`",
    )
