"""A checkpoint whose leaves are in pieces, read by one process; and pieces that can't be, each refused in words."""

import itertools
import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import trainfn as tfn
from tests.checkpoint.damage import Target, sealed
from tests.checkpoint.states import assert_same, same, small
from trainfn._checkpoint import _contents, _disk, _format, _pieces, _read, _write
from trainfn.errors import CheckpointError

STATE = {"w": torch.arange(12.0).reshape(3, 4), "half": torch.arange(5).bfloat16(), "none": torch.ones(0, 2)}
CUTS = {"model/w": ([(0, 2), (2, 1)], [(0, 3), (3, 1)]), "model/half": ([(0, 3), (3, 2)],)}


def boxes(cuts):
    return [_pieces.Box(tuple(a for a, _ in cell), tuple(n for _, n in cell)) for cell in itertools.product(*cuts)]


def write_split(folder, state, cuts=CUTS):
    """What ranks would write, if rank k had the k-th cell of each leaf's grid."""
    contents = _contents.contents_of(state, "save")
    tree, values = dict(contents.manifest.tree), {}
    for name, grid in cuts.items():
        cells = boxes(grid)
        pieces = [_format.Piece(f"rank-{i}-of-4.safetensors", *box) for i, box in enumerate(cells)]
        tree[name] = tree[name]._replace(file="", pieces=tuple(pieces))
        values |= {(name, piece.file): contents.leaves[name][piece.box.within(_pieces.whole_box(tree[name].shape))]
                   for piece in pieces}  # fmt: skip
    for name, leaf in tree.items():
        if leaf.file:
            tree[name] = leaf._replace(file="state.safetensors")
            values[name, "state.safetensors"] = contents.leaves[name]
    manifest = contents.manifest._replace(tree=tree)
    folder.mkdir()
    files = {
        file: _disk.write(folder / file, _write._file(leaves, {name: values[name, file] for name in leaves}))
        for file, leaves in manifest.by_file().items()
    }
    _disk.write(folder / "manifest.json", [_format.manifest_bytes(manifest._replace(files=files))])


def test_pieces_come_together(tmp_path):
    write_split(tmp_path / "c", small(3, **STATE))
    assert_same(tfn.restore(tmp_path / "c", like=small(0, **STATE)), small(3, **STATE))
    leaf = tfn.manifest(tmp_path / "c").tree["model/w"]
    assert (leaf.shape, leaf.file, leaf.nbytes) == ((3, 4), "", 48)
    assert leaf.pieces[1] == ("rank-1-of-4.safetensors", (0, 3), (2, 1))
    assert json.loads((tmp_path / "c" / "manifest.json").read_text())["format"] == 3


def test_a_whole_state_is_of_the_format_that_it_was(tmp_path):
    tfn.save(tmp_path / "c", small(3, **STATE), full=True)
    fields = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert fields["format"] == 2
    assert fields["tree"]["model/w"] == {"dtype": "F32", "shape": [3, 4], "file": "model.safetensors"}


def test_only_files_that_are_needed_are_read(tmp_path):
    write_split(tmp_path / "c", small(3, **STATE))
    (tmp_path / "c" / "rank-3-of-4.safetensors").write_bytes(
        b"x" * (tmp_path / "c" / "rank-3-of-4.safetensors").stat().st_size
    )
    like = small(0, **STATE)
    found = tfn.restore(tmp_path / "c", like=like, only=["model/half", "step"])
    assert torch.equal(found.params["half"], STATE["half"]) and int(found.step) == 3
    with pytest.raises(CheckpointError, match=r"damaged: rank-3-of-4.safetensors: its header is not the one"):
        tfn.restore(tmp_path / "c", like=like)


