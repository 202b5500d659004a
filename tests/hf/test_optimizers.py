"""Optimizers and schedules by their names in transformers: the same numbers as theirs; and torch objects converted."""

import copy
import math
import warnings

import pytest
import torch
import transformers
from torch import nn
from transformers.optimization import Adafactor, get_scheduler

import trainfn as tfn
from trainfn.hf._arguments._training import TrainingArguments
from trainfn.hf._optim._named import check_optimizer, decay_names, make_optimizer, parse_optim_args
from trainfn.hf._optim._schedules import for_groups, from_lambda_lr, make_schedule
from trainfn.hf._optim._torch import from_torch


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
        if scheduler is not None:
            scheduler.step()
        updates, state = rule.update(grads, state, params)
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
    scheduler = get_scheduler("linear", optimizer, args.get_warmup_steps(20), 20)
    rule = make_optimizer(args, net(), make_schedule(args, 20).schedule)
    assert_equal(follow(optimizer, rule, model, scheduler=scheduler, clip=norm), model)


def test_lion_against_its_equations():
    rule = make_optimizer(arguments(optim="lion_32bit", weight_decay=0.1, max_grad_norm=0.0), {}, lambda count: 0.1)
    p, m = torch.tensor([1.0, -2.0]), torch.zeros(2)
    params = {"w": p}
    state = rule.init(params)
    for g in (torch.tensor([1.0, -1.0]), torch.tensor([-3.0, 0.5])):
        p, m = p * (1 - 0.1 * 0.1) - 0.1 * torch.sign(0.9 * m + 0.1 * g), 0.999 * m + 0.001 * g
        updates, state = rule.update({"w": g}, state, params)
        params = tfn.tree.add(params, updates)
    torch.testing.assert_close(params["w"], p)


def test_a_number_as_the_rate_can_be_changed_and_the_whole_compiles_once():
    args = arguments(optim="adamw_torch", weight_decay=0.1)
    rule = make_optimizer(args, net(), 0.5)
    params = {name: p.detach() for name, p in net().named_parameters()}
    state = rule.init(params)
    assert tfn.optim.get_hyperparams(state)["learning_rate"] == 0.5
    still, _ = rule.update(params, tfn.optim.set_hyperparams(state, learning_rate=0.0), params)
    assert not any(u.any() for u in still.values())


def test_names_alone_decide_where_there_are_no_layers():
    model = net()
    grads = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    params = {name: torch.ones_like(p) for name, p in grads.items()}
    rule = make_optimizer(arguments(weight_decay=0.1), params, lambda count: 1.0)
    updates, _ = rule.update(grads, rule.init(params), params)
    assert {name for name, u in updates.items() if u.any()} == {"fc.weight", "ln.weight", "scale"}


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
        make_optimizer(arguments(optim=name), {}, 0.1)
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
    rule = from_torch(optimizer, model.named_parameters())
    assert_equal(follow(optimizer, rule, model), model)


@pytest.mark.parametrize("name", [name for name in TORCH if "adafactor" not in name])
def test_moments_that_are_there_already_are_carried_over(name):
    model = net()
    optimizer = TORCH[name](model.parameters())
    follow(optimizer, tfn.optim.scale(0.0), model, steps=3)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    rule = from_torch(optimizer, model.named_parameters())
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
    rule = from_torch(optimizer, model.named_parameters())
    untouched = model.final_norm.weight.detach().clone()
    params = follow(optimizer, rule, model)
    assert_equal(params, model)
    assert torch.equal(params["final_norm.weight"], untouched)  # in no group


