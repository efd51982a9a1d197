"""The benchmark suite: its figures are what they say, and dtrain's deterministic ones hold."""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain.distributed.rank_context import RankContext
from tests.benchmarks import __main__ as command
from tests.benchmarks.suite import spec, table
from tests.benchmarks.suite.counting import Laps, TokenCounter
from tests.benchmarks.suite.gate import Gate
from tests.benchmarks.suite.race import ContestantError, Lane, run_command
from tests.benchmarks.suite.result import RowResult, difference, ratio
from tests.benchmarks.suite.rows import ROWS
from tests.benchmarks.suite.rows.checkpoint import figures_of
from tests.benchmarks.suite.rows.evaluation import one_evaluation
from tests.benchmarks.suite.rows.training_steps import checked
from tests.benchmarks.suite.workloads import T0, Workload, glue_lengths, write, write_csv
from tests.support.multirank import run_ranks

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"


# Deterministic figures of the tree


@pytest.mark.commands
@pytest.mark.parametrize("row", ["padding"])
def test_dtrain_computes_no_more_tokens_than_a_plain_loop_and_finds_its_losses(
    row: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = command.main(["--quick", "--only", "dtrain,raw", row])

    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "holds: dtrain computes no more tokens than RAW" in printed
    assert "holds: mean loss of the first 10 steps: dtrain and RAW agree to 1e-05" in printed


@pytest.mark.commands
@pytest.mark.slow
def test_an_evaluation_of_two_ranks_has_no_more_collectives_than_promised(capsys: pytest.CaptureFixture[str]) -> None:
    code = command.main(["--quick", "--only", "dtrain", "evaluation"])

    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "holds: dtrain, 2 ranks: at most" in printed


def counted_lane(name: str, *, fill: float, tokens: float, loss: float) -> Lane:
    return Lane(name, figures={"fill": fill, "tokens_per_step": tokens, "loss": loss})


@pytest.mark.parametrize(
    ("own", "failed"),
    [
        ({"fill": 1.0, "tokens": 90, "loss": 0.5}, []),
        (
            {"fill": 1.02, "tokens": 90, "loss": 0.5},
            ["dtrain computes every real token, and none twice (fill at most 1)"],
        ),
        ({"fill": 0.4, "tokens": 101, "loss": 0.5}, ["dtrain computes no more tokens than RAW"]),
        (
            {"fill": 0.4, "tokens": 100, "loss": 0.50001},
            ["mean loss of the first 10 steps: dtrain and RAW agree to 1e-05"],
        ),
    ],
    ids=["right", "a token is left out", "more padding", "another loss"],
)
def test_a_tree_that_is_worse_fails_the_check(own: dict[str, float], failed: list[str]) -> None:
    lanes = [counted_lane("dtrain", **own), counted_lane("RAW", fill=0.4, tokens=100, loss=0.5)]

    result = checked(RowResult("padding", "", "", lanes))

    assert [check for check, holds in result.checks.items() if not holds] == failed
    assert command.exit_code([result]) == bool(failed)


# The command line


def test_a_mistyped_row_is_refused_with_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["loop_overhed"])

    assert ended.value.code == 2
    assert "loop_overhed is not a row. Did you mean loop_overhead?" in capsys.readouterr().err
    with pytest.raises(argparse.ArgumentTypeError, match="Did you mean two_ranks"):
        command.row_name("2_ranks")


@pytest.mark.parametrize("pairs", ["0", "-1", "many"])
def test_a_number_of_rounds_that_measures_nothing_is_refused(pairs: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["padding", "--pairs", pairs])

    assert f"{pairs} is not a number of 1 or more" in capsys.readouterr().err


def test_a_contestant_that_no_row_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--quick", "--only", "dtrain,rew", "padding"])

    assert "rew is not a contestant. Did you mean raw?" in capsys.readouterr().err


def test_every_row_has_its_command_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")

    assert [name for name in ROWS if f"python -m tests.benchmarks {name}" not in page] == []


def test_a_failed_peer_is_shown_and_only_a_failed_dtrain_fails_the_suite() -> None:
    peer = RowResult("padding", "", "", [Lane("dtrain"), Lane("RAW", "failed: exit 1")])
    own = RowResult("padding", "", "", [Lane("dtrain", "failed: exit 1"), Lane("RAW")])

    assert command.exit_code([peer]) == 0
    assert command.exit_code([own]) == 1


# Contestants and tables


