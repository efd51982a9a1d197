"""Settings: a run gets the values from its file and command line, and an error says how to fix a wrong one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dtrain.config.error_messages import models_in
from dtrain.config.fields import OnResume
from dtrain.config.load import differences, load_config, to_yaml
from dtrain.config.quickstart import QUICKSTART
from dtrain.config.schema import OWNED_DEEPSPEED_KEYS, Config, Data
from dtrain.config.task import TaskSettings
from dtrain.errors import ConfigError

ROOT = Path(__file__).parents[2]
CLASSIFY = ("task.name=classification",)
TASKS = ", ".join(name for task in models_in(TaskSettings) for name in get_args(task.model_fields["name"].annotation))
"""Every task's name, in the order of the union."""


def write_config(tmp_path: Path, text: str, name: str = "own.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def load_errors(path: Path | None, *overrides: str) -> list[str]:
    """Returns the lines of the error that loading must raise."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    lines = str(caught.value).splitlines()
    for line in lines:
        assert not any(jargon in line for jargon in ("Input should", "http", "type=", "pydantic", "validation error"))
    return lines


def fields(model: type[Any], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yields every setting below a model with its dotted name."""
    for name, field in model.model_fields.items():
        inner = models_in(field.annotation)
        yield f"{prefix}{name}", field
        for section in inner:
            yield from fields(section, f"{prefix}{name}.")


def reference_rows() -> list[str]:
    """Returns the table of configs/README.md: one row for each setting that is not a section."""
    rows: dict[str, None] = {}  # in order, and each once
    for name, field in fields(Config):
        if models_in(field.annotation) and field.is_required() is False and field.default_factory is not None:
            continue
        if name == "task":
            continue
        default = "required" if field.is_required() else to_text(field.get_default(call_default_factory=True))
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        meaning = (field.description or "").replace("|", "\\|").replace("<", "&lt;")
        row = f"| `{name}` | {default} | {meaning} | {extra['resume']} |"
        rows[row] = None
    return list(rows)


def to_text(default: Any) -> str:
    if default is None:
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple | dict):
        return f"`{list(default)}`" if default else ""
    return f"`{default!r}`" if default == "\n\n" else f"`{default}`"


# ---------------------------------------------------------------- the file


def test_settings_missing_in_a_file_have_their_defaults(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, "task: {name: classification}\ntrain:\n  global_batch_size: 64\n"), [])

    assert config.train.global_batch_size == 64
    assert (config.train.micro_batch_size, config.train.epochs, config.train.max_steps) == (8, 3, None)
    assert (config.optim.name, config.optim.learning_rate, config.optim.weight_decay) == ("adamw", 5e-5, 0.01)
    assert (config.optim.max_grad_norm, config.schedule.name, config.schedule.warmup_steps) == (1.0, "linear", None)
    assert (config.evaluation.micro_batch_size, config.engine.precision, config.train.log_every) == (32, "fp32", 10)
    assert (config.max_length, config.train.eval_every, config.run.output_dir) == (128, "epoch", Path("runs"))


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E5", 1e5), (".5e3", 500.0), ("2", 2.0), ("1.", 1.0), ("1_000", 1000.0)]
)
def test_numbers_are_read_in_every_notation(tmp_path: Path, text: str, value: float) -> None:
    path = write_config(tmp_path, f"task: {{name: classification}}\noptim:\n  learning_rate: {text}\n")

    assert load_config(path, []).optim.learning_rate == value
    assert load_config(None, [f"optim.learning_rate={text}"]).optim.learning_rate == value


def test_text_is_not_read_as_a_number_or_date(tmp_path: Path) -> None:
    text = "task: {name: classification}\nrun: {name: 001}\nmodel: {name_or_path: 1e3}\n"
    text += "data: {columns: {label: no, 2: 2020-01-01}}\n"

    config = load_config(write_config(tmp_path, text), [])

    assert (config.run.name, config.model.name_or_path) == ("001", "1e3")
    assert config.data.columns == {"label": "no", "2": "2020-01-01"}