def test_the_rates_of_groups():
    model = net()
    optimizer = torch.optim.SGD(
        [{"params": model.fc.parameters(), "lr": 1.0}, {"params": model.ln.parameters()}], lr=0.1
    )
    args = arguments(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"lr_end": 0.01}, warmup_steps=0.2)
    theirs = get_scheduler("polynomial", optimizer, 4, 20, {"lr_end": 0.01})
    rates = [one.schedule for one in for_groups(args, optimizer, 20)]
    for n in range(20):
        here = [rate(torch.tensor(n)).item() for rate in rates]
        assert here == pytest.approx([group["lr"] for group in optimizer.param_groups], rel=1e-6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.step()
    rule = from_torch(optimizer, model.named_parameters(), rates)
    params = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    assert not any(u.any() for u in rule.update(params, rule.init(params), params)[0].values())  # the warm-up's 0


def test_rates_that_are_numbers_can_be_changed():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    args = arguments(lr_scheduler_type="greedy", eval_strategy="epoch")
    (scheduled,) = for_groups(args, optimizer, 20)
    rule = from_torch(optimizer, model.named_parameters(), [scheduled.schedule])
    params = {n: p.detach() for n, p in model.named_parameters()}
    state = tfn.optim.set_hyperparams(rule.init(params), learning_rate=0.0)
    assert not any(u.any() for u in rule.update(params, state, params)[0].values())


def test_optimizers_that_are_not_known_or_cannot_be():
    model, params = net(), lambda model: model.named_parameters()

    class Mine(torch.optim.Adam):
        """What it does, its Python alone knows."""

    assert from_torch(Mine(model.parameters()), params(model)) is None
    assert from_torch(torch.optim.NAdam(model.parameters()), params(model)) is None
    with pytest.raises(ValueError, match=r"`optimizers=\(Adam\(...\), ...\)`.*amsgrad=True.*Write `amsgrad=False`"):
        from_torch(torch.optim.Adam(model.parameters(), amsgrad=True), params(model))
    with pytest.raises(ValueError, match=r"group 0 has a tensor of shape \[\] that is not a parameter.*Build"):
        from_torch(torch.optim.SGD(net().parameters(), lr=0.1), params(model))
    used = adafactor(model.parameters())
    follow(used, tfn.optim.scale(0.0), model, steps=1)
    with pytest.raises(ValueError, match=r"Adafactor.*are not carried over. Pass a new optimizer"):
        from_torch(used, params(model))
    partly = torch.optim.Adam(model.parameters())
    model.zero_grad()
    model.scale.grad = torch.ones(())
    partly.step()
    with pytest.raises(ValueError, match=r"a state for 1 of its parameters and none for '(fc|ln|final)"):
        from_torch(partly, params(model))
    model.fc.weight.grad = torch.ones(4, 3)
    odd = torch.optim.Adam([model.scale, model.fc.weight])
    odd.step()
    odd.state[model.scale]["step"] += 1
    with pytest.raises(ValueError, match=r"different numbers of steps, \[1, 2\]"):
        from_torch(odd, params(model))


def test_clip_comes_first():
    args = arguments(optim="sgd", max_grad_norm=1.0)
    params = {"w": torch.zeros(2)}
    rule = make_optimizer(args, params, lambda count: torch.tensor(1.0))
    updates, _ = rule.update({"w": torch.tensor([3.0, 4.0])}, rule.init(params), params)
    torch.testing.assert_close(updates["w"], torch.tensor([-0.6, -0.8]), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------- schedules

STEPS = 40
SCHEDULES = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-4, "power": 2.0}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 5}),
    ("cosine_with_min_lr", {"min_lr": 1e-4}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.0}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-4, "warmup_lr_rate": 0.2}),
    ("warmup_stable_decay", {"num_decay_steps": 10}),
    ("warmup_stable_decay", {"num_decay_steps": 10, "num_stable_steps": 5, "min_lr_ratio": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 10, "warmup_type": "cosine", "decay_type": "1-sqrt"}),
]


def used_by_transformers(name, warmup, kwargs, steps=STEPS):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    used = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = get_scheduler(name, optimizer, warmup, steps, kwargs)
        for _ in range(steps):
            used.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    return used


@pytest.mark.parametrize("warmup", [0, 7, 0.11, 100])
@pytest.mark.parametrize(("name", "kwargs"), SCHEDULES, ids=str)
def test_the_rate_of_each_step_is_that_of_transformers(name, kwargs, warmup):
    args = arguments(learning_rate=1e-3, lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=warmup)
    steps = math.ceil(0.11 * STEPS) if warmup == 0.11 else warmup
    if name == "warmup_stable_decay" and warmup == 100 and "num_stable_steps" not in kwargs:
        with pytest.raises(ValueError, match="have to fit into the total"):
            make_schedule(args, STEPS)
        return
    made = make_schedule(args, STEPS)
    assert made.controller is None
    here = [made.schedule(torch.tensor(n)).item() for n in range(STEPS)]
    assert here == pytest.approx(used_by_transformers(name, steps, kwargs), rel=1e-6, abs=1e-11)


