"""Laws of optimizers and schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainfn import random, tree
from trainfn._compile import jit
from trainfn._types import Params, Schedule, Transform
from trainfn.errors import CaptureError, RecompileError
from trainfn.optim import chain, identity
from trainfn.testing._compiled_laws import QUICK
from trainfn.testing._step_laws import _kinds
from trainfn.testing._sums import gap
from trainfn.testing._things import random_like
from trainfn.testing._violation import differences, listed, violation

_SHAPES = {"layer.weight": (3, 4), "layer.bias": (3,), "norm.weight": (4,), "temperature": ()}


def check_transform(
    optimizer: Transform,
    params: Params | None = None,
    *,
    reference: Callable[[list[torch.nn.Parameter]], Any] | None = None,
    steps: int = 10,
    tolerance: float = 1e-4,
) -> None:
    """Law: an optimizer is a pair of pure functions over trees of tensors, and compiles once.

    `init` and `update` change nothing they are given; updates have the parameters' structure, dtypes and shapes; the
    state is made of tensors, keeps its make, and shares no memory with the parameters; zero gradients give finite
    updates; two calls compile one graph, with the same result; inside a `chain` it does the same.

    Args:
        optimizer: From `trainfn.optim`, or your own.
        params: A dict of tensors to update; by default a small one with a matrix, vectors and a scalar.
        reference: ``parameters -> torch optimizer``, which must then take the same steps.
        steps: How many to take.
        tolerance: The largest deviation from the reference, relative to the largest element of a leaf.

    Raises:
        LawViolation: Naming the part of the contract that is broken.

    >>> import trainfn as tfn
    >>> check_transform(tfn.optim.adam(1e-2), reference=lambda params: torch.optim.Adam(params, 1e-2))
    """
    params = _default_params() if params is None else params
    _check_state(optimizer, params)
    _check_update(optimizer, params)
    _check_chain(optimizer, params)
    _check_compiles(optimizer, params)
    if reference is not None:
        _check_reference(optimizer, params, reference, steps, tolerance)


def _default_params() -> Params:
    return {name: random.normal(random.key(i), shape) for i, (name, shape) in enumerate(_SHAPES.items())}


def _gradients(params: Params, n: int) -> Params:
    return random_like(params, random.fold_in(random.key(3), n))


def _broken(headline: str, said: str, cause: str, fix: str) -> Exception:
    return violation("check_transform", headline, {"found": said}, cause, fix)


def _check_state(optimizer: Transform, params: Params) -> None:
    before = tree.copy(params)
    state = optimizer.init(params)
    changed = differences(params, before)
    if changed:
        raise _broken("`init` changes the parameters.", listed(changed), "an in-place operation.", "return new tensors")
    strange = {n: f"a {type(x).__name__}" for n, x in tree.named_leaves(state).items() if not isinstance(x, Tensor)}
    if strange:
        raise _broken(
            "the state holds something that is not a tensor.",
            listed(strange),
            "a Python number in the state is a constant of the compiled step: it never changes.",
            "`torch.zeros((), dtype=torch.int64)` for a counter",
        )
    theirs = {p.untyped_storage().data_ptr() for p in params.values() if p.numel()}
    shared = {
        name: "is the parameter's memory"
        for name, x in tree.named_leaves(state).items()
        if x.numel() and x.untyped_storage().data_ptr() in theirs
    }
    if shared:
        raise _broken(
            "the state shares memory with the parameters.",
            listed(shared),
            "a leaf starts as the parameter itself; a donating step would overwrite it.",
            "`tfn.tree.copy(params)`",
        )


def _check_update(optimizer: Transform, params: Params) -> None:
    state, grads = optimizer.init(params), _gradients(params, 0)
    kinds, before = (_kinds(params), _kinds(state)), tree.copy((grads, state, params))
    updates, new = optimizer.update(grads, state, params)
    changed = differences((grads, state, params), before)
    if changed:
        raise _broken(
            "`update` changes its arguments.",
            listed(changed),
            "an in-place operation (`mul_`, `add_`, `+=`).",
            "return new tensors; `trainfn.tree` has `add`, `mul`, `lerp` for whole trees",
        )
    for what, got, want in (("updates", updates, kinds[0]), ("state", new, kinds[1])):
        kinds_now = _kinds(got)
        wrong = {n: f"{want.get(n, 'absent')} became {kinds_now.get(n, 'absent')}" for n in want | kinds_now if
                 kinds_now.get(n) != want.get(n)}  # fmt: skip
        if wrong:
            raise _broken(
                f"the {what} are of another make than what `update` was given.",
                listed(wrong),
                "a leaf was widened, added, lost or reshaped.",
                "`tfn.tree.cast_like(updates, params)`; make the whole state in `init`",
            )
    again = optimizer.update(grads, state, params)
    changed = differences(again, (updates, new))
    if changed:
        raise _broken(
            "the same arguments give another update.",
            listed(changed),
            "a count or an average is kept in a Python variable, or a global generator is drawn from.",
            "keep it in the state, as a tensor",
        )
    zeros, _ = optimizer.update(tree.zeros_like(params), state, params)
    bad = {name: "is NaN or infinite" for name, x in zeros.items() if not bool(torch.isfinite(x).all())}
    if bad:
        raise _broken("zero gradients give no finite update.", listed(bad), "0 / 0.", "add an epsilon to the divisor")


def _run(optimizer: Transform, params: Params, steps: int, update: Callable[..., Any] | None = None) -> Params:
    state = optimizer.init(params)
    for n in range(steps):
        updates, state = (update or optimizer.update)(_gradients(params, n), state, params)
        params = tree.add(params, updates)
    return params


def _check_chain(optimizer: Transform, params: Params) -> None:
    found = differences(_run(chain(identity(), optimizer), params, 3), _run(optimizer, params, 3))
    if found:
        raise _broken(
            "in a chain it does something else.",
            listed(found),
            "it keeps something outside of its state.",
            "keep it in the state that `init` returns",
        )


def _check_compiles(optimizer: Transform, params: Params) -> None:
    program = jit(lambda s, grads: optimizer.update(grads, s[0], s[1]), backend=QUICK, max_graphs=1)
    try:
        got = _run(optimizer, params, 3, lambda grads, state, params: program((state, params), grads))
    except CaptureError as error:
        raise _broken("it can't be compiled.", str(error), "see above.", "see above") from error
    except RecompileError as error:
        raise _broken(
            "it compiles again at a later step.",
            str(error),
            "the state holds a Python number, or changes its structure.",
            "`torch.zeros((), dtype=torch.int64)` for a counter",
        ) from error
    found = gap(got, _run(optimizer, params, 3))
    if found.size > 1e-4:
        raise _broken(
            "compiled, it does something else.", str(found), "a Python variable was frozen.", "keep it in the state"
        )


def _check_reference(
    optimizer: Transform, params: Params, reference: Callable[..., Any], steps: int, tolerance: float
) -> None:
    theirs = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    torch_optimizer, ours, state = reference(list(theirs.values())), params, optimizer.init(params)
    ratios: list[float] = []
    parallel = True
    for n in range(steps):
        grads = _gradients(params, n)
        before = {name: p.detach().clone() for name, p in theirs.items()}
        for name, p in theirs.items():
            p.grad = grads[name].clone()
        torch_optimizer.step()
        updates, state = optimizer.update(grads, state, ours)
        ours = tree.add(ours, updates)
        moved = {name: p.detach() - before[name] for name, p in theirs.items()}
        ratios.append(_ratio(updates, moved))
        parallel = parallel and gap(updates, tree.mul(moved, ratios[-1])).size < 1e-3
        expected = {name: p.detach() for name, p in theirs.items()}
        worst = gap(ours, expected)
        if worst.size > tolerance:
            raise violation(
                "check_transform",
                "it does not take the reference's steps.",
                {"step": str(n + 1), "differs": str(worst), "step lengths": _said(ratios)},
                *_why(ratios, parallel),
            )


def _ratio(updates: Params, moved: Params) -> float:
    a, b = (torch.cat([t[name].flatten().double() for name in moved]) for t in (updates, moved))
    return float((a * b).sum() / (b * b).sum().clamp(min=1e-30))


def _said(ratios: Sequence[float]) -> str:
    return "ours over the reference's: " + ", ".join(f"{r:.3g}" for r in ratios)


def _why(ratios: Sequence[float], parallel: bool) -> tuple[str, str]:
    first = ratios[0]
    if first < 0:
        return "the sign: it climbs.", "an update is added to the parameters: `-learning_rate * gradient`"
    if len(ratios) == 1 and not parallel:
        return (
            "already the first step points elsewhere: weight decay is added to the gradient instead of to the update,"
            " or the other way round; or it is taken at the wrong side of the step; or the formula is another.",
            "AdamW: `-learning_rate * (direction + weight_decay * params)`, with the parameters before the step",
        )
    if len(ratios) == 1 and abs(first - 1) > 1e-3:
        return (
            "already the first step has another length: bias correction is forgotten, or done with a count that starts"
            " at 0; or the learning rate is another.",
            "`1 - b ** count` with the count of this step, which is 1 at the first",
        )
    return (
        "the first step agrees, a later one does not: a moment is updated in another order or with another decay;"
        " or a schedule is off by one.",
        "compare the state with the reference's, leaf by leaf, at the step named",
    )


def check_schedule(
    schedule: Schedule,
    *,
    total_steps: int = 100,
    reference: Callable[[int], float] | Iterable[float] | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Law: a schedule maps the number of completed steps to a finite ``float32[]``, and compiles once.

    Args:
        schedule: ``step -> value``, tensors in and out.
        total_steps: How far to look.
        reference: What it must equal: a function of the step, or the values from step 0 on.
        tolerance: The largest deviation from the reference, relative to the largest value.

    Raises:
        LawViolation: Naming the step, and whether the schedule is off by one.

    >>> import trainfn as tfn
    >>> check_schedule(tfn.schedules.linear(1.0, 10), total_steps=10, reference=lambda n: 1 - n / 10)
    """
    steps = range(total_steps + 1)
    values = [schedule(torch.tensor(n)) for n in steps]
    for n, value in enumerate(values):
        if not isinstance(value, Tensor) or value.shape != () or not value.is_floating_point():
            said = f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            why = "a Python number is a constant of the compiled step: it would never change; or a shape of [1]."
            raise _wrong("it returns something else than a float scalar.", n, said, why, "compute with tensors")
        if not bool(torch.isfinite(value)):
            raise _wrong("it is not finite.", n, repr(value.item()), "a division by 0.", "guard the divisor")
    _check_schedule_compiles(schedule, values)
    if reference is not None:
        expected = [float(reference(n)) for n in steps] if callable(reference) else [float(v) for v in reference]
        _check_values([float(v) for v in values], expected, tolerance)