def test_a_section_whose_lines_are_all_commented_out_is_a_section_of_defaults(tmp_path: Path) -> None:
    config = load_config(
        write_config(tmp_path, "task: {name: classification}\ntrain:\n#  epochs: 5\nmodel:\n  config:\n"), []
    )

    assert (config.train.epochs, config.model.config) == (3, {})


def test_a_home_folder_is_expanded() -> None:
    config = load_config(None, ["run.output_dir=~/runs", "model.tokenizer=~/vocab.txt"])

    assert config.run.output_dir == Path.home() / "runs"
    assert config.model.tokenizer == str(Path.home() / "vocab.txt")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("task:\n\tname: classification\n", 2, "not tabs"),
        ("task: {name: classification\ntrain: 3\n", 2, "not valid YAML"),
        ("- task\n- train\n", None, "expected sections"),
        ("classification\n", None, "found classification"),
        ("a: 1\n---\nb: 2\n", 2, "not valid YAML"),
        ("task: &again [*again]\n", 1, "contains itself"),
        ("task: {name: classification}\nrun: {seed: !!python/object/apply:os.getpid []}\n", 2, "python/object"),
        ("task: {name: classification}\nrun: {seed: !!int seven}\n", 2, "run.seed"),
        ("task: {name: 'classi\x01fication'}\n", None, "not valid YAML"),
    ],
)
def test_a_file_that_is_not_a_config_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int | None, message: str
) -> None:
    path = write_config(tmp_path, text)

    (first, *_) = load_errors(path)

    assert first.startswith(f"{path}, line {line}: " if line else f"{path}: ")
    assert message in first


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    meant = write_config(tmp_path, "", "cola.yaml")

    (line,) = load_errors(tmp_path / "cols.yaml")

    assert str(tmp_path / "cols.yaml") in line
    assert f"Did you mean {meant}?" in line


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    assert "directory" in load_errors(tmp_path)[0]


