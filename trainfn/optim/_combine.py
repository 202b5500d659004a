"""Bigger transforms from smaller ones: in sequence, on some of the parameters, or by group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from trainfn._types import Params, Transform, Tree
from trainfn.optim._masks import Labels, Mask, label, select

Names = Callable[[Params], frozenset[str]]


class EmptyState(NamedTuple):
    """The state of a transform that has none."""


class MaskedState(NamedTuple):
    """The inner state of `masked`: of the selected names only."""

    inner: Tree


class PartitionState(NamedTuple):
    """The inner states of `partition`, by label: each of its own names only."""

    inner: dict[str, Tree]


def identity() -> Transform:
    """Leave the updates as they are; `freeze` leaves the parameters as they are.

    >>> import torch
    >>> rule = identity()
    >>> rule.update({"w": torch.ones(1)}, rule.init({}), {})[0]
    {'w': tensor([1.])}
    """

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        return updates, state

    return Transform(lambda params: EmptyState(), update)


def freeze() -> Transform:
    """Keep parameters as they are: a rule for a label of `partition`.

    It has no state. Around it, in a `chain` or a step, frozen gradients are 0: they don't count in the norm of
    `clip_by_global_norm`, nor in the metric ``grad_norm``. To save the time and memory of these gradients, too, call
    ``requires_grad_(False)`` on the module's parameters before `init`.

    >>> from trainfn.optim import partition, sgd
    >>> rule = partition({"train": sgd(0.5), "frozen": freeze()}, [("head", "train")], default="frozen")
    >>> params = {"body.w": torch.ones(1), "head.w": torch.ones(1)}
    >>> rule.update(params, rule.init(params), params)[0]
    {'body.w': tensor([-0.]), 'head.w': tensor([-0.5000])}
    """

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        return still(updates, frozenset(updates)), state

    return marked(Transform(lambda params: EmptyState(), update), frozenset)


def marked(transform: Transform, names: Names) -> Transform:
    """Return the transform, with a function that returns which parameters it freezes."""
    transform.update.frozen = names  # type: ignore[attr-defined]
    return transform


def frozen_by(transform: Transform) -> Names | None:
    """Return the function of parameters that names the frozen ones; None if there is no `freeze` in the transform."""
    return getattr(transform.update, "frozen", None)


def around(transform: Transform, *inner: Transform) -> Transform:
    """Return the transform, which freezes what its inner transforms freeze, before and after its own rule."""
    found = [names for names in map(frozen_by, inner) if names is not None]
    if not found:
        return transform

    def names(params: Params) -> frozenset[str]:
        return frozenset().union(*(each(params) for each in found))

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        frozen = names(params)
        out, state = transform.update(still(updates, frozen), state, params)
        return still(out, frozen), state

    return marked(Transform(transform.init, update), names)


def still(updates: Params, names: frozenset[str]) -> Params:
    """Return the updates, with 0 for these names: -0, which changes no number that it is added to."""
    return {name: torch.full_like(u, -0.0) if name in names else u for name, u in updates.items()} if names else updates


def chain(*transforms: Transform) -> Transform:
    """Apply the transforms one after the other; the state is the tuple of their states.

    >>> import torch
    >>> from trainfn.optim import clip_by_global_norm, scale
    >>> rule = chain(clip_by_global_norm(1.0), scale(-0.5))
    >>> params = {"w": torch.zeros(2)}
    >>> updates, state = rule.update({"w": torch.tensor([3.0, 4.0])}, rule.init(params), params)
    >>> updates["w"]
    tensor([-0.3000, -0.4000])
    """

    def init(params: Params) -> Tree:
        return tuple(transform.init(params) for transform in transforms)

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        states: list[Tree] = []
        for transform, inner in zip(transforms, state, strict=True):
            updates, inner = transform.update(updates, inner, params)
            states.append(inner)
        return updates, tuple(states)

    return around(Transform(init, update), *transforms)


def masked(transform: Transform, mask: Mask) -> Transform:
    """Apply a transform to some of the parameters; the updates of the others pass unchanged.

    Args:
        transform: Sees, and keeps state for, the selected names only.
        mask: A regular expression, a function ``(name, tensor) -> bool``, a dict of bools by name, or None
            for all.

    Raises:
        ValueError: If a pattern occurs in no name, or a dict misses one.

    >>> import torch
    >>> from trainfn.optim import scale
    >>> rule = masked(scale(-1.0), "weight")
    >>> grads = {"fc.weight": torch.ones(1), "fc.bias": torch.ones(1)}
    >>> rule.update(grads, rule.init(grads), grads)[0]
    {'fc.weight': tensor([-1.]), 'fc.bias': tensor([1.])}
    """

    def init(params: Params) -> Tree:
        return MaskedState(transform.init(_only(params, select("masked", mask, params))))

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        names = select("masked", mask, params)
        changed, inner = transform.update(_only(updates, names), state.inner, _only(params, names))
        return {name: changed[name] if name in names else u for name, u in updates.items()}, MaskedState(inner)

    frozen = frozen_by(transform)
    made = Transform(init, update)
    if frozen is None:
        return made
    return marked(made, lambda params: frozen(_only(params, select("masked", mask, params))))


def partition(transforms: Mapping[str, Transform], labels: Labels, *, default: str | None = None) -> Transform:
    """Apply to each parameter the transform of its label.

    Args:
        transforms: By label; each sees, and keeps state for, its own names only.
        labels: A list of ``(regular expression, label)``, of which the first that occurs in the name counts;
            a function ``(name, tensor) -> label``; or a dict of labels by name.
        default: The label of names that the list or the dict doesn't cover.

    Raises:
        ValueError: If a pattern occurs in no name, a name has no label, or a label has no transform.

    >>> import torch
    >>> from trainfn.optim import scale
    >>> rule = partition({"slow": scale(-0.1), "fast": scale(-1.0)}, [("bias", "fast")], default="slow")
    >>> grads = {"fc.weight": torch.ones(1), "fc.bias": torch.ones(1)}
    >>> rule.update(grads, rule.init(grads), grads)[0]
    {'fc.weight': tensor([-0.1000]), 'fc.bias': tensor([-1.])}
    """

    def groups(params: Params) -> dict[str, frozenset[str]]:
        of = label("partition", labels, default, params)
        for name, group in of.items():
            if group not in transforms:
                raise ValueError(
                    f"`partition(transforms, labels)`: {name!r} has the label {group!r}, for which there is"
                    f" no transform, only for {sorted(transforms)}. Write"
                    f" `partition({{..., {group!r}: <a transform>}}, labels)`; `tfn.optim.freeze()`"
                    " leaves the parameters as they are."
                )
        return {group: frozenset(name for name in of if of[name] == group) for group in transforms}

    def init(params: Params) -> Tree:
        names = groups(params)
        return PartitionState({group: rule.init(_only(params, names[group])) for group, rule in transforms.items()})

    def update(updates: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        changed = dict(updates)
        inner: dict[str, Tree] = {}
        for group, names in groups(params).items():
            some, inner[group] = transforms[group].update(
                _only(updates, names), state.inner[group], _only(params, names)
            )
            changed.update(some)
        return changed, PartitionState(inner)

    def frozen(params: Params) -> frozenset[str]:
        named = groups(params)
        return frozenset().union(*(names(_only(params, named[group])) for group, names in freezing.items()))

    made = Transform(init, update)
    freezing = {group: names for group, rule in transforms.items() if (names := frozen_by(rule)) is not None}
    return marked(made, frozen) if freezing else made


def _only(params: Params, names: frozenset[str]) -> Params:
    return {name: param for name, param in params.items() if name in names}
