"""The parameter groups of a torch optimizer as a transform, which follows what is written into them.

The groups are where the numbers of an optimizer are: schedules and callbacks write them there, as they do in torch.
The state of a run has a copy of them, as tensors. A captured step reads the copy, so a new number needs no new capture;
`Groups.pushed` brings it up to date before each step. A step that runs eagerly reads the groups themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

import trainfn as tfn
from trainfn.hf._optim._moments import with_entries
from trainfn.hf._types import OptState, Values

Params: TypeAlias = dict[str, Tensor]
Number: TypeAlias = float | Tensor
Numbers: TypeAlias = Mapping[str, Number]
Group: TypeAlias = Values  # of parameters, with its options
Make: TypeAlias = Callable[[Group, Numbers], tfn.Transform]

UNREAD = frozenset(("params", "param_names", "initial_lr", "foreach", "fused", "capturable", "differentiable"))
"""Entries of a group that do not change its update."""


class Kind(NamedTuple):
    """How the groups of a class of optimizers become transforms.

    Attributes:
        make: ``(group, numbers) -> transform``.
        numbers: The options of a group that may change from step to step without a new capture.
    """

    make: Make
    numbers: tuple[str, ...] = ("lr", "weight_decay")


class Groups:
    """A torch optimizer as a transform, group by group, from its moments on.

    Parameters that are in no group stay as they are. The optimizer is read and never changed.

    Args:
        optimizer: An instance of `torch.optim.SGD`, ``Adam``, ``AdamW``, ``RMSprop``, ``Adagrad``, of transformers'
            ``Adafactor``, or of `trainfn.hf._optim._named.Named`.
        named_parameters: All parameters that a step may change: groups hold them without names, and transforms know
            them by name.

    Attributes:
        optimizer: The optimizer.
        transform: The transform. Its state is a `trainfn.optim.PartitionState` with an `InjectState` for each group.
        rules: The transforms of the groups, by number.

    Raises:
        ValueError: If the class is not known, an option can't be carried over, or a parameter isn't one of the model's.

    >>> model = nn.Linear(1, 1)
    >>> rule = Groups(torch.optim.SGD(model.parameters(), lr=0.5), model.named_parameters()).transform
    >>> params = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
    >>> rule.update(params, rule.init(params), params)[0]
    {'weight': tensor([[-0.5000]]), 'bias': tensor([-0.5000])}
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter | Tensor]]
    ) -> None:
        self.optimizer, self.kind = optimizer, _kind(optimizer)
        self.names = {id(parameter): name for name, parameter in named_parameters}
        call = f"optimizers=({type(optimizer).__name__}(...), ...)"
        rules: dict[str, tfn.Transform] = {"none": tfn.Transform(lambda params: tfn.optim.EmptyState(), _still)}
        labels: dict[str, str] = {}
        for index, group in enumerate(optimizer.param_groups):
            mine = _names(call, index, group["params"], self.names)
            if mine:
                rules[str(index)] = self._rule(group, mine)
                labels.update(dict.fromkeys(mine, str(index)))
        self.transform = tfn.optim.partition(rules, labels, default="none")
        self.rules = {label: rule for label, rule in rules.items() if label != "none"}
        self._pushed: dict[str, dict[str, float]] = {}
        self._known = self._options()

    def _rule(self, group: Group, names: list[str]) -> tfn.Transform:
        """The transform of one group, with its numbers in the state."""
        parameters = dict(zip(names, group["params"], strict=True))

        def init(params: Params) -> OptState:
            device = next(iter(params.values())).device
            values = self._numbers(group)
            held = {name: torch.full((), value, device=device) for name, value in values.items()}
            inner = self._made(group, values).init(params)
            state = tfn.optim.InjectState(torch.zeros((), dtype=torch.int64, device=device), held, {}, inner)
            entries = {n: e for n, p in parameters.items() if (e := self.optimizer.state.get(p))}
            return with_entries(state, entries) if entries else state

        def update(updates: Params, state: OptState, params: Params) -> tuple[Params, OptState]:
            captured = tfn.tree.is_traced(state.count)
            rule = self._made(group, state.hyperparams if captured else self._numbers(group))
            updates, inner = rule.update(updates, state.inner, params)
            return updates, state._replace(count=state.count + 1, inner=inner)

        return tfn.Transform(init, update)

    def _made(self, group: Group, numbers: Numbers) -> tfn.Transform:
        rule = self.kind.make(group, numbers)
        return tfn.optim.chain(tfn.optim.scale(-1.0), rule) if group.get("maximize") else rule

    def _numbers(self, group: Group) -> dict[str, float]:
        """The numbers of a group by their names in the state: ``betas`` are ``beta1`` and ``beta2``."""
        found: dict[str, float] = {}
        for key in self.kind.numbers:
            value = group[key]
            if isinstance(value, tuple | list):
                found.update({f"{key.rstrip('s')}{n}": float(each) for n, each in enumerate(value, 1)})
            elif value is not None:
                found["learning_rate" if key == "lr" else key] = float(value)
        return found

    def _options(self) -> list[Values]:
        """Options that a captured step has in it: those that are not numbers, and which of the numbers are 0."""
        return [
            {
                key: bool(value) if key in self.kind.numbers and key != "lr" else _comparable(value)
                for key, value in group.items()
                if key not in UNREAD and not (key == "lr" and value is not None)
            }
            for group in self.optimizer.param_groups
        ]

    def stale(self) -> bool:
        """Whether an option was written since the last call that a captured step has in it.

        Raises:
            ValueError: If the state has no place for what the option needs.
        """
        now = self._options()
        if now == self._known:
            return False
        for before, group in zip(self._known, self.optimizer.param_groups, strict=False):
            old = self._made({**group, **{k: v for k, v in before.items() if k in _MEMORY}}, self._numbers(group))
            new = self._made(group, self._numbers(group))
            if optree.tree_structure(old.init({})) != optree.tree_structure(new.init({})):
                changed = sorted(k for k in _MEMORY if before.get(k) != _comparable(group.get(k)))
                raise ValueError(
                    f"`optimizer.param_groups[...][{changed[0]!r}] = {group[changed[0]]!r}` can't work during a run:"
                    " the optimizer would need memory that its state does not have. Give the optimizer this option"
                    " before `trainer.train()`."
                )
        self._known = now
        return True

    def pushed(self, state: OptState) -> OptState:
        """The state with the present numbers of the groups; only those that were written are made anew."""
        changed: dict[str, OptState] = {}
        for label in self.rules:
            numbers, last = self._numbers(self.optimizer.param_groups[int(label)]), self._pushed.get(label, {})
            if numbers == last:
                continue
            held = dict(state.inner[label].hyperparams)
            # `full` runs on the device; a copy from the host would wait for it.
            held |= {
                k: torch.full((), v, dtype=torch.float32, device=held[k].device)
                for k, v in numbers.items()
                if last.get(k) != v
            }
            changed[label] = state.inner[label]._replace(hyperparams=held)
            self._pushed[label] = numbers
        return tfn.optim.PartitionState({**state.inner, **changed}) if changed else state

    def forget(self) -> None:
        """Push all numbers before the next step: the state has been replaced."""
        self._pushed = {}