def test_the_error_for_bytes_that_are_not_utf8_has_their_line(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(b"task:\n  name: causal_lm\nrun:\n  name: caf\xe9\n")

    assert load_errors(path) == [f"{path}, line 4: byte 40 is not UTF-8: save the file as UTF-8"]


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(b"\xef\xbb\xbftask: {name: causal_lm}\n")

    assert load_config(path, []).task.name == "causal_lm"


def test_a_duplicate_key_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = write_config(tmp_path, "task: {name: causal_lm}\ntrain:\n  epochs: 1\n  shuffle: true\n  epochs: 2\n")

    assert load_errors(path) == [f"{path}, line 5: train.epochs is set twice (first: {path}, line 3). Keep one."]


# ---------------------------------------------------------------- errors


def test_all_errors_are_reported_together_each_with_its_line(tmp_path: Path) -> None:
    path = write_config(
        tmp_path,
        "task:\n  name: clasification\ntrian:\n  epochs: 1\ntrain:\n  micro_batchsize: 4\n  shuffle: 3\n"
        "optim:\n  learning_rate: fast\n",
    )

    lines = load_errors(path, "train.global_batch_size=0", "foo")

    assert sorted(lines) == sorted(
        [
            f"{path}, line 2: task.name=clasification: it must be one of {TASKS}. Did you mean classification?",
            f"{path}, line 3: trian is not a setting. Did you mean train?",
            f"{path}, line 6: train.micro_batchsize is not a setting. Did you mean train.micro_batch_size?",
            f"{path}, line 7: train.shuffle=3: it must be true or false.",
            f"{path}, line 9: optim.learning_rate=fast: it must be a number, above 0.",
            "command line: train.global_batch_size=0: it must be a whole number, at least 1.",
            "command line: 'foo' is not a setting: write section.key=value, e.g. train.epochs=1.",
        ]
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps=true", "train.max_steps=true: it must be a whole number, at least 1, or null."),
        ("train.max_steps=1e3", "train.max_steps=1000.0: it must be a whole number, at least 1, or null."),
        ("train.max_steps='7'", "train.max_steps='7': it must be a whole number, at least 1, or null."),
        ("train.shuffle=yes", "train.shuffle='yes': it must be true or false."),
        ("train.shuffle=1", "train.shuffle=1: it must be true or false."),
        ("optim.learning_rate=true", "optim.learning_rate=true: it must be a number, above 0."),
        ("optim.learning_rate=.nan", "optim.learning_rate=.nan: it must be a number, above 0."),
        ("optim.weight_decay=.inf", "optim.weight_decay=.inf: it must be a number, at least 0."),
        ("optim.weight_decay=null", "optim.weight_decay=null: it must be a number, at least 0."),
        ("optim.betas=[0.9, 1]", "optim.betas[1]=1: it must be a number, at least 0, below 1."),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: it must be a list of 2, each item a number, at least 0, below 1."),
        (
            "engine.zero_stage=true",
            "engine.zero_stage=true: it must be a whole number, at least 0, at most 3, or null.",
        ),
        ("engine.zero_stage=4", "engine.zero_stage=4: it must be a whole number, at least 0, at most 3, or null."),
        ("optim.name=adam", "optim.name=adam: it must be one of adamw, sgd, adafactor. Did you mean adamw?"),
        (
            "train.eval_every=0",
            "train.eval_every=0: it must be a number of steps, at least 1, or epoch, 'N epochs' or never.",
        ),
        ("train.eval_every=true", "train.eval_every=true: it must be a number of steps"),
        ("freeze.modules=embeddings", "freeze.modules=embeddings: it must be a list, each item text."),
        ("freeze.thaw=[{epoch: 0, modules: [a]}]", "freeze.thaw[0].epoch=0: it must be a whole number, at least 1."),
        ("freeze.thaw=[{epoch: 1}]", "freeze.thaw[0].modules is not set: it must be a list, not empty"),
        (
            "evaluation.best=accuracy",
            "evaluation.best=accuracy: it must be a section, or null. Write evaluation.best.metric=accuracy.",
        ),
        (
            "train=3",
            "train=3: it must be a section, with settings of its own: epochs, max_steps, max_minutes, global_batch_size, "
            "micro_batch_size, ...",
        ),
        ("model=gpt2", "model=gpt2: it must be a section. Write model.name_or_path=gpt2."),
        ("model=[gpt2]", "model is a list: it must be a section. Write model.name_or_path=gpt2."),
        (
            "train=[epochs: 3, max_steps: 4]",
            "train is a list: it must be a section. Write train.epochs=3 train.max_steps=4.",
        ),
        ("data=[a.csv, b.csv]", "data is a list: it must be a section, with settings of its own: name, path, config,"),
        ("freeze.thaw=[3]", "freeze.thaw[0]=3: it must be a section, with settings of its own: epoch, modules."),
        ("model.lora=true", "model.lora=true: it must be a section, or null, with settings of its own: r, alpha,"),
        ("task=classification", "task=classification: it must be a section. Write task.name=classification."),
        ("task={}", f"task.name is not set: it must be one of {TASKS}."),
        ("run.name=../outside", "run.name=../outside: a run name is one folder name"),
        ("train.learning_rate=1", "train.learning_rate is not a setting here. Write optim.learning_rate=1."),
        ("train.betas=[0, 0]", "train.betas is not a setting. Did you mean optim.betas?"),
        ("train.qqq=1", "train.qqq is not a setting: train has epochs, max_steps"),
        ("qqq.epochs=1", "qqq.epochs is not a setting here. Write train.epochs=1."),
        ("qqq.qqq=1", "qqq is not a setting: the config has run, task, model"),
        (
            "task.label_smoothing=0.1",
            "task.label_smoothing is not a setting of task.name=causal_lm, which has name, joiner, packing, stride.",
        ),
        ("optim.betas=[0.9", "optim.betas=[0.9: the value is not valid YAML"),
        (
            "configs/cola.yaml",
            "'configs/cola.yaml' is not a setting: for a config file write --config configs/cola.yaml.",
        ),
        ("train.=3", "'train.=3' is not a setting: write section.key=value"),
        ("data={limit: 1, limit: 2}", "data.limit is set twice"),
    ],
)
def test_a_wrong_setting_is_named_with_the_value_found_and_what_is_expected(override: str, message: str) -> None:
    (line,) = load_errors(None, override)

    assert line.startswith(f"command line: {message}")


