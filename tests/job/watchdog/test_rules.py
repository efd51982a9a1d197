"""Who hangs: the rule over what monitors see, and the one message about it."""

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
from dtrain.distributed.heartbeat import SIZE, Heartbeat, Phase, read
from dtrain.job.watchdog import coordinator, exit_report, process, report, stacks
from dtrain.job.watchdog.client import Watch
from dtrain.job.watchdog.coordinator import Hub, Member
from dtrain.job.watchdog.evidence import Answer, Ward, give_evidence
from dtrain.job.watchdog.report import Collective, Evidence, blame, message
from dtrain.job.watchdog.rules import Rules, Seen, hanging, is_asked, limit_of
from dtrain.job.watchdog.stacks import Frame, ask_workers, fatal_error_in, frames_of, is_debugged
from dtrain.job.watchdog.timers import Silence, period_of

RULES = Rules(300.0)
SHORT = Rules(10.0)
ALL_REDUCE = Collective("default_pg", 20, "gloo:all_reduce", "[[7]]", pending=True)
BARRIER = Collective("default_pg", 20, "gloo:barrier", "[]", pending=True)
DONE = Collective("default_pg", 19, "gloo:all_reduce", "[[7]]", pending=False)
SLEEP = Frame("/there/rows.py", "7", "__getitem__")
STEP = Frame("/there/train/loop.py", "80", "take_step")
GLOO = Frame("/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", "3200", "all_reduce")


def seen(rank: int = 0, phase: Phase = Phase.SUMMING, **more: Any) -> Seen:
    return Seen(rank, phase, step=14, **more)


# ---------------------------------------------------------------- the limit


@pytest.mark.parametrize(
    ("timeout_s", "median_s", "steps", "limit"),
    [
        (300.0, 0.0, 0, 300.0),  # before the first step has been taken
        (300.0, 0.1, 5, 60.0),  # ten median steps are less than a minute
        (300.0, 12.0, 5, 120.0),
        (300.0, 100.0, 5, 300.0),  # never more than what was asked for
        (10.0, 0.1, 5, 10.0),  # a small one holds as it is
        (10.0, 12.0, 5, 10.0),
    ],
)
def test_the_limit_of_a_step(timeout_s: float, median_s: float, steps: int, limit: float) -> None:
    assert limit_of(seen(median_s=median_s, steps_timed=steps), Rules(timeout_s)) == limit


def test_compiling_takes_as_long_as_it_takes_and_no_limit_is_lowered_after_it() -> None:
    rules = Rules(300.0, compiles=True)

    assert limit_of(seen(phase=Phase.MICRO_BATCH), rules) is None
    assert limit_of(seen(phase=Phase.MICRO_BATCH, steps_timed=3, median_s=0.1), rules) == 300.0
    assert limit_of(seen(phase=Phase.EVALUATION, steps_timed=3), rules) is None, "it compiles anew"
    assert limit_of(seen(phase=Phase.EVALUATION, steps_timed=3, evaluations=1), rules) == 300.0
    assert limit_of(seen(phase=Phase.EVALUATION), RULES) == 300.0


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
    assert limit_of(seen(phase=phase), RULES) is None


# ---------------------------------------------------------------- the rule


def silent(rank: int, phase: Phase = Phase.SUMMING, **more: Any) -> Seen:
    return seen(rank, phase, silent_s=301.0, **more)


def test_silence_below_the_limit_is_no_hang() -> None:
    assert not hanging([seen(0, silent_s=299.0), seen(1, silent_s=299.0)], RULES)


def test_when_nobody_goes_on_the_job_hangs() -> None:
    assert hanging([silent(0, waits=True), silent(1, waits=True)], RULES)
    assert hanging([silent(0)], RULES), "one process, with nobody who waits"


def test_one_that_waits_is_no_hang_while_another_is_at_work() -> None:
    waiting = silent(0, Phase.EVALUATION, waits=True)

    assert not hanging([waiting, seen(1, Phase.EVALUATION, silent_s=5.0)], RULES), "it has more to evaluate"
    assert not hanging([waiting, silent(1, Phase.EXPORT)], RULES), "it writes a large file"
    assert not hanging([waiting, silent(1, Phase.CHECKPOINT)], RULES)
    assert not hanging([silent(0), seen(1, Phase.STARTING)], RULES), "torch without a recorder: it may wait"


def test_one_that_is_silent_outside_of_a_collective_hangs_whatever_the_others_do() -> None:
    assert hanging([silent(0, Phase.DATA, waits=False), seen(1, Phase.EVALUATION)], RULES)


