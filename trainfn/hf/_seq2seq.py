"""`Seq2SeqTrainer`: evaluation of the tokens that the model generates."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.trainer_utils import PredictionOutput

from trainfn.hf._evaluation._prediction import StepOutput, gives_loss
from trainfn.hf._step._loss import autocast
from trainfn.hf._trainer import Trainer
from trainfn.hf._types import Batch, Dataset, Datasets, Processor, Values

if TYPE_CHECKING:
    from trainfn.hf._arguments._training import TrainingArguments

DEFAULT_NEW_TOKENS = 20  # the default of `generate`


class Seq2SeqTrainer(Trainer):
    """A `Trainer` whose predictions are generated tokens, with ``predict_with_generate=True``.

    The loss is that of `Trainer`: `compute_loss`, `compute_loss_func` and label smoothing hold here too.
    Generated tokens and labels are padded with the pad token to the length that the call asked for. Labels keep
    the collator's -100, and if a batch is longer than others, their rows are padded with -100. As everywhere with
    transformers, `compute_metrics` replaces -100 by the pad token before it decodes.

    Args:
        *args: The arguments of `Trainer`.
        **kwargs: The keyword arguments of `Trainer`.

    Raises:
        ValueError: If `args.generation_config` is not valid.

    >>> import tempfile, torch, transformers
    >>> from trainfn.hf import Seq2SeqTrainer, Seq2SeqTrainingArguments
    >>> config = transformers.T5Config(
    ...     vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    >>> args = Seq2SeqTrainingArguments(
    ...     tempfile.mkdtemp(), predict_with_generate=True, report_to="none", disable_tqdm=True)
    >>> trainer = Seq2SeqTrainer(transformers.T5ForConditionalGeneration(config), args)
    >>> trainer.predict([{"input_ids": [3, 4, 5], "labels": [4, 5]}] * 3, max_length=6).predictions.shape
    (3, 6)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = getattr(self.args, "generation_config", None)
        self._trainfn_generation = None if given is None else self.load_generation_config(given)
        self._gen_kwargs: Values | None = None  # subclasses of transformers' Seq2SeqTrainer fill this in
        _configure(self)

    @staticmethod
    def load_generation_config(gen_config_arg: str | Path | GenerationConfig) -> GenerationConfig:
        """A valid generation config, from an object (copied), a file, a folder or a name on the Hub.

        Args:
            gen_config_arg: `Seq2SeqTrainingArguments.generation_config`.

        Raises:
            ValueError: If its values contradict each other, so that it could not be saved with the model.
            TypeError: If it is not one of these.
        """
        if isinstance(gen_config_arg, GenerationConfig):
            config = deepcopy(gen_config_arg)
        elif isinstance(gen_config_arg, str | Path):
            path = Path(gen_config_arg)
            file = path.name if path.is_file() else None
            config = GenerationConfig.from_pretrained(path.parent if file else str(gen_config_arg), file)
        else:
            raise TypeError(
                f"`Seq2SeqTrainingArguments(generation_config={gen_config_arg!r})` can't work: it is of type "
                f"{type(gen_config_arg).__name__}, and not a generation config. Write "
                "`generation_config=GenerationConfig(max_length=64)`, or the path of a folder that holds one."
            )
        try:
            config.validate(strict=True)
        except ValueError as error:
            raise ValueError(
                f"`Seq2SeqTrainingArguments(generation_config={gen_config_arg!r})` can't work: its values contradict "
                f"each other, and `save_model` would refuse it after training: {error}"
            ) from error
        return config

    def evaluate(
        self,
        eval_dataset: Datasets | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """The metrics of a dataset; `gen_kwargs` go to `generate`, also for each dataset of a dict.

        Args:
            eval_dataset: As in `Trainer.evaluate`.
            ignore_keys: As in `Trainer.evaluate`.
            metric_key_prefix: As in `Trainer.evaluate`.
            **gen_kwargs: Arguments of `generate`, such as `max_length`, `max_new_tokens` and `num_beams`. The training
                arguments fill in the others, and then the model's generation config does.
        """
        with _generating(self, gen_kwargs):
            return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def predict(
        self,
        test_dataset: Dataset,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> PredictionOutput:
        """The generated tokens, labels and metrics of a dataset; `gen_kwargs` go to `generate`.

        Args:
            test_dataset: As in `Trainer.predict`.
            ignore_keys: As in `Trainer.predict`.
            metric_key_prefix: As in `Trainer.predict`.
            **gen_kwargs: As in `evaluate`.
        """
        with _generating(self, gen_kwargs):
            return super().predict(test_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> StepOutput:
        """The loss, the generated tokens and the labels of one batch.

        Args:
            model: The model to call for the loss.
            inputs: One batch.
            prediction_loss_only: Return the loss alone, and generate nothing.
            ignore_keys: Names of model outputs to leave out, where nothing is generated.
            **gen_kwargs: Arguments of `generate`, instead of those of `evaluate` or `predict`.
        """
        loss_only = prediction_loss_only or self.args.prediction_loss_only
        if loss_only or not getattr(self.args, "predict_with_generate", False):
            return super().prediction_step(model, inputs, loss_only, ignore_keys=ignore_keys)
        # The loss is a tensor that carries its count, and the evaluation loop adds both up.
        loss = super().prediction_step(model, inputs, True)[0] if gives_loss(self, inputs) else None
        inputs = self._prepare_inputs(inputs)
        prompt = _without_answers(inputs)
        model = _generator(self)  # the one passed may be a compiled function
        given, width = _lengths(model, _filled(self.args, gen_kwargs or self._gen_kwargs or {}), prompt)
        with torch.no_grad(), autocast(self.args, torch.device(self.args.device)):
            tokens = cast("Callable[..., Tensor]", model.generate)(**prompt, **given)
        labels = inputs.get("labels")
        labels = None if labels is None else self._pad_tensors_to_max_len(labels, width)
        return loss, self._pad_tensors_to_max_len(tokens, width), labels

    def _pad_tensors_to_max_len(self, tensor: Tensor, max_length: int) -> Tensor:
        """Pad rows on the right to ``max_length``; longer rows stay as they are."""
        missing = max_length - tensor.shape[-1]
        return tensor if missing <= 0 else nn.functional.pad(tensor, (0, missing), value=pad_token(self))


def _generator(trainer: Trainer) -> PreTrainedModel:
    return cast("PreTrainedModel", trainer.model)


def _configure(trainer: Seq2SeqTrainer) -> None:
    """Give the model the generation config of the arguments, so that it is saved with it."""
    if trainer._trainfn_generation is not None:
        _generator(trainer).generation_config = trainer._trainfn_generation


@contextmanager
def _generating(trainer: Seq2SeqTrainer, gen_kwargs: Values) -> Generator[None]:
    """Hold the arguments of a call until it ends; a call inside it, for one dataset of a dict, adds its own."""
    outer = trainer._gen_kwargs
    if trainer.model_init is not None:  # `train` has made another model
        _configure(trainer)
    trainer._gen_kwargs = {**(outer or {}), **gen_kwargs}
    try:
        yield
    finally:
        trainer._gen_kwargs = outer


def _lengths(model: PreTrainedModel, given: Values, prompt: Batch) -> tuple[Values, int]:
    """The arguments for `generate`, and the length of the longest sequence that they allow.

    In `generate`, a `max_new_tokens` of a config outranks the `max_length` of the call; here it does not.
    """
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    start = prompt[name].shape[-1] if name in prompt else 1  # 1: the decoder's start token
    configs = (given.get("generation_config"), model.generation_config)
    new, longest = (
        next((value for value in (getattr(config, key, None) for config in configs) if value is not None), None)
        for key in ("max_new_tokens", "max_length")
    )
    if "max_length" in given and "max_new_tokens" not in given:
        longest = given["max_length"]
        if new is not None:
            given = {**given, "max_new_tokens": max(longest - start, 1)}
            del given["max_length"]
        return given, longest
    new = given.get("max_new_tokens", new)
    if new is None and longest is not None:
        return given, longest
    return given, start + (DEFAULT_NEW_TOKENS if new is None else new)


def pad_token(trainer: Trainer) -> int:
    """The token that pads rows: the pad token of the tokenizer or the model, or else the end-of-sequence token.

    Raises:
        ValueError: If there is neither.
    """
    tokenizer: Processor | None = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    model = _generator(trainer)
    for name in ("pad_token_id", "eos_token_id"):
        for source in (tokenizer, model.config, model.generation_config):
            token: int | list[int] | None = getattr(source, name, None)
            if token is not None:
                return token[0] if isinstance(token, list) else token
    raise ValueError(
        "`Seq2SeqTrainingArguments(predict_with_generate=True)` can't work: sequences of unequal length are padded, "
        "but neither the tokenizer nor the model has a pad or end-of-sequence token. Write "
        "`Seq2SeqTrainer(..., processing_class=tokenizer)`, or `model.config.pad_token_id = 0`."
    )


def _filled(args: TrainingArguments, gen_kwargs: Values) -> Values:
    """A call's arguments, filled up from the training arguments; `generate` takes the rest from its config."""
    optional = ("max_length", "max_new_tokens", "num_beams")
    given = {name: value for name, value in gen_kwargs.items() if value is not None or name not in optional}
    if "generation_config" in given:  # a config of its own decides everything
        return given
    longest, beams = getattr(args, "generation_max_length", None), getattr(args, "generation_num_beams", None)
    if longest is not None and not {"max_length", "max_new_tokens"} & given.keys():
        given["max_length"] = longest
    if beams is not None:
        given.setdefault("num_beams", beams)
    return given


def _without_answers(inputs: Batch) -> Batch:
    """The inputs for generation: without labels, and without decoder inputs that a collator made of them."""
    labels, decoder = inputs.get("labels"), inputs.get("decoder_input_ids")
    answers = {"labels"}
    if labels is not None and decoder is not None and labels.shape == decoder.shape:
        answers |= {"decoder_input_ids", "decoder_attention_mask"}
    return {name: value for name, value in inputs.items() if name not in answers}
