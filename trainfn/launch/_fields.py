"""The fate of each field of a configuration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

Fate = Literal["mapped", "not needed", "ignored", "refused"]


class Field(NamedTuple):
    """A field of a configuration, and its fate.

    Attributes:
        name: The name that the user wrote: a key of Accelerate's yaml, or a dotted one of DeepSpeed's json.
        value: Its value.
        fate: ``"mapped"`` to a setting here; ``"not needed"`` if nothing is lost without it; ``"ignored"`` with a
            warning if something is; ``"refused"`` with an error.
        detail: The setting, or the reason.
    """

    name: str
    value: str
    fate: Fate
    detail: str


def table(fields: Sequence[Field]) -> str:
    """Return a table with one line for each field.

    >>> print(table([Field("fsdp_version", "2", "mapped", "Plan(stage=3)"), Field("debug", "true", "ignored", "no")]))
      fsdp_version  2     mapped   Plan(stage=3)
      debug         true  ignored  no
    """
    widths = [max((len(field[i]) for field in fields), default=0) for i in range(3)]
    return "\n".join(
        "  " + "  ".join([*(text.ljust(width) for text, width in zip(field[:3], widths, strict=True)), field.detail])
        for field in fields
    )


def check(fields: Iterable[Field], call: str) -> None:
    """Raise if a field was refused; the message names all of them."""
    refused = [f"{field.name}={field.value}: {field.detail}" for field in fields if field.fate == "refused"]
    if refused:
        raise ValueError(f"{call}: the configuration asks for what can't be honoured. " + " ".join(refused))


def text(value: Any) -> str:
    """Return a value as a launcher exports it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_true(value: str | None) -> bool:
    """Return whether a flag is on, as Accelerate reads it."""
    return (value or "").lower() in ("1", "true", "yes", "y", "t", "on")
