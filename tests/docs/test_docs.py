"""The documentation: links lead somewhere, named files exist, command lines are valid, and the tutorial runs."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from dtrain import errors
from dtrain.commands.arguments import parse
from dtrain.config.load import load_config, to_yaml
from tests.support import jobs, pages
from tests.support.pages import ROOT, Block

DOCS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "dtrain" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PAGES = [*DOCS, *(ROOT / folder / "README.md" for folder in ("configs", "hostfiles", "launch", "tests"))]

TOP = ("dtrain", "docs", "configs", "hostfiles", "launch", "tests", ".ci")
MADE_BY_THE_READER = {"hostfiles/mine", "hostfiles/simulated"}

RUN_ELSEWHERE = {
    "export": "sets a variable that every test of a page has",
    "cd": "enters the copy",
    "git": "copies a repository that has no address here",
    "source": "needs .venv, which launch/quickstart makes",
    "launch/quickstart": "installs; tests/launch/test_scripts.py runs it",
    "launch/test": "runs these tests",
    "launch/simulate-cluster": "needs root; tests/launch/test_simulated_cluster_life.py runs it",
    ".venv/bin/pre-commit": "changes the checkout's git hooks",
}
"""Commands of `sh` blocks that are neither dtrain's nor run by the tutorial, and why they are not run here."""

SHELL = {"cat", "head", "mkdir", "python", "wait"}
"""Commands of pages that are run as a whole."""

NOT_IN_THE_TUTORIAL = {
    "git clone": "installs",
    "run.name=stopped": "a person presses Ctrl-C; tests/checkpoint/test_use.py sends signals",
    "launch/simulate-cluster": "needs root; tests/cluster/test_jobs.py runs jobs on a simulated cluster",
    "hostfiles/mine": "needs two hosts",
}
"""Part of each block of the tutorial that is not run, and why."""

EXIT_CODES = {"train.micro_batchsize": 2, "train.max_minutes=0.01": 75}
PORT = "29511"


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def without_blocks(page: Path) -> str:
    return pages.BLOCK.sub("", page.read_text(encoding="utf-8"))


# Links and names


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            lost.append(target)

    assert lost == []


def files_of(page: Path) -> set[str]:
    """The files that a page's own blocks write."""
    return {block.text.splitlines()[0].removeprefix("# ") for block in pages.blocks(page, "python")}


