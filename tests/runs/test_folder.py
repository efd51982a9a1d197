"""The run folder: its content decides what a start may do, nothing is lost, and files are written atomically."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.load import differences, load_config, to_yaml
from dtrain.config.schema import Config
from dtrain.errors import CheckpointError, ConfigError, DataError, DtrainError
from dtrain.runs.folder import (
    FolderState,
    RunFolder,
    claim,
    folder_state,
    replace_folder,
    write_exit,
    write_json_atomic,
    write_lines_atomic,
)
from dtrain.runs.jsonl import MetricsLog, read_metrics
from dtrain.runs.resume_policy import AvailableCheckpoints, StartDecision, decide_start, resume_settings

_TABLE = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
WEIGHTS = len(_TABLE).to_bytes(8, "little") + _TABLE + bytes(4)
"""A complete safetensors file with one number."""


def config_for(tmp_path: Path, *overrides: str, command: str = "train") -> Config:
    return load_config(None, [f"run.output_dir={tmp_path}", "run.name=one", *overrides], command=command)


def asked(config: Config, command: str = "train", checkpoints: AvailableCheckpoints | None = None) -> StartDecision:
    """Returns the decision of a command."""
    changes = differences(RunFolder(config.run_dir).old_config(), config)
    return decide_start(config, command=command, changes=changes, checkpoints=checkpoints)


def begun(tmp_path: Path, *overrides: str, steps: int = 1) -> RunFolder:
    """Creates a training run that was interrupted after `steps` logged steps."""
    config = config_for(tmp_path, *overrides)
    folder = RunFolder(config.run_dir)
    claim(folder, to_yaml(config))
    with MetricsLog(folder.metrics) as log:
        log.write({"event": "start"})
        for step in range(1, steps + 1):
            log.write({"event": "train", "step": step, "loss": 1.0})
    return folder


def finished(tmp_path: Path, *overrides: str) -> RunFolder:
    folder = begun(tmp_path, *overrides)
    folder.model.mkdir()
    (folder.model / "config.json").write_text("{}")
    (folder.model / "model.safetensors").write_bytes(WEIGHTS)
    write_json_atomic(folder.summary, {"eval": {"loss": 1.0}})
    write_exit(folder.exit, code=0, cause="done", rank=0, host="here", message="done")
    return folder


def evaluated(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "one")
    claim(folder, to_yaml(config_for(tmp_path)))
    write_lines_atomic(folder.predictions / "validation.jsonl", [{"prediction": 1}])
    write_json_atomic(folder.summary, {"eval": {}})
    return folder


# ---------------------------------------------------------------- states


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], "absent"),
        (["config.yaml", "exit.json"], "absent"),
        ([".DS_Store", ".nfs01"], "absent"),
        (["metrics.jsonl"], "unfinished"),
        (["checkpoints/step-000100/x"], "unfinished"),
        (["summary.json", "metrics.jsonl"], "unfinished"),
        (["summary.json", "metrics.jsonl", "model/config.json"], "unfinished"),
        (["summary.json", "model/config.json", "model/model.safetensors"], "finished"),
        (["summary.json", "predictions/validation.jsonl", "config.yaml"], "evaluation"),
        (["predictions/validation.jsonl"], "evaluation"),
        (["config.yaml", "inspection/tokens.json"], "evaluation"),
        (["notes.txt"], "foreign"),
        (["src/main.py"], "foreign"),
        (["notes.txt", "metrics.jsonl"], "unfinished"),
    ],
)
def test_the_state_depends_on_the_folders_files(tmp_path: Path, files: Sequence[str], expected: FolderState) -> None:
    path = tmp_path / "one"
    path.mkdir()
    for file in files:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_bytes(WEIGHTS if file.endswith(".safetensors") else b"{}")

    assert folder_state(path) == expected


@pytest.mark.parametrize("damaged", [b"", WEIGHTS[:-1], WEIGHTS[:20], b"x" * 100])
def test_a_finished_run_with_damaged_weights_counts_as_unfinished(tmp_path: Path, damaged: bytes) -> None:
    folder = finished(tmp_path)
    (folder.model / "model.safetensors").write_bytes(damaged)

    assert folder_state(folder.path) == "unfinished"


def test_a_missing_folder_is_absent_and_a_file_or_dangling_link_is_foreign(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")

    assert [folder_state(tmp_path / name) for name in ("none", "file", "link")] == ["absent", "foreign", "foreign"]


def test_a_run_with_an_incomplete_summary_is_unfinished(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    assert folder_state(folder.path) == "finished"

    folder.summary.write_text('{"eval": {"lo')

    assert folder_state(folder.path) == "unfinished"


# ---------------------------------------------------------------- decisions, training


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_starts_in_a_missing_folder(tmp_path: Path, resume: str) -> None:
    assert asked(config_for(tmp_path, f"checkpoint.resume={resume}")) == StartDecision("start", False, ())


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_that_ended_before_its_first_step_is_not_protected(tmp_path: Path, resume: str) -> None:
    begun(tmp_path, steps=0)

    decision = asked(config_for(tmp_path, f"checkpoint.resume={resume}", "optim.learning_rate=1"))

    assert decision == StartDecision("start", False, ())


def test_an_unfinished_run_without_a_checkpoint_starts_again_and_shows_what_changed(tmp_path: Path) -> None:
    begun(tmp_path)

    decision = asked(config_for(tmp_path, "train.log_every=1", "engine.precision=bf16"))

    assert (decision.action, decision.set_aside) == ("resume", False)
    assert "starts again at step 1" in decision.notes[0]
    assert "train.log_every: 20 -> 1" in decision.notes[1]
    assert "engine.precision: fp32 -> bf16  (the numbers differ from here on)" in decision.notes[1]


def test_an_unchanged_unfinished_run_has_no_differences_to_show(tmp_path: Path) -> None:
    begun(tmp_path)

    assert len(asked(config_for(tmp_path)).notes) == 1


# Checkpoints: a run resumes from the newest complete one


def saved(folder: RunFolder, *steps: int, resumed: int | None = None) -> None:
    """Writes the log's events about checkpoints, and about a start that resumed from one of them."""
    with MetricsLog(folder.metrics) as log:
        if resumed is not None:
            log.write({"event": "resume", "step": resumed})
        for step in steps:
            log.write({"event": "checkpoint", "step": step})