def edit(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_bytes(sealed(fields))


def piece(fields, i):
    return fields["tree"]["model/w"]["pieces"][i]


def pieces(fields):
    return fields["tree"]["model/w"]["pieces"]


HOSTILE = {
    "overlapping": (lambda f: piece(f, 1).update(offsets=[0, 2]), "'model/w' overlap, or leave a gap"),
    "the same twice": (lambda f: piece(f, 3).update(offsets=[2, 0], shape=[1, 3]), "are not each part of it once"),
    "a gap": (lambda f: [piece(f, i)["shape"].__setitem__(1, 2) for i in (0, 2)], "overlap, or leave a gap"),
    "one missing": (lambda f: pieces(f).pop(), "are not each part of it once"),
    "all of one side missing": (lambda f: [pieces(f).pop(), pieces(f).pop()], "do not end where it does"),
    "out of bounds": (lambda f: [piece(f, i)["shape"].__setitem__(0, 9) for i in (2, 3)], "do not end where it does"),
    "a larger leaf": (lambda f: f["tree"]["model/w"].update(shape=[3, 5]), "do not end where it does"),
    "empty": (lambda f: piece(f, 1).update(shape=[2, 0]), "are empty"),
    "negative": (lambda f: piece(f, 0).update(offsets=[-1, 0]), "a dimension of 'model/w' is -1"),
    "enormous": (lambda f: piece(f, 0).update(shape=[2**62, 2**62]), "overlap, or leave a gap"),
    "of other dimensions": (
        lambda f: piece(f, 0).update(offsets=[0]),
        "has invalid offsets, an invalid shape or",
    ),
    "no numbers": (lambda f: piece(f, 0).update(offsets=["0", 0]), "a dimension of 'model/w' is 0"),
    "no list": (lambda f: f["tree"]["model/w"].update(pieces={}), "'pieces' is missing, or is not a list"),
    "no object": (lambda f: pieces(f).__setitem__(0, []), "'file' is missing, or is not a str"),
    "none": (lambda f: pieces(f).clear(), "is in pieces, but has no piece, or has a file as well"),
    "in a file as well": (
        lambda f: f["tree"]["model/w"].update(file="state.safetensors"),
        "is in pieces, but has no piece, or has a file as well",
    ),
    "no such file": (lambda f: piece(f, 0).update(file="../evil"), "an invalid file"),
    "two in one file": (lambda f: piece(f, 0).update(file=piece(f, 1)["file"]), "has two pieces in one file"),
    "in another's file": (
        lambda f: f["tree"]["model/half"]["pieces"][0].update(file="rank-3-of-4.safetensors"),
        "has .* bytes, which is not the size of the leaves in it",
    ),
    "in the older format": (lambda f: f.update(format=2), "'file' is missing, or is not a str"),
    "in a newer format": (lambda f: f.update(format=4), "format 4; this version of trainfn reads 2 and 3"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_pieces_that_can_not_be_are_refused(name, tmp_path):
    change, why = HOSTILE[name]
    write_split(tmp_path / "c", small(3, **STATE))
    edit(tmp_path / "c" / "manifest.json", change)
    with pytest.raises(CheckpointError, match=rf"manifest.json: .*{why}"):
        tfn.restore(tmp_path / "c", like=small(0, **STATE))


@pytest.mark.parametrize("first", [0, 500])
def test_damage_and_harm_are_noticed(first, tmp_path, monkeypatch):
    empty = torch.empty
    most = lambda shape, *args, **kwargs: empty(shape, *args, **kwargs) if torch.Size(shape).numel() <= 12 else 1 / 0  # noqa: E731
    monkeypatch.setattr(torch, "empty", most)
    original, like = small(3, **STATE), small(0, **STATE)
    write_split(tmp_path / "c", original)
    (tmp_path / "outside").mkdir()
    target, refused = Target(tmp_path / "c", tmp_path / "outside"), 0
    for seed in range(first, first + 500):
        r = random.Random(seed)
        damage = r.choice(target.ACCIDENTS if seed % 2 else target.HARM)
        damage(target, r)
        intact = {p.name: p.read_bytes() for p in target.folder.iterdir() if p.is_file()} == target.files
        try:
            found = tfn.restore(target.folder, like=like)
            assert intact or damage in target.HARM, f"seed {seed}: {damage.__name__}"
            assert same(found, original) or damage in target.HARM
        except CheckpointError:
            refused += 1
        target.mend()
    assert refused > 400


# --- boxes --------------------------------------------------------------------------------------------------------


@st.composite
def meshes(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    shape = draw(st.lists(st.integers(0, 7), max_size=3))
    dims = [draw(st.none() | st.integers(0, len(shape) - 1)) if shape else None for _ in sizes]
    return tuple(shape), tuple(dims), tuple(sizes)


@given(meshes())
def test_what_ranks_hold_is_a_grid(mesh):
    shape = mesh[0]
    ranks = tuple(range(len(_pieces._boxes(*mesh))))
    held = _pieces._holders(*mesh, ranks)
    if torch.Size(shape).numel():
        _pieces.check_grid(shape, list(held))
        assert sorted(r for having in held.values() for r in having) == [
            r for r in ranks if _pieces._boxes(*mesh)[r].numel
        ]
    else:
        assert held == {}


@given(st.data())
def test_any_pieces_fill_any_box(data):
    """Through `Goal`, as it is used for this rank's part of a leaf."""
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    cuts = [data.draw(st.sets(st.integers(1, n - 1), max_size=3)) if n > 1 else () for n in shape]
    grid = [list(itertools.pairwise([0, *sorted(cut), n])) for cut, n in zip(cuts, shape, strict=True)]
    cells = boxes([[(a, b - a) for a, b in pairs] for pairs in grid])
    ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    box = _pieces.Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))
    everything = _pieces.whole_box(shape)
    like = whole[box.within(everything)].clone()
    leaf = _format.Leaf("I64", tuple(shape), "", tuple(_format.Piece(str(i), *cell) for i, cell in enumerate(cells)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_read, "box_of", lambda like: box)
        goal = _read.Goal(leaf, like)
    for part in goal.parts:
        values = whole[part.box.within(everything)].contiguous()
        goal.read(part, lambda place, values=values: place.__setitem__(slice(None), _write.bytes_of(values)))
    assert torch.equal(goal.value, like)
    assert all(part.box.overlap(box) or part.box == box for part in goal.parts)
