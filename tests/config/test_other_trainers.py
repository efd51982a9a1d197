"""Names of other trainers are answered with the setting here, and what is answered can be pasted."""

from __future__ import annotations

import importlib.metadata
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest

from dtrain.commands.arguments import parse
from dtrain.config.error_messages import models_in
from dtrain.config.load import load_config
from dtrain.config.other_trainers import FLAGS, RENAMED, SAME_AS, WITHOUT_SETTING, Translation, canonical, translate
from dtrain.config.schema import Config
from dtrain.config.task import TaskSettings
from dtrain.errors import ConfigError

TASKS = [name for task in models_in(TaskSettings) for name in get_args(task.model_fields["name"].annotation)]

CONVERTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "per_device_train_batch_size": ({"gradient_accumulation_steps": 4}, {"train.global_batch_size": 32}),
    "gradient_accumulation_steps": (
        {"per_device_train_batch_size": "2"},
        {"train.micro_batch_size": 2, "train.global_batch_size": 16},
    ),
    "num_train_epochs": ({}, {"train.epochs": 8}),
    "max_steps": ({}, {"train.max_steps": 8}),
    "max_grad_norm": ({}, {"optim.max_grad_norm": 8}),
    "adam_beta1": ({"adam_beta1": "0.8"}, {"optim.betas": [0.8, 0.999]}),
    "adam_beta2": ({"adam_beta2": 0.95, "adam_beta1": 0.8}, {"optim.betas": [0.8, 0.95]}),
    "optim": ({"optim": "adamw_torch_fused"}, {"optim.name": "adamw"}),
    "warmup_steps": ({}, {"schedule.warmup_steps": 8}),
    "lr_scheduler_type": ({"lr_scheduler_type": "cosine_with_restarts"}, {"schedule.name": "cosine_with_restarts"}),
    "fp16": ({"fp16": True}, {"engine.precision": "fp16"}),
    "bf16": ({"bf16": "True"}, {"engine.precision": "bf16"}),
    "torch_dtype": ({"torch_dtype": "bfloat16"}, {"engine.precision": "bf16"}),
    "deepspeed": ({"deepspeed": "ds_zero2.json"}, {"engine.zero_stage": 2}),
    "fsdp": ({"fsdp": "full_shard"}, {"engine.zero_stage": 3}),
    "eval_strategy": ({"eval_strategy": "steps", "eval_steps": 50}, {"train.eval_every": 50}),
    "eval_steps": ({}, {"train.eval_every": 8}),
    "save_strategy": ({"save_strategy": "epoch"}, {"checkpoint.every": "epoch"}),
    "save_steps": ({}, {"checkpoint.every": 8}),
    "resume_from_checkpoint": (
        {"resume_from_checkpoint": "out/checkpoint-3"},
        {"checkpoint.resume": "out/checkpoint-3"},
    ),
    "load_best_model_at_end": (
        {"load_best_model_at_end": True, "metric_for_best_model": "eval_f1"},
        {"evaluation.best": {"metric": "f1"}},
    ),
    "metric_for_best_model": ({"metric_for_best_model": "accuracy"}, {"evaluation.best": {"metric": "accuracy"}}),
    "greater_is_better": ({"greater_is_better": False}, {"evaluation.best": {"metric": "loss", "mode": "min"}}),
    "early_stopping_patience": ({}, {"train.early_stopping": 8}),
    "train_file": (
        {"train_file": "d/t.csv", "validation_file": "d/v.csv"},
        {"data.path": "d", "data.splits.train": "t.csv", "data.splits.validation": "v.csv"},
    ),
    "validation_file": (
        {"train_file": "d/t.csv", "validation_file": "/e/v.csv"},
        {"data.path": "d", "data.splits.train": "t.csv", "data.splits.validation": "/e/v.csv"},
    ),
    "test_file": ({"train_file": "t.csv", "test_file": "x.csv"}, {"data.path": ".", "data.splits.test": "x.csv"}),
    "validation_split_percentage": ({}, {"data.validation_fraction": 0.08}),
    "task_name": ({"task_name": "own_task"}, {"data.name": "own_task"}),
    "output_dir": ({"output_dir": "out/mrpc"}, {"run.output_dir": "out", "run.name": "mrpc"}),
    "report_to": ({"report_to": "tensorboard"}, {"tracking.tensorboard": True}),
    "logging_strategy": ({}, {}),
}
"""Name -> further values (8 if its own is not among them), and some of the settings that must be answered."""

