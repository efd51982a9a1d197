"""The watchdog: the hang rules, the timers, the message, the coordinator and the files that it writes."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtrain.console import log
from dtrain.distributed.heartbeat import HEARTBEAT_BYTES, Heartbeat, Phase, read_heartbeat
from dtrain.job.watchdog import coordinator, exit_report, process, report, stacks
from dtrain.job.watchdog.client import WatchdogClient
from dtrain.job.watchdog.coordinator import Coordinator, CoordinatorEndpoint, RankRecord
from dtrain.job.watchdog.evidence import HelperAnswer, WatchedRank, collect_evidence
from dtrain.job.watchdog.report import CollectiveCall, RankEvidence, find_suspects, hang_message
from dtrain.job.watchdog.rules import HangSettings, RankState, idle_limit_s, is_hang, needs_query
from dtrain.job.watchdog.stacks import Frame, find_fatal_error, is_debugged, parse_stack, request_worker_stacks
from dtrain.job.watchdog.timers import IdleTimers, poll_period_s

RULES = HangSettings(300.0)
SHORT = HangSettings(10.0)
ALL_REDUCE = CollectiveCall("default_pg", 20, "gloo:all_reduce", "[[7]]", pending=True)
BARRIER = CollectiveCall("default_pg", 20, "gloo:barrier", "[]", pending=True)
DONE = CollectiveCall("default_pg", 19, "gloo:all_reduce", "[[7]]", pending=False)
SLEEP = Frame("/there/rows.py", "7", "__getitem__")
STEP = Frame("/there/train/loop.py", "80", "take_step")
GLOO = Frame("/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", "3200", "all_reduce")


def state(rank: int = 0, phase: Phase = Phase.SUMMING, **more: Any) -> RankState:
    return RankState(rank, phase, step=14, **more)


# ---------------------------------------------------------------- the limit


@pytest.mark.parametrize(
    ("timeout_s", "median_step_s", "steps", "limit"),
    [
        (300.0, 0.0, 0, 300.0),  # before the first step has been taken
        (300.0, 0.1, 5, 60.0),  # ten median steps are less than a minute
        (300.0, 12.0, 5, 120.0),
        (300.0, 100.0, 5, 300.0),  # never more than the setting
        (10.0, 0.1, 5, 10.0),  # a small one is not lowered
        (10.0, 12.0, 5, 10.0),
    ],
)
def test_the_limit_of_a_step(timeout_s: float, median_step_s: float, steps: int, limit: float) -> None:
    assert idle_limit_s(state(median_step_s=median_step_s, steps_timed=steps), HangSettings(timeout_s)) == limit


def test_compiling_has_no_limit_and_no_limit_is_lowered_after_it() -> None:
    rules = HangSettings(300.0, compiles=True)

    assert idle_limit_s(state(phase=Phase.MICRO_BATCH), rules) is None
    assert idle_limit_s(state(phase=Phase.MICRO_BATCH, steps_timed=3, median_step_s=0.1), rules) == 300.0
    assert idle_limit_s(state(phase=Phase.EVALUATION, steps_timed=3), rules) is None, "it compiles again"
    assert idle_limit_s(state(phase=Phase.EVALUATION, steps_timed=3, evaluations=1), rules) == 300.0
    assert idle_limit_s(state(phase=Phase.EVALUATION), RULES) == 300.0


@pytest.mark.parametrize(
    "phase",
    [
        Phase.STARTING,
        Phase.PREPARING,
        Phase.LOADING,
        Phase.BUILDING,
        Phase.EXPORT,
        Phase.CHECKPOINT,
        Phase.METRICS,
        Phase.WAITING_FOR_NODE,
    ],
)
def test_long_work_has_no_limit(phase: Phase) -> None:
    assert idle_limit_s(state(phase=phase), RULES) is None


# ---------------------------------------------------------------- the hang rules


def idle(rank: int, phase: Phase = Phase.SUMMING, **more: Any) -> RankState:
    return state(rank, phase, idle_s=301.0, **more)


def test_idle_time_below_the_limit_is_no_hang() -> None:
    assert not is_hang([state(0, idle_s=299.0), state(1, idle_s=299.0)], RULES)


def test_the_job_hangs_when_no_rank_makes_progress() -> None:
    assert is_hang([idle(0, in_collective=True), idle(1, in_collective=True)], RULES)
    assert is_hang([idle(0)], RULES), "one process, without any that waits"


def test_a_waiting_rank_is_no_hang_while_another_is_at_work() -> None:
    waiting = idle(0, Phase.EVALUATION, in_collective=True)

    assert not is_hang([waiting, state(1, Phase.EVALUATION, idle_s=5.0)], RULES), "it has more to evaluate"
    assert not is_hang([waiting, idle(1, Phase.EXPORT)], RULES), "it writes a large file"
    assert not is_hang([waiting, idle(1, Phase.CHECKPOINT)], RULES)
    assert not is_hang([idle(0), state(1, Phase.STARTING)], RULES), "torch without a recorder: it may wait"


def test_a_rank_that_is_idle_outside_of_a_collective_hangs_whatever_the_others_do() -> None:
    assert is_hang([idle(0, Phase.DATA, in_collective=False), state(1, Phase.EVALUATION)], RULES)


def test_a_rank_that_holds_the_interpreter_lock_hangs_whatever_the_others_do() -> None:
    assert is_hang([idle(0, Phase.DATA, gil_blocked_s=301.0), state(1, Phase.EVALUATION)], RULES)


def test_a_stopped_rank_hangs_in_any_phase() -> None:
    stopped = state(1, Phase.EXPORT, idle_s=11.0, stopped_s=11.0)

    assert is_hang([state(0, Phase.EXPORT), stopped], SHORT)
    assert not is_hang([state(0, Phase.EXPORT), replace(stopped, stopped_s=9.0)], SHORT)


def test_ranks_that_wait_for_a_node_count_neither_as_hanging_nor_as_a_reason_to_wait() -> None:
    waiting = idle(1, Phase.WAITING_FOR_NODE)

    assert not is_hang([state(0, Phase.PREPARING), waiting], RULES)
    assert not is_hang([idle(0, Phase.PREPARING), waiting], RULES), "hours of tokenising"
    assert is_hang([idle(0), waiting], RULES)


def test_a_node_that_is_out_of_reach_is_no_reason_to_wait() -> None:
    assert is_hang([idle(0, in_collective=True), state(1, Phase.EXPORT, unreachable_s=301.0)], RULES)
    assert not is_hang([idle(0, in_collective=True), state(1, Phase.EXPORT, unreachable_s=31.0)], RULES)


def test_a_node_that_is_lost_in_a_step_is_waited_for_as_long_as_a_step_may_take() -> None:
    quick = {"steps_timed": 5, "median_step_s": 0.1}
    waiting = state(0, idle_s=62.0, in_collective=True, **quick)

    assert is_hang([waiting, state(1, unreachable_s=61.0, **quick)], RULES)
    assert not is_hang([waiting, state(1, unreachable_s=59.0, **quick)], RULES)
    assert not is_hang([waiting, state(1, Phase.CHECKPOINT, unreachable_s=61.0, **quick)], RULES), "it was at long work"
    assert not is_hang([waiting, state(1, unreachable_s=61.0)], RULES), "its first step has no other limit"

    known = RankEvidence(replace(waiting, in_collective=None), "node0", 100, stack=[STEP])
    lost = RankEvidence(state(1, unreachable_s=61.0, **quick), "node1", 101, is_reachable=False)
    assert find_suspects([known, lost], RULES) == ("absent", [lost])


def test_without_a_limit_nothing_hangs() -> None:
    assert not is_hang([idle(0), state(1, stopped_s=1e6)], HangSettings(None))


def stuck(rank: int, phase: Phase = Phase.BUILDING, **more: Any) -> RankState:
    return state(rank, phase, **{"idle_s": 301.0, "in_collective": True, "in_collective_s": 150.0, **more})


@pytest.mark.parametrize("phase", [Phase.LOADING, Phase.BUILDING, Phase.CHECKPOINT, Phase.EXPORT])
def test_the_job_hangs_in_a_phase_without_a_limit_when_all_ranks_wait_for_each_other(phase: Phase) -> None:
    assert is_hang([stuck(0, phase), stuck(1, phase)], RULES)
    assert is_hang([stuck(0, phase), idle(1, Phase.SUMMING, in_collective=True)], RULES)
    assert is_hang([stuck(0, phase), stuck(1, phase), idle(2, Phase.WAITING_FOR_NODE)], RULES)
    assert is_hang([stuck(0, phase), state(1, phase, unreachable_s=301.0)], RULES), "its node is gone"


def test_long_work_is_no_hang_while_any_rank_is_at_work() -> None:
    assert not is_hang([stuck(0), idle(1, Phase.BUILDING, in_collective=False)], RULES), "it compiles"
    assert not is_hang([stuck(0), idle(1, Phase.BUILDING)], RULES), "it may compile: it is unknown"
    assert not is_hang([stuck(0), state(1, Phase.MICRO_BATCH, idle_s=9.0)], RULES)
    assert not is_hang([stuck(0), state(1, Phase.EXPORT, unreachable_s=31.0)], RULES)
    assert not is_hang([stuck(0), stuck(1, idle_s=299.0)], RULES)
    assert not is_hang([stuck(0), stuck(1, in_collective_s=5.0)], RULES), "one collective after the other"
    assert not is_hang([idle(0, Phase.WAITING_FOR_NODE), idle(1, Phase.WAITING_FOR_NODE)], RULES)
    assert not is_hang([stuck(0), state(1, Phase.WAITING_FOR_NODE, idle_s=0.2)], RULES), "it has just released rank 0"
    assert not is_hang([idle(0, Phase.WAITING_FOR_NODE), state(1, Phase.PREPARING, unreachable_s=301.0)], RULES)


def test_a_rank_that_is_idle_for_long_is_asked_which_collective_it_waits_in() -> None:
    assert needs_query(idle(0), RULES)
    assert needs_query(state(0, idle_s=151.0), RULES)
    assert not needs_query(state(0, idle_s=149.0), RULES)
    assert needs_query(state(0, Phase.EXPORT, idle_s=151.0), RULES)
    assert not needs_query(state(0, Phase.EXPORT, idle_s=149.0), RULES)
    assert not needs_query(idle(0, Phase.WAITING_FOR_NODE), RULES)
    assert not needs_query(idle(0, stopped_s=1.0), RULES)
    assert not needs_query(idle(0), HangSettings(None))


class Polls:
    """Polls one rank, once a second, that makes no progress by itself."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, HEARTBEAT_BYTES)
        self.heartbeat, self.timers, self.now = Heartbeat(self.memory), IdleTimers(), 1e6
        self.heartbeat.record_gil(-1)
        self.poll()
        self.poll()

    def poll(self, state: str = "S") -> RankState:
        self.now += 1
        self.timers.poll(read_heartbeat(self.memory), state, now=self.now, period_s=1.0)
        return self.state

    @property
    def state(self) -> RankState:
        return self.timers.state(0, read_heartbeat(self.memory))


