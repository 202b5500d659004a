"""`SFTTrainer`: supervised fine-tuning of causal language models, with trl's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import trainfn as tfn
from trainfn.hf._sft import _loss as _sft_loss
from trainfn.hf._sft import _model as _sft_model
from trainfn.hf._sft._config import SFTConfig
from trainfn.hf._sft._data import prepared
from trainfn.hf._sft._packing import SFTCollator
from trainfn.hf._trainer import Trainer


class SFTTrainer(Trainer):
    """Fine-tune a causal language model on texts, conversations, or prompts with completions.

    A row's ``text`` is tokenized and ended; ``messages`` go through the tokenizer's chat template; of ``prompt`` and
    ``completion`` the completion is learnt. Labels are made once, before training. Packs train what their rows would,
    one by one: how the model keeps sequences apart is tried out beforehand.

    The log has ``entropy`` and ``mean_token_accuracy``, exact means over the tokens learnt since the last log, and
    ``num_tokens``, all tokens so far without padding.

    Args:
        model: A causal language model; or its name or folder, for `AutoModelForCausalLM.from_pretrained`, in float32.
        args: `SFTConfig`, or `TrainingArguments`.
        data_collator: Makes a batch of a list of prepared rows.
        train_dataset: A `datasets.Dataset`, an `IterableDataset`, or a list of dicts.
        eval_dataset: The same, or a dict of such by name.
        processing_class: The tokenizer; by default that of the model. It gets a ``pad_token``, if it has none.
        compute_loss_func: See `Trainer`.
        compute_metrics: See `Trainer`.
        callbacks: See `Trainer`.
        optimizers: See `Trainer`.
        optimizer_cls_and_kwargs: See `Trainer`.
        preprocess_logits_for_metrics: See `Trainer`.
        quantization_config: For loading a model by name.
        peft_config: Which adapters the package peft is to add.
        formatting_func: ``row -> text``.
        tokenizer: The old name of ``processing_class``.
        old: Other arguments of old versions of trl: ``dataset_text_field``, ``max_seq_length``, ``packing``, …

    Raises:
        ValueError: If rows have nothing to learn, or a model can't do what is asked of it.
        ImportError: If ``peft_config`` is given without the package peft.

    >>> from trainfn.hf import SFTConfig, SFTTrainer
    >>> SFTConfig("runs/sft", packing=True, use_cpu=True).packing_strategy
    'bfd'
    """

    args: SFTConfig  # type: ignore[assignment]

    def __init__(
        self,
        model: str | Path | nn.Module,
        args: Any = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: Sequence[Any] | Any | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[..., Any] | None = None,
        *,
        tokenizer: Any = None,
        **old: Any,
    ) -> None:
        args = _sft_model.arguments(model, args, old)
        _check(args, data_collator, compute_loss_func)
        model = _sft_model.model_of(model, args, quantization_config, peft_config)
        _sft_model.balance_experts(model, args)
        named = processing_class if processing_class is not None else tokenizer
        found = _sft_model.tokenizer_of(model, args, named)
        self._formatting, self._tokens_of = formatting_func, found
        self._separation: str | None = None
        self._evaluated: dict[str, tfn.Mean] | None = None
        super().__init__(
            model,
            args,
            data_collator or _collator(model, args, found),
            self._prepared(train_dataset, args, "train"),
            self._prepared(eval_dataset, args, "eval"),
            processing_class=found if tokenizer is None else processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            tokenizer=tokenizer,
        )
        self._separate(self.train_dataset)
        self._separate(self.eval_dataset)

    def _fresh(self) -> None:
        super()._fresh()
        self._shifts = True  # of a causal language model there is no doubt

    # --- data -----------------------------------------------------------------------------------------------------

    def _prepared(self, dataset: Any, args: SFTConfig, name: str) -> Any:
        """A dataset as tokens and labels."""
        given = args.dataset_kwargs if isinstance(args.dataset_kwargs, dict) else {}
        if dataset is None or isinstance(dataset, str) or given.get("skip_prepare_dataset"):
            return dataset
        if isinstance(dataset, Mapping) and name != "train":
            return {key: self._prepared(part, args, key) for key, part in dataset.items()}
        packing = args.packing if name == "train" else args.packs_eval
        return prepared(dataset, self._tokens_of, args, name=name, packing=packing, formatting=self._formatting)

    def _separate(self, dataset: Any) -> Any:
        """The same dataset; if it is packed, how the model keeps sequences apart is known from here on."""
        args = self.args
        parts: list[Any] = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
        packed = [part for part in parts if "seq_lengths" in (getattr(part, "column_names", None) or [])]
        wanted = (args.packing or args.packs_eval) and args.packing_strategy != "wrapped"
        if self._separation is None and (packed or wanted or args.padding_free):
            self._separation = _sft_loss.separation(self)
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        self._signature_columns = list(dict.fromkeys([*columns, "seq_lengths"]))

    # --- loss -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The mean loss of the tokens that are learnt, over ``num_items_in_batch``."""
        called = _sft_loss.model_inputs(model, inputs, self._separation)
        if self._head_loss():
            loss, outputs = super().compute_loss(model, called, True, num_items_in_batch)
        else:
            labels = called.pop("labels")
            outputs = model(**called)
            loss = _sft_loss.loss(self, outputs, labels, num_items_in_batch)
        if self._evaluated is not None:
            for name, mean in self._loss_metrics(inputs, outputs).items():
                self._evaluated[name] = self._evaluated[name] + mean if name in self._evaluated else mean
        return (loss, outputs) if return_outputs else loss

    def _head_loss(self) -> bool:
        """Whether the loss is not ours."""
        return bool(self.compute_loss_func or self.label_smoother or self.args.use_liger_kernel)

    def _loss_metrics(self, inputs: dict[str, Any], outputs: Any) -> dict[str, tfn.Mean]:
        return _sft_loss.metrics(self, inputs, outputs)

    # --- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss and the metrics over a dataset, which is prepared as the Trainer's own are."""
        dataset = self._separate(self._prepared(eval_dataset, self.args, "eval"))
        return super().evaluate(dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """The predictions over a dataset, which is prepared as the Trainer's own are."""
        dataset = self._separate(self._prepared(test_dataset, self.args, "test"))
        return super().predict(dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """What `evaluate` and `predict` share, with the loss's own metrics."""
        self._evaluated = {}
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            evaluated = {name: mean for name, mean in self._evaluated.items() if name != "num_tokens"}
            means = self._world.means(evaluated)
        finally:
            self._evaluated = None
        output.metrics.update({f"{metric_key_prefix}_{name}": float(mean.value) for name, mean in means.items()})
        return output


def _check(args: SFTConfig, collator: Any, loss: Any) -> None:
    if collator is not None and (args.padding_free or (args.packing and args.packing_strategy != "wrapped")):
        raise ValueError(
            "SFTTrainer(data_collator=...) can't work with `packing` or `padding_free`: the collator keeps sequences of"
            " a pack apart. Leave `data_collator` out, or write `packing=False, padding_free=False`."
        )
    if loss is not None and args.loss_type == "dft":
        raise ValueError(
            "SFTTrainer(compute_loss_func=...) can't work with `SFTConfig(loss_type='dft')`: that are two losses. Leave"
            " one of them out."
        )


def _collator(model: Any, args: SFTConfig, tokenizer: Any) -> SFTCollator:
    """Flash attention reads the ends of sequences from a single row; for others one long row costs its square."""
    flash = "flash" in str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
    return SFTCollator(tokenizer.pad_token_id, args.multiple_of, flatten=args.padding_free, flatten_packs=flash)
