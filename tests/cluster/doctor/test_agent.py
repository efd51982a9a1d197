"""The doctor's agent, run in this process, and conversations with an agent."""

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
from dtrain.cluster.doctor.conversation import AGENT_FILES, Conversations
from dtrain.cluster.remote_source import join_sources
from tests.support.doctor_reports import FACTS, GPUS


@pytest.fixture
def clean_agent() -> Iterator[None]:
    """Removes what the agent keeps in its module."""
    yield
    for listener in agent.listeners:
        listener.close()
    agent.listeners.clear()
    agent.markers.clear()


def test_the_agents_source_needs_no_other_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = join_sources(AGENT_FILES)
    assert "import dtrain" not in text
    assert "from dtrain" not in text
    names = [line.split()[1].partition("(")[0] for line in text.splitlines() if line.startswith("def ")]
    assert sorted(names) == sorted(set(names)), "two of the files define the same name"
    scope: dict[str, Any] = {"__name__": "agent"}
    exec(compile(text, "sent", "exec"), scope)
    order = {
        "order": "facts",
        "root": "/none",
        "folder": str(tmp_path),
        "hosts": ["localhost"],
        "output_dir": str(tmp_path),
    }
    lines = [json.dumps({**order, "number": 1}), json.dumps({"order": "nonsense", "number": 2})]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())

    scope["follow_orders"]()

    facts, failed = map(json.loads, filter(None, out.getvalue().splitlines()))
    assert facts["number"] == 1
    assert {*FACTS, "machine"} <= set(facts)
    assert facts["code"] is None
    assert facts["runs"]["writable"]
    assert failed == {"number": 2, "problem": "KeyError: 'nonsense'"}


@pytest.mark.usefixtures("clean_agent")
def test_a_connection_succeeds_only_to_a_listener_with_the_same_token() -> None:
    opened = agent.open_listener({"to": "127.0.0.1", "token": "w" * agent.TOKEN_BYTES})
    open_port = {"host": "a", "address": "127.0.0.1", "port": opened["port"], "token": "w" * agent.TOKEN_BYTES}
    other = {**open_port, "host": "b", "token": "v" * agent.TOKEN_BYTES}
    closed = agent.open_listener({"to": "127.0.0.1", "token": "x" * agent.TOKEN_BYTES})
    agent.listeners.pop().close()

    # The listener that was just closed may still be in accept(), so connect to a port that was never opened.
    unused = {**open_port, "host": "c", "port": 1}
    found = agent.connect_to_targets({"targets": [open_port, other, unused], "timeout_s": 5.0})

    assert opened["address"] == "127.0.0.1"
    assert closed["port"] != opened["port"]
    assert found == {"a": "", "b": "another program answers at 127.0.0.1", "c": "Connection refused"}