def test_a_setting_of_several_types_reports_the_error_of_the_nearest_one() -> None:
    assert load_errors(None, *CLASSIFY, "task.class_weights=bal") == [
        "command line: task.class_weights=bal: it must be balanced, or a mapping {name: a number}, or null."
    ]
    assert load_errors(None, *CLASSIFY, "task.class_weights={a: x}") == [
        "command line: task.class_weights.a=x: it must be a number."
    ]
    assert "label 'b' must be above 0" in load_errors(None, *CLASSIFY, "task.class_weights={a: 1, b: 0}")[0]
    weights = load_config(None, [*CLASSIFY, "task.class_weights={0: 1, 1: 2.5}"]).task
    assert weights.name == "classification"
    assert weights.class_weights == {"0": 1.0, "1": 2.5}


def test_a_section_written_as_a_list_in_a_file_is_answered_with_the_right_form(tmp_path: Path) -> None:
    path = write_config(
        tmp_path,
        "task:\n- name: causal_lm\ntrain:\n- epochs: 3\n- micro_batch_size: 4\nmodel: gpt2\nengine: [single]\ndata: [a.csv, b.csv]\n",
    )

    lines = load_errors(path)

    assert lines == [
        f"{path}, line 1: task is a list: it must be a section. Write 'task: {{name: causal_lm}}'.",
        f"{path}, line 6: model=gpt2: it must be a section. Write 'model: {{name_or_path: gpt2}}'.",
        f"{path}, line 8: data is a list: it must be a section, with settings of its own: name, path, config, splits, "
        "validation_fraction, ...",
        f"{path}, line 3: train is a list: it must be a section. Write 'train: {{epochs: 3, micro_batch_size: 4}}'.",
        f"{path}, line 7: engine is a list: it must be a section. Write 'engine: {{name: single}}'.",
    ]
    assert all(len(line) < len(str(path)) + 200 for line in lines)


def test_a_key_written_with_a_dot_in_a_file_is_explained(tmp_path: Path) -> None:
    path = write_config(tmp_path, "task: {name: causal_lm}\ntrain.epochs: 3\n")

    (line,) = load_errors(path)

    assert "write 'train:' and, indented below it, 'epochs: ...'" in line


def test_a_file_without_a_task_is_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path, "# nothing yet\n")

    assert load_errors(path) == [f"{path}: task.name is not set: it must be one of {TASKS}."]


def test_a_setting_below_a_value_cannot_be_set(tmp_path: Path) -> None:
    path = write_config(tmp_path, "task: {name: causal_lm}\noptim: {betas: [0.9, 0.99]}\n")

    assert load_errors(path, "optim.betas.0=0.8") == [
        "command line: optim.betas.0 cannot be set, because optim.betas is [0.9, 0.99]. Set optim.betas as one value."
    ]


# ---------------------------------------------------------------- combinations


@pytest.mark.parametrize(
    ("overrides", "phrases"),
    [
        (["optim.name=adafactor", "engine.zero_stage=1"], ["optim.name=adafactor", "engine.zero_stage=1"]),
        (["engine.precision=fp16", "engine.zero_stage=2"], ["engine.precision=fp16", "optim.max_grad_norm=null"]),
        (["engine.name=single", "engine.zero_stage=0"], ["engine.zero_stage belongs to DeepSpeed"]),
        (["engine.name=ddp", "engine.deepspeed.a=1"], ["engine.deepspeed belongs to DeepSpeed"]),
        (["schedule.warmup_ratio=0.1"], ["schedule.warmup_steps", "schedule.warmup_ratio", "not both"]),
        (["schedule.name=constant"], ["schedule.name=constant", "constant_with_warmup"]),
        (["train.early_stopping=2"], ["train.early_stopping", "evaluation.best"]),
        (["model.config=null"], ["model.config"]),
        (["model.config={n_layer: 2}"], ["model.from_scratch", "model.config.model_type"]),
    ],
)
def test_settings_that_conflict_are_refused(overrides: list[str], phrases: list[str]) -> None:
    lines = load_errors(None, *overrides)

    assert all(phrase in lines[0] for phrase in phrases)


