"""The models people train: each whole step one graph, equal to the eager one, dropout on."""

import pytest
import torch

import trainfn as tfn
from tests.helpers import assert_close, assert_identical, generator, long, quick, seeded
from trainfn.errors import CaptureError

pytest.importorskip("transformers")

from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

pytestmark = pytest.mark.usefixtures("untouched_rng")

SIZES = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert():
    return BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=12))  # its dropouts are 0.1


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=19, n_embd=16, n_layer=2, n_head=2, n_positions=12))


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, attention_dropout=0.1))


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=19, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


def batch(rows, seed=0):
    ids = torch.randint(1, 19, (rows, 6), generator=generator(seed))
    lengths = torch.randint(2, 7, (rows, 1), generator=generator(seed + 1))
    mask = torch.arange(6) < lengths
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def loss(model, batch):
    logits = model(**batch).logits
    if model.config.model_type in ("bert", "t5"):
        return tfn.losses.cross_entropy(logits, batch["labels"])
    return tfn.losses.next_token(logits, batch["labels"])


@pytest.mark.parametrize("make", [bert, gpt2, llama, t5])
def test_a_model_of_transformers_is_one_graph_and_equals_its_eager_step(make):
    optimizer = tfn.optim.chain(tfn.optim.clip_by_global_norm(1.0), tfn.optim.sgd(0.1, momentum=0.9))
    eager = tfn.train_step(loss, optimizer)
    step = quick(eager)
    state = twin = first = tfn.init(seeded(make), optimizer)
    for n in range(2):
        state, metrics = step(state, batch(4, n))
        twin, expected = eager(twin, batch(4, n))
        assert step.explain().graphs == 1
        # Decompositions of the fused kernels round in another order.
        assert_close((state, metrics), (twin, expected), 1e-6)
    other, _ = eager(first._replace(key=tfn.random.key(1)), batch(4))
    assert not all(
        torch.equal(a, b)
        for a, b in zip(tfn.tree.leaves(other), tfn.tree.leaves(eager(first, batch(4))[0]), strict=True)
    )


@pytest.mark.parametrize("make", [bert, gpt2, llama, t5])
def test_accumulation_of_a_model_of_transformers_equals_one_batch(make):
    """The model pads, masks and drops out; the loss is summed over tokens, so the split changes nothing."""
    optimizer = tfn.optim.sgd(0.1)
    step = tfn.train_step(loss, optimizer)
    state = tfn.init(seeded(make), optimizer)
    assert_close(tfn.accumulate(step, 3)(state, batch(5)), step(state, batch(5)), 1e-6)


@pytest.mark.parametrize("make", [bert, long(gpt2), llama, long(t5)])
def test_batches_of_many_sizes_are_two_graphs(make):
    """An exact one for the first size, and one for every other: dropout included, to the bit."""
    optimizer = tfn.optim.sgd(0.1)
    eager = tfn.train_step(loss, optimizer)
    step, state = quick(eager, dynamic="auto"), tfn.init(seeded(make), optimizer)
    for rows, length in ((4, 6), (3, 5), (2, 7), (5, 9), (4, 6), (3, 11)):
        ids = torch.randint(1, 19, (rows, length), generator=generator(length))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        assert_identical(step(state, given), eager(state, given))
    assert step.explain().graphs == 2


def vision():
    config = ViTConfig(image_size=16, patch_size=8, num_labels=3, **{**SIZES, "vocab_size": 3})
    return ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator(0))}


def speech():
    """Without its masks, which NumPy draws, and without layer dropout, which Python draws."""
    config = Wav2Vec2Config(
        **{**SIZES, "vocab_size": 12}, conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8), layerdrop=0.0,
        num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, apply_spec_augment=False,
    )  # fmt: skip
    model = Wav2Vec2ForCTC(config)
    model.wav2vec2.masked_spec_embed.requires_grad_(False)  # what SpecAugment, which is off, would put in
    return model, {"input_values": torch.randn(2, 400, generator=generator(0))}


def experts():
    config = MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1)
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("batched_mm")
    return model, {"input_ids": batch(4)["input_ids"]}


def qwen3():
    config = Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8)
    return Qwen3ForCausalLM(config), {"input_ids": batch(4)["input_ids"]}


def gemma2():
    config = Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8)
    return Gemma2ForCausalLM(config), {"input_ids": batch(4)["input_ids"]}


def squares(model, batch):
    return tfn.Mean.of(model(**batch).logits.square())


@pytest.mark.parametrize("make", [vision, speech, experts, qwen3, gemma2])
def test_other_models_give_the_bits_of_the_eager_step(make):
    model, given = seeded(make)
    optimizer = tfn.optim.sgd(0.1)
    eager, state = tfn.train_step(squares, optimizer), tfn.init(model, optimizer)
    assert_identical(quick(eager)(state, given), eager(state, given))


def test_grouped_experts_say_what_to_write():
    model, given = seeded(experts)
    model.set_experts_implementation("grouped_mm")
    optimizer = tfn.optim.sgd(0.1)
    step, state = quick(tfn.train_step(squares, optimizer)), tfn.init(model, optimizer)
    try:
        got = step(state, given)
    except CaptureError as error:  # where torch has no form of it without numbers
        assert 'set_experts_implementation("batched_mm")' in str(error)
    else:
        assert_identical(got, step.step(state, given))