def _kind(optimizer: torch.optim.Optimizer) -> Kind:
    own = getattr(optimizer, "kind", None)  # of a `Named` one
    kind = own if isinstance(own, Kind) else _KNOWN.get(type(optimizer))
    if kind is None:
        name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        raise ValueError(
            f"`Trainer(optimizers=({name}(...), ...))` can't work: only its own Python code knows its update, and that"
            " can't be part of a pure step. Pass torch's SGD, Adam, AdamW, RMSprop or Adagrad, or transformers'"
            " Adafactor, which are converted; or a transform of `tfn.optim`; or write `TrainingArguments(optim=...)`."
        )
    return kind


def _comparable(value: object) -> object:
    return value if isinstance(value, int | float | str | tuple | None) else id(value)


def _still(updates: Params, state: OptState, params: Params) -> tuple[Params, OptState]:
    return tfn.tree.zeros_like(updates), state


def _names(call: str, index: int, parameters: Iterable[Tensor], names: Mapping[int, str]) -> list[str]:
    strangers = [p for p in parameters if id(p) not in names]
    if strangers:
        raise ValueError(
            f"`{call}` can't work: parameter group {index} has a tensor of shape {list(strangers[0].shape)} that is"
            " not a parameter of the model, so no step changes it. Build the optimizer from"
            " `model.parameters()`, after the last change of the model."
        )
    return [names[id(p)] for p in parameters]