def test_similar_combinations_that_are_valid_are_accepted() -> None:
    load_config(None, ["optim.name=adafactor", "engine.zero_stage=0"])
    load_config(None, ["optim.name=adafactor", "engine.name=deepspeed"])
    load_config(None, ["engine.precision=fp16", "engine.zero_stage=2", "optim.max_grad_norm=null"])
    load_config(None, ["schedule.name=constant", "schedule.warmup_steps=null"])


@pytest.mark.parametrize(("key", "owner"), OWNED_DEEPSPEED_KEYS.items())
def test_a_deepspeed_key_that_dtrain_owns_is_refused_with_its_owner(key: str, owner: str) -> None:
    (line,) = load_errors(None, f"engine.deepspeed.{key}=3.0")

    assert f"engine.deepspeed.{key}" in line
    assert owner in line


def test_the_error_for_two_conflicting_settings_has_both_locations(tmp_path: Path) -> None:
    path = write_config(tmp_path, "task: {name: causal_lm}\nschedule:\n  warmup_steps: 5\n")

    (line,) = load_errors(path, "schedule.warmup_ratio=0.1")

    assert line.startswith(f"{path}, line 3 and command line: set schedule.warmup_steps or schedule.warmup_ratio")


def test_a_change_can_be_allowed_only_for_settings_that_exist() -> None:
    (line,) = load_errors(None, "checkpoint.allow_changes=[optim.learning_rat]")

    assert "checkpoint.allow_changes: optim.learning_rat is not a setting. Did you mean optim.learning_rate?" in line
    assert load_config(None, ["checkpoint.allow_changes=[optim, data.path]"]).checkpoint.allow_changes


# ---------------------------------------------------------------- overrides


def test_the_command_line_wins_over_the_file_and_a_later_override_over_an_earlier_one(tmp_path: Path) -> None:
    path = write_config(
        tmp_path, "task: {name: classification, label_smoothing: 0.2}\ntrain: {epochs: 1, shuffle: false}\n"
    )

    config = load_config(path, ["train.epochs=2", "train.epochs=4"])

    assert (config.train.epochs, config.train.shuffle) == (4, False)
    assert config.task.name == "classification"
    assert config.task.label_smoothing == 0.2


def test_a_value_replaced_on_the_command_line_is_no_longer_located_in_the_file(tmp_path: Path) -> None:
    path = write_config(tmp_path, "task: {name: causal_lm}\nevaluation:\n  best:\n    mode: max\n")

    (line,) = load_errors(path, "evaluation.best={metric: f1, mode: most}")

    assert line.startswith("command line: evaluation.best.mode=most: it must be one of min, max.")


