"""A user's `torch.optim.Optimizer` as a transform."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

import trainfn as tfn
from trainfn.hf._optim._named import slowing
from trainfn.hf._types import Rate, Values

T = TypeVar("T")
Params: TypeAlias = dict[str, Tensor]

Group: TypeAlias = Values  # of parameters, with its options
States: TypeAlias = dict[str, Values]  # of the optimizer, by parameter


def from_torch(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    rates: Sequence[Rate] | None = None,
) -> tfn.Transform | None:
    """The transform that makes the updates of a torch optimizer, group by group, from its moments on.

    Parameters that are in no group stay as they are. The optimizer is read and never changed.

    Args:
        optimizer: An instance of `torch.optim.SGD`, ``Adam``, ``AdamW``, ``RMSprop``, ``Adagrad`` or
            transformers' ``Adafactor``.
        named_parameters: The model's parameters: groups hold them without names, and transforms know them by name.
        rates: The learning rate of each group, by default the one in the group. It is a function of the number of
            completed updates, or a number: a hyperparameter that `trainfn.optim.set_hyperparams` changes.

    Returns:
        The transform, or None if the optimizer is of another class. Subclasses are other classes: only their Python
        code knows their update.

    Raises:
        ValueError: If an option or a state of it can't be carried over, or a parameter isn't one of the model's.

    >>> model = nn.Linear(1, 1)
    >>> rule = from_torch(torch.optim.SGD(model.parameters(), lr=0.5), model.named_parameters())
    >>> params = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
    >>> rule.update(params, rule.init(params), params)[0]
    {'weight': tensor([[-0.5000]]), 'bias': tensor([-0.5000])}
    """
    convert = _KNOWN.get(type(optimizer))
    if convert is None:
        return None
    call = f"optimizers=({type(optimizer).__name__}(...), ...)"
    names = {id(parameter): name for name, parameter in named_parameters}
    rules: dict[str, tfn.Transform] = {"none": tfn.Transform(lambda params: tfn.optim.EmptyState(), _still)}
    labels: dict[str, str] = {}
    for index, group in enumerate(optimizer.param_groups):
        _check(call, group)
        mine = _names(call, index, group["params"], names)
        states: States = {names[id(p)]: optimizer.state[p] for p in group["params"] if optimizer.state.get(p)}
        if states and (odd := sorted(set(mine) - set(states))):
            raise ValueError(
                f"`{call}` can't work: parameter group {index} has a state for {len(states)} of its parameters and"
                f" none for {odd[0]!r}. Pass a new optimizer, and load its state with `train("
                "resume_from_checkpoint=...)`."
            )
        rule = _rated(partial(convert, call, states), group, None if rates is None else rates[index])
        rules[str(index)] = tfn.optim.chain(tfn.optim.scale(-1.0), rule) if group.get("maximize") else rule
        labels.update(dict.fromkeys(mine, str(index)))
    return tfn.optim.partition(rules, labels, default="none")


def _rated(convert: Callable[..., tfn.Transform], group: Group, rate: Rate | None) -> tfn.Transform:
    """The transform with the group's own rate, a function of the step, or a rate that can be changed."""
    if rate is None:
        return convert({**group, "lr": None if group["lr"] is None else float(group["lr"])})
    if callable(rate):
        return convert({**group, "lr": rate})

    def factory(learning_rate: Rate | Tensor) -> tfn.Transform:
        return convert({**group, "lr": learning_rate})

    return tfn.optim.inject_hyperparams(factory)(float(rate))


def _still(updates: Params, state: T, params: Params) -> tuple[Params, T]:
    return tfn.tree.zeros_like(updates), state


def _names(call: str, index: int, parameters: Sequence[Tensor], names: Mapping[int, str]) -> list[str]:
    strangers = [p for p in parameters if id(p) not in names]
    if strangers:
        raise ValueError(
            f"`{call}` can't work: parameter group {index} has a tensor of shape {list(strangers[0].shape)} that is"
            " not a parameter of the model, so no step changes it. Build the optimizer from"
            " `model.parameters()`, after the last change of the model."
        )
    return [names[id(p)] for p in parameters]


def _check(call: str, group: Group) -> None:
    if group.get("amsgrad"):
        raise ValueError(
            f"`{call}` can't work with amsgrad=True: trainfn's Adam has no running maximum. Write `amsgrad=False`."
        )


def _carried(
    rule: tfn.Transform, states: States, make: Callable[[Callable[[str], dict[str, Tensor]]], object]
) -> tfn.Transform:
    """A transform that starts from the moments of the optimizer, if it has any."""
    if not states:
        return rule

    def column(key: str) -> dict[str, Tensor]:
        # Copies: a step may reuse the memory of its state, and these are the user's.
        return {name: state[key].detach().clone() for name, state in states.items() if state.get(key) is not None}

    return tfn.Transform(lambda params: make(column), rule.update)


