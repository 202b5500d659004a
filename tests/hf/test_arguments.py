"""TrainingArguments: transformers' fields, the old names, any machine, no side effects, and what is refused."""

import ast
import copy
import dataclasses
import inspect
import json
import logging
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from transformers import HfArgumentParser

from trainfn import hf
from trainfn.hf._arguments import _support
from trainfn.hf._arguments._legacy import RULES
from trainfn.hf._arguments._support import IGNORED, REFUSED, USED, check_supported
from trainfn.hf._arguments._training import Seq2SeqTrainingArguments, TrainingArguments
from trainfn.hf._installed import RENAMED, completed

PAIRS = [
    (TrainingArguments, transformers.TrainingArguments),
    (Seq2SeqTrainingArguments, transformers.Seq2SeqTrainingArguments),
]
BOTH_NAMES = {*RENAMED, *RENAMED.values()}
STATED = {"log_level": "info"}  # the defaults that differ
FIELDS = sorted({f.name for ours, _ in PAIRS for f in dataclasses.fields(ours)})


def arguments(**kwargs):
    return TrainingArguments(**{"use_cpu": True, **kwargs})


def parse(line, cls=TrainingArguments):
    return HfArgumentParser(cls).parse_args_into_dataclasses(["--use_cpu", *line.split()])[0]


# ---------------------------------------------------------------------------------------------- transformers' fields


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_every_field_of_transformers_with_its_default(ours, theirs):
    mine = {f.name: f for f in dataclasses.fields(ours)}
    for field in dataclasses.fields(theirs):
        assert mine[field.name].default == STATED.get(field.name, field.default), field.name
        assert mine[field.name].default_factory == field.default_factory, field.name
        assert (mine[field.name].init, mine[field.name].kw_only) == (field.init, field.kw_only), field.name
    assert set(mine) - {f.name for f in dataclasses.fields(theirs)} - BOTH_NAMES == {"legacy_arguments", "data_order"}
    assert issubclass(ours, theirs)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_completed_like_transformers(ours, theirs):
    given = {"use_cpu": True, "eval_strategy": "steps", "logging_steps": 7, "load_best_model_at_end": True}
    given |= {"save_steps": 14, "metric_for_best_model": "accuracy", "lr_scheduler_kwargs": "{}", "fp16": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(**given).to_dict() | STATED
    made = ours(**given).to_dict()
    expected["accelerator_config"]["use_configured_state"] = False  # they take it out of the user's object
    twins = {name: made[name] for name in BOTH_NAMES}  # of which an older or a newer transformers has one
    assert made == twins | expected


def test_positional_output_dir_and_the_placeholder_of_the_documentation():
    assert TrainingArguments("here", use_cpu=True).output_dir == "here"
    assert TrainingArguments(..., neftune_noise_alpha=0.1, use_cpu=True).output_dir == "trainer_output"


@pytest.mark.parametrize("ours", [TrainingArguments, Seq2SeqTrainingArguments])
def test_round_trips(ours):
    args = ours(use_cpu=True, eval_strategy="epoch", hub_token="secret", torch_compile_mode="default", warmup_steps=0.1)
    back = ours(**json.loads(args.to_json_string()))
    assert back.to_dict() == args.to_dict()
    assert back.hub_token is None  # masked, and the mask is no token
    assert "secret" not in repr(args) + str(args) + args.to_json_string()
    assert "legacy_arguments" not in args.to_dict()
    assert copy.deepcopy(args) == args == dataclasses.replace(args)
    assert dataclasses.replace(args, learning_rate=1.0).learning_rate == 1.0


def test_the_setters_work():
    args = arguments().set_training(learning_rate=1e-3, batch_size=4, num_epochs=2).set_evaluate("epoch", batch_size=2)
    args = args.set_optimizer("sgd", learning_rate=0.1).set_lr_scheduler("cosine", warmup_steps=3).set_logging(steps=5)
    args = args.set_save("epoch").set_push_to_hub("user/name").set_dataloader(train_batch_size=3, sampler_seed=1)
    assert (args.optim.value, args.lr_scheduler_type.value, args.data_seed) == ("sgd", "cosine", 1)
    assert (args.per_device_train_batch_size, args.train_batch_size, args.hub_model_id) == (3, 3, "user/name")


def test_the_signature_is_that_of_init():
    assert list(inspect.signature(TrainingArguments).parameters)[:2] == ["output_dir", "per_device_train_batch_size"]


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(TypeError, match=r"`TrainingArguments\(learning_rat=1\)`.*Did you mean `learning_rate`\?"):
        arguments(learning_rat=1)
    with pytest.raises(TypeError, match=r"no such argument. Leave it out"):
        arguments(qqqq=1)
    with pytest.raises(AttributeError, match=r"no argument 'learning_rat'. Did you mean `learning_rate`\?"):
        _ = arguments().learning_rat


# ----------------------------------------------------------------------------------------------------- side effects


def world():
    return {
        "env": dict(os.environ),
        "rng": torch.get_rng_state().tolist(),
        "accelerate": (dict(AcceleratorState._shared_state), dict(PartialState._shared_state)),
        "verbosity": transformers.logging.get_verbosity(),
        "level": logging.getLogger().level,
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "processes": torch.distributed.is_available() and torch.distributed.is_initialized(),
    }


@pytest.mark.parametrize("kwargs", [{}, {"torch_compile": True}, {"full_determinism": True, "tf32": False}])
def test_making_arguments_changes_nothing_else(kwargs, monkeypatch, tmp_path, untouched_rng):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PartialState._shared_state, "theirs", 1)  # transformers would reset it
    before = world()
    args = arguments(log_level="error", seed=7, **kwargs)
    _ = args.device, args.n_gpu, args.world_size, args.should_log, args.get_process_log_level()
    assert world() == before
    assert not list(tmp_path.iterdir())


