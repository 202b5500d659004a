"""Which plan a Trainer's arguments and its launcher come to, and what can't be; scripts that launchers start."""

import json
import logging
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import ParallelismConfig
from transformers import BatchEncoding, BertForSequenceClassification, EarlyStoppingCallback, TrainerCallback
from transformers.training_args import ParallelMode

import trainfn as tfn
from tests.helpers import takes_long
from tests.hf.models import bert, gpt2, tokens
from tests.hf.script_folders import write_all
from tests.launch.test_launch import adapted
from tests.processes import printed, torchrun
from trainfn import Trainer, TrainingArguments
from trainfn.data import NoRows, is_empty, no_rows
from trainfn.hf._parallel import _layout, _parameters, _world
from trainfn.hf._parallel._sharding import Dealt, Own, dealt
from trainfn.hf._run._data import Windows
from trainfn.hf._step._manual import _check_axes

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def arguments(**options):
    return TrainingArguments("out", use_cpu=True, log_level="error", **options)


def launched(world=2, **options):
    """What a launcher with so many processes says."""
    plan = tfn.Plan(**options.pop("plan", {"replicate": -1}))
    given = {"mixed_precision": "no", "compile": None, "checkpointing": False, "state_dict": "full", "rank": 0}
    return SimpleNamespace(plan=plan, world=world, device=CPU, **{**given, **options})


# --- plans --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        ({}, None),
        ({"fsdp": True}, tfn.Plan.fsdp()),
        ({"fsdp": "full_shard auto_wrap"}, tfn.Plan.fsdp()),
        ({"fsdp": "shard_grad_op"}, tfn.Plan.fsdp(reshard=False)),
        ({"fsdp": True, "fsdp_config": {"reshard_after_forward": False}}, tfn.Plan.fsdp(reshard=False)),
        ({"fsdp": "full_shard offload"}, tfn.Plan.fsdp(offload=("opt_state", "params"))),
        ({"fsdp": "hybrid_shard"}, tfn.Plan.fsdp(replicate=2)),
        ({"fsdp": ["hybrid_shard_zero2"]}, tfn.Plan.fsdp(replicate=2, reshard=False)),
        ({"fsdp": "no_shard"}, tfn.Plan.replicated()),
        (
            {"parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=4)},
            tfn.Plan(replicate=2, shard=4, stage=3),
        ),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, tfn.Plan(tensor=2)),
    ],
    ids=str,
)
def test_the_plan_of_arguments(options, plan):
    before = dict(os.environ)
    assert _layout._of_arguments(arguments(**options), nodes=2) == plan
    assert dict(os.environ) == before


def test_arguments_win_over_a_launcher_that_says_nothing_and_never_contradict_it(monkeypatch):
    assert _layout._consistent(tfn.Plan.fsdp(), launched()) == tfn.Plan.fsdp()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    same = {"shard": -1, "stage": 3}
    assert _layout._consistent(tfn.Plan.fsdp(), launched(plan=same)) == tfn.Plan.fsdp()
    with pytest.raises(ValueError, match=r"arguments ask for .*'stage': 2.*launch` for .*'stage': 3.*Leave `fsdp`"):
        _layout._consistent(tfn.Plan.zero(2), launched(plan=same))


@pytest.mark.parametrize(
    ("mine", "theirs", "then"), [("no", "bf16", "bf16"), ("bf16", "no", "bf16"), ("fp16", "fp16", "fp16")]
)
def test_mixed_precision_of_either(mine, theirs, then):
    args = arguments(**({mine: True} if mine != "no" else {}))
    _layout._take_precision(args, launched(mixed_precision=theirs))
    assert getattr(args, then) and args.mixed_precision == then