def trace(number: int, *, pending: bool = True) -> list[dict[str, Any]]:
    return [{"group": "a", "number": 1, "name": "b", "sizes": "", "pending": False}] + [
        {"group": "default_pg", "number": number, "name": "gloo:all_reduce", "sizes": "", "pending": pending}
    ]


def test_a_rank_that_starts_one_collective_after_the_other_is_not_idle() -> None:
    polls = Polls()
    polls.heartbeat.record_gil(7)
    polls.poll()
    assert polls.poll().idle_s == 1.0

    polls.heartbeat.record_gil(8)

    assert polls.poll().idle_s == 0.0


def test_the_time_in_a_collective_is_counted_for_one_collective() -> None:
    polls = Polls()
    waited = []
    for number in (5, 5, 5, 6, 6):
        polls.poll()
        polls.timers.add_answer(trace(number), is_debugged=False, limit_s=300.0)
        waited.append((polls.state.in_collective, polls.state.in_collective_s))
    polls.poll()
    not_asked = polls.state.in_collective
    polls.timers.add_answer(trace(6, pending=False), is_debugged=False, limit_s=0.0)
    waited.append((polls.state.in_collective, polls.state.in_collective_s))
    polls.timers.add_answer([], is_debugged=False, limit_s=0.0)

    assert waited == [(True, 0.0), (True, 1.0), (True, 2.0), (True, 0.0), (True, 1.0), (False, 0.0)]
    assert not_asked is None
    assert polls.state.in_collective is None, "a torch without a recorder"


