"""Our `SFTTrainer` and that of trl: the same losses, metrics and weights, and the same words for mistakes."""

import contextlib
import warnings
from pathlib import Path

import datasets
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.clients.both import Seeded, assert_same_run, logged, package, weights
from tests.helpers import assert_close
from tests.hf.models import seeded
from tests.hf.test_sft import TEMPLATE, TEXTS, model, no_bars, tokenizer
from trainfn.hf import SFTConfig, SFTTrainer
from trainfn.hf._sft._data import prepared

trl = package("trl")
pytestmark = pytest.mark.usefixtures("untouched_rng", no_bars.__name__)
QUIET = {
    "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "log_level": "error",
    "learning_rate": 0.02, "logging_steps": 1, "train_sampling_strategy": "sequential", "max_steps": 4,
    "gradient_checkpointing": False, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 8,
    "max_length": 8, "bf16": False,
}  # fmt: skip
KINDS = {"trl": (trl.SFTTrainer, trl.SFTConfig), "trainfn": (SFTTrainer, SFTConfig)}


def texts(count=12):
    return datasets.Dataset.from_dict({"text": [TEXTS[i % len(TEXTS)] for i in range(count)]})


def completions(count=12):
    return datasets.Dataset.from_list([
        {"prompt": TEXTS[i % 6] + " ", "completion": TEXTS[(i + 2) % 6]} for i in range(count)
    ])  # fmt: skip


def conversations(count=12):
    def turn(i):
        return [{"role": "user", "content": TEXTS[i % 6]}, {"role": "assistant", "content": TEXTS[(i + 1) % 6]}]

    return datasets.Dataset.from_list([{"messages": turn(i) + turn(i + 3)} for i in range(count)])


def run(kind, folder, data=None, of=None, resume=None, trainer=None, words=None, **options):
    trains, configures = KINDS[kind]
    with Seeded(), warnings.catch_warnings():
        if kind == "trl":  # of values that it calls old
            warnings.simplefilter("ignore")
        made = trains(
            of or model(), configures(str(folder), **{**QUIET, **options}), train_dataset=data or texts(),
            processing_class=words or tokenizer(TEMPLATE), **(trainer or {}),
        )  # fmt: skip
        made.train(resume_from_checkpoint=resume)
    return made


METRICS = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
SGD = {"optim": "sgd", "learning_rate": 0.1}  # Adam makes steps of rounding errors where a gradient is zero
CASES = {
    "plain": {"optim": "adamw_torch", "learning_rate": 0.02},
    "accumulated": {"gradient_accumulation_steps": 2},
    "cut": {"max_length": 4},
    "dft": {"loss_type": "dft"},
    "smoothed": {"label_smoothing_factor": 0.1},
    "completions": {"data": completions},
    "prompts too": {"data": completions, "completion_only_loss": False},
    "conversations": {"data": conversations, "max_length": 32},
    "assistant": {"data": conversations, "assistant_only_loss": True, "max_length": 32},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "experts": {"of": lambda: model("mixtral")},
    "experts alone": {"of": lambda: model("mixtral"), "router_aux_loss_coef": 0.0},
    "experts weighed": {"of": lambda: model("mixtral"), "router_aux_loss_coef": 0.5},
}


@pytest.mark.parametrize("case", CASES)
def test_losses_metrics_and_weights_are_those_of_trl(case, tmp_path):
    options = SGD | CASES[case]
    made = {name: options.pop(name, lambda: None) for name in ("data", "of")}
    ours, theirs = (run(k, tmp_path / k, **{n: f() for n, f in made.items()}, **options) for k in ("trainfn", "trl"))
    keys = [key for key in METRICS if case != "smoothed" or key in ("loss", "grad_norm")]
    assert_same_run(ours, theirs, ("loss", "grad_norm"))
    if case != "accumulated":  # trl averages the means of micro-batches, and ours are over all tokens
        assert_same_run(ours, theirs, tuple(keys), 1e-5)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "bfd-requeue"])
def test_packs_are_those_of_trl_and_train_the_same(strategy, tmp_path):
    """trl joins a batch of packs into one row, which only flash attention takes apart; a batch of one is one row."""
    options = {"packing": True, "packing_strategy": strategy, "per_device_train_batch_size": 1, "max_length": 6}
    old = pytest.warns(DeprecationWarning, match="write `packing_strategy='bfd_split'`")
    with old if strategy == "bfd-requeue" else contextlib.nullcontext():
        ours = run("trainfn", tmp_path / "ours", **options)
    theirs = run("trl", tmp_path / "theirs", **options)
    names = ["input_ids", "labels", "seq_lengths"]
    assert [[row[name] for name in names] for row in ours.train_dataset] == [
        [row[name] for name in names] for row in theirs.train_dataset
    ]
    assert_same_run(ours, theirs, ("loss", "grad_norm"))


