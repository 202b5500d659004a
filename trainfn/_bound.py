"""A state's module while a step runs it: on stand-ins for its Parameters, which the step differentiates.

A stand-in is of the Parameter's class, has its attributes and its hooks, and holds the state's numbers. The module's
own Parameters are never touched, whatever the storage. A captured step has no numbers yet, and a step on ranks has
`DTensor`s: neither fits into a Parameter that exists already. So one mechanism serves all steps. A frozen Parameter
whose memory is the state's goes into the forward pass as the object it is.

A forward pass may write into parameters, in place or by ``.data = ...``. The written numbers belong to the next state,
and the given state stays as it is. In an eager pass the stand-ins are lazy copies (`_lazily`): a copy is made by the
first write to it. A captured pass that finds a write is captured again, with a copy of that parameter.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from trainfn._changes import check_modes, check_unchanged, unfrozen
from trainfn._dtensor import held
from trainfn._hooks import carry_hooks
from trainfn._marks import Again
from trainfn._types import Buffers, Params, TrainState

COPIED: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("copied", default=frozenset())
"""Names of parameters that the forward pass is known to write to, while a step is captured."""

CONSUMED: contextvars.ContextVar[bool] = contextvars.ContextVar("consumed", default=False)
"""Whether the state is given away to the step that runs: nothing of it has to stay as it is."""


class Unprotected(Again):
    """A captured forward pass wrote into parameters, and not into copies of them."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self.names = names


class Running:
    """A state's module, and what a step gives it and takes from it.

    Attributes:
        model: The module, or the parameters by name where there is no module.
        leaves: The stand-ins of the parameters, by name.
        buffers: At the end: the module's buffers and frozen parameters.
        written: At the end: the parameters that the forward pass wrote to.
        own: The names of the module's own Parameters, by identity.
        weight: By which the gradient is to be divided, so that a hook of a parameter sees that of a mean.
    """

    def __init__(self, state: TrainState) -> None:
        self.model: Any = state.module
        self.leaves: Params = {}
        self.buffers: Buffers = {}
        self.written: Params = {}
        self.weight: Tensor | None = None
        self.own: dict[int, str] = {}


@contextlib.contextmanager
def bound(state: TrainState, *, training: bool, grads: bool | None = None) -> Generator[Running]:
    """Run the state's module on the state's numbers for the time of a ``with`` block.

    Autograd must run inside the block: a checkpointed module computes its forward pass again during the backward pass,
    on what it then holds. ``grads`` says whether the stand-ins require gradients: by default in training.
    """
    grads = training if grads is None else grads
    check_unchanged(state)
    run, copied = Running(state), COPIED.get()
    traced = _is_fake(next(iter(state.params.values()), None))
    watch = _Watch(copied, lazy=not traced and not CONSUMED.get() and _has_numbers())
    if state.module is None:
        run.model = run.leaves = {n: watch.stand_in(n, None, p, grads) for n, p in state.params.items()}
        run.leaves = dict(run.leaves)
        yield run
    else:
        with _placed(state, run, watch, training, grads):
            yield run
    run.written = watch.written()
    if traced and (found := run.written.keys() - copied):
        raise Unprotected(frozenset(found))
    _returned(state, run)


def _returned(state: TrainState, run: Running) -> None:
    """Sort what was written: a frozen parameter is among the buffers."""
    for name in [name for name in run.written if name not in state.params]:
        run.buffers[name] = run.written.pop(name)


