"""The optimizer that `TrainingArguments` describe, as a transform."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

import transformers
from torch import Tensor, nn

import trainfn as tfn
from trainfn.errors import nearest
from trainfn.hf._optim._targets import target_names
from trainfn.hf._types import Rate, Values

Arguments: TypeAlias = transformers.TrainingArguments
Decay: TypeAlias = Callable[[str, Tensor], bool]
Options: TypeAlias = Values

_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


def make_optimizer(args: Arguments, model: nn.Module | Mapping[str, Tensor], schedule: Rate) -> tfn.Transform:
    """The optimizer of ``optim`` and ``optim_args``, after clipping to ``max_grad_norm``.

    Its arithmetic and its defaults are those of the `torch.optim.Optimizer` that transformers builds.

    Args:
        args: The fields ``optim, optim_args, weight_decay, adam_beta1, adam_beta2, adam_epsilon,
            max_grad_norm``; for GaLore, ``optim_target_modules``.
        model: The model, which decides which parameters decay; see `decay_names`. Or a dict of its parameters;
            then their names alone decide.
        schedule: The learning rate as a function of the number of completed updates. Or a number; then it is a
            hyperparameter that `trainfn.optim.set_hyperparams` changes.

    Raises:
        ValueError: If the optimizer is one that trainfn doesn't have, or ``optim_args`` has a key or a value
            that it doesn't take.

    >>> import torch
    >>> from trainfn.hf import TrainingArguments
    >>> args = TrainingArguments(optim="sgd", optim_args="momentum=0.9", max_grad_norm=0.0, use_cpu=True)
    >>> rule = make_optimizer(args, nn.Linear(1, 1), 0.1)
    >>> params = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
    >>> rule.update(params, rule.init(params), params)[0]
    {'weight': tensor([[-0.1000]]), 'bias': tensor([-0.1000])}
    """
    name = str(getattr(args.optim, "value", args.optim))
    check_optimizer(name)
    options = parse_optim_args(name, args.optim_args)
    if name.startswith("galore"):
        targets = target_names(args, model)
        options["targets"] = lambda name, param: name in targets
    decays = _decays(model)

    def factory(learning_rate: Rate) -> tfn.Transform:
        return _OPTIMIZERS[name](args, learning_rate, options, decays)

    rule = factory(schedule) if callable(schedule) else tfn.optim.inject_hyperparams(factory)(float(schedule))
    return clipped(args, rule)


def clipped(args: Arguments, rule: tfn.Transform) -> tfn.Transform:
    """A transform after clipping by ``max_grad_norm``; 0, a negative number and None mean that nothing is clipped.

    >>> from trainfn.hf import TrainingArguments
    >>> rule = tfn.optim.scale(-1.0)
    >>> clipped(TrainingArguments(max_grad_norm=0.0, use_cpu=True), rule) is rule
    True
    """
    norm: float | None = args.max_grad_norm
    return tfn.optim.chain(tfn.optim.clip_by_global_norm(norm), rule) if norm and norm > 0 else rule


def decay_names(model: nn.Module) -> frozenset[str]:
    """The parameters that transformers' Trainer lets decay: not those of a LayerNorm, not biases, not norms.

    >>> sorted(decay_names(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))))
    ['0.weight', '2.weight']
    """
    inside = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules(remove_duplicate=False)
        if prefix and isinstance(module, nn.LayerNorm)  # a model that is only a LayerNorm decays, as in transformers
        for name, _ in module.named_parameters(remove_duplicate=False)
    }
    return frozenset(name for name, _ in model.named_parameters() if name not in inside and not _NO_DECAY.search(name))


def check_optimizer(name: str) -> None:
    """Raise a ValueError for an optimizer that trainfn doesn't have.

    >>> check_optimizer("adamw_torch")
    """
    if name in _OPTIMIZERS:
        return
    reason, instead = next((why, write) for pattern, why, write in _ABSENT if re.search(pattern, name))
    raise ValueError(
        f"`TrainingArguments(optim={name!r})` can't work: {reason}. Write `optim={instead!r}`; trainfn has"
        f" {', '.join(map(repr, _OPTIMIZERS))}."
    )


def parse_optim_args(optim: str, text: str | Values | None) -> Values:
    """The options in ``"momentum=0.9, nesterov=true"``, in the types that the optimizer takes.

    Raises:
        ValueError: If a key is unknown, or a value is not of its type.

    >>> parse_optim_args("sgd", "momentum=0.9, nesterov=true")
    {'momentum': 0.9, 'nesterov': True}
    """
    call = f"TrainingArguments(optim={optim!r}, optim_args={text!r})"
    known = _OPTIONS.get(optim, {})
    options: Values = {}
    for key, value in _pairs(call, text):
        if key == "weight_decay":  # transformers takes it, and then overrides it in both parameter groups
            raise ValueError(
                f"`{call}` can't work: the decay has a field of its own, which spares norms and biases. Write"
                f" `TrainingArguments(optim={optim!r}, weight_decay={value})`."
            )
        if key not in known:
            which = (
                f"only {', '.join(known)}" if known else "nor any other: its settings are fields of TrainingArguments"
            )
            write = nearest(key, known, "Write `{}=...`.") or nearest(
                key, _FIELDS, "Write `TrainingArguments({}=...)`."
            )
            raise ValueError(f"`{call}` can't work: {optim} has no option {key!r}, {which}. {write or 'Leave it out.'}")
        options[key] = _typed(call, key, value, known[key])
    return options


def _pairs(call: str, text: str | Values | None) -> list[tuple[str, object]]:
    if not text:
        return []
    if not isinstance(text, str):
        return list(text.items())
    pairs: list[tuple[str, object]] = []
    for part in filter(None, text.replace(" ", "").split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise ValueError(
                f"`{call}` can't work: {part!r} is not a key and a value. Write `optim_args='key=value, key2=value2'`."
            )
        pairs.append((key, value))
    return pairs


def _typed(call: str, key: str, value: object, kind: type) -> object:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        return words[str(value).lower()] if kind is bool else kind(str(value))
    except (KeyError, ValueError):
        example = {bool: "true", int: "64"}.get(kind, "0.9")
        a = "an" if kind is int else "a"
        raise ValueError(
            f"`{call}` can't work: {key} is {a} {kind.__name__}, and {value!r} is not a valid one. Write"
            f" `{key}={example}`."
        ) from None


def _decays(model: nn.Module | Mapping[str, Tensor]) -> Decay:
    if not isinstance(model, nn.Module):
        return lambda name, param: not _NO_DECAY.search(name)
    names = decay_names(model)
    return lambda name, param: name in names


def _coupled(args: Arguments, rule: tfn.Transform, decays: Decay) -> tfn.Transform:
    """A transform with weight decay as the gradient of a penalty, as in torch's SGD, Adagrad and RMSprop."""
    decay = args.weight_decay
    return tfn.optim.chain(tfn.optim.add_decayed_weights(decay, decays), rule) if decay else rule