def at_step(folder: RunFolder, step: int) -> None:
    write_json_atomic(folder.summary, {"eval": {}, "step": step})


def test_an_unfinished_run_resumes_from_its_newest_checkpoint(tmp_path: Path) -> None:
    saved(begun(tmp_path), 2, 4)

    decision = asked(config_for(tmp_path), checkpoints=AvailableCheckpoints(4))

    assert decision.action == "resume"
    assert decision.notes == (f"{tmp_path / 'one'} resumes from the checkpoint of step 4",)


def test_a_run_resumes_even_if_only_a_checkpoint_is_left(tmp_path: Path) -> None:
    assert asked(config_for(tmp_path), checkpoints=AvailableCheckpoints(4)).action == "resume"


def test_a_change_of_mathematics_is_allowed_by_name_or_section(tmp_path: Path) -> None:
    begun(tmp_path)

    for allowed in ("[optim.learning_rate]", "[optim]"):
        config = config_for(tmp_path, "optim.learning_rate=0.5", f"checkpoint.allow_changes={allowed}")
        decision = asked(config, checkpoints=AvailableCheckpoints(4))
        assert decision.action == "resume"
        assert "optim.learning_rate: 0.002 -> 0.5" in decision.notes[1]


def test_a_missing_newer_checkpoint_stops_the_start(tmp_path: Path) -> None:
    saved(begun(tmp_path), 2, 4, 6)

    with pytest.raises(
        CheckpointError, match=r"saved a checkpoint of step 6 .* no node has it; the newest available one is of step 4"
    ):
        asked(config_for(tmp_path), checkpoints=AvailableCheckpoints(4))
    with pytest.raises(CheckpointError, match=r"no node has its checkpoints any more \(step 6\)"):
        asked(config_for(tmp_path), checkpoints=AvailableCheckpoints())


