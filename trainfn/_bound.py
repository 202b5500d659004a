"""A state's module while a step runs it: on stand-ins for its Parameters, which the step differentiates.

A stand-in is of the Parameter's class, has its attributes and its hooks, and holds the state's numbers. The module's
own Parameters are never touched, whatever the storage. A captured step has no numbers yet, and a step on ranks has
`DTensor`s: neither fits into a Parameter that exists already. So one mechanism serves all steps. A frozen Parameter
whose memory is the state's goes into the forward pass as the object it is.

A forward pass may write into parameters, in place or by ``.data = ...``. The written numbers belong to the next state,
and the given state stays as it is: a parameter that is written to is a copy. In the first pass all are copies, and it
finds out which ones are needed (see `Writes`). A captured pass that finds it out is captured again.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from trainfn._changes import check_modes, check_unchanged, unfrozen
from trainfn._dtensor import held, is_distributed, is_split, local, spread_like
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


class Writes:
    """The parameters that the forward passes of one function write to, for states of one type.

    Attributes:
        names: The names that are known.
        first: Whether no pass was made yet.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.first = True


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
def bound(
    state: TrainState, *, training: bool, grads: bool | None = None, writes: Writes | None = None
) -> Generator[Running]:
    """Run the state's module on the state's numbers for the time of a ``with`` block.

    Autograd must run inside the block: a checkpointed module computes its forward pass again during the backward pass,
    on what it then holds. ``grads`` says whether the stand-ins require gradients: by default in training.
    """
    grads = training if grads is None else grads
    check_unchanged(state)
    run, writes = Running(state), Writes() if writes is None else writes
    traced = _is_fake(next(iter(state.params.values()), None))
    tried = writes.first and not traced and not CONSUMED.get() and _comparable()
    copied = writes.names | COPIED.get()
    watch = _Watch(state, copied, everything=tried)
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
    writes.names |= run.written.keys()
    writes.first = writes.first and not tried and not traced
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
                _carry_hooks(run, old, placed[name])
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


# --- hooks --------------------------------------------------------------------------------------------------------


_SPLIT_HOOK = (
    "step(state, batch): a Parameter has a hook, and on ranks its gradient is in parts, or not added up when the hook"
    " is called. Take `register_hook` and a plan that shards no gradients, `tfn.Plan.replicated()`; or change the"
    " gradients in the optimizer: `tfn.optim.chain(tfn.optim.masked(...), optimizer)`."
)


def _carry_hooks(run: Running, old: Tensor, leaf: Tensor) -> None:
    """Let the hooks of a Parameter see the gradients of its stand-in: of a mean, as they do in a loop of torch."""

    def before(hook: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
        def seen(grad: Tensor) -> Tensor | None:
            if is_split(grad):
                raise ValueError(_SPLIT_HOOK)
            weight = _or_one(run.weight)
            out = hook(local(grad) / weight)  # on ranks, of this rank's rows, as under DDP
            return None if out is None else spread_like(out * weight, grad)

        return seen

    def after(hook: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def seen(leaf: Tensor) -> None:
            weight = _or_one(run.weight)
            if is_distributed(leaf):
                raise ValueError(_SPLIT_HOOK)
            assert leaf.grad is not None
            leaf.grad = leaf.grad / weight
            hook(leaf)
            leaf.grad = None if leaf.grad is None else leaf.grad * weight

        return seen

    hooks: Any = old
    for hook in (hooks._backward_hooks or {}).values():
        leaf.register_hook(before(hook))
    for hook in (hooks._post_accumulate_grad_hooks or {}).values():
        leaf.register_post_accumulate_grad_hook(after(hook))


def _or_one(weight: Tensor | None) -> Tensor | float:
    return 1.0 if weight is None else torch.where(weight == 0, torch.ones_like(weight), weight)


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


def _stand_in(old: Any, value: Any, trained: bool) -> Any:
    """A tensor for ``value`` that is what ``old`` is: a Parameter, of its class and with its attributes."""
    if type(value) is Tensor or type(value) is nn.Parameter:
        kind = type(old) if isinstance(old, Tensor) and issubclass(type(old), nn.Parameter) else nn.Parameter
        made: Any = Tensor._make_subclass(kind, value, trained)
    else:
        made = value.detach().requires_grad_(trained)
        made._is_param = True
        if type(made) is FakeTensor:
            made.__class__ = _Traced
    if old is not None and old.__dict__:
        vars(made).update(vars(old))
    return made


class _Watch:
    """The stand-ins of one pass."""

    def __init__(self, state: TrainState, copied: set[str] | frozenset[str], *, everything: bool) -> None:
        self._all, self._copied = everything, copied
        # The name, the module's Parameter, its stand-in, the state's tensor, and the version before the pass.
        self._made: list[tuple[str, Any, Any, Any, int]] = []
        trained = sum(p.nbytes for p in state.params.values())
        self._frozen = everything and sum(b.nbytes for b in state.buffers.values()) <= trained

    def stand_in(self, name: str, old: Any, value: Any, trained: bool) -> Any:
        """The stand-in of a trained parameter."""
        given = value.clone() if self._all or name in self._copied else value
        trains = trained and (old is None or old.requires_grad)
        made = given.detach().requires_grad_(trains) if old is None else _stand_in(old, given, trains)
        self._made.append((name, old, made, value, made._version))
        return made

    def frozen(self, name: str, old: Any, value: Any) -> Any:
        """Return the frozen parameter itself where its memory is the state's and the pass only reads it."""
        copy = name in self._copied or (self._frozen and type(value) is Tensor)
        if not copy and _same_memory(old, value):
            made = old
        else:
            made = _stand_in(old, value.clone() if copy else value, False)
        self._made.append((name, old, made, value, made._version))
        return made

    def written(self) -> Params:
        """The values of the parameters that were written to."""
        found: Params = {}
        for name, old, made, value, version in self._made:
            if name in self._copied or made._version != version or self._differs(made, value):
                found[name] = made.detach()
                if made is old and made.data_ptr() != value.data_ptr():
                    made.data = value  # the module's own Parameter goes on sharing the state's memory
        return found

    def _differs(self, made: Any, value: Any) -> bool:
        if type(value) is not Tensor and type(value) is not nn.Parameter:
            return False
        return made.data_ptr() != value.data_ptr() and not torch.equal(made.detach(), value)


def _same_memory(old: Any, value: Any) -> bool:
    if old is value:
        return True
    if type(value) is not Tensor:
        return False
    return old.data_ptr() == value.data_ptr() and old.shape == value.shape and old.stride() == value.stride()


def _is_fake(x: Any) -> bool:
    return hasattr(held(x), "fake_mode")


def _comparable() -> bool:
    """Whether numbers can be compared: not inside of `torch.func.vmap` and the like."""
    return torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
