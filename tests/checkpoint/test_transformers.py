"""A folder of ours is one that transformers reads: names, tied weights, shards, config."""

import json
import warnings

import pytest
import torch

import trainfn as tfn

tf = pytest.importorskip("transformers")


def transformers_models():
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    t5 = tf.T5Config(vocab_size=31, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    yield "gpt2, tied", tf.AutoModelForCausalLM, tf.GPT2Config(vocab_size=31, n_embd=8, n_layer=1, n_head=2)
    yield "bert, tied", tf.AutoModelForMaskedLM, tf.BertConfig(vocab_size=31, **tiny)
    yield "t5, tied thrice", tf.AutoModelForSeq2SeqLM, t5
    yield "llama", tf.AutoModelForCausalLM, tf.LlamaConfig(vocab_size=31, num_key_value_heads=1, **tiny)


@pytest.fixture
def filters_as_they_were():
    """What transformers imports when its first model is made adds filters of its own."""
    with warnings.catch_warnings():
        yield


@pytest.mark.usefixtures("filters_as_they_were")
@pytest.mark.parametrize("max_shard_size", [5 * 10**9, 1000])
def test_transformers_reads_the_folder(max_shard_size, tmp_path):
    for name, auto, config in transformers_models():
        model = auto.from_config(config)
        state = tfn.init(model, tfn.optim.sgd(0.1))
        folder = tmp_path / name
        tfn.save(folder, state, max_shard_size=max_shard_size)
        assert len(list(folder.glob("model*.safetensors"))) == 1 or max_shard_size == 1000
        loaded, report = auto.from_pretrained(folder, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), (name, report)
        assert type(loaded) is type(model)
        theirs = loaded.state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items()), name
        assert json.loads((folder / "config.json").read_text())["architectures"] == [type(model).__name__]