SAMPLES: dict[str, Any] = {
    "learning_rate": 1e-4,
    "warmup_ratio": 0.1,
    "weight_decay": 0.1,
    "momentum": 0.5,
    "label_smoothing_factor": 0.1,
    "lora_dropout": 0.1,
    "lora_target_modules": ["query", "value"],
    "run_name": "mine",
    "overwrite_output_dir": True,
    "mlm_probability": 0.2,
    "zero_stage": 2,
    **dict.fromkeys(FLAGS, True),
    **dict.fromkeys(
        ("model_name_or_path", "tokenizer_name", "attn_implementation", "cache_dir", "source_prefix"), "text"
    ),
    **dict.fromkeys(
        ("dataset_name", "dataset_config_name", "dataset_text_field", "text_column", "text_column_name"), "text"
    ),
    **dict.fromkeys(("label_column_name", "label_column"), "text"),
}
"""A value of each name that is not a whole number."""


def refusal(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    return str(caught.value).splitlines()


def as_overrides(translation: Translation) -> list[str]:
    return [
        f"{name}={value if isinstance(value, str) else to_flow(value)}" for name, value in translation.settings.items()
    ]


def to_flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {to_flow(inner)}" for name, inner in value.items()) + "}"
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if not isinstance(value, list)
        else str(value)
    )


def loads(overrides: list[str]) -> Config:
    """Returns the config with the first task that has these settings."""
    errors = []
    base = [] if any(text.startswith("model.name") for text in overrides) else ["model.name_or_path=some/model"]
    for task in TASKS:
        further = ["task.targets=[x]"] if "targets" in str(task_fields(task)) else []
        try:
            return load_config(None, [f"task.name={task}", *further, *base, *overrides])
        except ConfigError as error:
            errors.append(str(error))
    raise AssertionError("\n".join(errors))


def task_fields(name: str) -> list[str]:
    return [
        field
        for task in models_in(TaskSettings)
        if name in get_args(task.model_fields["name"].annotation)
        for field in task.model_fields
    ]


@pytest.mark.parametrize("name", [*RENAMED, *CONVERTED])
def test_the_answer_to_each_name_is_settings_that_load(name: str) -> None:
    further, expected = CONVERTED.get(name, ({}, {}))
    translation = translate(name, {name: SAMPLES.get(name, 8), **further})

    assert translation is not None
    assert expected.items() <= translation.settings.items()
    if name in RENAMED:
        assert translation.settings == {RENAMED[name]: SAMPLES.get(name, 8)}
    assert translation.settings or translation.note
    extra = {"early_stopping_patience": ["evaluation.best={metric: loss}"]}.get(name, [])
    loads([*extra, *as_overrides(translation)])


def test_every_other_spelling_has_an_answer_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    for name in {*SAME_AS, *RENAMED, *CONVERTED, *WITHOUT_SETTING}:
        assert translate(name, {}) is not None, name
        assert translate(name.replace("_", "-"), {}) is not None, name
    assert {canonical(name) for name in SAME_AS} <= {*RENAMED, *CONVERTED, *WITHOUT_SETTING}
    assert {*RENAMED, *CONVERTED, *WITHOUT_SETTING}.isdisjoint(SAME_AS.keys())
    assert {*RENAMED, *CONVERTED, *WITHOUT_SETTING} >= FLAGS