def test_nested_settings_can_be_set() -> None:
    config = load_config(
        None,
        [
            "model.config.n_layer=2",
            "data.columns.text=001",
            "evaluation.best={metric: accuracy, mode: min}",
            "evaluation.best.mode=max",
            "engine.deepspeed.zero_optimization.offload_optimizer.device=cpu",
            'freeze.modules=[wte, "h[:2]"]',
            "freeze.thaw=[{epoch: 1, modules: [wte]}]",
        ],
    )

    assert (config.model.config["n_layer"], config.model.config["n_embd"]) == (2, 128)
    assert config.data.columns == {"text": "001"}
    assert config.evaluation.best is not None
    assert (config.evaluation.best.metric, config.evaluation.best.mode) == ("accuracy", "max")
    assert config.engine.deepspeed == {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert config.freeze.modules == ("wte", "h[:2]")
    assert (config.freeze.thaw[0].epoch, config.freeze.thaw[0].modules) == (1, ("wte",))


@pytest.mark.parametrize(
    ("metric", "mode"), [("accuracy", "max"), ("loss", "min"), ("mismatched_loss", "min"), ("perplexity", "min")]
)
def test_whether_lower_or_higher_is_better_follows_from_the_metric(metric: str, mode: str) -> None:
    best = load_config(None, [f"evaluation.best.metric={metric}"]).evaluation.best

    assert best is not None
    assert best.mode == mode


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("generate.prompt=a = b", "a = b"),
        ("generate.prompt=# not a comment", "# not a comment"),
        ("generate.prompt=[not: a list", "[not: a list"),
        ("generate.prompt=1e5", "1e5"),
        ("generate.prompt=true", "true"),
        ('generate.prompt="line\\n"', "line\n"),
        ("generate.prompt='it''s'", "it's"),
        ("generate.prompt=null", None),
        ("generate.prompt=", None),
    ],
)
def test_text_on_the_command_line_is_taken_as_it_is(override: str, value: str | None) -> None:
    assert load_config(None, [override]).generate.prompt == value


# ---------------------------------------------------------------- the quickstart, and names


def test_without_a_file_the_quickstart_is_the_base() -> None:
    config = load_config(None, ["train.max_steps=3"])

    assert config == Config.model_validate({**QUICKSTART, "train": {**QUICKSTART["train"], "max_steps": 3}})
    assert QUICKSTART["train"]["max_steps"] == 400, "the built-in default itself must not change"


def test_the_quickstart_file_has_the_built_in_settings() -> None:
    assert load_config(ROOT / "configs" / "quickstart.yaml", []) == load_config(None, [])


def test_naming_a_task_drops_the_quickstart() -> None:
    config = load_config(None, CLASSIFY)

    assert config == Config.model_validate({"task": {"name": "classification"}, "run": {"name": "classification"}})


def test_naming_a_model_drops_the_quickstarts_model_and_what_was_tuned_for_it() -> None:
    config = load_config(None, ["model.name_or_path=gpt2"])

    assert (config.model.from_scratch, config.model.tokenizer, config.model.config) == (False, None, {})
    assert (config.optim.learning_rate, config.schedule.name) == (5e-5, "linear")
    assert (config.data.name, config.data.max_length, config.train.max_steps) == ("python_docs", 64, 400)


def test_naming_data_drops_the_quickstarts_data_and_keeps_what_fits_its_model() -> None:
    config = load_config(None, ["data.path=book.txt"])

    assert (config.data.name, config.data.path) == (None, Path("book.txt"))
    assert (config.data.max_length, config.data.validation_fraction) == (64, 0.1)
    assert (config.model.tokenizer, config.optim.learning_rate) == ("char", 2e-3)
    assert load_config(None, ["data.path=book.txt", "model.name_or_path=gpt2"]).max_length == 256


def test_a_run_is_named_after_its_file_its_task_or_the_quickstart_and_its_command(tmp_path: Path) -> None:
    text = "task: {name: causal_lm}\n"
    unnamed, named = (
        write_config(tmp_path, text, "my cola.v2.yaml"),
        write_config(tmp_path, f"{text}run: {{name: given}}\n"),
    )

    def name(path: Path | None, *overrides: str, command: str = "train") -> str | None:
        model = () if command == "train" else ("model.name_or_path=some/model",)
        return load_config(path, [*overrides, *model], command=command).run.name

    assert (name(None), name(None, command="generate")) == ("quickstart", "quickstart-generate")
    assert (name(None, *CLASSIFY), name(None, *CLASSIFY, command="predict")) == (
        "classification",
        "classification-predict",
    )
    assert (name(unnamed), name(unnamed, command="evaluate")) == ("my-cola.v2", "my-cola.v2-evaluate")
    # The name in a file is that of the training run, whose folder no other command may touch.
    assert (name(named), name(named, command="evaluate")) == ("given", "given-evaluate")
    assert (name(unnamed, "run.name=x", command="evaluate"), name(unnamed, "run={name: x}", command="evaluate")) == (
        "x",
        "x",
    )
    assert name(named, "run.name=null") == "own"


