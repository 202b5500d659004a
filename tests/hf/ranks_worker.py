"""The cases of test_ranks.py, which runs each in one process and on two ranks of `tests/ranks/server.py`."""

import contextlib
import os
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import BertForSequenceClassification, TrainerCallback

from tests.hf.models import bert, classes, gpt2, llama, t5, tokens
from trainfn import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer
from trainfn.hf._run._foreign import Foreign
from trainfn.hf._run._position import rows_of

NUMBERS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
ADAM = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
WARMUP = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto", "total_num_steps": "auto"}}
AUTO = {**dict.fromkeys(NUMBERS, "auto"), "optimizer": ADAM, "scheduler": WARMUP, "bf16": {"enabled": "auto"}}
PLANS = {
    "ddp": {},
    "fsdp": {"fsdp": "full_shard"},
    "zero": {"fsdp": "shard_grad_op"},
    "deepspeed 2": {"deepspeed": {**AUTO, "zero_optimization": {"stage": 2}}},
    "deepspeed 3": {"deepspeed": {**AUTO, "zero_optimization": {"stage": 3}}},
}
ROWS = 4  # of a micro-batch, on all ranks together


def world():
    """How many processes train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def pad(rows):
    """Rows of unequal length; to the length of all, so that it doesn't depend on who is in a batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def dropping_bert():
    model = bert(BertForSequenceClassification, num_labels=3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    return model


def translations(count=11):
    return [{**row, "labels": row["labels"][:4]} for row in tokens(count)]


MODELS = {
    "bert": (dropping_bert, lambda: classes(11)),
    "gpt2": (gpt2, lambda: tokens(11)),
    "t5": (t5, translations),
}


def arguments(folder, **options):
    quiet = {"use_cpu": True, "disable_tqdm": True, "log_level": "error", "logging_steps": 1, "save_strategy": "no"}
    sizes = {"per_device_train_batch_size": ROWS // world(), "per_device_eval_batch_size": ROWS // world()}
    given = {"learning_rate": 1e-2, "num_train_epochs": 2, "lr_scheduler_type": "constant", "optim": "sgd"}
    return Seq2SeqTrainingArguments(str(folder), **{**quiet, **sizes, **given, **options})


def params(trainer):
    """On every rank all values, in the model's own memory."""
    found = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert all(type(p) is torch.nn.Parameter for p in trainer.model.parameters())
    return found


def history(trainer):
    kept = (
        "loss",
        "grad_norm",
        "learning_rate",
        "eval_loss",
        "train_loss",
        "eval_accuracy",
        "epoch",
        "step",
        "total_flos",
    )
    return [{k: v for k, v in entry.items() if k in kept} for entry in trainer.state.log_history]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean()),
            "seen": len(prediction.label_ids)}  # fmt: skip


# --- cases: (folder, plan) -> what is compared ---------------------------------------------------------------------


def updates(folder, plan, name, **options):
    make, rows = MODELS[name]
    trainer = Trainer(make(), arguments(folder, **plan, **options), pad, rows())
    trainer.train()
    return {"params": params(trainer), "log": history(trainer)}