def test_one_that_holds_the_interpreter_lock_hangs_whatever_the_others_do() -> None:
    assert hanging([silent(0, Phase.DATA, deaf_s=301.0), seen(1, Phase.EVALUATION)], RULES)


def test_a_stopped_rank_hangs_in_any_phase() -> None:
    stopped = seen(1, Phase.EXPORT, silent_s=11.0, stopped_s=11.0)

    assert hanging([seen(0, Phase.EXPORT), stopped], SHORT)
    assert not hanging([seen(0, Phase.EXPORT), replace(stopped, stopped_s=9.0)], SHORT)


def test_those_who_wait_for_a_node_count_neither_as_hanging_nor_as_a_reason_to_wait() -> None:
    waiting = silent(1, Phase.WAITING_FOR_NODE)

    assert not hanging([seen(0, Phase.PREPARING), waiting], RULES)
    assert not hanging([silent(0, Phase.PREPARING), waiting], RULES), "hours of tokenising"
    assert hanging([silent(0), waiting], RULES)


def test_a_node_that_is_out_of_reach_is_no_reason_to_wait() -> None:
    assert hanging([silent(0, waits=True), seen(1, Phase.EXPORT, unheard_s=301.0)], RULES)
    assert not hanging([silent(0, waits=True), seen(1, Phase.EXPORT, unheard_s=31.0)], RULES)


def test_a_node_that_is_lost_in_a_step_is_waited_for_as_long_as_a_step_may_take() -> None:
    quick = {"steps_timed": 5, "median_s": 0.1}
    waiting = seen(0, silent_s=62.0, waits=True, **quick)

    assert hanging([waiting, seen(1, unheard_s=61.0, **quick)], RULES)
    assert not hanging([waiting, seen(1, unheard_s=59.0, **quick)], RULES)
    assert not hanging([waiting, seen(1, Phase.CHECKPOINT, unheard_s=61.0, **quick)], RULES), "it was at long work"
    assert not hanging([waiting, seen(1, unheard_s=61.0)], RULES), "its first step has no other limit"

    known = Evidence(replace(waiting, waits=None), "node0", 100, stack=[STEP])
    lost = Evidence(seen(1, unheard_s=61.0, **quick), "node1", 101, heard=False)
    assert blame([known, lost], RULES) == ("alone", [lost])


def test_without_a_limit_nothing_hangs() -> None:
    assert not hanging([silent(0), seen(1, stopped_s=1e6)], Rules(None))


def stuck(rank: int, phase: Phase = Phase.BUILDING, **more: Any) -> Seen:
    return seen(rank, phase, **{"silent_s": 301.0, "waits": True, "waited_s": 150.0, **more})


@pytest.mark.parametrize("phase", [Phase.LOADING, Phase.BUILDING, Phase.CHECKPOINT, Phase.EXPORT])
def test_when_all_wait_for_each_other_the_job_hangs_in_a_phase_without_a_limit_too(phase: Phase) -> None:
    assert hanging([stuck(0, phase), stuck(1, phase)], RULES)
    assert hanging([stuck(0, phase), silent(1, Phase.SUMMING, waits=True)], RULES)
    assert hanging([stuck(0, phase), stuck(1, phase), silent(2, Phase.WAITING_FOR_NODE)], RULES)
    assert hanging([stuck(0, phase), seen(1, phase, unheard_s=301.0)], RULES), "its node is gone"


def test_long_work_is_no_hang_while_anybody_is_at_it() -> None:
    assert not hanging([stuck(0), silent(1, Phase.BUILDING, waits=False)], RULES), "it compiles"
    assert not hanging([stuck(0), silent(1, Phase.BUILDING)], RULES), "it may compile: nobody can tell"
    assert not hanging([stuck(0), seen(1, Phase.MICRO_BATCH, silent_s=9.0)], RULES)
    assert not hanging([stuck(0), seen(1, Phase.EXPORT, unheard_s=31.0)], RULES)
    assert not hanging([stuck(0), stuck(1, silent_s=299.0)], RULES)
    assert not hanging([stuck(0), stuck(1, waited_s=5.0)], RULES), "one collective after the other"
    assert not hanging([silent(0, Phase.WAITING_FOR_NODE), silent(1, Phase.WAITING_FOR_NODE)], RULES)
    assert not hanging([stuck(0), seen(1, Phase.WAITING_FOR_NODE, silent_s=0.2)], RULES), "it has just let rank 0 go"
    assert not hanging([silent(0, Phase.WAITING_FOR_NODE), seen(1, Phase.PREPARING, unheard_s=301.0)], RULES)


