"""Commands that take a run's folder: which model they use, which settings they take, and what they never execute."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModel

from tests.support import jobs, tiny
from tests.support.command_line import dtrain

pytestmark = pytest.mark.commands

COMMANDS = ("evaluate", "predict", "generate", "inspect", "export", "chat")

MARK = "import pathlib; pathlib.Path({!r}).touch()\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a classifier on a CSV file, with a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.write_model(folder / "base")
    rows = [f"the {tiny.WORDS[i % 20]} {tiny.WORDS[(7 * i + 3) % 20]},{'good' if i % 3 else 'bad'}" for i in range(60)]
    (folder / "words.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    ended = dtrain(
        *(f"run.output_dir={folder / 'runs'}", "run.name=mine", "run.seed=3", "task.name=classification"),
        *(f"model.name_or_path={folder / 'base'}", f"data.path={folder / 'words.csv'}", "data.max_length=16"),
        *("data.validation_fraction=0.25", "train.max_steps=6", "train.global_batch_size=8", "checkpoint.every=3"),
        f"data.cache_dir={folder / 'cache'}",
    )
    assert ended.code == 0, ended.text
    return folder / "runs" / "mine"


@pytest.fixture
def stranger(run: Path, tmp_path: Path) -> Path:
    """A copy of that run, as it may be downloaded."""
    return Path(shutil.copytree(run, tmp_path / "stranger"))


@pytest.fixture
def executed(tmp_path: Path) -> Iterator[Path]:
    """A file that exists once a stranger's code has run."""
    mark = tmp_path / "executed"
    yield mark
    assert not mark.exists(), "code of the folder ran"


def change(file: Path, **sections: dict[str, Any]) -> None:
    values = yaml.safe_load(file.read_text())
    for section, changes in sections.items():
        values[section] = {**values[section], **changes}
    file.write_text(yaml.safe_dump(values))


def test_a_run_is_evaluated_with_its_own_task_data_and_lengths(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = dtrain("evaluate", str(run))

    assert ended.code == 0, ended.text
    assert jobs.summary_of(run.parent / "mine-evaluate")["eval"] == jobs.summary_of(run)["eval"]
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith(f"Settings from {run / 'config.yaml'}: run.seed=3 task.name=classification data.path=")
    assert "data.validation_fraction=0.25 data.max_length=16" in note
    assert "cache_dir" not in note


def test_each_name_of_a_run_gives_the_same_answer(run: Path) -> None:
    last = max(run.glob("checkpoints/step-*"))
    answers = {
        name: dtrain("predict", name, "the dog").text for name in (str(run), str(run / "model"), str(last), f"{run}/")
    }

    assert len(set(answers.values())) == 1, answers
    assert "probability" in answers[str(run)]
    assert dtrain("predict", f"model.name_or_path={run}", "predict.text=the dog").text == answers[str(run)]
    assert dtrain("predict", "--config", str(run / "config.yaml"), str(run), "the dog").text == answers[str(run)]
    assert not (run.parent / "mine-predict").exists()


def test_other_data_replaces_the_whole_source_of_the_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("text,label\nthe dog,good\nthe cat,bad\nthe fish,bad\n")

    ended = dtrain("evaluate", str(run), f"data.path={tmp_path}", "data.splits={test: new.csv}", "run.name=other")

    assert ended.code == 0, ended.text
    assert len((run.parent / "other" / "predictions" / "test.jsonl").read_text().splitlines()) == 3


def test_a_run_named_by_its_config_file_gets_its_own_folder(run: Path) -> None:
    before = (run / "summary.json").read_bytes()

    ended = dtrain("evaluate", "--config", str(run / "config.yaml"), str(run), "run.name=null")
    named = dtrain("evaluate", "--config", str(run / "config.yaml"), str(run))

    assert (ended.code, named.code) == (0, 0), ended.text + named.text
    assert (run.parent / "mine-evaluate" / "summary.json").exists()
    assert (run / "summary.json").read_bytes() == before


def test_a_checkpoint_is_evaluated_beside_its_run(run: Path) -> None:
    first = min(run.glob("checkpoints/step-*"))

    ended = dtrain("evaluate", str(first))

    assert ended.code == 0, ended.text
    assert (run.parent / f"mine-{first.name}-evaluate" / "summary.json").exists()


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_model_without_a_trained_head_is_refused(run: Path, command: str, tmp_path: Path) -> None:
    base = Path(shutil.copytree(run.parents[1] / "base", tmp_path / "base"))
    AutoModel.from_pretrained(base, add_pooling_layer=True).save_pretrained(base)
    data = [f"data.path={run.parents[1] / 'words.csv'}", "data.validation_fraction=0.25", "data.max_length=16"]

    unknown = dtrain(command, str(base))
    ended = dtrain(command, str(base), "task.name=classification", *data, f"run.output_dir={run.parent}")

    assert (unknown.code, ended.code) == (2, 2)
    assert f"{command} does not know the task of {base}" in unknown.text
    assert "has no weights for classifier.bias, classifier.weight, which the task needs" in ended.text


def test_a_classifier_generates_no_text(stranger: Path) -> None:
    (stranger / "config.yaml").unlink()

    ended = dtrain("generate", str(stranger), "the")

    assert ended.code == 2
    assert "which the task needs: they would be random" in ended.text


def test_a_run_that_has_not_ended_names_its_checkpoint(stranger: Path) -> None:
    shutil.rmtree(stranger / "model")

    ended = dtrain("evaluate", str(stranger))

    assert ended.code == 2
    cure = ended.text.rpartition("e.g. ")[2].partition(",")[0]
    assert dtrain("evaluate", cure).code == 0


# What comes with a model may not execute code


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"trust_remote_code": True}},
        {"model": {"factory": "stranger_module:build"}},
        {"model": {"attn_implementation": "someone/kernel"}},
        {"evaluation": {"factory": "stranger_module:build"}},
    ],
    ids=["trust_remote_code", "model.factory", "kernel", "evaluation.factory"],
)
def test_the_settings_of_a_stranger_execute_nothing(
    stranger: Path, executed: Path, command: str, changes: dict[str, dict[str, Any]]
) -> None:
    (stranger / "stranger_module.py").write_text(MARK.format(str(executed)))
    (stranger / "model" / "stranger_module.py").write_text(MARK.format(str(executed)))
    change(stranger / "config.yaml", **changes)
    ((section, values),) = changes.items()
    ((name, value),) = values.items()
    word = {"export": [str(stranger.parent / "out")], "inspect": ["the"], "predict": ["the"]}.get(command, [])

    ended = dtrain(command, str(stranger), *word)

    assert "Traceback" not in ended.text
    if command == "export" or (section == "evaluation" and command != "evaluate"):
        return  # never reads that setting; `executed` checks the rest
    assert ended.code == 2, ended.text
    shown = "true" if value is True else value
    assert f"stranger/config.yaml sets {section}.{name}={shown}, which" in ended.text
    assert f"add {section}.{name}={shown} to the command" in ended.text


