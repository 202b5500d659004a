"""A small step for the tests of step files, here and in processes that import torch and trainfn alone."""

import torch
from torch import nn

import trainfn as tfn

SHIFT = torch.tensor([0.0, 1.0, 2.0])  # a constant that the loss reads from outside
BUCKETS = tfn.Buckets((4, 8), pad={"x": 0, "y": -100}, dim=0)


def things(accumulate=1):
    """A step and its first state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 3))

    def loss(model, batch):
        mean = tfn.losses.cross_entropy(model(batch["x"]) + SHIFT, batch["y"])
        return mean, {"twice": tfn.Mean(mean.total * 2, mean.weight)}

    optimizer = tfn.optim.adamw(1e-2)
    return tfn.train_step(loss, optimizer, accumulate=accumulate), tfn.init(module, optimizer, seed=3)


def batch_of(n, rows=8):
    g = torch.Generator().manual_seed(n)
    x = torch.randn(rows, 4, generator=g)
    return {"x": x, "y": x[:, :3].argmax(-1)}


def graph_hash_of(batch):
    """What the file of the donating step should say of its graph."""
    from trainfn._compile._capture import Call, capture
    from trainfn._compile._file_save import graph_hash
    from trainfn._compile._structure import flatten

    step, state = things()
    leaves, form = flatten((state, batch))
    whole = lambda s, b: step.update(s, step.gradients(s, b))  # noqa: E731
    with torch.no_grad():
        found, _ = capture(
            Call(whole, (state, batch), leaves, form, form.children[0].places(False), state.module, dynamic={})
        )
    return graph_hash(found)
