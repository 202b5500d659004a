"""The weights that `optim_target_modules` selects."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import transformers
from torch import Tensor, nn

from trainfn.errors import shortened

_logger = logging.getLogger(__name__)


def target_names(args: transformers.TrainingArguments, model: nn.Module | Mapping[str, Tensor]) -> frozenset[str]:
    """The parameters that GaLore projects: the weights of the linear layers whose names ``optim_target_modules`` match.

    A string is a regular expression for the whole name of a layer, or ``"all-linear"``. In a list, each string is a
    part of a name, or a regular expression for the whole of it. Layers that match and are not linear, such as GPT-2's
    ``Conv1D``, are left out, and a log line names them.

    Raises:
        ValueError: If ``optim_target_modules`` is None, not a valid regular expression, or matches no linear layer; or
            if the parameters are given without a model.
        TypeError: If it is neither a string nor a list of strings.

    >>> from trainfn.hf import TrainingArguments
    >>> args = TrainingArguments(optim="galore_adamw", optim_target_modules=["0", r"[2-9]"], use_cpu=True)
    >>> sorted(target_names(args, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))))
    ['0.weight', '2.weight']
    """
    targets: str | list[str] | None = args.optim_target_modules
    name = str(getattr(args.optim, "value", args.optim))
    call = f"TrainingArguments(optim={name!r}, optim_target_modules={targets!r})"
    if targets is None:
        raise ValueError(
            f"`TrainingArguments(optim={name!r})` can't work: GaLore must know which weights to project. Write"
            f" `TrainingArguments(optim={name!r}, optim_target_modules=['attn', 'mlp'])`, or 'all-linear'."
        )
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise TypeError(
            f"`{call}` can't work: that is neither a string nor a list of strings. Write"
            " `optim_target_modules=['attn', 'mlp']`, or 'all-linear'."
        )
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"`{call}` can't work on parameters alone, which don't say what is a linear layer. Pass the model itself."
        )
    return _names(call, targets, model)


def _names(call: str, targets: str | list[str], model: nn.Module) -> frozenset[str]:
    everywhere = isinstance(targets, str) and targets.replace("_", "-") == "all-linear"
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = [name for name in linear if everywhere or _matches(call, targets, name)]
    others = [
        name
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear)
        and any(p.dim() == 2 for p in module.parameters(recurse=False))
        and _matches(call, targets, name)
    ]
    if others:
        _logger.warning("%s: GaLore projects linear layers only, and not %s.", call, shortened(others))
    # `named_parameters` lists a weight that layers share under its first name only.
    names = {name for name, _ in model.named_parameters()} & {f"{name}.weight".removeprefix(".") for name in chosen}
    if not names:
        have = f"its linear layers are {shortened(linear)}" if linear else "the model has no linear layer"
        instead = f"`optim_target_modules=[{linear[0].split('.')[-1]!r}]`" if linear else "`optim='adamw_torch'`"
        raise ValueError(
            f"`{call}` can't work: no linear layer of this {type(model).__name__} matches; {have}. Write {instead}."
        )
    return frozenset(names)


def _matches(call: str, targets: str | list[str], name: str) -> bool:
    if isinstance(targets, list) and any(target in name for target in targets):
        return True
    patterns = [targets] if isinstance(targets, str) else targets
    try:
        return any(re.fullmatch(pattern, name) for pattern in patterns)
    except re.error as error:
        raise ValueError(
            f"`{call}` can't work: {error.pattern!r} is not a valid regular expression, {error.msg}. Write"
            " `'.*attn.*'` for what has 'attn' anywhere in its name."
        ) from None
