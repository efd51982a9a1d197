"""The far end of the doctor's questions, asked of this process, and the near end of a conversation."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.cluster.doctor import agent, conversation, host_facts
from dtrain.cluster.doctor.conversation import TEXTS, Talks
from dtrain.cluster.remote_source import as_one_text
from tests.support.doctor_answers import GPUS, LOOK


@pytest.fixture
def far_end() -> Iterator[None]:
    yield
    for listener in agent.listeners:
        listener.close()
    agent.listeners.clear()
    agent.marks.clear()


def test_the_text_that_is_sent_stands_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = as_one_text(TEXTS)
    assert "import dtrain" not in text
    assert "from dtrain" not in text
    names = [line.split()[1].partition("(")[0] for line in text.splitlines() if line.startswith("def ")]
    assert sorted(names) == sorted(set(names)), "two of the files define the same name"
    there: dict[str, Any] = {"__name__": "asked"}
    exec(compile(text, "sent", "exec"), there)
    order = {
        "do": "look",
        "root": "/none",
        "folder": str(tmp_path),
        "hosts": ["localhost"],
        "output_dir": str(tmp_path),
    }
    lines = [json.dumps({**order, "number": 1}), json.dumps({"do": "nonsense", "number": 2})]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())

    there["answer"]()

    looked, failed = map(json.loads, filter(None, out.getvalue().splitlines()))
    assert looked["number"] == 1
    assert {*LOOK, "machine"} <= set(looked)
    assert looked["code"] is None
    assert looked["runs"]["writable"]
    assert failed == {"number": 2, "problem": "KeyError: 'nonsense'"}


@pytest.mark.usefixtures("far_end")
def test_who_reaches_a_listener_and_who_does_not() -> None:
    opened = agent.listen({"to": "127.0.0.1", "word": "w" * agent.HELLO})
    there = {"host": "a", "address": "127.0.0.1", "port": opened["port"], "word": "w" * agent.HELLO}
    other = {**there, "host": "b", "word": "v" * agent.HELLO}
    closed = agent.listen({"to": "127.0.0.1", "word": "x" * agent.HELLO})
    agent.listeners.pop().close()

    # The listener that has just been closed may be in accept() still: connect to a port that was never opened.
    nobody = {**there, "host": "c", "port": 1}
    found = agent.reach({"targets": [there, other, nobody], "seconds": 5.0})

    assert opened["address"] == "127.0.0.1"
    assert closed["port"] != opened["port"]
    assert found == {"a": "", "b": "something else answers at 127.0.0.1", "c": "Connection refused"}


@pytest.mark.usefixtures("far_end")
def test_a_mark_is_gone_when_the_input_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    order = {"do": "mark", "folder": str(tmp_path / "not" / "there"), "name": ".mark", "number": 1}
    see = {"do": "see", "path": str(tmp_path / ".mark"), "number": 2}
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{json.dumps(order)}\n{json.dumps(see)}\n"))
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())

    agent.answer()

    assert [json.loads(line) for line in out.getvalue().splitlines() if line] == [
        {"number": 1, "path": str(tmp_path / ".mark")},
        {"number": 2, "is_there": True},
    ]
    assert list(tmp_path.iterdir()) == []


def test_the_hub_cache_is_where_the_libraries_put_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert host_facts.hub_cache() == str(Path("~/.cache/huggingface/hub").expanduser())
    monkeypatch.setenv("HF_HOME", "/hf")
    assert host_facts.hub_cache() == "/hf/hub"
    monkeypatch.setenv("HF_HUB_CACHE", "/cache")
    assert host_facts.hub_cache() == "/cache"


def test_control_groups_limit_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "memory.max").write_text(f"{1 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 19}\n")
    monkeypatch.setattr(host_facts, "control_groups", lambda controller: [tmp_path, inner])

    assert host_facts.memory() == {"total": 1 << 20, "available": 1 << 19}


def _torch(names: list[str], cuda: str | None = "12.8") -> tuple[int, str]:
    nccl = "2.27.3" if names else None
    return 0, json.dumps({"names": names, "cuda": cuda, "usable": len(names), "nccl": nccl})


TWO = (0, "H200, 570.1, 143771\nH200, 570.1, 143771\n")
NVML = (18, "Failed to initialize NVML\n")


@pytest.mark.parametrize(
    ("smi", "torch_says", "found"),
    [
        (TWO, _torch(["H200", "H200"]), GPUS),
        (TWO, _torch(["H200"]), {**GPUS, "names": ["H200"], "usable": 1}),  # CUDA_VISIBLE_DEVICES=0
        ((0, TWO[1] + "WARNING: infoROM is corrupted at gpu 0000:00:1E.0\n"), _torch([], None),
         {"names": ["H200", "H200"], "driver": "570.1", "cuda": None, "usable": 0, "nccl": None}),
        (TWO, (1, ""), {"names": ["H200", "H200"], "driver": "570.1", "torch_problem": "torch there: died"}),
        ((6, "No devices were found\n"), _torch([]), None),
        ((0, ""), _torch([]), None),
        (NVML, _torch([]), {"driver_problem": "nvidia-smi ended with 18: Failed to initialize NVML",
                            "names": [], "cuda": "12.8", "usable": 0, "nccl": None}),
    ],
)  # fmt: skip
def test_devices_are_what_torch_sees_and_their_tool_tells_the_driver(
    smi: tuple[int, str], torch_says: tuple[int, str], found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        code, out = smi if command[0] == "/bin/nvidia-smi" else torch_says
        return subprocess.CompletedProcess(command, code, out, "died\n" if code == 1 else "")

    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("subprocess.run", answer)

    assert host_facts.gpus() == found


@pytest.mark.parametrize(
    ("file", "names", "problem"),
    [(0, ["H200"], "nvidia-smi is not on the PATH"), (1, ["RTX"], None), (2, ["MI300"], None)],
)
def test_devices_without_their_tool_are_what_torch_sees(
    file: int, names: list[str], problem: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = [str(tmp_path / f"{at}") for at in range(3)]
    Path(files[file]).touch()
    monkeypatch.setattr(host_facts, "DEVICE_FILES", files)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("subprocess.run", lambda command, **_: subprocess.CompletedProcess(command, *_torch(names), ""))

    found = host_facts.gpus()

    assert found is not None
    assert (found["names"], found["usable"], found.get("driver_problem")) == (names, 1, problem)
    monkeypatch.setattr("subprocess.run", lambda command, **_: subprocess.CompletedProcess(command, *_torch([]), ""))
    assert (host_facts.gpus() is None) == (problem is None)


def test_a_tool_that_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, 20)

    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("subprocess.run", hang)

    found = host_facts.gpus()

    assert found is not None
    assert "timed out after 20" in found["driver_problem"]
    assert "timed out after 20" in found["torch_problem"]


@pytest.mark.parametrize(
    ("driver", "is_line"), [("ixgbe", True), ("virtio_net", False), (None, False), ("bonding", True)]
)
def test_only_a_card_or_several_have_the_rate_of_a_line(driver: str | None, is_line: bool, tmp_path: Path) -> None:
    interface, drivers = tmp_path / "eth0", tmp_path / "drivers"
    interface.mkdir()
    if driver == "bonding":
        (interface / "bonding").mkdir()
    elif driver is not None:
        (drivers / driver).mkdir(parents=True)
        (interface / "device").mkdir()
        (interface / "device" / "driver").symlink_to(drivers / driver)

    assert host_facts.is_line(interface) == is_line


@pytest.mark.usefixtures("far_end")
def test_a_folder_that_fails_is_told_and_the_rest_is_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = Path.exists

    def exists(path: Path, **more: Any) -> bool:
        if path.is_relative_to(tmp_path):
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path, **more)

    monkeypatch.setattr(Path, "exists", exists)
    folder = str(tmp_path / "runs")

    assert host_facts.room(folder) == {"path": folder, "problem": "Stale file handle"}
    assert agent.mark({"folder": folder, "name": ".mark"}) == {"problem": f"{folder}: Stale file handle"}
    assert agent.see({"path": folder}) == {"problem": "Stale file handle"}


def test_the_network_of_an_address() -> None:
    assert host_facts.network_of("10.77.3.9", "255.255.254.0") == "10.77.2.0/23"
    assert host_facts.network_of("10.77.3.9", None) is None
    way = host_facts.way_to("127.0.0.1")
    assert (way["address"], way["interface"], way["network"]) == ("127.0.0.1", "lo", "127.0.0.0/8")


# The near end


@pytest.fixture
def far_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What is sent to the host in place of the agent."""
    file = tmp_path / "far.py"
    monkeypatch.setattr(conversation, "TEXTS", [file])
    return file


