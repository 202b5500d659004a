"""A captured graph is cut where it repeats itself: equal parts are compiled once, and every bit stays."""

import gc
import operator
import random
import weakref

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from trainfn._compile import _blocks
from trainfn._compile._atoms import check
from trainfn._compile._blocks import compile_pieces, cut
from trainfn._compile._inductor import compile_graph
from trainfn._compile._repeats import repeats

DEPTH, WIDTH = 8, 8


def capture(f, *leaves, mode="fake"):
    with torch.autograd.set_multithreading_enabled(False), torch.no_grad():
        return make_fx(f, tracing_mode=mode)(*leaves)


def step(*leaves):
    """One step of an MLP: forward, backward, clipping, Adam without bias correction; the state is overwritten."""
    x, y, *state = leaves
    params, means, squares = (list(state[i::3]) for i in range(3))
    tracked = [p.detach().requires_grad_() for p in params]
    with torch.enable_grad():
        h = x
        for w, b in zip(tracked[::2], tracked[1::2], strict=True):
            h = h + torch.nn.functional.gelu(torch.nn.functional.layer_norm(h, (WIDTH,)) @ w.t() + b)
        loss = (h - y).square().mean()
        grads = list(torch.autograd.grad(loss, tracked))
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    grads = torch._foreach_mul(grads, (1 / (norm + 1e-6)).clamp(max=1.0))
    new_means = torch._foreach_lerp(means, grads, 0.1)
    new_squares = torch._foreach_add(torch._foreach_mul(squares, 0.99), torch._foreach_mul(grads, grads), alpha=0.01)
    root = torch._foreach_sqrt(new_squares)
    torch._foreach_add_(root, 1e-2)
    steps = torch._foreach_div(new_means, root)
    new = torch._foreach_add(torch._foreach_mul(params, 0.999), steps, alpha=-0.01)
    for olds, news in ((params, new), (means, new_means), (squares, new_squares)):
        for old, fresh in zip(olds, news, strict=True):
            old.copy_(fresh)
    return [loss, norm]


def leaves():
    torch.manual_seed(0)
    state = []
    for i in range(2 * DEPTH):
        shape = (WIDTH,) if i % 2 else (WIDTH, WIDTH)
        state += [torch.randn(shape), torch.zeros(shape), torch.zeros(shape)]
    return [torch.randn(4, WIDTH), torch.randn(4, WIDTH), *state]


def run(f, args, times=2):
    """Everything a function gives or changes."""
    args, out = [a.clone() for a in args], []
    with torch.no_grad():
        for _ in range(times):
            out += [o.clone() for o in f(*args) if o is not None]
    return args + out


def same(a, b):
    return len(a) == len(b) and all(torch.allclose(x, y, 0, 0, equal_nan=True) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def graph():
    return capture(step, *leaves())


@pytest.fixture
def eager(monkeypatch):
    """Cut even where little repeats."""
    monkeypatch.setattr(_blocks, "_LEAST_SAVED", 2)
    monkeypatch.setattr(_blocks, "_LEAST_SHARE", 0.0)
    monkeypatch.setattr("trainfn._compile._repeats._CALL", 0)


def interpreted(module, _):
    return lambda args: module(*args)


def calls(outer):
    names = [node.target for node in outer.graph.nodes if node.op == "call_module"]
    return {name: names.count(name) for name in names}


def test_every_layer_is_one_piece_and_every_bit_stays(graph, eager):
    outer = cut(graph)
    counts = sorted(calls(outer).values())
    # Forward, backward and update; of one of the layers, the first or the last, a part may lie in another piece.
    assert len([n for n in counts if n >= DEPTH - 1]) == 3, counts
    sizes = [len(getattr(outer, name).graph.nodes) for name in calls(outer)]
    assert sum(sizes) < 0.6 * len(graph.graph.nodes)
    expected = run(step, leaves())
    assert same(run(graph, leaves()), expected)
    assert same(run(outer, leaves()), expected)
    assert same(run(compile_pieces(graph, interpreted), leaves()), expected)


def test_lists_elsewhere_stay_whole(eager):
    """For a GPU inductor makes one kernel of a list; "meta" stands for it."""
    graph = capture(step, *[leaf.to("meta") for leaf in leaves()])
    outer = cut(graph)
    assert len([n for n in calls(outer).values() if n >= DEPTH - 1]) == 2, calls(outer)
    pieces = {getattr(outer, name) for name in calls(outer)}
    lists = [str(n.target) for piece in pieces for n in piece.graph.nodes if "_foreach_" in str(n.target)]
    assert "aten._foreach_lerp.Scalar" in lists and len(lists) == 11


def test_pieces_are_compiled_once(graph):
    compiled, called = [], []

    def compiler(module, examples):
        assert [tuple(n.meta["val"].shape) for n in module.graph.nodes if n.op == "placeholder"] == [
            tuple(e.shape) for e in examples
        ]
        compiled.append(module)
        return lambda args: (called.append(module), module(*args))[1]

    run(compile_pieces(graph, compiler), leaves(), times=1)
    assert len({id(m) for m in compiled}) == len(compiled) == len(set(called)) < len(called) / 2


def test_inputs_are_let_go_of(eager):
    def f(x, w):
        for _ in range(8):
            x = torch.tanh(x @ w).sin() * 2
        return [x]

    alive = []

    def compiler(module, _):
        def call(args):
            refs, tensors = [weakref.ref(a) for a in args], list(args)
            args.clear()
            out = module(*tensors)
            del tensors
            alive.append(sum(r() is not None for r in refs))
            return out

        return call

    graph = capture(f, torch.randn(4, 4), torch.randn(4, 4))
    assert len(calls(cut(graph))) < 8 <= sum(calls(cut(graph)).values())
    gc.collect()
    with torch.no_grad():
        compile_pieces(graph, compiler)(torch.randn(4, 4), torch.randn(4, 4))
    # The weight lives until the last piece; what one piece gave another dies there.
    assert all(n <= 1 for n in alive[1:]), alive


@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: [(x @ y).sin()],  # nothing repeats
        lambda x, y: [torch.stack([x.sin() @ y for _ in range(3)]).sum()],  # little does
    ],
)
def test_small_graphs_stay_whole(f):
    graph = capture(f, torch.randn(4, 4), torch.randn(4, 4))
    assert cut(graph) is graph


