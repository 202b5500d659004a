"""Arguments of transformers' own classes, as the Trainer reads them."""

from __future__ import annotations

import copy
import functools
import types
from typing import cast

import transformers

from trainfn.hf._arguments._training import Seq2SeqTrainingArguments, TrainingArguments
from trainfn.hf._installed import RENAMED, same_names
from trainfn.hf._types import Values


def as_ours(args: transformers.TrainingArguments) -> TrainingArguments:
    """Return arguments of any class of transformers as ours; the user's object stays as it is.

    A subclass keeps its fields, properties and methods.

    Raises:
        TypeError: If they are not training arguments.

    >>> as_ours(transformers.TrainingArguments(learning_rate=1e-3, use_cpu=True)).learning_rate
    0.001
    """
    if isinstance(args, TrainingArguments):
        return args
    if not isinstance(args, transformers.TrainingArguments):
        raise TypeError(
            f"`Trainer(args=...)` can't work: it is of type {type(args).__name__}, and TrainingArguments are needed."
            " Write `Trainer(model, TrainingArguments(output_dir))`."
        )
    values: Values = copy.copy(args).__dict__
    values.pop("_setup_devices", None)  # the device is found again: transformers may have taken several
    for old, new in RENAMED.items():
        values.setdefault(new, values.get(old))
        values.setdefault(old, values[new])
    made = cast("TrainingArguments", object.__new__(_with_ours(type(args))))
    vars(made).update(
        legacy_arguments=None,
        data_order="trainfn",
        torch_compile_given=bool(args.torch_compile),
        restores_callbacks=True,
        **values,
    )
    same_names(made)
    return made


@functools.cache
def _with_ours(kind: type) -> type:
    """A class of arguments with our methods after those of its subclasses; they are pickled as those of ``kind``."""
    ours = Seq2SeqTrainingArguments if issubclass(kind, transformers.Seq2SeqTrainingArguments) else TrainingArguments

    def pickled(args: TrainingArguments) -> object:
        plain = object.__new__(kind)
        vars(plain).update(vars(args))
        return plain.__reduce_ex__(0)

    def fill(body: Values) -> None:
        body.update({"__module__": kind.__module__, "__reduce__": pickled})

    return ours if issubclass(ours, kind) else types.new_class(kind.__name__, (kind, ours), {}, fill)