def test_evaluation_and_resume_are_those_of_trl(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    more = {"trainer": {"eval_dataset": texts(8)}}
    ours, theirs = (run(k, tmp_path / k, **options, **more) for k in ("trainfn", "trl"))
    keys = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")
    assert_same_run(ours, theirs, keys, 1e-5)
    after = run("trainfn", tmp_path / "after", resume=str(tmp_path / "trl/checkpoint-2"), **options, **more)
    assert_close(weights(after.model), weights(theirs.model), 1e-6)


def byte_tokenizer(template):
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
               "<start_of_turn>", "<end_of_turn>", "<bos>", "<|end|>", "<|user|>", "<|assistant|>"]  # fmt: skip
    made = Tokenizer(models.BPE({word: n for n, word in enumerate([*special, *words])}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(special)
    ends = {"pad_token": "<pad>", "eos_token": "<|im_end|>", "bos_token": "<bos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **ends)


TURNS = [
    {"role": "user", "content": "one"}, {"role": "assistant", "content": "two "},
    {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"},
]  # fmt: skip


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3", "gemma", "gemma3", "phi3"])
@pytest.mark.parametrize("turns", [2, 4])
def test_the_assistant_speaks_where_trl_says_so_in_templates_of_models(name, turns, tmp_path):
    words = byte_tokenizer((Path(trl.__file__).parent / f"chat_templates/{name}.jinja").read_text())
    rows = datasets.Dataset.from_list([{"messages": TURNS[:turns]}])
    args = SFTConfig(str(tmp_path), **QUIET | {"max_length": 999}, assistant_only_loss=True)
    row = prepared(rows, words, args, name="train", packing=False)[0]
    theirs = trl.get_training_chat_template(words)
    expected = words.apply_chat_template(
        TURNS[:turns], chat_template=theirs, return_dict=True, return_assistant_tokens_mask=True
    )
    assert row["input_ids"] == expected["input_ids"]
    assert [int(label != -100) for label in row["labels"]] == expected["assistant_masks"]


def test_the_assistant_is_found_in_a_template_that_trl_does_not_know(tmp_path):
    words = byte_tokenizer((Path(trl.__file__).parent / "chat_templates/llama3_1.jinja").read_text())
    args = SFTConfig(str(tmp_path), **QUIET | {"max_length": 999}, assistant_only_loss=True)
    row = prepared(datasets.Dataset.from_list([{"messages": TURNS}]), words, args, name="train", packing=False)[0]
    said = words.decode([label for label in row["labels"] if label != -100])
    assert said == "two<|eot_id|>four<|eot_id|>"


# --- adapters and quantized models --------------------------------------------------------------------------------


def lora(**options):
    peft = package("peft")
    targets = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**targets, **options})


def test_adapters_train_as_in_trl_and_resume_from_its_checkpoint(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": True}
    ours, theirs = (run(k, tmp_path / k, trainer={"peft_config": lora()}, **options) for k in ("trainfn", "trl"))
    assert_same_run(ours, theirs)
    resume = str(tmp_path / "trl/checkpoint-2")
    after = run("trainfn", tmp_path / "after", trainer={"peft_config": lora()}, resume=resume, **options)
    assert_close(weights(after.model), weights(theirs.model), 1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=13, num_key_value_heads=2, eos_token_id=1, pad_token_id=0, **sizes)
    seeded(lambda: transformers.LlamaForCausalLM(config)).save_pretrained(path)
    tokenizer(TEMPLATE).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_trains_its_adapters_eagerly(bits, folder, tmp_path):
    package("bitsandbytes")
    how = {"quantization_config": transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})}
    same = datasets.Dataset.from_dict({"text": TEXTS[:1] * 8})
    made = run("trainfn", tmp_path, same, of=folder, trainer={"peft_config": lora(), **how}, max_steps=2, save_steps=1,
               save_strategy="steps")  # fmt: skip
    assert logged(made, "loss")[1] < logged(made, "loss")[0]
    assert "the model is quantized" in made.summary()
    assert all("lora" in name for name in weights(made.model))
    again = run("trainfn", tmp_path / "again", same, of=folder, trainer={"peft_config": lora(), **how}, max_steps=2,
                resume=str(tmp_path / "checkpoint-1"))  # fmt: skip
    assert_close(weights(again.model), weights(made.model), 0)
    with pytest.raises(ValueError, match=r"this LlamaForCausalLM is quantized, and .* Add adapters: `SFTTrainer"):
        run("trainfn", tmp_path, of=folder, trainer=how)


def test_a_configuration_that_is_not_of_peft_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"SFTTrainer\(peft_config=dict\): .* Write `peft_config=peft\.LoraConfig"):
        run("trainfn", tmp_path, trainer={"peft_config": {"r": 4}})


