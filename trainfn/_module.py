"""From an ``nn.Module`` to a state and back.

A state's *type* remembers the module (`TrainState.module`) and where each named tensor sits in it
(`TrainState.sites`); its *value* holds the tensors. `trainfn._bound` puts them in place for the time of one loss.
"""

from __future__ import annotations

import weakref
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # pyright: ignore[reportAttributeAccessIssue]

from trainfn import random, tree
from trainfn._audit import audit
from trainfn._dtensor import full, is_distributed
from trainfn._text import shortened
from trainfn._types import Buffers, Params, TrainState, Transform


class Site(NamedTuple):
    """One place in a module that holds a named tensor; tied tensors have several sites under one name."""

    name: str
    owner: nn.Module
    attribute: str
    is_parameter: bool


# One state type per live module as it is, so that `init` called twice on it does not compile twice. Values are weak:
# the module goes when its states do.
_STATE_TYPES: weakref.WeakValueDictionary[int, type[TrainState]] = weakref.WeakValueDictionary()


def init(
    model: nn.Module | Params,
    optimizer: Transform,
    *,
    seed: int = 0,
    storage: Literal["copy", "adopt", "move"] = "copy",
) -> TrainState:
    """The first state of a training run.

    Floating-point and complex parameters with ``requires_grad`` become ``state.params``; all else the module holds (its
    buffers, frozen and integer parameters) becomes ``state.buffers``: saved and used, never updated by the
    optimizer. Tied weights appear once, under their first name. Submodules that are in eval mode while the module
    itself is in training mode stay so in every training step: a frozen BatchNorm, say.

    Args:
        model: Any module; or a dict of tensors, which the loss then receives as it is.
        optimizer: From `trainfn.optim`.
        seed: For `state.key`; 64 bits.
        storage: ``"copy"`` leaves the module alone. ``"adopt"`` shares its memory: nothing is held twice, and
            with a donating step the module always holds the newest parameters. ``"move"`` takes the tensors
            out of the module, which is left on the meta device until `export` brings them back.

    Raises:
        TypeError: If ``model`` or ``optimizer`` is of another kind.
        ValueError: If nothing can be trained, or a lazy module has not seen its first batch.

    >>> import torch, trainfn as tfn
    >>> init(torch.nn.Linear(2, 1), tfn.optim.sgd(0.1))
    TrainState(Linear, step=0, params=2 tensors / 3 numbers)
    """
    _check(model, optimizer, storage)
    state_type = _state_type(model) if isinstance(model, nn.Module) else TrainState
    params, buffers = _tensors(model) if isinstance(model, nn.Module) else (dict(model), {})
    if not params:
        raise ValueError(
            "init(model, ...): no parameter of this model can be trained (floating-point or complex, with"
            " requires_grad=True). Call `model.requires_grad_(True)` on what should learn."
        )
    if storage == "copy":
        params, buffers = tree.copy(params), tree.copy(buffers)
    elif storage == "move":
        _empty(state_type.sites)
        state_type.held = None  # `export` puts others in their place
    device = next(iter(params.values())).device
    return state_type(
        step=torch.zeros((), dtype=torch.int64, device=device),
        params=params,
        buffers=buffers,
        opt_state=optimizer.init(params),
        key=random.key(seed, device=device),
        extra={},
    )


def _check(model: object, optimizer: object, storage: str) -> None:
    if type(model).__name__ == "OptimizedModule":
        raise TypeError(
            "init(model, ...) got a torch.compile'd module. `trainfn.jit` compiles the whole step, module included:"
            " pass the module itself, `model._orig_mod`."
        )
    if not isinstance(model, nn.Module | dict):
        raise TypeError(f"init(model, ...) takes an nn.Module or a dict of tensors, not {type(model).__name__}.")
    if not isinstance(optimizer, Transform):
        hint = "tfn.optim.adamw(1e-3)"
        raise TypeError(f"init(model, optimizer) takes a transform such as `{hint}`, not {type(optimizer).__name__}.")
    if storage not in ("copy", "adopt", "move"):
        raise ValueError(f"init(..., storage={storage!r}): choose 'copy', 'adopt' or 'move'.")
    if storage == "move" and not isinstance(model, nn.Module):
        raise ValueError("init(..., storage='move') empties a module; a dict of tensors has none. Use 'adopt'.")


def _state_type(module: nn.Module) -> type[TrainState]:
    sites, modes = sites_of(module), _modes(module)
    aliases = audit(module, {id(_held(site)): site.name for site in sites if site.is_parameter})
    known = _STATE_TYPES.get(id(module))
    if known is not None and (known.module, known.sites, known.modes) == (module, sites, modes):
        alike = {alias.where for alias in known.aliases} == {alias.where for alias in aliases}
        if alike and known.held in (None, identities(sites)):
            return known
    body = {
        "__slots__": (),
        "__module__": "trainfn",
        "__doc__": TrainState.__doc__,
        "module": module,
        "sites": sites,
        "modes": modes,
        "aliases": aliases,
        "held": identities(sites),
        "looked": -1,
        "warned": False,
    }
    made = type("TrainState", (TrainState,), body)
    _STATE_TYPES[id(module)] = made
    return made


