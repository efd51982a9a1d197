"""The command line: arguments, the output and files of each command, run folders, exit codes.

Most tests call `main` in this process, which saves the time of the imports.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.load import load_config
from tests.support import jobs
from tests.support.command_line import Ended, dtrain

pytestmark = pytest.mark.commands

HEAVY = {"torch", "transformers", "datasets", "deepspeed", "sklearn", "scipy", "numpy", "mpi4py"}


def metrics_of(run: Path) -> dict[str, float]:
    metrics: dict[str, float] = jobs.summary_of(run)["eval"]
    return metrics


def content(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of every file below a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Arguments


def test_help_takes_half_a_second_of_cpu_time_and_no_heavy_import() -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.run([*jobs.python(), "--help"], cwd=jobs.ROOT, capture_output=True, text=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    traced = [sys.executable, "-X", "importtime", jobs.MAIN, "--help"]
    imports = subprocess.run(traced, cwd=jobs.ROOT, capture_output=True, text=True, timeout=60).stderr

    assert min(seconds) < 0.5
    imported = {line.rpartition("|")[2].strip() for line in imports.splitlines()}
    assert "dtrain.config.schema" in imported
    assert imported & HEAVY == set()
    for word in (
        "--config",
        "--print-config",
        "--dry-run",
        "train",
        "evaluate",
        "predict",
        "generate",
        "exit codes",
        "torchrun",
    ):
        assert word in shown.stdout
    assert shown.returncode == 0


def test_a_wrong_command_line_exits_with_2_and_names_the_nearest_word(tmp_path: Path) -> None:
    wrong = {
        ("evalaute",): "evaluate",
        ("--dry-rnu",): "--dry-rnu",
        ("--config",): "--config",
        ("--config", str(tmp_path / "none.yaml")): "none.yaml",
        ("train.max_step=3",): "train.max_steps",
        ("train", "evaluate"): "evaluate",
    }
    for arguments, message in wrong.items():
        ended = dtrain(*arguments)
        assert (ended.code, message in ended.text) == (2, True), f"{arguments}: {ended.text}"
        assert "Traceback" not in ended.text


def test_the_output_of_print_config_is_a_config_file(tmp_path: Path) -> None:
    first = dtrain("--print-config", "--local_rank=1", "train.max_steps=7", "optim.learning_rate=1e-4")
    (tmp_path / "quickstart.yaml").write_text(first.text)

    again = dtrain("--print-config", "--config", str(tmp_path / "quickstart.yaml"))

    assert (first.code, again) == (0, first)
    config = load_config(tmp_path / "quickstart.yaml", [])
    assert (config.train.max_steps, config.optim.learning_rate) == (7, 1e-4)


@pytest.mark.parametrize(
    ("env", "cause"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "Rank 2 of 2 processes"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2, but MASTER_ADDR is not set"),
    ],
)
def test_contradictory_variables_are_shown_in_a_table(env: dict[str, str], cause: str) -> None:
    job = jobs.run(jobs.python(), env=env)

    assert job.process.returncode == 4
    assert job.said[0].startswith(f"error: {cause}") or job.said[0].startswith(f"[rank 1] error: {cause}")
    assert job.said[1] == "Found in the environment:"
    assert [line.split() for line in job.said[2:]] == [[name, env[name]] for name in sorted(env)]
    assert not job.err


# The plan


def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    frozen = ["freeze.modules=[embeddings]", "data.limit=20", "train.epochs=2", "train.max_steps=null"]

    ended = dtrain("--dry-run", *jobs.settings(tmp_path / "runs", "plan"), *frozen)

    assert ended.code == 0
    assert not (tmp_path / "runs").exists()
    plan = dict(line.split(maxsplit=1) for line in ended.text.splitlines() if not line.startswith(" "))
    assert plan["topology"].startswith("one process")
    assert plan["engine"].startswith("single (one process), fp32")
    assert plan["data"] == "train 20, validation 7 examples"
    assert plan["steps"].startswith("6: 3 per epoch, global batch 8")
    assert plan["per"] == "step   4 micro-batches of 2, 4 per rank, 0 rank(s) idle"
    embeddings = (25 + 64 + 2 + 2) * 32  # words, positions, types, and a norm's weight and bias
    assert plan["parameters"].endswith(f" trainable, {embeddings:,} frozen")
    assert "weights" in plan["memory"]
    assert "optimizer" in plan["memory"]
    assert "1e-5 relative over 50 steps" in plan["exactness"]
    assert "bf16" in plan["precision"]
    names = [line.split()[1] for line in ended.text.splitlines() if line.startswith("  frozen")]
    assert len(names) == 5
    assert "bert.embeddings.word_embeddings.weight" in names


@pytest.mark.slow
def test_a_dry_run_on_three_ranks_shows_the_idle_rank(tmp_path: Path) -> None:
    run = jobs.settings(tmp_path / "runs", "plan", train__global_batch_size=4)

    job = jobs.run([*jobs.torchrun(3), "--dry-run", *run])

    assert job.process.returncode == 0, job.text
    topology = "topology   rank 0 of 3 on 1 node (local rank 0 of 3), by torchrun, CPU, 1 thread(s) per rank"
    assert {topology, f"{topology}, linear layers by oneDNN"} & set(job.out)  # the latter on processors of AMD
    assert "per step   2 micro-batches of 2, 0 to 1 per rank, 1 rank(s) idle" in job.out
    assert sum("1 of 3 ranks are idle in every step" in line for line in job.out) == 1
    assert not (tmp_path / "runs").exists()


# Run folders


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, which no test may change."""
    folder = tmp_path_factory.mktemp("finished") / "runs"
    ended = dtrain(*jobs.settings(folder, "mine", train__eval_every="epoch", train__epochs=1))
    assert ended.code == 0, ended.text
    return folder / "mine"


