"""GaLore and LOMO by their names in transformers: which weights, with which numbers, and whole runs of the Trainer."""

import logging

import pytest
import torch
import transformers
from torch import nn
from transformers import trainer_optimizer

import trainfn as tfn
from tests.helpers import assert_close, assert_identical
from tests.hf.models import gpt2, llama, rule_of, seeded, tokens
from trainfn.hf import Trainer, TrainingArguments
from trainfn.hf._arguments._support import check_supported
from trainfn.hf._optim._named import cls_and_kwargs, parse_optim_args
from trainfn.hf._optim._targets import target_names

pytestmark = pytest.mark.usefixtures("untouched_rng")
GALORE = [name.value for name in transformers.training_args.OptimizerNames if name.value.startswith("galore")]
QUIET = {
    "use_cpu": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "log_level": "error",
    "learning_rate": 0.05,
}


def arguments(optim="galore_adamw", targets=("attn", "mlp"), **options):
    targets = list(targets) if isinstance(targets, tuple) else targets
    return TrainingArguments(optim=optim, optim_target_modules=targets, **{"use_cpu": True, **options})


# -------------------------------------------------------------------------------------------------------- which weights


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attn = nn.ModuleDict({"q": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4, bias=False))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def net():
    return seeded(Layers)


MODELS = {"llama": llama, "net": net}
TARGETS = [
    ["attn", "mlp"],
    [r".*.attn.*", r".*.mlp.*"],
    ["q_proj"],
    ["model.layers.0.mlp.up_proj", "mlp.0"],
    [r".*\.\d"],
    r".*(attn|mlp).*",
    "all-linear",
    "all_linear",
    "mlp.0",
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_the_weights_that_transformers_chooses(targets, model):
    module, args = MODELS[model](), arguments(targets=targets)
    options = {"optimizer_mapping": {"galore_adamw": None}, "optim_kwargs": {"rank": 2}, "optimizer_kwargs": {}}
    try:
        _, made = trainer_optimizer._setup_low_rank_optimizer(args, module, "galore_adamw", **options)
    except ValueError as error:
        assert "No target modules" in str(error)
        with pytest.raises(ValueError, match="no linear layer of this"):
            target_names(args, module)
        return
    theirs = {id(p) for group in made["params"] if "rank" in group for p in group["params"]}
    assert target_names(args, module) == {name for name, p in module.named_parameters() if id(p) in theirs}


def test_all_others_are_optimized_in_the_usual_way():
    model = llama()
    rule = rule_of(arguments(optim_args="rank=2", max_grad_norm=0.0, learning_rate=0.1), model)
    params = {name: p.detach() for name, p in model.named_parameters()}
    updates, state = rule.update(params, rule.init(params), params)
    low_rank = [group.inner[0] for group in state[1].inner.values() if hasattr(group, "inner")]
    assert {name for part in low_rank for name in (*part.left, *part.right)} == target_names(arguments(), model)
    plain = tfn.optim.galore_adamw(0.1, targets=lambda name, p: False)
    others, _ = plain.update(params, plain.init(params), params)
    for name in params:
        assert torch.equal(updates[name], others[name]) != (name in target_names(arguments(), model)), name


def test_a_matrix_that_matches_and_is_no_linear_layer_is_named(caplog):
    with caplog.at_level(logging.WARNING, logger="trainfn.hf._optim._targets"):
        assert target_names(arguments(targets=["attn", "embed"]), net()) == {"attn.q.weight"}
    assert "GaLore projects linear layers only, and not 'embed'." in caplog.text


@pytest.mark.parametrize(
    ("targets", "model", "kind", "message"),
    [
        (
            None,
            net,
            ValueError,
            r"`TrainingArguments\(optim='galore_adamw'\)` can't work.*=\['attn', 'mlp'\]\)`, or 'all-",
        ),
        (7, net, TypeError, r"optim_target_modules=7\)` can't work: that is neither a string nor a list.*Write"),
        (["zzz"], net, ValueError, r"no linear layer of this Layers matches.*'attn.q', 'mlp.0'.*=\['q'\]`"),
        (["attn"], gpt2, ValueError, r"no linear layer of this GPT2LMHeadModel matches.*'lm_head'"),
        (
            "all-linear",
            lambda: nn.LayerNorm(2),
            ValueError,
            r"the model has no linear layer. Write `optim='adamw_torch'`",
        ),
        (
            ["*.attn"],
            net,
            ValueError,
            r"'\*.attn' is not a valid regular expression, nothing to repeat. Write `'.\*attn.\*'`",
        ),
        (["attn"], dict, ValueError, r"parameters alone.*Pass the model itself"),
    ],
)
def test_targets_that_cannot_be(targets, model, kind, message):
    with pytest.raises(kind, match=message):
        cls_and_kwargs(arguments(targets=targets), model())


# -------------------------------------------------------------------------------------------------------- which numbers

OPTIONS = "rank=2, update_proj_gap=3, scale=0.10, proj_type=full"
SIZES = {"rank": 2, "update_proj_gap": 3, "scale": 0.1, "proj_type": "full"}


def decays(name, p):
    return "bias" not in name and "norm" not in name


RATE = 0.1
NUMBERS = {"weight_decay": 0.1, "mask": decays}
EQUAL = [
    ("galore_adamw", tfn.optim.galore_adamw(RATE, 0.8, 0.95, 1e-3, **NUMBERS, **SIZES)),
    ("galore_adamw_8bit", tfn.optim.galore_adamw(RATE, 0.8, 0.95, 1e-3, **NUMBERS, **SIZES)),
    ("galore_adafactor", tfn.optim.galore_adafactor(RATE, **NUMBERS, **SIZES)),
    ("lomo", tfn.optim.lomo(RATE, **NUMBERS)),
    ("adalomo", tfn.optim.adalomo(RATE, **NUMBERS)),
]


def follow(rule, model, steps=5):
    """All but the one matrix that is no linear layer's, which ``targets=None`` would project."""
    params = {name: p.detach().clone() for name, p in model.named_parameters() if name != "embed.weight"}
    state, draw = rule.init(params), torch.Generator().manual_seed(1)
    for _ in range(steps):
        grads = {name: torch.randn(p.shape, generator=draw) for name, p in params.items()}
        updates, state = rule.update(grads, state, params)
        params = tfn.tree.add(params, updates)
    return params


@pytest.mark.parametrize(
    ("name", "expected"), EQUAL + [(f"{name}_layerwise", rule) for name, rule in EQUAL if "galore" in name]
)
def test_the_fields_are_the_numbers_of_the_transform(name, expected):
    galore = "galore" in name
    fields = {"weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-3, "max_grad_norm": 0.0,
              "learning_rate": RATE}  # fmt: skip
    args = arguments(name, "all-linear" if galore else None, optim_args=OPTIONS if galore else None, **fields)
    model = net()
    assert_identical(follow(rule_of(args, model), model), follow(expected, model))


@pytest.mark.parametrize("name", GALORE)
def test_defaults_are_those_of_the_package(name):
    model = net()
    base = tfn.optim.galore_adafactor if "adafactor" in name else tfn.optim.galore_adamw
    eps = {"eps": 1e-8} if "8bit" in name else {}
    expected = base(RATE, rank=128, update_proj_gap=200, scale=0.25, proj_type="std", **eps)
    rule = rule_of(arguments(name, "all-linear", max_grad_norm=0.0, learning_rate=RATE), model)
    assert_identical(follow(rule, model), follow(expected, model))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("galore_adamw", "rnak=4", r"no option 'rnak', only rank, update_proj_gap, scale, proj_type.*Write `rank=...`"),
        ("galore_adamw", "rank=64.5", r"rank is an int, and '64.5' is not a valid one. Write `rank=64`"),
        ("galore_adafactor_layerwise", "scale=big", r"scale is a float, and 'big' is not a valid one"),
        ("adalomo", "rank=4", r"adalomo has no option 'rank', nor any other"),
    ],
)
def test_options_that_cannot_be(name, text, message):
    with pytest.raises(ValueError, match=message):
        parse_optim_args(name, text)


