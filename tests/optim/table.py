"""The table of optimizers: name, ours, and what it has to equal."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers.optimization import Adafactor

from trainfn import optim

LR = 0.01


class Reference(torch.optim.Optimizer):
    """An optimizer written down a second time, leaf by leaf, for rules that torch doesn't have."""

    def __init__(self, params, rule):
        super().__init__(params, {})
        self.rule, self.t = rule, 0

    @torch.no_grad()
    def step(self):
        self.t += 1
        for p in self.param_groups[0]["params"]:
            self.rule(p, self.state[p], self.t)


def lion_rule(p, state, t, b1=0.9, b2=0.99, weight_decay=0.1):
    m = state.get("m", torch.zeros_like(p))
    p.mul_(1 - LR * weight_decay)
    p.sub_(LR * torch.sign(b1 * m + (1 - b1) * p.grad))
    state["m"] = b2 * m + (1 - b2) * p.grad


def lookahead_rule(p, state, t, period=3, alpha=0.5):
    slow = state.setdefault("slow", p.clone())
    p.sub_(LR * p.grad)
    if t % period == 0:
        slow.add_(p - slow, alpha=alpha)
        p.copy_(slow)


def ema_rule(p, state, t, decay=0.8):
    state["ema"] = decay * state.get("ema", torch.zeros_like(p)) + (1 - decay) * p.grad
    p.sub_(LR * state["ema"] / (1 - decay**t))


def projected(p, state, t, rule, rank=2, gap=7, scale=0.25, kind="std"):
    """GaLore: call ``rule(low-rank gradient)`` for what is projected back; other tensors as they are."""
    if p.dim() != 2:
        return rule(p.grad)
    rows, columns = p.shape
    tall = {"std": rows >= columns, "reverse_std": rows < columns, "right": True, "left": False}.get(kind)
    if (t - 1) % gap == 0:
        u, _, vh = torch.linalg.svd(p.grad, full_matrices=False)
        state["left"], state["right"] = u[:, :rank].clone(), vh[:rank].clone()
    left = torch.eye(rows).to(p) if tall is True else state["left"]
    right = torch.eye(columns).to(p) if tall is False else state["right"]
    return scale * (left @ rule(left.T @ p.grad @ right.T) @ right)


def galore_adamw_rule(weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-6, **options):
    def rule(p, state, t):
        def adam(g):
            state["m"] = b1 * state.get("m", torch.zeros_like(g)) + (1 - b1) * g
            state["v"] = b2 * state.get("v", torch.zeros_like(g)) + (1 - b2) * g * g
            return state["m"] / (state["v"].sqrt() + eps) * (math.sqrt(1 - b2**t) / (1 - b1**t))

        p.sub_(LR * projected(p, state, t, adam, **options))
        p.mul_(1 - LR * weight_decay)

    return lambda params: Reference(params, rule)


def factored(g, state, t, decay_rate=-0.8):
    b2, square = 1 - t**decay_rate, g * g + 1e-30
    if g.dim() < 2:
        state["v"] = b2 * state.get("v", 0) + (1 - b2) * square
        update = g / state["v"].sqrt()
    else:
        state["r"] = b2 * state.get("r", 0) + (1 - b2) * square.mean(-1)
        state["c"] = b2 * state.get("c", 0) + (1 - b2) * square.mean(-2)
        row = state["r"] / state["r"].mean(-1, keepdim=True)
        update = g / (row.unsqueeze(-1) * state["c"].unsqueeze(-2)).sqrt()
    return update / max(1.0, float(update.norm()) / update.numel() ** 0.5)


def galore_adafactor_rule(p, state, t, weight_decay=0.1):
    step = projected(p, state, t, lambda g: factored(g, state, t))
    p.sub_(LR * (step + weight_decay * p))


def lomo_rule(p, state, t, weight_decay=0.1):
    p.mul_(1 - LR * weight_decay).sub_(LR * p.grad)


def adalomo_rule(p, state, t, weight_decay=0.1):
    rate = LR * max(1e-3, float(p.norm()) / math.sqrt(p.numel()))
    step = factored(p.grad, state, t)
    p.mul_(1 - rate * weight_decay).sub_(rate * step)


