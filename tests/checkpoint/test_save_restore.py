"""One checkpoint: what is in its files, save and restore as inverses, and errors that name the leaf."""

import json
import math
import os
import re
import warnings
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import trainfn as tfn
from tests.checkpoint.states import OPTIMIZERS, Odd, assert_same, small, trained
from trainfn._checkpoint import _format
from trainfn.errors import CheckpointError, DonatedStateError


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restore_is_the_inverse_of_save(name, tmp_path):
    state, _ = trained(name)
    tfn.save(tmp_path / "c", state)
    like = tfn.transforms.ema(0.9).init(tfn.init(Odd(), OPTIMIZERS[name]))
    restored = tfn.restore(tmp_path / "c", like=like)
    assert_same(restored, state)
    assert type(restored) is type(like)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_run_resumes_bit_for_bit(name, tmp_path):
    model = Odd()
    state, step = trained(name, model)
    tfn.save(tmp_path / "c", state)
    restored = tfn.restore(tmp_path / "c", like=state)
    x = torch.randn(5, 4)
    assert_same(step(restored, x)[0], step(state, x)[0])


def test_neither_saving_nor_restoring_draws_random_numbers(tmp_path, untouched_rng):
    state = small(3)
    tfn.save(tmp_path / "c", state)
    tfn.restore(tmp_path / "c", like=state)


# --- any tree of any tensors --------------------------------------------------------------------------------------


class Pair(NamedTuple):
    left: object
    right: object


DTYPES = [dtype for dtype in _format.DTYPES.values() if dtype != torch.float8_e8m0fnu]