def test_a_rank_is_asked_what_it_waits_in_when_it_is_silent_for_long() -> None:
    assert is_asked(silent(0), RULES)
    assert is_asked(seen(0, silent_s=151.0), RULES)
    assert not is_asked(seen(0, silent_s=149.0), RULES)
    assert is_asked(seen(0, Phase.EXPORT, silent_s=151.0), RULES)
    assert not is_asked(seen(0, Phase.EXPORT, silent_s=149.0), RULES)
    assert not is_asked(silent(0, Phase.WAITING_FOR_NODE), RULES)
    assert not is_asked(silent(0, stopped_s=1.0), RULES)
    assert not is_asked(silent(0), Rules(None))


class Looks:
    """Looks at one rank, a second apart, that does nothing but what is said."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, SIZE)
        self.heartbeat, self.silence, self.now = Heartbeat(self.memory), Silence(), 1e6
        self.heartbeat.thread(-1)
        self.look()
        self.look()

    def look(self, state: str = "S") -> Seen:
        self.now += 1
        self.silence.observe(read(self.memory), state, now=self.now, period_s=1.0)
        return self.seen

    @property
    def seen(self) -> Seen:
        return self.silence.seen(0, read(self.memory))


def trace(number: int, *, pending: bool = True) -> list[dict[str, Any]]:
    return [{"group": "a", "number": 1, "name": "b", "sizes": "", "pending": False}] + [
        {"group": "default_pg", "number": number, "name": "gloo:all_reduce", "sizes": "", "pending": pending}
    ]


def test_a_rank_that_begins_one_collective_after_the_other_is_not_silent() -> None:
    looks = Looks()
    looks.heartbeat.thread(7)
    looks.look()
    assert looks.look().silent_s == 1.0

    looks.heartbeat.thread(8)

    assert looks.look().silent_s == 0.0


def test_how_long_a_rank_waits_is_counted_for_one_collective() -> None:
    looks = Looks()
    waited = []
    for number in (5, 5, 5, 6, 6):
        looks.look()
        looks.silence.answered(trace(number), is_debugged=False, limit_s=300.0)
        waited.append((looks.seen.waits, looks.seen.waited_s))
    looks.look()
    not_asked = looks.seen.waits
    looks.silence.answered(trace(6, pending=False), is_debugged=False, limit_s=0.0)
    waited.append((looks.seen.waits, looks.seen.waited_s))
    looks.silence.answered([], is_debugged=False, limit_s=0.0)

    assert waited == [(True, 0.0), (True, 1.0), (True, 2.0), (True, 0.0), (True, 1.0), (False, 0.0)]
    assert not_asked is None
    assert looks.seen.waits is None, "a torch without a recorder"


def test_a_rank_that_was_let_go_a_moment_ago_is_not_taken_for_silent_by_itself() -> None:
    looks = Looks()
    found = []
    for is_pending in (True, True, False, False, False, False):
        looks.look()
        looks.silence.answered(trace(5, pending=is_pending), is_debugged=False, limit_s=8.0)
        found.append(looks.seen.waits)

    assert found == [True, True, None, None, False, False], "seen outside of collectives for a quarter of the limit"


def test_a_rank_that_a_debugger_holds_is_neither_silent_nor_deaf() -> None:
    looks = Looks()
    before = looks.look()

    held = looks.look("t")

    assert (before.silent_s, before.deaf_s) == (2.0, 2.0)
    assert (held.silent_s, held.stopped_s, held.deaf_s) == (0.0, 0.0, 0.0)


def test_a_rank_that_waits_for_a_person_at_a_debugger_is_not_silent() -> None:
    looks = Looks()
    looks.look()
    looks.silence.answered([], is_debugged=True, limit_s=0.0)

    assert looks.seen.silent_s == 0.0


@pytest.mark.parametrize("module", ["pdb", "bdb", "debugpy._vendored", "_pydevd_bundle.pydevd"])
def test_a_debugger_is_known_by_its_frames(module: str) -> None:
    there: dict[str, Any] = {"__name__": module, "call": lambda: is_debugged(sys._getframe())}
    here: dict[str, Any] = {"__name__": "pdb_of_mine", "call": lambda: is_debugged(sys._getframe())}
    for names in (there, here):
        exec("found = call()", names)

    assert (there["found"], here["found"]) == (True, False)


def test_a_pause_of_the_whole_machine_is_nobodys_silence() -> None:
    memory = mmap.mmap(-1, SIZE)
    Heartbeat(memory)
    pulse, silence = read(memory), Silence()
    silence.observe(pulse, "S", now=1e6, period_s=1.0)

    silence.observe(pulse, "S", now=1e6 + 1, period_s=1.0)
    silence.observe(pulse, "T", now=1e6 + 5000, period_s=1.0)

    found = silence.seen(0, pulse)
    assert (found.silent_s, found.stopped_s) == (4.0, 3.0)


def test_monitors_look_often_enough_for_a_short_limit_and_seldom_for_a_long_one() -> None:
    assert period_of(RULES) == period_of(Rules(None)) == 2.0
    assert period_of(SHORT) == 1.0


# ---------------------------------------------------------------- the message


def evidence(rank: int, *stack: Frame, collectives: Iterable[Collective] = (), **more: Any) -> Evidence:
    about = {key: more.pop(key) for key in ("phase", "stopped_s", "deaf_s", "unheard_s") if key in more}
    return Evidence(
        seen(rank, about.pop("phase", Phase.SUMMING), silent_s=12.0, **about),
        f"node{rank // 2}",
        100 + rank,
        stack=stack,
        collectives=list(collectives),
        **more,
    )


WAITER = evidence(0, GLOO, STEP, collectives=[ALL_REDUCE])


@pytest.mark.parametrize(
    ("guilty", "said"),
    [
        pytest.param(
            evidence(1, SLEEP, STEP, collectives=[DONE], phase=Phase.DATA),
            "Rank 1 (process 101 on node0) hangs: reading the next batches, at /there/rows.py:7 in __getitem__.",
            id="sleeps",
        ),
        pytest.param(
            evidence(1, SLEEP, stopped_s=12.0, deaf_s=12.0, state="T"),
            "Rank 1 (process 101 on node0) hangs: it is stopped by a signal (state T) while adding up the step's "
            "losses, at /there/rows.py:7 in __getitem__.",
            id="stopped",
        ),
        pytest.param(
            evidence(1, SLEEP, deaf_s=12.0),
            "Rank 1 (process 101 on node0) hangs: it holds the interpreter lock while adding up the step's losses, at "
            "/there/rows.py:7 in __getitem__.",
            id="lock",
        ),
        pytest.param(
            evidence(1, heard=False, unheard_s=40.0),
            "Rank 1 (process 101 on node0) hangs: nothing has been heard of it for 40 s; its node or the network to it "
            "is gone.",
            id="unheard",
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
def test_the_rank_that_keeps_the_others_waiting_is_named_with_its_place(guilty: Evidence, said: str) -> None:
    text, ranks = message([WAITER, guilty], SHORT, stacks="/run/stacks.txt")

    lines = text.splitlines()
    assert lines[0] == said
    assert ranks == [1]
    assert lines[1] == "  no progress for 12 s in step 15 (train.hang_timeout=10)"
    waits = "waits in collective 20, gloo:all_reduce [[7]], at /there/train/loop.py:80 in take_step [S: sleeping]"
    assert f"  rank 0 on node0: {waits}" in lines
    assert lines[-1] == "  the stacks of all ranks: /run/stacks.txt"


def test_ranks_that_wait_in_different_collectives_are_told_apart_by_name_and_number() -> None:
    other = evidence(1, GLOO, SLEEP, collectives=[BARRIER])

    text, ranks = message([WAITER, other], SHORT, stacks=None)

    assert ranks == [0, 1]
    first = text.splitlines()[0]
    assert "different collectives: rank 0 (process 100 on node0) in collective 20, gloo:all_reduce [[7]] at" in first
    assert "rank 1 (process 101 on node0) in collective 20, gloo:barrier [] at /there/rows.py:7" in first


def test_all_ranks_in_one_collective_blame_none_but_the_network() -> None:
    kind, guilty = blame([WAITER, evidence(1, GLOO, collectives=[ALL_REDUCE])], SHORT)

    assert (kind, [each.rank for each in guilty]) == ("together", [0])


def test_a_rank_that_was_stopped_inside_a_collective_is_to_blame() -> None:
    stopped = evidence(1, GLOO, STEP, stopped_s=12.0)

    assert blame([WAITER, stopped, evidence(2, SLEEP, STEP)], SHORT) == ("alone", [stopped])


def test_without_a_recorder_the_stack_tells_who_waits() -> None:
    kind, guilty = blame([evidence(0, GLOO, STEP), evidence(1, SLEEP, STEP)], SHORT)

    assert (kind, [each.rank for each in guilty]) == ("alone", [1])


def test_a_rank_whose_collective_is_not_known_is_not_said_to_wait_in_another_one() -> None:
    kind, guilty = blame([evidence(0, GLOO, STEP), evidence(1, GLOO, collectives=[ALL_REDUCE])], SHORT)

    assert (kind, [each.rank for each in guilty]) == ("together", [1])


def test_ranks_that_have_only_begun_to_work_are_not_blamed() -> None:
    slow = evidence(2, SLEEP, STEP, phase=Phase.DATA)
    evaluating = evidence(0, SLEEP, STEP, phase=Phase.EVALUATION)
    evaluating = replace(evaluating, seen=replace(evaluating.seen, silent_s=0.4))
    tokenising = replace(evaluating, seen=replace(evaluating.seen, rank=1, silent_s=5.0, deaf_s=5.0))

    assert blame([evaluating, tokenising, slow], SHORT) == ("alone", [slow])


def test_a_rank_whose_monitor_was_too_slow_is_not_said_to_be_out_of_reach() -> None:
    slow = Evidence(seen(1, Phase.DATA, silent_s=12.0, waits=False), "node0", 101, state="?")

    text, ranks = message([WAITER, slow], SHORT, stacks=None)

    assert text.splitlines()[0] == "Rank 1 (process 101 on node0) hangs: reading the next batches."
    assert ranks == [1]


def test_a_rank_that_is_out_of_reach_for_a_moment_is_not_blamed_for_what_another_does() -> None:
    away = evidence(0, heard=False, unheard_s=0.2)
    slow = evidence(1, SLEEP, STEP, phase=Phase.DATA)

    assert blame([away, slow], SHORT) == ("alone", [slow])


def test_hundreds_of_ranks_make_a_few_lines() -> None:
    waiters = [evidence(rank, GLOO, STEP, collectives=[ALL_REDUCE]) for rank in range(511)]

    text, ranks = message([*waiters, evidence(511, SLEEP, collectives=[DONE])], SHORT, stacks=None)

    assert ranks == [511]
    assert len(text.splitlines()) == 4
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 503 more on 256 hosts: waits in collective 20" in text


def test_a_lowered_limit_is_explained() -> None:
    slow = replace(WAITER, seen=replace(WAITER.seen, steps_timed=5, median_s=0.1))

    assert "(train.hang_timeout=300, here 60 s: 10 median steps)" in message([slow], RULES, stacks=None)[0]


def test_a_place_in_a_library_is_given_with_the_line_that_went_there() -> None:
    inner = Frame("/venv/lib/python3.11/site-packages/torch/nn/functional.py", "1491", "dropout")

    text, _ = message([evidence(0, inner, STEP)], SHORT, stacks=None)

    assert f"at {inner}, from {STEP}." in text


# ---------------------------------------------------------------- stacks


WRITTEN = """Thread 0x00007ff15a01d6c0 (most recent call first):
  File "/lib/threading.py", line 982 in run

