"""Capture a step and what it reads from outside, or say why that can't be done."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from trainfn._compile._graph import drawing
from trainfn._compile._leaks import seal, undo
from trainfn._compile._lines import Lines, lines_of
from trainfn._compile._outside import Change, Outside
from trainfn._compile._structure import Arguments, Function, Structure
from trainfn._compile._trace import Trace, donation, trace
from trainfn.errors import CaptureError, LeakedError, TrainfnError

_NUMBER = (
    "a number was taken out of a tensor. Keep it a tensor; what should be logged goes into the metrics,"
    ' `return mean, {"name": tfn.Mean.of(x)}`, and reaches the callbacks as a number.'
)
_BRANCH = "a branch depends on a tensor's values. Choose with `torch.where(condition, a, b)`."
_SHAPE = "a shape depends on a tensor's values. Keep the shape and weigh with a mask: `tfn.Mean.of(values, mask)`."
_TESTED = r"_local_scalar_dense[\s\S]*\n(if|elif|while|assert|not) |_local_scalar_dense[\s\S]*\n.* (if|and|or|not) "
_EXPERTS = (
    "torch's grouped matrix product of experts can't be captured here. For a model of transformers, write"
    ' `model.set_experts_implementation("batched_mm")` before `init`.'
)
# The function of torch that was called last, or the error's text, points to the cause. The first match counts.
_REMEDIES = (
    (r"grouped_mm", _EXPERTS),
    (r"^(__bool__|is_nonzero|equal|allclose)$", _BRANCH),
    (r"^(item|tolist|numpy|__float__|__int__|__index__|__array__|__contains__|__complex__)$", _NUMBER),
    (r"^(nonzero|masked_select|unique|unique_consecutive|argwhere|bincount|__getitem__|repeat_interleave)$", _SHAPE),
    (_TESTED, _BRANCH),
    (r"_local_scalar_dense|\.item\(\)|\.numpy\(\)|tolist", _NUMBER),
    (r"[Dd]ata-dependent|[Dd]ata dependent|GuardOnDataDependent", _BRANCH),
    (r"nonzero|masked_select|DynamicOutputShape|unique", _SHAPE),
)
_COMPILER = (
    r"InvalidCxxCompiler|No working C\+\+ compiler|CppCompileError",
    "torch's compiler needs a C++ compiler on this machine and found none that works. Install g++ or clang++, or"
    " name one in the environment variable CXX.",
)
_INSTEAD = "To run it as it is, without compiling: `tfn.jit(step, compile=False)`."


class Call(NamedTuple):
    """A function and its arguments, as they are to be captured.

    Attributes:
        fn: Any pure function.
        args: Its arguments, ``(state, batch, ...)``.
        leaves: Their leaves.
        form: Their structure.
        donated: For each leaf of the state, whether its new value takes its memory; or empty.
        module: The module of the state.
        dynamic: For leaves of any size: which of their dimensions.
    """

    fn: Function
    args: Arguments
    leaves: Sequence[Any]
    form: Structure
    donated: list[bool]
    module: nn.Module | None
    dynamic: Mapping[int, Sequence[int]]


def capture(given: Call) -> tuple[Trace, Outside]:
    """Return a function's graph, and what the function read from outside.

    A function that changes what it reads is traced again. If the second graph is another one, or needs a tensor of the
    first trace, then the step is not a function of its arguments.

    Raises:
        CaptureError: If the function runs eagerly, but has no graph.
        RandomnessError: If it draws from a generator outside the state.
    """
    fn, args, module, reads = given.fn, given.args, given.module, list[Tensor]()

    def once() -> Trace:
        return _traced(given, reads)

    before = Outside([fn], module)
    try:
        first = once()
    except BaseException:
        undo(before.changes())
        raise
    changes = before.changes()
    if not changes:
        before.watch(reads)
        return first, before
    seal(changes, first.mode)
    try:
        second = once()
    except LeakedError:
        # It may have been filling a cache, such as a mask of the largest length: an eager run does it with numbers.
        undo(changes)
        fn(*args)
        before = Outside([fn], module)
        second = first = once()
        if again := before.changes():
            seal(again, second.mode)
            raise CaptureError(_stateful(again)) from None
    after = before.changes()
    seal(after, second.mode)
    if second.key != first.key:
        raise CaptureError(_stateful(changes))
    outside = Outside([fn], module, frozenset(change.place for change in (*changes, *after)))
    outside.watch(reads)
    return second, outside


def _stateful(changes: list[Change]) -> str:
    names = ", ".join(dict.fromkeys(change.name for change in changes))
    return (
        f"this step runs, but can't be compiled: it writes {names}, and what it computes depends on it. A compiled"
        " step does not run Python again, so the next step would not see what this one wrote. Keep it in a buffer,"
        f" `module.register_buffer(...)`, or in `state.extra`.\n{_INSTEAD}"
    )


def _traced(given: Call, reads: list[Tensor]) -> Trace:
    fn, args, leaves, form, donated, module, dynamic = given
    lines = Lines()
    try:
        found = trace(fn, leaves, form, donated=donated, dynamic=dynamic, modules=module, lines=lines)
    except (TrainfnError, Warning):  # a warning that the user's filters make an error is not one of the capture
        raise
    except Exception as error:
        out = fn(*args)  # pure, so it can be run with numbers: an error of the step's own is the one to show
        if donated:
            donation(donated, form, leaves, out)
        raise _capture_error(error, lines.asked) from error
    reads += lines.read
    if (node := drawing(found.graph)) is not None:
        raise _unkeyed(node)
    return found


def _capture_error(error: Exception, asked: str) -> CaptureError:
    """The error for a step that runs eagerly but can't be captured."""
    lines = lines_of(error.__traceback__)
    place = (
        f"\n\n  {lines[-1].file}:{lines[-1].number}, in {lines[-1].function}\n    {lines[-1].text}\n" if lines else "\n"
    )
    texts = (asked, f"{type(error).__name__}: {error}\n{lines[-1].text if lines else ''}")
    cause = next((remedy for pattern, remedy in _REMEDIES for text in texts if re.search(pattern, text)), None)
    reason = (
        cause or f"torch says: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
    )
    return CaptureError(
        f"this step runs, but can't be compiled as one graph:{place}\n{reason[0].upper() + reason[1:]}\n{_INSTEAD}"
    )


def _unkeyed(node: fx.Node) -> CaptureError:
    where = node.stack_trace or ""
    return CaptureError(
        f"this step runs, but can't be compiled as one graph:\n\n{where}\n`{node.target}` draws from torch's global"
        " generator by a way that can't be rerouted to state.key. Draw it before the step and pass it in the batch.\n"
        f"{_INSTEAD}"
    )


def compiler_error(error: Exception) -> CaptureError:
    """The error for a graph that torch's compiler could not compile."""
    text = f"{type(error).__name__}: {error}"
    said = text.strip().splitlines()[0]
    reason = _COMPILER[1] if re.search(_COMPILER[0], text) else f"torch's compiler could not compile its graph: {said}"
    return CaptureError(
        f"this step runs, but can't be compiled as one graph:\n\n{reason[0].upper() + reason[1:]}\n{_INSTEAD}"
        '\nTo run the captured graph itself: `tfn.jit(step, backend="eager")`.'
    )