def sites_of(module: nn.Module) -> tuple[Site, ...]:
    names: dict[int, str] = {}
    found: list[Site] = []
    for prefix, owner in module.named_modules():
        held = [(a, t, True) for a, t in owner._parameters.items()] + [(a, t, False) for a, t in owner._buffers.items()]
        for attribute, tensor, is_parameter in held:
            if tensor is None:
                continue
            if isinstance(tensor, UninitializedTensorMixin):
                raise ValueError(
                    f"init(model, ...): {prefix + '.' + attribute!r} of a lazy module has no shape yet. Run one batch"
                    " through the model first: `model(batch)`."
                )
            name = names.setdefault(id(tensor), f"{prefix}.{attribute}" if prefix else attribute)
            found.append(Site(name, owner, attribute, is_parameter))
    return tuple(found)


def identities(sites: tuple[Site, ...]) -> tuple[int, ...]:
    """Return the identities of the Parameters at the sites of a module."""
    return tuple(id(_held(site)) for site in sites if site.is_parameter)


def _held(site: Site) -> Any:
    return (site.owner._parameters if site.is_parameter else site.owner._buffers)[site.attribute]


def _modes(module: nn.Module) -> tuple[tuple[nn.Module, bool], ...]:
    """The mode of each submodule in a training step: its own, or True if the whole module is in eval mode."""
    return tuple((m, m.training or not module.training) for m in module.modules())


def _tensors(module: nn.Module) -> tuple[Params, Buffers]:
    params: Params = {}
    buffers: Buffers = {}
    for name, owner, attribute, is_parameter in sites_of(module):
        tensor = getattr(owner, attribute) if not is_parameter else owner._parameters[attribute]
        assert isinstance(tensor, Tensor)
        trained = is_parameter and tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex())
        if name not in params and name not in buffers:
            (params if trained else buffers)[name] = tensor.detach()
    return params, buffers


def _empty(sites: tuple[Site, ...]) -> None:
    made: dict[str, Tensor] = {}
    for name, owner, attribute, is_parameter in sites:
        old = (owner._parameters if is_parameter else owner._buffers)[attribute]
        assert old is not None
        if name not in made:
            meta = torch.empty_like(old, device="meta")
            made[name] = nn.Parameter(meta, requires_grad=old.requires_grad) if is_parameter else meta
        (owner._parameters if is_parameter else owner._buffers)[attribute] = made[name]  # type: ignore[assignment]


def check_state(state: object) -> None:
    """Raise if a step got something else than a state."""
    if isinstance(state, TrainState):
        return
    several: Any = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    if several and all(isinstance(one, TrainState) for one in several):
        place = next(iter(state)) if isinstance(state, dict) else 0
        raise TypeError(
            f"step(state, batch) got a {type(state).__name__} of {len(several)} states. A step takes one of them:"
            f" `state[{place!r}], metrics = step(state[{place!r}], batch)`."
        )
    raise TypeError(
        f"step(state, batch) got a {type(state).__name__} for the state. Make one first:"
        " `state = tfn.init(model, optimizer)`."
    )


def check_whole(state: TrainState) -> None:
    """Raise if a step without a plan gets a sharded state: nothing would gather it."""
    check_state(state)
    if is_distributed(next(iter(state.params.values()), None)):
        raise ValueError(
            "step(state, batch): the state is sharded over ranks, and the step has no plan. Make the step with"
            " `train_step(loss, optimizer, plan=plan)` or `eval_step(loss, plan=plan)`; or gather the state:"
            " `tfn.gather(state)`."
        )


def export(state: TrainState, model: nn.Module | None = None) -> nn.Module:
    """Write the state's parameters and buffers into a module, and return it.

    If the state is sharded, every rank calls this and gets full tensors, gathered one at a time.

    Args:
        state: The state.
        model: Where to write; by default the module that the state was made from.

    Raises:
        ValueError: If the module's tensors and the state's differ in name or shape.

    >>> import torch, trainfn as tfn
    >>> model = torch.nn.Linear(2, 1)
    >>> state = tfn.init(model, tfn.optim.sgd(0.1))
    >>> state = state._replace(params={**state.params, "bias": torch.ones(1)})
    >>> export(state).bias
    Parameter containing:
    tensor([1.], requires_grad=True)
    """
    target = model if model is not None else state.module
    if target is None:
        raise ValueError("export(state): this state was made from a dict of tensors; `state.params` is that dict.")
    tensors = {**state.buffers, **state.params}
    sites = sites_of(target)
    _check_fit(tensors, sites)
    placed: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, owner, attribute, is_parameter in sites:
            place = owner._parameters if is_parameter else owner._buffers
            old = place[attribute]
            assert old is not None
            if not old.is_meta:
                old.copy_(full(tensors[name]))
                continue
            if name not in placed:
                value = full(tensors[name]).detach().clone()
                placed[name] = nn.Parameter(value, requires_grad=old.requires_grad) if is_parameter else value
            place[attribute] = placed[name]  # type: ignore[assignment]
    return target


def _check_fit(tensors: dict[str, Tensor], sites: tuple[Site, ...]) -> None:
    shapes = {
        site.name: list((site.owner._parameters if site.is_parameter else site.owner._buffers)[site.attribute].shape)  # type: ignore[union-attr]
        for site in sites
    }
    wrong = [f"{n}: not in the state" for n in shapes if n not in tensors]
    wrong += [f"{n}: not in the module" for n in tensors if n not in shapes]
    wrong += [
        f"{n}: {list(t.shape)} in the state, {shapes[n]} in the module"
        for n, t in tensors.items()
        if n in shapes and list(t.shape) != shapes[n]
    ]
    if wrong:
        lines = shortened(wrong, 10, str, "\n  ")
        raise ValueError(f"export(state, model): the module does not fit the state:\n  {lines}")