def planned(folder, plan):
    """By a DeepSpeed configuration, which has the arguments' optimizer and schedule; what is split, in words."""
    options = {"optim": "adamw_torch", "weight_decay": 0.1, "lr_scheduler_type": "linear", "warmup_steps": 2}
    options |= {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
    make, rows = MODELS["bert"]
    trainer = Trainer(make(), arguments(folder, **plan, **options), pad, rows())
    lines = trainer.summary()
    trainer.train()
    if world() > 1:
        stage = plan["deepspeed"]["zero_optimization"]["stage"]
        assert trainer._trainfn.world.plan.stage == stage
        assert {2: "sharded: optimizer state and gradients", 3: "sharded: parameters, too"}[stage] in lines
    return {"params": params(trainer), "log": history(trainer)}


LAUNCHER = {  # what `accelerate launch` exports of the documentation's yaml
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_GRADIENT_CLIPPING": "0.05",
}


def configured(folder, plan):
    """By a launcher's DeepSpeed configuration, which has another clipping than the Trainer."""
    if world() == 1:
        return updates(folder, plan, "gpt2", max_grad_norm=0.05)
    with patch.dict(os.environ, LAUNCHER):
        args = arguments(folder, **plan)
        with args.main_process_first():
            rows = tokens(11)
        trainer = Trainer(gpt2(), args, pad, rows)
        assert (trainer._trainfn.world.plan.stage, trainer._trainfn.world.plan.offload) == (2, ("opt_state",))
        trainer.train()
    return {"params": params(trainer), "log": history(trainer)}


def noisy(folder, plan):
    return updates(folder, plan, "gpt2", neftune_noise_alpha=5.0)


def ungrouped(folder, plan):
    """Rows grouped by length, and padded by the batch: of one rank, or of all."""
    rows = [{k: v[: int(row["attention_mask"].sum())] for k, v in row.items()} for row in tokens(11)]

    def collate(batch):
        return {
            k: torch.nn.utils.rnn.pad_sequence([r[k] for r in batch], True, -100 if k == "labels" else 0)
            for k in batch[0]
        }

    args = arguments(folder, train_sampling_strategy="group_by_length", **plan)
    trainer = Trainer(gpt2(), args, collate, rows)
    trainer.train()
    return {"params": params(trainer)}  # the estimate of operations counts padding


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from tokens(11)


def stream(folder, plan):
    trainer = Trainer(gpt2(), arguments(folder, max_steps=4, **plan), pad, Endless())
    trainer.train()
    return {"params": params(trainer)}


class Placed(torch.utils.data.IterableDataset):
    """A stream with a state, which counts its reads."""

    def __init__(self):
        self.place, self.reads = 0, 0

    def __iter__(self):
        rows = tokens(16)
        while self.place < len(rows):
            self.place, self.reads = self.place + 1, self.reads + 1
            yield rows[self.place - 1]
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def placed(folder, plan):
    """A run that resumes by the state of each rank's stream, and reads no row again."""
    how = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, **plan}
    rows, again = Placed(), Placed()
    whole = Trainer(gpt2(), arguments(folder, **how), pad, rows)
    whole.train()
    resumed = Trainer(gpt2(), arguments(folder / "again", **how), pad, again)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    return {"params": params(resumed), "whole": params(whole), "reads": [rows.reads, again.reads]}


class OwnLoader(Trainer):
    """Somebody else's loader, not divided."""

    def get_train_dataloader(self):
        size = self.args.per_device_train_batch_size
        return torch.utils.data.DataLoader(self.train_dataset, size, collate_fn=pad, shuffle=False)


def own_loader(folder, plan):
    trainer = OwnLoader(gpt2(), arguments(folder, **plan), pad, tokens(10))
    trainer.train()
    return {"params": params(trainer)}


def ordered(folder, plan):
    """Each rank's rows are those of Accelerate's loader, which transformers makes, in two epochs."""
    for options in ({}, {"split_batches": True}, {"even_batches": False}):
        for drop in (False, True):
            args = arguments(
                folder, data_order="transformers", data_seed=5, dataloader_drop_last=drop, accelerator_config=options,
                **{**plan, "per_device_train_batch_size": 2},
            )  # fmt: skip
            rows = [{"input_ids": torch.tensor(i)} for i in range(11)]
            trainer = Trainer(gpt2(), args, train_dataset=rows)
            sampler = torch.utils.data.RandomSampler(rows)
            theirs = trainer.accelerator.prepare(torch.utils.data.DataLoader(rows, 2, sampler=sampler, drop_last=drop))
            ours, read = trainer.get_train_dataloader(), []
            for epoch in range(2):
                theirs.set_epoch(epoch)
                expected = [batch["input_ids"].tolist() for batch in theirs]
                read = [batch["input_ids"].tolist() for batch in Foreign(ours, 0, epoch, 0)]
                assert [batch for batch in read if batch] == expected, (options, drop, epoch)
            assert len(ours) == len(read)
    return {}


class Backwards(Trainer):
    """A sampler of somebody's."""

    def _get_train_sampler(self, train_dataset=None):
        return list(reversed(range(len(train_dataset))))


class Uneven(Trainer):
    """Batches of five rows, and of one."""

    def _get_train_sampler(self, train_dataset=None):
        order = torch.utils.data.SequentialSampler(train_dataset)
        return torch.utils.data.BatchSampler(order, 5, drop_last=False)