def again(finished: Path, *more: str) -> Ended:
    """The command that made the finished run, with more settings."""
    return dtrain(*jobs.settings(finished.parent, "mine", train__eval_every="epoch", train__epochs=1), *more)


def test_a_finished_run_is_not_changed(finished: Path) -> None:
    before = content(finished)

    same = again(finished)
    never = again(finished, "checkpoint.resume=never")
    other = again(finished, "optim.learning_rate=0.5", "train.log_every=2")

    assert (same.code, never.code, other.code) == (0, 2, 2)
    assert f"{finished} is already finished" in same.text
    assert "holds a finished run, and checkpoint.resume=never" in never.text
    assert "  optim.learning_rate: 5.0e-05 -> 0.5" in other.text.splitlines()
    assert "train.log_every" not in other.text, "which may change"
    for refused in (never, other):
        assert "run.name=mine-2 is free" in refused.text
        assert "run.overwrite=true" in refused.text
    assert content(finished) == before


def test_an_evaluation_does_not_touch_a_training_run(finished: Path) -> None:
    before = content(finished)
    model = [f"model.name_or_path={finished / 'model'}"]

    into = dtrain("evaluate", *jobs.settings(finished.parent, "mine"), *model)

    assert into.code == 2
    assert "holds a training run, which evaluate must not change" in into.text
    assert content(finished) == before


def test_a_model_evaluated_twice_gives_the_digits_of_its_training_run(finished: Path, tmp_path: Path) -> None:
    command = ["evaluate", *jobs.settings(tmp_path, "check"), f"model.name_or_path={finished / 'model'}"]

    ended = [dtrain(*command) for _ in range(2)]

    assert [each.code for each in ended] == [0, 0]
    assert metrics_of(tmp_path / "check") == metrics_of(finished)
    assert f"matthews_correlation     {metrics_of(finished)['matthews_correlation']:.10g}" in ended[1].text
    lines = (tmp_path / "check" / "predictions" / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["example_index"] for line in lines] == list(range(7))
    assert not (tmp_path / "check" / "model").exists()


