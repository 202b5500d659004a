"""trl's trainers on our Trainer: the same losses and weights as on that of transformers."""

import datasets
import pytest
import transformers

from tests.clients.both import KINDS, Seeded, assert_same_run, logged, package, weights
from tests.clients.loaded import on
from tests.clients.test_sft import completions, lora, texts
from tests.helpers import assert_close
from tests.hf.models import seeded
from tests.hf.test_sft import TEMPLATE, TEXTS, model, no_bars, tokenizer

package("trl")
pytestmark = [pytest.mark.usefixtures(no_bars.__name__), pytest.mark.filterwarnings("ignore::UserWarning")]
QUIET = {
    "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "log_level": "error",
    "learning_rate": 0.1, "optim": "sgd", "logging_steps": 1, "train_sampling_strategy": "sequential", "max_steps": 3,
    "gradient_checkpointing": False, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 8,
    "max_length": 16, "bf16": False,
}  # fmt: skip


def pairs(count=8):
    names = ("chosen", "rejected")
    return datasets.Dataset.from_list([
        {"prompt": TEXTS[i % 6] + " ", **{name: TEXTS[(i + n) % 6] for n, name in enumerate(names, 1)}}
        for i in range(count)
    ])  # fmt: skip


def judged(count=8):
    return datasets.Dataset.from_list([
        {"prompt": TEXTS[i % 6] + " ", "completion": TEXTS[(i + 1) % 6], "label": i % 2 == 0} for i in range(count)
    ])  # fmt: skip


def scorer():
    config = model().config
    config.num_labels = 1
    return seeded(lambda: transformers.LlamaForSequenceClassification(config))


def run(kind, trainer, folder, data, of=model, resume=None, more=None, **options):
    with Seeded(), on(kind, "trl") as trl:
        trains, configures = getattr(trl, f"{trainer}Trainer"), getattr(trl, f"{trainer}Config")
        given = {name: value for name, value in {**QUIET, **options}.items() if value is not None}
        made = trains(
            of(), args=configures(str(folder), **given), train_dataset=data,
            processing_class=tokenizer(TEMPLATE), **(more or {}),
        )  # fmt: skip
        assert isinstance(made, KINDS[kind][0])
        made.train(resume_from_checkpoint=resume)
    return made


def both(trainer, folder, data, of=model, more=None, keys=("loss", "grad_norm"), **options):
    made = {
        kind: run(kind, trainer, folder / kind, data(), of, more={n: f() for n, f in (more or {}).items()}, **options)
        for kind in ("transformers", "trainfn")
    }
    assert_same_run(made["trainfn"], made["transformers"], keys)
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"loss_type": "dft"}, {"gradient_checkpointing": True},
     {"packing": True, "per_device_train_batch_size": 1, "max_length": 6}],
    ids=["plain", "accumulated", "dft", "recomputed", "packed"],
)  # fmt: skip
def test_sft(options, tmp_path):
    keys = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
    both("SFT", tmp_path, texts, keys=keys, **options)


def test_sft_with_adapters_evaluation_and_resume(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    more = {"peft_config": lora, "eval_dataset": lambda: texts(8)}
    keys = ("loss", "grad_norm", "entropy", "eval_loss", "eval_entropy", "eval_mean_token_accuracy")
    made = both("SFT", tmp_path, completions, more=more, keys=keys, **options)
    for saved in ("trainfn", "transformers"):
        again = run("trainfn", "SFT", tmp_path / "again", completions(), resume=str(tmp_path / saved / "checkpoint-1"),
                    more={name: make() for name, make in more.items()}, **options)  # fmt: skip
        assert_close(weights(again.model), weights(made["trainfn"].model), 1e-6)


def test_reward(tmp_path):
    def data():
        rows = [{n: row["prompt"] + row[n] for n in ("chosen", "rejected")} for row in pairs()]
        return datasets.Dataset.from_list(rows)

    both("Reward", tmp_path, data, scorer, keys=("loss", "grad_norm", "accuracy", "margin"))


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A model with a folder, from which trl loads the reference again."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    model().save_pretrained(path)
    return lambda: transformers.AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("how", ["plain", "a reference", "precomputed", "adapters"])
def test_dpo(how, named, tmp_path):
    more = {"a reference": {"ref_model": model}, "adapters": {"peft_config": lora}}.get(how, {})
    options = {"precompute_ref_log_probs": True} if how == "precomputed" else {}
    keys = ("loss", "grad_norm", "rewards/margins", "logps/chosen")
    both("DPO", tmp_path, pairs, named, more=more, keys=keys, **options)


def test_kto(named, tmp_path):
    both("KTO", tmp_path, judged, named)


def test_rewards_of_what_the_model_generates(named, tmp_path):
    """Both Trainers draw other tokens, so the runs are not compared; ours draws from the key of its state."""

    def reward(completions, **_):
        return [float(len(set(text))) for text in completions]

    before = weights(named())
    options = {"max_completion_length": 4, "num_generations": 2, "beta": 0.1, "max_length": None}
    prompts = datasets.Dataset.from_list([{"prompt": text} for text in TEXTS])
    made = run("trainfn", "GRPO", tmp_path, prompts, named, more={"reward_funcs": reward}, **options)
    assert len(logged(made, "reward")) == 3 and all(norm > 0 for norm in logged(made, "grad_norm"))
    assert any((weights(made.model)[name] != value).any() for name, value in before.items())
