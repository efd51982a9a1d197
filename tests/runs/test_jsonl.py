"""metrics.jsonl from its end: what a start needs of it costs a few blocks, however long the run was."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dtrain.errors import DataError
from dtrain.runs import jsonl
from dtrain.runs.jsonl import MetricsLog, read_events, read_events_backward
from dtrain.runs.resume_policy import _known_checkpoint


class CountingFile(io.FileIO):
    """Counts the bytes that are read."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        type(self).count += len(data or b"")
        return data or b""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "BLOCK", 64)


def write(path: Path, *events: dict[str, Any], rest: str = "") -> Path:
    path.write_text("".join(json.dumps(event) + "\n" for event in events) + rest, encoding="utf-8")
    return path


def train(step: int, **more: Any) -> dict[str, Any]:
    return {"event": "train", "step": step, **more}


@pytest.mark.parametrize("rest", ["", '{"event": "checkpoint", "st', "\u00e9" * 100])
@pytest.mark.parametrize("pad", [0, 1, 17, 63, 64, 65, 300])
def test_the_last_event_of_a_kind_is_found_across_blocks(tmp_path: Path, pad: int, rest: str) -> None:
    path = write(
        tmp_path / "metrics.jsonl",
        {"event": "checkpoint", "step": 3},
        train(4, note="\u00e9" * pad),
        {"event": "resume", "step": 3, "note": "\r\u2028\x0b"},
        {"event": "eval", "note": "x" * pad, "kind": "checkpoint"},
        {"event": "checkpoint", "step": 5, "note": "y" * pad},
        train(6, note="z" * pad),
        rest=rest,
    )

    found = list(read_events_backward(path, ("checkpoint", "resume")))

    expected = [event for event in read_events(path) if event["event"] in ("checkpoint", "resume")]
    assert found == expected[::-1]
    assert [event["step"] for event in found] == [5, 3, 3]
    assert _known_checkpoint(path) == 5


def test_what_a_resume_discarded_is_not_known_any_more(tmp_path: Path) -> None:
    saved, resumed, begun = (
        {"event": "checkpoint", "step": 9},
        {"event": "resume", "step": 4},
        {"event": "resume", "step": 0},
    )

    assert _known_checkpoint(write(tmp_path / "a", saved, resumed, train(5))) == 4
    assert _known_checkpoint(write(tmp_path / "b", saved, begun, train(5))) is None
    assert _known_checkpoint(write(tmp_path / "c", train(5))) is None
    assert _known_checkpoint(write(tmp_path / "d")) is None
    assert _known_checkpoint(tmp_path / "none") is None


def test_a_damaged_line_of_that_kind_is_named_by_its_number(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", train(1), train(2, note="x" * 200), rest='{"event": "checkpoint", \n')

    with pytest.raises(DataError, match=r"line 3: not JSON"):
        _known_checkpoint(path)


def test_the_command_in_the_message_removes_the_damaged_line_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "my run's metrics.jsonl", train(1), rest="DAMAGED\n" + json.dumps(train(2)) + "\n")
    with pytest.raises(DataError, match=r"line 2: not JSON") as error:
        list(read_events(path))

    subprocess.run(shlex.split(str(error.value).partition("without this one: ")[2]), check=True)

    assert list(read_events(path)) == [train(1), train(2)]


def test_a_start_needs_no_line_but_those_of_checkpoints_and_resumes(tmp_path: Path) -> None:
    saved = json.dumps({"event": "checkpoint", "step": 4}) + "\n"

    assert _known_checkpoint(write(tmp_path / "metrics.jsonl", train(1), rest="DAMAGED\n" + saved)) == 4


@pytest.mark.parametrize(
    ("text", "kept"),
    [("", ""), ("a\nb\n", "a\nb\n"), ("a\nb", "a\n"), ("torn", ""), ("a\n" + "x" * 500, "a\n"), ("x" * 500, "")],
)
def test_opening_the_log_cuts_an_incomplete_last_line(tmp_path: Path, text: str, kept: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text, encoding="utf-8")

    with MetricsLog(path) as log:
        log.write({"event": "end"})

    assert path.read_text(encoding="utf-8") == kept + '{"event": "end"}\n'


def test_a_long_file_is_read_for_a_few_blocks(tmp_path: Path) -> None:
    steps = [train(step) for step in range(2000)]
    path = write(tmp_path / "metrics.jsonl", *steps, {"event": "checkpoint", "step": 7}, *steps[:3], rest='{"ev')

    with CountingFile(str(path)) as file:
        end = jsonl._end_of_complete_lines(file)
        assert end == path.stat().st_size - 4
        _, line = next(line for line in jsonl._lines_backward(file) if b"checkpoint" in line[1])

    assert json.loads(line)["step"] == 7
    assert CountingFile.count <= 6 * jsonl.BLOCK


def test_a_line_longer_than_many_blocks_is_read_about_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", train(1, note="x" * 20_000))
    CountingFile.count = 0

    with CountingFile(str(path)) as file:
        assert len(list(jsonl._lines_backward(file))) == 1

    assert CountingFile.count <= 2 * path.stat().st_size