def test_a_peer_that_is_not_installed_is_named_and_not_left_out() -> None:
    peer = spec.Contestant("Other", "other", needs="a_package_that_nobody_has")
    lane = Lane(peer.name, peer.unavailable() or "ran")
    result = RowResult("padding", "title", "work", [Lane("dtrain", samples={"cpu_s": [0.5]}), lane])
    result.columns = {"CPU ms a step": ("cpu_s", 1e3, 1)}

    lines = table.row_as_markdown(result)

    assert "| dtrain | 500.0 |  |" in lines
    assert "| Other | not installed | |" in lines


def test_a_written_table_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    about = command.describe(["padding", "--data", "/somewhere/of/mine/CoLA"])
    failed = Lane("RAW", f"failed: exit 1\nError: no file {ROOT}/tests/x")
    result = RowResult("padding", "title", "work", [Lane("dtrain", samples={"cpu_s": [0.5, 0.7]}), failed])

    written = table.write([result], about, tmp_path, name="padding")

    texts = [path.read_text(encoding="utf-8") for path in written]
    assert all("Error: no file tests/x" in text and "--data CoLA" in text for text in texts)
    assert not any("/somewhere" in text or str(ROOT) in text for text in texts)
    assert json.loads(texts[1])["rows"][0]["lanes"][0]["samples"] == {"cpu_s": [0.5, 0.7]}


def test_a_setting_that_the_tree_lacks_is_named_and_one_that_it_has_is_not() -> None:
    assert spec.dtrain_with(train__no_such_thing=1).unavailable() == "this tree has no train.no_such_thing"
    assert spec.dtrain_with(train__micro_batch_size=4).unavailable() is None
    assert spec.dtrain_with(train__micro_batch_size=4).name == "dtrain, train.micro_batch_size=4"


def test_a_ratio_is_the_median_over_the_rounds_and_not_the_ratio_of_medians() -> None:
    lane, own = Lane("RAW", samples={"cpu_s": [2.0, 9.0, 3.0]}), Lane("dtrain", samples={"cpu_s": [1.0, 3.0, 3.0]})

    assert ratio(lane, own, "cpu_s") == 2.0  # of 2, 3 and 1; the medians are 3 and 3
    assert difference(lane, own, "cpu_s") == 1.0  # of 1, 6 and 0


def test_a_difference_within_the_noise_has_no_ratio() -> None:
    lane, own = Lane("HF Trainer", samples={"cpu_s": [0.2, 0.1]}), Lane("dtrain", samples={"cpu_s": [-0.1, 0.1]})

    assert ratio(lane, own, "cpu_s") is None


def test_ranks_are_compared_with_as_many_ranks() -> None:
    names = ["dtrain, 1 rank", "dtrain, 2 ranks", "HF Trainer, 1 rank", "HF Trainer, 2 ranks"]
    lanes = [Lane(name) for name in names]
    result = RowResult("evaluation", "", "", lanes)

    assert [result.reference(lane) for lane in lanes] == [None, None, lanes[0], lanes[1]]


def test_a_command_that_fails_says_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(ContestantError, match=r"exit 3\nno such model"):
        run_command(["sh", "-c", "echo no such model; exit 3"], tmp_path)


# Times and counts


def test_a_gate_reports_each_block_and_waits_until_it_may_go_on(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "gate"))
    listener.listen(1)
    listener.settimeout(20)
    steps: list[int] = []

    def compute() -> None:
        gate = Gate(tmp_path / "gate", warm=2, block=3, at_step={}, traced=False)
        for step in range(1, 9):
            steps.append(step)
            gate.after_step()

    thread = threading.Thread(target=compute)
    thread.start()
    with listener, listener.accept()[0] as connection, connection.makefile("rw", encoding="utf-8") as file:
        connection.settimeout(20)
        seen = []
        for _ in range(3):
            file.readline()
            seen.append(steps[-1])
            file.write("{}\n")
            file.flush()
        thread.join(20)

    assert seen == [2, 5, 8]
    assert not thread.is_alive()


def test_a_contestant_ends_when_its_driver_has_ended(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "gate"))
        listener.listen(1)
        gate = Gate(tmp_path / "gate", warm=1, block=1, at_step={}, traced=False)
        listener.accept()[0].close()

    with pytest.raises((SystemExit, BrokenPipeError)):
        gate.after_step()