def test_code_that_the_user_names_runs(stranger: Path, tmp_path: Path) -> None:
    (stranger / "my_metrics.py").write_text("def own(predictions, references):\n    return {'own': 0.5}\n")
    change(stranger / "config.yaml", evaluation={"factory": "my_metrics:own", "factory_folder": str(stranger)})
    refused = dtrain("evaluate", str(stranger))
    cure = refused.text.partition("add ")[2].partition(" to the command")[0].split()
    without = refused.text.partition("to go without it, add ")[2].strip().removesuffix(".")

    named = dtrain("evaluate", str(stranger), *cure)
    file = dtrain("evaluate", "--config", str(stranger / "config.yaml"), str(stranger))
    none = dtrain("evaluate", str(stranger), without)

    assert (refused.code, named.code, file.code, none.code) == (2, 0, 0, 0), named.text + file.text + none.text
    assert ("own" in named.text, "own" in none.text) == (True, False)


def test_the_cache_folder_of_a_stranger_is_not_written(stranger: Path, tmp_path: Path) -> None:
    change(stranger / "config.yaml", data={"cache_dir": str(tmp_path / "theirs")})
    change(stranger / "config.yaml", run={"output_dir": str(tmp_path / "theirs")})

    ended = dtrain("evaluate", str(stranger), f"data.cache_dir={tmp_path / 'ours'}")
    default = dtrain("predict", str(stranger), "the dog")

    assert (ended.code, default.code) == (0, 0), ended.text + default.text
    assert not (tmp_path / "theirs").exists()
    assert (tmp_path / "stranger-evaluate" / "summary.json").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_code_in_the_folder_of_a_model_is_not_imported(stranger: Path, executed: Path, command: str) -> None:
    model = stranger / "model"
    (model / "theirs.py").write_text(MARK.format(str(executed)))
    for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        content = json.loads((model / name).read_text())
        classes = {key: "theirs.Theirs", "AutoModel": "theirs.Theirs"}
        classes["AutoModelForSequenceClassification"] = "theirs.Theirs"
        (model / name).write_text(json.dumps({**content, "auto_map": classes, "model_type": "theirs"}))
    word = {"export": [str(stranger.parent / "out")], "inspect": ["the"], "predict": ["the"]}.get(command, [])

    ended = dtrain(command, str(stranger), *word)

    assert "Traceback" not in ended.text
    assert ended.code == (0 if command == "export" else 2), ended.text  # export copies files and loads no model


