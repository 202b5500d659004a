"""Samplers and loaders of subclasses, streams, and batches of other kinds than dicts of tensors."""

import itertools
import random

import datasets
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, WeightedRandomSampler

import trainfn
from trainfn import Trainer, TrainingArguments


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Linear(3, 1)
        nn.init.constant_(self.w.weight, 0.5)
        nn.init.zeros_(self.w.bias)

    def forward(self, x=None, labels=None):
        y = self.w(x).squeeze(-1)
        return {"loss": ((y - labels) ** 2).mean(), "logits": y}


def points(count=16):
    draw = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(3, generator=draw), "labels": torch.tensor(float(i))} for i in range(count)]


def arguments(folder, **options):
    given = {"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1, "save_strategy": "no", **options}
    return TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, report_to="none", log_level="error", **given)


class Noting(Trainer):
    """Notes the labels of each batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.__dict__.setdefault("seen", []).append([int(x) for x in inputs["labels"]])
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class Counting(Sampler):
    """The rows from the epoch's number on."""

    def __init__(self, n):
        self.n, self.epoch = n, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([(i + self.epoch) % self.n for i in range(self.n)])

    def __len__(self):
        return self.n


class CountingBatches(BatchSampler):
    def __init__(self, n):
        super().__init__(Counting(n), 4, False)


@pytest.mark.parametrize("make", [Counting, CountingBatches])
def test_a_sampler_of_a_subclass_is_used_and_told_the_epoch(make, tmp_path):
    class Own(Noting):
        def _get_train_sampler(self, train_dataset=None):
            return make(len(train_dataset))

    def run(folder, steps, **options):
        args = arguments(tmp_path / folder, max_steps=steps, save_strategy="steps", save_steps=3)
        trainer = Own(Linear(), args, train_dataset=points(8))
        trainer.train(**options)
        return trainer.seen

    whole = run("whole", 4)
    assert whole == [[0, 1, 2, 3], [4, 5, 6, 7], [1, 2, 3, 4], [5, 6, 7, 0]]
    folder = str(tmp_path / "whole" / "checkpoint-3")
    assert run("resumed", 4, resume_from_checkpoint=folder) == whole[3:]


def test_samplers_draw_by_the_seed(tmp_path):
    class Own(Noting):
        def _get_train_sampler(self, train_dataset=None):
            return WeightedRandomSampler([float(i % 2) for i in range(len(train_dataset))], 8)

        def _get_eval_sampler(self, eval_dataset):
            return list(reversed(range(len(eval_dataset))))

    seen = []
    for _ in range(2):
        trainer = Own(Linear(), arguments(tmp_path), train_dataset=points(8), eval_dataset=points(3))
        trainer.train()
        trainer.evaluate()
        seen.append(trainer.seen)
    assert seen[0] == seen[1]
    assert seen[0][-1] == [2, 1, 0]
    assert {label % 2 for batch in seen[0][:-1] for label in batch} == {1}


def test_the_methods_for_data_are_called_and_super_works(tmp_path):
    called = []

    class Own(Noting):
        def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, is_training=False, **rest):
            called.append("_get_dataloader")
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, **rest)

        def _get_train_sampler(self, train_dataset=None):
            called.append("_get_train_sampler")
            return super()._get_train_sampler(train_dataset)

        def _get_collator_with_removed_columns(self, data_collator, description=None):
            called.append("_get_collator_with_removed_columns")
            return super()._get_collator_with_removed_columns(data_collator, description)

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            called.append("get_batch_samples")
            samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
            assert int(count) == 4 * len(samples)
            return [{**batch, "labels": batch["labels"] + 100} for batch in samples], count

        def _prepare_inputs(self, inputs):
            called.append("_prepare_inputs")
            return super()._prepare_inputs(inputs)

        def _get_num_items_in_batch(self, batch_samples, device):
            called.append("_get_num_items_in_batch")
            return super()._get_num_items_in_batch(batch_samples, device)

    trainer = Own(Linear(), arguments(tmp_path, max_steps=1, gradient_accumulation_steps=2), train_dataset=points(8))
    trainer.train()
    first = ["_get_dataloader", "_get_collator_with_removed_columns", "_get_train_sampler", "get_batch_samples"]
    assert called[:4] == first
    assert called.count("_prepare_inputs") == 2
    assert "_get_num_items_in_batch" in called
    assert {x for batch in trainer.seen for x in batch} == set(range(100, 108))


