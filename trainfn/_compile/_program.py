"""A function of a state and a batch, captured and compiled at the first call with each kind of arguments."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from operator import call, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainfn import tree
from trainfn._compile._backend import Built, Settings, build
from trainfn._compile._capture import capture
from trainfn._compile._donate import overwrite
from trainfn._compile._outside import Outside, environment
from trainfn._compile._report import Report
from trainfn._compile._sizes import Seen, dimensions
from trainfn._compile._structure import Misfit, Row, Structure, flatten, structure
from trainfn._compile._trace import Trace, donation
from trainfn._dtensor import held, spec_of
from trainfn._text import shortened
from trainfn._types import TrainState
from trainfn.errors import RecompileError

_Signature = tuple[Hashable, ...]
_MOST_KINDS = 256  # of arguments: each keeps its state's module alive


class Known(NamedTuple):
    """The leaves of the newest state, which need no second look: tensors that a program itself returned."""

    form: Structure
    refs: Sequence[Callable[[], Any]]
    signature: int

    def matches(self, leaves: list[Any]) -> bool:
        """Return whether these are the very leaves."""
        return len(leaves) == len(self.refs) and all(map(is_, leaves, map(call, self.refs)))


def _reference(x: Any) -> Callable[[], Any]:
    return weakref.ref(x) if isinstance(x, Tensor) else _constant(x)


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


class Entry:
    """A compiled graph for one kind of arguments, with what goes in and where its outputs go."""

    def __init__(self, found: Trace, built: Built, outside: Outside, form: Structure, *, donating: bool) -> None:
        self.run, self.holds, self.outside, self.trace = built.run, built.holds, outside, found
        self.constants = found.constants
        self._looks = _looks(found.constants)
        self._state_form = form.children[0] if donating else None  # type: ignore[union-attr]
        self._structure = found.structure
        count = form.size
        every = found.inputs == list(range(count))
        self._inputs = None if every else found.inputs
        self._sharded = found.sharded
        self._layouts = [output.layout for output in found.outputs if output.kind == "graph"]
        self._values = [output.value for output in found.outputs if output.kind == "value"]
        at = {"graph": count, "input": 0, "value": count + len(self._layouts)}
        picked: list[int] = []
        for output in found.outputs:
            picked.append(at[output.kind] + output.place)
            if output.kind == "value":
                at["value"] += 1
        self._pick = itemgetter(*picked, 0) if picked else itemgetter(0, 0)
        self.state_size = _state_size(found.structure)
        self.next_signature: int | None = None
        # Leaves that were overwritten in place are the objects that they were.
        outputs = enumerate(found.outputs[: self.state_size])
        self._fresh = [i for i, output in outputs if not donating or output.kind != "input" or output.place != i]

    def references(self, known: Sequence[Callable[[], Any]], new: Sequence[Any]) -> Sequence[Callable[[], Any]]:
        """Return references to the leaves of the new state."""
        if len(self._fresh) == self.state_size:
            return [_reference(x) for x in new[: self.state_size]]
        refs = list(known)
        for i in self._fresh:
            refs[i] = _reference(new[i])
        return refs

    def stale(self) -> bool:
        """Return whether a tensor from outside has become another kind, as by `module.double()`."""
        return bool(self._looks) and _looks(self.constants) != self._looks

    def fits(self, leaves: list[Any]) -> bool:
        """Return whether the graph is right for these sizes."""
        return self.holds is None or self.holds([leaves[i] for i in self.trace.inputs])

    def __call__(self, state: Any, leaves: list[Any]) -> tuple[Any, tuple[Any, ...]]:
        """Run; return the result and its leaves."""
        tensors = leaves if self._inputs is None else [leaves[i] for i in self._inputs]
        if self._sharded:
            tensors = [held(x) for x in tensors]
        out = self.run(*tensors, *self.constants)
        if self._sharded:
            out = [x if how is None else how.of_local(x) for x, how in zip(out, self._layouts, strict=True)]
        new = self._pick((*leaves, *out, *self._values))
        result = self._structure.build(iter(new))
        if self._state_form is not None:
            self._state_form.retire(state)
        return result, new


def _looks(tensors: list[Tensor]) -> list[Any]:
    return [(x.dtype, x.device, x.shape) for x in tensors]


def _state_size(result: Structure) -> int:
    """How many leaves of a result are those of a state."""
    if isinstance(result, Row) and result.kind is tuple and result.children:
        first = result.children[0]
        return first.size if isinstance(first, Row) and issubclass(first.kind, TrainState) else 0
    return 0


class Program:
    """A function ``(state, batch, …) -> …``, captured and compiled at the first call with each kind of arguments.

    The kind is all that Python can see: structure, shapes, dtypes, devices, numbers and strings in the batch, torch's
    settings. What the function read from elsewhere is compared before each call; if it changed, the function is
    captured again.
    """

    def __init__(self, fn: Callable[..., Any], settings: Settings, *, donate: bool, name: str) -> None:
        self.fn, self.settings, self.donate, self.name = fn, settings, donate, name
        self.report = Report()
        self._entries: dict[_Signature, list[Entry]] = {}
        self._programs: dict[Hashable, tuple[Built, dict[str, str]]] = {}  # and the shapes that it was first needed for
        self._signatures: dict[Hashable, int] = {}
        self._known: Known | None = None
        self._rest: Structure | None = None
        self._seen = Seen() if settings.dynamic == "auto" else None

    def __call__(self, state: Any, *rest: Any) -> Any:
        with torch.no_grad():
            return self._compiled(state, rest) if self.settings.compile else self._eager(state, rest)

    def _eager(self, state: Any, rest: tuple[Any, ...]) -> Any:
        if not self.donate:
            return self.fn(state, *rest)
        old, form = flatten((state, *rest))
        donated = self._donated(form)
        _separate(donated, old)
        out = self.fn(*form.build(iter(old)))
        new = donation(donated, form, old, out)
        overwrite(donated, old, new)
        form.children[0].retire(state)  # type: ignore[union-attr]
        return flatten(out)[1].build(iter(new))

    def _compiled(self, state: Any, rest: tuple[Any, ...]) -> Any:
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
        result, new = entry(state, leaves)
        if entry.state_size:
            self._remember(entry, new)
        return result

    # --- what kind of arguments these are -----------------------------------------------------------------------------

    def _signature(self, state: Any, rest: tuple[Any, ...]) -> tuple[list[Any], _Signature]:
        leaves: list[Any] = []
        known = self._known
        try:
            if known is None:
                raise Misfit
            known.form.flatten(state, leaves)
            if not known.matches(leaves):
                known = None
        except Misfit:
            known, leaves = None, []
        if known is None:
            leaves, form = flatten(state)
            if self.donate:
                _separate(form.places(False), leaves)
            signature = self._number((form, *map(_kind, leaves)))
            known = self._known = Known(form, [_reference(x) for x in leaves], signature)
        if self.settings.dynamic and self._seen is None:
            return self._dynamic_signature(leaves, known.signature, rest)
        others: list[Any] = []
        try:
            if self._rest is None:
                raise Misfit
            self._rest.flatten(rest, others)
        except Misfit:
            others, self._rest = flatten(rest)
        kinds = (
            self._number((self._rest, *map(_kind, others))) if len(others) > 32 else (self._rest, *map(_kind, others))
        )
        leaves += others
        return leaves, (known.signature, kinds, environment())

    def _entry(self, signature: _Signature, leaves: list[Any]) -> Entry | None:
        return next((e for e in self._entries.get(signature, ()) if e.holds is None or e.fits(leaves)), None)

    def _dimensions(self, form: Structure, leaves: list[Any]) -> dict[int, tuple[int, ...]]:
        if self._seen is not None:
            return self._seen.dimensions(form, leaves)
        return dimensions(self.settings.dynamic, form, leaves)

    def _dynamic_signature(
        self, leaves: list[Any], state: Hashable, rest: tuple[Any, ...]
    ) -> tuple[list[Any], _Signature]:
        others, form = flatten(rest)
        dims = self._dimensions(_batch_first(form), others)
        kinds = [_kind(x) if i not in dims else _dynamic_kind(x, dims[i]) for i, x in enumerate(others)]
        return leaves + others, (state, (form, *kinds), environment())

    def _number(self, kinds: Hashable) -> int:
        return self._signatures.setdefault(kinds, len(self._signatures))

    def _remember(self, entry: Entry, new: Sequence[Any]) -> None:
        assert self._known is not None
        form = entry.trace.structure.children[0]  # type: ignore[union-attr]
        if entry.next_signature is None:
            entry.next_signature = self._number((form, *map(_kind, new[: entry.state_size])))
        self._known = Known(form, entry.references(self._known.refs, new), entry.next_signature)

    def capture(self, state: Any, *rest: Any) -> Trace:
        """Return what the function computes for these arguments, without computing it."""
        args = (state, *rest)
        leaves, form = flatten(args)
        return self._captured(args, leaves, form)[0]

    def entries(self) -> list[Entry]:
        """Everything that was compiled so far."""
        return [entry for entries in self._entries.values() for entry in entries]

    # --- a new kind ---------------------------------------------------------------------------------------------------

    def _enter(self, entry: Entry | None, args: tuple[Any, ...], leaves: list[Any], signature: _Signature) -> Entry:
        changes = [] if entry is None else entry.outside.changes()
        if entry is not None and not changes and not entry.stale():
            return entry  # the same values in other objects
        with self.report.timing():
            made = self._made(args, leaves, [str(change) for change in changes])
        self._prune(entry, changed=bool(changes))
        self._entries.setdefault(signature, []).append(made)
        while len(self._entries) > _MOST_KINDS:
            del self._entries[next(iter(self._entries))]
        return made

    def _prune(self, entry: Entry | None, *, changed: bool) -> None:
        """Forget an entry that is no longer right, and others for the same reason."""
        for entries in self._entries.values():
            entries[:] = [e for e in entries if e is not entry and not (changed and e.outside.changes())]

    def _made(self, args: tuple[Any, ...], leaves: list[Any], changes: list[str]) -> Entry:
        form = structure(args)
        found, outside = self._captured(args, leaves, form)
        self.report.traces += 1
        shapes = _shapes(args[1:])
        key = (found.key, environment())  # an operation may mean something else under another default dtype
        if key not in self._programs:
            if len(self._programs) >= self.settings.max_graphs:
                raise self._over_budget(shapes, changes)
            shown = ", ".join(f"{k}: {v}" for k, v in shapes.items()) if self.name != "update" else ""
            inputs = [held(leaves[i]) for i in found.inputs] + found.constants
            self._programs[key] = build(found, inputs, self.settings, self.report), shapes
            self.report.shapes.append(f"{self.name}({shown})")
        built, _ = self._programs[key]
        return Entry(found, built, outside, form, donating=self.donate)

    def _captured(self, args: tuple[Any, ...], leaves: list[Any], form: Structure) -> tuple[Trace, Outside]:
        donated = self._donated(form) if self.donate else []
        module = getattr(args[0], "module", None)
        dynamic = self._dimensions(form, leaves)
        return capture(self.fn, args, leaves, form, donated=donated, module=module, dynamic=dynamic)

    def _donated(self, form: Structure) -> list[bool]:
        return form.children[0].places(False)  # type: ignore[union-attr]

    def _over_budget(self, shapes: dict[str, str], changes: list[str]) -> RecompileError:
        known = [shapes for _, shapes in self._programs.values()]
        changed = _difference(shapes, known) or f"not the batch: {', '.join(changes) or 'the state, or torch settings'}"
        return RecompileError(
            f"{self.name}(state, batch) needs another compiled graph, and max_graphs={self.settings.max_graphs} of"
            f" them exist. What changed: {changed}\nIf the sizes of a dimension vary, declare them:"
            ' `tfn.jit(step, buckets=tfn.Buckets((64, 128), pad={"input_ids": 0, "labels": -100}))`; or compile for any'
            " size, `dynamic=True`; or raise the budget, `max_graphs=`."
        )


def _separate(donated: list[bool], leaves: list[Any]) -> None:
    """Let no two donated leaves share memory: each is overwritten with its own new value."""
    seen: set[int] = set()
    for i, yes in enumerate(donated):
        if yes and isinstance(leaves[i], Tensor) and leaves[i].numel():
            memory = held(leaves[i]).untyped_storage()._cdata
            leaves[i] = leaves[i].clone() if memory in seen else leaves[i]
            seen.add(memory)


def _batch_first(form: Structure) -> Structure:
    """The structure of ``(state, batch, ...)`` without the state, which has no leaves then."""
    return Row(tuple, (Row(tuple, (), 0), *form.children), form.size)  # type: ignore[union-attr]


def _dynamic_kind(x: Tensor, dims: tuple[int, ...]) -> Hashable:
    vary = {d % x.dim() for d in dims}
    return (tuple(None if d in vary else n for d, n in enumerate(x.shape)), x.dtype, x.device, x.requires_grad)


def _kind(x: Any) -> Hashable:
    """All that Python can see of a leaf."""
    if isinstance(x, Tensor):
        spread = spec_of(x)
        conjugate = x.dtype.is_complex and x.is_conj()
        return (x.shape, x.dtype, x.device, x.stride(), x.requires_grad, spread, conjugate)
    try:
        hash(x)
    except TypeError:
        raise TypeError(
            f"step(state, batch) got a {type(x).__name__} in the batch, which a compiled step can't take: its values"
            " would be fixed. Make it a tensor, `torch.as_tensor(x)`, or leave it out of the batch."
        ) from None
    return (type(x), repr(x) if isinstance(x, float | complex) else x)


def _shapes(args: tuple[Any, ...]) -> dict[str, str]:
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