def test_a_damaged_newer_checkpoint_does_not_stop_the_start(tmp_path: Path) -> None:
    saved(begun(tmp_path), 2, 4, 6)

    assert asked(config_for(tmp_path), checkpoints=AvailableCheckpoints(4, frozenset({6}))).action == "resume"
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged \(step 4, 6\)"):
        asked(config_for(tmp_path), checkpoints=AvailableCheckpoints(None, frozenset({4, 6})))


def test_a_checkpoint_that_a_later_start_discarded_may_be_missing(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    saved(folder, 2, 4, 6)
    saved(folder, resumed=4)

    assert asked(config_for(tmp_path), checkpoints=AvailableCheckpoints(4)).action == "resume"


def test_a_checkpoint_that_the_user_names_is_always_used(tmp_path: Path) -> None:
    saved(begun(tmp_path), 2, 4, 6)

    assert asked(config_for(tmp_path), checkpoints=AvailableCheckpoints(2, is_user_choice=True)).action == "resume"


def test_a_finished_run_with_a_complete_last_checkpoint_is_left_alone(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    saved(folder, 4, 6)
    at_step(folder, 6)

    assert asked(config_for(tmp_path), checkpoints=AvailableCheckpoints(6)).action == "already_finished"
    assert (
        asked(config_for(tmp_path), checkpoints=AvailableCheckpoints()).action == "already_finished"
    )  # deleted to free space
    assert asked(config_for(tmp_path), checkpoints=AvailableCheckpoints(4, frozenset({6}))).action == "resume"


def test_a_finished_run_resumes_for_more_steps_and_shows_the_changes(tmp_path: Path) -> None:
    folder = finished(tmp_path, "train.max_steps=6")
    at_step(folder, 6)

    decision = asked(config_for(tmp_path, "train.max_steps=12"), checkpoints=AvailableCheckpoints(6))

    assert decision.action == "resume"
    assert "train.max_steps: 6 -> 12  (the numbers differ from here on)" in decision.notes[1]
    with pytest.raises(ConfigError, match="is finished and has no checkpoint to resume from"):
        asked(config_for(tmp_path, "train.max_steps=12"))


@pytest.mark.parametrize("made", [begun, finished])
def test_a_run_with_other_mathematics_is_refused_with_old_and_new_values_and_the_fix(tmp_path: Path, made: Any) -> None:
    made(tmp_path)

    with pytest.raises(ConfigError) as caught:
        asked(config_for(tmp_path, "optim.learning_rate=0.5", "train.shuffle=false", "train.log_every=1"))

    text = str(caught.value)
    assert "optim.learning_rate: 0.002 -> 0.5" in text
    assert "train.shuffle: true -> false" in text
    assert "log_every" not in text
    assert "run.overwrite=true" in text
    assert "run.name=one-2" in text
    assert "checkpoint.allow_changes='[optim.learning_rate, train.shuffle]'" in text


def test_a_finished_run_is_not_trained_twice(tmp_path: Path) -> None:
    finished(tmp_path)

    decision = asked(config_for(tmp_path))

    assert decision.action == "already_finished"
    assert f"{tmp_path / 'one'} is already finished" in decision.notes[0]


@pytest.mark.parametrize("missing", ["summary.json", "model/model.safetensors", "model/config.json"])
def test_an_incomplete_finished_run_is_resumed(tmp_path: Path, missing: str) -> None:
    folder = finished(tmp_path)
    (folder.path / missing).unlink()

    assert asked(config_for(tmp_path)).action == "resume"


@pytest.mark.parametrize(("made", "word"), [(begun, "an unfinished run"), (finished, "a finished run")])
def test_with_resume_never_an_existing_run_is_refused(tmp_path: Path, made: Any, word: str) -> None:
    made(tmp_path)

    with pytest.raises(ConfigError, match=word) as caught:
        asked(config_for(tmp_path, "checkpoint.resume=never"))

    assert "run.overwrite=true" in str(caught.value)
    assert "run.name=one-2" in str(caught.value)


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("made", [begun, finished, evaluated])
def test_overwrite_moves_the_complete_old_folder_away_and_starts(tmp_path: Path, made: Any, resume: str) -> None:
    before = {file.name: file.read_bytes() for file in made(tmp_path).path.rglob("*") if file.is_file()}
    config = config_for(tmp_path, "run.overwrite=true", f"checkpoint.resume={resume}", "optim.learning_rate=1")

    decision = asked(config)
    moved = claim(RunFolder(config.run_dir), to_yaml(config), set_aside=decision.set_aside)

    assert decision.action == "start"
    assert moved is not None
    assert moved.name.startswith("one.old-2")
    assert {file.name: file.read_bytes() for file in moved.rglob("*") if file.is_file()} == before
    assert sorted(entry.name for entry in config.run_dir.iterdir()) == [".run-id", "config.yaml"]


def test_two_overwrites_in_one_second_lose_nothing(tmp_path: Path) -> None:
    config = config_for(tmp_path, "run.overwrite=true")
    for _ in range(3):
        finished(tmp_path)
        claim(RunFolder(config.run_dir), to_yaml(config), set_aside=True)

    assert len(list(tmp_path.glob("one.old-*"))) == 3


def test_training_over_an_evaluation_is_refused(tmp_path: Path) -> None:
    evaluated(tmp_path)

    with pytest.raises(ConfigError, match="holds results of an evaluation"):
        asked(config_for(tmp_path))


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_a_foreign_folder_is_never_changed(tmp_path: Path, command: str, overwrite: str) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "thesis.tex").write_text("years of work")

    with pytest.raises(ConfigError, match=r"thesis\.tex, which dtrain did not write"):
        asked(config_for(tmp_path, f"run.overwrite={overwrite}"), command)


def test_a_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("")

    with pytest.raises(ConfigError, match="is not a folder"):
        asked(config_for(tmp_path))


# ---------------------------------------------------------------- decisions, other commands


@pytest.mark.parametrize("command", ["evaluate", "predict", "generate"])
@pytest.mark.parametrize("made", [begun, finished])
@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_a_training_run_is_safe_from_other_commands(tmp_path: Path, made: Any, command: str, overwrite: str) -> None:
    made(tmp_path)
    (tmp_path / "one-2").mkdir()

    with pytest.raises(ConfigError, match=f"holds a training run, which {command} must not change") as caught:
        asked(config_for(tmp_path, f"run.overwrite={overwrite}"), command)

    assert "run.name=one-3 is free" in str(caught.value)


def test_an_evaluation_replaces_old_results(tmp_path: Path) -> None:
    folder = evaluated(tmp_path)
    config = config_for(tmp_path, "checkpoint.resume=never", "data.limit=3")

    decision = asked(config, "evaluate")
    claim(folder, to_yaml(config), set_aside=decision.set_aside)

    assert decision == StartDecision("start", False, ())
    assert sorted(entry.name for entry in folder.path.iterdir()) == [".run-id", "config.yaml"]
    assert "limit: 3" in folder.config.read_text()


# ---------------------------------------------------------------- claiming


def test_a_claim_creates_the_folder_and_keeps_what_an_unfinished_run_needs(tmp_path: Path) -> None:
    folder = finished(tmp_path / "new" / "deep")

    claim(folder, "task: {name: causal_lm}\n")

    assert sorted(entry.name for entry in folder.path.iterdir()) == [".run-id", "config.yaml", "metrics.jsonl", "model"]
    assert folder.old_config() == "task: {name: causal_lm}\n"


def test_a_folder_that_cannot_be_written_is_an_error_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match=r"cannot be written: .*Set run\.output_dir"):
        claim(RunFolder(tmp_path / "file" / "one"), "")


