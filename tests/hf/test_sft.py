"""Supervised fine-tuning: what rows become, that packs train what their rows would, and what is said of mistakes."""

import functools
import warnings

import datasets
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.helpers import assert_close, assert_identical
from tests.hf.models import seeded
from trainfn.hf import SFTConfig, SFTTrainer, TrainerCallback, TrainingArguments
from trainfn.hf._sft._loss import dft
from trainfn.hf._sft._packing import SFTCollator, pack_dataset

pytestmark = pytest.mark.usefixtures("untouched_rng")
SPECIAL = ["<pad>", "</s>", "<unk>", "<user>", "<assistant>"]
LETTERS = list("abcdefgh")
A = len(SPECIAL)  # the number of the word "a"
END = 1
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<user> ' + m['content'] + ' ' }}{% else %}"
    "{{ '<assistant> ' }}{% generation %}{{ m['content'] + ' </s> ' }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(num_key_value_heads=2, **SIZES),
    "gemma": lambda: transformers.GemmaConfig(num_key_value_heads=1, head_dim=4, **SIZES),
    "sliding": lambda: transformers.Gemma3TextConfig(num_key_value_heads=1, head_dim=4, sliding_window=4, **SIZES),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=8, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=8, dropout=0.0,
        max_position_embeddings=64,
    ),
    "bloom": lambda: transformers.BloomConfig(hidden_size=8, n_layer=1, n_head=2),
    "mixtral": lambda: transformers.MixtralConfig(
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, **SIZES
    ),
}  # fmt: skip
QUIET = {
    "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "log_level": "error",
    "lr_scheduler_type": "constant", "learning_rate": 0.1, "max_grad_norm": 0.0, "logging_steps": 1,
    "optim": "sgd", "gradient_checkpointing": False, "train_sampling_strategy": "sequential", "num_train_epochs": 1,
    "max_length": 8,
}  # fmt: skip
TEXTS = ["a b c", "d e f g h", "h g", "b b a a", "c", "e d c b a a"]