def sampled(folder, plan):
    """A batch of the sampler's is split over the ranks, also one that does not divide."""
    options = {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": ROWS}
    trainer = Backwards(gpt2(), arguments(folder, **options, **plan), pad, tokens(11))
    trainer.train()
    uneven = Uneven(gpt2(), arguments(folder, **options, **plan), pad, tokens(11))
    uneven.train()
    return {"params": params(trainer), "uneven": params(uneven), "rows": rows_of(trainer._trainfn.run.windows)}


class Divided(Trainer):
    """A loader that its author has divided."""

    def get_train_dataloader(self):
        rows, size = self.train_dataset, self.args.per_device_train_batch_size
        if world() == 1:  # what two samplers deal out
            rows = [rows[i + j] for i in range(0, 12, 4) for j in (0, 2, 1, 3)]
            return torch.utils.data.DataLoader(rows, size, collate_fn=pad)
        sampler = torch.utils.data.DistributedSampler(rows, world(), self.args.process_index, shuffle=False)
        return torch.utils.data.DataLoader(rows, size, sampler=sampler, collate_fn=pad)


def divided(folder, plan):
    trainer = Divided(gpt2(), arguments(folder, **plan), pad, tokens(12))
    trainer.train()
    return {"params": params(trainer)}


class Manual(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, inputs, num_items_in_batch)


def manual(folder, plan):
    trainer = Manual(gpt2(), arguments(folder, gradient_accumulation_steps=2, **plan), pad, tokens(11))
    trainer.train()
    return {"params": params(trainer), "log": history(trainer)}


def evaluated(folder, plan):
    """Before training, in the middle and afterwards; a batch that doesn't divide, and one with a row for one rank."""
    make, rows = MODELS["bert"]
    args = arguments(folder, eval_strategy="steps", eval_steps=2, **plan)
    trainer = Trainer(make(), args, pad, rows(), classes(9), compute_metrics=accuracy)
    before = trainer.evaluate()
    trainer.train()
    output = trainer.predict(classes(9))
    assert trainer.state.is_world_process_zero == (args.process_index == 0)
    return {
        "params": params(trainer),
        "log": history(trainer),
        "before": before["eval_loss"],
        "predictions": torch.as_tensor(output.predictions),
        "labels": torch.as_tensor(output.label_ids),
        "metrics": {k: v for k, v in output.metrics.items() if k in ("test_loss", "test_accuracy", "test_seen")},
    }


def batchwise(folder, plan):
    seen = []

    def metrics(prediction, compute_result):
        seen.append(len(prediction.label_ids))
        return {"seen": sum(seen)} if compute_result else {}

    args = arguments(folder, batch_eval_metrics=True, **plan)
    trainer = Trainer(dropping_bert(), args, pad, classes(11), classes(9), compute_metrics=metrics)
    return {"metrics": trainer.evaluate()["eval_seen"], "seen": seen}


class Pairs(Trainer):
    """Batches that are tuples."""

    def _prepare_inputs(self, inputs):
        return inputs

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        logits = model(inputs[0])
        return torch.nn.functional.cross_entropy(logits, inputs[1]).detach(), logits.detach(), inputs[1]


def pairs(folder, plan):
    torch.manual_seed(3)
    rows = [(torch.randn(3), torch.tensor(i % 2)) for i in range(9)]
    args = arguments(folder, remove_unused_columns=False, **plan)
    collate = torch.utils.data.default_collate
    trainer = Pairs(torch.nn.Linear(3, 2), args, collate, eval_dataset=rows, compute_metrics=accuracy)
    found = trainer.evaluate()
    return {name: found[name] for name in ("eval_loss", "eval_accuracy", "eval_seen")}


def generated(folder, plan):
    args = arguments(folder, predict_with_generate=True, generation_max_length=5, eval_strategy="epoch", **plan)
    lengths = []

    def metrics(prediction):
        lengths.append(list(prediction.predictions.shape))
        return {"length": float((prediction.predictions != 0).sum())}

    trainer = Seq2SeqTrainer(t5(), args, pad, translations(), translations(5), compute_metrics=metrics)
    trainer.train()
    output = trainer.predict(translations(5))
    return {"predictions": torch.as_tensor(output.predictions), "lengths": lengths}


class Until(TrainerCallback):
    """Stops on one rank only."""

    def __init__(self, step, rank):
        self.step, self.rank = step, rank

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == self.rank % world() and state.global_step == self.step:
            control.should_training_stop = True


def stopped(folder, plan):
    trainer = Trainer(gpt2(), arguments(folder, **plan), pad, tokens(11), callbacks=[Until(4, 1)])
    trainer.train()
    return {"params": params(trainer), "steps": trainer.state.global_step}


class Terminated(TrainerCallback):
    """A cluster tells one machine that it is about to go."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == world() - 1 and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def terminated(folder, plan):
    args = arguments(folder, enable_jit_checkpoint=True, **plan)
    trainer = Trainer(gpt2(), args, pad, tokens(11), callbacks=[Terminated()])
    trainer.train()
    return {"steps": trainer.state.global_step, "files": sorted(p.name for p in Path(folder).glob("checkpoint-*"))}


class Pressed(Trainer):
    """Ctrl-C on one rank: in the second step of a run, or between steps."""

    where = "step"

    def press(self, where, step):
        if where == self.where and step == 2 and self.args.process_index == world() - 1:
            os.kill(os.getpid(), signal.SIGINT)

    def compute_loss(self, model, inputs, *args, **options):
        self.press("step", self.state.global_step + 1)
        return super().compute_loss(model, inputs, *args, **options)


class Looks(TrainerCallback):
    """At the whole model, and saves it."""

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def on_step_end(self, args, state, control, **kwargs):
        with self.trainer.whole_model() as model:
            self.seen.append(sum(float(p.detach().double().sum()) for p in model.parameters()))
        self.trainer.save_model(str(self.folder / f"at-{state.global_step}"))
        self.trainer.press("between", state.global_step)


def interrupted(folder, plan):
    """All ranks end after the same step, with whole models, of which another run can begin."""
    looks = Looks(folder)
    looks.trainer = trainer = Pressed(gpt2(), arguments(folder, **plan), pad, tokens(11), callbacks=[looks])
    before, found = signal.getsignal(signal.SIGINT), {"seen": looks.seen}
    for where in ("step", "between"):
        trainer.where = where
        try:
            trainer.train()
            raise AssertionError("Ctrl-C was lost")
        except KeyboardInterrupt:
            found[where] = {"params": params(trainer), "steps": trainer.state.global_step}
        assert signal.getsignal(signal.SIGINT) is before
    trainer._trainfn.world.ranks.wait()
    saved = type(trainer.model).from_pretrained(folder / "at-2").state_dict()
    assert all(torch.equal(p, saved[name]) for name, p in params(trainer).items())
    return found


def patient(folder, plan, **more):
    from transformers import EarlyStoppingCallback

    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "accuracy", "num_train_epochs": 9}
    options |= {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "save_total_limit": 2}
    make, rows = MODELS["bert"]
    args = arguments(folder, **options, **more, **plan)
    trainer = Trainer(make(), args, pad, rows(), classes(9), compute_metrics=accuracy)
    trainer.add_callback(EarlyStoppingCallback(2))
    trainer.train()
    files = sorted(p.name for p in Path(folder).iterdir() if not p.name.startswith("."))
    best = Path(trainer.state.best_model_checkpoint).name
    return {"params": params(trainer), "steps": trainer.state.global_step, "files": files, "best": best}


def saved(folder, plan):
    """A run that is broken off and gone on with, against one that is not; the files are those of one process."""
    options = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "gradient_accumulation_steps": 2}
    make, rows = MODELS["bert"]
    whole = Trainer(make(), arguments(folder / "whole", **options, **plan), pad, rows())
    whole.train()
    cut = Trainer(make(), arguments(folder / "cut", **options, **plan), pad, rows(), callbacks=[Until(2, 0)])
    cut.train()
    on = Trainer(make(), arguments(folder / "cut", **options, **plan), pad, rows())
    on.train(resume_from_checkpoint=True)
    equal = all(torch.equal(a, b) for a, b in zip(params(whole).values(), params(on).values(), strict=True))
    last = folder / "cut" / "checkpoint-4"
    on.save_model(str(folder / "model"))
    on._trainfn.world.ranks.wait()
    loaded = BertForSequenceClassification.from_pretrained(folder / "model").state_dict()
    return {
        "params": params(on),
        "equal": equal,
        "same": all(torch.equal(p, loaded[n]) for n, p in params(on).items()),
        "files": sorted(p.name for p in last.iterdir()),
        "log": history(on),
    }


class Overriding(Trainer):
    """Writes and loads its weights by itself; the ranks meet in its Accelerator."""

    def _save(self, output_dir=None, state_dict=None):
        torch.save(self.model.state_dict(), Path(output_dir) / "mine.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.model.load_state_dict(torch.load(Path(resume_from_checkpoint) / "mine.pt"))

    def log(self, logs, start_time=None):
        number = torch.tensor([float(self.accelerator.process_index + 1)])
        logs["together"] = float(self.accelerator.gather_for_metrics(number).sum()) / sum(range(world() + 1))
        super().log(logs, start_time)


def overriding(folder, plan):
    options = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "gradient_accumulation_steps": 2}
    make, rows = MODELS["bert"]
    first = Overriding(make(), arguments(folder, **options, **plan), pad, rows())
    first.train()
    again = Overriding(make(), arguments(folder, **options, **plan), pad, rows())
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    accelerator = again.accelerator
    assert (accelerator.num_processes, accelerator.process_index) == (world(), again.args.process_index)
    assert again.get_total_train_batch_size(again.args) == 2 * ROWS
    assert type(accelerator.prepare(make())) is type(make())  # it is not wrapped
    return {
        "params": params(again),
        "equal": all(torch.equal(a, b) for a, b in zip(params(first).values(), params(again).values(), strict=True)),
        "files": sorted(p.name for p in (folder / "checkpoint-4").iterdir() if not p.name.startswith("rank")),
        "together": {entry["together"] for entry in again.state.log_history} == {1.0},
    }


def ungathered(folder, plan):
    """Without checkpoints, each rank may have a folder of its own."""
    make, rows = MODELS["bert"]
    rank = int(os.environ.get("RANK", "0"))
    trainer = Trainer(make(), arguments(folder / str(rank), **plan), pad, rows())
    trainer.train()
    return {"params": params(trainer)}


def carried_on(folder, plan):
    """From the checkpoint that another number of processes has written; ``saved`` of one process must be there."""
    options = {"save_strategy": "no", "optim": "adamw_torch", "gradient_accumulation_steps": 2}
    make, rows = MODELS["bert"]
    trainer = Trainer(make(), arguments(folder / "cut", **options, **plan), pad, rows())
    trainer.train(resume_from_checkpoint=str(folder / "cut" / "checkpoint-2"))
    return {"params": params(trainer)}


def halves(folder, plan):
    """The batch is what the arguments say, and split."""
    options = {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": ROWS}
    return updates(folder, plan, "gpt2", **options)


def half(folder, plan):
    return updates(folder, plan, "gpt2", bf16=True)


def scaled(folder, plan):
    return updates(folder, plan, "gpt2", fp16=True)


def rebuffered(folder, plan):
    """Running statistics of a model that is no transformers model."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)

        def forward(self, x, labels=None):
            logits = self.two(self.one(x).relu())
            loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
            return {"loss": loss, "logits": logits}

    torch.manual_seed(3)
    rows = [{"x": torch.randn(4), "labels": torch.tensor(i % 3)} for i in range(11)]
    args = arguments(folder, save_only_model=True, save_strategy="epoch", **plan)
    torch.manual_seed(args.process_index)  # the values are those of rank 0
    trainer = Trainer(Net(), args, pad, rows)
    trainer.train()
    files = sorted(p.name for p in Path(folder).glob("checkpoint-6/*"))
    return {"params": params(trainer), "files": files}


def twice(folder, plan):
    trainer = Trainer(gpt2(), arguments(folder, **plan), pad, tokens(11))
    trainer.train()
    trainer.train()
    return {"params": params(trainer), "loss": trainer.evaluate(tokens(5))["eval_loss"]}


def foreign(folder, plan):
    """From a checkpoint of weights and a trainer's state, such as transformers leaves."""
    options = {"save_strategy": "steps", "save_steps": 2}
    first = Trainer(gpt2(), arguments(folder, **options, **plan), pad, tokens(11), callbacks=[Until(2, 0)])
    first.train()
    for name in ("manifest.json", "state.safetensors"):
        first._trainfn.world.ranks.first((folder / "checkpoint-2" / name).unlink)
    trainer = Trainer(gpt2(), arguments(folder, **plan), pad, tokens(11))
    trainer.train(resume_from_checkpoint=True)
    return {"params": params(trainer)}


def parted(folder, plan):
    """Each rank writes its part."""
    if plan:
        plan = {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    options = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    make, rows = MODELS["bert"]
    Trainer(make(), arguments(folder, **options, **plan), pad, rows(), callbacks=[Until(2, 0)]).train()
    parts = len(list((folder / "checkpoint-2").glob("rank-*.safetensors")))
    assert parts == (2 if plan else 0)
    assert (folder / "checkpoint-2" / "model.safetensors").exists() == (not plan)
    trainer = Trainer(make(), arguments(folder, **options, **plan), pad, rows())
    trainer.train(resume_from_checkpoint=True)
    return {"params": params(trainer)}


def tensors(folder, plan):
    """Layers that two ranks compute together, on the same rows."""
    from accelerate import ParallelismConfig

    split = {"parallelism_config": ParallelismConfig(tp_size=2)} if world() == 2 else {}
    args = arguments(folder, per_device_train_batch_size=ROWS, per_device_eval_batch_size=ROWS, **split)
    trainer = Trainer(llama(), args, pad, tokens(11), tokens(5))
    trainer.train()
    output = trainer.predict(tokens(5))
    return {"params": params(trainer), "log": history(trainer), "predictions": torch.as_tensor(output.predictions)}


CASES = {
    **{f"updates {name}": (updates, {"name": name}) for name in MODELS},
    "accumulated bert": (updates, {"name": "bert", "gradient_accumulation_steps": 2}),
    "accumulated gpt2": (updates, {"name": "gpt2", "gradient_accumulation_steps": 2, "optim_args": "momentum=0.9"}),
    "evaluated": (evaluated, {}),
    "saved": (saved, {}),
    "overriding": (overriding, {}),
    "patient": (patient, {}),
    "stopped": (stopped, {}),
    "terminated": (terminated, {}),
    "interrupted": (interrupted, {}),
    "generated": (generated, {}),
    "manual": (manual, {}),
    "scaled": (scaled, {}),
    "module": (rebuffered, {}),
}
ONCE = {  # by DDP alone
    "noisy": (noisy, {}),
    "ungathered": (ungathered, {}),
    "half": (half, {}),
    "halves": (halves, {}),
    "grouped": (ungrouped, {}),
    "stream": (stream, {}),
    "own loader": (own_loader, {}),
    "placed": (placed, {}),
    "divided": (divided, {}),
    "ordered": (ordered, {}),
    "sampled": (sampled, {}),
    "batchwise": (batchwise, {}),
    "pairs": (pairs, {}),
    "tensors": (tensors, {}),
}
SPLIT = {  # by FSDP alone
    "twice": (twice, {}),
    "foreign": (foreign, {}),
    "parted": (parted, {}),
    "patient, weights": (patient, {"save_only_model": True}),
}


CARRIED = "carried on, fsdp"


def cases():
    """Each name, its plan and its function."""
    for plan in ("ddp", "fsdp"):
        for name, (case, options) in {**CASES, **(ONCE if plan == "ddp" else SPLIT)}.items():
            yield f"{name}, {plan}", PLANS[plan], case, options
    yield "updates bert, zero", PLANS["zero"], updates, {"name": "bert"}
    for plan in ("deepspeed 2", "deepspeed 3"):
        yield f"planned, {plan}", PLANS[plan], planned, {}
    yield "configured, launcher", {}, configured, {}
    yield CARRIED, PLANS["fsdp"], carried_on, {}


def call(given):
    """On a rank, a case by its name in a folder; the result and what was printed go into files there."""
    name, folder = given[0], Path(given[1])
    rank, found = torch.distributed.get_rank(), {name: rest for name, *rest in cases()}
    plan, case, options = found[name]
    runs, train = [], Trainer.train

    def counted(self, *args, **kwargs):
        out = train(self, *args, **kwargs)
        runs.append(out)  # a run that came to its end
        return out

    with printing_to(folder / f"printed {name}.{rank}"), patch.object(Trainer, "train", counted):
        torch.save(case(folder / name, plan, **options), folder / f"found {name}.{rank}")
    return len(runs)


@contextlib.contextmanager
def printing_to(path):
    """What this process prints goes into a file."""
    sys.stdout.flush()
    before = [os.dup(number) for number in (1, 2)]
    with open(path, "w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, old in zip((1, 2), before, strict=True):
                os.dup2(old, number)
                os.close(old)
