"""What checkpoints are used for besides resuming: start a run, evaluate, export, and restore the best step."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.checkpoint.format import list_checkpoints, manifest_text
from dtrain.commands.evaluate import run_evaluate
from dtrain.commands.export import run_export
from dtrain.commands.train import run_train
from dtrain.config.load import load_config
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import CheckpointError, ConfigError, DataError, DtrainError
from tests.support import resuming
from tests.support.multirank import run_ranks
from tests.support.resuming import AskIn, Died, DieIn, settings

pytestmark = pytest.mark.ranks

BEST = {"evaluation.best": "{metric: loss}", "train.eval_every": 2, "checkpoint.every": 3, "checkpoint.keep": 1}
HEADED = {"model.head": "{pooling: mean}"}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "own head": HEADED,
    "sharded": {"checkpoint.format": "sharded"},
    "in several files": {"checkpoint.max_file_gb": 0.00005},
}


@pytest.fixture(scope="module")
def folder(memory_path: Callable[[str], Path]) -> Path:
    return resuming.material(memory_path("use"))


def commands(context: RankContext, folder: str, runs: list[tuple[str, str, dict[str, Any], int | None]]) -> list[Any]:
    """Collective. Runs each (command, name, changes, step to die in). Returns metrics, or the error's type and message.

    A negative step: the run is asked to stop in that step.
    """
    results: list[Any] = []
    for command, name, changes, die_in in runs:
        config = load_config(None, settings(Path(folder), name, changes), command=command)
        monitors = [] if die_in is None else [DieIn(die_in) if die_in > 0 else AskIn(-die_in)]
        try:
            if command == "train":
                results.append(run_train(config, context, monitors=monitors).metrics)
            elif command == "evaluate":
                results.append(run_evaluate(config, context).metrics)
            else:
                run_export(config, context)
                results.append({})
        except Died:
            results.append("died")
        except DtrainError as error:
            results.append([type(error).__name__, str(error)])
    return results


def run(folder: Path, world: int, *runs: tuple[str, str, Mapping[str, Any], int | None]) -> Any:
    """Returns the results of rank 0."""
    return run_ranks(commands, world, str(folder), [(c, n, dict(s), d) for c, n, s, d in runs])[0]


def resumed_at(folder: Path, name: str) -> list[int]:
    """Returns the steps that the starts of a run resumed from."""
    lines = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event["step"] for event in map(json.loads, lines) if event["event"] == "resume"]


def checkpoint(folder: Path, name: str, step: int) -> Path:
    return folder / "runs" / name / "checkpoints" / f"step-{step:06d}"


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_can_be_evaluated_and_start_a_run(folder: Path, form: str) -> None:
    name = form.replace(" ", "-")
    last = {"train.eval_every": "epoch", **FORMS[form]}
    step = checkpoint(folder, name, resuming.STEPS)
    changes = {"model.name_or_path": step, "run.name": f"{name}-measured"}

    trained, measured, begun = run(
        folder,
        2,
        ("train", name, last, None),
        ("evaluate", "", changes, None),
        ("train", "", {**changes, "run.name": f"{name}-more", "train.max_steps": 1, "checkpoint.every": "null"}, None),
    )

    assert measured == trained
    first = resuming.losses(folder, f"{name}-more")[1]
    assert first != resuming.losses(folder, name)[1]
    assert begun == {}


def test_transformers_loads_a_checkpoint_and_export_writes_it_as_a_model(folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    step, out = checkpoint(folder, "exported", 3), folder / "out"
    _, exported = run(
        folder,
        1,
        ("train", "exported", {"train.max_steps": 3}, None),
        ("export", "", {"model.name_or_path": step, "export.to": out}, None),
    )

    assert exported == {}
    names = {file.name for file in out.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    inputs = AutoTokenizer.from_pretrained(out)("the cat sees a dog", return_tensors="pt")
    trained = folder / "runs" / "exported" / "model"
    models = [AutoModelForSequenceClassification.from_pretrained(f).eval() for f in (trained, step, out)]
    weights = [model.state_dict() for model in models]
    with torch.no_grad():
        logits = [model(**inputs).logits for model in models]
    for other in (1, 2):
        assert all(torch.equal(value, weights[other][name]) for name, value in weights[0].items())
        assert torch.allclose(logits[0], logits[other], rtol=1e-6, atol=1e-6)


def test_a_damaged_checkpoint_is_refused_as_a_model(folder: Path) -> None:
    run(folder, 1, ("train", "hurt", {"train.max_steps": 2}, None))
    step = checkpoint(folder, "hurt", 2)
    with (step / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x77")

    (error,) = run(folder, 2, ("evaluate", "", {"model.name_or_path": step, "run.name": "hurt-measured"}, None))

    kind, message = error
    assert kind == CheckpointError.__name__
    assert "is a damaged checkpoint: model.safetensors has the right size but its contents changed" in message


class Bomb:
    def __reduce__(self) -> Any:
        return os.abort, ()


def flip_last(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


HARM: dict[str, tuple[Callable[[Path], Any], int]] = {
    "flipped": (lambda path: flip_last(path / "model.safetensors"), 6),
    "cut": (lambda path: os.truncate(path / "optimizer.safetensors", 99), 6),
    "missing": (lambda path: (path / "state.json").unlink(), 6),
    "pickled": (lambda path: (path / "optimizer.pt").write_bytes(pickle.dumps(Bomb())), 7),
}
"""What is done to the checkpoint of step 7, and the step that the next start resumes from."""


def test_a_run_resumes_from_the_newest_intact_checkpoint_and_ends_with_the_same_bits(folder: Path) -> None:
    run(folder, 2, ("train", "unharmed", {}, None), *(("train", name, {}, 8) for name in [*HARM, "all"]))
    for name, (harm, _) in HARM.items():
        harm(checkpoint(folder, name, 7))
    for path in checkpoint(folder, "all", 7).parent.iterdir():
        flip_last(path / "model.safetensors")

    *done, refused = run(folder, 2, *(("train", name, {}, None) for name in [*HARM, "all"]))

    unharmed = resuming.weights_and_moments(folder, "unharmed", resuming.STEPS)
    assert all(isinstance(metrics, dict) for metrics in done)
    for name, (_, step) in HARM.items():
        assert resumed_at(folder, name) == [step], name
        assert resuming.weights_and_moments(folder, name, resuming.STEPS) == unharmed, name
        assert checkpoint(folder, name, 7).with_name("damaged-step-000007").exists() == (step == 6)
    assert refused[0] == CheckpointError.__name__
    assert "every checkpoint is damaged (step 5, 6, 7)" in refused[1]


def test_the_best_step_of_an_earlier_start_gives_the_model_and_the_result(folder: Path) -> None:
    steady = run(folder, 2, ("train", "best-steady", BEST, None))[0]
    best = json.loads((folder / "runs" / "best-steady" / "summary.json").read_text())["best_step"]
    last = resuming.STEPS - 1
    assert best < last, "this data does not test the case"

    died, resumed = run(folder, 2, ("train", "best", BEST, last), ("train", "best", BEST, None))

    assert died == "died"
    assert resumed == steady
    one, other = (folder / "runs" / name / "model" / "model.safetensors" for name in ("best", "best-steady"))
    assert one.read_bytes() == other.read_bytes()
    assert checkpoint(folder, "best", best).is_dir()


def test_a_best_step_without_weights_is_searched_again(folder: Path) -> None:
    first_is_best = {**BEST, "evaluation.best": "{metric: loss, mode: max}", "train.max_steps": 10}
    unsaved = {**first_is_best, "checkpoint.every": "null"}
    saved = {**first_is_best, "checkpoint.every": 2}

    asked, died = run(folder, 2, ("train", "unsaved", unsaved, -5), ("train", "hurt-best", saved, 7))
    best = json.loads((checkpoint(folder, "unsaved", 6) / "state.json").read_text())["run"]["best_step"]
    assert best < 6, "this data does not test the case"
    flip_last(checkpoint(folder, "hurt-best", best) / "model.safetensors")
    alone, hurt = run(folder, 2, ("train", "unsaved", unsaved, None), ("train", "hurt-best", saved, None))

    assert asked[0] == "Preempted"
    assert "Stopped after step 6: stop requested by a monitor. The checkpoint is saved" in asked[1]
    assert died == "died"
    assert resumed_at(folder, "unsaved") == [6]
    summaries = [json.loads((folder / "runs" / n / "summary.json").read_text()) for n in ("unsaved", "hurt-best")]
    assert summaries[0]["best_step"] in (8, 10)
    assert summaries[0]["eval"] == alone
    assert summaries[1]["best_step"] == 10
    assert summaries[1]["eval"] == hurt


def test_other_data_and_another_model_are_refused(folder: Path) -> None:
    wider = resuming.tiny.write_model(folder / "wider", layers=3)
    resuming.tiny.write_cola(folder / "others", train=150, dev=7, seed=1)
    died = ("train", "other", {}, 4)
    allowed = {"checkpoint.allow_changes": "[data, model]"}

    _, rows, others, model, refused, shorter, mended = run(
        folder,
        1,
        died,
        ("train", "other", {"data.limit": 100, "checkpoint.allow_changes": "[data.limit]"}, None),
        ("train", "other", {"data.path": folder / "others", "checkpoint.allow_changes": "[data.path]"}, None),
        ("train", "other", {**allowed, "model.name_or_path": wider}, None),
        ("train", "other", {"data.limit": 100}, None),
        ("train", "other", {"train.max_steps": 2}, None),
        ("train", "other", {}, None),
    )

    assert rows[0] == DataError.__name__
    assert "The training data has 100 examples, but the checkpoint of step 3 was made with 150" in rows[1]
    assert others[0] == DataError.__name__
    assert "The data have changed since the checkpoint of step 3: split train, validation has other" in others[1]
    assert model[0] == CheckpointError.__name__
    assert "it has no bert.encoder.layer.2" in model[1]
    assert refused[0] == ConfigError.__name__
    assert "data.limit: null -> 100" in refused[1]
    assert shorter[0] == ConfigError.__name__
    assert "The run is already at step 3, but ends at step 2" in shorter[1]
    assert isinstance(mended, dict), mended  # The refused starts changed nothing.


def test_a_run_resumes_from_a_named_checkpoint_and_renames_newer_ones(folder: Path) -> None:
    path = checkpoint(folder, "back", 4)
    keep = {"checkpoint.keep": 9}
    back = {**keep, "checkpoint.resume": path}

    run(folder, 1, ("train", "back", keep, 7), ("train", "back", back, 6), ("train", "back", back, 5))

    assert resumed_at(folder, "back") == [4, 4]
    left = sorted(entry.name for entry in path.parent.glob("left-*"))
    assert left == ["left-step-000005", "left-step-000005-2", "left-step-000006"]
    assert max(list_checkpoints(path.parent)) == 4


def test_a_checkpoint_of_another_version_is_neither_damaged_nor_renamed(folder: Path) -> None:
    run(folder, 1, ("train", "other-version", {}, 5))
    path = checkpoint(folder, "other-version", 4)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["self"]
    (path / "manifest.json").write_text(manifest_text({**manifest, "format": "dtrain-checkpoint-9"}))

    errors = run(
        folder,
        2,
        ("train", "other-version", {}, None),
        ("train", "other-version-2", {"checkpoint.resume": path}, None),
        ("train", "other-version-3", {"model.name_or_path": path}, None),
    )

    assert [kind for kind, _ in errors] == [CheckpointError.__name__] * 3
    for _, message in errors:
        assert f"{path} cannot be read: it was written in the format dtrain-checkpoint-9" in message
        assert "damaged" not in message
    assert path.is_dir()


def test_a_path_without_a_checkpoint_is_refused_on_every_rank(folder: Path) -> None:
    (error,) = run(folder, 2, ("train", "nowhere", {"checkpoint.resume": folder / "model"}, None))

    assert error[0] == CheckpointError.__name__
    assert "is not a complete checkpoint: manifest.json is missing" in error[1]
    assert not (folder / "runs" / "nowhere" / "config.yaml").exists()