def test_lengths_are_those_of_the_named_distribution() -> None:
    lengths = glue_lengths(20_000, seed=0)

    assert (lengths.min(), lengths.max()) == (5, 128)
    assert statistics.median(lengths.tolist()) == pytest.approx(24, abs=0.5)
    assert np.std(np.log(lengths)) == pytest.approx(0.55, abs=0.02)


def test_a_text_has_as_many_tokens_as_its_row_says(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    workload = Workload(T0, rows=20, batch=4).counted()
    folder = write(workload, tmp_path / "workload")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    lines = (folder / "train.csv").read_text(encoding="utf-8").splitlines()[1:]
    ids = [tokenizer(line.rpartition(",")[0])["input_ids"] for line in lines]

    assert [len(row) for row in ids] == workload.lengths("train").tolist()
    assert all(tokenizer.unk_token_id not in row for row in ids)


def test_the_counter_counts_padding_and_only_layers() -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8)
    )
    counter = TokenCounter(2)
    laps = Laps(counter, marks=2, collectives=False)
    batch = {
        "input_ids": torch.ones(3, 7, dtype=torch.long),
        "attention_mask": torch.tensor([[1] * 7, [1] * 2 + [0] * 5, [1] * 7]),
    }
    with counter.watch():
        model.train()(**batch)
        laps.mark()
        model.eval()(**batch)
        laps.mark()
    model(**batch)

    assert counter.figures()["tokens_in_training"] == 21
    assert counter.figures()["tokens_in_evaluation"] == 21
    assert [(lap["tokens_in_training"], lap["tokens_in_evaluation"]) for lap in laps.counts] == [(0, 21)]


def test_an_evaluation_has_what_three_steps_with_it_have_more_than_three_steps(tmp_path: Path) -> None:
    workload = Workload(T0, rows=8, batch=1, validation=50)
    two_ranks = spec.Spec(spec.DTRAIN, workload, tmp_path, tmp_path, 9, ranks=2)
    step = {"collectives": 2.0, "collective_bytes": 80.0, "tokens_in_evaluation": 0.0}
    cycle = {
        "collectives": 13.0,
        "collective_bytes": 1240.0,
        "tokens_in_evaluation": 2.0 * float(workload.lengths("validation").sum()),
    }

    assert one_evaluation(step, cycle, spec=two_ranks) == {
        "fill": 0.5,
        "collectives_of_evaluation": 7.0,
        "collective_bytes_of_evaluation": 1000.0,
    }


def counted_collectives(_context: RankContext) -> list[dict[str, float]]:
    import torch
    import torch.distributed as dist

    laps = Laps(TokenCounter(2), marks=3, collectives=True)
    laps.mark()
    dist.all_reduce(torch.zeros(10, 3))
    dist.all_gather([torch.zeros(5, dtype=torch.int64) for _ in range(2)], torch.zeros(5, dtype=torch.int64))
    laps.mark()
    dist.broadcast(torch.zeros(7, dtype=torch.bfloat16), 0)
    laps.mark()
    return laps.counts


@pytest.mark.ranks
def test_collectives_are_counted_with_the_bytes_that_a_rank_hands_to_them() -> None:
    for counts in run_ranks(counted_collectives, 2):
        assert [(lap["collectives"], lap["collective_bytes"]) for lap in counts] == [(2, 120 + 40), (1, 14)]


def test_waiting_for_a_checkpoint_and_slow_steps_while_it_is_written_are_told_apart() -> None:
    durations = [
        0.5,
        *[0.1] * 19,
        0.7,
        0.15,
        0.15,
        *[0.1] * 17,
        0.7,
        0.15,
        0.15,
        *[0.1] * 17,
    ]  # saves after steps 20, 40
    ends = np.cumsum(durations).tolist()
    events: list[dict[str, Any]] = [
        {"stall_began_s": ends[19], "stall_s": 0.6, "seconds": 0.35},
        {"stall_began_s": ends[39], "stall_s": 0.6, "seconds": 0.35},
    ]

    found = figures_of(ends, events)

    assert found["quiet_s"] == pytest.approx(0.1)
    assert found["wait_s"] == pytest.approx(0.6)
    assert found["writing_s"] == pytest.approx(0.15)
    assert found["inflation"] == pytest.approx(0.5)
    assert found["cost_s"] == pytest.approx(0.6 + 2 * 0.05)


def test_random_rows_are_equal_in_every_process(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_csv(tmp_path / name, np.array([5, 9]), 50, seed=1)

    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