# --- the rest -----------------------------------------------------------------------------------------------------


def test_a_configuration_of_trl_is_accepted(tmp_path):
    with Seeded():
        args = trl.SFTConfig(str(tmp_path), **QUIET, eos_token="</s>")
        made = SFTTrainer(model(), args, train_dataset=texts(), processing_class=tokenizer(TEMPLATE))
        made.train()
    assert isinstance(made.args, SFTConfig) and made.args.eos_token == "</s>"
    assert_same_run(made, run("trl", tmp_path))


def test_the_models_configurations_have_the_tokens_of_the_tokenizer(tmp_path):
    found = {}
    for kind in KINDS:
        words = tokenizer(TEMPLATE)
        words.pad_token = "<unk>"
        made = run(kind, tmp_path, words=words, eos_token="<user>", max_steps=1)
        config, generation = made.model.config, made.model.generation_config
        found[kind] = [(c.pad_token_id, c.eos_token_id) for c in (config, generation)]
    assert found["trainfn"] == found["trl"] == [(2, 3), (2, [3, 1])]


def test_a_coefficient_for_a_dense_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not a mixture of experts .* Leave the argument out"):
        run("trainfn", tmp_path, router_aux_loss_coef=0.5)
    with pytest.raises(ValueError, match="not a Mixture-of-Experts"):
        run("trl", tmp_path, router_aux_loss_coef=0.5)


@pytest.mark.parametrize("only", [None, False])
def test_masks_count_in_rows_that_are_prepared_already(only, tmp_path):
    data = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 8, "completion_mask": [[0, 0, 1, 1]] * 8})
    made = run("trainfn", tmp_path, data, dataset_kwargs={"skip_prepare_dataset": True}, completion_only_loss=only)
    labels = next(iter(made.get_train_dataloader()))["labels"]
    assert labels.tolist() == [[5, 6, 7, 8] if only is False else [-100, -100, 7, 8]] * 2
    short = datasets.Dataset.from_dict({"input_ids": [[5, 6]] * 8, "assistant_masks": [[1]] * 8})
    with pytest.raises(ValueError, match="has 2 input_ids and 1 values of 'assistant_masks'"):
        run("trainfn", tmp_path, short, dataset_kwargs={"skip_prepare_dataset": True})


def test_recomputation_of_either_kind_changes_nothing(tmp_path):
    plain = run("trainfn", tmp_path / "plain")
    for reentrant in (False, True):
        how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        assert_same_run(run("trainfn", tmp_path / str(reentrant), **how), plain)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"nonsense": 1}, "keys that neither torch's checkpoint nor transformers knows"),
        ({"selective": True}, "`{'every_n_layers': 2}` recomputes every second layer"),
        ({"offload": True}, "on the host already. Leave `offload` out"),
    ],
)
def test_unknown_ways_to_recompute_are_refused(given, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        run("trainfn", tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=given)


def test_chunked_nll_is_nll(tmp_path):
    with pytest.warns(DeprecationWarning, match="write `loss_type='nll'`"):
        made = run("trainfn", tmp_path / "ours", loss_type="chunked_nll")
    assert_same_run(made, run("trl", tmp_path / "theirs", loss_type="chunked_nll"))


def test_a_model_with_an_encoder_is_refused(tmp_path):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    t5 = seeded(lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=13, **sizes)))
    with pytest.raises(ValueError, match=r"has an encoder\. Load another: .* or train this one with `Seq2SeqTrainer`"):
        run("trainfn", tmp_path, of=t5)


def test_the_defaults_of_sft_compile(tmp_path):
    """Recomputation and fused attention are in the captured graph; the code generator has tests of its own."""
    options = {"gradient_checkpointing": True, "max_steps": 2, "of": model("llama", "sdpa")}
    eager = run("trainfn", tmp_path / "eager", **options)
    options["of"] = model("llama", "sdpa")
    made = run("trainfn", tmp_path / "compiled", torch_compile=True, torch_compile_backend="eager", **options)
    assert_same_run(made, eager, ("loss",), 1e-5)
