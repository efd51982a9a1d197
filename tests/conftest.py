"""What holds for every test: its order and time limit, when it may be skipped, and that it leaves nothing behind."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
REAL_DATA = TESTS.parent.parent / "shared" / "data"
STAGES = ("unit", "ranks", "commands", "launchers", "cluster")
"""What a test costs, in the order in which they run. A marker says so; a test without one is a unit test."""

gc.set_threshold(20_000)  # Python's 700 costs a run of the unit tests a sixth of its time, most of it during imports

UNIT_LIMIT_S = 60
GRACE_S = 2.0
"""How long a child that a test has told to end may take to be gone."""

SET_BY_LIBRARIES = {
    "PYTEST_CURRENT_TEST",
    "KMP_DUPLICATE_LIB_OK",  # these two: scikit-learn, when it is imported
    "KMP_INIT_AT_FORK",
    "PYTORCH_NVML_BASED_CUDA_CHECK",  # deepspeed, when it is imported
    "TORCHINDUCTOR_CACHE_DIR",  # torch.compile's first look at its cache
}
"""Environment variables that an import changes: no test can be blamed for them."""


MEMORY_BYTES = 1 << 30
"""Room that /dev/shm must have for the folders of `memory_path`; a container may have 64 MB."""

SLOWEST, AT_LEAST_S = 40, 1.0
"""How many tests the closing table names, and how long one has to take to be named."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --nightly; without it the tests marked `nightly` are deselected."""
    parser.addoption("--nightly", action="store_true", help="run the tests marked nightly as well")


def pytest_configure() -> None:
    """Undoes what a shell does to its background jobs, and nohup: a job that a test starts would ignore their signals, too."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


# Time limits, order, resources


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sorts by stage, limits unit tests, and skips what needs a GPU, data or a simulated cluster that this machine lacks."""
    if not config.getoption("--nightly"):
        _deselect_nightly(config, items)
    items.sort(key=_stage)
    for item in items:
        item.user_properties.append(("stage", STAGES[_stage(item)]))  # for the closing table: reports have no markers
        if _stage(item) == 0 and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(UNIT_LIMIT_S))
        if reason := _missing_resource(item) or _missing_cluster(item):
            item.add_marker(pytest.mark.skip(reason=reason))


def _deselect_nightly(config: pytest.Config, items: list[pytest.Item]) -> None:
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    if nightly:
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]


def _stage(item: pytest.Item) -> int:
    return max((STAGES.index(mark.name) for mark in item.iter_markers() if mark.name in STAGES), default=0)


def _missing_cluster(item: pytest.Item) -> str | None:
    if not item.get_closest_marker("cluster"):
        return None
    from tests.support.simulated import why_not  # only where a test asks for one: it looks at the machine

    return why_not()


def _missing_resource(item: pytest.Item) -> str | None:
    if item.get_closest_marker("gpu") and not _has_cuda():
        return "needs a CUDA device"
    if item.get_closest_marker("data") and not REAL_DATA.is_dir():
        return f"needs the real data in {REAL_DATA}"
    return None


def _has_cuda() -> bool:
    import torch  # only where a test asks for a GPU: a run of quick tests does not pay for the import

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real data. A test that takes it is marked `data`, and so skipped where there is none."""
    return REAL_DATA


@pytest.fixture(scope="session")
def memory_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Makes folders in memory, for tests that flush thousands of files to the disk; on the disk where memory has no room.

    Nothing of them is left after the run. Simulated nodes do not see them.
    """
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free >= MEMORY_BYTES
    base = Path(tempfile.mkdtemp(prefix="dtrain-tests-", dir=memory)) if has_room else tmp_path_factory.mktemp("disk")
    yield lambda name: Path(tempfile.mkdtemp(prefix=f"{name}-", dir=base))
    shutil.rmtree(base)


