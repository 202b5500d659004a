"""What a second process finds on the disk: the way from a captured graph to its pieces, without the compiler."""

import pickle

import pytest
import torch
from torch import nn

import trainfn as tfn
from tests.helpers import assert_identical
from trainfn._compile import _backend, _blocks, _inductor, _recipes


class Block(nn.Module):
    """A part that repeats, so that the graph is cut into pieces."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.second(nn.functional.gelu(self.first(x))))


def things(blocks):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(*[Block() for _ in range(blocks)], nn.Linear(8, 1))
    loss = lambda model, x: tfn.Mean.of(model(x).square())  # noqa: E731
    optimizer = tfn.optim.sgd(1e-2)
    return tfn.train_step(loss, optimizer), tfn.init(module, optimizer)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A compile cache of its own, as a first process would have it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_backend, "_PROGRAMS", type(_backend._PROGRAMS)())
    return tmp_path


def first_step(blocks):
    step, state = things(blocks)
    _backend._PROGRAMS.clear()  # as in a new process
    return tfn.jit(step)(state, torch.ones(4, 8))


def recipes(cache):
    return [file for file in (cache / "trainfn").rglob("*") if file.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [0, 4], ids=["whole", "pieces"])
def test_a_second_process_neither_cuts_nor_decomposes(cache, monkeypatch, blocks):
    expected = first_step(blocks)
    (file,) = recipes(cache)
    pieces = pickle.loads(file.read_bytes())[3]
    assert len(pieces) == 1 if blocks == 0 else len(pieces) > 1
    with monkeypatch.context() as patch:
        for module, name in ((_blocks, "cut"), (_inductor, "_decomposed"), (_inductor, "_by_the_front_door")):
            patch.setattr(module, name, lambda *_: pytest.fail("the graph was compiled again"))
        assert_identical(first_step(blocks), expected)


@pytest.mark.slow
def test_a_recipe_that_can_not_be_followed_is_made_again(cache):
    expected = first_step(0)
    (file,) = recipes(cache)
    good = file.read_bytes()
    for damaged in (b"", b"not a recipe", good[:-20]):
        file.write_bytes(damaged)
        with pytest.raises(_recipes.Absent):
            _recipes.follow(file.name)
    assert_identical(first_step(0), expected)
    _recipes.follow(file.name)

    ((key, _),) = pickle.loads(good)[3].values()
    (kept,) = cache.rglob(f"*/{key}")
    kept.rename(cache / "elsewhere")  # inductor has forgotten the piece
    with pytest.raises(_recipes.Absent):
        _recipes.follow(file.name)
    assert_identical(first_step(0), expected)


def test_a_recipe_that_can_not_be_kept_harms_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(_recipes, "_file", lambda key: tmp_path / "of" / key)
    ready = {"whole": _recipes.Piece(list, 1, "its key")}
    source = _blocks.Source("def program(*args):\n    return _run_whole(list(args))", {})
    _recipes.keep("lambda", source._replace(scope={"_value_0": lambda: 0}), ready)  # it can't be pickled
    assert not (tmp_path / "of").exists()

    def full(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(_recipes.os, "replace", full)
        _recipes.keep("full", source, ready)
    assert list((tmp_path / "of").iterdir()) == []
    _recipes.keep("good", source, ready)
    assert [file.name for file in (tmp_path / "of").iterdir()] == ["good"]


def flat(fn, *args):
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*args)
    return graph, [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]


def test_the_key_is_that_of_the_graph_and_of_the_settings():
    from torch._inductor import config

    x = torch.ones(3)
    key = _recipes.key_of(*flat(lambda x: x * 2, x))
    assert key == _recipes.key_of(*flat(lambda x: x * 2, x))
    others = [
        _recipes.key_of(*flat(lambda x: x * 3, x)),
        _recipes.key_of(*flat(lambda x: x * 2, torch.ones(4))),
        _recipes.key_of(*flat(lambda x: x * 2, x.double())),
    ]
    with config.patch(max_fusion_size=3):
        others.append(_recipes.key_of(*flat(lambda x: x * 2, x)))
    assert len({key, *others}) == 5


@torch.library.custom_op("trainfn_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x):
    return torch.empty_like(x)


def test_what_has_no_recipe():
    from torch._inductor import config
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.ones(3)
    assert _recipes.key_of(*flat(lambda x: twice(x), x)) is None  # the operation may be another one tomorrow
    constant = torch.ones(3)
    assert _recipes.key_of(*flat(lambda x: x + constant, x)) is None  # a tensor in the graph
    graph = make_fx(lambda x: x * 2, tracing_mode="symbolic")(torch.ones(3, 4))
    symbols = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    assert _recipes.key_of(graph, symbols) is None  # conditions come with symbols
    with config.patch(fx_graph_cache=False):
        assert _recipes.key_of(*flat(lambda x: x * 2, x)) is None
