"""Adapters of peft: what a checkpoint holds of them, and that a run resumes from it, or from one of transformers."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import trainfn as tfn
from tests.clients.both import KINDS, QUIET, Seeded, assert_same_run, logged, package, weights
from tests.helpers import assert_close, assert_identical
from tests.hf.models import llama, seeded, tokens

peft = package("peft")
pytestmark = pytest.mark.usefixtures("untouched_rng")
LM = {"task_type": "CAUSAL_LM"}
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}


def lora(**options):
    return peft.LoraConfig(**{"r": 2, **LM, **ATTENTION, **options})


METHODS = {
    "lora": (llama, lambda: lora()),
    "dora": (llama, lambda: lora(use_dora=True)),
    "rslora with a bias": (lambda: llama(attention_bias=True), lambda: lora(bias="lora_only", use_rslora=True)),
    "modules to save": (llama, lambda: lora(modules_to_save=["lm_head"])),
    "tokens": (llama, lambda: lora(trainable_token_indices=[1, 2])),
    "tied embeddings": (
        lambda: llama(tie_word_embeddings=True), lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    ),
    "a tied head": (
        lambda: llama(tie_word_embeddings=True),
        lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "ia3": (
        llama,
        lambda: peft.IA3Config(**LM, target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "prompt tuning": (llama, lambda: peft.PromptTuningConfig(**LM, num_virtual_tokens=2)),
    "prefix tuning": (llama, lambda: peft.PrefixTuningConfig(**LM, num_virtual_tokens=2)),
    "vera": (llama, lambda: peft.VeraConfig(**LM, **ATTENTION, r=2)),
    "loha": (llama, lambda: peft.LoHaConfig(**LM, **ATTENTION, r=2)),
    "layer norms": (llama, lambda: peft.LNTuningConfig(**LM, target_modules=["input_layernorm"])),
}  # fmt: skip
STEPS = {**QUIET, "save_strategy": "steps", "save_steps": 2}


def adapted(method):
    make, config = METHODS[method]
    return seeded(lambda: peft.get_peft_model(make(), config()))


def run(kind, model, folder, resume=None, data=None, **options):
    trainer, arguments = KINDS[kind]
    with Seeded():
        made = trainer(model, arguments(str(folder), **{**STEPS, **options}), train_dataset=data or tokens(16))
        made.train(resume_from_checkpoint=resume)
    return made


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_holds_the_adapter_and_resumes_to_the_bit(method, tmp_path):
    theirs = run("transformers", adapted(method), tmp_path / "theirs")
    ours = run("trainfn", adapted(method), tmp_path / "ours")
    if method == "prompt tuning":  # its first label is predicted too, and transformers divides by the others alone
        batch = transformers.default_data_collator(tokens(16)[:4])
        assert logged(ours, "loss")[0] == pytest.approx(adapted(method)(**batch).loss.item(), abs=1e-6)
    else:
        assert_same_run(ours, theirs)
    mine, other = tmp_path / "ours/checkpoint-2", tmp_path / "theirs/checkpoint-2"
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= names(mine) & names(other)
    assert not {"config.json", "model.safetensors"} & (names(mine) | names(other))
    assert (mine / "adapter_config.json").read_bytes() == (other / "adapter_config.json").read_bytes()
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (mine, other))
    assert found.keys() == expected.keys()
    if method != "prompt tuning":
        assert_close(found, expected, 1e-6)
    base = {name for name, p in ours.model.named_parameters() if not p.requires_grad}
    held = {leaf.removeprefix("model/") for leaf in tfn.manifest(mine).tree}
    assert not {n for n in base & held if ".default" not in n}
    assert weights(ours.model).keys() <= held
    again = run("trainfn", adapted(method), tmp_path / "again", resume=str(mine))
    assert again.state.global_step == 4
    assert_identical(weights(again.model), weights(ours.model))
    if method != "prompt tuning":
        after = run("trainfn", adapted(method), tmp_path / "after", resume=str(other))
        assert_close(weights(after.model), weights(theirs.model), 1e-6)


def test_named_adapters_are_saved_each_in_its_folder(tmp_path):
    def two(last="b"):
        model = seeded(lambda: peft.get_peft_model(llama(), lora()))
        seeded(lambda: model.add_adapter("b", lora(r=3)))
        model.set_adapter(last)
        return model

    theirs = run("transformers", two(), tmp_path / "theirs")
    ours = run("trainfn", two(), tmp_path / "ours")
    assert_same_run(ours, theirs)
    assert not [name for name in weights(ours.model) if ".b." not in name]
    mine, other = tmp_path / "ours/checkpoint-2", tmp_path / "theirs/checkpoint-2"
    for place in (".", "b"):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= names(mine / place) & names(other / place)
    again = run("trainfn", two(), tmp_path / "again", resume=str(mine))
    assert_identical(weights(again.model), weights(ours.model))
    after = run("trainfn", two(), tmp_path / "after", resume=str(other))
    assert_close(weights(after.model), weights(theirs.model), 1e-6)
    with pytest.raises(tfn.errors.CheckpointError, match=r"has the adapters \['b', 'default'\], and the model has"):
        run("trainfn", adapted("lora"), tmp_path / "fewer", resume=str(other))
    with pytest.raises(tfn.errors.CheckpointError, match=r"not in the state: model/.*lora_A\.b\.weight"):
        run("trainfn", adapted("lora"), tmp_path / "fewer", resume=str(mine))


def test_adapters_are_switched_and_added_between_runs(tmp_path):
    def thrice(kind):
        """transformers keeps its optimizer, with the parameters of the first run: there each run has its Trainer."""
        model, found = adapted("lora"), []
        trainer, arguments = KINDS[kind]
        made = None
        with Seeded():
            for active in ("default", "b", "default"):
                if active not in model.peft_config:
                    seeded(lambda: model.add_adapter("b", lora(r=3)))
                model.set_adapter(active)
                if made is None or kind == "transformers":
                    made = trainer(model, arguments(str(tmp_path / kind), **QUIET), train_dataset=tokens(16))
                made.train()
                found.append(weights(model))
        return made, found

    (ours, mine), (theirs, other) = thrice("trainfn"), thrice("transformers")
    for one, another in zip(mine, other, strict=True):
        assert_close(one, another, 1e-6)
    assert_same_run(ours, theirs)


def test_a_checkpoint_resumes_with_an_adapter_more_that_does_not_train(tmp_path):
    whole = run("trainfn", adapted("lora"), tmp_path / "whole")
    more = adapted("lora")
    seeded(lambda: more.add_adapter("b", lora(r=3)))
    again = run("trainfn", more, tmp_path / "again", resume=str(tmp_path / "whole/checkpoint-2"))
    assert_identical(weights(again.model), weights(whole.model))


@pytest.mark.parametrize("only_model", [False, True])
def test_the_best_adapter_is_loaded_at_the_end(only_model, tmp_path):
    data, options = tokens(16), {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    options |= {"save_only_model": only_model, "metric_for_best_model": "loss", "greater_is_better": True}
    options["per_device_eval_batch_size"] = 16  # the mean over tokens is then that over batches
    made = {}
    for kind, (trainer, arguments) in KINDS.items():
        with Seeded():
            args = arguments(str(tmp_path / kind), **{**STEPS, **options, "learning_rate": 0.2})
            made[kind] = trainer(adapted("modules to save"), args, train_dataset=data, eval_dataset=data)
            made[kind].train()
    ours, theirs = made["trainfn"], made["transformers"]
    assert Path(ours.state.best_model_checkpoint).name == Path(theirs.state.best_model_checkpoint).name
    assert_same_run(ours, theirs, ("loss", "eval_loss"))
    best = load_file(Path(ours.state.best_model_checkpoint) / "adapter_model.safetensors")
    assert_identical(peft.get_peft_model_state_dict(ours.model), best)


def test_save_model_writes_the_adapter(tmp_path):
    ours = run("trainfn", adapted("lora"), tmp_path, save_strategy="no")
    ours.save_model(str(tmp_path / "saved"))
    assert "model.safetensors" not in names(tmp_path / "saved")
    again = seeded(lambda: peft.PeftModel.from_pretrained(llama(), str(tmp_path / "saved")))
    batch = transformers.default_data_collator(tokens(2))
    assert torch.equal(again(**batch).logits, ours.model.eval()(**batch).logits)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    run("transformers", adapted("lora"), tmp_path)
    other = seeded(lambda: peft.get_peft_model(llama(), lora(target_modules=["q_proj", "o_proj"])))
    with pytest.raises(
        tfn.errors.CheckpointError, match=r"does not fit the model's\. Missing: .*o_proj.*unexpected.*v_"
    ):
        run("trainfn", other, tmp_path / "after", resume=str(tmp_path / "checkpoint-2"))


def test_a_model_of_transformers_with_adapters_of_its_own(tmp_path, monkeypatch):
    # transformers asks for a newer peft than there is, for what this does not use.
    monkeypatch.setattr(transformers.integrations.peft, "check_peft_version", lambda **_: None)

    def model():
        made = llama()
        seeded(lambda: made.add_adapter(lora(), "one"))
        return made

    theirs = run("transformers", model(), tmp_path / "theirs")
    ours = run("trainfn", model(), tmp_path / "ours")
    assert_same_run(ours, theirs)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names(tmp_path / "ours/checkpoint-2")
    assert "model.safetensors" not in names(tmp_path / "ours/checkpoint-2")
    again = run("trainfn", model(), tmp_path / "again", resume=str(tmp_path / "ours/checkpoint-2"))
    assert_identical(weights(again.model), weights(ours.model))
    after = run("trainfn", model(), tmp_path / "after", resume=str(tmp_path / "theirs/checkpoint-2"))
    assert_close(weights(after.model), weights(theirs.model), 1e-6)


def test_a_batch_norm_under_adapters_resumes_with_its_statistics(tmp_path):
    """peft does not save them; the state of the run does."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.dense = torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)

        def forward(self, x, labels):
            return {"loss": ((self.dense(self.norm(x)).squeeze(-1) - labels) ** 2).mean()}

    def model():
        return seeded(lambda: peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["dense"])))

    generator = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(3, generator=generator), "labels": torch.tensor(float(i % 3))} for i in range(16)]
    whole = run("trainfn", model(), tmp_path / "whole", data=rows)
    again = run("trainfn", model(), tmp_path / "again", data=rows, resume=str(tmp_path / "whole/checkpoint-2"))
    assert_identical(dict(again.model.named_buffers()), dict(whole.model.named_buffers()))
    assert_identical(weights(again.model), weights(whole.model))


@pytest.mark.parametrize("place", ["on_pre_optimizer_step", "on_optimizer_step"])
def test_adalora_allocates_ranks_by_gradients_in_a_callback(place, tmp_path):
    options = {"init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 6}

    def allocate(self, args, state, control, model=None, **_):
        model.base_model.update_and_allocate(state.global_step)

    def finished(kind):
        model = seeded(lambda: peft.get_peft_model(llama(), peft.AdaLoraConfig(**LM, **ATTENTION, **options)))
        trainer, arguments = KINDS[kind]
        callback = type("Allocate", (transformers.TrainerCallback,), {place: allocate})
        with Seeded():
            args = arguments(str(tmp_path / kind), **{**QUIET, "max_steps": 6})
            made = trainer(model, args, train_dataset=tokens(24), callbacks=[callback()])
            made.train()
        return made

    ours, theirs = finished("trainfn"), finished("transformers")
    assert_same_run(ours, theirs, tolerance=1e-5)  # a sum of products of gradients orders the ranks
    ranks = [(p != 0).sum().item() for n, p in ours.model.named_parameters() if "lora_E" in n]
    assert place != "on_optimizer_step" or sum(ranks) == 2  # before the update they are hidden, and then change