Current thread 0x00007ff15aa87b80 (most recent call first):
  File "/there/a b.py", line 6 in g
  File "/there/main.py", line 7 in <module>
"""


def test_the_stack_of_one_thread_is_found_among_all() -> None:
    assert frames_of(WRITTEN, 0x7FF15AA87B80) == [
        Frame("/there/a b.py", "6", "g"),
        Frame("/there/main.py", "7", "<module>"),
    ]
    assert frames_of(WRITTEN, 1) == []
    nameless = 'Stack (most recent call first):\n  File "/there/x.py", line 3 in f\n'
    assert frames_of(nameless, 1) == [Frame("/there/x.py", "3", "f")], "what a signal makes it write"
    assert frames_of(WRITTEN + WRITTEN.replace("line 6", "line 8"), 0x7FF15AA87B80)[0].line == "8"
    assert frames_of(nameless + WRITTEN, 0x7FF15AA87B80, first=True) == [Frame("/there/x.py", "3", "f")]


def test_what_the_interpreter_died_of_is_found() -> None:
    assert fatal_error_in(f"Fatal Python error: Segmentation fault\n\n{WRITTEN}") == "Segmentation fault"
    assert fatal_error_in(WRITTEN) is None


# ---------------------------------------------------------------- the hub


class Ranks:
    """A hub with members whose monitors are this test."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch, rules: Rules = SHORT) -> None:
        monkeypatch.setattr(coordinator, "AFTER_DEATH_S", 0.05)
        monkeypatch.setattr(coordinator, "AFTER_ERROR_S", 0.05)
        monkeypatch.setattr(coordinator, "EVIDENCE_S", 0.05)
        self.told: list[list[dict[str, Any]]] = [[] for _ in range(count)]
        self.spoken: list[dict[str, Any]] = []
        self.hub = Hub(range(count), rules, self.speak)
        for rank in range(count):
            self.hub.join(rank, Member(self.told[rank].append, f"node{rank}", 100 + rank))

    async def speak(self, end: dict[str, Any], _ranks: Sequence[Evidence]) -> None:
        self.spoken.append(end)

    def say(self, rank: int, phase: Phase = Phase.SUMMING, **more: Any) -> None:
        values = {**vars(seen(rank, phase, **more)), "owns_folder": True}
        del values["rank"]
        self.hub.receive(rank, json.loads(json.dumps({"seen": values})))


