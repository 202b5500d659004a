"""More modules than `module_kinds` has, each a variation of a kind: steps equal those of torch's plain loop."""

import collections
import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import trainfn as tfn
from tests.module_kinds import ROWS, Kind, by_hand, floats, ids, squares

pytestmark = [
    pytest.mark.filterwarnings("ignore::trainfn.errors.UnreachedWarning"),
    pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),  # the inner of two checkpoints
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
]
RATE = 0.05
VARIATIONS: dict[str, Kind] = {}


def variation(name, loss=squares, batch=floats):
    """Register what makes the module."""

    def register(make):
        VARIATIONS[name] = Kind(make, loss, batch)
        return make

    return register


def layers():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))


# --- hooks --------------------------------------------------------------------------------------------------------


@variation("hook of a shared parameter")
def shared_hook():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1))
    model[2].weight = model[0].weight
    model[0].weight.register_hook(lambda g: g.clamp(-0.02, 0.02))
    return model


@variation("hook of a frozen parameter")
def frozen_hook():
    model = layers()
    model[0].weight.register_hook(lambda g: g * 0.5)
    model[0].weight.requires_grad_(False)
    return model


@variation("full backward hooks")
def backward_hooks():
    model = layers()
    model[0].register_full_backward_hook(lambda m, gi, go: None)
    model[2].register_full_backward_pre_hook(lambda m, go: (go[0] * 0.3,))
    return model


# --- parameters that are computed ---------------------------------------------------------------------------------


def normed(norm):
    return lambda: nn.Sequential(norm(nn.Linear(4, 4)), nn.Linear(4, 1))


variation("weight_norm")(normed(parametrizations.weight_norm))
variation("weight_norm by a hook")(normed(torch.nn.utils.weight_norm))
variation("spectral_norm")(normed(parametrizations.spectral_norm))
variation("spectral_norm by a hook")(normed(torch.nn.utils.spectral_norm))
variation("orthogonal")(normed(parametrizations.orthogonal))


@variation("pruned")
def pruned():
    model = layers()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


@variation("lazy")
def lazy():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 1))
    model(torch.zeros(2, 4))
    return model


@variation("tied", batch=ids)
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.out.weight = self.into.weight

    def forward(self, x):
        return self.out(self.into(x))


@variation("a straight-through estimator")
class Signs(nn.Linear):
    def __init__(self):
        super().__init__(4, 1)

    def forward(self, input):
        w = self.weight
        return F.linear(input, w + (w.sign() * 0.5 - w).detach(), self.bias)


@variation("lists and dicts of parameters")
class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.some = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(3)])
        self.named = nn.ParameterDict({"k": nn.Parameter(torch.randn(4, 1))})

    def forward(self, x):
        return sum(x * p for p in self.some) @ self.named["k"]


# --- writes in the forward pass -----------------------------------------------------------------------------------


@variation("an EMA teacher inside")
class Teacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.k = copy.deepcopy(self.q).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for a, b in zip(self.k.parameters(), self.q.parameters(), strict=True):
                a.lerp_(b, 0.1)
            for a, b in zip(self.k.buffers(), self.q.buffers(), strict=True):
                a.copy_(b)
            target = self.k(x)
        return self.q(x) - target


class Codebook(nn.Module):
    def __init__(self, *, buffer):
        super().__init__()
        self.encode, book = nn.Linear(4, 3), torch.randn(5, 3)
        if buffer:
            self.register_buffer("book", book)
        else:
            self.book = nn.Parameter(book, requires_grad=False)
        self.register_buffer("seen", torch.ones(5))

    def forward(self, x):
        z = self.encode(x)
        nearest = torch.cdist(z, self.book).argmin(1)
        with torch.no_grad():
            chosen = F.one_hot(nearest, 5).float()
            self.seen.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
            self.book.copy_(0.9 * self.book + 0.1 * (chosen.t() @ z) / (self.seen[:, None] + 1e-3))
        return z - self.book[nearest].detach()


variation("a codebook in a buffer")(lambda: Codebook(buffer=True))
variation("a codebook in a frozen parameter")(lambda: Codebook(buffer=False))