def test_an_unfinished_run_is_resumed_or_refused_or_moved_away(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    command = jobs.settings(tmp_path, "mine", checkpoint__every="null")
    assert dtrain(*command).code == 0
    (run / "summary.json").unlink()
    (run / "exit.json").unlink()

    never = dtrain(*command, "checkpoint.resume=never")
    left = content(run)
    on = dtrain(*command)
    finished = content(run)
    new = dtrain(*command, "run.overwrite=true", "optim.learning_rate=0.01")

    assert (never.code, on.code, new.code) == (2, 0, 0)
    assert "holds an unfinished run, and checkpoint.resume=never" in never.text
    assert "exit.json" not in left, "a refused start writes nothing"
    assert "holds an unfinished run" in on.text
    assert "summary.json" in finished
    (old,) = tmp_path.glob("mine.old-*")
    assert f"the old run was moved to {old}" in new.text
    assert content(old) == finished
    assert jobs.exit_of(run)["code"] == 0


def test_a_run_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    inside = dtrain(*jobs.settings(tmp_path, "mine"), f"run.output_dir={tmp_path / 'file'}")
    itself = dtrain(*jobs.settings(tmp_path, "file"))

    assert (inside.code, itself.code) == (2, 2)
    assert f"{tmp_path / 'file'}" in inside.text
    assert "Set run.output_dir" in inside.text
    assert f"{tmp_path / 'file'} is not a folder" in itself.text
    assert (tmp_path / "file").read_text() == "in the way"


# Failures


def test_a_loss_that_is_not_finite_stops_the_run_with_5_or_is_skipped(tmp_path: Path) -> None:
    bad = {"optim__learning_rate": "1e30", "optim__max_grad_norm": "null", "schedule__name": "constant"}

    stop = dtrain(*jobs.settings(tmp_path, "stop", **bad))
    skip = dtrain(*jobs.settings(tmp_path, "skip", **bad, train__non_finite="skip"))

    assert (stop.code, skip.code) == (5, 0)
    (fault,) = jobs.read_events(tmp_path / "stop", "fault")
    first = f"rank 0, micro-batch {fault['micro_batches'][0]}, examples {fault['example_index'][0]}, "
    assert f"Step 2: the loss is nan ({first}" in stop.text
    assert "train.non_finite=skip" in stop.last
    assert (jobs.exit_of(tmp_path / "stop")["code"], fault["step"]) == (5, 2)
    assert not (tmp_path / "stop" / "model").exists()
    assert not (tmp_path / "stop" / "summary.json").exists()
    assert [event["step"] for event in jobs.read_events(tmp_path / "skip", "fault")] == [2, 3]
    assert [event["loss"] for event in jobs.read_events(tmp_path / "skip")][1:] == ["nan", "nan"]
    assert jobs.summary_of(tmp_path / "skip")["updates"] == 1


def test_errors_have_their_exit_code_and_no_traceback(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "runs").mkdir()
    wrong: list[tuple[dict[str, Any], int, str]] = [
        ({"data__path": empty}, 3, "train.tsv"),
        ({"model__name_or_path": empty}, 2, "has no config.json"),
        ({"freeze__modules": "[encodr]"}, 2, "encoder"),
        ({"evaluation__best": "{metric: bleu}", "train__eval_every": "epoch"}, 2, "matthews_correlation"),
    ]
    for number, (settings, code, message) in enumerate(wrong):
        ended = dtrain(*jobs.settings(tmp_path / "runs", f"run{number}", **settings))
        assert (ended.code, message in ended.text) == (code, True), f"{settings}: {ended.text}"
        assert "Traceback" not in ended.text


# Text


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a short quickstart."""
    folder = tmp_path_factory.mktemp("written")
    sizes = ["model.config.n_layer=1", "model.config.n_positions=32", "data.max_length=32", "data.limit=300"]
    ended = dtrain(f"run.output_dir={folder}", *sizes, "train.max_steps=12", "schedule.warmup_steps=0")
    assert ended.code == 0, ended.text
    return folder


def test_an_evaluation_of_a_trained_model_has_its_own_run_name(written: Path) -> None:
    same = ["data.max_length=32", "data.limit=300", f"run.output_dir={written}"]

    ended = dtrain("evaluate", *same, f"model.name_or_path={written / 'quickstart' / 'model'}")

    assert ended.code == 0, ended.text
    summary = jobs.summary_of(written / "quickstart-evaluate")
    assert summary["eval"] == metrics_of(written / "quickstart")
    assert (summary["command"], summary["world_size"]) == ("evaluate", 1)
    assert {"loss", "perplexity", "bits_per_character"} <= set(summary["eval"])
    assert summary["examples"] > 0


def test_generated_text_follows_the_seed_and_the_prompt(written: Path) -> None:
    def generate(*more: str) -> str:
        ended = dtrain(
            "generate",
            f"model.name_or_path={written / 'quickstart' / 'model'}",
            f"run.output_dir={written}",
            "generate.max_new_tokens=40",
            *more,
        )
        assert ended.code == 0, ended.text
        return ended.text.removesuffix("\n")

    prompt = "generate.prompt=The import statement"
    drawn = generate(prompt)

    assert drawn.startswith("The import statement")
    assert len(drawn) == len("The import statement") + 40
    assert generate(prompt) == drawn
    assert generate(prompt, "run.seed=1") != drawn
    likeliest = generate(prompt, "generate.temperature=0")
    assert generate(prompt, "generate.temperature=0", "run.seed=1") == likeliest
    long = "x = 1 and " * 9  # 90 characters, where the model has positions for 32
    assert generate(f"generate.prompt={long}", "generate.temperature=0").startswith(long)
    assert not (written / "quickstart-generate").exists()


def test_generate_without_a_trained_language_model_names_the_missing_setting(finished: Path) -> None:
    other = dtrain("generate", *jobs.settings(finished.parent, "text"))
    none = dtrain("generate")

    assert (other.code, none.code) == (2, 2)
    assert "task.name=causal_lm" in other.text
    assert "model.name_or_path" in none.text
