"""`SFTTrainer`: supervised fine-tuning of causal language models, with trl's names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from trainfn.hf._sft import _loss, _model
from trainfn.hf._sft._config import SFTConfig
from trainfn.hf._sft._data import Preparation
from trainfn.hf._sft._packing import SFTCollator
from trainfn.hf._sft._record import SFTRecord
from trainfn.hf._trainer import Trainer
from trainfn.hf._types import (
    Batch,
    Callback,
    Collator,
    Dataset,
    Datasets,
    Loader,
    Loss,
    LossFunction,
    MetricsFunction,
    Nested,
    Optimizer,
    Outputs,
    Processor,
    Row,
    Scheduler,
    Values,
)

if TYPE_CHECKING:
    from transformers.utils.quantization_config import QuantizationConfigMixin


class SFTTrainer(Trainer):
    """Fine-tune a causal language model on texts, conversations, or prompts with completions.

    A row's ``text`` is tokenized, with an end token; ``messages`` go through the tokenizer's chat template; of
    ``prompt`` and ``completion`` the completion is learnt. Labels are made once, before training. A pack gives the same
    loss as its rows one by one: a test before training finds out how the model separates sequences.

    The log has ``entropy`` and ``mean_token_accuracy``, exact means over the tokens learnt since the last log, and
    ``num_tokens``, all tokens so far without padding.

    Args:
        model: A causal language model; or its name or folder, for `AutoModelForCausalLM.from_pretrained`, in float32.
        args: `SFTConfig`, or `TrainingArguments`.
        data_collator: The function from a list of prepared rows to a batch.
        train_dataset: A `datasets.Dataset`, an `IterableDataset`, or a list of dicts.
        eval_dataset: The same, or a dict of such datasets by name.
        processing_class: The tokenizer; by default that of the model. It gets a ``pad_token``, if it has none.
        compute_loss_func: See `Trainer`.
        compute_metrics: See `Trainer`.
        callbacks: See `Trainer`.
        optimizers: See `Trainer`.
        optimizer_cls_and_kwargs: See `Trainer`.
        preprocess_logits_for_metrics: See `Trainer`.
        quantization_config: The quantization of a model that is loaded by name.
        peft_config: The adapters that the package peft adds.
        formatting_func: ``row -> text``.
        tokenizer: The old name of ``processing_class``.
        old: Other arguments of old versions of trl: ``dataset_text_field``, ``max_seq_length``, ``packing``, …

    Raises:
        ValueError: If rows have nothing to learn, or the model does not support an argument.
        ImportError: If ``peft_config`` is given without the package peft.

    >>> from trainfn.hf import SFTConfig, SFTTrainer
    >>> SFTConfig("runs/sft", packing=True, use_cpu=True).packing_strategy
    'bfd'
    """

    args: SFTConfig  # type: ignore[assignment]

    def __init__(
        self,
        model: str | Path | nn.Module,
        args: TrainingArguments | None = None,
        data_collator: Collator | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Datasets | None = None,
        processing_class: Processor | None = None,
        compute_loss_func: LossFunction | None = None,
        compute_metrics: MetricsFunction | None = None,
        callbacks: Sequence[Callback] | Callback | None = None,
        optimizers: tuple[Optimizer | None, Scheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[Callable[..., torch.optim.Optimizer], Values] | None = None,
        preprocess_logits_for_metrics: Callable[[Nested, Nested], Nested] | None = None,
        quantization_config: QuantizationConfigMixin | None = None,
        peft_config: object | None = None,
        formatting_func: Callable[[Row], str] | None = None,
        *,
        tokenizer: Processor | None = None,
        **old: Any,
    ) -> None:
        args = _model.arguments(model, args, old)
        _check(args, data_collator, compute_loss_func)
        model = _model.model_of(model, args, quantization_config, peft_config)
        auxiliary = _model.balance_experts(model, args)
        named = processing_class if processing_class is not None else tokenizer
        found = _model.tokenizer_of(model, args, named)
        _model.match_tokens(model, found, args)
        self._trainfn_sft = SFTRecord(Preparation(found, formatting_func), auxiliary=auxiliary)
        prepare = self._trainfn_sft.prepare
        super().__init__(
            model,
            args,
            data_collator or _collator(model, args, found),
            prepare(train_dataset, args, "train"),
            prepare(eval_dataset, args, "eval"),
            processing_class=found if tokenizer is None else processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            tokenizer=tokenizer,
        )
        self._trainfn.shifts = True  # the loss of a causal language model shifts the labels
        self._trainfn.loss_metrics = functools.partial(_loss.metrics, self)
        _loss.separate(self, self.train_dataset)
        _loss.separate(self, self.eval_dataset)

    # --- data -----------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for name in ("seq_lengths", *self.args.masks):
            if self._signature_columns is not None and name not in self._signature_columns:
                self._signature_columns.append(name)

    # --- loss -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Loss | tuple[Loss, Outputs]:
        """Return the mean loss of the learnt tokens; ``num_items_in_batch`` replaces their number."""
        record = self._trainfn_sft
        called = _loss.model_inputs(model, inputs, record.separation)
        if self.compute_loss_func or self.label_smoother or self.args.use_liger_kernel:  # another loss was asked for
            loss, outputs = cast("tuple[Loss, Outputs]", super().compute_loss(model, called, True, num_items_in_batch))
        else:
            labels = called.pop("labels")
            outputs = model(**called)
            loss = _loss.loss(self, outputs, labels, num_items_in_batch)
        if (found := record.evaluated) is not None:
            for name, mean in self._trainfn.loss_metrics(inputs, outputs).items():
                found[name] = found[name] + mean if name in found else mean
        return (loss, outputs) if return_outputs else loss

    # --- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Datasets | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return the loss and the metrics over a dataset, which is prepared like those of the Trainer."""
        dataset = self._trainfn_sft.prepare(eval_dataset, self.args, "eval")
        _loss.separate(self, dataset)
        return super().evaluate(dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Return the predictions over a dataset, which is prepared like those of the Trainer."""
        dataset = self._trainfn_sft.prepare(test_dataset, self.args, "test")
        _loss.separate(self, dataset)
        return super().predict(dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader: Loader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run the loop that `evaluate` and `predict` share, with the loss's own metrics."""
        record = self._trainfn_sft
        record.evaluated = {}
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            evaluated = {name: mean for name, mean in record.evaluated.items() if name != "num_tokens"}
            means = self._trainfn.world.means(evaluated)
        finally:
            record.evaluated = None
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": float(mean.value) for name, mean in means.items()})
        return output


def _check(args: SFTConfig, collator: Collator | None, loss: LossFunction | None) -> None:
    if collator is not None and (args.padding_free or (args.packing and args.packing_strategy != "wrapped")):
        raise ValueError(
            "SFTTrainer(data_collator=...) can't work with `packing` or `padding_free`: the default collator separates"
            " the sequences of a pack. Leave `data_collator` out, or write `packing=False, padding_free=False`."
        )
    if loss is not None and args.loss_type == "dft":
        raise ValueError(
            "SFTTrainer(compute_loss_func=...) can't work with `SFTConfig(loss_type='dft')`: these are two losses."
            " Leave one of them out."
        )


def _collator(model: nn.Module, args: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> SFTCollator:
    """Return the default collator.

    Flash attention finds sequences in one long row. In other attention, one long row costs the square of its length.
    """
    flash = "flash" in str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
    pad = cast("int", tokenizer.pad_token_id)
    return SFTCollator(pad, args.multiple_of, flatten=args.padding_free, flatten_packs=flash, masks=args.masks)
