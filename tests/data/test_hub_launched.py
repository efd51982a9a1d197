"""Models and data sets from a hub: a local server, which a subprocess uses as HF_ENDPOINT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.hub_files import write_data, write_model
from tests.support.hub_server import serve_hub

pytestmark = pytest.mark.commands

ROOT = Path(__file__).resolve().parents[2]
TINY = {"name": "tester/tiny-data"}
LOAD_DATA = """
import json, sys
from dtrain.data.tables import LABELED
from dtrain.data.sources import label_names, load_sources, source_key
from dtrain.errors import DataError
from dtrain.config.schema import Data
for settings in json.loads(sys.argv[1]):
    data = Data(**settings)
    try:
        key = source_key(data)
        sources = load_sources(data, LABELED)
        rows = {split: [dict(row) for row in source.rows] for split, source in sources.items()}
        print(json.dumps({"revision": key["identity"]["revision"], "labels": label_names(sources), "rows": rows}))
    except DataError as error:
        print(json.dumps({"error": str(error)}))
"""

LOAD_MODEL = """
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("tester/tiny")
print(AutoModel.from_pretrained("tester/tiny").num_parameters(), tokenizer("the cat").input_ids)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def run(script: str, *arguments: str, home: Path, hub: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env = {
        **kept,
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def load_data(home: Path, hub: str, *settings: dict[str, Any], offline: bool = False) -> list[dict[str, Any]]:
    done = run(LOAD_DATA, json.dumps(settings), home=home, hub=hub, offline=offline)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-len(settings) :]]


def test_a_data_set_loads_from_the_hub_then_from_the_cache_and_fails_without_either(tmp_path: Path, data: Path) -> None:
    with serve_hub(models={}, datasets={"tester/tiny-data": data}) as hub:
        (loaded,) = load_data(tmp_path / "home", hub.address, TINY)
        asked = list(hub.requests)
    (cached,) = load_data(tmp_path / "home", hub.address, TINY, offline=True)
    (unreachable,) = load_data(tmp_path / "home", hub.address, TINY)
    (uncached,) = load_data(tmp_path / "other", hub.address, TINY, offline=True)

    assert loaded["labels"] == ["no", "yes"]
    assert loaded["rows"]["train"][0] == {"text": "the cat", "label": "yes", "line": 1}
    assert [len(rows) for rows in loaded["rows"].values()] == [3, 1]
    assert any(request.startswith("GET /datasets/tester/tiny-data/resolve/") for request in asked)
    assert cached == loaded
    for answer in (unreachable, uncached):
        assert "tester/tiny-data" in answer["error"]
        assert "data.path=FOLDER" in answer["error"]
    assert hub.address in unreachable["error"]


def test_splits_can_be_swapped_and_a_missing_split_is_named_with_the_existing_ones(tmp_path: Path, data: Path) -> None:
    slices = {**TINY, "splits": {"train": "validation", "validation": "train", "test": "train[2:]"}}
    wrong: list[tuple[dict[str, Any], list[str]]] = [
        ({"name": "tester/missing"}, ["no data set tester/missing", "HF_TOKEN"]),
        ({**TINY, "config": "large"}, ["configuration large", "default"]),
        ({**TINY, "splits": {"train": "train", "validation": "tset"}}, ["tset", "validation"]),
        ({**TINY, "columns": {"text": "txt"}}, ["txt", "sentence, label"]),
    ]
    with serve_hub(models={}, datasets={"tester/tiny-data": data}) as hub:
        sliced, *answers = load_data(tmp_path, hub.address, slices, *(settings for settings, _ in wrong))

    assert [[row["text"] for row in part] for part in sliced["rows"].values()] == [
        ["the mat"],
        ["the cat", "a mat", "on"],
        ["on"],
    ]
    for answer, (_, words) in zip(answers, wrong, strict=True):
        assert [word for word in words if word not in answer["error"]] == []


def test_a_data_file_that_the_hub_lost_is_named(tmp_path: Path, data: Path) -> None:
    def lose(request: str) -> bool:
        return "/resolve/" in request and request.endswith("validation-00000-of-00001.parquet")

    with serve_hub(models={}, datasets={"tester/tiny-data": data}, lost=lose) as hub:
        (answer,) = load_data(tmp_path, hub.address, TINY)

    assert "validation-00000-of-00001.parquet" in answer["error"]
    assert "dtrain download data.name=tester/tiny-data" in answer["error"]


def test_a_model_and_its_tokenizer_load_from_the_hub(tmp_path: Path, model: Path) -> None:
    with serve_hub(models={"tester/tiny": model}, datasets={}) as hub:
        done = run(LOAD_MODEL, home=tmp_path, hub=hub.address)

    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1)[1].strip() == "[2, 5, 6, 3]"
    assert any("model.safetensors" in request for request in hub.requests)


def train(hub: str, home: Path, out: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env = {**kept, "HF_ENDPOINT": hub, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "dtrain/main.py", "train", "task.name=classification", "model.name_or_path=tester/tiny"]
    command += [
        "data.name=tester/tiny-data",
        "train.max_steps=2",
        "data.max_length=32",
        "run.name=hub",
        f"run.output_dir={out}",
        *settings,
    ]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180)


def test_a_run_loads_model_and_data_from_the_hub(tmp_path: Path, model: Path, data: Path) -> None:
    with serve_hub(models={"tester/tiny": model}, datasets={"tester/tiny-data": data}) as hub:
        done = train(hub.address, tmp_path / "home", tmp_path / "runs")

    assert done.returncode == 0, done.stdout + done.stderr
    labels = json.loads((tmp_path / "runs" / "hub" / "model" / "config.json").read_text())["id2label"]
    assert labels == {"0": "no", "1": "yes"}


@pytest.mark.parametrize(
    ("has_model", "has_data", "code", "named"),
    [(False, True, 2, "tester/tiny"), (True, False, 3, "tester/tiny-data"), (None, None, 3, "config.json")],
    ids=["no model", "no data set", "no hub"],
)
def test_a_run_without_its_model_or_data_ends_with_its_code_and_the_name(
    tmp_path: Path, model: Path, data: Path, has_model: bool | None, has_data: bool | None, code: int, named: str
) -> None:
    models = {"tester/tiny": model} if has_model else {}
    tables = {"tester/tiny-data": data} if has_data else {}
    with serve_hub(models=models, datasets=tables) as hub:
        if has_model is not None:
            done = train(hub.address, tmp_path / "home", tmp_path / "runs")
    if has_model is None:
        done = train(hub.address, tmp_path / "home", tmp_path / "runs")

    shown = done.stdout + done.stderr
    assert done.returncode == code, shown
    assert named in shown
    assert "Traceback" not in shown
