"""Turn rows of text into rows of tokens and labels."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import datasets
from transformers import PreTrainedTokenizerBase

from trainfn.errors import nearest
from trainfn.hf._sft._assistant import common, is_marked, marked, spoken
from trainfn.hf._sft._config import SFTConfig
from trainfn.hf._sft._packing import IGNORED, masked, pack_dataset
from trainfn.hf._types import Row, Values

Encoded: TypeAlias = tuple[list[int], Sequence[int]]
"""The tokens of a row, and a flag for each: whether the token is learnt."""


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Turns a Trainer's datasets into rows of tokens.

    Attributes:
        tokenizer: A tokenizer of transformers.
        formatting: ``row -> text``.
    """

    tokenizer: PreTrainedTokenizerBase
    formatting: Callable[[Row], str] | None

    def __call__(self, dataset: Any, args: SFTConfig, name: str) -> Any:
        """Return a dataset, or each of a dict, as tokens and labels; a name or a prepared dataset stays as it is."""
        given = args.dataset_kwargs if isinstance(args.dataset_kwargs, dict) else {}
        if dataset is None or isinstance(dataset, str) or given.get("skip_prepare_dataset"):
            return dataset
        if isinstance(dataset, Mapping) and name != "train":
            return {key: self(part, args, key) for key, part in dataset.items()}
        packing = args.packing if name == "train" else args.packs_eval
        return prepared(dataset, self.tokenizer, args, name=name, packing=packing, formatting=self.formatting)