@st.composite
def tensors(draw):
    """Random bits, so NaN, infinities and denormals too; and memory laid out in every way."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    size = math.prod(shape) * dtype.itemsize
    raw = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if dtype == torch.bool:
        raw = bytearray(byte & 1 for byte in raw)
    value = torch.frombuffer(raw, dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    return draw(st.sampled_from(LAYOUTS))(value)


LAYOUTS = [
    lambda t: t,
    lambda t: t.clone().permute(tuple(reversed(range(t.dim())))),
    lambda t: torch.stack([t, t], -1)[..., 0],  # with gaps
    lambda t: torch.cat([t.reshape(-1), t.reshape(-1)])[t.numel() :].reshape(t.shape),  # not from its memory's start
    lambda t: t[:1].expand(2, *t.shape[1:]) if t.dim() and t.shape[0] else t,
    lambda t: t.clone().contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    lambda t: t.conj() if t.is_complex() else t,
]
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=5)
TREES = st.recursive(
    tensors(),
    lambda inner: (
        st.dictionaries(NAMES, inner, max_size=3)
        | st.dictionaries(NAMES, inner, max_size=3).map(OrderedDict)
        | st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=8,
)


@given(extra=st.dictionaries(NAMES, TREES, max_size=2), params=st.dictionaries(NAMES, tensors(), min_size=1))
def test_any_tree_of_any_tensors_comes_back(extra, params, tmp_path_factory):
    state = small(5)._replace(params=params, opt_state=(), extra=extra)
    folder = tmp_path_factory.mktemp("any") / "c"
    tfn.save(folder, state)
    restored = tfn.restore(folder, like=state)
    found, expected = tfn.tree.named_leaves(restored), tfn.tree.named_leaves(state)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert found[name].stride() == torch.empty_like(leaf).stride()
        assert torch.equal(raw(found[name]), raw(leaf)), name
    for file, prefix in (("model", "model/"), ("state", "")):
        check_with_the_library(folder / f"{file}.safetensors", expected, prefix)


def raw(tensor):
    return tensor.resolve_conj().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def check_with_the_library(file, expected, prefix):
    for name, value in load_file(file).items():
        path = f"params/{name}" if prefix else name
        assert value.dtype == expected[path].dtype and torch.equal(raw(value), raw(expected[path]))


def test_the_bytes_of_a_header_do_not_change():
    """A reader makes the header again and compares: another way to write it is another format."""
    leaves = {
        "step": _format.Leaf("I64", (), "state.safetensors"),
        "é": _format.Leaf("BF16", (2, 0), "state.safetensors"),
    }
    assert _format.header(leaves) == (
        b'\x98\0\0\0\0\0\0\0{"__metadata__":{"format":"pt"},"step":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
        b'"\\u00e9":{"dtype":"BF16","shape":[2,0],"data_offsets":[8,8]}}    '
    )


# --- the model's files --------------------------------------------------------------------------------------------


def test_the_model_file_has_the_modules_own_names(tmp_path):
    state, _ = trained("sgd")
    tfn.save(tmp_path / "c", state)
    stored = load_file(tmp_path / "c" / "model.safetensors")
    assert set(stored) == {k for k in Odd().state_dict() if k != "b.weight"}  # tied: once, under its first name
    assert "model/positions" in load_file(tmp_path / "c" / "state.safetensors")  # not persistent: ours to keep


def test_the_manifest_says_what_is_there(tmp_path):
    state, _ = trained("adamw")
    tfn.save(tmp_path / "c", state)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["extra"]) == (2, 2, {})
    assert manifest["versions"] == {"trainfn": tfn.__version__, "torch": torch.__version__}
    assert manifest["tree"]["model/conv.weight"] == {
        "dtype": "F32", "shape": [2, 3, 3, 3], "file": "model.safetensors",
    }  # fmt: skip
    assert set(manifest["files"]) == {"model.safetensors", "state.safetensors"}


def test_a_large_model_is_sharded(tmp_path):
    state, _ = trained("adamw")
    tfn.save(tmp_path / "whole", state)
    tfn.save(tmp_path / "c", state, max_shard_size=200)
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "c").glob("model-*"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 2
    found = {}
    for file in files:
        shard = load_file(tmp_path / "c" / file)
        assert all(index["weight_map"][name] == file for name in shard)
        assert len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= 200
        found.update(shard)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == whole.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert_same(tfn.restore(tmp_path / "c", like=state), state)


# --- where it goes ------------------------------------------------------------------------------------------------


def test_saving_again_replaces_and_leaves_nothing_beside(tmp_path):
    state, step = trained("sgd")
    tfn.save(tmp_path / "c", state)
    state, _ = step(state, torch.randn(5, 4))
    tfn.save(tmp_path / "c", state)
    assert_same(tfn.restore(tmp_path / "c", like=state), state)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    "make", [lambda p: p.write_text("x"), lambda p: (p.mkdir(), (p / "notes.txt").write_text("x"))]
)
def test_what_is_no_checkpoint_is_not_replaced(make, tmp_path):
    make(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"c' exists and is not a checkpoint .* not replaced"):
        tfn.save(tmp_path / "c", small())
    assert os.path.exists(tmp_path / "c")


def test_a_link_is_not_replaced_nor_followed(tmp_path):
    tfn.save(tmp_path / "far", small(1))
    (tmp_path / "c").symlink_to("far")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        tfn.save(tmp_path / "c", small(2))
    assert int(tfn.restore(tmp_path / "c", like=small()).step) == 1  # the user's own link may be read through


def test_an_empty_folder_is_filled(tmp_path):
    tfn.save(tmp_path, small(1))
    assert int(tfn.restore(tmp_path, like=small()).step) == 1


def test_restoring_changes_nothing_it_was_given(tmp_path):
    state, _ = trained("adamw")
    tfn.save(tmp_path / "c", state)
    like = tfn.copy(state)
    restored = tfn.restore(tmp_path / "c", like=like)
    for leaf in tfn.tree.leaves(restored):
        leaf.zero_()
    assert_same(like, state)


def test_views_of_one_memory_are_saved_apart(tmp_path):
    both = torch.arange(6.0)
    state = tfn.init({"a": both[:3], "b": both[3:]}, tfn.optim.sgd(0.1), storage="adopt")
    tfn.save(tmp_path / "c", state)
    assert tfn.restore(tmp_path / "c", like=state).params["b"].tolist() == [3.0, 4.0, 5.0]


# --- what can't be saved ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"extra": {"count": 3}}, TypeError, r"state.extra/count is 3, not a tensor"),
        ({"params": {"w": torch.ones(2, device="meta")}}, TypeError, r"has no values .* Load the model's weights"),
        ({"buffers": {"z": torch.ones(2).to_sparse()}}, TypeError, r"\['z'\] is sparse, .* `x.to_dense\(\)`"),
        ({"extra": {"c": torch.ones(1).cdouble()}}, TypeError, r"'extra/c' is of torch.complex128.*view_as_real"),
        ({"extra": {"a/b": torch.ones(1), "a": {"b": torch.ones(1)}}}, ValueError, r"two leaves .* have the same name"),
        ({"buffers": {"w": torch.ones(1)}}, ValueError, r"two leaves of the state have the same name"),
        ({"params": {"__metadata__": torch.ones(1)}}, ValueError, r"two tensors are called '__metadata__'"),
    ],
)  # fmt: skip
def test_what_can_not_be_saved_is_refused_and_nothing_is_left(change, error, match, tmp_path):
    with pytest.raises(error, match=match):
        tfn.save(tmp_path / "c", small()._replace(**change))
    assert list(tmp_path.iterdir()) == []


def test_a_donated_state_can_be_neither_saved_nor_filled(tmp_path):
    optimizer = tfn.optim.sgd(0.1)
    state = tfn.init({"a": torch.ones(2)}, optimizer)
    step = tfn.jit(tfn.train_step(lambda p, x: tfn.Mean.of(p["a"] * x), optimizer), donate=True, compile=False)
    new, _ = step(state, torch.ones(2))
    tfn.save(tmp_path / "c", new)
    with pytest.raises(DonatedStateError):
        tfn.save(tmp_path / "d", state)
    with pytest.raises(DonatedStateError):
        tfn.restore(tmp_path / "c", like=state)


# --- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s._replace(params={**s.params, "new": torch.ones(1)}), r"missing in the checkpoint: model/new"),
        (lambda s: s._replace(params={"w": s.params["w"]}), r"not in the state: model/b"),
        (
            lambda s: s._replace(params={**s.params, "w": torch.ones(7)}),
            r"shape of model/w: \[3\] in the checkpoint, \[7\] in the state",
        ),
        (
            lambda s: s._replace(params={**s.params, "w": s.params["w"].double()}),
            r"dtype of model/w: torch.float32 in the checkpoint, torch.float64 in the state",
        ),
        (lambda s: s._replace(extra={"ema": {"w": torch.ones(2)}}), r"missing in the checkpoint: extra/ema/w"),
        (
            lambda s: s._replace(params={"w": s.params["w"], "bb": s.params["b"]}),
            r"missing in the checkpoint: model/bb \(nearest there: model/b\)\n.*not in the state: model/b",
        ),
        (lambda s: s._replace(extra={"x": torch.ones(1)}), r"restore\(path, like=state, strict=False\)`\.\n.*only=r"),
    ],
)
def test_what_does_not_fit_is_named(change, match, tmp_path):
    tfn.save(tmp_path / "c", small())
    with pytest.raises(CheckpointError, match=match):
        tfn.restore(tmp_path / "c", like=change(small()))


def test_only_the_first_of_many_misfits_are_listed(tmp_path):
    tfn.save(tmp_path / "c", small())
    like = small(0, **{f"layer{i}": torch.ones(1) for i in range(50)})
    with pytest.raises(CheckpointError, match=r"and 8\d more"):
        tfn.restore(tmp_path / "c", like=like)


def test_what_fits_can_be_taken_and_the_rest_is_named(tmp_path):
    tfn.save(tmp_path / "c", small(4))
    like = small(0, w=torch.zeros(3), b=torch.zeros(9), new=torch.zeros(1))
    with pytest.warns(
        UserWarning, match=r"(?s)5 leaves restored.*shape of model/b.*missing in the checkpoint: model/new"
    ):
        got = tfn.restore(tmp_path / "c", like=like, strict=False)
    assert got.params["w"].tolist() == [4.0] * 3 and got.params["b"].tolist() == [0.0] * 9 and int(got.step) == 4
    got.params["b"].fill_(7)
    assert like.params["b"].tolist() == [0.0] * 9  # a copy


def test_nothing_that_fits_is_an_error_even_so(tmp_path):
    tfn.save(tmp_path / "c", small())
    like = small()._replace(step=torch.zeros(2), key=torch.zeros(3), params={"x": torch.ones(1)}, opt_state=())
    with pytest.raises(CheckpointError, match=r'no leaf of the checkpoint fits(?s:.*)rename={"old prefix"'):
        tfn.restore(tmp_path / "c", like=like, strict=False)


@pytest.mark.parametrize("only", [r"^model/", ["model/w", "model/b"], lambda name: name.startswith("model/")])
def test_a_part_can_be_chosen(only, tmp_path):
    tfn.save(tmp_path / "c", small(4))
    got = tfn.restore(tmp_path / "c", like=small(0)._replace(extra={"mine": torch.ones(1)}), only=only)
    assert got.params["w"].tolist() == [4.0] * 3 and int(got.step) == 0 and got.extra["mine"].tolist() == [1.0]


def test_files_of_which_nothing_is_wanted_are_not_read(tmp_path):
    tfn.save(tmp_path / "c", small(4))
    file = tmp_path / "c" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert tfn.restore(tmp_path / "c", like=small(0), only=r"^model/").params["w"].tolist() == [4.0] * 3
    with pytest.raises(CheckpointError, match=r"state.safetensors: checksum mismatch"):
        tfn.restore(tmp_path / "c", like=small(0))


def test_what_is_chosen_must_fit(tmp_path):
    tfn.save(tmp_path / "c", small(4))
    like = small(0, w=torch.zeros(3), b=torch.zeros(9))
    with pytest.raises(CheckpointError, match=r"shape of model/b"):
        tfn.restore(tmp_path / "c", like=like, only="^model/")
    assert tfn.restore(tmp_path / "c", like=like, only=["model/w"]).params["w"].tolist() == [4.0] * 3


@pytest.mark.parametrize(
    "rename",
    [{"w": "weights.w", "b": "weights.b"}, lambda name: re.sub(r"(^|/)([wb])$", r"\1weights.\2", name)],
)
def test_leaves_can_be_renamed_wherever_they_stand(rename, tmp_path):
    state = small(4)
    tfn.save(tmp_path / "c", state)
    like = small(0, **{"weights.w": torch.zeros(3), "weights.b": torch.zeros(2)})
    got = tfn.restore(tmp_path / "c", like=like, rename=rename)
    assert got.params["weights.w"].tolist() == [4.0] * 3 and int(got.step) == 4
    assert [leaf.tolist() for leaf in tfn.tree.leaves(got.opt_state)] == [
        leaf.tolist() for leaf in tfn.tree.leaves(state.opt_state)
    ]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"only": "nothing"}, r"only= matches none of the \d leaves: model/.* as in `only="),
        (
            {"only": ["model/w", "model/bb"]},
            r"only= has 'model/bb', which is neither in .*\. Near it: model/b.* Leave it out",
        ),
        ({"rename": {"nothing": "x"}}, r"rename= changes no name"),
        ({"rename": {"w": "b"}}, r"rename= gives '.*' and '.*' one name, 'model/b'\. .* Rename one of them"),
    ],
)
def test_choices_that_make_no_sense(options, match, tmp_path):
    tfn.save(tmp_path / "c", small(4))
    with pytest.raises(ValueError, match=match):
        tfn.restore(tmp_path / "c", like=small(), **options)


@given(
    names=st.sets(st.sampled_from("abcdef"), min_size=1),
    wanted=st.sets(st.sampled_from("abcdef"), min_size=1),
    shapes=st.lists(st.integers(1, 2), min_size=12, max_size=12),
)
def test_a_partial_restore_takes_exactly_what_fits(names, wanted, shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "c"
    have = {name: torch.ones(shapes[i]) for i, name in enumerate("abcdef") if name in names}
    want = {name: torch.zeros(shapes[6 + i]) for i, name in enumerate("abcdef") if name in wanted}
    tfn.save(folder, small(1, **have))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = tfn.restore(folder, like=small(0, **want), strict=False)
    fitting = {name for name in want if name in have and have[name].shape == want[name].shape}
    assert {name for name, value in got.params.items() if value.sum() > 0} == fitting
    assert bool(caught) == (not fitting == names == wanted)