def _count(call: str, states: States) -> Tensor:
    steps = {int(state["step"]) for state in states.values()}
    if len(steps) > 1:
        raise ValueError(
            f"`{call}` can't work: its parameters have seen different numbers of steps, {sorted(steps)[:4]}, and a"
            " transform has one count. Pass a new optimizer."
        )
    return torch.tensor(steps.pop() if steps else 0)


def _adam(call: str, states: States, group: Group) -> tfn.Transform:
    b1, b2 = group["betas"]
    core = tfn.optim.scale_by_adam(float(b1), float(b2), float(group["eps"]))
    count = _count(call, states)
    core = _carried(
        core,
        states,
        lambda column: tfn.optim.ScaleByAdamState(_on(count, states), column("exp_avg"), column("exp_avg_sq")),
    )
    decay = _decay(group)
    parts = (core, decay) if group.get("decoupled_weight_decay") else (decay, core)
    return tfn.optim.chain(*parts, tfn.optim.scale_by_learning_rate(group["lr"]))


def _sgd(call: str, states: States, group: Group) -> tfn.Transform:
    rate = tfn.optim.scale_by_learning_rate(group["lr"])
    if not group["momentum"]:
        return tfn.optim.chain(_decay(group), rate)
    core = tfn.optim.trace(float(group["momentum"]), nesterov=group["nesterov"], dampening=float(group["dampening"]))
    # torch's SGD has no count: a momentum buffer means that the first step is done, and only that matters here.
    core = _carried(
        core,
        states,
        lambda column: tfn.optim.TraceState(_on(torch.tensor(1), states), column("momentum_buffer")),
    )
    return tfn.optim.chain(_decay(group), core, rate)


def _rmsprop(call: str, states: States, group: Group) -> tfn.Transform:
    core = tfn.optim.scale_by_rms(float(group["alpha"]), float(group["eps"]), centered=group["centered"])
    core = _carried(core, states, lambda column: tfn.optim.ScaleByRmsState(column("square_avg"), column("grad_avg")))
    parts = [_decay(group), core]
    if group["momentum"]:
        trace = tfn.optim.trace(float(group["momentum"]))
        count = _count(call, states)
        parts.append(
            _carried(
                trace,
                states,
                lambda column: tfn.optim.TraceState(_on(count, states), column("momentum_buffer")),
            )
        )
    return tfn.optim.chain(*parts, tfn.optim.scale_by_learning_rate(group["lr"]))


def _adagrad(call: str, states: States, group: Group) -> tfn.Transform:
    core = tfn.optim.scale_by_adagrad(float(group["initial_accumulator_value"]), float(group["eps"]))
    # torch's Adagrad has its sums from the start, so a new optimizer's initial values are carried over too.
    core = _carried(core, states, lambda column: tfn.optim.ScaleByAdagradState(column("sum")))
    count = _count(call, states)
    slow = slowing(float(group["lr_decay"]))
    if group["lr_decay"]:
        slow = _carried(slow, states, lambda _: tfn.optim.ScaleByOwnScheduleState(_on(count, states)))
    return tfn.optim.chain(_decay(group), core, slow, tfn.optim.scale_by_learning_rate(group["lr"]))


def _adafactor(call: str, states: States, group: Group) -> tfn.Transform:
    if states:
        raise ValueError(
            f"`{call}` can't work: it has made steps already, and the factored moments of transformers' Adafactor are"
            " not carried over. Pass a new optimizer."
        )
    return tfn.optim.adafactor(
        None if group["relative_step"] else group["lr"],
        decay_rate=float(group["decay_rate"]),
        eps=float(group["eps"][0]),
        eps_param=float(group["eps"][1]),
        clip_threshold=float(group["clip_threshold"]),
        b1=group["beta1"],
        weight_decay=float(group["weight_decay"]),
        scale_parameter=group["scale_parameter"],
        warmup_init=group["warmup_init"] and group["relative_step"],
    )


def _decay(group: Group) -> tfn.Transform:
    decay = float(group["weight_decay"])
    return tfn.optim.add_decayed_weights(decay) if decay else tfn.optim.identity()


def _on(count: Tensor, states: States) -> Tensor:
    """The count on the device of the moments; a new tensor each time, because a step may reuse its memory."""
    moments = [x for state in states.values() for key, x in state.items() if key != "step" and isinstance(x, Tensor)]
    return count.clone().to(moments[0].device) if moments else count.clone()


_KNOWN: dict[type, Callable[[str, States, Group], tfn.Transform]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
    Adafactor: _adafactor,
}