def test_a_hang_is_told_once_and_ends_all_ranks_with_code_4(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> Ranks:
        ranks = Ranks(2, monkeypatch)
        ranks.say(0, silent_s=11.0, waits=True)
        ranks.say(1, Phase.DATA, silent_s=11.0, waits=False)
        await asyncio.wait_for(ranks.hub.judge(0.01), 5)
        return ranks

    ranks = asyncio.run(life())

    (end,) = ranks.spoken
    assert (end["code"], end["cause"]) == (4, "Hang")
    assert all(told[0] == {"here": True} for told in ranks.told)  # a monitor that hears nothing goes by itself
    assert all(told[1:] == [{"testify": True}, {"end": 4}] for told in ranks.told)


def test_who_does_not_testify_in_time_is_not_taken_for_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> Ranks:
        ranks = Ranks(2, monkeypatch)
        ranks.say(0, silent_s=11.0, waits=True)
        ranks.say(1, Phase.DATA, silent_s=11.0, waits=False)
        await asyncio.wait_for(ranks.hub.judge(0.01), 5)
        return ranks

    (end,) = asyncio.run(life()).spoken

    assert end["message"].splitlines()[0] == "Rank 1 (process 101 on node1) hangs: reading the next batches."
    assert "nothing has been heard" not in end["message"]


def test_a_hub_that_stands_down_while_it_asks_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> Ranks:
        ranks = Ranks(1, monkeypatch)
        ranks.say(0, silent_s=11.0, waits=True)
        judging = asyncio.create_task(ranks.hub.judge(0.01))
        while {"testify": True} not in ranks.told[0]:
            await asyncio.sleep(0.005)
        ranks.hub.stand_down()
        await asyncio.wait_for(judging, 5)
        return ranks

    ranks = asyncio.run(life())

    assert ranks.spoken == []
    assert ranks.told[0] == [{"here": True}, {"testify": True}]


def test_a_rank_whose_end_is_called_off_speaks_again() -> None:
    watch, before = Watch(Heartbeat()), list(log.handlers)
    found = []
    for told in ({"hush": True}, {"ask": True, "hush": True}, {"hush": False}):
        watch._heed(told)
        found.append((log.disabled, len(log.handlers)))

    assert found == [(True, 0), (True, 0), (False, len(before))]
    assert log.handlers == before


def test_nothing_is_judged_before_all_monitors_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> Ranks:
        ranks = Ranks(1, monkeypatch)
        ranks.hub._awaited = frozenset({0, 1})
        ranks.say(0, silent_s=11.0)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ranks.hub.judge(0.01), 0.1)
        return ranks

    assert asyncio.run(life()).spoken == []