def test_the_loss_computes_in_the_launchers_precision_in_one_process(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = Trainer(gpt2(), arguments(), train_dataset=tokens(4))
    assert trainer.args.bf16 and trainer._trainfn.world.plan is None


def test_one_process_asks_no_launcher(monkeypatch):
    monkeypatch.setattr(_layout, "joined", None)
    assert _layout.world_of(arguments(), None) is _world.ALONE


def test_a_plan_for_one_process_is_left_out(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, fsdp="full_shard", max_steps=1, report_to="none")
    trainer = Trainer(gpt2(), args, train_dataset=tokens(4))
    assert trainer._trainfn.world.plan is None and trainer.train().global_step == 1


def test_parallel_mode(monkeypatch):
    assert arguments().parallel_mode is ParallelMode.NOT_PARALLEL
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert arguments().parallel_mode is ParallelMode.DISTRIBUTED


# --- what can't be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fsdp": True, "fsdp_config": {"xla": True}}, r"fsdp_config=\{'xla': True\}.*not run on XLA.*Leave `xla` out"),
        (
            {"parallelism_config": ParallelismConfig(cp_size=2)},
            r"cp_size=2.*not split a sequence.*Write `dp_shard_size`",
        ),
    ],
)
def test_layouts_that_cannot_be(options, match):
    with pytest.raises(ValueError, match=match):
        _layout._of_arguments(arguments(**options), nodes=1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"auto_find_batch_size": True}, r"auto_find_batch_size=True.*2 processes.*Write `gradient_accumulation"),
        (
            {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 3},
            r"per_device_train_batch_size=3.*do not divide into 2 equal parts. Write a multiple of 2",
        ),
    ],
)
def test_what_several_processes_cannot_do(options, match, monkeypatch):
    monkeypatch.setattr(tfn.Plan, "data_size", 2)
    with pytest.raises(ValueError, match=match):
        _layout._check_possible(arguments(**options), launched())


def test_several_machines_share_a_disk(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(ValueError, match=r"save_on_each_node=True.*one checkpoint together.*Leave `save_on_each_node`"):
        _layout._check_possible(arguments(save_on_each_node=True), launched())


def test_precisions_that_contradict_each_other():
    with pytest.raises(ValueError, match=r"fp16=True.*mixed_precision: bf16. Leave `fp16` out, or write `bf16=True`"):
        _layout._take_precision(arguments(fp16=True), launched(mixed_precision="bf16"))


def test_a_backend_that_the_device_does_not_have(monkeypatch):
    monkeypatch.setattr(tfn.launch, "join", lambda **_: CPU)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"ddp_backend='nccl'.*on cpu.*over gloo. Leave `ddp_backend` out"):
        _layout.meet(arguments(ddp_backend="nccl"))


def of_ranks(trainer, world=2, **plan):
    """A trainer that believes in several processes."""
    ranks = tfn.launch.Ranks()
    ranks.size = world
    trainer._trainfn.world = _world.World(plan=tfn.Plan(**plan or {"replicate": -1}), ranks=ranks)
    return trainer


def test_searches_and_overrides_that_ranks_cannot_do(monkeypatch):
    trainer = Trainer(model_init=lambda: gpt2(), args=arguments())
    of_ranks(trainer, shard=-1)
    with pytest.raises(ValueError, match=r"hyperparameter_search\(\.\.\.\)` on 2 processes.*`python script.py`"):
        trainer.hyperparameter_search()
    monkeypatch.setattr(tfn.Plan, "world", 4)
    with pytest.raises(ValueError, match=r"training_step is overridden.*\{'replicate': 2, 'shard': 2\}.*compute_loss"):
        _check_axes(trainer, tfn.Plan.fsdp(replicate=2))
    _check_axes(trainer, tfn.Plan.fsdp())


def test_a_model_without_values_is_not_trained():
    trainer = Trainer(gpt2(), arguments(), train_dataset=tokens(4))
    trainer._trainfn.released = True
    with pytest.raises(RuntimeError, match=r"ended in an error.*no values.*resume_from_checkpoint=True"):
        trainer.train()


def test_rows_that_are_too_few_for_all_ranks():
    args = arguments(per_device_train_batch_size=3, dataloader_drop_last=True)
    trainer = of_ranks(Trainer(gpt2(), args, train_dataset=tokens(5)), replicate=-1)
    with pytest.raises(ValueError, match=r"per_device_train_batch_size=3, .*on 2 ranks.* 5 rows.*of at most 2"):
        trainer.get_train_dataloader()


# --- loaders of others --------------------------------------------------------------------------------------------


class Second(tfn.launch.Ranks):
    """The second of two."""

    rank, size = 1, 2

    def gathered(self, value):
        """The other has the same."""
        return [value, value]

    def any(self, flags):
        """The other has one batch more."""
        return flags


TWO = _world.World(plan=tfn.Plan.replicated(), ranks=Second())