@contextlib.contextmanager
def _placed(state: TrainState, run: Running, watch: _Watch, training: bool, grads: bool) -> Generator[None]:
    """The stand-ins in the module, which afterwards is as it was."""
    own = {site.name for site in state.sites if not site.is_parameter} if state.buffers else ()
    _check_names(state)
    held = [(s.owner._parameters if s.is_parameter else s.owner._buffers, s.attribute, s.name) for s in state.sites]
    saved = [(place, attribute, place[attribute]) for place, attribute, _ in held]
    saved += [(alias.place, alias.key, alias.place[alias.key]) for alias in state.aliases]
    modes = [(m, m.training) for m, _ in state.modes]
    if training and not all(m.training or not mode for m, mode in state.modes):
        check_modes(state)
    placed: dict[str, Any] = {}
    for place, attribute, name in held:
        if name in placed:
            continue
        if name in state.params:
            old: Any = place[attribute]
            run.own[id(old)] = name
            placed[name] = run.leaves[name] = watch.stand_in(name, old, state.params[name], grads)
            if training and (old._backward_hooks or old._post_accumulate_grad_hooks):
                carry_hooks(run, old, placed[name])
        elif name in own:  # a forward pass may write into its buffers: it gets copies
            placed[name] = state.buffers[name].clone()
        else:
            if training and place[attribute].requires_grad:
                raise unfrozen(name)
            placed[name] = watch.frozen(name, place[attribute], state.buffers[name])
    try:
        for place, attribute, name in held:
            place[attribute] = placed[name]
        for alias in state.aliases:
            alias.place[alias.key] = alias.make(placed)
        _set_modes([(m, training and mode) for m, mode in state.modes])
        yield
        for (place, attribute, name), site in zip(held, state.sites, strict=True) if state.buffers else ():
            if name in state.buffers:
                run.buffers[name] = state.buffers[name] if site.is_parameter else place[attribute].detach()
    finally:
        for place, attribute, old in saved:
            place[attribute] = old
        _set_modes(modes)


def _check_names(state: TrainState) -> None:
    missing = [s.name for s in state.sites if s.name not in state.params and s.name not in state.buffers]
    if missing:
        raise ValueError(
            f"step(state, batch): the module's {missing[0]!r} is in neither state.params nor state.buffers"
            f" ({len(missing)} missing). Replace values, not names: `{{**state.params, name: value}}`."
        )


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        if module.training != mode:  # to set it takes a microsecond
            module.training = mode


# --- stand-ins, and what is written to them -----------------------------------------------------------------------


class _Traced(FakeTensor):
    """A stand-in while a step is captured: what is done to its ``data`` is an operation of the graph."""

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The numbers, for writing too."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        with torch.no_grad():
            self.copy_(value)


@functools.cache
def _watched(kind: type) -> type:
    """The class of a stand-in of an eager pass: a write to its ``data`` counts as a write to the stand-in.

    It takes no comparison of numbers, which would wait for the device.
    """

    def get(x: Tensor) -> Tensor:
        return x.detach()

    def put(x: Tensor, value: Tensor) -> None:
        Tensor.data.__set__(x, value)  # type: ignore[attr-defined]
        torch.autograd.graph.increment_version(x)

    plain = {"__torch_function__": torch._C._disabled_torch_function_impl}
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "data": property(get, put), **plain})


def _stand_in(old: Any, value: Any, trained: bool, *, watched: bool = False) -> Any:
    """A tensor for ``value`` that is what ``old`` is: a Parameter, of its class and with its attributes."""
    if type(value) is Tensor or type(value) is nn.Parameter:
        kind = type(old) if isinstance(old, Tensor) and issubclass(type(old), nn.Parameter) else nn.Parameter
        made: Any = Tensor._make_subclass(_watched(kind) if watched else kind, value, trained)
    else:
        made = value.detach().requires_grad_(trained)
        made._is_param = True
        if type(made) is FakeTensor:
            made.__class__ = _Traced
    if old is not None and old.__dict__:
        vars(made).update(vars(old))
    return made


def _lazily(x: Any) -> Any:
    """A copy that takes memory only when one of the two is written to; None where there is no such copy.

    It costs half a microsecond, and no read of torch's own operations makes the copy. Storages that torch did not
    allocate have none, such as those of NumPy.
    """
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return None
    try:
        return torch._lazy_clone(x)  # pyright: ignore[reportAttributeAccessIssue]
    except (RuntimeError, NotImplementedError):
        return None