def _adamw(args: Arguments, rate: Rate, options: Options, decays: Decay) -> tfn.Transform:
    betas = (args.adam_beta1, args.adam_beta2)
    return tfn.optim.adamw(rate, *betas, args.adam_epsilon, weight_decay=args.weight_decay, mask=decays)


def _adafactor(args: Arguments, rate: Rate, options: Options, decays: Decay) -> tfn.Transform:
    return tfn.optim.adafactor(rate, scale_parameter=False, weight_decay=args.weight_decay, mask=decays)


def _lion(args: Arguments, rate: Rate, options: Options, decays: Decay) -> tfn.Transform:
    return tfn.optim.lion(rate, args.adam_beta1, args.adam_beta2, weight_decay=args.weight_decay, mask=decays)


def _sgd(args: Arguments, rate: Rate, options: Options, decays: Decay) -> tfn.Transform:
    momentum = options.get("momentum") or None  # 0 means none, and takes no memory
    rest = {"nesterov": options.get("nesterov", False), "dampening": options.get("dampening", 0.0)}
    return _coupled(args, tfn.optim.sgd(rate, momentum=momentum, **rest), decays)


def _rmsprop(args: Arguments, rate: Rate, options: Options, decays: Decay) -> tfn.Transform:
    rule = tfn.optim.rmsprop(
        rate,
        options.get("alpha", 0.99),
        options.get("eps", 1e-8),
        centered=options.get("centered", False),
        momentum=options.get("momentum") or None,
    )
    return _coupled(args, rule, decays)


def _adagrad(args: Arguments, rate: Rate, options: Options, decays: Decay) -> tfn.Transform:
    rule = tfn.optim.chain(
        tfn.optim.scale_by_adagrad(eps=options.get("eps", 1e-10)),
        slowing(options.get("lr_decay", 0.0)),
        tfn.optim.scale_by_learning_rate(rate),
    )
    return _coupled(args, rule, decays)


def _galore_adamw(args: Arguments, rate: Rate, options: Options, decays: Decay) -> tfn.Transform:
    # transformers passes the learning rate alone, so the field's default, 1e-8, means galore-torch's own eps there.
    eps = 1e-6 if args.adam_epsilon == 1e-8 else args.adam_epsilon
    betas = (args.adam_beta1, args.adam_beta2)
    return tfn.optim.galore_adamw(rate, *betas, eps, weight_decay=args.weight_decay, mask=decays, **options)