def test_options_are_typed():
    assert parse_optim_args("galore_adamw", OPTIONS) == SIZES
    with pytest.raises(ValueError, match=r"proj_type='both'.*'reverse_std'"):
        rule_of(arguments(optim_args="proj_type=both"), llama()).init(dict(llama().named_parameters()))


def test_eight_bits_are_a_promise_that_is_not_kept_silently():
    with pytest.warns(
        UserWarning, match=r"optim='galore_adamw_8bit'.*not quantized here.*Write `optim='galore_adamw'`"
    ):
        check_supported(arguments("galore_adamw_8bit"))
    check_supported(arguments("galore_adamw"))
    with pytest.raises(ValueError, match=r"layers of GaLore, and this is another.*or write `optim='galore_adamw'`"):
        check_supported(arguments("lomo"))


# ----------------------------------------------------------------------------------------------------------- whole runs

EXACT = "rank=2, update_proj_gap=2, scale=1.0, align=true"


def trained(folder, optim, resume=None, **options):
    targets = {"optim_target_modules": ["attn", "mlp"], "optim_args": EXACT} if "galore" in optim else {}
    options = {"max_steps": 3, "per_device_train_batch_size": 4, **QUIET, **targets, **options}
    trainer = Trainer(llama(), TrainingArguments(str(folder), optim=optim, **options), train_dataset=tokens(24))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adafactor", "lomo", "adalomo"])
def test_a_run_learns_and_its_split_is_free(optim, tmp_path):
    before = {name: p.detach().clone() for name, p in llama().named_parameters()}
    whole = trained(tmp_path, optim)
    halves = trained(tmp_path, optim, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    after = parameters(whole)
    assert_close(parameters(halves), after, 1e-4)
    assert all(not torch.equal(after[name], p) for name, p in before.items())
    whole.model(**{k: v[None] for k, v in tokens(1)[0].items()}).loss.backward()
    assert_identical(parameters(whole), after)  # no hook is left behind


@pytest.mark.slow
def test_compiled_it_takes_the_same_steps(tmp_path):
    compiled = trained(tmp_path, "galore_adamw", torch_compile=True, torch_compile_backend="eager")
    assert_close(parameters(compiled), parameters(trained(tmp_path, "galore_adamw")), 1e-4)


def test_layer_by_layer_takes_the_same_steps(tmp_path):
    expected = parameters(trained(tmp_path, "galore_adamw"))
    assert_identical(parameters(trained(tmp_path, "galore_adamw_layerwise")), expected)


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adafactor_layerwise", "adalomo"])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_resumes_across_a_refresh(optim, stop, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    whole = trained(tmp_path, optim, **options)
    again = trained(tmp_path, optim, resume=str(tmp_path / f"checkpoint-{stop}"), **options)
    assert_identical(parameters(again), parameters(whole))
    assert_identical(again.train_state.opt_state, whole.train_state.opt_state)