def _wrong(headline: str, step: int, said: str, cause: str, fix: str) -> Exception:
    return violation("check_schedule", headline, {"step": str(step), "value": said}, cause, fix)


def _check_schedule_compiles(schedule: Schedule, values: list[Tensor]) -> None:
    program = jit(lambda _, count: schedule(count), backend=QUICK, max_graphs=1)
    for n in (0, 1, len(values) // 2, len(values) - 1):
        try:
            got = program((), torch.tensor(n))
        except (CaptureError, RecompileError) as error:
            raise _wrong(
                "it can't be compiled once for all steps.",
                n,
                str(error),
                "it branches on the step, makes a Python number of it, or counts its calls.",
                "`torch.where(step < warmup, rising, falling)`",
            ) from error
        if not torch.allclose(got, values[n], rtol=1e-5, atol=0.0):
            raise _wrong(
                "compiled, it gives another value.",
                n,
                f"{got.item():.6g}, not {values[n].item():.6g}",
                "it keeps or changes a Python variable.",
                "compute from the step alone",
            )


def _check_values(values: list[float], expected: list[float], tolerance: float) -> None:
    scale = max(map(abs, expected), default=1.0) or 1.0

    def first_difference(shift: int) -> int | None:
        pairs = ((n, n + shift) for n in range(min(len(values), len(expected))) if 0 <= n + shift < len(expected))
        return next((n for n, m in pairs if abs(values[n] - expected[m]) > tolerance * scale), None)

    n = first_difference(0)
    if n is None:
        return
    late = first_difference(-1) is None
    early = first_difference(1) is None
    cause = (
        f"it is off by one: it runs a step {'late' if late else 'early'}. A schedule gets the number of completed"
        " steps, 0 at the first."
        if late or early
        else "another shape, warm-up or total."
    )
    said = f"{values[n]:.6g}, not {expected[n]:.6g}"
    fix = "use the count as it is given, without adding or subtracting one" if late or early else "compare the formulas"
    raise _wrong("it is not the reference.", n, said, cause, fix)