def test_which_batches_are_whose():
    rows = [{"x": torch.arange(i, i + 1)} for i in range(5)]
    plain = torch.utils.data.DataLoader(rows, 1, collate_fn=lambda batch: batch[0])
    mine = dealt(TWO, plain)
    assert isinstance(mine, Dealt) and len(mine) == 3 and mine.dataset is rows
    assert [batch["x"].tolist() for batch in mine] == [[1], [3], []]
    assert [is_empty(batch) for batch in mine] == [False, False, True]
    assert dealt(TWO, mine) is mine  # it is this rank's part already
    sampler = torch.utils.data.DistributedSampler(rows, 2, 1, shuffle=False)
    own = dealt(TWO, torch.utils.data.DataLoader(rows, 1, sampler=sampler))
    assert isinstance(own, Own) and len(own) == 3 and len(list(own)) == 3
    assert dealt(_world.ALONE, plain) is plain


def test_a_rank_whose_own_loader_has_nothing():
    class Other(Second):
        def any(self, flags):
            return [True]

    sampler = SimpleNamespace(num_replicas=2, __iter__=lambda: iter(()))
    with pytest.raises(ValueError, match=r"this rank's loader, a list, has no batch at all.*Trainer\(train_dataset="):
        next(iter(Own(_world.World(plan=tfn.Plan.replicated(), ranks=Other()), [])))
    assert sampler.num_replicas == 2


@pytest.mark.parametrize("wrap", [dict, BatchEncoding, lambda d: tuple(d.values()), lambda d: [d, {"deep": (d,)}]])
@pytest.mark.parametrize("leaf", [torch.ones(3, 2), np.ones((3, 2))])
def test_batches_of_no_rows(wrap, leaf):
    batch = wrap({"name": "x", "scale": torch.tensor(2.0), "x": leaf})
    assert not is_empty(batch) and is_empty(no_rows(batch))
    assert not isinstance(no_rows(batch), NoRows)


def test_batches_whose_rows_nobody_knows():
    words = {"text": ["one", "two"]}
    assert not is_empty(words) and not is_empty(torch.tensor(1.0)) and not is_empty(object())
    assert is_empty(no_rows(words)) and is_empty(no_rows(object()))


def test_training_needs_tensors_where_a_rank_has_no_batch():
    trainer = of_ranks(Trainer(gpt2(), arguments()))
    windows = Windows(trainer, [NoRows()], SimpleNamespace())
    with pytest.raises(
        TypeError, match=r"loader has no batch where others have one, and no tensor.*Return tensors from"
    ):
        next(windows._micro(0, 0))


# --- the model and Ctrl-C -----------------------------------------------------------------------------------------


class Counts(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs): ...

    def on_save(self, args, state, control, model, **kwargs): ...


def test_callbacks_that_take_a_model_without_values_are_reported(caplog):
    trainer = of_ranks(Trainer(gpt2(), arguments(), callbacks=[Counts(), EarlyStoppingCallback()]))
    _parameters.warn_of_callbacks(trainer)
    assert not caplog.records
    trainer._trainfn.released = True
    with caplog.at_level(logging.WARNING, "trainfn"):
        for _ in range(2):
            _parameters.warn_of_callbacks(trainer)
    (record,) = caplog.records
    match = r"callbacks=\[Counts\]\): on_step_end, on_save take `model`.*NaN in.*`with trainer.whole_model\(\) as"
    assert re.search(match, record.message)


def test_the_whole_model_of_one_process_is_the_model():
    trainer = Trainer(gpt2(), arguments())
    with trainer.whole_model() as model, trainer.whole_model():
        assert model is trainer.model


def test_ctrl_c_is_held_by_the_outermost_block():
    with tfn.process.uninterrupted() as outer:
        with tfn.process.uninterrupted() as inner:
            assert inner is outer
            os.kill(os.getpid(), signal.SIGINT)
        assert outer.arrived
        with pytest.raises(KeyboardInterrupt), tfn.process.uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
    with tfn.process.uninterrupted() as other:
        assert other is not outer and not other.arrived


def test_ctrl_c_after_the_last_step_ends_all_ranks():
    with pytest.raises(KeyboardInterrupt), tfn.process.Requests(TWO.ranks):
        os.kill(os.getpid(), signal.SIGINT)
    with tfn.process.Requests(TWO.ranks):
        pass


# --- launchers ----------------------------------------------------------------------------------------------------


def run(*command, cwd, **variables):
    variables = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", **variables}
    return printed(*command, timeout=170, cwd=cwd, **variables)