def test_symbolic_graphs_stay_whole():
    graph = capture(step, *leaves(), mode="symbolic")
    assert cut(graph) is graph
    assert same(run(compile_pieces(graph, interpreted), leaves()), run(step, leaves()))


def views(x, y, z):
    """Views over the borders of parts, of inputs, of what is written later, and given back."""
    flat, rows = x.view(-1), y.unbind(0)
    for i in range(6):
        part = flat[i * 2 : i * 2 + 2]
        row = rows[i % 4].t() if i % 2 else rows[i % 4]
        z = torch.tanh(z + row).t()
        part.add_(z.flatten()[:2])
        y[0].mul_(0.5)
    return [x.t(), z, z.t(), rows[1], flat.detach(), y[0, 0] + 1]


def order(x, y):
    """Reads before and after writes, by operations on lists and on tensors."""
    xs, ys = list(x.unbind(0)), list(y.unbind(0))
    for i in range(5):
        old = torch._foreach_mul(xs, 2.0)
        torch._foreach_add_(xs, ys, alpha=0.5)
        torch._foreach_addcmul_(ys, old, xs, value=0.1)
        total = torch.stack(torch._foreach_norm(ys)).sum()
        torch._foreach_div_(ys, total + i)
        torch._foreach_copy_(xs, torch._foreach_maximum(xs, ys))
        x.clamp_(max=3.0)
    return [total, xs[0], *torch._foreach_pow(ys, 2.0)]


def twins(x, y):
    """Equal operations, with writes between, and equal outputs that must not become one tensor."""
    for _ in range(4):
        a, b = x.sin(), x.sin()
        x.add_(a @ b * 0.1)
        c = x.sin()
        g, h = y.tanh(), y.tanh()
        g.mul_(2)
        y = y + c * a - b + h - g
    d, e = y.cos(), y.cos()
    d.add_(1)
    return [d, e, y.exp(), y.exp()]


def waits(x, y):
    """What is computed from the state alone waits for whoever needs it, who waits for a number of its own."""
    xs, z = list(x.unbind(0)), y
    early = torch._foreach_sin(xs)
    for _ in range(4):
        z = torch.tanh(z @ y)
    decayed = torch._foreach_mul(xs, z.sum())
    torch._foreach_copy_(xs, torch._foreach_add(decayed, early))
    return [z, *decayed[:1]]


@pytest.mark.parametrize(
    ("f", "shapes"),
    [
        (views, [(3, 4), (4, 3, 3), (3, 3)]),
        (order, [(5, 3), (5, 3)]),
        (twins, [(3, 3), (3, 3)]),
        (waits, [(6, 3), (3, 3)]),
    ],
)
def test_views_and_writes(f, shapes, eager):
    torch.manual_seed(0)
    args = [torch.randn(shape) for shape in shapes]
    graph = capture(f, *args)
    outer = cut(graph)
    assert outer is not graph and max(calls(outer).values()) > 1
    expected = run(f, args)
    assert same(run(outer, args), expected)
    assert same(run(compile_pieces(graph, interpreted), args), expected)
    with torch.no_grad():
        ours, theirs = outer(*[a.clone() for a in args]), f(*[a.clone() for a in args])
    shared = lambda out: [[a.data_ptr() == b.data_ptr() for a in out] for b in out]  # noqa: E731
    assert shared(ours) == shared(theirs)