def test_a_folder_without_permission_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    forbidden = Path("/proc") if os.geteuid() == 0 else tmp_path  # permissions do not apply to root

    with pytest.raises(ConfigError, match=r"cannot be written: .*one: (Permission denied|No such file)"):
        claim(RunFolder(forbidden / "one"), "")


def test_a_run_whose_config_is_damaged_is_refused_and_can_be_moved_away(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    folder.config.write_bytes(b"{\xff\xfe")

    with pytest.raises(ConfigError, match=r"one/config\.yaml.* is not valid YAML.*run\.overwrite=true"):
        asked(config_for(tmp_path))

    assert asked(config_for(tmp_path, "run.overwrite=true")).set_aside


def test_a_config_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "one")
    folder.config.mkdir(parents=True)

    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read: Is a directory"):
        folder.old_config()


# ---------------------------------------------------------------- files


def test_json_is_written_atomically_readable_and_without_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"a": 1})

    write_json_atomic(path, {"loss": math.nan, "more": [math.inf, {"low": -math.inf}], "text": "\u00e4"})

    assert json.loads(path.read_text(encoding="utf-8")) == {
        "loss": "nan",
        "more": ["inf", {"low": "-inf"}],
        "text": "\u00e4",
    }
    assert path.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "predictions" / "validation.jsonl"
    write_lines_atomic(path, [{"prediction": 0}])

    def records() -> Any:
        yield {"prediction": 1}
        raise KeyError("the source ended")

    with pytest.raises(KeyError):
        write_lines_atomic(path, records())

    assert path.read_text() == '{"prediction": 0}\n'
    assert [entry.name for entry in path.parent.iterdir()] == ["validation.jsonl"]