def test_a_rank_that_has_just_left_a_collective_does_not_count_as_outside_of_one() -> None:
    polls = Polls()
    found = []
    for is_pending in (True, True, False, False, False, False):
        polls.poll()
        polls.timers.add_answer(trace(5, pending=is_pending), is_debugged=False, limit_s=8.0)
        found.append(polls.state.in_collective)

    assert found == [True, True, None, None, False, False], "outside of collectives for a quarter of the limit"


def test_a_rank_that_a_debugger_holds_is_neither_idle_nor_blocked() -> None:
    polls = Polls()
    before = polls.poll()

    held = polls.poll("t")

    assert (before.idle_s, before.gil_blocked_s) == (2.0, 2.0)
    assert (held.idle_s, held.stopped_s, held.gil_blocked_s) == (0.0, 0.0, 0.0)


def test_a_rank_that_waits_for_a_person_at_a_debugger_is_not_idle() -> None:
    polls = Polls()
    polls.poll()
    polls.timers.add_answer([], is_debugged=True, limit_s=0.0)

    assert polls.state.idle_s == 0.0


@pytest.mark.parametrize("module", ["pdb", "bdb", "debugpy._vendored", "_pydevd_bundle.pydevd"])
def test_a_debugger_is_recognized_by_its_frames(module: str) -> None:
    there: dict[str, Any] = {"__name__": module, "call": lambda: is_debugged(sys._getframe())}
    here: dict[str, Any] = {"__name__": "pdb_of_mine", "call": lambda: is_debugged(sys._getframe())}
    for names in (there, here):
        exec("found = call()", names)

    assert (there["found"], here["found"]) == (True, False)


def test_a_pause_of_the_whole_machine_counts_as_three_periods() -> None:
    memory = mmap.mmap(-1, HEARTBEAT_BYTES)
    Heartbeat(memory)
    reading, timers = read_heartbeat(memory), IdleTimers()
    timers.poll(reading, "S", now=1e6, period_s=1.0)

    timers.poll(reading, "S", now=1e6 + 1, period_s=1.0)
    timers.poll(reading, "T", now=1e6 + 5000, period_s=1.0)

    found = timers.state(0, reading)
    assert (found.idle_s, found.stopped_s) == (4.0, 3.0)