def program(seed):
    """A function of three matrices: one to three bodies of random operations, each done a few times."""
    draw = random.Random(seed)

    def body():
        choices = [
            lambda v, i, j: v.append(v[i] @ v[j] * 0.2),
            lambda v, i, j: v.append(torch.sin(v[i])),
            lambda v, i, j: v.append(v[i].t()),
            lambda v, i, j: v.append(v[i][1:].sum(0) + v[j]),
            lambda v, i, j: v.append(v[i].detach()),
            lambda v, i, j: v[i].mul_(0.9),
            lambda v, i, j: v[i][0].add_(v[j][1] * 0.5),
            lambda v, i, j: v[i].copy_(v[j].sum() * 0.1),
            lambda v, i, j: v.extend(torch._foreach_add([v[i], v[j]], [v[j].cos(), v[i]], alpha=2)),
            lambda v, i, j: torch._foreach_mul_([v[i], v[j]], 0.7),
            lambda v, i, j: v.extend(torch.sort(v[i], dim=0)[0].unbind(1)[:1] and [torch.sort(v[i], dim=0)[0]]),
            lambda v, i, j: v.append(v[i] * v[j].mean()),
        ]
        return [(draw.choice(choices), -draw.randint(1, 3), -draw.randint(1, 3)) for _ in range(draw.randint(2, 8))]

    bodies = [(body(), draw.randint(2, 5)) for _ in range(draw.randint(1, 3))]

    def f(*args):
        values = list(args)
        for operations, times in bodies:
            for _ in range(times):
                for operation, i, j in operations:
                    operation(values, i, j)
        return values[-4:]

    return f


@pytest.mark.parametrize("seed", range(60))
def test_random_programs(seed, eager):
    f, args = program(seed), [torch.randn(4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    graph = capture(f, *args)
    assert same(run(cut(graph), args), run(f, args))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("abcabcabcabc", [(0, 3), (3, 6), (6, 9), (9, 12)]),
        ("xabcyabczabc", [(1, 4), (5, 8), (9, 12)]),
        ("abcdefgh", None),
        ("zabcabca", [(1, 4), (4, 7)]),
    ],
)
def test_repeats(line, expected, monkeypatch):
    monkeypatch.setattr("trainfn._compile._repeats._CALL", 0)
    found = next(repeats([ord(c) for c in line], [False] * len(line), 3), None)
    assert (found and [(w.start, w.stop) for w in found]) == expected


def test_windows_begin_at_heavy_tokens(monkeypatch):
    monkeypatch.setattr("trainfn._compile._repeats._CALL", 0)
    line = "abcMdabcMdabcMdabc"
    found = next(repeats([ord(c) for c in line], [c == "M" for c in line], 3))
    assert [(w.start, w.stop) for w in found] == [(3, 8), (8, 13), (13, 18)]


def test_compiled(graph):
    from torch._inductor.async_compile import AsyncCompile

    before = AsyncCompile.cpp_pybinding, AsyncCompile.wait
    compiled = compile_graph(graph)
    assert (AsyncCompile.cpp_pybinding, AsyncCompile.wait) == before
    pairs = zip(run(compiled, leaves()), run(graph, leaves()), strict=True)
    assert max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs) < 2e-6


def test_seeds_of_attention_kernels_are_returned():
    """Else inductor would write later results of a GPU into them, which the kernels may have put on the processor."""
    from trainfn._compile._inductor import _seeds_kept

    kernel = torch.ops.aten._scaled_dot_product_efficient_attention.default
    shapes = ((2, 4), (2, 4), (), ())  # the attention, its sums, two seeds
    graph = torch.fx.Graph()
    q = graph.placeholder("q")
    call = graph.call_function(kernel, (q, q, q, None, True))
    parts = [graph.call_function(operator.getitem, (call, i)) for i in range(4)]
    for part, shape in zip(parts, shapes, strict=True):
        part.meta["val"] = torch.empty(shape)
    graph.output([parts[0]])
    module, count = _seeds_kept(torch.fx.GraphModule({}, graph))
    returned = next(iter(reversed(module.graph.nodes))).args[0]
    assert count == 1
    assert [node.args[1] for node in returned] == [0, 2, 3]


def test_numbers_among_the_results_of_an_operation_do_not_keep_a_graph_whole():
    """The attention of a GPU returns the longest lengths beside its tensors."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2)
    call = graph.call_function(torch.ops.aten._scaled_dot_product_flash_attention.default, (x, x, x))
    call.meta["val"] = (torch.empty(2), torch.empty(2), None, None, 16, 16, torch.empty(2), torch.empty(()), None)
    first = graph.call_function(operator.getitem, (call, 0))
    first.meta["val"] = torch.empty(2)
    graph.output([first])
    check(torch.fx.GraphModule({}, graph))