class Pair:
    """Two torch optimizers that share the parameters, as one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()


def torch_muon(params, adjust="match_rms_adamw", nesterov=True):
    params = list(params)
    matrices = torch.optim.Muon(
        [p for p in params if p.dim() == 2], LR, weight_decay=0.1, adjust_lr_fn=adjust, nesterov=nesterov
    )
    return Pair(matrices, torch.optim.AdamW([p for p in params if p.dim() != 2], LR, weight_decay=0.1))


def clipped(make):
    """The reference after `clip_grad_norm_`."""

    def build(params):
        params = list(params)
        optimizer = make(params)
        step = optimizer.step

        def clipped_step():
            nn.utils.clip_grad_norm_(params, 0.05)
            step()

        optimizer.step = clipped_step
        return optimizer

    return build


def cosine(count):
    return LR * 0.5 * (1 + torch.cos(math.pi * count / 100))


class Scheduled:
    """A torch optimizer under the schedule `cosine`."""

    def __init__(self, optimizer):
        self.optimizer, self.n = optimizer, 0

    def step(self):
        for group in self.optimizer.param_groups:
            group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * self.n / 100))
        self.optimizer.step()
        self.n += 1


def hf_adafactor(**options):
    options = {"scale_parameter": False, "relative_step": False, **options}
    return lambda params: Adafactor(params, **options)


t = torch.optim
OPTIMIZERS = [
    ("sgd", optim.sgd(LR), lambda p: t.SGD(p, LR)),
    ("sgd momentum", optim.sgd(LR, momentum=0.9), lambda p: t.SGD(p, LR, momentum=0.9)),
    (
        "sgd nesterov",
        optim.sgd(LR, momentum=0.9, nesterov=True),
        lambda p: t.SGD(p, LR, momentum=0.9, nesterov=True),
    ),
    (
        "sgd dampening, L2",
        optim.chain(optim.add_decayed_weights(0.1), optim.sgd(LR, momentum=0.9, dampening=0.3)),
        lambda p: t.SGD(p, LR, momentum=0.9, dampening=0.3, weight_decay=0.1),
    ),
    ("adam", optim.adam(LR, 0.8, 0.95), lambda p: t.Adam(p, LR, (0.8, 0.95))),
    (
        "adam L2",
        optim.chain(optim.add_decayed_weights(0.1), optim.adam(LR)),
        lambda p: t.Adam(p, LR, weight_decay=0.1),
    ),
    ("adamw", optim.adamw(LR, weight_decay=0.1), lambda p: t.AdamW(p, LR, weight_decay=0.1)),
    (
        "adamw clipped",
        optim.chain(optim.clip_by_global_norm(0.05), optim.adamw(LR)),
        clipped(lambda p: t.AdamW(p, LR)),
    ),
    ("adamw scheduled", optim.adamw(cosine), lambda p: Scheduled(t.AdamW(p, LR))),
    ("adamw masked", optim.masked(optim.adamw(LR), lambda name, p: True), lambda p: t.AdamW(p, LR)),
    (
        "adamw without decay of norms and biases",
        optim.adamw(LR, weight_decay=0.1, mask=optim.decay_mask),
        lambda p: t.AdamW([{"params": [x], "weight_decay": 0.1 if x.dim() >= 2 else 0.0} for x in p], LR),
    ),
    ("lion", optim.lion(LR, weight_decay=0.1), lambda p: Reference(p, lion_rule)),
    ("rmsprop", optim.rmsprop(LR), lambda p: t.RMSprop(p, LR)),
    (
        "rmsprop centered, momentum",
        optim.rmsprop(LR, 0.9, centered=True, momentum=0.5),
        lambda p: t.RMSprop(p, LR, 0.9, centered=True, momentum=0.5),
    ),
    ("adagrad", optim.adagrad(LR, initial=0.1), lambda p: t.Adagrad(p, LR, initial_accumulator_value=0.1)),
    ("adafactor as in HF's Trainer", optim.adafactor(LR, scale_parameter=False), hf_adafactor(lr=LR)),
    (
        "adafactor relative",
        optim.adafactor(),
        hf_adafactor(scale_parameter=True, relative_step=True),
    ),
    (
        "adafactor relative, warm-up, b1, decay",
        optim.adafactor(warmup_init=True, b1=0.9, weight_decay=0.1),
        hf_adafactor(scale_parameter=True, relative_step=True, warmup_init=True, beta1=0.9, weight_decay=0.1),
    ),
    (
        "adafactor scale, b1, decay",
        optim.adafactor(LR, b1=0.9, weight_decay=0.1, decay_rate=-0.5, clip_threshold=0.7),
        hf_adafactor(lr=LR, scale_parameter=True, beta1=0.9, weight_decay=0.1, decay_rate=-0.5, clip_threshold=0.7),
    ),
    ("muon", optim.muon(LR), torch_muon),
    (
        "muon original, no nesterov",
        optim.muon(LR, adjust="original", nesterov=False),
        lambda p: torch_muon(p, "original", nesterov=False),
    ),
    ("galore adamw", optim.galore_adamw(LR, rank=2, update_proj_gap=7), galore_adamw_rule()),
    (
        "galore adamw, both sides, decay",
        optim.galore_adamw(LR, 0.8, 0.95, 1e-4, weight_decay=0.1, rank=2, update_proj_gap=7, proj_type="full"),
        galore_adamw_rule(0.1, 0.8, 0.95, 1e-4, kind="full"),
    ),
    (
        "galore adamw, long sides",
        optim.galore_adamw(LR, rank=2, update_proj_gap=7, proj_type="reverse_std", scale=1.0),
        galore_adamw_rule(kind="reverse_std", scale=1.0),
    ),
    (
        "galore adafactor",
        optim.galore_adafactor(LR, rank=2, update_proj_gap=7, weight_decay=0.1),
        lambda p: Reference(p, galore_adafactor_rule),
    ),
    ("lomo", optim.lomo(LR, weight_decay=0.1), lambda p: Reference(p, lomo_rule)),
    ("lomo clipped", optim.lomo(LR, clip_grad_norm=0.05), clipped(lambda p: t.SGD(p, LR))),
    ("adalomo", optim.adalomo(LR, weight_decay=0.1), lambda p: Reference(p, adalomo_rule)),
    ("lookahead", optim.lookahead(optim.sgd(LR), 3), lambda p: Reference(p, lookahead_rule)),
    ("ema", optim.chain(optim.ema(0.8), optim.sgd(LR)), lambda p: Reference(p, ema_rule)),
    (
        "partition",
        optim.partition({"a": optim.adamw(LR), "s": optim.sgd(LR)}, [("bias$", "s")], default="a"),
        lambda p: Pair(*_by_bias(list(p))),
    ),
    (
        "partition, a part frozen",
        optim.chain(
            optim.clip_by_global_norm(0.05),
            optim.partition({"a": optim.adamw(LR), "f": optim.freeze()}, [("bias$", "f")], default="a"),
        ),
        lambda p: _trained_part(list(p)),
    ),
]


def _trained_part(params):
    # torch's way to freeze: the optimizer and the clip never see the parameters
    some = [p for i, p in enumerate(params) if i not in (3, 5, 7)]
    return clipped(lambda p: t.AdamW(p, LR))(some)


def _by_bias(params):
    # Net's parameters in order: temperature, embed, fc1.weight, fc1.bias, ln.weight, ln.bias, conv.weight, conv.bias
    biases = {3, 5, 7}
    return (
        t.AdamW([p for i, p in enumerate(params) if i not in biases], LR),
        t.SGD([p for i, p in enumerate(params) if i in biases], LR),
    )


class Net(nn.Module):
    """Weights of every kind of shape: a scalar, vectors, wide and tall matrices, a convolution."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.table = nn.Parameter(torch.randn(7, 3) * 0.3)
        self.fc1 = nn.Linear(3, 8)
        self.ln = nn.LayerNorm(8)
        self.conv = nn.Conv1d(2, 3, 2)

    def forward(self, index):
        x = self.ln(torch.tanh(self.fc1(self.table[index])))
        return self.conv(x.reshape(-1, 2, 4)).flatten(1).sum(1) * self.temperature


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def train_reference(make, num_steps, dtype=torch.float32):
    """Train `Net` with a torch optimizer; the parameters and gradients of each step."""
    model = net(dtype)
    index = torch.arange(64) % 7
    target = torch.sin(index.to(dtype))
    optimizer, history = make(model.parameters()), []
    for _ in range(num_steps):
        model.zero_grad()
        ((model(index) - target) ** 2).mean().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        history.append((grads, {name: p.detach().clone() for name, p in model.named_parameters()}))
    return history