def test_monitors_poll_more_often_for_a_short_limit() -> None:
    assert poll_period_s(RULES) == poll_period_s(HangSettings(None)) == 2.0
    assert poll_period_s(SHORT) == 1.0


# ---------------------------------------------------------------- the message


def evidence(rank: int, *stack: Frame, collectives: Iterable[CollectiveCall] = (), **more: Any) -> RankEvidence:
    about = {key: more.pop(key) for key in ("phase", "stopped_s", "gil_blocked_s", "unreachable_s") if key in more}
    return RankEvidence(
        state(rank, about.pop("phase", Phase.SUMMING), idle_s=12.0, **about),
        f"node{rank // 2}",
        100 + rank,
        stack=stack,
        collectives=list(collectives),
        **more,
    )


WAITER = evidence(0, GLOO, STEP, collectives=[ALL_REDUCE])


@pytest.mark.parametrize(
    ("suspect", "headline"),
    [
        pytest.param(
            evidence(1, SLEEP, STEP, collectives=[DONE], phase=Phase.DATA),
            "Rank 1 (process 101 on node0) hangs: reading the next batches, at /there/rows.py:7 in __getitem__.",
            id="sleeps",
        ),
        pytest.param(
            evidence(1, SLEEP, stopped_s=12.0, gil_blocked_s=12.0, process_state="T"),
            "Rank 1 (process 101 on node0) hangs: it is stopped by a signal (state T) while adding up the step's "
            "losses, at /there/rows.py:7 in __getitem__.",
            id="stopped",
        ),
        pytest.param(
            evidence(1, SLEEP, gil_blocked_s=12.0),
            "Rank 1 (process 101 on node0) hangs: it holds the interpreter lock (GIL) while adding up the step's losses, at "
            "/there/rows.py:7 in __getitem__.",
            id="lock",
        ),
        pytest.param(
            evidence(1, is_reachable=False, unreachable_s=40.0),
            "Rank 1 (process 101 on node0) hangs: no sign of life for 40 s; its node or the network to it is down.",
            id="unreachable",
        ),
        pytest.param(
            evidence(
                1,
                Frame("/x/torch/utils/data/dataloader.py", "9", "next"),
                workers=[[Frame("/x/multiprocessing/queues.py", "1", "get")], [SLEEP]],
                collectives=[DONE],
                phase=Phase.DATA,
            ),
            "Rank 1 (process 101 on node0) hangs: reading the next batches, at /there/rows.py:7 in __getitem__ (in a "
            "data worker).",
            id="worker",
        ),
    ],
)
def test_the_rank_that_keeps_the_others_waiting_is_named_with_its_place(suspect: RankEvidence, headline: str) -> None:
    text, ranks = hang_message([WAITER, suspect], SHORT, stacks_file="/run/stacks.txt")

    lines = text.splitlines()
    assert lines[0] == headline
    assert ranks == [1]
    assert lines[1] == "  no progress for 12 s in step 15 (train.hang_timeout=10)"
    waits = "waits in collective 20, gloo:all_reduce [[7]], at /there/train/loop.py:80 in take_step [S: sleeping]"
    assert f"  rank 0 on node0: {waits}" in lines
    assert lines[-1] == "  the stacks of all ranks: /run/stacks.txt"


def test_ranks_that_wait_in_different_collectives_are_named_with_their_collective() -> None:
    other = evidence(1, GLOO, SLEEP, collectives=[BARRIER])

    text, ranks = hang_message([WAITER, other], SHORT, stacks_file=None)

    assert ranks == [0, 1]
    first = text.splitlines()[0]
    assert "different collectives: rank 0 (process 100 on node0) in collective 20, gloo:all_reduce [[7]] at" in first
    assert "rank 1 (process 101 on node0) in collective 20, gloo:barrier [] at /there/rows.py:7" in first


def test_all_ranks_in_one_collective_point_to_the_network() -> None:
    kind, suspects = find_suspects([WAITER, evidence(1, GLOO, collectives=[ALL_REDUCE])], SHORT)

    assert (kind, [each.rank for each in suspects]) == ("together", [0])


def test_a_rank_that_was_stopped_inside_a_collective_is_the_suspect() -> None:
    stopped = evidence(1, GLOO, STEP, stopped_s=12.0)

    assert find_suspects([WAITER, stopped, evidence(2, SLEEP, STEP)], SHORT) == ("absent", [stopped])


def test_without_a_recorder_the_stack_shows_which_rank_waits() -> None:
    kind, suspects = find_suspects([evidence(0, GLOO, STEP), evidence(1, SLEEP, STEP)], SHORT)

    assert (kind, [each.rank for each in suspects]) == ("absent", [1])


