"""Laws of a state and of a run: what is saved comes back, and a run that stops goes on as if it had not."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainfn import tree
from trainfn._checkpoint import restore, save
from trainfn._run._fit import fit
from trainfn._types import Batch, Metrics, TrainState, Tree
from trainfn.process import generators_kept
from trainfn.testing._step_laws import AnyStep
from trainfn.testing._sums import gap
from trainfn.testing._violation import differences, listed, violation

MakeRun = Callable[[], tuple[AnyStep, TrainState, Any]]


def check_roundtrip(state: TrainState) -> None:
    """Law: `trainfn.save`, then `trainfn.restore`, is the identity, to the bit.

    Args:
        state: It is not changed.

    Raises:
        LawViolation: Naming the leaves that did not come back.

    >>> import trainfn as tfn
    >>> check_roundtrip(tfn.init(torch.nn.Linear(2, 1), tfn.optim.adam(1e-3)))
    """
    strange = {n: f"a {type(x).__name__}" for n, x in tree.named_leaves(state).items() if not isinstance(x, Tensor)}
    if strange:
        raise violation(
            "check_roundtrip",
            "the state can't be saved.",
            {"found": listed(strange)},
            "a leaf is not a tensor: a Python number, or a function of the optimizer.",
            "`torch.tensor(...)`; make states with `tfn.init`",
        )
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "state", state)
        blank = tree.map(lambda x: torch.zeros_like(x), state)
        found = differences(restore(Path(folder) / "state", like=blank), state)
    if found:
        raise violation(
            "check_roundtrip",
            "the state does not come back as it was saved.",
            {"differs": listed(found)},
            "a leaf is of a tensor class of its own, or changes while it is saved.",
            "states hold plain tensors, made with `tfn.init`",
        )


def check_resume_bitexact(make_run: MakeRun, *, steps: int = 6) -> None:
    """Law: a run that is stopped after any step and goes on in a new process ends in the same bits.

    Each part of the run is made anew, as a new process would, and begins with the state that the part before it
    saved.

    Args:
        make_run: ``() -> (step, state, batches)``: all that your script builds before `trainfn.fit`, and what it
            gives to it. Batches are a function of the step, or an object with a ``start(step)``.
        steps: The length of the run.

    Raises:
        LawViolation: Naming the step after which it goes another way, and whether it saw another batch.

    >>> import trainfn as tfn
    >>> def make_run():
    ...     optimizer = tfn.optim.adam(0.1)
    ...     step = tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), optimizer)
    ...     return step, tfn.init({"w": torch.ones(1)}, optimizer), lambda n: torch.full((2,), float(n))
    >>> check_resume_bitexact(make_run)
    """
    with generators_kept():
        _check_stops(make_run, steps)


def _check_stops(make_run: MakeRun, steps: int) -> None:
    whole, seen = _part(make_run, None, steps)
    for stop in range(1, steps):
        with tempfile.TemporaryDirectory() as folder:
            first, _ = _part(make_run, None, stop)
            save(Path(folder) / "state", first)
            last, again = _part(make_run, Path(folder) / "state", steps)
        other = next((n for n, batch in again.items() if differences(batch, seen[n])), None)
        found = differences(last, whole)
        if found or other is not None or again.keys() != set(range(stop, steps)):
            raise _not_the_same(stop, other, again, seen, found)


def _part(make_run: MakeRun, path: Path | None, until: int) -> tuple[TrainState, dict[int, Batch]]:
    """A part of the run, and the batches it saw by step."""
    step, state, batches = make_run()
    if path is not None:
        state = restore(path, like=state)
    seen: dict[int, Batch] = {}
    first = int(state.step)

    def watched(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        seen[first + len(seen)] = tree.copy(batch)
        return step(state, batch)

    return fit(watched, state, batches, until=until), seen


def _not_the_same(
    stop: int, other: int | None, again: dict[int, Batch], seen: dict[int, Batch], found: Any
) -> Exception:
    facts = {"stopped after": f"step {stop}", "differs": listed(found)}
    if other is not None:
        same = next((n for n, batch in seen.items() if not differences(batch, again[other])), None)
        was = f"the batch of step {same}" if same is not None else "one that the whole run never saw"
        facts["data"] = f"step {other} saw {was}"
        return violation(
            "check_resume_bitexact",
            "after a stop the run sees other rows.",
            facts,
            "the data depends on how far an iterator ran, or on a global generator, not on the step.",
            "give `fit` a function of the step, `lambda n: batch`, or a `tfn.data` loader, which starts anywhere",
        )
    return violation(
        "check_resume_bitexact",
        "the run goes another way after a stop.",
        facts,
        "something that the step uses is not in the state: a Python counter, an average or a moment kept elsewhere, a"
        " global generator.",
        "keep it in `state.extra` or `state.opt_state`, as a tensor; draw from `state.key`",
    )


def _fewer_in_reverse(x: Any) -> Any:
    """Reverse the rows and drop one, to see whether a row's place counts and whether their number does."""
    return x.flip(0)[: max(1, len(x) - 1)] if isinstance(x, Tensor) and x.dim() else x


def check_equivariant(
    fn: Callable[[Any], Tree],
    inputs: Tree,
    action: Callable[[Tree], Tree] | None = None,
    result_action: Callable[[Tree], Tree] | None = None,
    *,
    tolerance: float = 1e-5,
) -> None:
    """Law: to change the inputs and then compute is to compute and then change the result.

    Args:
        fn: Any function of ``inputs``, such as a module.
        inputs: A tree of tensors.
        action: The change of the inputs; by default the rows in reverse order, without the first.
        result_action: The change of the result; by default, the same.
        tolerance: The largest deviation, relative to the largest element of a leaf.

    Raises:
        LawViolation: Naming the leaf that deviates most.

    >>> check_equivariant(torch.nn.Linear(2, 3), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    """
    change = action or (lambda t: tree.map(_fewer_in_reverse, t))
    change_result = result_action or change
    with torch.no_grad(), generators_kept():
        found, expected = (
            {name: x.double() for name, x in tree.named_leaves({"result": t}).items()}
            for t in (fn(change(tree.copy(inputs))), change_result(fn(tree.copy(inputs))))
        )
    worst = gap(found, expected)
    if worst.size > tolerance:
        raise violation(
            "check_equivariant",
            "changing the inputs does not change the result in the same way.",
            {"differs": str(worst)},
            "the function looks across rows (batch normalization in training mode, attention over the batch), or at a"
            " row's place; or it is random." if action is None else "the function singles out what the action moves.",
            "compare in eval mode; compute each row from itself" if action is None else "see whether `result_action`"
            " is what the action should do to the result",
        )  # fmt: skip