def test_a_file_that_cannot_be_written_is_an_error_for_the_user(tmp_path: Path) -> None:
    with pytest.raises(DtrainError, match=r"summary\.json cannot be written: .*No such file or directory"):
        write_json_atomic(tmp_path / "gone" / "summary.json", {})


def test_the_first_exit_cause_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "exit.json"
    first = {"code": 3, "cause": "DataError", "rank": 1, "host": "node2", "message": "no such file"}

    assert write_exit(path, code=3, cause="DataError", rank=1, host="node2", message="no such file")
    assert not write_exit(path, code=1, cause="RuntimeError", rank=0, host="node1", message="connection reset")

    assert json.loads(path.read_text()) == first
    assert [entry.name for entry in tmp_path.iterdir()] == ["exit.json"]


def test_exactly_one_of_several_ending_ranks_writes_the_cause(tmp_path: Path) -> None:
    path, wrote, ready = tmp_path / "exit.json", [], threading.Barrier(8)

    def end(rank: int) -> None:
        ready.wait(timeout=20)
        # Ranks are processes. Here different hosts, instead of process ids, keep their drafts apart.
        if write_exit(path, code=1, cause="x", rank=rank, host=f"node{rank}", message="y" * 10_000):
            wrote.append(rank)

    threads = [threading.Thread(target=end, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)

    assert len(wrote) == 1
    assert json.loads(path.read_text())["rank"] == wrote[0]


def test_an_exit_cause_that_cannot_be_written_does_not_hide_the_real_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    assert not write_exit(tmp_path / "file" / "exit.json", code=1, cause="x", rank=0, host="h", message="m")


def test_a_folder_replaces_another_completely(tmp_path: Path) -> None:
    target, draft = tmp_path / "model", tmp_path / ".tmp-model"
    for folder, name in ((target, "old.safetensors"), (draft, "new.safetensors")):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / name).write_bytes(WEIGHTS)
        (folder / "sub" / name).chmod(0o600)

    replace_folder(draft, target)

    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert [entry.name for entry in (target / "sub").iterdir()] == ["new.safetensors"]
    assert (target / "sub" / "new.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_folder_is_put_in_place_if_there_is_none_or_an_earlier_swap_was_interrupted(tmp_path: Path) -> None:
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old" / "left").write_text("")
    (tmp_path / "draft").mkdir()

    replace_folder(tmp_path / "draft", tmp_path / "model")

    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


# ---------------------------------------------------------------- metrics.jsonl


def test_lines_are_on_disk_immediately_and_non_finite_numbers_are_text(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"event": "train", "step": 1, "loss": math.nan, "grad_norm": math.inf})

        assert path.read_text() == '{"event": "train", "step": 1, "loss": "nan", "grad_norm": "inf"}\n'