def test_a_rank_whose_collective_is_unknown_is_not_reported_as_waiting_in_another_one() -> None:
    kind, suspects = find_suspects([evidence(0, GLOO, STEP), evidence(1, GLOO, collectives=[ALL_REDUCE])], SHORT)

    assert (kind, [each.rank for each in suspects]) == ("together", [1])


def test_ranks_that_have_only_just_started_to_work_are_no_suspects() -> None:
    slow = evidence(2, SLEEP, STEP, phase=Phase.DATA)
    evaluating = evidence(0, SLEEP, STEP, phase=Phase.EVALUATION)
    evaluating = replace(evaluating, state=replace(evaluating.state, idle_s=0.4))
    tokenising = replace(evaluating, state=replace(evaluating.state, rank=1, idle_s=5.0, gil_blocked_s=5.0))

    assert find_suspects([evaluating, tokenising, slow], SHORT) == ("absent", [slow])


def test_a_rank_whose_monitor_was_too_slow_is_not_reported_as_out_of_reach() -> None:
    slow = RankEvidence(state(1, Phase.DATA, idle_s=12.0, in_collective=False), "node0", 101, process_state="?")

    text, ranks = hang_message([WAITER, slow], SHORT, stacks_file=None)

    assert text.splitlines()[0] == "Rank 1 (process 101 on node0) hangs: reading the next batches."
    assert ranks == [1]


def test_a_rank_that_is_briefly_out_of_reach_is_no_suspect_when_another_hangs() -> None:
    away = evidence(0, is_reachable=False, unreachable_s=0.2)
    slow = evidence(1, SLEEP, STEP, phase=Phase.DATA)

    assert find_suspects([away, slow], SHORT) == ("absent", [slow])


def test_hundreds_of_ranks_make_a_few_lines() -> None:
    waiters = [evidence(rank, GLOO, STEP, collectives=[ALL_REDUCE]) for rank in range(511)]

    text, ranks = hang_message([*waiters, evidence(511, SLEEP, collectives=[DONE])], SHORT, stacks_file=None)

    assert ranks == [511]
    assert len(text.splitlines()) == 4
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 503 more on 256 hosts: waits in collective 20" in text


def test_a_lowered_limit_is_explained() -> None:
    slow = replace(WAITER, state=replace(WAITER.state, steps_timed=5, median_step_s=0.1))

    assert "(train.hang_timeout=300, here 60 s: 10 median steps)" in hang_message([slow], RULES, stacks_file=None)[0]


def test_a_place_in_a_library_is_given_with_the_line_that_called_it() -> None:
    inner = Frame("/venv/lib/python3.11/site-packages/torch/nn/functional.py", "1491", "dropout")

    text, _ = hang_message([evidence(0, inner, STEP)], SHORT, stacks_file=None)

    assert f"at {inner}, from {STEP}." in text


# ---------------------------------------------------------------- stacks


WRITTEN = """Thread 0x00007ff15a01d6c0 (most recent call first):
  File "/lib/threading.py", line 982 in run

Current thread 0x00007ff15aa87b80 (most recent call first):
  File "/there/a b.py", line 6 in g
  File "/there/main.py", line 7 in <module>
"""


def test_the_stack_of_one_thread_is_found_among_all() -> None:
    assert parse_stack(WRITTEN, 0x7FF15AA87B80) == [
        Frame("/there/a b.py", "6", "g"),
        Frame("/there/main.py", "7", "<module>"),
    ]
    assert parse_stack(WRITTEN, 1) == []
    nameless = 'Stack (most recent call first):\n  File "/there/x.py", line 3 in f\n'
    assert parse_stack(nameless, 1) == [Frame("/there/x.py", "3", "f")], "what a signal makes it write"
    assert parse_stack(WRITTEN + WRITTEN.replace("line 6", "line 8"), 0x7FF15AA87B80)[0].line == "8"
    assert parse_stack(nameless + WRITTEN, 0x7FF15AA87B80, first=True) == [Frame("/there/x.py", "3", "f")]


def test_the_fatal_error_of_the_interpreter_is_found() -> None:
    assert find_fatal_error(f"Fatal Python error: Segmentation fault\n\n{WRITTEN}") == "Segmentation fault"
    assert find_fatal_error(WRITTEN) is None


# ---------------------------------------------------------------- the coordinator