def tokenizer(template=None):
    words = {word: n for n, word in enumerate([*SPECIAL, *LETTERS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **special)


def model(kind="llama", attention="eager"):
    config = CONFIGS[kind]()
    config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = A + len(LETTERS), None, END, 0
    return seeded(lambda: AutoModelForCausalLM.from_config(config, attn_implementation=attention))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its tokenizer, as a checkpoint."""
    path = tmp_path_factory.mktemp("model") / "tiny-gemma"
    model("gemma").save_pretrained(path)
    tokenizer(TEMPLATE).save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def no_bars():
    datasets.disable_progress_bars()


def rows(texts=TEXTS):
    return datasets.Dataset.from_dict({"text": list(texts)})


def config(folder, **options):
    return SFTConfig(str(folder), **{**QUIET, **options})


def trainer(folder, data=None, of=None, words=None, **options):
    return SFTTrainer(
        of or model(), config(folder, **options), train_dataset=rows() if data is None else data,
        processing_class=words or tokenizer(TEMPLATE),
    )  # fmt: skip


def trained(*args, **options):
    made = trainer(*args, **options)
    made.train()
    return made


def parameters(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def ids(text):
    return [A + LETTERS.index(letter) for letter in text]


# --- preparation --------------------------------------------------------------------------------------------------


def learnt(made, n=0):
    """The tokens of a row, those that are not learnt as None."""
    row = made.train_dataset[n]
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    return [None if label == -100 else label for label in row["labels"]], row["input_ids"]


def test_a_text_is_ended_once_and_cut(tmp_path):
    data = datasets.Dataset.from_dict({"text": ["a b", "a b </s>", "a b c d e f"], "label": [0, 1, 0]})
    made = trainer(tmp_path, data, max_length=4)
    assert made.train_dataset["input_ids"][:] == [[*ids("ab"), END], [*ids("ab"), END], ids("abcd")]
    assert made.train_dataset["labels"][:] == made.train_dataset["input_ids"][:]
    assert set(made.train_dataset.column_names) == {"input_ids", "labels"}
    assert trainer(tmp_path, data, max_length=4, truncation_mode="keep_end").train_dataset[2]["input_ids"][-1] == END


def test_the_text_column_and_the_formatting_function(tmp_path):
    data = datasets.Dataset.from_dict({"q": ["a"], "words": ["b c"]})
    assert learnt(trainer(tmp_path, data, dataset_text_field="words"))[1] == [*ids("bc"), END]
    made = SFTTrainer(model(), config(tmp_path), train_dataset=data, processing_class=tokenizer(),
                      formatting_func=lambda row: row["q"] + " " + row["words"])  # fmt: skip
    assert learnt(made)[1] == [*ids("abc"), END]


def test_conversations_go_through_the_chat_template(tmp_path):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    whole = [3, *ids("a"), 4, *ids("b"), END]
    assert learnt(trainer(tmp_path, [{"messages": said}])) == (whole, whole)
    labels, tokens = learnt(trainer(tmp_path, [{"messages": said}], assistant_only_loss=True))
    assert (labels, tokens) == ([None, None, None, *ids("b"), END], whole)
    old = [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]
    assert learnt(trainer(tmp_path, [{"conversations": old}]))[1] == whole


def test_of_prompt_and_completion_the_completion_is_learnt(tmp_path):
    text = [{"prompt": "a b", "completion": " c"}]
    assert learnt(trainer(tmp_path, text)) == ([None, None, *ids("c"), END], [*ids("abc"), END])
    assert learnt(trainer(tmp_path, text, completion_only_loss=False))[0] == [*ids("abc"), END]
    prompt, completion = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    labels, tokens = learnt(trainer(tmp_path, [{"prompt": prompt, "completion": completion}]))
    assert (labels, tokens) == ([None, None, None, *ids("b"), END], [3, *ids("a"), 4, *ids("b"), END])


def test_tokens_stay_and_masks_become_labels(tmp_path):
    row = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}
    assert trainer(tmp_path, [row]).train_dataset[:] == {"input_ids": [[5, 6, 7]], "labels": [[5, 6, 7]]}
    assert learnt(trainer(tmp_path, [{**row, "completion_mask": [0, 1, 1]}]))[0] == [None, 6, 7]
    assert learnt(trainer(tmp_path, [{**row, "labels": [-100, 6, -100]}]))[0] == [None, 6, None]
    as_it_is = trainer(tmp_path, rows(), dataset_kwargs={"skip_prepare_dataset": True})
    assert as_it_is.train_dataset.column_names == ["text"]


def test_rows_without_anything_to_learn_are_left_out_and_counted(tmp_path):
    data = [{"prompt": prompt, "completion": " b"} for prompt in ("a b c d", "a", "a b c")]
    with pytest.warns(UserWarning, match="2 of 3 rows of the train dataset have no token to learn from.*max_length=3"):
        made = trainer(tmp_path, data, max_length=3)
    assert len(made.train_dataset) == 1
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        trainer(tmp_path, [{"text": ""}, {"text": "a"}])  # of which only the end is left, and nothing predicts it
    with pytest.raises(ValueError, match=r"2 of 2 rows.*Raise `max_length`"):
        trainer(tmp_path, data[::2], max_length=3)


def test_a_streaming_dataset_trains(tmp_path):
    stream = datasets.IterableDataset.from_generator(lambda: iter({"text": text} for text in TEXTS))
    made = trained(tmp_path, stream, max_steps=2, per_device_train_batch_size=2)
    assert made.state.global_step == 2


# --- packs --------------------------------------------------------------------------------------------------------

EXAMPLES = {"input_ids": [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10], [11]],
            "mask": [[1, 1, 1, 0, 0], [1, 0], [1, 1, 0], [1]]}  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "packs", "masks", "lengths"),
    [
        ("bfd", [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7]], [[1, 1, 1, 0], [1, 1, 0, 1], [1, 0]], [[4], [3, 1], [2]]),
        (
            "bfd_split",
            [[1, 2, 3, 4], [8, 9, 10, 5], [6, 7, 11]],
            [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1]],
            [[4], [3, 1], [2, 1]],
        ),
        ("wrapped", [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]], [[1, 1, 1, 0], [0, 1, 0, 1], [1, 0, 1]], None),
    ],
)
def test_packs_are_those_of_trl(strategy, packs, masks, lengths):
    found = pack_dataset(datasets.Dataset.from_dict(EXAMPLES), 4, strategy)[:]
    expected = {"input_ids": packs, "mask": masks} | ({"seq_lengths": lengths} if lengths else {})
    assert found == expected


def test_batches_of_packs_keep_sequences_apart():
    packs = [{"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]},
             {"input_ids": [5, 6], "labels": [5, 6], "seq_lengths": [2]}]  # fmt: skip
    batch = SFTCollator(0, multiple_of=3)(packs)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100], [-100, 6, -100, -100, -100, -100]]
    flat = SFTCollator(0, flatten_packs=True)(packs)
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert flat["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 3, 3]]


@pytest.mark.parametrize("kind", ["llama", "gemma", "sliding", "opt"])
@pytest.mark.parametrize("how", [{"packing": True}, {"padding_free": True}])
def test_packs_train_what_their_rows_would(kind, how, tmp_path):
    """Whether positions or a mask keep them apart; with rows longer than a sliding window."""
    options = {"per_device_train_batch_size": 16, "max_length": 12}
    one = trained(tmp_path, of=model(kind), **options)
    many = trained(tmp_path, of=model(kind), **options, **how)
    assert many._trainfn_sft.separation == ("mask" if kind == "opt" else "positions")
    assert one.state.global_step == many.state.global_step == 1
    assert_close(parameters(many.model), parameters(one.model), 1e-5)
    before, after = (t.state.log_history[0] for t in (one, many))
    for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
        assert after[name] == pytest.approx(before[name], rel=1e-5), name


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("size", "accumulate"), [(1, 8), (2, 4)])
def test_every_split_gives_the_same_update_and_the_same_log(loss_type, packing, size, accumulate, tmp_path):
    options = {"loss_type": loss_type, "packing": packing}
    whole = trained(tmp_path, per_device_train_batch_size=8, **options)
    split = trained(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, **options)
    assert whole.state.global_step == split.state.global_step == 1
    assert_close(parameters(split.model), parameters(whole.model), 2e-6)
    one, other = (t.state.log_history[0] for t in (whole, split))
    assert {k: pytest.approx(v, rel=1e-5) for k, v in one.items()} == other


def test_a_model_that_can_not_keep_sequences_apart_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`SFTConfig\(packing=True\)`.*can't work with BloomForCausalLM"):
        trainer(tmp_path, of=model("bloom"), packing=True)
    assert (
        trained(tmp_path, of=model("bloom"), packing=True, packing_strategy="wrapped")._trainfn_sft.separation is None
    )


# --- the loss and its metrics -------------------------------------------------------------------------------------


def test_the_metrics_are_exact_over_all_tokens_of_the_window(tmp_path):
    made = trained(tmp_path, logging_steps=3, per_device_train_batch_size=2, learning_rate=0.0)
    log = made.state.log_history[0]
    logits, targets = [], []
    for row in made.train_dataset:
        with torch.no_grad():
            logits.append(made.model(torch.tensor([row["input_ids"]])).logits[0, :-1])
        targets.append(torch.tensor(row["labels"][1:]))
    logits, targets = torch.cat(logits), torch.cat(targets)
    distribution = torch.distributions.Categorical(logits=logits)
    assert log["loss"] == pytest.approx(-distribution.log_prob(targets).mean().item(), rel=1e-5)
    assert log["entropy"] == pytest.approx(distribution.entropy().mean().item(), rel=1e-5)
    assert log["mean_token_accuracy"] == pytest.approx((logits.argmax(-1) == targets).float().mean().item())
    assert log["num_tokens"] == sum(map(len, made.train_dataset["input_ids"]))


def test_num_tokens_is_counted_on_after_a_resume(tmp_path):
    options = {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    whole = trained(tmp_path / "whole", **options)
    stopped = trainer(tmp_path / "part", **options)
    stopped.add_callback(Stop)
    stopped.train()
    again = trainer(tmp_path / "part", **options)
    again.train(resume_from_checkpoint=True)
    counts = [[log["num_tokens"] for log in t.state.log_history[:-1]] for t in (whole, again)]
    sizes = [len(row) for row in whole.train_dataset["input_ids"]]
    assert counts[0] == counts[1] == [sum((2 * sizes)[: n + 1]) for n in range(2 * len(sizes))]
    assert_identical(again.train_state, whole.train_state)


def test_evaluation_prepares_its_rows_and_has_the_same_metrics(tmp_path):
    made = SFTTrainer(model(), config(tmp_path, packing=True), train_dataset=rows(), eval_dataset={"x": rows()},
                      processing_class=tokenizer())  # fmt: skip
    packed, alone = made.evaluate(), made.evaluate([{"text": text} for text in TEXTS])
    assert "eval_x_loss" in packed
    made = trainer(tmp_path)  # which learns of packs from the rows
    plain, of_packs = made.evaluate(rows()), made.evaluate(pack_dataset(made.train_dataset, 8))
    assert of_packs["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    for name in ("loss", "entropy", "mean_token_accuracy"):
        expected = pytest.approx(plain[f"eval_{name}"], rel=1e-5)
        assert packed[f"eval_x_{name}"] == alone[f"eval_{name}"] == expected
    assert made.predict(rows()).metrics["test_entropy"] == pytest.approx(plain["eval_entropy"], rel=1e-5)


def test_dft_weighs_a_token_by_its_probability():
    logits = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    mean = dft(logits, torch.tensor([[0, -100]]))
    p = logits[0, 0].softmax(-1)[0]
    assert mean.weight == 1 and mean.total.item() == pytest.approx((-p * p.log()).item())
    mean.total.backward()
    expected = p.detach() * (logits.detach()[0, 0].softmax(-1) - torch.tensor([1.0, 0.0, 0.0]))
    assert torch.allclose(logits.grad[0, 0], expected) and not logits.grad[0, 1].any()


def test_experts_are_balanced(tmp_path):
    made = trained(tmp_path, of=model("mixtral"), per_device_train_batch_size=8, router_aux_loss_coef=0.5)
    log = made.state.log_history[0]
    with torch.no_grad():
        plain = trained(tmp_path, of=model("mixtral"), per_device_train_batch_size=8, router_aux_loss_coef=0.0)
    assert log["loss"] == pytest.approx(plain.state.log_history[0]["loss"] + 0.5 * log["aux_loss"], rel=1e-5)
    assert "aux_loss" not in plain.state.log_history[0]


def test_a_loss_function_of_the_user(tmp_path):
    def half(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        total = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return 0.5 * total / num_items_in_batch

    made = SFTTrainer(model(), config(tmp_path, max_steps=1), train_dataset=rows(), processing_class=tokenizer(),
                      compute_loss_func=half)  # fmt: skip
    made.train()
    whole = trained(tmp_path, max_steps=1).state.log_history[0]["loss"]
    assert made.state.log_history[0]["loss"] == pytest.approx(whole / 2, rel=1e-5)


# --- the documents' snippets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adamw_layerwise"])
def test_snippet_with_a_models_name(optim, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_dataset = datasets.Dataset.from_dict({"text": ["a b c d"] * 8, "label": [0] * 8})
    with pytest.warns(UserWarning, match="bfloat16.*no accelerator.*float32"):
        args = SFTConfig(
            output_dir="./test-galore",
            max_steps=2,
            optim=optim,
            optim_target_modules=[r".*.attn.*", r".*.mlp.*"],
            optim_args="rank=64, update_proj_gap=100, scale=0.10",
            gradient_checkpointing=True,
            report_to="none",
        )
    made = SFTTrainer(model=folder, args=args, train_dataset=train_dataset)
    made.train()
    assert made.state.global_step == 2 and made.processing_class.eos_token == "</s>"
    assert args.bf16 is False and args.activation_checkpointing


@pytest.mark.parametrize(
    "options", [{"optim": "galore_adamw", "optim_target_modules": ["attn", "mlp"]}, {"optim": "adalomo"}]
)
def test_snippet_with_training_arguments_and_old_names(options, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_dataset = datasets.Dataset.from_dict({"text": ["a b c d"] * 8})
    args = TrainingArguments(
        output_dir="./test-galore", max_steps=2, per_device_train_batch_size=2, use_cpu=True, **options,
        run_name="lomo-imdb", learning_rate=2e-6, save_strategy="no", logging_strategy="steps", logging_steps=1,
    )  # fmt: skip
    loaded = AutoConfig.from_pretrained(folder)
    gemma = seeded(lambda: AutoModelForCausalLM.from_config(loaded))
    words = AutoTokenizer.from_pretrained(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = SFTTrainer(
            model=gemma, args=args, train_dataset=train_dataset, dataset_text_field="text", max_seq_length=3,
            tokenizer=words, packing=False,
        )  # fmt: skip
    said = [str(w.message) for w in caught if w.category is DeprecationWarning]
    assert any("write `SFTConfig(max_length=3)`" in text for text in said) and len(said) == 4
    assert made.args.max_length == 3 and made.args.learning_rate == 2e-6 and not made.args.bf16
    made.train()
    assert made.state.global_step == 2 and made.train_dataset[0]["input_ids"] == ids("abc")


def test_a_checkpoint_loads_as_a_model(folder, tmp_path):
    made = SFTTrainer(folder, config(tmp_path, max_steps=1, save_strategy="steps", save_steps=1), train_dataset=rows())
    made.train()
    again = SFTTrainer(str(tmp_path / "checkpoint-1"), config(tmp_path), train_dataset=rows())
    assert_identical(parameters(again.model), parameters(made.model))


def test_a_step_with_packs_compiles(tmp_path):
    options = {"packing": True, "per_device_train_batch_size": 4, "max_steps": 2}
    eager = trained(tmp_path, **options)
    made = trained(tmp_path, torch_compile=True, torch_compile_backend="eager", pad_to_multiple_of=8, **options)
    assert_close(parameters(made.model), parameters(eager.model), 1e-6)


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loss_type": "mse"}, "loss_type='mse'.*not one of 'nll', 'dft'"),
        ({"packing_strategy": "ffd"}, "packing_strategy='ffd'.*Write `packing_strategy='bfd'`"),
        ({"truncation_mode": "middle"}, "truncation_mode='middle'"),
        ({"packing": True, "max_length": None}, "packing=True.*packs have no length.*Write `max_length=1024`"),
        ({"max_length": 0}, "max_length=0.*1 or more"),
        ({"max_length": "auto"}, "max_length='auto'"),
        ({"pad_to_multiple_of": -8}, "pad_to_multiple_of=-8"),
        ({"activation_offloading": True}, "activation_offloading=True.*'offload': True"),
        ({"dataset_kwargs": {"add_special_tokens": False}}, "'add_special_tokens' is unknown"),
        ({"loss_type": "dft", "label_smoothing_factor": 0.1}, "loss_type='dft'.*label_smoothing_factor"),
    ],
)
def test_impossible_arguments(options, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        config(tmp_path, **options)


SAID = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("data", "options", "error", "says"),
    [
        ([{"txt": "a b"}], {}, ValueError, "rows of the train dataset have.*SFTConfig.dataset_text_field='txt'"),
        ([{"text": 3}], {}, TypeError, "the column 'text' gives a int"),
        ([], {}, ValueError, "the train dataset has no rows"),
        ({"train": [], "test": []}, {}, TypeError, r"several datasets.*dataset\['train'\]"),
        (TEXTS, {}, TypeError, "a `datasets.Dataset` is needed"),
        ([{"text": "a", "images": []}], {}, ValueError, "has images"),
        ([{"text": "a b"}], {"completion_only_loss": True}, ValueError, "there is no completion"),
        ([{"text": "a b"}], {"assistant_only_loss": True}, ValueError, "no messages of an assistant"),
        ([{"input_ids": [5, 6], "completion_mask": [1]}], {}, ValueError, "2 input_ids and 1 values"),
        ([{"text": "a b"}], {"eos_token": "<end>"}, ValueError, "eos_token='<end>'.*does not know it"),
    ],
)
def test_impossible_rows(data, options, error, says, tmp_path):
    with pytest.raises(error, match=says):
        trainer(tmp_path, data, **options)


def test_templates_that_are_missing_or_say_too_little(tmp_path):
    with pytest.raises(ValueError, match="need a chat template"):
        trainer(tmp_path, [{"messages": SAID}], words=tokenizer())
    plain = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    talk = [{"messages": [*SAID, {"role": "assistant", "content": "b"}]}]
    whole = trainer(tmp_path, talk, words=tokenizer(TEMPLATE), assistant_only_loss=True)
    found = trainer(tmp_path, talk, words=tokenizer(plain), assistant_only_loss=True)
    assert learnt(found) == learnt(whole)
    forgets = plain.replace("m['content'] + ' </s> '", "(m['content'] if loop.last else '') + ' </s> '")
    with pytest.raises(ValueError, match="writes messages in another way when others follow"):
        trainer(tmp_path, [{"messages": 2 * talk[0]["messages"]}], words=tokenizer(forgets), assistant_only_loss=True)
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    made = trainer(tmp_path, [{"messages": SAID}], words=tokenizer(), chat_template_path=str(tmp_path / "t.jinja"))
    assert made.train_dataset[0]["input_ids"] == [3, A]
    tokenizer().save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match="that tokenizer has no chat template"):
        trainer(tmp_path, words=tokenizer(), chat_template_path=str(tmp_path / "words"))


def test_a_prompt_that_is_no_beginning_is_reported(tmp_path):
    odd = TEMPLATE.replace("{% if add_generation_prompt %}", "{% if add_generation_prompt %}{{ 'h h ' }}")
    data = [{"prompt": SAID, "completion": [{"role": "assistant", "content": "b"}]}]
    with pytest.warns(UserWarning, match="a prompt's tokens differ.*at 2 of 5"):
        trainer(tmp_path, data, words=tokenizer(odd))


def test_impossible_constructors(folder, tmp_path, monkeypatch):
    make = functools.partial(SFTTrainer, model(), train_dataset=rows())
    with pytest.raises(ValueError, match=r"no tokenizer was found.*processing_class="):
        make(config(tmp_path))
    with pytest.raises(TypeError, match=r"there is no such argument. It belongs to `SFTConfig.max_length"):
        make(config(tmp_path), max_length=3)
    with pytest.raises(TypeError, match="Did you mean `train_dataset`"):
        SFTTrainer(model(), config(tmp_path), train_datasets=rows())
    with pytest.raises(ValueError, match="have different values"):
        make(config(tmp_path, max_length=5), max_seq_length=3)
    with pytest.raises(TypeError, match="Check the order of the arguments"):
        make(rows())
    with pytest.raises(ValueError, match="is loaded already"):
        make(config(tmp_path, model_init_kwargs={"dtype": "float32"}), processing_class=tokenizer())
    with pytest.raises(TypeError, match="a tokenizer is needed"):
        make(config(tmp_path), processing_class=object())
    with pytest.raises(ValueError, match="`data_collator` out"):
        make(config(tmp_path, packing=True), data_collator=lambda rows: {})
    with pytest.raises(ValueError, match="these are two losses"):
        make(config(tmp_path, loss_type="dft"), compute_loss_func=lambda *a, **k: 0)
    if __import__("importlib").util.find_spec("peft") is None:
        with pytest.raises(ImportError, match="pip install peft"):
            make(config(tmp_path), processing_class=tokenizer(), peft_config=object())


def test_a_model_without_logits_of_words_is_refused(tmp_path):
    from transformers import LlamaForSequenceClassification

    sizes = CONFIGS["llama"]()
    sizes.vocab_size, sizes.pad_token_id = A + len(LETTERS), 0
    classifier = seeded(lambda: LlamaForSequenceClassification(sizes))
    with pytest.raises(TypeError, match=r"a causal language model is needed.*logits"):
        trained(tmp_path, of=classifier)