@pytest.mark.parametrize("torn", ['{"event": "tr', '{"event": "train", "step": 2}', "\x00\x00\x00"])
def test_an_incomplete_last_line_is_removed_and_the_rest_is_kept(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "start"}\n' + torn)
    assert read_metrics(path) == [{"event": "start"}]

    with MetricsLog(path) as log:
        log.write({"event": "resume"})

    assert path.read_text() == '{"event": "start"}\n{"event": "resume"}\n'


def test_a_repeated_step_counts_with_its_last_values(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    events: list[dict[str, Any]] = [
        {"event": "start"},
        {"event": "train", "step": 1, "loss": 9.0},
        {"event": "train", "step": 2, "loss": 8.0},
        {"event": "eval", "step": 2, "loss": 8.5},
        {"event": "resume", "step": 1},
        {"event": "train", "step": 2, "loss": 7.0},
        {"event": "eval", "step": 2, "loss": 7.5},
        {"event": "resume", "step": 1},
    ]
    with MetricsLog(path) as log:
        for event in events:
            log.write(event)

    assert read_metrics(path) == [events[0], events[1], events[4], events[5], events[6], events[7]]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "start"}\n{"event": \n{"event": "end"}\n')

    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_a_metrics_file_that_cannot_be_written_is_an_error_for_the_user(tmp_path: Path) -> None:
    with pytest.raises(DtrainError, match=r"metrics\.jsonl cannot be written"):
        MetricsLog(tmp_path / "gone" / "metrics.jsonl")


class Disk:
    """A file on a disk with this much space left."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written: int = self._file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_on_a_full_disk_metrics_are_kept_as_complete_lines(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        disk = Disk(log._file, 40)
        log._file = disk  # type: ignore[assignment]
        for step in (1, 2, 3):
            log.write({"event": "train", "step": step, "loss": 0.5})
        before = (tmp_path / "metrics.jsonl").read_text()
        disk.room = 1000
        log.write({"event": "train", "step": 4, "loss": 0.5})

    assert before == '{"event": "train", "step": 1, "loss": 0.5}\n'[: len(before)]
    assert before in ("", '{"event": "train", "step": 1, "loss": 0.5}\n')
    assert [event["step"] for event in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


# ---------------------------------------------------------------- starts by the launcher itself


def test_settings_for_the_first_start_do_not_undo_its_work(tmp_path: Path) -> None:
    config = resume_settings(config_for(tmp_path, "run.overwrite=true", "checkpoint.resume=never", "train.max_steps=7"))

    assert (config.run.overwrite, config.checkpoint.resume, config.train.max_steps) == (False, "auto", 7)


def test_a_change_inside_a_setting_is_allowed_by_its_name(tmp_path: Path) -> None:
    begun(tmp_path, "data.columns={text: a, label: b}", steps=2)
    changes = ["data.columns={text: a}"]

    with pytest.raises(ConfigError, match=r"checkpoint.allow_changes='\[data.columns.label\]'"):
        asked(config_for(tmp_path, *changes), checkpoints=AvailableCheckpoints(2))

    for allowed in ("data.columns.label", "data.columns", "data"):
        config = config_for(tmp_path, *changes, f"checkpoint.allow_changes=[{allowed}]")
        assert asked(config, checkpoints=AvailableCheckpoints(2)).action == "resume"


def test_drafts_of_a_killed_writer_are_removed_but_not_those_that_another_process_may_be_writing(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    in_use = [".exit.json.host.12.tmp", ".lock.12.tmp"]
    for name in [".summary.json.12.tmp", ".config.yaml.7.tmp", *in_use]:
        (folder.path / name).write_text("{")

    claim(folder, "a: 1\n")

    assert sorted(file.name for file in folder.path.glob(".*.tmp")) == sorted(in_use)