def _galore_adamw_8bit(args: Arguments, rate: Rate, options: Options, decays: Decay) -> tfn.Transform:
    numbers = (args.adam_beta1, args.adam_beta2, args.adam_epsilon)  # bitsandbytes' eps is 1e-8 too
    return tfn.optim.galore_adamw(rate, *numbers, weight_decay=args.weight_decay, mask=decays, **options)


def _galore_adafactor(args: Arguments, rate: Rate, options: Options, decays: Decay) -> tfn.Transform:
    return tfn.optim.galore_adafactor(rate, weight_decay=args.weight_decay, mask=decays, **options)


def _lomo(args: Arguments, rate: Rate, options: Options, decays: Decay) -> tfn.Transform:
    return tfn.optim.lomo(rate, weight_decay=args.weight_decay, mask=decays)


def _adalomo(args: Arguments, rate: Rate, options: Options, decays: Decay) -> tfn.Transform:
    return tfn.optim.adalomo(rate, weight_decay=args.weight_decay, mask=decays)


def slowing(lr_decay: float) -> tfn.Transform:
    """Adagrad's own decay of the rate: divide by ``1 + count * lr_decay``.

    >>> import torch
    >>> rule = slowing(1.0)
    >>> _, state = rule.update({"w": torch.ones(1)}, rule.init({}), {})
    >>> rule.update({"w": torch.ones(1)}, state, {})[0]
    {'w': tensor([0.5000])}
    """
    if not lr_decay:
        return tfn.optim.identity()
    return tfn.optim.scale_by_schedule(lambda count: 1.0 / (1.0 + count.float() * lr_decay), own=True)


_OPTIMIZERS: dict[str, Callable[[Arguments, Rate, Options, Decay], tfn.Transform]] = {
    "adamw_torch": _adamw,
    "adamw_torch_fused": _adamw,  # the arithmetic is the same, and the compiler does the fusing
    "adafactor": _adafactor,
    "sgd": _sgd,
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
    "lion_32bit": _lion,  # bitsandbytes' name for plain Lion
    # Layer by layer saves memory of gradients; the steps are the same.
    **dict.fromkeys(("galore_adamw", "galore_adamw_layerwise"), _galore_adamw),
    **dict.fromkeys(("galore_adamw_8bit", "galore_adamw_8bit_layerwise"), _galore_adamw_8bit),
    **dict.fromkeys(("galore_adafactor", "galore_adafactor_layerwise"), _galore_adafactor),
    "lomo": _lomo,
    "adalomo": _adalomo,
}
_GALORE: dict[str, type] = {"rank": int, "update_proj_gap": int, "scale": float, "proj_type": str, "align": bool}
_OPTIONS: dict[str, dict[str, type]] = {
    "sgd": {"momentum": float, "dampening": float, "nesterov": bool},
    "adagrad": {"lr_decay": float, "eps": float},
    "rmsprop": {"momentum": float, "alpha": float, "eps": float, "centered": bool},
    **{name: _GALORE for name in _OPTIMIZERS if name.startswith("galore")},
}
_FIELDS = ("adam_beta1", "adam_beta2", "adam_epsilon", "learning_rate")
_UNBUILT = "trainfn has not implemented"
_ABSENT = (  # (which names, why not, what instead); the first that matches
    (r"apollo", f"{_UNBUILT} APOLLO's low-rank scaling yet", "adafactor"),
    (r"xla|npu", "it needs the vendor's own kernels, which can't be part of a compiled step", "adamw_torch"),
    (r"anyprecision", "it needs torchdistx, and that package is no longer maintained", "adamw_torch"),
    (
        r"torch_[48]bit",
        "torchao keeps quantised moments in tensor subclasses, which trainfn doesn't save",
        "adamw_torch",
    ),
    (r"schedule_free", f"{_UNBUILT} the averages of schedule-free optimizers yet", "adamw_torch"),
    (r"grokadamw", f"{_UNBUILT} GrokAdamW, which feeds on the loss of the last step", "adamw_torch"),
    (r"stable_adamw", f"{_UNBUILT} StableAdamW's clipped updates yet", "adamw_torch"),
    (r"lion", "bitsandbytes' quantised or paged kernels change memory in place, which a pure step can't", "lion_32bit"),
    (r"rmsprop", "bitsandbytes' kernels change memory in place, which a pure step can't", "rmsprop"),
    (r"", "bitsandbytes' kernels change memory in place, which a pure step can't", "adamw_torch"),
)
