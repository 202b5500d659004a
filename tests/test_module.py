"""From a module to a state and back: names, storage, modes, and what is refused."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import trainfn as tfn
from tests.helpers import CONV_NET, EACH_NET, GPT_NET, MIXED_NET, MLP_NET, adamw, assert_identical, seeded

pytestmark = pytest.mark.usefixtures("untouched_rng")

SGD = tfn.optim.sgd(0.5, momentum=0.9)


def pointers(tensors):
    return {name: t.data_ptr() for name, t in tensors.items()}


def tensors_of(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


# --- what a state holds -------------------------------------------------------------------------------------------


@EACH_NET
def test_a_state_holds_all_that_the_module_holds(net):
    module = net.module()
    state = tfn.init(module, SGD, seed=7)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert set(state.params) == trained
    assert set(state.buffers) == set(tensors_of(module)) - trained
    assert_identical({**state.params, **state.buffers}, {n: t.detach() for n, t in tensors_of(module).items()})
    assert state.step == 0 and state.step.dtype == torch.int64 and state.extra == {}
    assert torch.equal(state.key, tfn.random.key(7))
    assert not any(t.requires_grad for t in tfn.tree.leaves(state))
    assert state.module is module and f"TrainState({type(module).__name__}, step=0" in repr(state)


def test_tied_weights_appear_once_under_their_first_name():
    module = GPT_NET.module()
    state = tfn.init(module, SGD)
    assert "tok.weight" in state.params and "head.weight" not in state.params
    gradients = tfn.value_and_grad(GPT_NET.loss)(tfn.init(GPT_NET.module(0.0), SGD), GPT_NET.batch(4))
    twin = GPT_NET.module(0.0)
    twin.train()
    batch = GPT_NET.batch(4)
    loss = tfn.losses.cross_entropy(twin(batch["x"]), batch["y"]).total
    loss.backward()
    torch.testing.assert_close(gradients.grads["tok.weight"], twin.tok.weight.grad, rtol=1e-6, atol=1e-6)


def test_tied_buffers_and_modules_appear_once():
    module = nn.Module()
    module.a = module.b = seeded(lambda: nn.Linear(2, 2))
    module.register_buffer("x", torch.zeros(3))
    module.register_buffer("y", module.x)
    state = tfn.init(module, SGD)
    assert set(state.params) == {"a.weight", "a.bias"} and set(state.buffers) == {"x"}


def test_what_does_not_learn_has_no_gradient_and_no_optimizer_state():
    net = MIXED_NET
    optimizer = adamw()
    state = tfn.init(net.module(), optimizer)
    assert {"embed.weight", "shift", "order", "calls"} == set(state.buffers)
    assert "absent" not in {**state.params, **state.buffers}
    names = tfn.tree.named_leaves(state.opt_state)
    assert not any("embed" in name or "shift" in name for name in names)
    assert any(name.endswith("unused") for name in names)
    gradients = tfn.value_and_grad(net.loss)(state, net.batch(4))
    assert gradients.grads["unused"] is None and set(gradients.grads) == set(state.params)
    new, _ = tfn.train_step(net.loss, optimizer)(state, net.batch(4))
    for name in ("embed.weight", "shift"):
        assert new.buffers[name] is state.buffers[name]
    assert torch.equal(new.buffers["order"], state.buffers["order"])
    assert new.buffers["calls"] == 1
    for name, p in new.params.items():
        assert (p.dtype, p.shape) == (state.params[name].dtype, state.params[name].shape), name


def test_a_dict_of_tensors_is_a_model():
    params = {"w": torch.ones(2)}
    state = tfn.init(params, SGD)
    assert state.module is None and state.buffers == {} and "TrainState(functions" in repr(state)
    assert state.params["w"].data_ptr() != params["w"].data_ptr()
    seen = []
    tfn.train_step(lambda model, x: seen.append(type(model)) or tfn.Mean.of(model["w"] * x), SGD)(state, torch.ones(2))
    assert seen == [dict]
    assert tfn.init(params, SGD, storage="adopt").params["w"].data_ptr() == params["w"].data_ptr()


def test_replace_and_tree_functions_keep_the_module():
    state = tfn.init(MLP_NET.module(), SGD)
    for other in (state._replace(step=state.step + 1), tfn.copy(state), tfn.tree.map(lambda x: x, state)):
        assert type(other) is type(state) and other.module is state.module


def test_init_again_of_the_same_module_gives_the_same_type():
    module = MLP_NET.module()
    assert type(tfn.init(module, SGD)) is type(tfn.init(module, SGD, seed=1))
    assert type(tfn.init(module, SGD)) is not type(tfn.init(copy.deepcopy(module), SGD))


def test_init_sees_what_changed_in_the_module():
    """Frozen, put in eval mode or given another head after the first `init`: the second one must know."""
    net = CONV_NET
    module = net.module(0.0)
    first = tfn.init(module, SGD)
    module.norm.eval()
    module.conv.requires_grad_(False)
    module.head = seeded(lambda: nn.Linear(4, 3, bias=False))
    state = tfn.init(module, SGD)
    assert set(state.params) == {"norm.weight", "norm.bias", "head.weight"}
    new, _ = tfn.train_step(net.loss, SGD)(state, net.batch(4))
    assert_identical(new.buffers, state.buffers)  # the norm is in eval mode
    assert torch.equal(new.buffers["conv.weight"], module.conv.weight)
    assert type(first) is not type(state)


def test_a_module_is_freed_with_its_states():
    module = MLP_NET.module()
    state = tfn.init(module, SGD)
    tfn.train_step(MLP_NET.loss, SGD)(state, MLP_NET.batch(2))
    alive = weakref.ref(module)
    del module, state
    gc.collect()
    assert alive() is None


# --- modes --------------------------------------------------------------------------------------------------------


def test_a_submodule_in_eval_mode_stays_there():
    """A frozen BatchNorm: it normalizes with its running statistics, and they stay as they are."""
    net = CONV_NET
    module = net.module(0.0)
    module.norm.running_mean += 1
    module.norm.eval()
    state = tfn.init(module, SGD)
    new, metrics = tfn.train_step(net.loss, SGD)(state, net.batch(6))
    assert_identical(new.buffers, state.buffers)
    expected, _ = net.loss(module, net.batch(6))
    assert torch.equal(metrics["loss"].total, expected.total.detach())


def test_a_module_asleep_in_eval_mode_trains_all_the_same():
    """As `from_pretrained` returns it: there is no way to tell which parts were meant to sleep."""
    net = CONV_NET
    awake = tfn.train_step(net.loss, SGD)(tfn.init(net.module(), SGD), net.batch(6))
    asleep = tfn.train_step(net.loss, SGD)(tfn.init(net.module().eval(), SGD), net.batch(6))
    assert_identical(asleep, awake)


# --- storage ------------------------------------------------------------------------------------------------------


def test_copy_shares_no_memory():
    module = MIXED_NET.module()
    state = tfn.init(module, SGD)
    assert not set(pointers(tensors_of(module)).values()) & set(pointers({**state.params, **state.buffers}).values())


def test_adopt_shares_all_memory():
    module = MIXED_NET.module()
    state = tfn.init(module, SGD, storage="adopt")
    assert pointers(tensors_of(module)) == pointers({**state.params, **state.buffers})
    before = {name: t.detach().clone() for name, t in tensors_of(module).items()}
    tfn.train_step(MIXED_NET.loss, SGD)(state, MIXED_NET.batch(4))  # without donation, a step writes to no memory
    assert_identical({n: t.detach() for n, t in tensors_of(module).items()}, before)


@EACH_NET
def test_adopt_with_donation_keeps_the_module_current(net):
    module = net.module()
    state = tfn.init(module, SGD, storage="adopt")
    step = tfn.jit(tfn.train_step(net.loss, SGD), donate=True, compile=False)
    plain, twin = tfn.train_step(net.loss, SGD), tfn.init(net.module(), SGD)
    for n in range(2):
        state, _ = step(state, net.batch(4, n))
        twin, _ = plain(twin, net.batch(4, n))
        held = {name: t.detach() for name, t in tensors_of(module).items()}
        assert pointers(held) == pointers({**state.params, **state.buffers})
        assert_identical(held, {**twin.params, **twin.buffers})


@EACH_NET
def test_move_empties_the_module_and_export_brings_it_back(net):
    module, twin = net.module(), net.module()
    before = pointers(tensors_of(module))
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    state = tfn.init(module, SGD, storage="move")
    assert pointers({**state.params, **state.buffers}) == before
    assert all(t.is_meta for t in tensors_of(module).values())
    step = tfn.train_step(net.loss, SGD)
    state, _ = step(state, net.batch(4))
    expected, _ = step(tfn.init(twin, SGD), net.batch(4))
    assert_identical({**state.params, **state.buffers}, {**expected.params, **expected.buffers})
    assert all(t.is_meta for t in tensors_of(module).values())
    assert tfn.export(state) is module
    tfn.export(expected)
    assert_identical(
        {n: t.detach() for n, t in tensors_of(module).items()}, {n: t.detach() for n, t in tensors_of(twin).items()}
    )
    assert {name: p.requires_grad for name, p in module.named_parameters()} == flags
    assert all(p.is_leaf for p in module.parameters())
    if net is GPT_NET:
        assert module.head.weight is module.tok.weight


# --- export -------------------------------------------------------------------------------------------------------


@EACH_NET
def test_export_writes_into_the_module_in_place(net):
    module = net.module()
    before = pointers(tensors_of(module))
    state, _ = tfn.train_step(net.loss, SGD)(tfn.init(module, SGD), net.batch(4))
    assert tfn.export(state) is module
    assert pointers(tensors_of(module)) == before
    assert_identical({n: t.detach() for n, t in tensors_of(module).items()}, {**state.params, **state.buffers})
    other = net.module()
    assert tfn.export(state, other) is other
    assert_identical(dict(other.state_dict()), dict(module.state_dict()))


def test_export_names_what_does_not_fit():
    state = tfn.init(seeded(lambda: nn.Linear(2, 3)), SGD)
    with pytest.raises(ValueError, match=r"weight: \[3, 2\] in the state, \[4, 2\] in the module"):
        tfn.export(state, seeded(lambda: nn.Linear(2, 4)))
    with pytest.raises(ValueError, match="bias: not in the module"):
        tfn.export(state, seeded(lambda: nn.Linear(2, 3, bias=False)))
    with pytest.raises(ValueError, match=r"0\.weight: not in the state"):
        tfn.export(state, seeded(lambda: nn.Sequential(nn.Linear(2, 3))))
    with pytest.raises(ValueError, match=r"made from a dict of tensors; `state\.params` is that dict"):
        tfn.export(tfn.init({"w": torch.ones(1)}, SGD))


# --- what is refused ----------------------------------------------------------------------------------------------


def test_init_refuses_what_it_cannot_train():
    module = MLP_NET.module()
    with pytest.raises(TypeError, match=r"got a torch\.compile'd module.*`model\._orig_mod`"):
        tfn.init(torch.compile(module, backend="eager"), SGD)
    with pytest.raises(TypeError, match=r"takes an nn\.Module or a dict of tensors, not list"):
        tfn.init([torch.ones(1)], SGD)
    with pytest.raises(TypeError, match=r"takes a transform such as `tfn\.optim\.adamw\(1e-3\)`, not SGD"):
        tfn.init(module, torch.optim.SGD(module.parameters()))
    with pytest.raises(ValueError, match=r"storage='share'\): choose 'copy', 'adopt' or 'move'"):
        tfn.init(module, SGD, storage="share")
    with pytest.raises(ValueError, match=r"storage='move'\) empties a module.*Use 'adopt'"):
        tfn.init({"w": torch.ones(1)}, SGD, storage="move")
    with pytest.raises(ValueError, match=r"no parameter of this model can be trained.*requires_grad_\(True\)"):
        tfn.init(module.requires_grad_(False), SGD)
    with pytest.raises(ValueError, match=r"'0\.weight' of a lazy module has no shape yet.*model\(batch\)"):
        tfn.init(nn.Sequential(nn.LazyLinear(3)), SGD)