# Where the time went


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the time of each stage and the slowest tests. A shared fixture counts for the test that set it up."""
    tests: dict[tuple[str, str], float] = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            test = (dict(report.user_properties).get("stage", STAGES[0]), report.nodeid)
            tests[test] = tests.get(test, 0.0) + report.duration
    total = sum(tests.values())
    if total < AT_LEAST_S:
        return
    terminalreporter.section("time")
    terminalreporter.write_line(f"{'stage':10}{'tests':>6}{'seconds':>9}{'share':>7}")
    for stage in STAGES:
        seconds = [taken for (of, _), taken in tests.items() if of == stage]
        if seconds:
            terminalreporter.write_line(f"{stage:10}{len(seconds):6}{sum(seconds):9.1f}{sum(seconds) / total:7.0%}")
    slowest = sorted(((taken, test) for (_, test), taken in tests.items() if taken >= AT_LEAST_S), reverse=True)
    terminalreporter.write_line(f"{'all':10}{len(tests):6}{total:9.1f}\n")
    for taken, test in slowest[:SLOWEST]:
        terminalreporter.write_line(f"{taken:7.1f}  {test}")


# What must run: with DTRAIN_MUST_RUN=1 (CI) a skip for any other reason is a failure


def _must_run() -> bool:
    return os.environ.get("DTRAIN_MUST_RUN") == "1"


def _fail_the_skipped(report: Any) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid} must run here (DTRAIN_MUST_RUN=1), but was skipped: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fails a skipped test, unless it waits for a GPU or data that is not here."""
    report = yield
    is_xfail = hasattr(report, "wasxfail")  # pytest reports an expected failure as a skip
    if _must_run() and report.skipped and not is_xfail and _missing_resource(item) is None:
        _fail_the_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    """Fails a module that skips itself as a whole (`importorskip`)."""
    report = yield
    if _must_run() and report.outcome == "skipped":
        _fail_the_skipped(report)
    return report


# Leaks: a test that leaves something behind fails, and what it left is put right for the next one


@pytest.fixture(autouse=True)
def restores_the_log() -> Iterator[None]:
    """Undoes what a command that ran in this process did to dtrain's logger: its handler writes to a stream of that test."""
    log = logging.getLogger("dtrain")
    handlers, level, propagates = list(log.handlers), log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = handlers, level, propagates


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fails a test after which a child runs, a process group stands, or the environment or folder is another."""
    # Set up before the test's other fixtures and therefore torn down after them: what they clean up is no leak.
    children, environment, folder = _descendants(), _environment(), Path.cwd()
    yield
    leaks = [*_end_children(children), *_end_process_group(), *_restore(environment), *_go_back(folder)]
    if leaks:
        pytest.fail("the test left behind: " + "; ".join(leaks), pytrace=False)


def _descendants() -> set[int]:
    """Running processes below this one, without multiprocessing's own. Empty where there is no /proc."""
    multiprocessing.active_children()  # reaps those that have ended
    found: set[int] = set()
    waiting = [os.getpid()]
    while waiting:
        for listing in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            try:
                new = [int(pid) for pid in listing.read_text().split()]
            except OSError:  # ended while we looked
                continue
            waiting += new
            found.update(pid for pid in new if _is_of_a_test(pid))
    return found


def _is_of_a_test(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    # Not told by an empty command line: a child that is just being started has one as well.
    command = _command(pid)
    return state != "Z" and not any(
        own in command for own in ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
    )


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _end_children(before: set[int]) -> Iterator[str]:
    deadline = time.monotonic() + GRACE_S
    while (left := _descendants() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in sorted(left):
        yield f"process {pid} ({_command(pid)[:100]})"
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _end_process_group() -> Iterator[str]:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        yield "torch.distributed's default process group"
        distributed.destroy_process_group()


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in SET_BY_LIBRARIES}


def _restore(before: dict[str, str]) -> Iterator[str]:
    after = _environment()
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) == after.get(name):
            continue
        yield f"{name}={after.get(name)} in the environment, where it was {before.get(name)}"
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


def _go_back(before: Path) -> Iterator[str]:
    try:
        after: Path | str = Path.cwd()
    except FileNotFoundError:
        after = "a folder that is gone"
    if after != before:
        yield f"the working folder {after}, where it was {before}"
        os.chdir(before)