@pytest.mark.parametrize("page", DOCS, ids=named)
def test_every_file_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(map(re.escape, TOP))})/[\w./*-]*[\w/*]", text))
    lost = [
        name
        for name in names - files_of(page) - MADE_BY_THE_READER
        if not any(ROOT.glob(name.rstrip("/")))
        and not name.startswith(tuple(f"{made}." for made in MADE_BY_THE_READER))
    ]

    assert lost == []


# Command lines


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block as words, without what they read from a here-document."""
    text = re.sub(r"<<'(\w+)'(.*?)\n(?:.*\n)*?\1$", r"\2", block.text, flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield [word for word in words if word != "&"]


def check_arguments(words: list[str]) -> None:
    """Reads the command line of a dtrain process, and the config that it names."""
    arguments = parse(words)
    if arguments.command not in ("doctor", "goodput"):
        load_config(arguments.config, arguments.overrides, command=arguments.command)


def check_command(words: list[str], *, in_a_run_page: bool) -> str:
    """Checks a command, or says why it is known: for dtrain's by reading its arguments."""
    program = words[0]
    if program == "dtrain":
        check_arguments(words[1:])
        return "dtrain"
    if "dtrain/main.py" in words:
        check_arguments(words[words.index("dtrain/main.py") + 1 :])
        return "dtrain"
    if match := re.fullmatch(r"launch/(dtrain|torchrun|deepspeed|mpirun)\.sh", program):
        start = [sys.executable, str(ROOT / "dtrain" / "commands" / "launch.py"), match[1], words[1], "--dry-run"]
        subprocess.run([*start, *words[2:]], check=True, capture_output=True, timeout=60)
        return "launch"
    if in_a_run_page and program in SHELL:
        return "shell"
    assert program in RUN_ELSEWHERE, f"{shlex.join(words)}: not run by any test; say in RUN_ELSEWHERE why"
    return "elsewhere"


@pytest.fixture
def folder_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which the runs that the pages speak of have been trained."""
    for name in ("dtrain", "configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "hostfiles").mkdir()
    for name in ("cluster", "mine", "simulated"):
        (tmp_path / "hostfiles" / name).write_text((ROOT / "hostfiles" / "cluster").read_text())
    monkeypatch.chdir(tmp_path)
    for block in pages.blocks(ROOT / "docs" / "tutorial.md", "sh"):
        if "cat > reviews/reviews.yaml" in block.text:
            (tmp_path / "reviews").mkdir()
            text = block.text.partition("\n")[2].rpartition("END")[0]
            (tmp_path / "reviews" / "reviews.yaml").write_text(text)
    configs = {"cola": "configs/cola.yaml", "quickstart": None, "chat_zh": "configs/chat_zh.yaml"}
    for run, config in {**configs, "reviews": "reviews/reviews.yaml"}.items():
        (tmp_path / "runs" / run).mkdir(parents=True)
        text = to_yaml(load_config(Path(config) if config else None, []))
        (tmp_path / "runs" / run / "config.yaml").write_text(text)
    return tmp_path


@pytest.mark.usefixtures("folder_of_a_user")
def test_every_command_line_is_one_that_dtrain_takes() -> None:
    checked = []
    for page in DOCS:
        if page.name in ("new-engine.md", "new-task.md"):  # they change dtrain first; their own tests run them
            continue
        for block in pages.blocks(page, "sh"):
            for words in commands(block):
                if "train.micro_batchsize=8" in words:  # the tutorial's mistake
                    with pytest.raises(errors.ConfigError):
                        check_command(words, in_a_run_page=True)
                    continue
                try:
                    checked.append(check_command(words, in_a_run_page=page.name == "tutorial.md"))
                except (errors.DtrainError, subprocess.CalledProcessError) as error:
                    pytest.fail(f"{named(page)}, line {block.line}: {shlex.join(words)}\n{error}", pytrace=False)

    assert checked.count("dtrain") > 25, "found no commands to check"
    assert checked.count("launch") >= 2


@pytest.mark.usefixtures("folder_of_a_user")
@pytest.mark.parametrize(
    "line",
    [
        "dtrain train.micro_batchsize=8",
        "torchrun --nproc-per-node 2 dtrain/main.py --config configs/cola.yml",
        "dtrain evalute --config configs/cola.yaml",
        "rm -r runs",
    ],
)
def test_a_wrong_command_line_would_be_noticed(line: str) -> None:
    with pytest.raises((errors.ConfigError, AssertionError)):
        check_command(shlex.split(line), in_a_run_page=False)


# What pages say of the code


@cache
def texts_of_dtrain() -> tuple[str, ...]:
    """Every string in dtrain's source except docstrings; what an f-string fills in is a zero character."""
    found = []
    for file in (ROOT / "dtrain").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings are no messages
        for node in ast.walk(tree):
            if id(node) in prose:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def is_a_message(quoted: str) -> bool:
    """Whether some text of dtrain has these words; `...` stands for anything."""
    parts = [part.strip() for part in quoted.split("...") if part.strip()]
    return any(all(part in text for part in parts) for text in texts_of_dtrain())


def test_the_messages_in_troubleshooting_are_dtrains_own() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?`) \|", text, flags=re.MULTILINE)
    assert len(cells) > 40, "found no messages to check"

    lost = [quoted for cell in cells for quoted in re.findall("`(.*?)`", cell) if not is_a_message(quoted)]

    assert lost == []


def test_every_exit_code_has_its_section() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    codes = {0, *(kind.exit_code for kind in errors.ERROR_TYPES.values())}

    assert {int(code) for code in re.findall(r"^## (\d+): ", text, flags=re.MULTILINE)} == codes
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)} == codes


def logged() -> Iterator[tuple[str, str]]:
    """Event and field of each line that the source writes to metrics.jsonl."""
    for file in (ROOT / "dtrain").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            names = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
            if node.func.attr == "event" and node.args and isinstance(node.args[0], ast.Constant):
                yield from ((str(node.args[0].value), name) for name in names)
            elif node.func.attr == "train" and "learning_rate" in names:
                yield from (("train", name) for name in names)


def test_every_event_and_field_of_metrics_jsonl_is_documented() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    parts = re.split(r"^\*\*`(\w+)`\*\*", text.partition("## summary.json")[0], flags=re.MULTILINE)
    documented = dict(zip(parts[1::2], parts[2::2], strict=True))
    found = set(logged())
    assert len(found) > 30, "found no fields to check"

    assert sorted((event, name) for event, name in found if f"`{name}`" not in documented.get(event, "")) == []


# What runs


@pytest.mark.commands
def test_the_python_example_trains_and_prints_its_loss_and_model_folder(tmp_path: Path) -> None:
    (block,) = pages.blocks(ROOT / "docs" / "python-api.md", "python")
    (tmp_path / "own_data.py").write_text(block.text, encoding="utf-8")

    printed = pages.run(f"PYTHONPATH={shlex.quote(str(ROOT))} python own_data.py", tmp_path)

    loss, folder = printed.splitlines()[-1].split()
    assert float(loss) < 1.0
    assert (tmp_path / folder / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.commands
@pytest.mark.timeout(600)
def test_the_tutorial_runs(tmp_path: Path) -> None:
    for name in ("dtrain", "configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    unused, ran = set(NOT_IN_THE_TUTORIAL), []

    for block in pages.blocks(ROOT / "docs" / "tutorial.md", "sh"):
        skipped = {part for part in NOT_IN_THE_TUTORIAL if part in block.text}
        unused -= skipped
        if skipped:
            continue
        code = next((code for part, code in EXIT_CODES.items() if part in block.text), 0)
        text = block.text.replace(PORT, str(jobs.free_port()))
        text = f"{{\n{text}}} || {{ test $? = {code} && code=met; }}\ntest ${{code:-unmet}} = met\n" if code else text
        ran.append(pages.run(text, tmp_path))

    assert unused == set(), "named here, but not in the tutorial"
    assert len(ran) >= 12
    runs = tmp_path / "runs"
    results = {
        run: json.loads((runs / run / "summary.json").read_text())["eval"] for run in ("reviews", "two-launchers")
    }
    assert results["reviews"]["accuracy"] > 0.9
    assert results["two-launchers"]["loss"] == pytest.approx(results["reviews"]["loss"], rel=1e-5)
    assert json.loads((runs / "timed" / "exit.json").read_text())["code"] == 0
    assert any(re.search(r"^good \(probability 0\.\d+\)$", printed, flags=re.MULTILINE) for printed in ran)
