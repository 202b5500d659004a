"""Draws whose rows are not in dimension 0: the same update for every split, or a warning that says what to write."""

import warnings

import pytest
import torch
from torch import nn

import trainfn as tfn

ROWS = 8


class TimeMajor(nn.Module):
    """Batches of ``[rows, time, width]`` through a part that takes ``[time, rows, width]``."""

    def __init__(self, inner, at=None):
        super().__init__()
        self.inner, self.at = inner, at

    def forward(self, x):
        x = x.transpose(0, 1)
        if self.at is None:
            return self.inner(x)
        with tfn.random.rows_at(self.at):
            return self.inner(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.drop = nn.GRU(4, 4), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.cells(x)[0])


def encoder(first=False):
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=first)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


class Attending(nn.Module):
    """Attention that returns its weights draws in another way."""

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, dropout=0.5)

    def forward(self, x):
        out, weights = self.attend(x, x, x, need_weights=True)
        return out + weights.square().sum((1, 2))[:, None]


INNER = {"recurrent": Recurrent, "encoder": encoder, "attention": Attending}


def update(model, accumulate, time, wrap=lambda step: step):
    optimizer = tfn.optim.sgd(0.1)
    x = torch.randn(ROWS, time, 4, generator=torch.Generator().manual_seed(0))
    step = tfn.train_step(lambda m, x: tfn.Mean.of(m(x) ** 2, torch.ones(())), optimizer, accumulate=accumulate)
    return wrap(step)(tfn.init(model, optimizer), x)[0].params


def made(name, at=None):
    torch.manual_seed(0)
    return TimeMajor(INNER[name](), at)


@pytest.mark.parametrize("time", [3, ROWS])
@pytest.mark.parametrize("name", ["recurrent", "encoder"])
def test_rows_elsewhere_are_named_where_a_batch_is_split(name, time):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update(made(name), 1, time)  # not split: nothing depends on it
    with pytest.warns(tfn.errors.SplitWarning, match=r"4 rows in dimension 1.*batch_first=True.*rows_at\(1\)"):
        update(made(name), 2, time)


@pytest.mark.parametrize("time", [3, ROWS])
@pytest.mark.parametrize("name", INNER)
def test_rows_that_are_said_give_one_update_for_every_split(name, time):
    whole = update(made(name, at=1), 1, time)
    for accumulate in (2, 4, 8, "compiled"):
        if accumulate == "compiled":
            parts = update(made(name, at=1), 2, time, lambda step: tfn.jit(step, backend="eager"))
        else:
            parts = update(made(name, at=1), accumulate, time)
        for key, p in whole.items():
            torch.testing.assert_close(parts[key], p, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("time", [3, ROWS])
def test_layers_that_have_rows_first_are_not_warned_of(time):
    torch.manual_seed(0)
    inner = encoder(first=True)
    model = nn.Sequential(inner, nn.Dropout(0.5))
    whole, parts = update(model, 1, time), update(model, 2, time)
    for key, p in whole.items():
        torch.testing.assert_close(parts[key], p, atol=1e-6, rtol=1e-5)


def test_a_draw_without_rows_is_one_for_all_micro_batches():
    class DropConnect(nn.Linear):
        def forward(self, x):
            with tfn.random.rows_at(None):
                return nn.functional.linear(x, nn.functional.dropout(self.weight, 0.5), self.bias)

    torch.manual_seed(0)
    model = DropConnect(4, 5)
    whole, parts = update(model, 1, 3), update(model, 4, 3)
    for key, p in whole.items():
        torch.testing.assert_close(parts[key], p, atol=1e-6, rtol=1e-5)


def test_a_dimension_is_counted_from_the_front():
    with pytest.raises(ValueError, match=r"rows_at\(-1\): count the dimension from the front"), tfn.random.rows_at(-1):
        pass