def test_tf32_lasts_as_long_as_a_run():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        for tf32, inside in ((None, "medium"), (True, "high"), (False, "highest")):
            with arguments(tf32=tf32).matmul_precision():
                assert torch.get_float32_matmul_precision() == inside
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without an accelerator")
def test_bf16_on_a_cpu_is_an_autocast_with_one_warning():
    with pytest.warns(UserWarning, match=r"bf16=True.*no accelerator here.*Write `use_cpu=True`.*or `bf16=False`") as w:
        args = TrainingArguments(bf16=True)
    assert [x.filename for x in w] == [__file__]
    assert (args.bf16, args.mixed_precision, args.device) == (True, "bf16", torch.device("cpu"))
    assert arguments(bf16=True, bf16_full_eval=True).bf16_full_eval  # meant, so not a word
    with pytest.raises(ValueError, match=r"fp16=True, bf16=True.*Write `bf16=True`"):
        arguments(bf16=True, fp16=True)


def test_compile_is_turned_on_by_its_options():
    assert arguments(torch_compile_mode="max-autotune").torch_compile_backend == "inductor"
    assert arguments(torch_compile_backend="aot_eager").torch_compile
    assert not arguments().torch_compile


# ---------------------------------------------------------------------------------------------------------- log level


@pytest.mark.parametrize(
    ("env", "options", "level"),
    [
        ({}, "", logging.INFO),
        ({}, "--log_level passive", None),
        ({}, "--log_level warning --log_level_replica error", logging.WARNING),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, "", logging.WARNING),
        ({"RANK": "1", "LOCAL_RANK": "1"}, "--log_level warning --log_level_replica error", logging.ERROR),
        ({"RANK": "1", "LOCAL_RANK": "1"}, "--log_level_replica passive", None),
        # The first process of the second machine.
        ({"RANK": "2", "LOCAL_RANK": "0"}, "--log_level warning --log_level_replica error", logging.WARNING),
        ({"RANK": "2", "LOCAL_RANK": "0"}, "--log_level debug --log_on_each_node 0", logging.WARNING),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "--log_level debug --log_on_each_node 0", logging.DEBUG),
        ({"RANK": "0"}, "--log_level error --log_level_replica error --log_on_each_node 0", logging.ERROR),
    ],
)
def test_log_level_of_each_process(env, options, level, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    expected = transformers.logging.get_verbosity() if level is None else level
    assert parse(options).get_process_log_level() == expected


def test_main_process_first_is_nothing_for_one_process():
    with arguments().main_process_first(desc="map"):
        pass


# ----------------------------------------------------------------------------------------------------------- old names

OLD = [  # (old, on a command line, the field of today, its value)
    ({"evaluation_strategy": "epoch"}, "--evaluation_strategy epoch", "eval_strategy", "epoch"),
    ({"push_to_hub_model_id": "m"}, "--push_to_hub_model_id m", "hub_model_id", "m"),
    ({"push_to_hub_organization": "o"}, "--push_to_hub_organization o", "hub_model_id", "o/trainer_output"),
    ({"push_to_hub_token": "t"}, "--push_to_hub_token t", "hub_token", "t"),
    ({"per_gpu_train_batch_size": 3}, "--per_gpu_train_batch_size 3", "per_device_train_batch_size", 3),
    ({"per_gpu_eval_batch_size": 3}, "--per-gpu-eval-batch-size 3", "per_device_eval_batch_size", 3),
    ({"no_cuda": True}, "--no_cuda", "use_cpu", True),
    ({"no_cuda": True}, "--no-cuda true", "use_cpu", True),
    ({"warmup_ratio": 0.1}, "--warmup_ratio 0.1", "warmup_steps", 0.1),
    ({"group_by_length": True}, "--group_by_length", "train_sampling_strategy", "group_by_length"),
    ({"group_by_length": False}, "--group_by_length False", "train_sampling_strategy", "random"),
    ({"adafactor": True}, "--adafactor", "optim", "adafactor"),
    ({"include_inputs_for_metrics": True}, "--include_inputs_for_metrics 1", "include_for_metrics", ["inputs"]),
    ({"include_tokens_per_second": True}, "--include_tokens_per_second", "include_num_input_tokens_seen", "all"),
    ({"evaluate_during_training": True}, "--evaluate_during_training", "eval_strategy", "steps"),
    ({"torchdynamo": "aot_eager"}, "--torchdynamo aot_eager", "torch_compile_backend", "aot_eager"),
    ({"xpu_backend": "gloo"}, "--xpu_backend gloo", "ddp_backend", "gloo"),
    ({"fsdp_min_num_params": 9}, "--fsdp_min_num_params 9", "fsdp_config", {"min_num_params": 9}),
    (
        {"fsdp_transformer_layer_cls_to_wrap": "B"},
        "--fsdp_transformer_layer_cls_to_wrap B",
        *("fsdp_config", {"transformer_layer_cls_to_wrap": "B"}),
    ),
    ({"overwrite_output_dir": True}, "--overwrite_output_dir", "overwrite_output_dir", True),
    ({"logging_dir": "logs"}, "--logging_dir logs", "logging_dir", "logs"),
    ({"save_safetensors": True}, "--save_safetensors", "save_safetensors", True),
    ({"tpu_num_cores": 8}, "--tpu_num_cores 8", "tpu_num_cores", 8),
    ({"half_precision_backend": "auto"}, "--half_precision_backend auto", "half_precision_backend", "auto"),
    ({"fp16_backend": "auto"}, "--fp16_backend auto", "fp16_backend", "auto"),
    ({"fp16_opt_level": "O1"}, "--fp16_opt_level O1", "fp16_opt_level", "O1"),
    *(
        ({name: True}, f"--{name}", name, True)
        for name in ("use_mps_device", "use_ipex", "jit_mode_eval", "tpu_metrics_debug", "use_legacy_prediction_loop")
    ),
    *(({name: "x"}, f"--{name} x", name, "x") for name in ("mp_parameters", "ray_scope")),
    ({"past_index": 1}, "--past_index 1", "past_index", 1),
]


@pytest.mark.parametrize(("old", "line", "field", "value"), OLD, ids=lambda x: x if isinstance(x, str) else "")
def test_old_names_in_python_and_on_the_command_line(old, line, field, value):
    (name,) = old
    for make in (
        lambda: TrainingArguments(**old, **({} if "no_cuda" in old else {"use_cpu": True})),
        lambda: parse(line),
    ):
        with pytest.warns(DeprecationWarning, match=rf"TrainingArguments\({name}=.*(write `|leave it out)") as caught:
            args = make()
        assert [w.filename for w in caught] == [__file__]  # one, and it points at the user's line
        found = getattr(args, field)
        assert getattr(found, "value", found) == value
        assert getattr(args, name) == (getattr(args, RULES[name].new) if RULES[name].new else old[name])


def test_every_old_name_is_tested():
    assert {name for old, *_ in OLD for name in old} | {"dispatch_batches", "split_batches"} == set(RULES)


@pytest.mark.parametrize("name", ["dispatch_batches", "split_batches"])
def test_old_names_that_became_keys(name):
    with pytest.warns(DeprecationWarning, match=rf"write `accelerator_config=\{{'{name}': True\}}`"):
        assert getattr(arguments(**{name: True}).accelerator_config, name)


def test_old_names_together():
    with pytest.warns(DeprecationWarning) as caught:
        args = arguments(push_to_hub_model_id="m", push_to_hub_organization="o", evaluation_strategy="no")
    assert args.hub_model_id == "o/m"
    assert len(caught) == 3
    assert arguments(evaluation_strategy=None, push_to_hub_token=None).hub_token is None  # their "not given"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_old_and_a_new_name_that_disagree():
    message = (
        r"`TrainingArguments\(evaluation_strategy='epoch', eval_strategy='no'\)`.*Write `eval_strategy='no'` alone"
    )
    with pytest.raises(ValueError, match=message):
        arguments(eval_strategy="no", evaluation_strategy="epoch")
    with pytest.raises(ValueError, match="the two say different things"):
        parse("--eval_strategy steps --evaluation_strategy epoch")
    assert arguments(eval_strategy="epoch", evaluation_strategy="epoch").eval_strategy.value == "epoch"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_values_that_cannot_be_had(capsys):
    with pytest.raises(ValueError, match=r"warmup_ratio=1.5.*in \[0, 1\). Write `warmup_steps=0.1`"):
        arguments(warmup_ratio=1.5)
    with pytest.raises(ValueError, match=r"save_safetensors=False.*Leave it out"):
        arguments(save_safetensors=False)
    for line, error in (
        ("--tpu_num_cores many", "argument --tpu_num_cores: 'many' is not a valid int"),
        ("--no_cuda maybe", "argument --no_cuda: 'maybe' is not a valid bool"),
        ("--legacy_arguments x", "--legacy_arguments is not an option itself"),
    ):
        with pytest.raises(SystemExit):
            parse(line)
        assert error in capsys.readouterr().err


def test_a_command_line_without_old_names_is_read_as_by_transformers(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = parse("--output_dir x --learning_rate 1e-3 --no_dataloader_pin_memory --lr_scheduler_kwargs {} --bf16")
    assert (args.output_dir, args.learning_rate, args.dataloader_pin_memory, args.bf16) == ("x", 1e-3, False, True)
    with pytest.raises(SystemExit):
        HfArgumentParser(TrainingArguments).parse_args(["-h"])
    assert "evaluation_strategy" not in capsys.readouterr().out


@dataclass
class MyArguments(TrainingArguments):
    """A user's own, with a field that has an old name."""

    logging_dir: str = "mine"
    alpha: float = 1.0


def test_a_users_dataclass_on_top():
    with pytest.warns(DeprecationWarning, match="evaluation_strategy"):
        args = MyArguments(use_cpu=True, alpha=2.0, evaluation_strategy="epoch")
    assert (args.logging_dir, args.alpha, args.eval_strategy.value) == ("mine", 2.0, "epoch")
    assert parse("--logging_dir there --alpha 3", MyArguments).logging_dir == "there"
    with pytest.warns(DeprecationWarning, match="group_by_length"):
        assert parse("--group_by_length", MyArguments).train_sampling_strategy == "group_by_length"


def test_both_names_of_activation_checkpointing_are_fine():
    args = arguments(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert args.activation_checkpointing and args.gradient_checkpointing
    assert args.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert not arguments().gradient_checkpointing
    new = arguments(activation_checkpointing=True, activation_checkpointing_kwargs={"every_n_layers": 2})
    assert new.gradient_checkpointing and new.gradient_checkpointing_kwargs == {"every_n_layers": 2}
    line = parse('--activation_checkpointing --activation_checkpointing_kwargs {"every_n_layers":2}')
    assert line.activation_checkpointing and line.gradient_checkpointing_kwargs == {"every_n_layers": 2}
    assert not parse("--activation_checkpointing false").gradient_checkpointing


@pytest.mark.parametrize("renamed", [{"flag": "later"}, {"before": "flag"}, {"flag": "later", "texts": "jsons"}])
def test_a_renamed_field_has_both_names_in_every_transformers(renamed):
    @dataclass
    class Theirs:
        _VALID_DICT_FIELDS: ClassVar = ["texts"]
        flag: bool = dataclasses.field(default=False, metadata={"help": "of theirs"})
        texts: dict | str | None = None

    made = completed(Theirs, renamed)
    lacking = ({*renamed, *renamed.values()}) - {"flag", "texts"}
    assert {f.name for f in dataclasses.fields(made)} == {"flag", "texts"} | lacking
    assert all(getattr(made(), name) is None for name in lacking) and issubclass(made, Theirs)
    assert ("jsons" in made._VALID_DICT_FIELDS) == ("jsons" in lacking)
    switch = next(iter(lacking - {"jsons"}))
    assert getattr(HfArgumentParser(made).parse_args_into_dataclasses([f"--{switch}"])[0], switch) is True
    assert completed(made, renamed) is made


def test_a_rule_for_a_field_that_is_not_there_is_skipped(monkeypatch):
    rule = _support.Refused("of_a_newer_transformers", lambda value, args: True, "it is not there", "Leave it out")
    monkeypatch.setattr(_support, "REFUSED", (rule,))
    monkeypatch.setattr(_support, "IGNORED", {"of_a_newer_transformers": "it is not there"})
    check_supported(arguments())
    assert arguments(report_to=None).report_to == []


# ------------------------------------------------------------------------------------------------------- every field

NOT_DEFAULT = {  # a value for every field that is refused or ignored, and what the message says
    "fsdp_config": ({"min_num_params": 1}, "`fsdp` is not given.*Write `fsdp=True`"),
    "tf32": (True, "not an NVIDIA GPU.*Leave `tf32` out"),
    "torch_empty_cache_steps": (4, "plans its memory.*Leave `torch_empty_cache_steps` out"),
    "dataloader_persistent_workers": (True, "trainfn.data"),
    "dataloader_multiprocessing_context": ("spawn", "trainfn.data"),
    "dataloader_in_order": (False, "function of the seed"),
    "sortish_sampler": (True, "train_sampling_strategy"),
    "optim_target_modules": (["attn"], "GaLore.*Leave `optim_target_modules` out"),
    "debug": ("underflow_overflow", "Leave `debug` out"),
    "skip_memory_metrics": (False, "Leave it out"),
    "average_tokens_across_devices": (False, "all tokens of all devices"),
    "ddp_find_unused_parameters": (True, "no DistributedDataParallel"),
    "ddp_bucket_cap_mb": (25, "no DistributedDataParallel"),
    "ddp_broadcast_buffers": (True, "no DistributedDataParallel"),
    "ddp_static_graph": (True, "no DistributedDataParallel"),
    "trackio_static_space_id": ("user/frozen", r"trackio\.freeze"),
    "eval_use_gather_object": (True, "of any shape"),
    "accelerator_config": ({"even_batches": False}, "split_batches"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_used_or_refused_or_ignored_aloud(field):
    """No field is silently without effect."""
    if field not in NOT_DEFAULT:
        assert field in USED and field not in IGNORED
        return
    value, message = NOT_DEFAULT[field]
    args = Seq2SeqTrainingArguments(use_cpu=True, **{field: value})
    if field in IGNORED:
        with pytest.warns(UserWarning, match=rf"change nothing here.*`{field}`.*{message}.*Leave") as caught:
            check_supported(args)
        assert len(caught) == 1
    else:
        with pytest.raises(ValueError, match=rf"`Seq2SeqTrainingArguments\({field}=.*{message}"):
            check_supported(args)


def mentions(file):
    """The names that a file reads: attributes, and strings for `getattr`."""
    nodes = [*ast.walk(ast.parse((Path(hf.__file__).parent / file).read_text()))]
    documented = {id(each.value) for each in nodes if isinstance(each, ast.Expr)}
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return read | names | {n.value for n in nodes if isinstance(n, ast.Constant) and id(n) not in documented}


@pytest.mark.parametrize("field", [field for field, reader in USED.items() if ".py" in reader])
def test_the_file_that_the_map_names_reads_the_field(field):
    file, _, alias = USED[field].partition(" as ")
    assert (alias or field) in mentions(file)


@pytest.mark.parametrize("field", [field for field, reader in USED.items() if ".py" not in reader])
def test_the_other_fields_are_read_by_no_file(field):
    root = Path(hf.__file__).parent
    files = [file for file in root.rglob("*.py") if file.parent.name != "_arguments"]
    assert not [file for file in files if re.search(rf"\bargs\.{field}\b", file.read_text())]


def test_the_table_names_no_field_that_is_not_there():
    assert {*USED, *IGNORED, *(rule.field for rule in REFUSED)} == set(FIELDS)
    assert not set(USED) & set(IGNORED)


def test_values_that_are_refused_of_fields_that_are_used():
    with pytest.raises(ValueError, match=r"moves rows between processes.*Write `train_sampling_strategy="):
        check_supported(arguments(train_sampling_strategy="batch_rebalance"))
    with pytest.raises(ValueError, match=r"takes an Accelerator of yours.*Leave the key out"):
        check_supported(arguments(accelerator_config={"use_configured_state": True}))
    with pytest.raises(ValueError, match=r"optim='apollo_adamw'.*not implemented"):
        check_supported(arguments(optim="apollo_adamw"))
    with pytest.raises(ValueError, match="momentun"):
        check_supported(arguments(optim="sgd", optim_args="momentun=0.9"))
    check_supported(arguments(tf32=False, train_sampling_strategy="group_by_length"))
    with pytest.raises(ValueError, match=r"deepspeed=\{'a': 1\}.*each of them says how.*Leave the others out"):
        check_supported(arguments(deepspeed={"a": 1}, fsdp=True))


def test_one_warning_for_all_that_is_ignored():
    with pytest.warns(UserWarning, match="`ddp_bucket_cap_mb`.*`ddp_static_graph`") as caught:
        check_supported(arguments(ddp_bucket_cap_mb=25, ddp_static_graph=True))
    assert len(caught) == 1


def test_transformers_own_arguments_are_checked_too():
    with pytest.raises(ValueError, match=r"`TrainingArguments\(debug="):
        check_supported(transformers.TrainingArguments(use_cpu=True, debug="underflow_overflow"))
    check_supported(transformers.TrainingArguments(use_cpu=True))