class _Made(NamedTuple):
    """A stand-in, or a frozen Parameter itself.

    Attributes:
        name: The parameter's name.
        tensor: The stand-in.
        given: The tensor that it was made of.
        version: The version of the stand-in before the pass.
        at: The address of its numbers before the pass; None where a read may change it.
        kept: The state's numbers, where the stand-in is the module's own Parameter; if possible, a lazy copy.
    """

    name: str
    tensor: Any
    given: Any
    version: int
    at: int | None
    kept: Tensor | None


class _Watch:
    """The stand-ins of one pass."""

    def __init__(self, copied: frozenset[str], *, lazy: bool) -> None:
        self._copied, self._lazy = copied, lazy
        self._made: list[_Made] = []

    def stand_in(self, name: str, old: Any, value: Any, trained: bool) -> Any:
        """The stand-in of a trained parameter."""
        given, lazy = self._given(name, value)
        if self._lazy and not lazy and given is value:  # once: what an update makes is torch's memory
            given = value.clone()
        trains = trained and (old is None or old.requires_grad)
        if old is not None:
            made = _stand_in(old, given, trains, watched=lazy)
        elif lazy:
            made = Tensor._make_subclass(_watched(Tensor), given, trains)
        else:
            made = given.detach().requires_grad_(trains)
        self._note(name, made, given, lazy)
        return made

    def frozen(self, name: str, old: Any, value: Any) -> Any:
        """Return the frozen parameter itself where its memory is the state's."""
        if name not in self._copied and _same_memory(old, value):
            plain = type(old) is nn.Parameter and old.is_floating_point()  # others go to kernels that are not torch's
            kept = _lazily(value) if self._lazy and plain else None
            self._note(name, old, value, False, value if kept is None else kept)
            return old
        given, lazy = self._given(name, value)
        made = _stand_in(old, given, False, watched=lazy)
        self._note(name, made, given, lazy)
        return made

    def _given(self, name: str, value: Any) -> tuple[Any, bool]:
        """The numbers for a stand-in, and whether they are a copy of the state's that is watched."""
        if name in self._copied:
            return value.clone(), False
        copy = _lazily(value) if self._lazy else None
        return (value, False) if copy is None else (copy, True)

    def _note(self, name: str, made: Any, given: Any, lazy: bool, kept: Tensor | None = None) -> None:
        at = None if lazy or type(given) is not Tensor else _address(given)
        self._made.append(_Made(name, made, given, made._version, at, kept))

    def written(self) -> Params:
        """The values of the parameters that were written to."""
        found: Params = {}
        for one in self._made:
            moved = one.at is not None and _address(one.tensor) != one.at  # by `.data = ...`, or a lazy copy was made
            if moved and one.kept is not None and one.tensor._version == one.version:
                moved = one.kept is one.given or not torch.equal(one.tensor, one.kept)  # a foreign kernel may read it
            if moved or one.name in self._copied or one.tensor._version != one.version:
                found[one.name] = one.tensor.detach()
                if one.kept is not None and (moved or one.kept is not one.given):
                    one.given.data = one.tensor.data = one.kept  # the two go on sharing the state's memory
        return found


def _same_memory(old: Any, value: Any) -> bool:
    if old is value:
        return True
    if type(value) is not Tensor:
        return False
    return _address(old) == _address(value) and old.shape == value.shape and old.stride() == value.stride()


def _address(x: Tensor) -> int:
    """Where the numbers are; to ask for it does not make a lazy copy a real one, as `data_ptr` does."""
    return torch._C._data_address(x)  # pyright: ignore[reportAttributeAccessIssue]


def _is_fake(x: Any) -> bool:
    return hasattr(held(x), "fake_mode")


def _has_numbers() -> bool:
    """Whether tensors have memory of their own: not inside of `torch.func.vmap` and the like."""
    return torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
