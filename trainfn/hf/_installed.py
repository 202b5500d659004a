"""Names that differ between releases of transformers, which rename fields and methods; here both names work."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, cast

import transformers

T = TypeVar("T")

RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",  # in 5.24
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""The old and the new names of fields of `TrainingArguments`."""


def completed(base: type[T], renamed: dict[str, str] = RENAMED) -> type[T]:
    """A dataclass of arguments with both names of each renamed field, of which ``base`` has one."""
    had = {field.name: field for field in dataclasses.fields(base)}  # type: ignore[arg-type]
    other = renamed | {new: old for old, new in renamed.items()}
    lacking = {name: had[twin] for name, twin in other.items() if name not in had and twin in had}
    if not lacking:
        return base
    fields = [(name, cast("Any", twin.type) | None, _optional(twin)) for name, twin in lacking.items()]
    read: list[str] = base._VALID_DICT_FIELDS  # type: ignore[attr-defined]
    texts = [*read, *(name for name, twin in lacking.items() if twin.name in read)]  # JSON on a command line
    namespace = {"_VALID_DICT_FIELDS": texts, "__module__": __name__}
    return dataclasses.make_dataclass(base.__name__, fields, bases=(base,), namespace=namespace, repr=False)


def _optional(twin: dataclasses.Field[Any]) -> Any:
    switch = {"nargs": "?", "const": True} if twin.type in (bool, bool | None) else {}  # `--name` means True
    return dataclasses.field(default=None, kw_only=True, metadata={**twin.metadata, **switch})


Arguments = completed(transformers.TrainingArguments)
"""The `TrainingArguments` of transformers, with the names of newer and older releases too."""


def same_names(args: transformers.TrainingArguments) -> None:
    """Give both names of a field one value: that of the new name, or of the old name if the new one is None."""
    for old, new in RENAMED.items():
        if getattr(args, new) is None:
            setattr(args, new, getattr(args, old))
        setattr(args, old, getattr(args, new))


def attribute(owner: object, *names: str) -> Any:
    """The value of the first of these attributes that an object has; None if it has none of them."""
    return next((getattr(owner, name) for name in names if hasattr(owner, name)), None)