def test_when_a_monitor_does_not_come_that_is_said_once_and_the_others_are_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = []
    monkeypatch.setattr(coordinator.log, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(coordinator, "JOINING_S", 0.05)

    async def life() -> tuple[Ranks, int]:
        ranks = Ranks(2, monkeypatch)
        ranks.hub._awaited = frozenset({0, 1, 2})
        ranks.say(0, silent_s=11.0, waits=True)
        ranks.say(1, silent_s=11.0, waits=True)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ranks.hub.judge(0.01), 0.2)
        spoken = len(ranks.spoken)
        ranks.say(1, Phase.DATA, silent_s=11.0, waits=False)
        await asyncio.wait_for(ranks.hub.judge(0.01), 5)
        return ranks, spoken

    ranks, spoken = asyncio.run(life())

    assert spoken == 0, "they may wait for rank 2 with reason"
    assert [end["rank"] for end in ranks.spoken] == [1]
    (line,) = said
    assert line.startswith("Nobody here watches rank 2: no monitor has come from there within 0 s.")


def test_the_others_hear_at_once_of_a_rank_that_died_and_are_ended_when_they_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def life() -> tuple[Ranks, list[dict[str, Any]]]:
        ranks = Ranks(3, monkeypatch)
        ranks.hub.receive(1, {"died": "Rank 1 died.", "owns_folder": True})
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first = list(ranks.told[0])
        await asyncio.sleep(0.2)
        return ranks, first

    ranks, first = asyncio.run(life())

    assert first == [{"news": {"rank": 1, "host": "node1", "message": "Rank 1 died.", "code": 4, "by_signal": False}}]
    assert [end["message"] for end in ranks.spoken] == ["Rank 1 died."]
    assert ranks.told[2][1:] == [{"hush": True}, {"end": 4}]


