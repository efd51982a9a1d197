"""The categories of a run's wall time, on logs written by hand: every second in one category, and sums known before."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dtrain.commands.arguments import parse
from dtrain.commands.goodput import TimeReport, build_report, format_table, run_goodput
from dtrain.errors import ConfigError, DataError
from dtrain.main import main

BOOT = 1000.0
"""Wall time minus monotonic time."""


def at(now: float, event: str, /, **values: Any) -> dict[str, Any]:
    """Returns a line written `now` seconds after the machine's start."""
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


def categories(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns the categories that took time, and checks their sum."""
    report = build_report(lines)
    rounded = {category: round(seconds, 6) for category, seconds in report.seconds.items() if round(seconds, 6)}
    assert sum(rounded.values()) == pytest.approx(report.total)
    return rounded


def test_a_run_of_one_start_has_its_start_up_training_evaluation_and_end() -> None:
    report = build_report(PLAIN)

    assert categories(PLAIN) == {"start_up": 7.0, "training": 60.0, "evaluation": 5.0, "finishing": 3.0}
    assert report.total == pytest.approx(75.0)
    assert report.goodput == pytest.approx(0.8)
    assert (report.steps, report.recomputed_steps, report.generations) == (30, 0, 1)


def test_the_account_of_the_steps_adds_no_time_and_is_shown_by_share() -> None:
    parts = {"data_s": [0.5, 1.5], "forward_s": [4.0, 4.0], "backward_s": [5.0, 5.0], "optimizer_s": [1.0, "nan"]}
    account = [at(53.0, "step_time", step=20, steps=20, **parts), at(53.0, "straggler", step=20, rank=1, factor=1.4)]
    lines = [*PLAIN[:4], *account, *PLAIN[4:]]

    report = build_report(lines)

    assert categories(lines) == categories(PLAIN)
    assert report.step_shares["data"] == pytest.approx(2 / 21)
    assert report.step_shares["backward"] == pytest.approx(10 / 21)
    assert report.as_json()["step_forward_share"] == pytest.approx(8 / 21)
    assert "a step       data 9.5 %, forward 38.1 %, backward 47.6 %" in format_table(report)
    assert "a step" not in format_table(build_report(PLAIN))


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


def test_steps_repeated_after_a_kill_and_the_time_between_are_not_training() -> None:
    report = build_report(KILLED)

    assert categories(KILLED) == {
        "start_up": 4.0 + 0.0 + 9.0 + 4.0 + 2.0,
        "training": 50.0 + 10.0,  # 25 steps, then 26 to 30
        "recomputed": 30.0,  # 11 to 25
        "checkpoint": 2.0,
        "finishing": 3.0,
        "down": 100 - 9 - 61.0,
    }
    assert (report.steps, report.recomputed_steps, report.generations) == (30, 15, 2)


def test_a_run_that_restarted_at_step_1_repeats_all_steps() -> None:
    lines = [*KILLED[:6], at(100, "start"), train(102, 1), train(150, 25), train(160, 30)]

    report = build_report(lines)

    assert report.recomputed_steps == 25
    assert report.seconds["recomputed"] == pytest.approx(50.0)
    assert report.seconds["training"] == pytest.approx(50.0 + 10.0)


def test_generations_on_machines_with_different_monotonic_clocks_are_joined_by_the_wall_clock() -> None:
    moved = [*KILLED[:6], *({**line, "monotonic_s": line["monotonic_s"] + 5e6} for line in KILLED[6:])]

    assert categories(moved) == categories(KILLED)


def test_a_wall_clock_that_was_set_back_gives_no_negative_time() -> None:
    back = [*KILLED[:6], *({**line, "time_s": line["time_s"] - 1000} for line in KILLED[6:])]

    expected = categories(KILLED)
    assert categories(back) == {part: seconds for part, seconds in expected.items() if part != "down"}


def test_a_hang_lasts_from_the_last_step_to_its_fault() -> None:
    lines = [
        at(0, "start"),
        train(2, 1),
        train(20, 10),
        at(84, "fault", kind="hang", step=12),
        at(85, "end", step=12),
    ]

    assert categories(lines) == {"training": 24.0, "faults": 61.0}


def test_a_step_whose_update_was_dropped_is_a_fault() -> None:
    lines = [
        at(0, "start"),
        train(2, 1),
        train(20, 10),
        at(30, "fault", kind="non_finite", step=15),
        train(30, 15, applied=False),
        train(40, 20),
    ]

    assert categories(lines) == {"training": 38.0, "faults": 2.0}


def test_a_stall_counts_at_its_own_time_although_its_line_comes_many_steps_later() -> None:
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

    assert categories(lines) == {"training": 40.0, "checkpoint": 7.0}


def test_the_stall_of_a_checkpoint_that_failed_counts_as_well() -> None:
    lines = [
        at(0, "start"),
        train(1, 1),
        train(10, 10),
        train(22, 20),
        at(23, "fault", kind="checkpoint", step=10, stall_began_s=10.0, stall_s=2.0),
        train(32, 30),
    ]

    assert categories(lines) == {"training": 30.0, "checkpoint": 2.0}


def test_the_export_of_a_new_best_model_and_a_rollback_are_not_training() -> None:
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
    assert categories(lines) == {"training": 27.0, "evaluation": 2.0, "finishing": 4.0, "faults": 4.0 + 3.0}


def test_an_update_dropped_after_a_spike_is_a_fault_with_or_without_a_line_for_its_step() -> None:
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

    assert categories(lines) == {"training": 28.0, "faults": 2.0}


def test_a_start_without_a_step_is_start_up_and_a_single_train_line_is_training() -> None:
    assert categories([at(5, "start", startup_s=5.0), at(9, "end", step=0)]) == {"start_up": 9.0}
    assert categories([at(5, "start", startup_s=5.0)]) == {"start_up": 5.0}
    assert categories([at(5, "start"), train(8, 1)]) == {"training": 3.0}
    assert categories([at(5, "start"), train(8, 1), at(10, "end", step=1)]) == {"training": 3.0, "finishing": 2.0}


def test_a_generation_too_short_to_measure_its_pace_uses_that_of_the_others() -> None:
    lines = [*PLAIN[:-1], at(100, "start"), at(101, "resume", step=30), train(113, 31)]

    assert categories(lines)["start_up"] == pytest.approx(7.0 + 1.0 + 10.0)
    assert categories(lines)["training"] == pytest.approx(62.0)


def test_an_older_log_without_the_start_up_time_and_with_unknown_lines_is_read() -> None:
    lines = [at(3, "thaw"), at(5, "start"), at(6, "gradients", step=1), train(7, 1), train(9, 2), at(9.5, "unheard of")]

    assert categories(lines) == {"training": 4.0, "finishing": 0.5}


def test_an_evaluation_that_reports_more_time_than_passed_gets_all_the_time_that_passed() -> None:
    lines = [at(0, "start"), train(1, 1), at(2, "eval", step=1, seconds=99.0), train(3, 2), train(4, 3)]

    # Later steps took half a second each, so half of the second before step 1 is start-up.
    assert categories(lines) == {"training": 1.5, "start_up": 0.5, "evaluation": 2.0}


def test_a_rollback_in_the_middle_is_not_a_new_start() -> None:
    lines = [
        at(0, "start"),
        train(2, 1),
        train(20, 10),
        at(22, "resume", step=10),
        train(42, 20),
        at(43, "end", step=20),
    ]

    report = build_report(lines)
    assert (report.steps, report.recomputed_steps) == (20, 0)
    assert categories(lines) == {"training": 42.0, "finishing": 1.0}


def test_the_table_ends_with_the_goodput_and_leaves_out_what_took_no_time() -> None:
    table = format_table(build_report(PLAIN)).splitlines()

    assert table[0] == "30 steps, 0 of them repeated, in 1 start"
    assert table[1].split()[:5] == ["training", "60.0", "s", "80.0", "%"]
    assert table[2].split()[:5] == ["start-up", "7.0", "s", "9.3", "%"]
    assert table[-2].split() == ["total", "75.0", "s"]
    assert table[-1] == "goodput 80.0 %"
    assert "down" not in "\n".join(table)
    assert format_table(TimeReport()).endswith("goodput 0.0 %")


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
    figures = json.loads(printed[-1])
    assert (figures["goodput"], figures["training_s"], figures["generations"]) == (
        pytest.approx(0.8),
        pytest.approx(60.0),
        1,
    )


def test_the_command_is_followed_by_a_folder_or_settings() -> None:
    arguments = parse(["goodput", "runs/cola"])
    assert (arguments.command, arguments.run, arguments.overrides) == ("goodput", Path("runs/cola"), [])
    assert parse(["goodput", "run.name=x"]).overrides == ["run.name=x"]
    assert parse(["train", "run.name=x"]).run is None
    with pytest.raises(ConfigError, match="--json works only with goodput and doctor, not with train"):
        parse(["train", "--json"])


@pytest.mark.parametrize(
    ("lines", "error_type", "message"),
    [
        (None, ConfigError, "is not a folder"),
        ("no file", ConfigError, "has no training run: it contains no metrics.jsonl"),
        ([], ConfigError, "has no start of a run"),
        ([{"event": "start", "time_s": 1.0}], DataError, "line 1: time_s or monotonic_s is missing"),
        ([at(0, "start"), [1]], DataError, "line 2: time_s or monotonic_s is missing"),
        ([at(0, "start"), "DAMAGED", at(1, "end")], DataError, "line 2: not JSON; the file is damaged"),
    ],
)
def test_an_unreadable_log_is_an_error_with_location_and_cause(
    tmp_path: Path, lines: Any, error_type: type[Exception], message: str
) -> None:
    folder = tmp_path / "one"
    if lines == "no file":
        folder.mkdir()
    elif lines is not None:
        write(folder, lines)
        text = (folder / "metrics.jsonl").read_text()
        (folder / "metrics.jsonl").write_text(text.replace('"DAMAGED"', '{"event": "tr'))

    with pytest.raises(error_type, match=message):
        run_goodput(folder, as_json=False)


def test_the_command_line_prints_the_error_once_and_returns_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["goodput", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().out.splitlines() == [
        f"error: {tmp_path / 'none'} is not a folder. Name the folder of a run: dtrain goodput runs/<name>"
    ]
    for more in ("runs/b", "run.name=x"):
        assert main(["goodput", "runs/a", more]) == 2
        assert "goodput takes a run's folder, or the --config and settings" in capsys.readouterr().out


@pytest.mark.timeout(20)
def test_steps_that_no_run_has_fill_no_memory() -> None:
    lines = [
        at(10, "start", startup_s=0.0),
        at(11, "resume", step="three"),
        train(12, 5),
        at(13, "rollback", step=5, to_step=-(10**12)),
        at(14, "rollback", step=4, to_step=2),
        train(15, 10**30),
        at(16, "end", step=10**30),
    ]

    assert sum(categories(lines).values()) == pytest.approx(6.0)


def test_a_step_that_was_lost_twice_counts_once() -> None:
    lines = [
        at(0, "start", startup_s=0.0),
        train(10, 10),
        at(10, "rollback", step=10, to_step=4, seconds=0.0),
        at(10, "rollback", step=8, to_step=2, seconds=0.0),
    ]

    assert categories(lines)["faults"] == pytest.approx(8.0)


@pytest.mark.parametrize("time", ["NaN", "Infinity", "1e300", f"{10**30}"])
def test_a_time_that_no_clock_shows_is_damage(tmp_path: Path, time: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"event": "start", "time_s": 1.0, "monotonic_s": {time}}}\n')

    with pytest.raises(DataError, match="line 1: time_s or monotonic_s is missing or no time"):
        run_goodput(tmp_path, as_json=False)


def test_a_long_run_costs_a_few_bytes_per_line_however_many_checkpoints_and_losses_it_has() -> None:
    """Written as it goes: neither the lines nor anything of the size of a line is kept."""
    lines = 1200

    def long_run() -> Iterator[dict[str, Any]]:
        yield at(0, "start", startup_s=0.0)
        for step in range(1, lines + 1):
            yield train(float(step), step, applied=step % 4 != 0, note="x" * 500)
            if step % 8 == 0:
                yield at(step + 0.5, "checkpoint", step=step, stall_began_s=step - 0.25, stall_s=0.5)
        yield at(lines + 1.0, "end", step=lines)

    tracemalloc.start()
    try:
        report = build_report(long_run())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 150 * lines
    assert report.total == pytest.approx(lines + 1.0)
    assert report.seconds["checkpoint"] == pytest.approx(lines / 8 * 0.5)
    assert report.seconds["faults"] == pytest.approx((lines + 1.0 - lines / 16 - 0.75) / 4, rel=0.2)
