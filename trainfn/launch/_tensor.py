"""The layers of a transformers model that are split over the axis ``tensor``."""

from __future__ import annotations

import re
from typing import Any

from trainfn._plan._layout import Rule

_RULES: dict[str, Rule] = {"colwise": "columns", "rowwise": "rows"}


def tensor_rules(model: Any) -> tuple[tuple[str, Rule], ...]:
    r"""Return `Plan.rules` for the axis ``tensor``, from the table that a transformers model comes with.

    The table is ``model.config.base_model_tp_plan``. Its "colwise" layers are split by outputs, "columns" here. Its
    "rowwise" layers are split by inputs, "rows" here.

    Args:
        model: A transformers model, or its ``config``.

    Raises:
        ValueError: If the model has no such table, like T5 and GPT-2, or splits more than columns and rows.

    >>> from types import SimpleNamespace as Config
    >>> tensor_rules(Config(base_model_tp_plan={"layers.*.mlp.up_proj": "colwise"}))
    (('(^|\\.)layers\\.\\d+\\.mlp\\.up_proj\\.', 'columns'),)
    """
    config = getattr(model, "config", model)
    plan = getattr(config, "base_model_tp_plan", None)
    name = type(model).__name__
    if not plan:
        raise ValueError(
            f"tensor_rules({name}): its config has no `base_model_tp_plan`, which names the layers to split. Write"
            ' `rules=((r"(q|k|v)\\.weight$", "columns"), (r"(o)\\.weight$", "rows"))`. A layer that computes'
            " query, key and value as one, such as GPT-2's c_attn, can't be split by columns."
        )
    refused = {key: value for key, value in plan.items() if value not in _RULES}
    if refused:
        listed = ", ".join(f"{key!r}: {value!r}" for key, value in refused.items())
        raise ValueError(
            f"tensor_rules({name}): of its `base_model_tp_plan`, {listed} can't be done: a plan splits columns and rows"
            " of linear layers. Write `rules=` for those layers, and leave the others out."
        )
    return tuple((_pattern(key), _RULES[value]) for key, value in plan.items())


def _pattern(key: str) -> str:
    """Return a key of transformers' plan, in which ``*`` is a number, as an expression for parameter names."""
    return r"(^|\.)" + re.escape(key).replace(r"\*", r"\d+") + r"\."
