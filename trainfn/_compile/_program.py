"""A function of a state and a batch, captured and compiled at the first call with each kind of arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Hashable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from trainfn import tree
from trainfn._bound import CONSUMED, COPIED, Unprotected
from trainfn._compile._ahead import Helper, order
from trainfn._compile._backend import Built, Settings, build, is_built
from trainfn._compile._capture import Call, capture
from trainfn._compile._donate import check_result, overwrite, without_grown
from trainfn._compile._entry import Early, Entry, Known, largest
from trainfn._compile._outside import Outside, environment
from trainfn._compile._report import Report
from trainfn._compile._sizes import Seen, dimensions
from trainfn._compile._straight import taker
from trainfn._compile._structure import Arguments, Function, Leaves, Misfit, Row, Structure, flatten, structure
from trainfn._compile._trace import Trace, donation
from trainfn._dtensor import held, spec_of
from trainfn._marks import Again
from trainfn._reached import is_settled, late_in, settled
from trainfn._text import shortened
from trainfn._types import TrainState
from trainfn.errors import RecompileError

_Signature = tuple[Hashable, ...]
_MOST_KINDS = 256  # of arguments: each keeps its state's module alive


class Program:
    """A function ``(state, batch, …) -> …``, captured and compiled at the first call with each kind of arguments.

    The kind is all that Python can see: structure, shapes, dtypes, devices, numbers and strings in the batch, torch's
    settings. What the function read from elsewhere is compared before each call; if it changed, the function is
    captured again.
    """

    def __init__(self, fn: Function, settings: Settings, *, donate: bool, name: str) -> None:
        self.fn, self.settings, self.donate, self.name = fn, settings, donate, name
        self.report = Report()
        self._entries: dict[_Signature, list[Entry]] = {}
        # The shapes that each was first needed for; and the program, once it is compiled.
        self._shapes: dict[Hashable, dict[str, str]] = {}
        self._programs: dict[Hashable, Built] = {}
        self._early: dict[_Signature, Early] = {}
        self.helper: Helper | None = None
        self._signatures: dict[Hashable, int] = {}
        self._takers: dict[int, Callable[[Any], Leaves]] = {}
        self._known: Known | None = None
        self._rest: Structure | None = None
        self._rest_number = -1
        self._copied = frozenset[str]()  # parameters that the forward pass writes to
        self._seen = Seen() if settings.dynamic == "auto" else None

    def __call__(self, state: Any, *rest: Any) -> Any:
        run = self._compiled if self.settings.compile else self._eager
        # A step computes its gradients itself. Torch's recording would build a graph that nobody uses, at each call.
        if not torch.is_grad_enabled():
            return self._started(run, state, rest)
        torch._C._set_grad_enabled(False)  # as `torch.no_grad` does, in a tenth of its time
        try:
            return self._started(run, state, rest)
        finally:
            torch._C._set_grad_enabled(True)

    def _started(self, run: Callable[[Any, Arguments], Any], state: Any, rest: Arguments) -> Any:
        """Run; once more, if the step asks for another state to start from."""
        try:
            return run(state, rest)
        except Again as ask:
            prepared = ask.prepared(state)
        out = self._started(run, prepared, rest)
        if self.donate:
            flatten(state)[1].retire(state)
        return out

    def _eager(self, state: Any, rest: Arguments) -> Any:
        if not self.donate:
            return self.fn(state, *rest)
        old, form = flatten((state, *rest))
        first = form.children[0]  # type: ignore[union-attr]
        donated = self._donated(form)
        _separate(donated, old)
        with _set(CONSUMED, True):
            given = form.build(iter(old))
            out = self.fn(*given)
        check_result(out)
        late = late_in(out[0].opt_state)
        if late and not is_settled(given[0].opt_state, late):  # this step is the first that misses some parameters
            old, form = flatten((given[0]._replace(opt_state=settled(given[0].opt_state, late)), *given[1:]))
            donated = self._donated(form)
        buffers = _buffers(first)
        new, made = donation(donated, form, old, out, buffers)
        donated = without_grown(donated, buffers, old, new)
        overwrite(donated, old, new)
        first.retire(state)
        return made.build(iter(new))

    def ahead(self, state: Any, *rest: Any) -> Any:
        """Run eagerly. What would be compiled for these arguments is captured, and given to `helper` once."""
        with torch.no_grad():
            return self._started(self._ahead, state, rest)

    def _ahead(self, state: Any, rest: Arguments) -> Any:
        if self.helper is not None:
            leaves, signature = self._signature(state, rest)
            early = self._early.get(signature)
            if early is None or not early.holds():
                self._give(self.helper, (state, *rest), leaves, signature)
        return self._eager(state, rest)

    def _compiled(self, state: Any, rest: Arguments) -> Any:
        leaves, signature = self._signature(state, rest)
        entry = self._entry(signature, leaves)
        if entry is None and self._seen is not None:
            others, form = flatten(rest)
            self._seen.note(_batch_first(form), others)
            if self._seen.varied:
                leaves, signature = self._dynamic_signature(leaves[: len(leaves) - len(others)], signature[0], rest)
                entry = self._entry(signature, leaves)
        if entry is None or entry.stale() or not entry.outside.unchanged():
            entry = self._enter(entry, (state, *rest), leaves, signature)
        made = entry(state, leaves)
        if entry.state_size:
            self._remember(entry, *made[1:])
        return made[0]

    # --- what kind of arguments these are -----------------------------------------------------------------------------

    def _signature(self, state: Any, rest: Arguments) -> tuple[Leaves, _Signature]:
        known, leaves = self._known, []
        # The state is nearly always the one that the last call returned. To see that takes a comparison of identities;
        # to look at shapes, dtypes and strides takes much longer.
        if known is not None:
            try:
                leaves = known.take(state)
            except Misfit:
                known = None
            else:
                known = known if known.matches(leaves) else None
        if known is None:
            leaves, number = self._look_at(state)
        else:
            number = known.signature
        if self.settings.dynamic and self._seen is None:
            return self._dynamic_signature(leaves, number, rest)
        others: Leaves = []
        try:
            if self._rest is None:
                raise Misfit
            self._rest.flatten(rest, others)
        except Misfit:
            others, self._rest = flatten(rest)
            self._rest_number = self._number(self._rest)
        kinds: Hashable = tuple(map(_kind, others))
        if len(others) > 32:  # a tuple is hashed at every call; the number of a long one is quicker
            kinds = self._number((self._rest_number, kinds))
        leaves += others
        return leaves, (number, self._rest_number, kinds, environment())

    def _look_at(self, state: Any) -> tuple[Leaves, int]:
        """Return the leaves of a state that no program returned, and the number of their kinds."""
        leaves, form = flatten(state)
        if self.donate:
            _separate(form.places(False), leaves)
        number = self._number((form, *map(_kind, leaves)))
        at = largest(leaves)
        if at is None:
            self._known = None
        else:
            take = self._takers.get(number) or self._takers.setdefault(number, taker(form))
            self._known = Known(take, leaves[:at], leaves[at], leaves[at + 1 :], number)
        return leaves, number

    def _entry(self, signature: _Signature, leaves: Leaves) -> Entry | None:
        return next((e for e in self._entries.get(signature, ()) if e.holds is None or e.fits(leaves)), None)

    def _dimensions(self, form: Structure, leaves: Leaves) -> dict[int, tuple[int, ...]]:
        if self._seen is not None:
            return self._seen.dimensions(form, leaves)
        return dimensions(self.settings.dynamic, form, leaves)

    def _dynamic_signature(self, leaves: Leaves, state: Hashable, rest: Arguments) -> tuple[Leaves, _Signature]:
        others, form = flatten(rest)
        dims = self._dimensions(_batch_first(form), others)
        kinds = [_kind(x) if i not in dims else _dynamic_kind(x, dims[i]) for i, x in enumerate(others)]
        return leaves + others, (state, (form, *kinds), environment())

    def _number(self, kinds: Hashable) -> int:
        return self._signatures.setdefault(kinds, len(self._signatures))

    def _remember(self, entry: Entry, head: Leaves, middle: Leaves, tail: Leaves) -> None:
        assert entry.take is not None
        if entry.signature is None:
            form = entry.trace.structure.children[0]  # type: ignore[union-attr]
            entry.signature = self._number((form, *map(_kind, (*head, *middle, *tail))))
        self._known = Known(entry.take, head, middle[0], tail, entry.signature)

    def capture(self, state: Any, *rest: Any) -> Trace:
        """Return what the function computes for these arguments, without computing it."""
        args = (state, *rest)
        leaves, form = flatten(args)
        try:
            return self._captured(args, leaves, form)[0]
        except Again as ask:
            return self.capture(ask.prepared(state), *rest)

    def entries(self) -> list[Entry]:
        """Everything that was compiled so far."""
        return [entry for entries in self._entries.values() for entry in entries]

    # --- a new kind ---------------------------------------------------------------------------------------------------

    def _give(self, helper: Helper, args: Arguments, leaves: Leaves, signature: _Signature) -> None:
        with self.report.timing():
            found, outside = self._traced(args, leaves, [])
            self._shapes.setdefault(_key(found), _shapes(args[1:]))
            self._early[signature] = Early(found, outside, helper)
            if not is_built(found, self.settings):
                helper.give(_key(found), lambda: order(found, self.settings))

    def _enter(self, entry: Entry | None, args: Arguments, leaves: Leaves, signature: _Signature) -> Entry:
        changes = [] if entry is None else entry.outside.changes()
        if entry is not None and not changes and not entry.stale():
            return entry  # the same values in other objects
        with self.report.timing():
            made = self._made_early(args, leaves, signature)
            if made is None:
                made = self._made(args, leaves, [str(change) for change in changes])
        # A program for an old value of something outside can't be used again, and it holds the old module alive.
        self._prune(entry, changed=bool(changes))
        self._entries.setdefault(signature, []).append(made)
        while len(self._entries) > _MOST_KINDS:
            del self._entries[next(iter(self._entries))]
        return made

    def _prune(self, entry: Entry | None, *, changed: bool) -> None:
        """Forget an entry that is no longer right, and others for the same reason."""
        for entries in self._entries.values():
            entries[:] = [e for e in entries if e is not entry and not (changed and e.outside.changes())]

    def _made_early(self, args: Arguments, leaves: Leaves, signature: _Signature) -> Entry | None:
        early = self._early.pop(signature, None)
        if early is None or not early.holds():
            return None
        early.helper.wait(_key(early.found))
        return self._built(early.found, early.outside, args, leaves)

    def _made(self, args: Arguments, leaves: Leaves, changes: list[str]) -> Entry:
        return self._built(*self._traced(args, leaves, changes), args, leaves)

    def _traced(self, args: Arguments, leaves: Leaves, changes: list[str]) -> tuple[Trace, Outside]:
        """Capture, within the budget."""
        found, outside = self._captured(args, leaves, structure(args))
        self.report.traces += 1
        if _key(found) not in self._shapes and len(self._shapes) >= self.settings.max_graphs:
            raise self._over_budget(_shapes(args[1:]), changes)
        return found, outside

    def _built(self, found: Trace, outside: Outside, args: Arguments, leaves: Leaves) -> Entry:
        key = _key(found)
        if key not in self._programs:
            inputs = [held(leaves[i]) for i in found.inputs] + found.constants
            self._programs[key] = build(found, inputs, self.settings, self.report)
            shapes = self._shapes.setdefault(key, _shapes(args[1:]))
            shown = ", ".join(f"{k}: {v}" for k, v in shapes.items()) if self.name != "update" else ""
            self.report.shapes.append(f"{self.name}({shown})")
        return Entry(found, self._programs[key], outside, structure(args), donating=self.donate)

    def _captured(self, args: Arguments, leaves: Leaves, form: Structure) -> tuple[Trace, Outside]:
        donated = self._donated(form) if self.donate else []
        module = getattr(args[0], "module", None)
        dynamic = self._dimensions(form, leaves)
        return self.captured(Call(self.fn, args, leaves, form, donated, module, dynamic))

    def captured(self, given: Call) -> tuple[Trace, Outside]:
        """Capture the function; once more where its forward pass turns out to write into parameters."""
        try:
            with _set(COPIED, self._copied):
                return capture(given)
        except Unprotected as found:
            self._copied |= found.names
            return self.captured(given)

    def _donated(self, form: Structure) -> list[bool]:
        return form.children[0].places(False)  # type: ignore[union-attr]

    def _over_budget(self, shapes: dict[str, str], changes: list[str]) -> RecompileError:
        changed = (
            _difference(shapes, list(self._shapes.values()))
            or f"not the batch: {', '.join(changes) or 'the state, or torch settings'}"
        )
        return RecompileError(
            f"{self.name}(state, batch) needs another compiled graph, and max_graphs={self.settings.max_graphs} of"
            f" them exist. What changed: {changed}\nIf the sizes of a dimension vary, declare them:"
            ' `tfn.jit(step, buckets=tfn.Buckets((64, 128), pad={"input_ids": 0, "labels": -100}))`; or compile for any'
            " size, `dynamic=True`; or raise the budget, `max_graphs=`."
        )


def _key(found: Trace) -> Hashable:
    return found.key, environment()  # an operation may mean something else under another default dtype


@contextlib.contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Generator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _separate(donated: list[bool], leaves: Leaves) -> None:
    """Let no two donated leaves share memory: each is overwritten with its own new value."""
    seen: set[int] = set()
    for i, yes in enumerate(donated):
        if yes and isinstance(leaves[i], Tensor) and leaves[i].numel():
            memory = held(leaves[i]).untyped_storage()._cdata
            leaves[i] = leaves[i].clone() if memory in seen else leaves[i]
            seen.add(memory)


def _buffers(state: Structure) -> range:
    """The places of the buffers among the leaves of a state; nothing else has any."""
    if not isinstance(state, Row) or not issubclass(state.kind, TrainState):
        return range(0)
    start = sum(child.size for child in state.children[:2])  # step and params
    return range(start, start + state.children[2].size)


def _batch_first(form: Structure) -> Structure:
    """The structure of ``(state, batch, ...)`` without the state, which has no leaves then."""
    return Row(tuple, (Row(tuple, (), 0), *form.children), form.size)  # type: ignore[union-attr]


def _dynamic_kind(x: Tensor, dims: tuple[int, ...]) -> Hashable:
    vary = {d % x.dim() for d in dims}
    return (tuple(None if d in vary else n for d, n in enumerate(x.shape)), x.dtype, x.device, x.requires_grad)


def _kind(x: object) -> Hashable:
    """All that Python can see of a leaf."""
    if isinstance(x, Tensor):
        kind = (x.shape, x.dtype, x.device, x.stride(), x.requires_grad)
        spread = None if type(x) is Tensor else spec_of(x)
        conjugate = x.dtype.is_complex and x.is_conj()
        return kind if spread is None and not conjugate else (kind, spread, conjugate)
    try:
        hash(x)
    except TypeError:
        raise TypeError(
            f"step(state, batch) got a {type(x).__name__} in the batch, which a compiled step can't take: its values"
            " would be fixed. Make it a tensor, `torch.as_tensor(x)`, or leave it out of the batch."
        ) from None
    return (type(x), repr(x) if isinstance(x, float | complex) else x)


def _shapes(args: Arguments) -> dict[str, str]:
    batch = args[0] if args else None
    return {
        f"batch[{name!r}]" if name else "batch": f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
        if isinstance(x, Tensor)
        else repr(x)
        for name, x in tree.named_leaves(batch).items()
    }


def _difference(new: dict[str, str], known: list[dict[str, str]]) -> str:
    """The differences between ``new`` and the known shapes most like it."""
    nearest = min(known, key=lambda old: sum(old.get(name) != shape for name, shape in new.items()), default={})
    changes = [
        f"{name} from {nearest.get(name, 'absent')} to {new[name]}" for name in new if nearest.get(name) != new[name]
    ]
    return shortened(changes, write=str)
