"""The control group's counter of processes that were killed for memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.distributed.oom_kills import count_oom_kills
from dtrain.job.watchdog.exit_report import death_message

EVENTS = "low 0\nhigh 0\nmax 912\noom 7\noom_kill 3\noom_group_kill 0\n"
OOM_CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"


@pytest.mark.parametrize(
    ("groups", "file", "text", "expected"),
    [
        ("0::/job/a", "job/a/memory.events", EVENTS, 3),
        ("0::/job/a", "memory.events", EVENTS, 3),  # in a container, the mount starts at the group
        ("0::/", "unified/memory.events", EVENTS, 3),
        ("4:memory:/job\n0::/", "memory/job/memory.oom_control", OOM_CONTROL, 5),
        ("0::/job", "job/memory.events", "garbage\noom_kill x\n", None),
        ("0::/job", "elsewhere", EVENTS, None),
    ],
)
def test_the_counter_is_found(tmp_path: Path, groups: str, file: str, text: str, expected: int | None) -> None:
    for path, content in ((Path("proc/self/cgroup"), groups), (Path("sys/fs/cgroup", file), text)):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(content)

    assert count_oom_kills(tmp_path) == expected


def test_a_death_is_blamed_on_memory_only_if_the_counter_went_up() -> None:
    killed = death_message(1, 77, None, 0, oom_kills=(3, 4))
    others = [death_message(1, 77, None, 0, oom_kills=counts) for counts in ((3, 3), (None, 4), (None, None))]

    assert "was killed by the kernel because the container's memory was full" in killed
    assert all("killed by a signal, or out of memory?" in other for other in others)
