"""Adapters on a base whose weights bitsandbytes has quantized: trained, saved, and resumed to the bit."""

import pytest
import torch
import transformers
from torch import nn

import trainfn as tfn
from tests.clients.both import package
from trainfn import Trainer, TrainingArguments

bnb = package("bitsandbytes")
peft = package("peft")
pytestmark = [
    pytest.mark.usefixtures("untouched_rng"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),  # of bitsandbytes and peft themselves
]
IDS = torch.arange(3, 9).repeat(4, 1)
SIZES = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}


def weight_of(bits, numbers):
    if bits == 4:
        return bnb.nn.Params4bit(numbers, requires_grad=False, quant_type="nf4")
    return bnb.nn.Int8Params(numbers, requires_grad=False, has_fp16_weights=False)


def layer_of(bits, inputs, outputs):
    if bits == 4:
        return bnb.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    return bnb.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)


def quantized(bits, seed=0):
    """What ``from_pretrained(quantization_config=...)`` makes of a model's linear layers, with adapters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**SIZES, num_attention_heads=2, num_key_value_heads=2)
        model = transformers.LlamaForCausalLM(config)
        for part in list(model.model.modules()):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    layer = layer_of(bits, child.in_features, child.out_features)
                    layer.weight = weight_of(bits, child.weight.data)
                    setattr(part, name, layer.to("cpu"))
        lora = peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(model, lora)


def loss(model, ids):
    logits = model(input_ids=ids).logits
    return tfn.losses.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def started(bits, storage, seed=0):
    optimizer = tfn.optim.adamw(1e-2)
    return tfn.init(quantized(bits, seed), optimizer, storage=storage), tfn.train_step(loss, optimizer)


@pytest.mark.parametrize("storage", ["copy", "adopt"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_state_is_saved_and_restored_to_the_bit(bits, storage, tmp_path):
    state, step = started(bits, storage)
    for _ in range(2):
        before = state
        state, _ = step(state, IDS)
    assert any("lora" in name and bool((p != before.params[name]).any()) for name, p in state.params.items())
    tfn.save(tmp_path / "c", state)
    with tfn.Checkpoints(tmp_path / "all") as store:
        store.save(state)
        store.wait()
        fresh, again = started(bits, storage)
        for back in (tfn.restore(tmp_path / "c", like=fresh), store.restore(fresh)[0]):
            assert not tfn.diff(back, state)
            assert not tfn.diff(again(back, IDS)[0], step(state, IDS)[0])
    compiled, _ = tfn.jit(step, backend="eager")(state, IDS)
    assert not tfn.diff(compiled, step(state, IDS)[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_another_base_is_named(bits, tmp_path):
    state, _ = started(bits, "copy")
    tfn.save(tmp_path / "c", state)
    other, _ = started(bits, "copy", seed=1)
    with pytest.raises(tfn.errors.CheckpointError, match=r"another base model.*is a quantized weight \(\w+\)"):
        tfn.restore(tmp_path / "c", like=other)
    assert tfn.restore(tmp_path / "c", like=other, only="lora").step == state.step


@pytest.mark.parametrize("bits", [4, 8])
def test_a_trainer_resumes_to_the_bit(bits, tmp_path):
    def run(resume=None):
        rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 16
        given = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 4}
        quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "log_level": "error"}
        trainer = Trainer(quantized(bits), TrainingArguments(str(tmp_path), **given, **quiet), train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return tfn.digest(trainer.train_state)

    assert run() == run(str(tmp_path / "checkpoint-2"))
