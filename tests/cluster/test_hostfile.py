"""Valid and invalid hostfiles, and the filters of hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.cluster.hostfile import Host, main, read_hostfile, select_hosts
from dtrain.errors import ConfigError

HOSTS = [Host("node1", 4), Host("node2", 2), Host("node3", 1)]


def _file(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text, encoding="utf-8")
    return path


def test_hosts_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "\ufeff# two nodes\n\nnode2 slots=4  # the fat one\n\tnode1.lan\tslots = 2\r\n10.0.0.7 slots=1"
    assert read_hostfile(_file(tmp_path, text)) == [Host("node2", 4), Host("node1.lan", 2), Host("10.0.0.7", 1)]


def test_a_host_may_be_spare_but_not_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path, "node1 slots=2\nnode2 slots = 4\tspare # in the next rack")
    assert read_hostfile(path)[1] == Host("node2", 4, is_spare=True)
    assert select_hosts(read_hostfile(path), exclude="node2:0")[1] == Host("node2", 3, (1, 2, 3), is_spare=True)
    assert main([str(path)]) == 0
    assert capsys.readouterr().out == "node1 2\n"
    with pytest.raises(ConfigError, match="has spare hosts only"):
        read_hostfile(_file(tmp_path, "node1 slots=2 spare"))


@pytest.mark.parametrize(
    "name", ["a;touch", "$(id)", "-oProxyCommand=x", "a`id`", "a|b", "node*", "a/b", "a'b", "a&", "a-"]
)
def test_a_name_that_is_special_to_a_shell_or_to_ssh_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"hosts, line 2: .* is not a host name"):
        read_hostfile(_file(tmp_path, f"node1 slots=1\n{name} slots=1\n"))


@pytest.mark.parametrize(
    "line",
    [
        "node1",
        "node1 slot=4",
        "node1 slots=4 gpus=2",
        "node1 slots=4 spares",
        "node1 spare",
        "node1 4",
        "a;touch x slots=1",
    ],
)
def test_an_invalid_line_is_shown_with_its_number(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match=r"hosts, line 1: .* is not "):
        read_hostfile(_file(tmp_path, line))


@pytest.mark.parametrize("slots", ["0", "-1", "x", "1.5", "", "99999", "\u0664"])
def test_slots_must_be_a_number_from_1(tmp_path: Path, slots: str) -> None:
    with pytest.raises(ConfigError, match="slots"):
        read_hostfile(_file(tmp_path, f"node1 slots={slots}"))


def test_all_mistakes_are_listed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_hostfile(_file(tmp_path, "node1 slots=1\nnode1 slots=2\nnode2\nnode3 slots=0"))
    lines = str(error.value).splitlines()
    assert [line.split(":")[0][-1] for line in lines] == ["2", "3", "4"]
    assert lines[0].endswith("line 2: node1 is listed twice (first: line 1).")


@pytest.mark.parametrize("text", ["", "# nothing\n\n"])
def test_a_file_without_hosts_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="lists no host"):
        read_hostfile(_file(tmp_path, text))


def test_a_mistyped_path_gets_a_suggestion(tmp_path: Path) -> None:
    path = _file(tmp_path, "node1 slots=1")
    with pytest.raises(
        ConfigError,
        match=rf"cannot read the hostfile {tmp_path}/hosst: No such file or directory\. Did you mean {path}\?",
    ):
        read_hostfile(tmp_path / "hosst")
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ConfigError, match="is not a text file"):
        read_hostfile(tmp_path / "picture")


@pytest.mark.parametrize(
    ("include", "exclude", "selected"),
    [
        ("", "", HOSTS),
        ("node2@node1:0,2", "", [Host("node1", 2, (0, 2)), Host("node2", 2)]),
        ("node2:0@node2:1", "", [Host("node2", 2)]),
        ("node1@node1:0", "", HOSTS[:1]),
        ("", "node1", HOSTS[1:]),
        ("", "node1:1@node3", [Host("node1", 3, (0, 2, 3)), Host("node2", 2)]),
        ("", "node3:0", HOSTS[:2]),
    ],
)
def test_filters_are_those_of_deepspeed(include: str, exclude: str, selected: list[Host]) -> None:
    assert select_hosts(HOSTS, include=include, exclude=exclude) == selected


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("node1", "node2", "not both"),
        ("nod1", "", "no host 'nod1'. Did you mean node1"),
        ("node2:2", "", "node2 has slots 0 to 1, not 2"),
        ("node2:a", "", "is not HOST:SLOT,SLOT"),
        ("node2:", "", "is not HOST:SLOT,SLOT"),
        ("", "node1@node2@node3", "leaves no slot"),
    ],
)
def test_an_invalid_filter_is_refused(include: str, exclude: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_hosts(HOSTS, include=include, exclude=exclude)


def test_the_program_prints_a_line_for_each_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path, "node1 slots=4\nnode2 slots=2\n")
    assert main([str(path), "--exclude", "node1:0"]) == 0
    assert capsys.readouterr().out == "node1 3\nnode2 2\n"
    assert main([str(path), "--include", "node9"]) == 2
    assert main([str(path), "--inclde", "node9"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: --include: the hostfile has no host 'node9'")