def test_an_end_does_not_wait_for_an_answer(far_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far_text.write_text("def answer():\n    import time\n    time.sleep(300)\n")
    monkeypatch.setattr(conversation, "END_S", 0.5)
    talks = Talks(["localhost"])
    asking = threading.Thread(target=talks.ask, args=({"do": "look"},), kwargs={"timeout_s": 100.0})
    asking.start()

    begin = time.monotonic()
    talks.close()

    asking.join(10.0)
    assert not asking.is_alive()
    assert time.monotonic() - begin < 10.0
    assert talks.here == {"localhost"}


@pytest.mark.parametrize(
    ("far", "check", "told"),
    [
        ("raise OSError('No space left on device')", "answer", "ended with 1: OSError: No space left"),
        ("import os; os._exit(255)", "ssh", "ssh failed"),
        ("import os; os._exit(127)", "python", "there is no Python"),
    ],
)
def test_only_what_ssh_says_is_told_of_ssh(far: str, check: str, told: str, far_text: Path) -> None:
    far_text.write_text(f"def answer():\n    {far}\n")
    talks = Talks(["localhost"])
    try:
        said = talks.ask({"do": "look"}, timeout_s=30.0)["localhost"]
    finally:
        talks.close()

    assert said.check == check
    assert told in said.problem


def test_an_answer_is_heard_after_a_login_script_that_ends_no_line(far_text: Path) -> None:
    agents = "\n".join(line for line in Path(agent.__file__).read_text().splitlines() if "from dtrain" not in line)
    script = "def basics(order):\n    return {}\n\n\ndetails = way_to = basics\nsys.stdout.write('Welcome!')\n"
    far_text.write_text(agents + "\n" + script)
    talks = Talks(["localhost"])
    try:
        said = talks.ask({"do": "look"}, timeout_s=10.0)["localhost"]
    finally:
        talks.close()

    assert (said.problem, said.found["number"]) == ("", 1)