def test_a_rank_that_says_itself_why_it_ends_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> Ranks:
        ranks = Ranks(2, monkeypatch)
        ranks.hub.receive(1, {"failed": "ValueError: no", "code": 3, "by_signal": False})
        await asyncio.sleep(0.2)
        return ranks

    ranks = asyncio.run(life())

    assert ranks.spoken == []
    assert ranks.told[0][-1] == {"end": 3}
    assert ranks.told[1] == [], "a notebook may catch the error and go on"


def test_when_rank_0_leaves_in_good_order_the_job_is_over_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> Ranks:
        ranks = Ranks(2, monkeypatch)
        ranks.say(1, silent_s=11.0)
        ranks.hub.receive(0, {"bye": True})
        await asyncio.wait_for(ranks.hub.judge(0.01), 5)
        return ranks

    ranks = asyncio.run(life())

    assert ranks.spoken == []
    assert ranks.told[1] == [{"over": True}]


def test_when_rank_0_fails_and_leaves_the_others_are_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> tuple[Ranks, bool]:
        ranks = Ranks(2, monkeypatch)
        ranks.hub.receive(0, {"failed": "ValueError: no", "code": 3, "by_signal": False})
        ranks.hub.receive(0, {"bye": True})
        is_settled = ranks.hub.is_settled
        await asyncio.sleep(0.2)
        assert ranks.hub.is_settled
        return ranks, is_settled

    ranks, was_settled = asyncio.run(life())

    assert not was_settled, "its monitor stays for the sake of rank 1"
    news = {"rank": 0, "host": "node0", "message": "ValueError: no", "code": 3, "by_signal": False}
    assert ranks.told[1] == [{"news": news}, {"end": 3}]


def test_when_rank_0_leaves_since_another_one_died_the_rest_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> Ranks:
        ranks = Ranks(3, monkeypatch)
        ranks.hub.receive(1, {"died": "Rank 1 died.", "owns_folder": True})
        await asyncio.sleep(0.01)
        ranks.hub.receive(0, {"bye": True})
        await asyncio.sleep(0.2)
        return ranks

    ranks = asyncio.run(life())

    assert ranks.told[2][-1] == {"end": 4}
    assert {"over": True} not in ranks.told[2]


# ---------------------------------------------------------------- what is written down


END = {"code": 4, "cause": "Hang", "rank": 0, "host": "node0", "message": "Rank 0 hangs.", "ranks": [0], "step": 15}


def test_a_hang_is_written_to_exit_json_and_as_a_whole_line_of_metrics(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"event": "start"}\n')

    asyncio.run(exit_report.speak({**END, "owns_folder": True}, [replace(WAITER, text="File x")], tmp_path))

    told = json.loads((tmp_path / "exit.json").read_text())
    assert (told["code"], told["cause"], told["rank"]) == (4, "Hang", 0)
    fault = json.loads(metrics.read_text().splitlines()[1])
    assert (fault["event"], fault["kind"], fault["step"], fault["ranks"]) == ("fault", "hang", 15, [0])
    assert "File x" in (tmp_path / exit_report.STACKS).read_text()


def test_who_judges_for_one_rank_alone_leaves_the_files_of_the_job_to_rank_0(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "start"}\n')

    asyncio.run(exit_report.speak({**END, "owns_folder": True}, [WAITER], tmp_path, of_all=False))

    assert (tmp_path / "metrics.jsonl").read_text() == '{"event": "start"}\n'
    assert not (tmp_path / exit_report.STACKS).exists()
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 4, "why this rank has ended"


