"""The optimizer that `TrainingArguments` describe: a class of torch, or one of this package."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NoReturn, TypeAlias

import torch
import transformers
from torch import Tensor, nn
from transformers.optimization import Adafactor

import trainfn as tfn
from trainfn.errors import nearest
from trainfn.hf._optim._groups import Group, Kind, Make, Numbers
from trainfn.hf._optim._targets import target_names
from trainfn.hf._types import Values

Arguments: TypeAlias = transformers.TrainingArguments
Options: TypeAlias = Values
Model: TypeAlias = nn.Module | None
Described: TypeAlias = tuple[Callable[..., torch.optim.Optimizer], Values]

_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


class Named(torch.optim.Optimizer):
    """An optimizer of `trainfn.optim` that torch does not have, with the groups of a torch optimizer.

    Args:
        params: Parameters, or groups of them.
        kind: The rule of a group.
        lr: The learning rate.
        options: The other options of each group.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[Values], kind: Kind, lr: float, **options: object) -> None:
        self.kind = kind
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, **options})

    def step(self, closure: Callable[[], float] | None = None) -> NoReturn:
        """Raise an error: the update is part of the Trainer's step."""
        raise RuntimeError(
            f"`optimizer.step()` can't work: the update of {self.defaults.get('name', 'this optimizer')!r} is a"
            " transform, which the Trainer's step applies. Write `trainer.train()`; or use `tfn.train_step` with the"
            " transform of `tfn.optim`."
        )


def cls_and_kwargs(args: Arguments, model: Model = None) -> Described:
    """The class of ``optim`` and its arguments, as transformers' Trainer has them.

    Args:
        args: The fields ``optim, optim_args, learning_rate, adam_beta1, adam_beta2, adam_epsilon``; for GaLore,
            ``optim_target_modules``.
        model: The model; only GaLore needs it.

    Raises:
        ValueError: If the optimizer is one that trainfn doesn't have, or ``optim_args`` has a key or a value
            that it doesn't take.

    >>> from trainfn.hf import TrainingArguments
    >>> cls_and_kwargs(TrainingArguments(optim="sgd", optim_args="momentum=0.9", learning_rate=0.1, use_cpu=True))
    (<class 'torch.optim.sgd.SGD'>, {'lr': 0.1, 'momentum': 0.9})
    """
    name = str(getattr(args.optim, "value", args.optim))
    check_optimizer(name)
    options = parse_optim_args(name, args.optim_args)
    cls, kwargs = _OPTIMIZERS[name](args, model, options)
    return cls, {"lr": args.learning_rate, **kwargs}


def clipping(args: Arguments, names: frozenset[str] | None = None) -> tfn.Transform:
    """Clipping by ``max_grad_norm``; 0, a negative number and None mean that nothing is clipped.

    Args:
        args: The field ``max_grad_norm``.
        names: The parameters that are clipped, by their own norm; by default all.

    >>> from trainfn.hf import TrainingArguments
    >>> updates = {"w": torch.tensor([3.0, 4.0])}
    >>> for norm in (0.0, 1.0):
    ...     rule = clipping(TrainingArguments(max_grad_norm=norm, use_cpu=True))
    ...     print(rule.update(updates, rule.init({}), {})[0]["w"])
    tensor([3., 4.])
    tensor([0.6000, 0.8000])
    """
    norm: float | None = args.max_grad_norm
    if not norm or norm <= 0:
        return tfn.optim.identity()
    clip = tfn.optim.clip_by_global_norm(norm)
    return clip if names is None else tfn.optim.masked(clip, lambda name, param: name in names)


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


def _adamw(args: Arguments, model: Model, options: Options) -> Described:
    return torch.optim.AdamW, _adam_options(args)


def _fused(args: Arguments, model: Model, options: Options) -> Described:
    return torch.optim.AdamW, {**_adam_options(args), "fused": True}  # the arithmetic is the same


def _adam_options(args: Arguments) -> Options:
    return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def _adafactor(args: Arguments, model: Model, options: Options) -> Described:
    return Adafactor, {"scale_parameter": False, "relative_step": False}


def _of_torch(cls: type[torch.optim.Optimizer]) -> Callable[[Arguments, Model, Options], Described]:
    return lambda args, model, options: (cls, options)


def _own(
    make: Make, options: Options, numbers: tuple[str, ...] = ("lr", "weight_decay"), name: str | None = None
) -> Described:
    return Named, {"kind": Kind(make, numbers), "name": name or make.__name__.strip("_"), **options}


def _lion(args: Arguments, model: Model, options: Options) -> Described:
    def lion(group: Group, n: Numbers) -> tfn.Transform:
        return tfn.optim.lion(n["learning_rate"], n["beta1"], n["beta2"], weight_decay=_decay(group, n))

    return _own(lion, {"betas": (args.adam_beta1, args.adam_beta2)}, ("lr", "weight_decay", "betas"))


def _lomo(args: Arguments, model: Model, options: Options) -> Described:
    def lomo(group: Group, n: Numbers) -> tfn.Transform:
        return tfn.optim.lomo(n["learning_rate"], weight_decay=_decay(group, n))

    return _own(lomo, options)


def _adalomo(args: Arguments, model: Model, options: Options) -> Described:
    def adalomo(group: Group, n: Numbers) -> tfn.Transform:
        return tfn.optim.adalomo(n["learning_rate"], weight_decay=_decay(group, n))

    return _own(adalomo, options)


def _galore_adamw(args: Arguments, model: Model, options: Options) -> Described:
    # transformers passes the learning rate alone, so the field's default, 1e-8, means galore-torch's own eps there.
    return _galore(args, model, options, 1e-6 if args.adam_epsilon == 1e-8 else args.adam_epsilon)


def _galore_adamw_8bit(args: Arguments, model: Model, options: Options) -> Described:
    return _galore(args, model, options, args.adam_epsilon)  # bitsandbytes' eps is 1e-8 too


def _galore(args: Arguments, model: Model, options: Options, eps: float) -> Described:
    targets = _targets(args, model)

    def galore_adamw(group: Group, n: Numbers) -> tfn.Transform:
        more = {key: group[key] for key in options}
        numbers = (n["learning_rate"], n["beta1"], n["beta2"], n["eps"])
        return tfn.optim.galore_adamw(*numbers, weight_decay=_decay(group, n), targets=targets, **more)

    known = ("lr", "weight_decay", "betas", "eps")
    return _own(galore_adamw, {**_adam_options(args), "eps": eps, **options}, known)


def _galore_adafactor(args: Arguments, model: Model, options: Options) -> Described:
    targets = _targets(args, model)

    def galore_adafactor(group: Group, n: Numbers) -> tfn.Transform:
        more = {key: group[key] for key in options}
        return tfn.optim.galore_adafactor(n["learning_rate"], weight_decay=_decay(group, n), targets=targets, **more)

    return _own(galore_adafactor, options)


def _targets(args: Arguments, model: Model) -> Callable[[str, Tensor], bool]:
    names = target_names(args, {} if model is None else model)
    return lambda name, param: name in names


def _decay(group: Group, n: Numbers) -> float | Tensor:
    return n["weight_decay"] if group["weight_decay"] else 0.0


_OPTIMIZERS: dict[str, Callable[[Arguments, Model, Options], Described]] = {
    "adamw_torch": _adamw,
    "adamw_torch_fused": _fused,
    "adafactor": _adafactor,
    "sgd": _of_torch(torch.optim.SGD),
    "adagrad": _of_torch(torch.optim.Adagrad),
    "rmsprop": _of_torch(torch.optim.RMSprop),
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