@pytest.mark.slow
def test_a_script_by_accelerate_launch(tmp_path):
    """`run_glue.py` with the documentation's FSDP configuration, on two processes, against one."""
    write_all(tmp_path)
    config = adapted("fsdp", tmp_path)
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"mixed_precision": "no"}))
    command = [str(ROOT / "examples/pytorch/text-classification/run_glue.py"), *shlex.split(
        "--model_name_or_path google-bert/bert-base-cased --max_seq_length 16 --num_train_epochs 1 --use_cpu"
        " --disable_tqdm true --task_name mrpc --do_train --do_eval --do_predict --learning_rate 5e-3"
        " --max_predict_samples 7 --optim sgd")]  # fmt: skip
    run(*command, "--per_device_train_batch_size", "16", "--output_dir", "one", cwd=tmp_path)
    printed = run(
        *("-m", "accelerate.commands.launch", "--config_file", str(config), *command),
        *("--per_device_train_batch_size", "8", "--output_dir", "two"),
        cwd=tmp_path,
        ACCELERATE_USE_CPU="true",
    )
    assert printed.count("***** train metrics *****") == printed.count("***** eval metrics *****") == 1
    one, two = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two"))
    for name in ("train_loss", "eval_loss", "eval_accuracy", "eval_f1", "predict_loss", "train_samples", "epoch"):
        assert one.get(name) == pytest.approx(two.get(name), abs=1e-6), name
    predictions = [(tmp_path / name / "predict_results_mrpc.txt").read_text() for name in ("one", "two")]
    assert predictions[0] == predictions[1]
    for name in ("one", "two"):
        BertForSequenceClassification.from_pretrained(tmp_path / name)
    assert {p.name for p in (tmp_path / "one").iterdir()} == {p.name for p in (tmp_path / "two").iterdir()}


@takes_long
@pytest.mark.slow
def test_the_functional_script_by_torchrun(tmp_path):
    """Two processes go on where one was, and end where it ends."""
    write_all(tmp_path)
    command = [str(ROOT / "examples/pytorch/summarization/run_summarization_no_trainer.py"), *shlex.split(
        "--model_name_or_path google-t5/t5-small --dataset_name cnn_dailymail --max_train_samples 13"
        " --max_eval_samples 5 --max_target_length 6 --gradient_accumulation_steps 2 --learning_rate 1e-2"
        " --max_train_steps 4 --checkpointing_steps 2")]  # fmt: skip
    run(*command, "--per_device_train_batch_size", "4", "--output_dir", "one", cwd=tmp_path)
    shutil.copytree(tmp_path / "one/checkpoint-2", tmp_path / "two/checkpoint-2")
    printed = run(*torchrun(2), *command, "--per_device_train_batch_size", "2", "--output_dir", "two", cwd=tmp_path)
    assert printed.count("resuming from two/checkpoint-2") == printed.count('"eval_rouge1"') == 1
    one, two = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two"))
    # The losses differ by one unit in the last place, 2e-7. An error of 2e-7 in all parameters before every step moves
    # them by 8e-7, whatever the first weights: more than 1e-5 is no order of additions. Arithmetic in 16 bits is 1e-4.
    assert one == pytest.approx(two, abs=1e-5)


NOTEBOOK = """
from accelerate import notebook_launcher

def train():
    import torch
    from tests.hf.models import gpt2, tokens
    from trainfn import Trainer, TrainingArguments

    args = TrainingArguments("out", use_cpu=True, max_steps=2, disable_tqdm=True, save_strategy="no",
                             fsdp="full_shard", per_device_train_batch_size=2)
    with args.main_process_first():
        rows = tokens(8)
    trainer = Trainer(gpt2(), args, train_dataset=rows)
    trainer.train()
    assert trainer.args.world_size == 2
    assert not any(p.isnan().any() for p in trainer.model.parameters())
    print(f"rank {args.process_index} is done", flush=True)

notebook_launcher(train, num_processes=2)
"""


@takes_long
@pytest.mark.slow
def test_a_notebook(tmp_path):
    (tmp_path / "cells.py").write_text(NOTEBOOK)
    printed = run("cells.py", cwd=tmp_path, ACCELERATE_USE_CPU="true")
    assert "rank 0 is done" in printed and "rank 1 is done" in printed
    assert printed.count("train_runtime") == 1


def test_states_of_one_process_are_left_alone():
    trainer = Trainer(bert(BertForSequenceClassification), arguments())
    before = [p.data_ptr() for p in trainer.model.parameters()]
    with _parameters.whole(trainer), _parameters.plain(trainer):
        _parameters.see(trainer)
    assert [p.data_ptr() for p in trainer.model.parameters()] == before