def test_a_command_line_of_hugging_faces_examples_is_answered_with_one_to_paste() -> None:
    lines = refusal(
        *("--model_name_or_path", "bert-base-cased", "--do_train", "--max_seq_length=128", "--fp16", "--learning-rate"),
        *(
            "2e-5",
            "--per_device_train_batch_size",
            "16",
            "--gradient_accumulation_steps",
            "2",
            "--num_train_epochs",
            "3.0",
        ),
        *(
            "--output_dir",
            "/tmp/out one/",
            "--seed",
            "7",
            "--task_name",
            "mrpc",
            "weight_decay=0.1",
            "train.log_every=3",
        ),
    )

    assert lines[0] == (
        "command line: --model_name_or_path bert-base-cased is not an option here. Write model.name_or_path=bert-base-cased."
    )
    assert lines[1] == "command line: --do_train is not an option here. Remove it: train is the default command."
    assert "16 per process x 2 accumulated = 32 per step on one process; on N processes write N times 32" in lines[5]
    words = shlex.split(lines[-1].removeprefix("Together: "))
    assert words == [
        *(
            "model.name_or_path=bert-base-cased",
            "data.max_length=128",
            "engine.precision=fp16",
            "optim.learning_rate=2e-5",
        ),
        *("train.micro_batch_size=16", "train.global_batch_size=32", "train.epochs=3", "run.output_dir=/tmp"),
        *("run.name=out one", "run.seed=7", "--config", "configs/mrpc.yaml", "optim.weight_decay=0.1"),
    ]


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["--lr", "1e-4"], "--lr 1e-4 is not an option here. Write optim.learning_rate=1e-4."),
        (["--lr=1e-4", "train.epochs=3"], "--lr 1e-4 is not an option here. Write optim.learning_rate=1e-4."),
        (["learning_rate", "1e-4"], "learning_rate 1e-4 is not an option here. Write optim.learning_rate=1e-4."),
        (["train", "num_epochs", "2"], "num_epochs 2 is not an option here. Write train.epochs=2."),
        (["evaluate", "--fp16", "train.epochs=3"], "--fp16 is not an option here. Write engine.precision=fp16 (the"),
        (["--lr"], "--lr is not an option here. Write optim.learning_rate=VALUE."),
        (["--seed", "-1"], "--seed -1 is not an option here. Write run.seed=-1."),
        (["--fp16", "False"], "--fp16 False is not an option here. Write engine.precision=fp32"),
        (
            ["--num_train_epochs", "0.5"],
            "--num_train_epochs 0.5 is not an option here. Remove it: train.epochs is a whole",
        ),
        (
            ["--max_steps", "-1"],
            "--max_steps -1 is not an option here. Remove it: without train.max_steps, train.epochs",
        ),
        (["--run_name", "a b"], "--run_name a b is not an option here. Write 'run.name=a b'."),
        (["--max_grad_norm", "0"], "--max_grad_norm 0 is not an option here. Write optim.max_grad_norm=null."),
        (
            ["--nproc_per_node", "2"],
            "--nproc_per_node 2 is not an option here. Remove it: it is the launcher's: torchrun",
        ),
        (["--warmup_steps", "0.1"], "--warmup_steps 0.1 is not an option here. Write schedule.warmup_ratio=0.1."),
    ],
)
def test_an_option_of_another_trainer_is_answered_with_the_value(argv: list[str], answer: str) -> None:
    assert refusal(*argv)[0].startswith(f"command line: {answer}")


@pytest.mark.parametrize(
    "argv",
    [
        ["predict", "--text", "seed", "model.name_or_path=m"],
        ["predict", "--text=lr", "model.name_or_path=m"],
        ["--config", "seed"],
        ["--local_rank=0"],
        ["--local-rank", "0", "train.max_steps=3"],
        ["goodput", "output_dir"],
        ["model.name_or_path=lr"],
    ],
)
def test_texts_paths_and_dtrains_own_options_are_no_names_of_other_trainers(argv: list[str]) -> None:
    parse(argv)


def test_keys_of_a_file_are_answered_with_their_line_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        f"task: {{name: {TASKS[0]}}}\nper_device_train_batch_size: 8\ngradient_accumulation_steps: 4\ntrain:\n"
        "  num_train_epochs: 3\n  weight_decay: 0.1\ntraining_args:\n  save_steps: 100\noutput_dir: out/x\ndo_train: true\n"
    )

    with pytest.raises(ConfigError) as caught:
        load_config(path, ["lr=1e-3", "train.warmup_ratio=0.2"])

    batches = (
        "'micro_batch_size: 8' and 'global_batch_size: 32' under 'train:' (8 per process x 4 accumulated = 32 per step"
    )
    found = str(caught.value)
    for line in (
        f"{path}, line 2: per_device_train_batch_size is not a setting here. Write {batches}",
        f"{path}, line 3: gradient_accumulation_steps is not a setting here. Write {batches}",
        f"{path}, line 5: train.num_train_epochs is not a setting here. Write 'epochs: 3' under 'train:'.",
        f"{path}, line 6: train.weight_decay is not a setting here. Write 'weight_decay: 0.1' under 'optim:'.",
        f"{path}, line 8: training_args.save_steps is not a setting here. Write 'every: 100' under 'checkpoint:'.",
        f"{path}, line 9: output_dir is not a setting here. Write 'output_dir: out' and 'name: x' under 'run:' (",
        f"{path}, line 10: do_train is not a setting here. Remove it: train is the default command.",
        "command line: lr is not a setting here. Write optim.learning_rate=0.001.",
        "command line: train.warmup_ratio is not a setting here. Write schedule.warmup_ratio=0.2.",
    ):
        assert line in found


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--version"])

    assert (ended.value.code, capsys.readouterr().out) == (0, f"dtrain {importlib.metadata.version('dtrain')}\n")