def test_every_name_is_there():
    tested = {name for name, _ in SCHEDULES} | {"reduce_lr_on_plateau", "greedy"}
    assert tested == {name.value for name in transformers.SchedulerType}


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_rates_that_follow_a_metric(name, mode):
    args = arguments(
        learning_rate=0.1,
        lr_scheduler_type=name,
        lr_scheduler_kwargs='{"patience": 1, "factor": 0.5}',
        eval_strategy="epoch",
        metric_for_best_model="loss" if mode == "min" else "accuracy",
    )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    theirs = get_scheduler(name, optimizer, scheduler_specific_kwargs={"patience": 1, "factor": 0.5, "mode": mode})
    rate, control = make_schedule(args, 10)
    assert rate == 0.1
    state = control.init()
    for metric in (3.0, 2.0, 2.0, 2.0, 2.5, 1.0, 0.5, 4.0):
        state = control.update(metric, state)
        theirs.step(metric)
        assert state.learning_rate.item() == pytest.approx(optimizer.param_groups[0]["lr"])


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
        ("cosine_with_min_lr", {}, "needs exactly one of the two"),
    ],
)
def test_options_of_schedules_that_cannot_be(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(arguments(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs), 10)


LR = torch.optim.lr_scheduler
SCHEDULERS = {
    "lambda": lambda o: LR.LambdaLR(o, [lambda n: 0.9**n, lambda n: 1.0]),
    "multiplicative": lambda o: LR.MultiplicativeLR(o, lambda n: 0.9),
    "step": lambda o: LR.StepLR(o, 3),
    "one cycle": lambda o: LR.OneCycleLR(o, max_lr=[1.0, 0.1], total_steps=21, cycle_momentum=False),
    "sequence": lambda o: LR.SequentialLR(o, [LR.ConstantLR(o, 0.1, 4), LR.ExponentialLR(o, 0.9)], [4]),
    "chain": lambda o: LR.ChainedScheduler([LR.ConstantLR(o, 0.1, 4), LR.ExponentialLR(o, 0.9)], o),
    "transformers": lambda o: get_scheduler("cosine", o, 5, 20),
}


@pytest.mark.filterwarnings("ignore:.*epoch parameter:UserWarning")  # torch's SequentialLR, of itself
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_torch_scheduler_becomes_a_table(name):
    parameters = [torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)]
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.5}], lr=1.0)
    scheduler = SCHEDULERS[name](optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    rates = from_lambda_lr(scheduler, 20)
    assert optimizer.state_dict() == before
    for n in range(20):
        here = [rate(torch.tensor(n)).item() for rate in rates]
        assert here == pytest.approx([group["lr"] for group in optimizer.param_groups], rel=1e-6)
        optimizer.step()
        scheduler.step()
    assert rates[0](torch.tensor(99)) == rates[0](torch.tensor(20))


def test_a_table_is_part_of_a_compiled_step():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    (rate,) = from_lambda_lr(LR.LambdaLR(optimizer, lambda n: 0.5**n), 3)
    compiled = torch.compile(rate, backend="aot_eager", fullgraph=True)
    assert [compiled(torch.tensor(n)).item() for n in range(4)] == [1.0, 0.5, 0.25, 0.125]


def test_schedulers_that_cannot_be_a_table():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau\(...\)\)`.*Write `TrainingArguments\(lr_scheduler_type="):
        from_lambda_lr(LR.ReduceLROnPlateau(optimizer), 10)
    with pytest.raises(ValueError, match=r"OneCycleLR.*changes the momentum.*Write `cycle_momentum=False`"):
        from_lambda_lr(LR.OneCycleLR(optimizer, max_lr=1.0, total_steps=10), 8)