class Ranks:
    """A coordinator with ranks whose monitors are this test."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch, settings: HangSettings = SHORT) -> None:
        monkeypatch.setattr(coordinator, "AFTER_DEATH_S", 0.05)
        monkeypatch.setattr(coordinator, "AFTER_ERROR_S", 0.05)
        monkeypatch.setattr(coordinator, "EVIDENCE_S", 0.05)
        self.sent: list[list[dict[str, Any]]] = [[] for _ in range(count)]
        self.ends: list[dict[str, Any]] = []
        self.coordinator = Coordinator(range(count), settings, self.report_end)
        for rank in range(count):
            self.coordinator.add_rank(rank, RankRecord(self.sent[rank].append, f"node{rank}", 100 + rank))

    async def report_end(self, end: dict[str, Any], _ranks: Sequence[RankEvidence]) -> None:
        self.ends.append(end)

    def report(self, rank: int, phase: Phase = Phase.SUMMING, **more: Any) -> None:
        message = {"state": vars(state(rank, phase, **more)), "owns_run_dir": True}
        self.coordinator.receive(rank, json.loads(json.dumps(message)))


def test_a_hang_is_reported_once_and_ends_all_ranks_with_code_4(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> Ranks:
        ranks = Ranks(2, monkeypatch)
        ranks.report(0, idle_s=11.0, in_collective=True)
        ranks.report(1, Phase.DATA, idle_s=11.0, in_collective=False)
        await asyncio.wait_for(ranks.coordinator.watch(0.01), 5)
        return ranks

    ranks = asyncio.run(life())

    (end,) = ranks.ends
    assert (end["code"], end["cause"]) == (4, "Hang")
    assert all(sent[0] == {"alive": True} for sent in ranks.sent)
    assert all(sent[1:] == [{"send_evidence": True}, {"end": 4}] for sent in ranks.sent)


def test_a_rank_without_evidence_in_time_does_not_count_as_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> Ranks:
        ranks = Ranks(2, monkeypatch)
        ranks.report(0, idle_s=11.0, in_collective=True)
        ranks.report(1, Phase.DATA, idle_s=11.0, in_collective=False)
        await asyncio.wait_for(ranks.coordinator.watch(0.01), 5)
        return ranks

    (end,) = asyncio.run(life()).ends

    assert end["message"].splitlines()[0] == "Rank 1 (process 101 on node1) hangs: reading the next batches."
    assert "no sign of life" not in end["message"]


def test_a_coordinator_that_stands_down_while_it_waits_for_evidence_ends_no_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def life() -> Ranks:
        ranks = Ranks(1, monkeypatch)
        ranks.report(0, idle_s=11.0, in_collective=True)
        judging = asyncio.create_task(ranks.coordinator.watch(0.01))
        while {"send_evidence": True} not in ranks.sent[0]:
            await asyncio.sleep(0.005)
        ranks.coordinator.stop_deciding()
        await asyncio.wait_for(judging, 5)
        return ranks

    ranks = asyncio.run(life())

    assert ranks.ends == []
    assert ranks.sent[0] == [{"alive": True}, {"send_evidence": True}]


def test_a_rank_logs_again_after_the_decision_to_end_it_is_withdrawn() -> None:
    watchdog, before = WatchdogClient(Heartbeat()), list(log.handlers)
    found = []
    for message in ({"silence": True}, {"query": True, "silence": True}, {"silence": False}):
        watchdog._handle(message)
        found.append((log.disabled, len(log.handlers)))

    assert found == [(True, 0), (True, 0), (False, len(before))]
    assert log.handlers == before


def test_nothing_counts_as_a_hang_before_all_monitors_have_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> Ranks:
        ranks = Ranks(1, monkeypatch)
        ranks.coordinator._expected = frozenset({0, 1})
        ranks.report(0, idle_s=11.0)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ranks.coordinator.watch(0.01), 0.1)
        return ranks

    assert asyncio.run(life()).ends == []


def test_a_missing_monitor_is_reported_once_and_the_others_are_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warnings = []
    monkeypatch.setattr(coordinator.log, "warning", lambda text, *values: warnings.append(text % values))
    monkeypatch.setattr(coordinator, "JOINING_S", 0.05)

    async def life() -> tuple[Ranks, int]:
        ranks = Ranks(2, monkeypatch)
        ranks.coordinator._expected = frozenset({0, 1, 2})
        ranks.report(0, idle_s=11.0, in_collective=True)
        ranks.report(1, idle_s=11.0, in_collective=True)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ranks.coordinator.watch(0.01), 0.2)
        ends = len(ranks.ends)
        ranks.report(1, Phase.DATA, idle_s=11.0, in_collective=False)
        await asyncio.wait_for(ranks.coordinator.watch(0.01), 5)
        return ranks, ends

    ranks, ends = asyncio.run(life())

    assert ends == 0, "they may wait for rank 2 with reason"
    assert [end["rank"] for end in ranks.ends] == [1]
    (line,) = warnings
    assert line.startswith("No watchdog for rank 2: its monitor has not connected within 0 s.")


def test_a_death_is_reported_to_the_others_immediately_and_they_are_ended_if_they_continue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def life() -> tuple[Ranks, list[dict[str, Any]]]:
        ranks = Ranks(3, monkeypatch)
        ranks.coordinator.receive(1, {"died": "Rank 1 died.", "owns_run_dir": True})
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first = list(ranks.sent[0])
        await asyncio.sleep(0.2)
        return ranks, first

    ranks, first = asyncio.run(life())

    assert first == [
        {"failure": {"rank": 1, "host": "node1", "message": "Rank 1 died.", "code": 4, "by_signal": False}}
    ]
    assert [end["message"] for end in ranks.ends] == ["Rank 1 died."]
    assert ranks.sent[2][1:] == [{"silence": True}, {"end": 4}]


def test_a_rank_that_reports_its_own_error_is_not_reported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> Ranks:
        ranks = Ranks(2, monkeypatch)
        ranks.coordinator.receive(1, {"failed": "ValueError: no", "code": 3, "by_signal": False})
        await asyncio.sleep(0.2)
        return ranks

    ranks = asyncio.run(life())

    assert ranks.ends == []
    assert ranks.sent[0][-1] == {"end": 3}
    assert ranks.sent[1] == [], "a notebook may catch the error and go on"


def test_the_job_is_over_for_all_when_rank_0_leaves_in_good_order(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> Ranks:
        ranks = Ranks(2, monkeypatch)
        ranks.report(1, idle_s=11.0)
        ranks.coordinator.receive(0, {"leaving": True})
        await asyncio.wait_for(ranks.coordinator.watch(0.01), 5)
        return ranks

    ranks = asyncio.run(life())

    assert ranks.ends == []
    assert ranks.sent[1] == [{"finished": True}]


def test_the_others_are_ended_even_if_rank_0_fails_and_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> tuple[Ranks, bool]:
        ranks = Ranks(2, monkeypatch)
        ranks.coordinator.receive(0, {"failed": "ValueError: no", "code": 3, "by_signal": False})
        ranks.coordinator.receive(0, {"leaving": True})
        is_settled = ranks.coordinator.is_settled
        await asyncio.sleep(0.2)
        assert ranks.coordinator.is_settled
        return ranks, is_settled

    ranks, was_settled = asyncio.run(life())

    assert not was_settled, "its monitor stays for the sake of rank 1"
    news = {"rank": 0, "host": "node0", "message": "ValueError: no", "code": 3, "by_signal": False}
    assert ranks.sent[1] == [{"failure": news}, {"end": 3}]


def test_the_others_are_ended_when_rank_0_leaves_because_one_died(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> Ranks:
        ranks = Ranks(3, monkeypatch)
        ranks.coordinator.receive(1, {"died": "Rank 1 died.", "owns_run_dir": True})
        await asyncio.sleep(0.01)
        ranks.coordinator.receive(0, {"leaving": True})
        await asyncio.sleep(0.2)
        return ranks

    ranks = asyncio.run(life())

    assert ranks.sent[2][-1] == {"end": 4}
    assert {"finished": True} not in ranks.sent[2]


# ---------------------------------------------------------------- the files


END = {"code": 4, "cause": "Hang", "rank": 0, "host": "node0", "message": "Rank 0 hangs.", "ranks": [0], "step": 15}


def test_a_hang_is_written_to_exit_json_and_as_a_complete_line_of_metrics(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"event": "start"}\n')

    asyncio.run(exit_report.report_end({**END, "owns_run_dir": True}, [replace(WAITER, text="File x")], tmp_path))

    end = json.loads((tmp_path / "exit.json").read_text())
    assert (end["code"], end["cause"], end["rank"]) == (4, "Hang", 0)
    fault = json.loads(metrics.read_text().splitlines()[1])
    assert (fault["event"], fault["kind"], fault["step"], fault["ranks"]) == ("fault", "hang", 15, [0])
    assert "File x" in (tmp_path / exit_report.STACKS_FILE).read_text()


def test_a_monitor_that_watches_one_rank_alone_leaves_the_files_of_the_job_to_rank_0(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "start"}\n')

    asyncio.run(exit_report.report_end({**END, "owns_run_dir": True}, [WAITER], tmp_path, covers_all_ranks=False))

    assert (tmp_path / "metrics.jsonl").read_text() == '{"event": "start"}\n'
    assert not (tmp_path / exit_report.STACKS_FILE).exists()
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 4, "why this rank has ended"


def test_nothing_is_appended_to_an_incomplete_line(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"event": "st')

    asyncio.run(exit_report.report_end({**END, "owns_run_dir": True}, [WAITER], tmp_path))

    assert metrics.read_text() == '{"event": "st'


def test_the_folder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    asyncio.run(exit_report.report_end({**END, "owns_run_dir": False}, [WAITER], tmp_path))

    assert list(tmp_path.iterdir()) == []


def test_a_death_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = []
    monkeypatch.setattr(exit_report.log, "error", lambda text, *values: printed.append(text % values))

    asyncio.run(exit_report.report_end({**END, "owns_run_dir": True}, [], tmp_path))
    asyncio.run(exit_report.report_end({**END, "owns_run_dir": True}, [], tmp_path))

    assert printed == ["Rank 0 hangs."]


@pytest.mark.parametrize("hangs", ["write_exit", "is_dir"])
def test_the_message_is_printed_even_if_the_folder_does_not_respond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: str
) -> None:
    printed, answers = [], threading.Event()
    monkeypatch.setattr(exit_report.log, "error", lambda text, *values: printed.append(text % values))
    monkeypatch.setattr(exit_report, "RUN_DIR_S", 0.05)
    where = exit_report if hangs == "write_exit" else Path
    monkeypatch.setattr(where, hangs, lambda *_arguments, **_more: answers.wait(10))

    begin = time.monotonic()
    asyncio.run(exit_report.report_end({**END, "owns_run_dir": True}, [], tmp_path))
    took = time.monotonic() - begin
    answers.set()

    assert took < 5
    assert printed == [f"Rank 0 hangs.\n  {tmp_path} did not respond for 0.05 s: nothing is written there"]


def test_a_death_is_printed_even_if_exit_json_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = []
    monkeypatch.setattr(exit_report.log, "error", lambda text, *values: printed.append(text % values))
    monkeypatch.setattr(exit_report, "write_exit", lambda *_arguments, **_more: False)  # a full disk

    asyncio.run(exit_report.report_end({**END, "owns_run_dir": True}, [], tmp_path))

    assert printed == ["Rank 0 hangs."]


def test_ranks_are_ended_even_if_the_report_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> Ranks:
        ranks = Ranks(2, monkeypatch)

        async def fail(_end: dict[str, Any], _ranks: Sequence[RankEvidence]) -> None:
            raise OSError("no")

        ranks.coordinator._report_end = fail
        ranks.report(0, idle_s=11.0, in_collective=True)
        ranks.report(1, Phase.DATA, idle_s=11.0, in_collective=False)
        with pytest.raises(OSError, match="no"):
            await asyncio.wait_for(ranks.coordinator.watch(0.01), 5)
        return ranks

    assert [sent[-1] for sent in asyncio.run(life()).sent] == [{"end": 4}] * 2


# ---------------------------------------------------------------- the monitor


def watched_rank() -> WatchedRank:
    memory = mmap.mmap(-1, HEARTBEAT_BYTES)
    Heartbeat(memory)
    return WatchedRank(
        1, os.getpid(), threading.get_ident(), 0, memory, os.memfd_create("stacks"), None, SHORT, Path("there")
    )


def test_evidence_about_a_rank_is_sent_before_its_data_workers_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []
    before: list[dict[str, Any]] = []
    watched = watched_rank()

    async def ask(**more: bool) -> HelperAnswer:
        assert more == {"silence": True}
        os.write(watched.stacks or 0, b'Stack (most recent call first):\n  File "/there/x.py", line 3 in f\n')
        return HelperAnswer(trace(5), False)

    async def ask_workers(_pid: int, _file: int) -> list[str]:
        before.extend(json.loads(json.dumps(sent)))
        return ['Stack (most recent call first):\n  File "/there/y.py", line 4 in g\n']

    monkeypatch.setattr(stacks, "request_worker_stacks", ask_workers)
    asyncio.run(collect_evidence(watched, ask, lambda: None, sent.append))

    (first,) = (each["evidence"] for each in before)
    assert first["stack"] == [["/there/x.py", "3", "f"]]
    assert "workers" not in first
    assert sent[-1]["evidence"]["workers"] == [[Frame("/there/y.py", "4", "g")]]
    member = RankRecord(sent.append, "node0", 1, evidence=first)
    assert not member.has_all_evidence
    assert report.evidence_from_json(first, state(1)).stack == [Frame("/there/x.py", "3", "f")]


def test_all_data_workers_together_have_as_long_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(stacks, "STACK_TIMEOUT_S", 0.4)
    monkeypatch.setattr(stacks, "find_workers", lambda _pid: [11, 12, 13, 14, 15])
    monkeypatch.setattr(stacks, "handles_stack_signal", lambda _pid: True)
    monkeypatch.setattr(stacks, "_signal_thread", lambda pid, _thread: asked.append(pid))
    file = os.memfd_create("stacks")

    begin = time.monotonic()
    found = asyncio.run(request_worker_stacks(1, file))

    assert time.monotonic() - begin < 1.2
    assert (asked, found) == ([11, 12, 13, 14], [""] * 4)


def test_a_monitor_that_finds_no_coordinator_warns_that_its_rank_is_watched_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warnings = []
    monkeypatch.setattr(process.log, "warning", lambda text, *values: warnings.append(text % values))
    monkeypatch.setattr(process, "ALONE_WARNING_S", 0.0)

    async def life() -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))  # it does not listen
            await process.RankMonitor(watched_rank())._join(
                CoordinatorEndpoint("127.0.0.1", nobody.getsockname()[1], "word", "node0", 100)
            )

    asyncio.run(life())

    (line,) = warnings
    assert line.startswith("Rank 1 is watched alone: rank 0's monitor at 127.0.0.1 port ")