@pytest.mark.usefixtures("clean_agent")
def test_a_marker_is_removed_when_the_input_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    order = {"order": "create_marker", "folder": str(tmp_path / "not" / "there"), "name": ".mark", "number": 1}
    find = {"order": "find_marker", "path": str(tmp_path / ".mark"), "number": 2}
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{json.dumps(order)}\n{json.dumps(find)}\n"))
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())

    agent.follow_orders()

    assert [json.loads(line) for line in out.getvalue().splitlines() if line] == [
        {"number": 1, "path": str(tmp_path / ".mark")},
        {"number": 2, "exists": True},
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

    assert host_facts.read_memory() == {"total": 1 << 20, "available": 1 << 19}


def _torch(names: list[str], cuda: str | None = "12.8") -> tuple[int, str]:
    nccl = "2.27.3" if names else None
    return 0, json.dumps({"names": names, "cuda": cuda, "usable": len(names), "nccl": nccl})


TWO = (0, "H200, 570.1, 143771\nH200, 570.1, 143771\n")
NVML = (18, "Failed to initialize NVML\n")


@pytest.mark.parametrize(
    ("smi", "torch_result", "found"),
    [
        (TWO, _torch(["H200", "H200"]), GPUS),
        (TWO, _torch(["H200"]), {**GPUS, "names": ["H200"], "usable": 1}),  # CUDA_VISIBLE_DEVICES=0
        ((0, TWO[1] + "WARNING: infoROM is corrupted at gpu 0000:00:1E.0\n"), _torch([], None),
         {"names": ["H200", "H200"], "driver": "570.1", "cuda": None, "usable": 0, "nccl": None}),
        (TWO, (1, ""), {"names": ["H200", "H200"], "driver": "570.1", "torch_problem": "died"}),
        ((6, "No devices were found\n"), _torch([]), None),
        ((0, ""), _torch([]), None),
        (NVML, _torch([]), {"driver_problem": "nvidia-smi exited with code 18: Failed to initialize NVML",
                            "names": [], "cuda": "12.8", "usable": 0, "nccl": None}),
    ],
)  # fmt: skip
def test_gpus_are_what_torch_sees_and_nvidia_smi_adds_the_driver(
    smi: tuple[int, str], torch_result: tuple[int, str], found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        code, out = smi if command[0] == "/bin/nvidia-smi" else torch_result
        return subprocess.CompletedProcess(command, code, out, "died\n" if code == 1 else "")

    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("subprocess.run", answer)

    assert host_facts.find_gpus() == found


@pytest.mark.parametrize(
    ("file", "names", "problem"),
    [(0, ["H200"], "nvidia-smi is not on the PATH"), (1, ["RTX"], None), (2, ["MI300"], None)],
)
def test_gpus_without_nvidia_smi_are_what_torch_sees(
    file: int, names: list[str], problem: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = [str(tmp_path / f"{at}") for at in range(3)]
    Path(files[file]).touch()
    monkeypatch.setattr(host_facts, "DEVICE_FILES", files)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("subprocess.run", lambda command, **_: subprocess.CompletedProcess(command, *_torch(names), ""))

    found = host_facts.find_gpus()

    assert found is not None
    assert (found["names"], found["usable"], found.get("driver_problem")) == (names, 1, problem)
    monkeypatch.setattr("subprocess.run", lambda command, **_: subprocess.CompletedProcess(command, *_torch([]), ""))
    assert (host_facts.find_gpus() is None) == (problem is None)


def test_a_tool_that_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, 20)

    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("subprocess.run", hang)

    found = host_facts.find_gpus()

    assert found is not None
    assert "timed out after 20" in found["driver_problem"]
    assert "timed out after 20" in found["torch_problem"]


@pytest.mark.parametrize(
    ("driver", "is_physical"), [("ixgbe", True), ("virtio_net", False), (None, False), ("bonding", True)]
)
def test_only_network_cards_and_bonds_are_physical(driver: str | None, is_physical: bool, tmp_path: Path) -> None:
    interface, drivers = tmp_path / "eth0", tmp_path / "drivers"
    interface.mkdir()
    if driver == "bonding":
        (interface / "bonding").mkdir()
    elif driver is not None:
        (drivers / driver).mkdir(parents=True)
        (interface / "device").mkdir()
        (interface / "device" / "driver").symlink_to(drivers / driver)

    assert host_facts.is_physical(interface) == is_physical


@pytest.mark.usefixtures("clean_agent")
def test_a_folder_that_cannot_be_accessed_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = Path.exists

    def exists(path: Path, **more: Any) -> bool:
        if path.is_relative_to(tmp_path):
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path, **more)

    monkeypatch.setattr(Path, "exists", exists)
    folder = str(tmp_path / "runs")

    assert host_facts.disk_space(folder) == {"path": folder, "problem": "Stale file handle"}
    assert agent.create_marker({"folder": folder, "name": ".mark"}) == {"problem": f"{folder}: Stale file handle"}
    assert agent.find_marker({"path": folder}) == {"problem": "Stale file handle"}


def test_the_network_of_an_address() -> None:
    assert host_facts.network_of("10.77.3.9", "255.255.254.0") == "10.77.2.0/23"
    assert host_facts.network_of("10.77.3.9", None) is None
    route = host_facts.find_route("127.0.0.1")
    assert (route["address"], route["interface"], route["network"]) == ("127.0.0.1", "lo", "127.0.0.0/8")


# Conversations


@pytest.fixture
def agent_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file that is sent to the host in place of the agent."""
    file = tmp_path / "agent.py"
    monkeypatch.setattr(conversation, "AGENT_FILES", [file])
    return file


def test_closing_does_not_wait_for_an_answer(agent_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent_file.write_text("def follow_orders():\n    import time\n    time.sleep(300)\n")
    monkeypatch.setattr(conversation, "END_TIMEOUT_S", 0.5)
    conversations = Conversations(["localhost"])
    asking = threading.Thread(target=conversations.ask, args=({"order": "facts"},), kwargs={"timeout_s": 100.0})
    asking.start()

    begin = time.monotonic()
    conversations.close()

    asking.join(10.0)
    assert not asking.is_alive()
    assert time.monotonic() - begin < 10.0
    assert conversations.local_hosts == {"localhost"}


@pytest.mark.parametrize(
    ("statement", "check", "problem"),
    [
        ("raise OSError('No space left on device')", "answer", "exited with code 1: OSError: No space left"),
        ("import os; os._exit(255)", "ssh", "ssh failed"),
        ("import os; os._exit(127)", "python", "there is no Python"),
    ],
)
def test_only_failures_of_ssh_are_reported_as_such(statement: str, check: str, problem: str, agent_file: Path) -> None:
    agent_file.write_text(f"def follow_orders():\n    {statement}\n")
    conversations = Conversations(["localhost"])
    try:
        reply = conversations.ask({"order": "facts"}, timeout_s=30.0)["localhost"]
    finally:
        conversations.close()

    assert reply.check == check
    assert problem in reply.problem


def test_an_answer_is_read_after_a_login_script_that_leaves_a_line_open(agent_file: Path) -> None:
    source = "\n".join(line for line in Path(agent.__file__).read_text().splitlines() if "from dtrain" not in line)
    facts = "collect_basic_facts = collect_doctor_facts = lambda order: {}"
    agent_file.write_text(f"{source}\n{facts}\nsys.stdout.write('Welcome!')\n")
    conversations = Conversations(["localhost"])
    try:
        reply = conversations.ask({"order": "facts"}, timeout_s=10.0)["localhost"]
    finally:
        conversations.close()

    assert (reply.problem, reply.answer["number"]) == ("", 1)