def prepared(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    *,
    name: str,
    packing: bool,
    formatting: Callable[[Row], str] | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Return the dataset with the columns ``input_ids`` and ``labels``; if packed, with ``seq_lengths`` too.

    Args:
        dataset: Rows with a text column; ``messages``; ``prompt`` and ``completion``, texts or messages; or
            ``input_ids``. A `datasets.Dataset`, an `IterableDataset`, or a list of dicts.
        tokenizer: A tokenizer of transformers.
        args: The `SFTConfig`.
        name: The dataset's name, for messages.
        packing: Whether to pack it.
        formatting: ``row -> text``.

    Raises:
        ValueError: If the rows have nothing to tokenize, or nothing to learn.
        TypeError: If ``dataset`` is not a dataset.
    """
    dataset = _as_dataset(dataset, name)
    if "seq_lengths" in (dataset.column_names or ()):
        return dataset
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"SFTTrainer({name}_dataset=...): the {name} dataset has no rows. Pass one that has rows.")
    encode = Encode.of(first, tokenizer, args, name, cut=args.max_length if _cuts(args, packing) else None,
                       formatting=formatting)  # fmt: skip
    lengths = isinstance(dataset, datasets.Dataset)
    processes = {"num_proc": args.dataset_num_proc} if lengths else {}
    before = len(dataset) if lengths else 0
    dataset = dataset.map(encode, remove_columns=list(first), **processes)
    dataset = dataset.filter(_trainable, **processes)
    if lengths:
        _report_dropped(before - len(dataset), before, name, args)
    if args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)
    if not packing:
        return dataset
    assert args.max_length is not None  # as `check` has made sure
    return pack_dataset(dataset, args.max_length, args.packing_strategy)


def _cuts(args: SFTConfig, packing: bool) -> bool:
    return not packing or args.packing_strategy == "bfd"


def _as_dataset(dataset: Any, name: str) -> datasets.Dataset | datasets.IterableDataset:
    if isinstance(dataset, Mapping):
        raise TypeError(
            f"SFTTrainer({name}_dataset=...): a {type(dataset).__name__} of {sorted(dataset)} is several datasets."
            f" Pass one: `{name}_dataset=dataset[{next(iter(dataset), 'train')!r}]`."
        )
    if isinstance(dataset, datasets.Dataset):
        if dataset.format["type"] == "custom":
            raise ValueError(
                f"SFTTrainer({name}_dataset=...) can't work: the function of `with_transform` would be called once, not"
                " in every epoch. Write `dataset.map(function)`; or return rows of tokens from the function, and write"
                " `SFTConfig(dataset_kwargs={'skip_prepare_dataset': True})`."
            )
        return dataset.with_format(None)
    if isinstance(dataset, datasets.IterableDataset):
        return dataset
    if isinstance(dataset, Sequence) and all(isinstance(row, Mapping) for row in dataset):
        return datasets.Dataset.from_list([dict(row) for row in dataset])
    raise TypeError(
        f"SFTTrainer({name}_dataset={type(dataset).__name__}): a `datasets.Dataset` is needed, or a list of dicts."
        " Write `datasets.Dataset.from_list(rows)`."
    )


def _trainable(row: Row) -> bool:
    """Whether a label of the row counts; the first one never does, because no token predicts it."""
    return any(label != IGNORED for label in row["labels"][1:])


def _report_dropped(dropped: int, rows: int, name: str, args: SFTConfig) -> None:
    if not dropped:
        return
    text = f"{dropped} of {rows} rows of the {name} dataset have no token to learn from: they are too short, or all of"
    text += f" their learnt tokens lie beyond `max_length={args.max_length}`"
    if dropped == rows:
        raise ValueError(f"SFTTrainer: {text}. Raise `max_length`, or correct the rows' labels and masks.")
    warnings.warn(f"SFTTrainer: {text}. They are left out.", stacklevel=4)


# --- tokens -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Encode:
    """The function from a row to its tokens and labels.

    Attributes:
        kind: The kind of the rows: ``"tokens"``, ``"messages"``, ``"prompt"`` or ``"text"``.
        tokenizer: A tokenizer of transformers.
        args: The `SFTConfig`.
        cut: The length that rows are cut to.
        completion_only: Whether prompts are not learnt.
        formatting: ``row -> text``.
    """

    kind: str
    tokenizer: PreTrainedTokenizerBase
    args: SFTConfig
    cut: int | None
    completion_only: bool
    formatting: Callable[[Row], str] | None = None

    @classmethod
    def of(
        cls,
        first: Row,
        tokenizer: PreTrainedTokenizerBase,
        args: SFTConfig,
        name: str,
        *,
        cut: int | None,
        formatting: Callable[[Row], str] | None,
    ) -> Encode:
        """Return the function for rows with the columns of the first one."""
        kind = _kind(first, args, name, formatting)
        parts = kind == "prompt" or (kind == "tokens" and "completion_mask" in first)
        if args.completion_only_loss and not parts:
            raise ValueError(
                f"`SFTConfig(completion_only_loss=True)` can't work: rows of the {name} dataset have {sorted(first)}"
                f"{', and `formatting_func` makes one text of them' if formatting else ''}; there is no completion."
                " Write `prompt` and `completion` into the rows, or leave `completion_only_loss` out."
            )
        if args.assistant_only_loss and not _conversational(first, kind):
            raise ValueError(
                f"`SFTConfig(assistant_only_loss=True)` can't work: rows of the {name} dataset have {sorted(first)},"
                " and no messages of an assistant. Write `messages` into the rows, or leave `assistant_only_loss` out."
            )
        only = parts if args.completion_only_loss is None else args.completion_only_loss
        return cls(kind, tokenizer, args, cut, only, formatting)

    def __call__(self, row: Row) -> dict[str, list[int]]:
        """Return the row's ``input_ids`` and ``labels``."""
        ids, learnt = getattr(self, f"_{self.kind}")(row)
        labels = row["labels"] if self.kind == "tokens" and "labels" in row else _labels(ids, learnt)
        if len(ids) != len(labels):
            raise ValueError(
                f"SFTTrainer: a row has {len(ids)} input_ids and {len(labels)} labels (or masks), but each token needs"
                " one. Correct the column `labels`, `completion_mask` or `assistant_masks`."
            )
        keep = slice(self.cut) if self.args.truncation_mode == "keep_start" else slice(-(self.cut or 0), None)
        return {"input_ids": list(ids[keep]), "labels": list(labels[keep])}

    def _tokens(self, row: Row) -> Encoded:
        labels = masked(row["input_ids"], row, () if "labels" in row else self.args.masks)
        return row["input_ids"], [label != IGNORED for label in labels]

    def _text(self, row: Row) -> Encoded:
        text = self.formatting(row) if self.formatting else row[self.args.dataset_text_field]
        if not isinstance(text, str):
            source = "formatting_func(row)" if self.formatting else f"the column {self.args.dataset_text_field!r}"
            raise TypeError(
                f"SFTTrainer: {source} gives a {type(text).__name__}, which can't be tokenized. Return one `str` for"
                " each row."
            )
        ids = self._ended(self._ids(text))
        return ids, [True] * len(ids)

    def _messages(self, row: Row) -> Encoded:
        messages = _chat(row["messages"] if "messages" in row else row["conversations"])
        return self._templated(messages, row)

    def _prompt(self, row: Row) -> Encoded:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            start, ids = self._ids(prompt), self._ended(self._ids(prompt + completion))
            learnt = [True] * len(ids)
        else:
            prompt, completion = _chat(prompt), _chat(completion)
            start, _ = self._templated(prompt, row, add_generation_prompt=True, masks=False)
            ids, learnt = self._templated(prompt + completion, row)
        if self.completion_only:
            begins = common(start, ids)
            if begins < len(start) - 1:  # the prompt's last token may merge with the beginning of the completion
                warnings.warn(
                    f"SFTTrainer: a prompt's tokens differ from the beginning of prompt and completion at {begins} of"
                    f" {len(start)}, and the row is learnt from there on. Check that the chat template writes the same"
                    " prompt in both.",
                    stacklevel=2,
                )
            learnt = [bool(bit) and n >= begins for n, bit in enumerate(learnt)]
        return ids, learnt

    def _ids(self, text: str) -> list[int]:
        return list(cast("list[int]", self.tokenizer(text, verbose=False)["input_ids"]))

    def _ended(self, ids: list[int]) -> list[int]:
        end = cast("int | None", self.tokenizer.eos_token_id)
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def _templated(
        self, messages: list[Values], row: Row, *, add_generation_prompt: bool = False, masks: bool = True
    ) -> Encoded:
        tools = row.get("tools")
        masks = masks and self.args.assistant_only_loss
        if not self.tokenizer.chat_template:
            raise ValueError(
                "SFTTrainer: rows of messages need a chat template, and the tokenizer has none. Set"
                " `tokenizer.chat_template`, or write `SFTConfig(chat_template_path='template.jinja')`."
            )
        apply = cast("Callable[..., dict[str, list[int]]]", self.tokenizer.apply_chat_template)
        template = self._template()
        tells = is_marked(template)

        def rendered(some: Sequence[Values], **how: bool) -> dict[str, list[int]]:
            return apply(
                list(some),
                tools=json.loads(tools) if isinstance(tools, str) else tools,
                return_dict=True,
                **({"chat_template": template} if self.args.assistant_only_loss else {}),
                **how,
                **(row.get("chat_template_kwargs") or {}),
            )

        encoded = rendered(
            messages, add_generation_prompt=add_generation_prompt, return_assistant_tokens_mask=masks and tells
        )
        ids = list(encoded["input_ids"])
        if not masks:
            return ids, [True] * len(ids)
        if tells:
            return ids, list(encoded["assistant_masks"])
        return ids, spoken(messages, ids, lambda some, **how: list(rendered(some, **how)["input_ids"]))

    def _template(self) -> str:
        """Return the chat template, in which the assistant's messages are marked if we know how."""
        held: object = self.tokenizer.chat_template
        text = str(held["default"]) if isinstance(held, dict) else str(held)
        return marked(text) if self.args.assistant_only_loss else text


def _kind(row: Row, args: SFTConfig, name: str, formatting: Callable[[Row], str] | None) -> str:
    if {"image", "images"} & row.keys():
        raise ValueError(
            f"SFTTrainer: the {name} dataset has images, and SFTTrainer trains on text alone. Remove the column, or"
            " write `Trainer(data_collator=...)` for a model with images."
        )
    if "input_ids" in row:
        if formatting is not None:
            warnings.warn(
                "SFTTrainer(formatting_func=...): the rows are tokens already, so it is not called. Leave it out.",
                stacklevel=5,
            )
        return "tokens"
    if formatting is not None:
        return "text"
    if "prompt" in row and "completion" in row:
        return "prompt"
    if _listed(row.get("messages")) or _listed(row.get("conversations")):
        return "messages"
    if args.dataset_text_field in row:
        return "text"
    guess = nearest(args.dataset_text_field, row, "{!r}", otherwise=repr(next(iter(row), "text")))
    raise ValueError(
        f"SFTTrainer: rows of the {name} dataset have {sorted(row)}, but no {args.dataset_text_field!r}, `messages`,"
        f" `prompt` with `completion`, or `input_ids`. Write `SFTConfig(dataset_text_field={guess})`, or pass"
        " `formatting_func=lambda row: ...`."
    )


def _listed(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _conversational(row: Row, kind: str) -> bool:
    if kind == "tokens":
        return "assistant_masks" in row or "labels" in row
    return kind == "messages" or (kind == "prompt" and _listed(row["prompt"]))


def _chat(messages: Sequence[Row]) -> list[Values]:
    """Return messages with ``role`` and ``content``, also for the old names ``from`` and ``value``."""
    names = {"from": "role", "value": "content"}
    # All messages of a dataset have the same keys: a key that a message lacked holds None.
    return [{names.get(k, k): v for k, v in message.items() if v is not None} for message in messages]


def _labels(ids: Sequence[int], learnt: Sequence[int]) -> list[int]:
    if len(ids) != len(learnt):
        return list(map(int, learnt))  # the caller raises an error about the two lengths
    return [token if bit else IGNORED for token, bit in zip(ids, learnt, strict=True)]