def test_commands_that_use_a_model_do_not_build_a_new_model_or_tokenizer() -> None:
    quickstart = [*CLASSIFY, "model.from_scratch=true", "model.tokenizer=char", "model.config={model_type: gpt2}"]

    used = load_config(None, [*quickstart, "model.name_or_path=some/model"], command="evaluate").model

    assert (used.from_scratch, used.config, used.tokenizer) == (False, {}, None)
    with pytest.raises(
        ConfigError, match=r"evaluate uses a trained model: name its run, as in evaluate runs/quickstart"
    ):
        load_config(None, [], command="evaluate")


# ---------------------------------------------------------------- writing and comparing


def test_the_written_config_is_read_back_as_it_was(tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            *CLASSIFY,
            "run.name=1e5",
            'data.delimiter="\\t"',
            "data.columns={text: no, label: 010, other: 2020-01-01}",
            "model.config={eps: 1e-12, id2label: {0: 'null', 1: '1:30'}, flag: true, none: null, text: '1e-4'}",
            "task.class_weights={a: 1e-30, b: 3}",
            "evaluation.best.metric=f1",
            "freeze.thaw=[{epoch: 2, modules: ['*.bias']}]",
            "engine.deepspeed={zero_optimization: {sub_group_size: 1e9}}",
            "data.path=/tmp/a: b #c",
        ],
    )

    path = write_config(tmp_path, to_yaml(config))

    assert load_config(path, []) == config
    assert to_yaml(load_config(path, [])) == to_yaml(config)


def test_the_written_config_is_complete_and_in_the_order_of_the_schema() -> None:
    lines = to_yaml(load_config(None, [])).splitlines()

    assert [line[:-1] for line in lines if not line.startswith(" ")] == list(Config.model_fields)
    assert "  betas: [0.9, 0.99]" in lines
    assert "  output_dir: runs" in lines


def test_differences_name_each_setting_with_old_and_new_value_and_its_resume_rule() -> None:
    old = to_yaml(load_config(None, ["model.config.n_layer=2", "train.log_every=5"]))
    new = load_config(None, ["engine.precision=bf16", "evaluation.best.metric=loss"])

    changes = {tuple(difference) for difference in differences(old, new)}

    assert changes == {
        ("model.config.n_layer", "2", "4", "refuse"),
        ("train.log_every", "5", "20", "free"),
        ("engine.precision", "fp32", "bf16", "warn"),
        ("evaluation.best", "null", "{metric: loss, mode: min}", "refuse"),
    }
    assert differences(to_yaml(new), new) == []
    assert differences(None, new) == []


def test_a_config_of_another_version_is_compared_as_far_as_possible() -> None:
    config = load_config(None, [])
    text = to_yaml(config)

    newer_setting = differences(text.replace("  find_unused: false\n", ""), config)
    gone_setting = differences(text.replace("  find_unused:", "  find_used: 1\n  find_unused:"), config)

    assert newer_setting == []
    assert [tuple(difference) for difference in gone_setting] == [("engine.find_used", "1", "(not set)", "refuse")]


def test_an_old_config_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml, line 1: this is not valid YAML.*run\.overwrite=true"):
        differences("{torn", load_config(None, []))

    assert differences("{torn", load_config(None, ["run.overwrite=true"])) == []


# ---------------------------------------------------------------- the schema


def test_every_setting_has_a_meaning_and_a_resume_rule() -> None:
    for name, field in fields(Config):
        extra = field.json_schema_extra
        assert field.description, f"{name} has no meaning"
        assert isinstance(extra, dict), f"{name} has no resume rule"
        assert extra["resume"] in get_args(OnResume), name


