"""States to save, and what they are compared by."""

import torch
from torch import nn

import trainfn as tfn


class Odd(nn.Module):
    """Tied weights, buffers, a frozen and an integer parameter, mixed dtypes, a channels-last weight."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.low = nn.Linear(4, 2).to(torch.bfloat16)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.table = nn.Parameter(torch.arange(3), requires_grad=False)
        self.conv = nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last)
        self.register_buffer("positions", torch.arange(4), persistent=False)

    def forward(self, x):
        return self.low(self.norm(self.b(self.a(x))).to(torch.bfloat16)).float()


def loss(model, x):
    return tfn.losses.mse(model(x), torch.zeros(len(x), 2))


OPTIMIZERS = {
    "sgd": tfn.optim.sgd(0.1),
    "adamw": tfn.optim.chain(tfn.optim.clip_by_global_norm(1.0), tfn.optim.adamw(1e-2)),
    "adafactor": tfn.optim.adafactor(1e-2),
    "lion": tfn.optim.lion(1e-3),
    "muon": tfn.optim.muon(1e-3),
    "partition": tfn.optim.partition(
        {"m": tfn.optim.sgd(0.1, momentum=0.9), "r": tfn.optim.adam(1e-2)}, [("weight", "m"), (".", "r")]
    ),
    "injected": tfn.optim.inject_hyperparams(tfn.optim.adam)(learning_rate=1e-2),
}


def trained(name, model=None, steps=2):
    torch.manual_seed(0)
    optimizer = OPTIMIZERS[name]
    average = tfn.transforms.ema(0.9)
    state = average.init(tfn.init(model or Odd(), optimizer, seed=3))
    step = average(tfn.train_step(loss, optimizer))
    for _ in range(steps):
        state, _ = step(state, torch.randn(5, 4))
    return state, step


def small(n=0, **params):
    """A state of a few numbers, at step ``n``."""
    params = params or {"w": torch.full((3,), float(n)), "b": torch.ones(2) * n}
    state = tfn.init(params, tfn.optim.sgd(0.1, momentum=0.9), storage="adopt")
    return state._replace(step=torch.tensor(n))


def bits(tensor):
    """What is in a tensor, to the bit: also a NaN is equal to itself."""
    plain = tensor.detach().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), plain.view(torch.uint8).numpy().tobytes()


def assert_same(a, b):
    left, right = tfn.tree.named_leaves(a), tfn.tree.named_leaves(b)
    assert list(left) == list(right)
    for name, leaf in left.items():
        assert leaf.stride() == right[name].stride(), name
        assert bits(leaf) == bits(right[name]), name


def same(a, b):
    left, right = tfn.tree.named_leaves(a), tfn.tree.named_leaves(b)
    return left.keys() == right.keys() and all(bits(left[name]) == bits(right[name]) for name in left)
