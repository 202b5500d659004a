"""The table of every argument of the Trainer: what uses it, or why it is refused, or why it changes nothing."""

import dataclasses
from typing import Any

from trainfn.hf import Seq2SeqTrainingArguments, TrainingArguments
from trainfn.hf._arguments._legacy import RULES, Rule
from trainfn.hf._arguments._support import IGNORED, REFUSED, USED

HEAD = """# Every argument

This page is generated from the code that checks the arguments. No argument is without effect in silence: it is used,
or some of its values are refused with an error, or one warning names it.

The defaults are those of transformers, and the arguments of
[`Seq2SeqTrainingArguments`][trainfn.hf.Seq2SeqTrainingArguments] are at the end.
"""
SAMPLES = {bool: True, int: 8, float: 0.1, str: "name"}


def cell(text: str) -> str:
    """A text that can stand in a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def sentence(text: str) -> str:
    """The text as a sentence."""
    return text[:1].upper() + text[1:].removesuffix(".") + "."


def default(field: dataclasses.Field[Any]) -> str:
    """The default value of a field, as one writes it."""
    made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    value = getattr(made, "value", made)
    return "" if value is dataclasses.MISSING else f"`{value!r}`"


def here(name: str) -> str:
    """Return what the Trainer does with an argument."""
    said = [f"Some values are refused: {rule.why}. {rule.write}." for rule in REFUSED if rule.field == name]
    if name in IGNORED:
        said.insert(0, f"Changes nothing: {IGNORED[name]}.")
    elif name in USED:
        user = USED[name].split(", _")[0]
        alone = user.startswith(("no one", "nothing"))
        said.insert(0, f"Read by {user}." if alone else f"Used by {user}.")
    return " ".join(said)


def table(fields: list[dataclasses.Field[Any]]) -> str:
    """The rows of some fields."""
    rows = [f"| `{field.name}` | {cell(default(field))} | {cell(here(field.name))} |" for field in fields]
    return "\n".join(["| argument | default | here |", "|---|---|---|", *rows])


def old(name: str, rule: Rule) -> str:
    """The row of an old name."""
    text = f"write `{rule.new}`" if rule.new else rule.write(SAMPLES[rule.kind])
    return f"| `{name}` | {cell(sentence(text))} |"


def page() -> str:
    """The whole page."""
    fields = list(dataclasses.fields(TrainingArguments))
    known = {field.name for field in fields}
    more = [field for field in dataclasses.fields(Seq2SeqTrainingArguments) if field.name not in known]
    names = "\n".join(old(name, rule) for name, rule in RULES.items())
    return (
        f"{HEAD}\n## TrainingArguments\n\n{table(fields)}\n\n## Seq2SeqTrainingArguments\n\n{table(more)}\n\n"
        f"## Old names\n\nEach of them works with a `DeprecationWarning`, which says what to write.\n\n"
        f"| old name | today |\n|---|---|\n{names}\n"
    )