@variation("a queue")
class Queue(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(4, 3)
        self.register_buffer("queue", torch.randn(16, 3))
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        z = F.normalize(self.encode(x), dim=1)
        out = z @ self.queue.clone().t()
        with torch.no_grad():
            self.queue[(self.at + torch.arange(len(x))) % 16] = z.detach()
            self.at[0] = (self.at[0] + len(x)) % 16
        return out


class Writes(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.lin, self.head, self.write = nn.Linear(4, 4), nn.Linear(4, 1), write

    def forward(self, x):
        with torch.no_grad():
            self.write(self.lin)
        return self.head(self.lin(x))


def first_two(lin):
    lin.weight.view(-1)[:2] = 0.1
    nn.init.zeros_(lin.bias)


variation("normalized by .data")(
    lambda: Writes(lambda lin: setattr(lin.weight, "data", F.normalize(lin.weight.data, dim=1)))
)
variation("set_")(lambda: Writes(lambda lin: lin.weight.set_(lin.weight * 0.9)))
variation("a part by a view")(lambda: Writes(first_two))


# --- passes inside of passes --------------------------------------------------------------------------------------


@variation("nested reentrant checkpoints")
class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def outer(self, x):
        return checkpoint(lambda h: torch.tanh(self.b(h)), torch.tanh(self.a(x)), use_reentrant=True)

    def forward(self, x):
        x = x.clone().requires_grad_() if torch.is_grad_enabled() else x
        return self.head(checkpoint(self.outer, x, use_reentrant=True))


def functional(model, x):
    held = dict(model.named_parameters())
    return tfn.Mean.of(torch.func.functional_call(model, {**held, "0.bias": held["0.bias"] * 2}, (x,)) ** 2)


def adapted(model, x):
    """A step inside of the loss, as in MAML."""
    held = dict(model.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).pow(2).mean())(held)
    return tfn.Mean.of(torch.func.functional_call(model, {k: p - 0.1 * grads[k] for k, p in held.items()}, (x,)) ** 2)


variation("functional_call in the loss", functional)(layers)
variation("torch.func.grad in the loss", adapted)(layers)


# --- what tensors are ---------------------------------------------------------------------------------------------

variation("scale_grad_by_freq", batch=ids)(
    lambda: nn.Sequential(nn.Embedding(10, 4, scale_grad_by_freq=True), nn.Linear(4, 1))
)
variation("padding_idx", batch=ids)(lambda: nn.Sequential(nn.Embedding(10, 4, padding_idx=0), nn.Linear(4, 1)))


@variation("a Fourier layer")
class Fourier(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(3, dtype=torch.cfloat)), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(torch.fft.irfft(torch.fft.rfft(x, dim=1) * self.w, n=4, dim=1))


@variation("quantized buffers")
class Quantized(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("codes", torch.randint(-128, 127, (1, 4), dtype=torch.int8))
        self.register_buffer("shift", torch.randn(1, 4), persistent=False)

    def forward(self, x):
        return F.linear(self.lin(x) + self.shift, self.codes.float() * 0.01)


@variation("not contiguous")
def transposed():
    model = layers()
    model[0].weight = nn.Parameter(torch.randn(4, 4).t())
    return model


@variation("channels last")
class Channels(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)

    def forward(self, x):
        image = x.view(-1, 2, 2, 1).expand(-1, 2, 2, 2)
        return self.conv(image.to(memory_format=torch.channels_last)).flatten(1)


@variation("no elements, and one")
class Empty(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.none, self.one = (
            nn.Linear(4, 1),
            nn.Parameter(torch.empty(0, 4)),
            nn.Parameter(torch.tensor(1.0)),
        )

    def forward(self, x):
        return self.lin(torch.cat([x, x @ self.none.t()], 1)) * self.one


# --- batches ------------------------------------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", "x y")


@dataclasses.dataclass
class Rows:
    x: Tensor
    name: str = "a"
    nothing: Any = None


variation("a UserDict", lambda m, b: squares(m, b["x"]), lambda n: collections.UserDict(x=floats(n), none=None))(layers)
variation(
    "nested tuples with None",
    lambda m, b: squares(m, b.x["a"][0] + b.y),
    lambda n: Pair({"a": [floats(n), None]}, torch.ones(ROWS, 1)),
)(layers)
variation("a dataclass", lambda m, b: squares(m, b.x), lambda n: Rows(floats(n)))(layers)


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("name", VARIATIONS)
def test_a_variation_trains_as_in_torch(name, way):
    kind, made = VARIATIONS[name], []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(kind.make())
    module, twin = made
    before = {n: x.detach().clone() for n, x in tensors(module).items()}
    step, state = tfn.train_step(kind.loss, tfn.optim.sgd(RATE)), tfn.init(module, tfn.optim.sgd(RATE))
    step = tfn.jit(step, backend="eager") if way == "compiled" else step
    for n in range(4):
        kept = tfn.copy(state)
        new, _ = step(state, kind.batch(n))
        assert not tfn.diff(kept, state), f"step {n} changed the state that it was given"
        state = new
    by_hand(kind, twin, torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], RATE), 4)
    ours = {**state.params, **state.buffers}
    assert ours.keys() == tensors(twin).keys()
    for key, x in tensors(twin).items():
        torch.testing.assert_close(ours[key], x.detach(), atol=1e-6, rtol=1e-5, msg=lambda m, n=key: f"{n}: {m}")
    assert all(torch.equal(x, before[n]) for n, x in tensors(module).items()), "the module itself was changed"


def tensors(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
