"""Optimizers and schedules by their names in transformers: the same numbers as theirs; and torch objects converted."""

import copy
import json

import pytest
import torch
import transformers
from torch import nn
from transformers.optimization import Adafactor, GreedyLR, get_scheduler

import trainfn as tfn
from tests.hf.models import rule_of
from trainfn.hf._arguments._training import TrainingArguments
from trainfn.hf._optim._groups import Groups
from trainfn.hf._optim._moments import entries
from trainfn.hf._optim._named import check_optimizer, cls_and_kwargs, decay_names, parse_optim_args
from trainfn.hf._optim._schedules import from_json, load_state, make_scheduler, state_of, to_json


def arguments(**kwargs):
    return TrainingArguments(**{"use_cpu": True, **kwargs})


class Net(nn.Module):
    """Parameters with and without decay, by their names and by their layers."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.ln = nn.LayerNorm(4)
        self.final_norm = nn.Linear(2, 2, bias=False)
        self.scale = nn.Parameter(torch.randn(()))


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def follow(optimizer, rule, model, *, steps=20, scheduler=None, clip=None):
    """The parameters after the same random gradients, by a torch optimizer in place and by a transform."""
    generator = torch.Generator().manual_seed(1)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = rule.init(params)
    for _ in range(steps):
        grads = {name: torch.randn(p.shape, generator=generator) for name, p in params.items()}
        for name, p in model.named_parameters():
            p.grad = grads[name].clone()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        updates, state = rule.update(grads, state, params)
        if scheduler is not None:
            scheduler.step()
        params = tfn.tree.add(params, updates)
    return params


def assert_equal(params, model, atol=1e-6):
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            params[name], p.detach(), atol=atol, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


# ---------------------------------------------------------------------------------------------------- by their names

NAMED = [
    {"optim": "adamw_torch"},
    {"optim": "adamw_torch_fused", "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6},
    {"optim": "adafactor"},
    {"optim": "adafactor", "weight_decay": 0.1},
    {"optim": "sgd"},
    {"optim": "sgd", "weight_decay": 0.1, "optim_args": "momentum=0.9, nesterov=True"},
    {"optim": "sgd", "optim_args": "momentum=0.9,dampening=0.5"},
    {"optim": "adagrad", "weight_decay": 0.1},
    {"optim": "adagrad", "optim_args": "lr_decay=0.1, eps=1e-6"},
    {"optim": "rmsprop", "weight_decay": 0.1},
    {"optim": "rmsprop", "optim_args": "momentum=0.5, alpha=0.9, eps=1e-6, centered=yes"},
]


@pytest.mark.parametrize("norm", [1.0, 0.0])
@pytest.mark.parametrize("kwargs", NAMED, ids=lambda k: " ".join(map(str, k.values())))
def test_the_optimizer_that_transformers_builds(kwargs, norm):
    args = arguments(learning_rate=1e-2, warmup_steps=3, max_grad_norm=norm, **kwargs)
    model = net()
    cls, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
    names = transformers.Trainer.get_decay_parameter_names(None, model)
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in names], "weight_decay": args.weight_decay},
        {"params": [p for n, p in model.named_parameters() if n not in names], "weight_decay": 0.0},
    ]
    optimizer = cls(groups, **options)
    mine, kwargs = cls_and_kwargs(args, model)
    # transformers reads `optim_args` as text, and leaves out what it does not know.
    assert mine is cls and options.items() <= {"momentum": 0.0, **kwargs}.items()
    rule = rule_of(args, model)
    assert_equal(follow(optimizer, rule, model, clip=norm), model)


def test_lion_against_its_equations():
    module = nn.Module()
    module.w = nn.Parameter(torch.tensor([1.0, -2.0]))
    args = arguments(optim="lion_32bit", weight_decay=0.1, max_grad_norm=0.0, learning_rate=0.1)
    rule = rule_of(args, module)
    p, m = torch.tensor([1.0, -2.0]), torch.zeros(2)
    params = {"w": p}
    state = rule.init(params)
    for g in (torch.tensor([1.0, -1.0]), torch.tensor([-3.0, 0.5])):
        p, m = p * (1 - 0.1 * 0.1) - 0.1 * torch.sign(0.9 * m + 0.1 * g), 0.999 * m + 0.001 * g
        updates, state = rule.update({"w": g}, state, params)
        params = tfn.tree.add(params, updates)
    torch.testing.assert_close(params["w"], p)


TINY = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16}
MODELS = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TINY)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **TINY)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    ),
    "bare LayerNorm": lambda: nn.LayerNorm(2),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.LayerNorm(2), nn.BatchNorm1d(2)), Net()),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_decays_is_what_decays_in_transformers(name):
    model = MODELS[name]()
    theirs = set(transformers.Trainer.get_decay_parameter_names(None, model))
    trained = {name for name, _ in model.named_parameters()}
    assert decay_names(model) == theirs & trained
    assert decay_names(model) or name == "nested"


# ------------------------------------------------------------------------------------------------------ its options


def test_options_are_typed():
    options = parse_optim_args("rmsprop", "momentum = 0.5,centered=No")
    assert options == {"momentum": 0.5, "centered": False}
    assert parse_optim_args("sgd", {"momentum": 0.9}) == {"momentum": 0.9}
    assert parse_optim_args("adamw_torch", None) == parse_optim_args("adamw_torch", "") == {}


@pytest.mark.parametrize(
    ("optim", "text", "message"),
    [
        (
            "sgd",
            "momentun=0.9",
            r"sgd has no option 'momentun', only momentum, dampening, nesterov. Write `momentum=...`",
        ),
        ("sgd", "qq=1", r"no option 'qq'.*Leave it out"),
        ("adamw_torch", "beta1=0.5", r"nor any other.*Write `TrainingArguments\(adam_beta1=...\)`"),
        ("sgd", "weight_decay=0.1", r"a field of its own.*Write `TrainingArguments\(optim='sgd', weight_decay=0.1\)`"),
        ("sgd", "momentum", r"'momentum' is not a key and a value. Write `optim_args='key=value"),
        ("sgd", "momentum=much", r"momentum is a float, and 'much' is not a valid one. Write `momentum=0.9`"),
        ("sgd", "nesterov=perhaps", r"nesterov is a bool, and 'perhaps' is not a valid one. Write `nesterov=true`"),
    ],
)
def test_options_that_cannot_be(optim, text, message):
    with pytest.raises(ValueError, match=message):
        parse_optim_args(optim, text)


@pytest.mark.parametrize("name", [name.value for name in transformers.training_args.OptimizerNames])
def test_every_name_of_transformers_works_or_says_why_not(name):
    has = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "lion_32bit"}
    if name.startswith("galore"):
        check_optimizer(name)  # what it needs besides: test_galore.py
        return
    if name in has | {"lomo", "adalomo"}:
        rule_of(arguments(optim=name), net()).init({name: p.detach() for name, p in net().named_parameters()})
        return
    with pytest.raises(ValueError, match=rf"`TrainingArguments\(optim='{name}'\)` can't work: .*Write `optim='(\w+)'`"):
        check_optimizer(name)


# ---------------------------------------------------------------------------------------------- torch's own objects


def adafactor(params, **kwargs):
    return Adafactor(params, **{"lr": 0.01, "relative_step": False, "scale_parameter": False, **kwargs})


TORCH = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov maximized": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1),
    "adam decoupled": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.1),
    "adafactor": lambda p: adafactor(p, weight_decay=0.1, beta1=0.9),
    "adafactor relative": lambda p: Adafactor(p, warmup_init=True),
}


@pytest.mark.parametrize("name", TORCH)
def test_a_torch_optimizer_becomes_a_transform(name):
    model = net()
    optimizer = TORCH[name](model.parameters())
    rule = Groups(optimizer, model.named_parameters()).transform
    assert_equal(follow(optimizer, rule, model), model)


@pytest.mark.parametrize("name", [name for name in TORCH if "adafactor" not in name])
def test_moments_that_are_there_already_are_carried_over(name):
    model = net()
    optimizer = TORCH[name](model.parameters())
    follow(optimizer, tfn.optim.scale(0.0), model, steps=3)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    rule = Groups(optimizer, model.named_parameters()).transform
    params = {n: p.detach() for n, p in model.named_parameters()}
    rule.init(params)
    after = optimizer.state_dict()["state"]
    torch.testing.assert_close(after, before)
    assert_equal(follow(optimizer, rule, model), model)


def test_groups_keep_their_own_numbers():
    model = net()
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.fc.weight], "lr": 0.1, "betas": (0.5, 0.6), "weight_decay": 0.3, "eps": 1e-3},
            {"params": [model.fc.bias, model.ln.weight], "lr": 0.0},
            {"params": [model.scale]},
        ],
        lr=0.01,
    )
    rule = Groups(optimizer, model.named_parameters()).transform
    untouched = model.final_norm.weight.detach().clone()
    params = follow(optimizer, rule, model)
    assert_equal(params, model)
    assert torch.equal(params["final_norm.weight"], untouched)  # in no group


def test_optimizers_that_are_not_known_or_cannot_be():
    model, params = net(), lambda model: model.named_parameters()

    class Mine(torch.optim.Adam):
        """What it does, its Python alone knows."""

    for unknown in (Mine(model.parameters()), torch.optim.NAdam(model.parameters())):
        with pytest.raises(ValueError, match=r"(Mine|NAdam)\(...\), ...\)\)` can't work: only its own Python"):
            Groups(unknown, params(model))
    amsgrad = Groups(torch.optim.Adam(model.parameters(), amsgrad=True), params(model)).transform
    with pytest.raises(ValueError, match=r"`optimizers=\(Adam\(...\), ...\)`.*amsgrad=True.*Write `amsgrad=False`"):
        amsgrad.init(dict(params(model)))
    with pytest.raises(ValueError, match=r"group 0 has a tensor of shape \[\] that is not a parameter.*Build"):
        Groups(torch.optim.SGD(net().parameters(), lr=0.1), params(model))


def partly(model):
    """Adam, of whose parameters one made two steps, one made one, and the others none."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for names in (["scale"], ["scale", "fc.weight"]):
        model.zero_grad()
        for name in names:
            model.get_parameter(name).grad = torch.ones_like(model.get_parameter(name))
        optimizer.step()
    return optimizer


