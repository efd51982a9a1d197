"""Models and data sets from a hub: a server on this machine, asked by a process that knows it as HF_ENDPOINT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import BertConfig, BertModel, BertTokenizerFast

from tests.hub_server import Hub, serve_hub

ROOT = Path(__file__).resolve().parents[2]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on a mat".split()

LOAD_DATA = """
import json, sys
from dtrain.data.sources import label_names, load_sources, source_key
from dtrain.errors import DataError
from dtrain.schema import Data
data = Data(**json.loads(sys.argv[1]))
try:
    key = source_key(data)
    sources = load_sources(data, kind="labelled")
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
    folder = tmp_path_factory.mktemp("model")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One configuration, as push_to_hub lays it out: Parquet below data/, class names in the card."""
    folder = tmp_path_factory.mktemp("data")
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    (folder / "data").mkdir()
    for split, rows in (("train", [("the cat", 1), ("a mat", 0), ("on", 1)]), ("validation", [("the mat", 0)])):
        columns = {"sentence": [text for text, _ in rows], "label": [label for _, label in rows]}
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return folder


def run(script: str, *arguments: str, home: Path, hub: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env = {**kept, "HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def load_data(home: Path, hub: str, *, offline: bool = False, **settings: Any) -> dict[str, Any]:
    done = run(LOAD_DATA, json.dumps(settings), home=home, hub=hub, offline=offline)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return loaded


def test_a_data_set_loads_from_the_hub_then_from_the_cache_and_fails_without_either(tmp_path: Path, data: Path) -> None:
    with serve_hub(models={}, datasets={"tester/tiny-data": data}) as hub:
        loaded = load_data(tmp_path / "home", hub.address, name="tester/tiny-data")
        asked = list(hub.requests)
    cached = load_data(tmp_path / "home", hub.address, name="tester/tiny-data", offline=True)
    unreachable = load_data(tmp_path / "home", hub.address, name="tester/tiny-data")["error"]
    uncached = load_data(tmp_path / "other", hub.address, name="tester/tiny-data", offline=True)["error"]

    assert loaded["labels"] == ["no", "yes"]
    assert loaded["rows"]["train"][0] == {"text": "the cat", "label": "yes", "line": 1}
    assert [len(rows) for rows in loaded["rows"].values()] == [3, 1]
    assert any(request.startswith("GET /datasets/tester/tiny-data/resolve/") for request in asked)
    assert cached == loaded
    for message in (unreachable, uncached):
        assert "tester/tiny-data" in message
        assert "data.path=FOLDER" in message
    assert hub.address in unreachable


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "tester/missing"}, ["no data set tester/missing", "HF_TOKEN"]),
        ({"name": "tester/tiny-data", "config": "large"}, ["configuration large", "default"]),
        ({"name": "tester/tiny-data", "splits": {"train": "train", "validation": "tset"}}, ["tset", "validation"]),
        ({"name": "tester/tiny-data", "columns": {"text": "txt"}}, ["txt", "sentence, label"]),
    ],
)
def test_what_the_hub_does_not_have_is_named_with_what_it_has(
    tmp_path: Path, data: Path, settings: dict[str, Any], words: list[str]
) -> None:
    with serve_hub(models={}, datasets={"tester/tiny-data": data}) as hub:
        message = load_data(tmp_path, hub.address, **settings)["error"]

    for word in words:
        assert word in message


def test_a_slice_of_a_split_is_loaded(tmp_path: Path, data: Path) -> None:
    splits = {"train": "train[:2]", "validation": "train[2:]"}
    with serve_hub(models={}, datasets={"tester/tiny-data": data}) as hub:
        rows = load_data(tmp_path, hub.address, name="tester/tiny-data", splits=splits)["rows"]

    assert [[row["text"] for row in part] for part in rows.values()] == [["the cat", "a mat"], ["on"]]


def test_a_data_file_that_the_hub_lost_is_named(tmp_path: Path, data: Path) -> None:
    def lose(request: str) -> bool:
        return "/resolve/" in request and request.endswith("validation-00000-of-00001.parquet")

    with serve_hub(models={}, datasets={"tester/tiny-data": data}, lost=lose) as hub:
        message = load_data(tmp_path, hub.address, name="tester/tiny-data")["error"]

    assert "validation-00000-of-00001.parquet" in message
    assert "save_to_disk" in message


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
    command += ["data.name=tester/tiny-data", "train.max_steps=2", "run.name=hub", f"run.output_dir={out}", *settings]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180)


def test_a_run_takes_model_and_data_from_the_hub(tmp_path: Path, model: Path, data: Path) -> None:
    with serve_hub(models={"tester/tiny": model}, datasets={"tester/tiny-data": data}) as hub:
        done = train(hub.address, tmp_path / "home", tmp_path / "runs")

    assert done.returncode == 0, done.stdout + done.stderr
    labels = json.loads((tmp_path / "runs" / "hub" / "model" / "config.json").read_text())["id2label"]
    assert labels == {"0": "no", "1": "yes"}


@pytest.mark.parametrize("missing", ["model", "data"])
def test_a_run_without_its_model_or_data_ends_with_its_code_and_the_name(
    tmp_path: Path, model: Path, data: Path, missing: str
) -> None:
    models, tables = {"tester/tiny": model}, {"tester/tiny-data": data}
    with serve_hub(models=models if missing == "data" else {}, datasets=tables if missing == "model" else {}) as hub:
        done = train(hub.address, tmp_path / "home", tmp_path / "runs")

    shown = done.stdout + done.stderr
    assert done.returncode == (3 if missing == "data" else done.returncode) != 0, shown
    assert ("tester/tiny-data" if missing == "data" else "tester/tiny") in shown
    assert "Traceback" not in shown