# --- the rules ------------------------------------------------------------------------------------------------------


def decay(group: Group, numbers: Numbers) -> tfn.Transform:
    """Weight decay that is added to the gradient; nothing where it is 0."""
    return tfn.optim.add_decayed_weights(numbers["weight_decay"]) if group["weight_decay"] else tfn.optim.identity()


def _adam(group: Group, n: Numbers) -> tfn.Transform:
    if group.get("amsgrad"):
        raise ValueError(
            "`optimizers=(Adam(...), ...)` can't work with amsgrad=True: trainfn's Adam has no running maximum. Write"
            " `amsgrad=False`."
        )
    core = tfn.optim.scale_by_adam(n["beta1"], n["beta2"], n["eps"])
    parts = (core, decay(group, n)) if group.get("decoupled_weight_decay") else (decay(group, n), core)
    return tfn.optim.chain(*parts, tfn.optim.scale_by_learning_rate(n["learning_rate"]))


def _sgd(group: Group, n: Numbers) -> tfn.Transform:
    damped = n["dampening"] if group["dampening"] else 0.0
    core = tfn.optim.trace(n["momentum"], nesterov=group["nesterov"], dampening=damped) if group["momentum"] else None
    rate = tfn.optim.scale_by_learning_rate(n["learning_rate"])
    return tfn.optim.chain(decay(group, n), *([core] if core else []), rate)


def _rmsprop(group: Group, n: Numbers) -> tfn.Transform:
    core = tfn.optim.scale_by_rms(n["alpha"], n["eps"], centered=group["centered"])
    trace = [tfn.optim.trace(n["momentum"])] if group["momentum"] else []
    return tfn.optim.chain(decay(group, n), core, *trace, tfn.optim.scale_by_learning_rate(n["learning_rate"]))


def _adagrad(group: Group, n: Numbers) -> tfn.Transform:
    core = tfn.optim.scale_by_adagrad(float(group["initial_accumulator_value"]), n["eps"])
    slow = _slowing(float(group["lr_decay"]))
    return tfn.optim.chain(decay(group, n), core, slow, tfn.optim.scale_by_learning_rate(n["learning_rate"]))


def _slowing(lr_decay: float) -> tfn.Transform:
    """Adagrad's own decay of the rate: divide by ``1 + count * lr_decay``."""
    if not lr_decay:
        return tfn.optim.identity()
    return tfn.optim.scale_by_schedule(lambda count: 1.0 / (1.0 + count.float() * lr_decay), own=True)


def _adafactor(group: Group, n: Numbers) -> tfn.Transform:
    return tfn.optim.adafactor(
        None if group["relative_step"] else n["learning_rate"],
        decay_rate=float(group["decay_rate"]),
        eps=float(group["eps"][0]),
        eps_param=float(group["eps"][1]),
        clip_threshold=float(group["clip_threshold"]),
        b1=group["beta1"],
        weight_decay=n["weight_decay"] if group["weight_decay"] else 0.0,
        scale_parameter=group["scale_parameter"],
        warmup_init=group["warmup_init"] and group["relative_step"],
    )


_MEMORY = ("momentum", "centered", "beta1", "lr_decay")  # options that decide what a state holds
_KNOWN: dict[type, Kind] = {
    torch.optim.SGD: Kind(_sgd, ("lr", "weight_decay", "momentum", "dampening")),
    torch.optim.Adam: Kind(_adam, ("lr", "weight_decay", "betas", "eps")),
    torch.optim.AdamW: Kind(_adam, ("lr", "weight_decay", "betas", "eps")),
    torch.optim.RMSprop: Kind(_rmsprop, ("lr", "weight_decay", "momentum", "alpha", "eps")),
    torch.optim.Adagrad: Kind(_adagrad, ("lr", "weight_decay", "eps")),
    Adafactor: Kind(_adafactor),
}