def test_the_config_folder_lists_every_setting() -> None:
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8").splitlines()

    assert [row for row in reference_rows() if row not in text] == []
    assert [
        row
        for row in text
        if row.startswith("| `")
        and "." in row.split("`")[1]
        and row not in reference_rows()
        and not row.split("`")[1].endswith(".yaml")
    ] == []


def test_every_file_in_the_config_folder_loads_and_is_explained() -> None:
    readme = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")

    for path in sorted((ROOT / "configs").glob("*.yaml")):
        load_config(path, [])
        assert f"`{path.name}`" in readme


def test_the_cola_config_has_the_published_hyper_parameters() -> None:
    config = load_config(ROOT / "configs" / "cola.yaml", [])

    assert (config.model.name_or_path, config.data.name, config.data.path) == ("bert-base-cased", "cola", None)
    assert (config.optim.learning_rate, config.train.epochs, config.train.global_batch_size) == (2e-5, 3, 32)
    assert (config.max_length, config.schedule.name, config.run.name) == (128, "linear", "cola")


@pytest.mark.parametrize(
    ("name", "epochs", "scores"),
    [
        ("sst2", 3, ["92.32"]),
        ("mrpc", 5, ["88.85", "84.07"]),
        ("qqp", 3, ["90.71", "87.49"]),
        ("stsb", 3, ["88.64", "88.48"]),
        ("mnli", 3, ["83.91", "84.10"]),
        ("qnli", 3, ["90.66"]),
        ("rte", 3, ["65.70"]),
        ("wnli", 5, ["56.34"]),
    ],
)
def test_each_glue_task_has_a_config_with_the_published_hyper_parameters_and_scores(
    name: str, epochs: int, scores: list[str]
) -> None:
    path = ROOT / "configs" / f"{name}.yaml"

    config = load_config(path, [])

    assert (config.model.name_or_path, config.data.name, config.run.name) == ("bert-base-cased", name, name)
    assert config.task.name == ("regression" if name == "stsb" else "classification")
    assert (config.optim.learning_rate, config.optim.weight_decay, config.train.epochs) == (2e-5, 0.0, epochs)
    assert (config.train.global_batch_size, config.max_length, config.schedule.name) == (32, 128, "linear")
    assert all(score in path.read_text(encoding="utf-8") for score in scores)


def test_a_config_cannot_be_changed() -> None:
    config = load_config(None, [])

    with pytest.raises(ValueError, match="frozen"):
        config.train.max_steps = 1


def test_reading_a_config_imports_nothing_heavy() -> None:
    code = (
        "import sys; from dtrain.config.load import load_config; import dtrain.runs.folder; load_config(None, []);"
        "print(sorted({'torch', 'numpy', 'transformers', 'datasets'} & set(sys.modules)))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["../out", "a/b", "", ".hidden", "/tmp/x", "a\\\\b", "x" * 300])
def test_a_split_name_cannot_lead_out_of_a_folder(name: str) -> None:
    with pytest.raises(ValidationError, match="is not a name for a folder"):
        Data(splits={name: "train.csv"})
    assert Data(splits={"validation_2.de-x": "b"}).splits == {"validation_2.de-x": "b"}


@pytest.mark.parametrize(
    "name", ["idna", "punycode", "undefined", "unicode_escape", "Raw-Unicode-Escape", "rot13", "zip", "x"]
)
def test_an_encoding_that_no_text_file_has_is_refused(name: str) -> None:
    (line,) = load_errors(None, *CLASSIFY, f"data.encoding={name}")

    assert f"data.encoding={name}: Python knows no such encoding of text files; usual ones: utf-8" in line


@pytest.mark.parametrize("name", ["utf-8", "UTF_16", "gbk", "big5hkscs", "cp037", "utf-7"])
def test_other_encodings_are_accepted(name: str) -> None:
    assert load_config(None, [*CLASSIFY, f"data.encoding={name}"]).data.encoding == name
