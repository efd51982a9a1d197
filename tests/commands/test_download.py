"""The download command with a local hub, and its downloads used offline.

The hub's address is read once, at import, so the commands for one hub run one after the other in one process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from dtrain.commands.download import run_download
from dtrain.config.load import load_config
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError
from tests.support.hub_files import write_data, write_model
from tests.support.hub_server import serve_hub

pytestmark = pytest.mark.commands

ROOT = Path(__file__).resolve().parents[2]
MODEL = "model.name_or_path=tester/tiny"
DATA = "data.name=tester/tiny-data"
NOWHERE = "http://127.0.0.1:9"

COMMANDS = """
import json, sys
from dtrain.main import main
for argv in json.loads(sys.argv[1]):
    print("ended", main(argv))
"""


@dataclass(frozen=True)
class Ended:
    """A command's exit code and what it printed."""

    code: int
    text: str

    @property
    def last(self) -> str:
        return self.text.rstrip().splitlines()[-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def run(hub: str, home: Path, *commands: Sequence[str], offline: bool = False) -> list[Ended]:
    """Runs the commands one after the other, with that hub and that cache."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    variables = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline)), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(argv, cwd=ROOT, env={**kept, **variables}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    *parts, _ = re.split(r"^ended (\d+)\n", done.stdout, flags=re.MULTILINE)
    return [Ended(int(code), text) for text, code in zip(parts[::2], parts[1::2], strict=True)]


@pytest.mark.slow
def test_a_download_works_offline_and_a_failed_one_names_its_cause(tmp_path: Path, model: Path, data: Path) -> None:
    (model / "old_weights.bin").write_text("large")
    home, taken = tmp_path / "home", tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")

    def lost(request: str) -> bool:
        return "tester/torn/resolve/" in request and request.endswith("model.safetensors")

    models = {"tester/tiny": model, "tester/torn": model}
    with serve_hub(models=models, datasets={"tester/tiny-data": data}, lost=lost) as hub:
        cached, in_folder, again, table, refused, moved, torn, no_model, no_data = run(
            hub.address,
            home,
            ["download", MODEL, DATA, "download.ignore=['*.bin']"],
            ["download", MODEL, f"download.to={tmp_path / 'model'}", "download.ignore=['*.bin']"],
            ["download", MODEL, f"download.to={tmp_path / 'model'}"],
            ["download", DATA, f"download.to={tmp_path / 'data'}"],
            ["download", DATA, f"download.to={taken}"],
            ["download", DATA, f"download.to={taken}", "run.overwrite=true"],
            ["download", "model.name_or_path=tester/torn"],
            ["download", "model.name_or_path=tester/tyni"],
            ["download", "data.name=tester/tyni"],
        )
        fetched = [request.rpartition("/")[2] for request in hub.requests if "GET /tester/tiny/" in request]

    offline = "To use it offline: HF_HUB_OFFLINE=1 python dtrain/main.py"
    assert (cached.code, cached.last) == (0, f"{offline} {MODEL} {DATA}")
    assert "model.safetensors" in fetched
    assert fetched.count("old_weights.bin") == 1, "only where nothing is left out"
    line = "To use it offline: python dtrain/main.py"
    assert (in_folder.code, in_folder.last) == (0, f"{line} model.name_or_path={tmp_path / 'model'}")
    assert (again.code, (tmp_path / "model" / "old_weights.bin").is_file()) == (0, True), (
        "the download continues an earlier one"
    )
    assert (table.code, table.last) == (0, f"{line} data.path={tmp_path / 'data'}")
    assert "train 3, validation 1 rows" in table.text
    assert (refused.code, moved.code) == (2, 0)
    assert "already exists" in refused.text
    (old,) = tmp_path.glob("taken.old-*")
    assert (old / "notes.txt").read_text() == "mine"
    assert (torn.code, "could not be downloaded completely" in torn.text, "Run download again" in torn.text) == (
        3,
        1,
        1,
    )
    assert (no_model.code, "tester/tyni is neither a local folder" in no_model.text) == (2, True)
    assert (no_data.code, "There is no data set tester/tyni" in no_data.text) == (3, True)

    train = ["train", "task.name=classification", "train.max_steps=2", "data.max_length=32"]
    train += [f"run.output_dir={tmp_path / 'runs'}", "tracking.tensorboard=false"]
    from_cache, from_folders = run(
        NOWHERE,
        home,
        [*train, "run.name=cache", *cached.last.split()[-2:]],
        [*train, "run.name=folders", in_folder.last.split()[-1], table.last.split()[-1]],
        offline=True,
    )
    assert (from_cache.code, from_folders.code) == (0, 0), from_cache.text + from_folders.text


def test_a_hub_that_does_not_answer_is_named(tmp_path: Path, model: Path) -> None:
    with serve_hub(models={"tester/tiny": model}, datasets={}) as hub:
        (cached,) = run(hub.address, tmp_path, ["download", MODEL])
    known, other, table = run(
        NOWHERE, tmp_path, ["download", MODEL], ["download", "model.name_or_path=tester/other"], ["download", DATA]
    )

    assert cached.code == 0
    assert (known.code, other.code, table.code) == (3, 3, 3)
    assert f"tester/tiny cannot be downloaded: {NOWHERE} does not answer" in known.text
    assert "model.name_or_path=tester/other: could not get tester/other/config.json" in other.text
    assert f"the data set tester/tiny-data could not be downloaded from {NOWHERE}" in table.text


def test_settings_that_fetch_nothing_or_too_much_are_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "file").write_text("")
    wrong = {
        "There is nothing to download": [],
        "There is nothing to download: ": [f"model.name_or_path={model}"],
        "takes one repository, but model.name_or_path and data.name are set": [MODEL, DATA, "download.to=x"],
        r"download.ignore=\['\*'\] works only with models": [DATA, "download.ignore=['*']"],
        "file is a file: set it to a folder": [MODEL, f"download.to={tmp_path / 'file'}"],
    }
    for message, settings in wrong.items():
        with pytest.raises(ConfigError, match=message):
            run_download(load_config(None, settings, command="download"), ONE_PROCESS)