def test_a_model_whose_config_names_a_compiled_kernel_is_refused(stranger: Path) -> None:
    file = stranger / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attn_implementation": "someone/kernel"}))

    ended = dtrain("predict", str(stranger), "the dog")
    cured = dtrain("predict", str(stranger), "the dog", "model.attn_implementation=sdpa")

    assert (ended.code, cured.code) == (2, 0), ended.text + cured.text
    assert "its config.json has attn_implementation=someone/kernel, which would download and run compiled" in ended.text


# ... nor fill the memory, read private files or control the terminal


@pytest.mark.parametrize(
    ("command", "section", "name"),
    [
        ("generate", "generate", "max_new_tokens"),
        ("evaluate", "evaluation", "num_beams"),
        ("evaluate", "evaluation", "micro_batch_size"),
        ("evaluate", "data", "max_length"),
        ("predict", "task", "n_best"),
    ],
)
def test_a_stranger_sets_no_work_without_end(stranger: Path, command: str, section: str, name: str) -> None:
    change(stranger / "config.yaml", **{section: {name: 10**12}})

    ended = dtrain(command, str(stranger))
    cure = ended.text.rpartition("e.g. ")[2].strip()

    assert ended.code == 2
    assert f"stranger/config.yaml sets {section}.{name}=1000000000000, which" in ended.text
    assert cure.startswith(f"{section}.{name}=")
    assert f"sets {section}.{name}" not in dtrain(command, str(stranger), cure).text


def test_sections_that_are_no_mappings_are_named(stranger: Path) -> None:
    (stranger / "config.yaml").write_text("run: [1]\ntask: {name: classification}\n")

    ended = dtrain("predict", str(stranger), "the dog")

    assert ended.code == 2
    assert "config.yaml, line 1: run is a list: it must be a section" in ended.text


def test_names_from_files_do_not_control_the_terminal(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = stranger / "model" / "config.json"
    clear = "\x1b[2J\x9b31m\u202e"
    file.write_text(json.dumps({**json.loads(file.read_text()), "id2label": {"0": f"{clear}bad", "1": f"{clear}good"}}))
    change(stranger / "config.yaml", data={"path": f"/no{clear}where"})

    answer = dtrain("predict", str(stranger), "the dog")
    refused = dtrain("evaluate", str(stranger))

    assert (answer.code, refused.code) == (0, 3), answer.text + refused.text
    assert answer.text.startswith(r"\x1b[2J\x9b31m\u202e")
    for text in (answer.text, refused.text, *capsys.readouterr()):
        assert not set(clear) & set("\x1b\x9b\u202e") & set(text)


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "more/notes.txt"])
def test_export_copies_no_private_file(stranger: Path, tmp_path: Path, name: str) -> None:
    link, private = stranger / "model" / name, tmp_path / "private.txt"
    private.write_text("password")
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(private)

    ended = dtrain("export", str(stranger), str(tmp_path / "out"))
    cure = ended.text.rpartition(": ")[2].split()

    assert ended.code == 2
    assert f"{name} is a link to {private}, outside of the model's folder" in ended.text
    assert not (tmp_path / "out").exists()
    subprocess.run(cure, check=True)
    assert dtrain("export", str(stranger), str(tmp_path / "out")).code == 0


@pytest.mark.timeout(60)
def test_pipes_in_a_folder_are_not_opened(stranger: Path, tmp_path: Path) -> None:
    for file in (stranger / "summary.json", stranger / "model" / "notes.txt"):
        file.unlink(missing_ok=True)
        os.mkfifo(file)

    ended = dtrain("export", str(stranger), str(tmp_path / "out"))

    assert ended.code == 0, ended.text
    assert not (tmp_path / "out" / "notes.txt").exists()


@pytest.mark.parametrize("path", ["/dev/zero", "pipe"])
@pytest.mark.timeout(60)
def test_data_that_never_ends_is_not_read(stranger: Path, path: str) -> None:
    os.mkfifo(stranger / "pipe")
    change(stranger / "config.yaml", data={"path": str(stranger / path)})

    ended = dtrain("evaluate", str(stranger))

    assert ended.code == 3
    assert "is a device or a pipe" in ended.text