@pytest.mark.parametrize("calls_super", [True, False])
def test_a_micro_batch_is_prepared_when_its_step_runs(calls_super, tmp_path):
    """As in transformers: an override that generates from the model, or counts its calls, sees each in its turn."""

    def run(library):
        order = []

        class Own(library.Trainer):
            def _prepare_inputs(self, inputs):
                order.append("prepare")
                return {**super()._prepare_inputs(inputs), "labels": torch.full((2,), float(len(order)))}

            def training_step(self, model, inputs, num_items_in_batch=None):
                order.append("step")
                if calls_super:
                    return super().training_step(model, inputs, num_items_in_batch)
                loss = self.compute_loss(model, self._prepare_inputs(inputs)) / self.args.gradient_accumulation_steps
                loss.backward()
                return loss.detach()

        args = library.TrainingArguments(
            str(tmp_path), use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", logging_steps=1,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, optim="sgd", learning_rate=0.01,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = Own(Linear(), args, train_dataset=points(8))
        trainer.train()
        return order, [log["loss"] for log in trainer.state.log_history if "loss" in log]

    (ours, losses), (theirs, expected) = run(trainfn), run(transformers)
    assert ours == theirs
    assert losses == pytest.approx(expected, rel=1e-6)


def test_columns_are_removed_by_the_method_for_it(tmp_path):
    class Own(Noting):
        def _remove_unused_columns(self, dataset, description=None):
            return super()._remove_unused_columns(dataset.rename_column("target", "labels"), description)

    rows = {"x": [[0.0, 1.0, 2.0]] * 8, "target": [float(i) for i in range(8)], "text": ["a"] * 8}
    trainer = Own(Linear(), arguments(tmp_path, max_steps=2), train_dataset=datasets.Dataset.from_dict(rows))
    trainer.train()
    assert sorted(x for batch in trainer.seen for x in batch) == list(range(8))


def test_an_own_number_of_items_is_what_divides(tmp_path):
    class Own(Trainer):
        def _get_num_items_in_batch(self, batch_samples, device):
            return sum(batch["labels"].abs().sum() for batch in batch_samples)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs["labels"]
            y = model.w(inputs["x"]).squeeze(-1)
            return (labels * (y - labels) ** 2).sum() / num_items_in_batch

    weights = []
    for size, accumulate in ((8, 1), (2, 4)):
        model = Linear()
        options = {"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0, "max_steps": 1}
        args = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, **options)
        Own(model, args, train_dataset=points(8)).train()
        weights.append(model.w.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


class Endless(IterableDataset):
    def __iter__(self):
        return iter({"x": torch.full((3,), i / 10), "labels": torch.tensor(float(i))} for i in itertools.count())


class Finite(Endless):
    def __iter__(self):
        return itertools.islice(super().__iter__(), 8)


@pytest.mark.parametrize("kind", [Endless, Finite])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_streams(kind, own, workers, tmp_path):
    class Own(Noting):
        def get_train_dataloader(self):
            if own:
                return DataLoader(kind(), batch_size=4, num_workers=workers)
            return super().get_train_dataloader()

    trainer = Own(Linear(), arguments(tmp_path, dataloader_num_workers=workers), train_dataset=kind())
    found = trainer.train().metrics
    # Each is rounded to three digits after the point.
    assert found["train_samples_per_second"] == pytest.approx(4 * found["train_steps_per_second"], abs=5e-3)
    rows = list(range(16)) if kind is Endless else [*range(8), *range(8)]
    assert [x for batch in trainer.seen for x in batch] == rows
    with pytest.raises(ValueError, match="max_steps"):
        Own(Linear(), arguments(tmp_path, max_steps=-1), train_dataset=kind()).train()


class Counted(IterableDataset):
    """A stream with a state, which draws from its own generator and counts its reads."""

    def __init__(self, plain=True):
        self.plain, self.reads, self.place, self.draw = plain, 0, 0, random.Random(0)

    def __iter__(self):
        while self.place < 16:
            self.reads, self.place = self.reads + 1, self.place + 1
            drawn = self.draw.randrange(10**6)
            self.value = (self.place - 1) * 10**6 + drawn
            yield {"x": torch.full((3,), self.place / 16), "labels": torch.tensor(float(self.value % 1000))}
        self.place = 0

    def set_epoch(self, epoch):
        self.draw.seed(epoch)

    def state_dict(self):
        version, numbers, normal = self.draw.getstate()
        return {"place": self.place, "draw": [version, list(numbers) if self.plain else numbers, normal]}

    def load_state_dict(self, state):
        version, numbers, normal = state["draw"]
        self.place = state["place"]
        self.draw.setstate((version, tuple(numbers), normal))


def noted(library):
    """A Trainer of a library, which notes the labels of each micro-batch once."""

    class Noted(library.Trainer):
        def _prepare_inputs(self, inputs):
            self.__dict__.setdefault("seen", []).append([int(x) for x in inputs["labels"]])
            return super()._prepare_inputs(inputs)

    return Noted


Preparing = noted(trainfn)


class InTorchs(Preparing):
    """Has a loader of torch."""

    def get_train_dataloader(self):
        size = self.args.train_batch_size
        return DataLoader(self.train_dataset, batch_size=size, collate_fn=self.data_collator)


def own():
    stream = Counted()
    return stream, lambda: stream.reads


def of_huggingface():
    rows, reads = {"x": [[i / 16] * 3 for i in range(16)], "labels": [float(i) for i in range(16)]}, []
    stream = datasets.Dataset.from_dict(rows).to_iterable_dataset(num_shards=2)
    return stream.map(lambda row: reads.append(row["labels"]) or row), lambda: len(reads)


@pytest.mark.parametrize("make", [own, of_huggingface])
@pytest.mark.parametrize("kind", [Preparing, InTorchs])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("at", [1, 3, 4, 6])
def test_a_stream_resumes_by_its_own_state(make, kind, accumulate, at, tmp_path):
    """No row is read again: neither in the first epoch, of four updates, nor in the second."""

    def run(folder, **options):
        stream, reads = make()
        how = {"per_device_train_batch_size": 4 // accumulate, "gradient_accumulation_steps": accumulate}
        args = arguments(tmp_path / folder, max_steps=7, save_strategy="steps", save_steps=1, **how)
        trainer = kind(Linear(), args, train_dataset=stream)
        trainer.train(**options)
        return trainer.seen, reads()

    (whole, all_reads), done = run("whole"), at * accumulate
    seen, reads = run("again", resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
    assert seen == whole[done:]
    assert reads == all_reads - at * 4


def test_the_workers_of_a_stream_give_the_rows_of_transformers(tmp_path, caplog):
    """In two epochs, of batches that end unevenly; and the run resumes, without reading a row again."""

    def run(library, folder, workers=2, **options):
        args = library.TrainingArguments(
            str(tmp_path / folder), use_cpu=True, disable_tqdm=True, report_to="none", save_steps=3, max_steps=10,
            per_device_train_batch_size=3, dataloader_num_workers=workers,
        )  # fmt: skip
        trainer = noted(library)(Linear(), args, train_dataset=of_huggingface()[0])
        trainer.train(**options)
        return trainer.seen

    ours = run(trainfn, "ours")
    assert ours == run(transformers, "theirs")
    folder = str(tmp_path / "ours" / "checkpoint-")
    for at in (3, 9):
        assert run(trainfn, f"again{at}", resume_from_checkpoint=f"{folder}{at}") == ours[at:]
    with caplog.at_level("WARNING", "trainfn"):
        run(trainfn, "other", 1, resume_from_checkpoint=f"{folder}3")
    assert "1 workers give the rows of a stream in another order than 2" in caplog.text
    assert "write `dataloader_num_workers=2`" in caplog.text


@pytest.mark.filterwarnings("ignore:stream.*rows are read and dropped")
def test_a_state_that_is_not_json_is_not_kept(tmp_path, caplog):
    def run(folder, **options):
        stream = Counted(plain=False)
        args = arguments(tmp_path / folder, save_strategy="steps", save_steps=1)
        trainer = Noting(Linear(), args, train_dataset=stream)
        with caplog.at_level("WARNING", "trainfn"):
            trainer.train(**options)
        return trainer.seen, stream.reads

    whole, reads = run("whole")
    assert caplog.text.count("is not plain JSON, so checkpoints don't hold it") == 1
    assert run("again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")) == (whole[2:], reads)


def test_a_stream_with_a_buffer_skips_rows(tmp_path):
    def run(folder, **options):
        stream = of_huggingface()[0].shuffle(seed=1, buffer_size=5)
        args = arguments(tmp_path / folder, save_strategy="steps", save_steps=1)
        trainer = Noting(Linear(), args, train_dataset=stream)
        trainer.train(**options)
        return trainer.seen

    whole = run("whole")
    assert run("again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")) == whole[2:]


class Held:
    def __init__(self, x, labels):
        self.x, self.labels = x, labels

    def to(self, device):
        return Held(self.x.to(device), self.labels.to(device))


def in_dicts(rows):
    x, labels = torch.stack([row["x"] for row in rows]), torch.stack([row["labels"] for row in rows])
    return x, labels


BATCHES = {
    "nested": (lambda x, y: {"features": {"x": x}, "labels": y}, lambda b: (b["features"]["x"], b["labels"])),
    "features": (lambda x, y: [{"x": x}, {"labels": y}], lambda b: (b[0]["x"], b[1]["labels"])),
    "tuple": (lambda x, y: (x, y), lambda b: b),
    "object": (lambda x, y: {"held": Held(x, y)}, lambda b: (b["held"].x, b["held"].labels)),
    "rows": (
        lambda x, y: [{"x": a.tolist(), "y": float(b)} for a, b in zip(x, y, strict=True)],
        lambda b: (torch.tensor([r["x"] for r in b]), torch.tensor([r["y"] for r in b])),
    ),
    "strings": (
        lambda x, y: {"text": [" ".join(map(repr, a.tolist())) for a in x], "y": [repr(float(b)) for b in y]},
        lambda b: (torch.tensor([[*map(float, t.split())] for t in b["text"]]), torch.tensor([*map(float, b["y"])])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (3, 3)])
def test_batches_of_other_kinds(name, size, accumulate, tmp_path):
    pack, unpack = BATCHES[name]

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            x, labels = unpack(inputs)
            outputs = model(x=x, labels=labels)
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    options = {"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0, "max_steps": 1}
    options |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate}
    model, plain = Linear(), Linear()
    args = arguments(tmp_path, remove_unused_columns=False, **options)
    Own(model, args, lambda rows: pack(*in_dicts(rows)), train_dataset=points(8)).train()
    args = arguments(tmp_path, **{**options, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1})
    Trainer(plain, args, train_dataset=points(8)).train()
    torch.testing.assert_close(model.w.weight, plain.w.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("size", [8, 3])
def test_batches_of_other_kinds_are_evaluated(name, size, tmp_path):
    pack, unpack = BATCHES[name]

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            x, labels = unpack(inputs)
            outputs = model(x=x, labels=labels)
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    names = {"object": ["held"], "strings": ["y"]}.get(name)
    args = arguments(tmp_path, remove_unused_columns=False, per_device_eval_batch_size=size, label_names=names)
    own = Own(Linear(), args, lambda rows: pack(*in_dicts(rows)), eval_dataset=points(8))
    plain = Trainer(Linear(), arguments(tmp_path, per_device_eval_batch_size=8), eval_dataset=points(8))
    metrics = own.evaluate()
    assert metrics["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def test_an_evaluator_of_ones_own_needs_no_rows(tmp_path):
    class Own(Trainer):
        def get_eval_dataloader(self, eval_dataset=None):
            return DataLoader([])

        def evaluation_loop(self, *args, **options):
            output = super().evaluation_loop(*args, **options)
            output.metrics["eval_similarity"] = 0.5
            return output

    assert Own(Linear(), arguments(tmp_path), eval_dataset="dummy").evaluate()["eval_similarity"] == 0.5


def test_a_batch_whose_rows_cannot_be_counted_says_so(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model.w.weight.sum()

    trainer = Own(Linear(), arguments(tmp_path), lambda rows: {"text": "all"}, train_dataset=points(8))
    trainer.args.remove_unused_columns = False
    with pytest.raises(TypeError, match=r"can't be counted.*return tfn.Mean.of\(values, weights\)"):
        trainer.train()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data_seed": 7},
        {"train_sampling_strategy": "sequential"},
        {"gradient_accumulation_steps": 2},
        {"dataloader_drop_last": True},
        {"dataloader_num_workers": 2},
    ],
    ids=str,
)
def test_the_data_order_of_transformers_gives_its_losses(options, tmp_path):
    logs = []
    for library in (transformers, trainfn):
        mine = {"data_order": "transformers"} if library is trainfn else {}
        args = library.TrainingArguments(
            str(tmp_path), use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", logging_steps=1,
            per_device_train_batch_size=4, num_train_epochs=2, learning_rate=0.01, **options, **mine,
        )  # fmt: skip
        # Of a short micro-batch in an update, transformers takes a mean of means.
        rows = points(16 if "gradient_accumulation_steps" in options else 14)
        trainer = library.Trainer(Linear(), args, train_dataset=rows)
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    size = {"gradient_accumulation_steps": 4, "dataloader_drop_last": 6}.get(next(iter(options), ""), 8)
    assert [len(losses) for losses in logs] == [size, size]
    assert logs[1] == pytest.approx(logs[0], rel=1e-6)


def test_the_data_order_of_transformers_resumes(tmp_path):
    def run(folder, **options):
        args = arguments(tmp_path / folder, max_steps=7, save_strategy="steps", save_steps=5, data_order="transformers")
        trainer = Noting(Linear(), args, train_dataset=points(14))
        trainer.train(**options)
        return trainer.seen

    whole = run("whole")
    assert run("again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5")) == whole[5:]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data_order": "torch"}, "there are two orders of the training rows.*data_order='transformers'"),
        ({"data_order": "transformers", "train_sampling_strategy": "group_by_length"}, "follows from the global"),
    ],
)
def test_a_data_order_that_cannot_be_had(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        Trainer(Linear(), arguments(tmp_path, **options))