def test_a_line_that_is_half_written_is_not_made_worse(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"event": "st')

    asyncio.run(exit_report.speak({**END, "owns_folder": True}, [WAITER], tmp_path))

    assert metrics.read_text() == '{"event": "st'


def test_a_folder_that_is_not_this_runs_is_left_alone(tmp_path: Path) -> None:
    asyncio.run(exit_report.speak({**END, "owns_folder": False}, [WAITER], tmp_path))

    assert list(tmp_path.iterdir()) == []


def test_a_death_that_another_has_told_is_not_told_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken = []
    monkeypatch.setattr(exit_report.log, "error", lambda text, *values: spoken.append(text % values))

    asyncio.run(exit_report.speak({**END, "owns_folder": True}, [], tmp_path))
    asyncio.run(exit_report.speak({**END, "owns_folder": True}, [], tmp_path))

    assert spoken == ["Rank 0 hangs."]


@pytest.mark.parametrize("hangs", ["write_exit", "is_dir"])
def test_a_folder_that_does_not_answer_keeps_nothing_from_being_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: str
) -> None:
    spoken, answers = [], threading.Event()
    monkeypatch.setattr(exit_report.log, "error", lambda text, *values: spoken.append(text % values))
    monkeypatch.setattr(exit_report, "FILES_S", 0.05)
    where = exit_report if hangs == "write_exit" else Path
    monkeypatch.setattr(where, hangs, lambda *_arguments, **_more: answers.wait(10))

    begin = time.monotonic()
    asyncio.run(exit_report.speak({**END, "owns_folder": True}, [], tmp_path))
    took = time.monotonic() - begin
    answers.set()

    assert took < 5
    assert spoken == [f"Rank 0 hangs.\n  {tmp_path} did not answer for 0.05 s: nothing is written down there"]


def test_a_death_that_cannot_be_written_down_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken = []
    monkeypatch.setattr(exit_report.log, "error", lambda text, *values: spoken.append(text % values))
    monkeypatch.setattr(exit_report, "write_exit", lambda *_arguments, **_more: False)  # a full disk

    asyncio.run(exit_report.speak({**END, "owns_folder": True}, [], tmp_path))

    assert spoken == ["Rank 0 hangs."]


def test_ranks_are_ended_whatever_keeps_the_words_from_being_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> Ranks:
        ranks = Ranks(2, monkeypatch)

        async def fail(_end: dict[str, Any], _ranks: Sequence[Evidence]) -> None:
            raise OSError("no")

        ranks.hub._speak = fail
        ranks.say(0, silent_s=11.0, waits=True)
        ranks.say(1, Phase.DATA, silent_s=11.0, waits=False)
        with pytest.raises(OSError, match="no"):
            await asyncio.wait_for(ranks.hub.judge(0.01), 5)
        return ranks

    assert [told[-1] for told in asyncio.run(life()).told] == [{"end": 4}] * 2


# ---------------------------------------------------------------- the monitor


def ward() -> Ward:
    memory = mmap.mmap(-1, SIZE)
    Heartbeat(memory)
    return Ward(1, os.getpid(), threading.get_ident(), 0, memory, os.memfd_create("stacks"), None, SHORT, Path("there"))


def test_what_a_rank_does_is_told_before_its_data_workers_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    before: list[dict[str, Any]] = []
    watched = ward()

    async def ask(**more: bool) -> Answer:
        assert more == {"hush": True}
        os.write(watched.stacks or 0, b'Stack (most recent call first):\n  File "/there/x.py", line 3 in f\n')
        return Answer(trace(5), False)

    async def ask_workers(_pid: int, _file: int) -> list[str]:
        before.extend(json.loads(json.dumps(told)))
        return ['Stack (most recent call first):\n  File "/there/y.py", line 4 in g\n']

    monkeypatch.setattr(stacks, "ask_workers", ask_workers)
    asyncio.run(give_evidence(watched, ask, lambda: None, told.append))

    (first,) = (each["evidence"] for each in before)
    assert first["stack"] == [["/there/x.py", "3", "f"]]
    assert "workers" not in first
    assert told[-1]["evidence"]["workers"] == [[Frame("/there/y.py", "4", "g")]]
    member = Member(told.append, "node0", 1, evidence=first)
    assert not member.has_testified
    assert report.from_json(first, seen(1)).stack == [Frame("/there/x.py", "3", "f")]


def test_all_data_workers_together_have_as_long_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(stacks, "WITHIN_S", 0.4)
    monkeypatch.setattr(stacks, "workers_of", lambda _pid: [11, 12, 13, 14, 15])
    monkeypatch.setattr(stacks, "is_worker", lambda _pid: True)
    monkeypatch.setattr(stacks, "_signal_thread", lambda pid, _thread: asked.append(pid))
    file = os.memfd_create("stacks")

    begin = time.monotonic()
    found = asyncio.run(ask_workers(1, file))

    assert time.monotonic() - begin < 1.2
    assert (asked, found) == ([11, 12, 13, 14], [""] * 4)


def test_a_monitor_that_finds_no_hub_says_that_its_rank_is_watched_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr(process.log, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(process, "ALONE_S", 0.0)

    async def life() -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))  # it does not listen
            await process.Monitor(ward())._join(
                process.Place("127.0.0.1", nobody.getsockname()[1], "word", "node0", 100)
            )

    asyncio.run(life())

    (line,) = said
    assert line.startswith("Rank 1 is watched alone: rank 0's monitor at 127.0.0.1 port ")