def test_parameters_that_made_different_numbers_of_steps_keep_them():
    model = net()
    optimizer = partly(model)
    rule = Groups(optimizer, model.named_parameters()).transform
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = rule.init(params)
    assert {n: int(late) for n, late in state.inner["0"].inner[1].late.items()} == {
        "scale": 0, "fc.weight": 1, "fc.bias": 2, "ln.weight": 2, "ln.bias": 2, "final_norm.weight": 2,
    }  # fmt: skip
    assert_equal(follow(optimizer, rule, model, steps=3), model)


@pytest.mark.parametrize("name", [name for name in TORCH if name != "adafactor relative"])
def test_entries_of_a_state_are_those_of_torch(name):
    model = net()
    optimizer = TORCH[name](model.parameters())
    rule = Groups(optimizer, model.named_parameters()).transform
    state = rule.init({n: p.detach().clone() for n, p in model.named_parameters()})
    assert entries(state, "fc.weight") == {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        grads = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
        for n, p in model.named_parameters():
            p.grad = grads[n].clone()
        params = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
        _, state = rule.update(grads, state, params)
    for n, p in model.named_parameters():
        theirs = {k: v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor) and k != "RMS"}
        mine = {k: v for k, v in entries(state, n).items() if k != "step" or "step" in theirs}
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_clip_comes_first():
    args = arguments(optim="sgd", max_grad_norm=1.0, learning_rate=1.0)
    module = nn.Module()
    module.w = nn.Parameter(torch.zeros(2))
    params = {"w": torch.zeros(2)}
    rule = rule_of(args, module)
    updates, _ = rule.update({"w": torch.tensor([3.0, 4.0])}, rule.init(params), params)
    torch.testing.assert_close(updates["w"], torch.tensor([-0.6, -0.8]), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------- schedules

NAMES = {
    "warmup_stable_decay": {"num_decay_steps": 10},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "polynomial": {"lr_end": 1e-4},
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler:UserWarning")
@pytest.mark.parametrize("name", [name.value for name in transformers.SchedulerType])
def test_the_schedules_are_those_of_transformers(name):
    kwargs = NAMES.get(name, {})
    args = arguments(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=0.25, eval_strategy="epoch")
    groups = [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 0.5}]
    mine, theirs = (torch.optim.SGD(copy.deepcopy(groups), lr=0.1) for _ in range(2))
    schedules = make_scheduler(args, mine, 20), get_scheduler(name, theirs, 5, 20, kwargs)
    assert type(schedules[0]) is type(schedules[1])
    for n in range(20):
        assert [g["lr"] for g in mine.param_groups] == [g["lr"] for g in theirs.param_groups]
        for each in schedules:
            each.step(*([float(n % 7)] if name in ("reduce_lr_on_plateau", "greedy") else []))


@pytest.mark.parametrize(("name", "better"), [("reduce_lr_on_plateau", True), ("greedy", False)])
def test_a_schedule_that_follows_a_metric_knows_which_is_better(name, better):
    args = arguments(lr_scheduler_type=name, eval_strategy="epoch", greater_is_better=better)
    assert make_scheduler(args, torch.optim.SGD([torch.zeros(1)]), 1).mode == ("max" if better else "min")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("cosine", {"num_cycle": 2}, r"has no 'num_cycle', only \['num_cycles'\]. Write 'num_cycles'"),
        ("linear", '{"power": 2}', r"has no 'power', only what all schedules have. Leave it out"),
        (
            "warmup_stable_decay",
            {},
            r"num_decay_steps.*Write for example `lr_scheduler_kwargs=\{'num_decay_steps': 100\}`",
        ),
    ],
)
def test_options_of_schedules_that_cannot_be(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_scheduler(
            arguments(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs), torch.optim.SGD([torch.zeros(1)]), 9
        )


LR = torch.optim.lr_scheduler
SCHEDULERS = {
    "lambda": lambda o: LR.LambdaLR(o, [lambda n: 0.9**n, lambda n: 1.0]),
    "multiplicative": lambda o: LR.MultiplicativeLR(o, lambda n: 0.9),
    "step": lambda o: LR.StepLR(o, 3),
    "milestones": lambda o: LR.MultiStepLR(o, [2, 2, 8]),
    "one cycle": lambda o: LR.OneCycleLR(o, max_lr=[1.0, 0.1], total_steps=21),
    "restarts": lambda o: LR.CosineAnnealingWarmRestarts(o, 4),
    "cyclic": lambda o: LR.CyclicLR(o, 0.01, 0.1, 3),
    "polynomial": lambda o: LR.PolynomialLR(o, 10),
    "plateau": lambda o: LR.ReduceLROnPlateau(o, patience=1),
    "greedy": lambda o: GreedyLR(o, patience=1),
    "sequence": lambda o: LR.SequentialLR(o, [LR.ConstantLR(o, 0.1, 4), LR.ExponentialLR(o, 0.9)], [4]),
    "chain": lambda o: LR.ChainedScheduler([LR.ConstantLR(o, 0.1, 4), LR.ExponentialLR(o, 0.9)], o),
    "transformers": lambda o: get_scheduler("cosine", o, 5, 20),
}


@pytest.mark.filterwarnings("ignore:.*epoch parameter:UserWarning")  # torch's SequentialLR, of itself
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_state_of_a_schedule_is_json_and_continues(name):
    def made():
        groups = [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 0.5}]
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
        return optimizer, SCHEDULERS[name](optimizer)

    def step(optimizer, scheduler, n):
        optimizer.step()
        scheduler.step(*([float(n % 3)] if name in ("plateau", "greedy") else []))
        return [(group["lr"], group["momentum"]) for group in optimizer.param_groups]

    optimizer, scheduler = made()
    for n in range(7):
        step(optimizer, scheduler, n)
    again, resumed = made()
    again.load_state_dict(optimizer.state_dict())
    load_state(resumed, json.loads(json.dumps(state_of(scheduler))))
    for n in range(7, 14):
        assert step(again, resumed, n) == step(optimizer, scheduler, n)


def test_what_json_cannot_hold_is_left_out():
    assert to_json({"f": print, "of": {"f": [print], "n": 1}, 3: 4}) == {"dict": [["of", {"n": 1}], [3, 4]]}
    assert from_json(to_json({"a": 1, 3: 4})) == {"a": 1, 3: 4}
    assert to_json({"of": {(1, 2): 3}, "n": 1}) == {"n": 1}
    assert from_json(to_json({"t": (1, (2.0, None)), "x": torch.tensor(3)})) == {"t": (1, (2.0, None)), "x": 3}
