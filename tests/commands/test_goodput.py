"""Where the wall time of a run went, on logs made up by hand: every second in one part, and the sums known before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dtrain.commands.arguments import parse
from dtrain.commands.goodput import Account, account_of, describe, run_goodput
from dtrain.errors import ConfigError, DataError
from dtrain.main import main

BOOT = 1000.0
"""Wall time less monotonic time."""


def at(now: float, event: str, /, **values: Any) -> dict[str, Any]:
    """A line written so many seconds after the machine's start."""
    return {"event": event, **values, "time_s": BOOT + now, "monotonic_s": now}


def train(now: float, step: int, **more: Any) -> dict[str, Any]:
    return at(now, "train", step=step, **{"applied": True, **more})


PLAIN = [
    at(10, "start", startup_s=4.0),
    train(15, 1),  # 3 s until the first step began, which took 2 s as the others did
    train(33, 10),
    train(53, 20),
    at(58, "eval", step=20, seconds=5.0),
    train(78, 30),
    at(81, "end", step=30),
]


def parts(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The parts that are not nothing; their sum is checked on the way."""
    account = account_of(lines)
    found = {part: round(seconds, 6) for part, seconds in account.seconds.items() if round(seconds, 6)}
    assert sum(found.values()) == pytest.approx(account.total)
    return found


def test_a_run_of_one_start_has_its_start_up_training_evaluation_and_end() -> None:
    account = account_of(PLAIN)

    assert parts(PLAIN) == {"start_up": 7.0, "training": 60.0, "evaluation": 5.0, "finishing": 3.0}
    assert account.total == pytest.approx(75.0)
    assert account.goodput == pytest.approx(0.8)
    assert (account.steps, account.recomputed_steps, account.generations) == (30, 0, 1)


KILLED = [
    at(10, "start", startup_s=4.0),
    train(12, 1),
    train(30, 10),
    at(31, "checkpoint", step=10, stall_s=1.0, seconds=8.0, bytes=5),
    train(51, 20),
    train(61, 25),  # killed here, or soon after
    at(100, "start", startup_s=9.0),
    at(104, "resume", step=10),
    train(126, 20),  # 2 s at the first batch
    train(146, 30),
    at(147, "checkpoint", step=30, stall_s=1.0, seconds=8.0, bytes=5),
    at(150, "end", step=30),
]


def test_steps_taken_again_after_a_kill_and_the_time_between_are_lost() -> None:
    account = account_of(KILLED)

    assert parts(KILLED) == {
        "start_up": 4.0 + 0.0 + 9.0 + 4.0 + 2.0,
        "training": 50.0 + 10.0,  # 25 steps, then 26 to 30
        "recomputed": 30.0,  # 11 to 25
        "checkpoint": 2.0,
        "finishing": 3.0,
        "down": 100 - 9 - 61.0,
    }
    assert (account.steps, account.recomputed_steps, account.generations) == (30, 15, 2)


def test_a_run_that_began_again_at_step_1_took_all_steps_again() -> None:
    lines = [*KILLED[:6], at(100, "start"), train(102, 1), train(150, 25), train(160, 30)]

    account = account_of(lines)

    assert account.recomputed_steps == 25
    assert account.seconds["recomputed"] == pytest.approx(50.0)
    assert account.seconds["training"] == pytest.approx(50.0 + 10.0)


def test_another_machine_has_another_monotonic_clock_and_the_wall_clock_joins_them() -> None:
    moved = [*KILLED[:6], *({**line, "monotonic_s": line["monotonic_s"] + 5e6} for line in KILLED[6:])]

    assert parts(moved) == parts(KILLED)


def test_a_wall_clock_that_was_set_back_makes_no_time_negative() -> None:
    back = [*KILLED[:6], *({**line, "time_s": line["time_s"] - 1000} for line in KILLED[6:])]

    expected = parts(KILLED)
    assert parts(back) == {part: seconds for part, seconds in expected.items() if part != "down"}


def test_a_hang_is_the_time_from_the_last_step_to_its_fault() -> None:
    lines = [
        at(0, "start"),
        train(2, 1),
        train(20, 10),
        at(84, "fault", kind="hang", step=12),
        at(85, "end", step=12),
    ]

    assert parts(lines) == {"training": 24.0, "faults": 61.0}


def test_a_step_whose_update_was_dropped_is_lost() -> None:
    lines = [
        at(0, "start"),
        train(2, 1),
        train(20, 10),
        at(30, "fault", kind="non_finite", step=15),
        train(30, 15, applied=False),
        train(40, 20),
    ]

    assert parts(lines) == {"training": 38.0, "faults": 2.0}


def test_a_stall_is_of_the_time_when_it_was_though_its_line_comes_many_steps_later() -> None:
    lines = [
        at(0, "start"),
        train(1, 1),
        train(10, 10),  # the loop stands still from here to 16
        train(26, 20),
        train(36, 30),
        at(36.5, "checkpoint", step=10, stall_began_s=10.0, stall_s=6.0, seconds=20.0, bytes=5),
        train(37, 31),
        at(38, "checkpoint", step=31, stall_began_s=37.0, stall_s=1.0, seconds=1.0, bytes=5),
        train(47, 40),
    ]

    assert parts(lines) == {"training": 40.0, "checkpoint": 7.0}


def test_the_stall_of_a_checkpoint_that_could_not_be_written_is_one_too() -> None:
    lines = [
        at(0, "start"),
        train(1, 1),
        train(10, 10),
        train(22, 20),
        at(23, "fault", kind="checkpoint", step=10, stall_began_s=10.0, stall_s=2.0),
        train(32, 30),
    ]

    assert parts(lines) == {"training": 30.0, "checkpoint": 2.0}


def test_the_export_of_a_new_best_model_and_going_back_to_a_checkpoint_are_no_training() -> None:
    lines = [
        at(0, "start"),
        train(1, 1),
        train(10, 10),
        at(12, "eval", step=10, seconds=2.0),
        at(15, "export", step=10, seconds=3.0),
        train(25, 20),
        at(29, "rollback", step=20, to_step=17, seconds=4.0),
        train(39, 30),
        at(40, "end", step=30),
    ]

    # The updates of steps 18 to 20 are undone.
    assert parts(lines) == {"training": 27.0, "evaluation": 2.0, "finishing": 4.0, "faults": 4.0 + 3.0}


def test_an_update_that_a_spike_has_cost_is_lost_whether_the_step_has_a_line_or_not() -> None:
    def spike(now: float, step: int, action: str) -> dict[str, Any]:
        return at(now, "fault", kind="spike", step=step, action=action)

    lines = [
        at(0, "start"),
        train(1, 1),
        train(10, 10, applied=False),
        spike(10, 10, "skip"),  # after the line of its step
        spike(14, 14, "skip"),
        spike(15, 15, "warn"),
        train(20, 20),
        train(30, 30),
    ]

    assert parts(lines) == {"training": 28.0, "faults": 2.0}


def test_a_start_that_never_came_to_a_step_is_start_up_and_one_line_alone_is_training() -> None:
    assert parts([at(5, "start", startup_s=5.0), at(9, "end", step=0)]) == {"start_up": 9.0}
    assert parts([at(5, "start", startup_s=5.0)]) == {"start_up": 5.0}
    assert parts([at(5, "start"), train(8, 1)]) == {"training": 3.0}
    assert parts([at(5, "start"), train(8, 1), at(10, "end", step=1)]) == {"training": 3.0, "finishing": 2.0}


def test_a_generation_too_short_for_a_pace_of_its_own_has_the_others() -> None:
    lines = [*PLAIN[:-1], at(100, "start"), at(101, "resume", step=30), train(113, 31)]

    assert parts(lines)["start_up"] == pytest.approx(7.0 + 1.0 + 10.0)
    assert parts(lines)["training"] == pytest.approx(62.0)


def test_an_older_log_without_the_start_up_time_and_one_with_other_lines_is_read() -> None:
    lines = [at(3, "thaw"), at(5, "start"), at(6, "gradients", step=1), train(7, 1), train(9, 2), at(9.5, "unheard of")]

    assert parts(lines) == {"training": 4.0, "finishing": 0.5}


def test_an_evaluation_that_says_it_took_longer_than_there_was_takes_all_there_was() -> None:
    lines = [at(0, "start"), train(1, 1), at(2, "eval", step=1, seconds=99.0), train(3, 2), train(4, 3)]

    # Half a second a step, then: the first took a whole one.
    assert parts(lines) == {"training": 1.5, "start_up": 0.5, "evaluation": 2.0}


def test_going_back_to_a_checkpoint_in_the_middle_is_no_beginning() -> None:
    lines = [
        at(0, "start"),
        train(2, 1),
        train(20, 10),
        at(22, "resume", step=10),
        train(42, 20),
        at(43, "end", step=20),
    ]

    account = account_of(lines)
    assert (account.steps, account.recomputed_steps) == (20, 0)
    assert parts(lines) == {"training": 42.0, "finishing": 1.0}


def test_the_table_ends_with_the_goodput_and_leaves_out_what_took_no_time() -> None:
    table = describe(account_of(PLAIN)).splitlines()

    assert table[0] == "30 steps, 0 of them taken again, in 1 start"
    assert table[1].split()[:5] == ["training", "60.0", "s", "80.0", "%"]
    assert table[2].split()[:5] == ["start-up", "7.0", "s", "9.3", "%"]
    assert table[-2].split() == ["total", "75.0", "s"]
    assert table[-1] == "goodput 80.0 %"
    assert "down" not in "\n".join(table)
    assert describe(Account()).endswith("goodput 0.0 %")


# ---------------------------------------------------------------- the command


def write(folder: Path, lines: Sequence[Any], *, torn: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + torn, encoding="utf-8")
    return folder


def test_the_command_takes_a_folder_or_the_settings_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write(tmp_path / "one", PLAIN, torn='{"event": "tr')

    codes = [
        main(["goodput", str(run)]),
        main(["goodput", f"run.output_dir={tmp_path}", "run.name=one"]),
        main(["goodput", str(run), "--json"]),
    ]

    assert codes == [0, 0, 0]
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("goodput")] == ["goodput 80.0 %"] * 2
    found = json.loads(printed[-1])
    assert (found["goodput"], found["training_s"], found["generations"]) == (pytest.approx(0.8), pytest.approx(60.0), 1)


def test_words_after_the_command_are_a_folder_and_settings() -> None:
    found = parse(["goodput", "runs/cola"])
    assert (found.command, found.run, found.overrides) == ("goodput", Path("runs/cola"), [])
    assert parse(["goodput", "run.name=x"]).overrides == ["run.name=x"]
    assert parse(["train", "run.name=x"]).run is None
    with pytest.raises(ConfigError, match="--json is of the commands goodput and doctor; train has no such output"):
        parse(["train", "--json"])


@pytest.mark.parametrize(
    ("lines", "kind", "said"),
    [
        (None, ConfigError, "is no folder"),
        ("no file", ConfigError, "holds no training run: there is no metrics.jsonl"),
        ([], ConfigError, "holds no start of a run"),
        ([{"event": "start", "time_s": 1.0}], DataError, "line 1: it has no time_s and monotonic_s"),
        ([at(0, "start"), [1]], DataError, "line 2: it has no time_s and monotonic_s"),
        ([at(0, "start"), "DAMAGED", at(1, "end")], DataError, "line 2: not JSON; the file is damaged"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_says_where_and_why(
    tmp_path: Path, lines: Any, kind: type[Exception], said: str
) -> None:
    folder = tmp_path / "one"
    if lines == "no file":
        folder.mkdir()
    elif lines is not None:
        write(folder, lines)
        text = (folder / "metrics.jsonl").read_text()
        (folder / "metrics.jsonl").write_text(text.replace('"DAMAGED"', '{"event": "tr'))

    with pytest.raises(kind, match=said):
        run_goodput(folder, as_json=False)


def test_the_command_line_says_the_same_once_and_gives_the_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["goodput", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().out.splitlines() == [
        f"error: {tmp_path / 'none'} is no folder. Name a run's: dtrain goodput runs/<name>"
    ]
    for more in ("runs/b", "run.name=x"):
        assert main(["goodput", "runs/a", more]) == 2
        assert "goodput takes a run's folder, or the --config and settings" in capsys.readouterr().out
