"""Batches that are not dicts: counted, moved and split as a dict is, and given to the loss as what they are."""

from __future__ import annotations

import dataclasses
import re
from collections import UserDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

import trainfn as tfn
from trainfn._run._batches import placed

pytestmark = pytest.mark.filterwarnings("ignore::trainfn.errors.InexactLossWarning")


@dataclasses.dataclass
class Data:
    x: Any
    name: str = "train"
    mask: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: Any


class Own(Mapping[str, Any]):
    def __init__(self, items: dict[str, Any]) -> None:
        self.items_of_mine, self.note = items, "kept"

    def __getitem__(self, name: str) -> Any:
        return self.items_of_mine[name]

    def __iter__(self) -> Any:
        return iter(self.items_of_mine)

    def __len__(self) -> int:
        return len(self.items_of_mine)


class Movable:
    def __init__(self, x: Any) -> None:
        self.parts, self.scale = [x], 1.0

    @property
    def x(self) -> Any:
        return self.parts[0]

    def to(self, device: Any) -> Movable:
        return Movable(self.x.to(device))


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: Any) -> None:
        self.x = x

    def to(self, device: Any) -> Slotted:
        return Slotted(self.x.to(device))


class Named(NamedTuple):
    x: Any


MAKE: dict[str, Any] = {
    "dict": lambda x: {"x": x},
    "BatchEncoding": lambda x: BatchEncoding({"x": x}),
    "UserDict": lambda x: UserDict({"x": x}),
    "Mapping": lambda x: Own({"x": x}),
    "ModelOutput": lambda x: BaseModelOutput(last_hidden_state=x),
    "dataclass": Data,
    "frozen dataclass": Frozen,
    "object": Movable,
    "slots": Slotted,
    "NamedTuple": Named,
    "nested": lambda x: (Data(UserDict({"x": x})),),
}


def x_of(batch: Any) -> Any:
    if isinstance(batch, tuple) and not isinstance(batch, Named):
        return batch[0].x["x"]
    if isinstance(batch, BaseModelOutput):
        assert batch.last_hidden_state is batch["last_hidden_state"]
        return batch.last_hidden_state
    return batch["x"] if isinstance(batch, Mapping) else batch.x


def loss(p: Any, batch: Any) -> Tensor:
    return ((x_of(batch) - p["w"]) ** 2).mean()  # the mean of these rows, as a model of transformers returns it


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_batches_of_any_type_weigh_by_their_rows(make: Any) -> None:
    a, b = torch.arange(6.0), 3 * torch.ones(2)
    rows = torch.cat([a, b])
    w = torch.zeros((), requires_grad=True)
    ((rows - w) ** 2).mean().backward()
    expected = (-0.1 * w.grad).item()  # one step of plain SGD  # type: ignore[operator]
    optimizer = tfn.optim.sgd(0.1)
    state = tfn.init({"w": torch.zeros(())}, optimizer)
    assert tfn.tree.row_count(make(a)) == 6
    whole = tfn.evaluate(tfn.eval_step(loss), state, [make(a), make(b)])["loss"]
    torch.testing.assert_close(whole.value.float(), (rows**2).mean())
    for accumulate, batch in ((1, make(rows)), (3, make(rows)), ("stream", [make(a), make(b)])):
        step = tfn.train_step(loss, optimizer, accumulate=accumulate)  # type: ignore[arg-type]
        new, metrics = step(state, batch)
        assert new.params["w"].item() == pytest.approx(expected, abs=1e-6)
        assert metrics["loss"].weight == 8


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_compiled_step_takes_batches_of_any_type_and_compiles_once(make: Any) -> None:
    optimizer = tfn.optim.sgd(0.1)
    state = tfn.init({"w": torch.zeros(())}, optimizer)
    step = tfn.train_step(loss, optimizer)
    compiled = tfn.jit(step, backend="eager")
    for x in (torch.ones(4), torch.arange(4.0)):
        assert compiled(state, make(x))[0].params["w"] == step(state, make(x))[0].params["w"]
    assert compiled.explain().graphs == 1


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_batch_of_any_type_is_moved_and_keeps_its_type(make: Any) -> None:
    given = make(torch.ones(2))
    moved = placed(given, torch.device("meta"))
    assert type(moved) is type(given)
    assert x_of(moved).device.type == "meta"
    assert x_of(given).device.type == "cpu"  # the data set's own stays where it is


def test_what_is_not_a_tensor_stays_in_every_piece() -> None:
    data, own = Data(np.arange(4), "a"), Own({"x": torch.ones(4)})
    pieces = [piece for piece, _ in tfn.tree.split(data, 2)]
    assert [(p.x.tolist(), p.name, p.mask) for p in pieces] == [([0, 1], "a", None), ([2, 3], "a", None)]
    assert [piece.note for piece, _ in tfn.tree.split(own, 2)] == ["kept", "kept"]


def test_a_part_of_a_packed_sequence_stays_on_the_host() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    moved = placed({"x": packed}, torch.device("meta"))["x"]
    assert (moved.data.device.type, moved.batch_sizes.device.type) == ("meta", "cpu")


def test_an_object_beside_other_tensors_does_not_count_the_rows() -> None:
    assert tfn.tree.row_count({"attention": Movable(torch.ones(1, 9)), "x": torch.ones(4)}) == 4


def test_names_of_leaves_are_those_of_a_dict() -> None:
    step = tfn.jit(tfn.train_step(loss, tfn.optim.sgd(0.1)), backend="eager", dynamic={"x": (0,)})
    state = tfn.init({"w": torch.zeros(())}, tfn.optim.sgd(0.1))
    for rows in (4, 5, 6):
        step(state, BatchEncoding({"x": torch.ones(rows)}))
    assert step.explain().graphs == 1


class Opaque:
    pass


@pytest.mark.parametrize(
    "batch",
    [["a cat", "a dog"], Opaque(), {"image": Opaque(), "scale": 2.0}],
    ids=["strings", "an object", "a dict of one"],
)
def test_rows_that_can_not_be_counted_are_an_error(batch: Any) -> None:
    state = tfn.init({"w": torch.zeros(())}, tfn.optim.sgd(0.1))
    step = tfn.train_step(lambda p, b: p["w"] ** 2, tfn.optim.sgd(0.1))
    kind = type(batch[0] if isinstance(batch, list) else batch["image"] if isinstance(batch, dict) else batch).__name__
    with pytest.raises(TypeError, match=re.escape(kind) + r".* can't be counted\. Give the step tensors, as in"):
        step(state, batch)


def test_a_mapping_that_can_not_be_made_anew_is_an_error() -> None:
    class Lazy(Own):
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def __getitem__(self, name: str) -> Any:
            return self.x

        def __iter__(self) -> Any:
            return iter(["x"])

        def __len__(self) -> int:
            return 1

    with pytest.raises(TypeError, match=r"Lazy is a mapping .* Write `dict\(batch\)`"):
        tfn.tree.row_count(Lazy(torch.ones(3)))


@pytest.mark.parametrize("batch", [None, 3, torch.tensor(1.0), {"seed": 1, "on": True}], ids=str)
def test_a_batch_of_numbers_is_one_row(batch: Any) -> None:
    assert tfn.tree.row_count(batch) == 1
