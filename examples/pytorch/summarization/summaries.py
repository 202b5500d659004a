"""Functions of both summarization scripts: texts and summaries as tokens, and ROUGE."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import shared
from datasets import Dataset

COLUMNS = {
    "big_patent": ("description", "abstract"),
    "billsum": ("text", "summary"),
    "cnn_dailymail": ("article", "highlights"),
    "multi_news": ("document", "summary"),
    "orange_sum": ("text", "summary"),
    "samsum": ("dialogue", "summary"),
    "xsum": ("document", "summary"),
}
IGNORED = -100  # a label that counts for nothing


def columns(names: Sequence[str], args: Any) -> tuple[str, str]:
    """The column with the texts and the one with the summaries; by default those of the dataset, or the first two."""
    usual = COLUMNS.get((args.dataset_name or "").split("/")[-1], (*names, *names)[:2])
    found = args.text_column or usual[0], args.summary_column or usual[1]
    for flag, name in zip(("--text_column", "--summary_column"), found, strict=True):
        if name not in names:
            raise ValueError(f"`{flag} {name}`: there is no such column in the data, which have {', '.join(names)}.")
    return found


def tokenized(rows: Dataset, tokenizer: Any, args: Any, target_length: int, desc: str) -> Dataset:
    """Texts as `input_ids`, summaries as `labels`; pairs of which one half is empty are left out.

    Args:
        rows: The texts and summaries.
        tokenizer: The tokenizer of the model.
        args: The command line's arguments about the data.
        target_length: Tokens after which a summary is cut off.
        desc: What the progress bar says.
    """
    text, summary = columns(rows.column_names, args)
    padding = "max_length" if args.pad_to_max_length else False
    cut = {"padding": padding, "truncation": True}

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pairs = [(x, y) for x, y in zip(batch[text], batch[summary], strict=True) if x and y]
        texts = [args.source_prefix + x for x, _ in pairs]
        encoded = dict(tokenizer(texts, max_length=args.max_source_length, **cut))
        labels = tokenizer(text_target=[y for _, y in pairs], max_length=target_length, **cut)["input_ids"]
        if padding and args.ignore_pad_token_for_loss:
            labels = [[IGNORED if x == tokenizer.pad_token_id else x for x in row] for row in labels]
        return {**encoded, "labels": labels}

    return rows.map(encode, batched=True, remove_columns=rows.column_names, desc=desc, **shared.mapping(args))


# --- ROUGE ----------------------------------------------------------------------------------------------------------


class Rouge:
    """ROUGE of generated tokens against the labels, in percent, and the mean length of what was generated.

    Args:
        tokenizer: The tokenizer, which turns tokens into text.
    """

    def __init__(self, tokenizer: Any) -> None:
        scorer = shared.required("rouge_score.rouge_scorer", "rouge-score", "The metric of summaries")
        self.names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
        self.scorer, self.tokenizer = scorer.RougeScorer(self.names, use_stemmer=True), tokenizer

    def text(self, tokens: np.ndarray) -> list[str]:
        """Return tokens as texts; ignored labels count as padding."""
        tokens = np.where(np.asarray(tokens) == IGNORED, self.tokenizer.pad_token_id, tokens)
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def __call__(self, prediction: Any) -> dict[str, float]:
        """The scores of an `EvalPrediction`, or of a pair (generated, labels)."""
        generated, labels = prediction
        generated = generated[0] if isinstance(generated, tuple) else generated
        # ROUGE-Lsum compares line by line: a line for each sentence.
        guesses, truths = ([sentences(text) for text in self.text(tokens)] for tokens in (generated, labels))
        scores = [self.scorer.score(truth, guess) for guess, truth in zip(guesses, truths, strict=True)]
        result = {name: round(100 * float(np.mean([s[name].fmeasure for s in scores])), 4) for name in self.names}
        written = (generated != self.tokenizer.pad_token_id) & (generated != IGNORED)
        return {**result, "gen_len": float(np.mean(written.sum(-1)))}


def sentences(text: str) -> str:
    """A text with each sentence on a line of its own."""
    return re.sub(r"(?<=[.!?])\s+", "\n", text)
