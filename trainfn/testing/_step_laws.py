"""Laws of a step: a pure function of its state and batch, whose randomness is the state's key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from trainfn import tree
from trainfn._compile import Compiled
from trainfn._types import Batch, Mean, Metrics, TrainState
from trainfn.process import generators_kept
from trainfn.testing._host import host_reads
from trainfn.testing._purity import Watched, generators_seeded, lasting
from trainfn.testing._sums import gap
from trainfn.testing._violation import differences, listed, violation

AnyStep = Callable[[Any, Any], tuple[Any, Any]]
_IN_PLACE = (
    "write `x = x + 1` for `x += 1`, and `torch.where(mask, a, b)` for `x[mask] = a`; a step returns what is new"
)
_UNUSUAL = 7_061_215  # a seed that no step sets: setting the one in force would go unnoticed
_CAUSES = {
    "state": ("the step writes into the state it was given: the caller's state is another one now.", _IN_PLACE),
    "batch": ("the step writes into the batch: the next epoch sees other rows.", _IN_PLACE),
    "generator": (
        "the step draws from a global generator, or reseeds it: its result depends on what ran before it.",
        "draw from the state: torch's random functions inside a loss do so by themselves; elsewhere"
        " `tfn.random.uniform(tfn.random.fold_in(state.key, state.step), shape)`",
    ),
    "variable": (
        "the step counts or collects in a Python variable: a compiled step runs Python once, and a restored run starts"
        " it anew.",
        "keep it in the state (`state.step` counts already, `state.extra` has room for tensors), or return it as a"
        " metric",
    ),
    "module": (
        "the step changes the module that the state was made from, not only what it returns.",
        "compute with the `model` that the loss is given; don't call `.backward()`, `optimizer.step()`, `.eval()` or"
        " register hooks in a step; what a module counts belongs into a buffer",
    ),
}


def check_pure(step: AnyStep, state: TrainState, batch: Batch) -> None:
    """Law: a step changes nothing it was given and nothing around it.

    The law watches the state and the batch to the bit, and the global generators of torch, NumPy and Python. It also
    watches the module's tensors, modes, hooks and attributes, and the Python variables that the step's functions reach.

    Args:
        step: ``(state, batch) -> (state, metrics)``. A donating step gets copies, for it may overwrite its state.
        state: Where to start; it is not changed.
        batch: A batch for it.

    Raises:
        LawViolation: Naming what was changed, the probable cause and the fix.

    >>> import torch, trainfn as tfn
    >>> optimizer = tfn.optim.sgd(0.1)
    >>> step = tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), optimizer)
    >>> check_pure(step, tfn.init({"w": torch.ones(1)}, optimizer), torch.ones(2))
    """
    before = lasting(getattr(state, "module", None))
    run(step, state, batch)  # what the first call sets up, such as a compiled program, is not a change
    given, rows = (_copied(state), batch) if _donates(step) else (state, batch)
    with generators_seeded(_UNUSUAL):
        watched = Watched(step, given, rows)
        watched.held |= before
        step(given, rows)
        changes = watched.changes()
    if _donates(step):
        changes.pop("state", None)
    if changes:
        kind = next(iter(changes))
        raise violation("check_pure", f"the step changed: {', '.join(changes)}.", changes, *_CAUSES[kind])


def check_deterministic(step: AnyStep, state: TrainState, batch: Batch, *, runs: int = 3) -> None:
    """Law: the same state and batch give the same bits, whatever the global generators hold.

    Args:
        step: ``(state, batch) -> (state, metrics)``.
        state: Where to start; it is not changed.
        batch: A batch for it.
        runs: How often to run it.

    Raises:
        LawViolation: Naming the leaves that differ.

    >>> import torch, trainfn as tfn
    >>> optimizer = tfn.optim.sgd(0.1)
    >>> step = tfn.train_step(lambda p, x: tfn.Mean.of(torch.nn.functional.dropout(p["w"] * x)), optimizer)
    >>> check_deterministic(step, tfn.init({"w": torch.ones(1)}, optimizer), torch.ones(2))
    """
    with generators_seeded(1):
        first = run(step, state, batch)
    for n in range(2, runs + 1):
        with generators_seeded(n):
            found = differences(run(step, state, batch), first)
        if found:
            raise violation(
                "check_deterministic",
                f"run {n} with the same state and batch gave other bits.",
                {"differs": listed(found)},
                "the step draws from a global generator, counts its calls in a Python variable, or uses a kernel that"
                " adds in no fixed order.",
                "draw from `state.key`; keep counters in the state; `torch.use_deterministic_algorithms(True)` names"
                " such kernels",
            )


def check_keyed(step: AnyStep, state: TrainState, batch: Batch) -> None:
    """Law: what is random in a step follows the state's key and its step count, both of them.

    A step without randomness passes: its result depends on neither.

    Args:
        step: ``(state, batch) -> (state, metrics)``.
        state: Where to start; it is not changed.
        batch: A batch for it.

    Raises:
        LawViolation: If another key gives other numbers, but the next step the same: its masks never change.

    >>> import torch, trainfn as tfn
    >>> optimizer = tfn.optim.sgd(0.1)
    >>> step = tfn.train_step(lambda p, x: tfn.Mean.of(torch.nn.functional.dropout(p["w"] * x)), optimizer)
    >>> check_keyed(step, tfn.init({"w": torch.ones(1)}, optimizer), torch.ones(2))
    """

    def metrics(state: TrainState) -> Metrics:
        found: Metrics = run(step, state, batch)[1]
        return {name: mean for name, mean in found.items() if name in ("loss", "grad_norm")}

    tried = range(1, 9)  # few rows may draw the same by chance
    here = metrics(state)
    by_key = any(differences(metrics(state._replace(key=state.key + 2 * n)), here) for n in tried)
    by_step = any(differences(metrics(state._replace(step=state.step + n)), here) for n in tried)
    if by_key and not by_step:
        raise violation(
            "check_keyed",
            "every step draws the same numbers.",
            {"tried": f"{len(tried)} other keys, which change the loss, and {len(tried)} other steps, which don't"},
            "the draws come from `state.key` alone, which never changes.",
            "`tfn.random.fold_in(state.key, state.step)`; `tfn.train_step` does so",
        )


def check_dtype_stable(step: AnyStep, state: TrainState, batch: Batch) -> None:
    """Law: a step returns a state of the same structure, dtypes, shapes and devices, one step further.

    Otherwise the second call compiles again, a donating step has no place for its result, and a checkpoint does not
    fit.

    Args:
        step: ``(state, batch) -> (state, metrics)``.
        state: Where to start; it is not changed.
        batch: A batch for it.

    Raises:
        LawViolation: Naming the leaves that changed.

    >>> import torch, trainfn as tfn
    >>> optimizer = tfn.optim.adam(0.1)
    >>> step = tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), optimizer)
    >>> check_dtype_stable(step, tfn.init({"w": torch.ones(1, dtype=torch.bfloat16)}, optimizer), torch.ones(2))
    """
    new, metrics = run(step, state, batch)
    old_kinds, new_kinds = _kinds(state), _kinds(new)
    # The first step that misses a parameter adds a count of how many it missed.
    names = [*old_kinds, *(n for n in new_kinds if n not in old_kinds and "/late/" not in n)]
    said = {
        n: f"{old_kinds.get(n, 'absent')} became {new_kinds.get(n, 'absent')}"
        for n in names
        if old_kinds.get(n) != new_kinds.get(n)
    }
    said |= {f"metric {n!r}": f"is a {type(m).__name__}" for n, m in metrics.items() if not isinstance(m, Mean)}
    if said:
        raise violation(
            "check_dtype_stable",
            "the step returns a state of another make.",
            {"changed": listed(said)},
            "a Python number or a float64 tensor widened a leaf, a leaf was added or lost, or a metric was divided.",
            "`tfn.tree.cast_like(new, old)` before returning; let `init` make the final structure; metrics are"
            " `tfn.Mean.of(values)`",
        )
    if int(new.step) != int(state.step) + 1:
        raise violation(
            "check_dtype_stable",
            "the step does not count itself.",
            {"state.step": f"{int(state.step)} became {int(new.step)}"},
            "the new state holds the old one's `step`: schedules stand still, and every step draws the same numbers.",
            "`new._replace(step=state.step + 1)`",
        )


def _kinds(t: Any) -> dict[str, str]:
    return {
        name: f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
        if isinstance(x, Tensor)
        else f"a {type(x).__name__}"
        for name, x in tree.named_leaves(t).items()
    }


def check_no_host_sync(step: AnyStep, state: TrainState, batch: Batch) -> None:
    """Law: a step never waits for the device: no number is taken out of a tensor, no shape depends on its values.

    The step is run eagerly and watched, so it need not compile.

    Args:
        step: ``(state, batch) -> (state, metrics)``.
        state: Where to start; it is not changed.
        batch: A batch for it.

    Raises:
        LawViolation: With the operations and the lines they are called from.

    >>> import torch, trainfn as tfn
    >>> optimizer = tfn.optim.adam(0.1)
    >>> step = tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), optimizer)
    >>> check_no_host_sync(step, tfn.init({"w": torch.ones(1)}, optimizer), torch.ones(2))
    """
    eager = step.step if isinstance(step, Compiled) else step
    reads = host_reads(lambda: run(eager, state, batch))
    if reads:
        raise violation(
            "check_no_host_sync",
            "the step waits for the device.",
            {"where": "\n".join(reads[:4])},
            "a number is taken out of a tensor (`.item()`, `float(x)`, `if x:`), or a shape depends on values (boolean"
            " indexing, `nonzero`, `unique`).",
            "choose with `torch.where`, weigh with a mask, return numbers as metrics: `tfn.Mean.of(x)`",
        )


def check_agrees(
    step: AnyStep,
    reference: AnyStep,
    state: TrainState,
    batches: Batch | Sequence[Batch],
    *,
    tolerance: float = 1e-5,
) -> None:
    """Law: a step takes the steps of a reference: the plain loop, what it was before a change, or one device's.

    Both start from the same state; what the reference's state and metrics do not have is not compared.

    Args:
        step: ``(state, batch) -> (state, metrics)``.
        reference: The same.
        state: Where to start; it is not changed.
        batches: A batch, which is then used three times, or a list of them.
        tolerance: The largest deviation, relative to the largest element of a leaf.

    Raises:
        LawViolation: Naming the step and the leaf, and whether it is one step behind.

    >>> import torch, trainfn as tfn
    >>> optimizer = tfn.optim.adam(0.1)
    >>> step = tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), optimizer)
    >>> check_agrees(tfn.accumulate(step, 2), step, tfn.init({"w": torch.ones(1)}, optimizer), torch.ones(2))
    """
    mine, theirs, before = state, state, _numbers((state,))
    for n, batch in enumerate(batches if isinstance(batches, list) else [batches] * 3, 1):
        mine, got = run(step, mine, batch)
        theirs, expected = run(reference, theirs, batch)
        found, wanted = _numbers((mine, got)), _numbers((theirs, expected))
        lost = wanted.keys() - found.keys()
        worst = gap(found, {name: x for name, x in wanted.items() if name not in lost})
        if lost or worst.size > tolerance:
            late = worst.where in before and gap({"": found[worst.where]}, {"": before[worst.where]}).size <= tolerance
            raise violation(
                "check_agrees",
                "the step does not agree with its reference.",
                {"step": str(n), "differs": str(worst) if worst.where else "", "lost": ", ".join(sorted(lost))},
                "it is one step behind: it is made from the old state's tree, not from the new one's."
                if late
                else "another formula, another order of what is done, or another tree that it is made from.",
                "compare the two at the step and the leaf named",
            )
        before = wanted


def _numbers(t: Any) -> dict[str, Tensor]:
    return {name: x.detach().double() for name, x in tree.named_leaves(t).items()}


def run(step: AnyStep, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """A call that leaves the caller's state, batch and generators alone, whatever the step does with its own."""
    with generators_kept():
        return step(_copied(state), tree.copy(batch))


def _copied(state: TrainState) -> TrainState:
    return tree.copy(state)


def _donates(step: AnyStep) -> bool:
    return isinstance(step, Compiled) and any(program.donate for program in step._programs)
