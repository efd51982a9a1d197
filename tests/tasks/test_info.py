"""A new task is one file in tasks/, one option class in config/task.py and one `case` in tasks/build.py.

`breaches` reads a tree with `ast` and names each line outside tasks/ that asks which task runs: by a task's name, by an
option class, or by a part of the name. It runs on dtrain/ and on made-up trees, in each of which it must name the breach.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter

from dtrain.config.task import TaskOptions, TaskSettings
from dtrain.tasks.build import task_info

DTRAIN = Path(__file__).parents[2] / "dtrain"

HOMES = ("tasks/", "config/task.py", "config/quickstart.py")
"""Where a task may be called by its name. The quickstart is a config."""

COMMANDS = {"chat": ("main.py", "commands/arguments.py", "commands/chat.py")}
"""Commands with the name of a task, and the files that mean the command by it."""

SHARED = {"TaskOptions", "TaskSettings"}
"""What config/task.py has for everyone: the base class and the union."""

ASKING = ("startswith", "endswith", "removeprefix", "removesuffix", "split", "partition", "find", "count")


# The rule


def breaches(root: Path) -> list[str]:
    """Returns a sentence for each line below `root` that asks which task runs, with its file and line."""
    names = names_in(root)
    found: list[str] = []
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root).as_posix()
        if place.startswith(HOMES):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = names - {command for command, files in COMMANDS.items() if place in files}
        for node in ast.walk(tree):
            found += [f"{place}:{line}: {text}" for line, text in _of_node(node, own)]
    return found


def names_in(root: Path) -> set[str]:
    """Returns the names of all tasks, of their option classes and of the heads that tasks define."""
    options = ast.parse((root / "config" / "task.py").read_text(encoding="utf-8"))
    names: set[str] = set()
    classes = [node for node in ast.walk(options) if isinstance(node, ast.ClassDef)]
    for option, field in [(node, field) for node in classes for field in node.body]:
        match field:
            case ast.AnnAssign(target=ast.Name("name"), annotation=ast.Subscript(slice=ast.Constant(value=str(name)))):
                names |= {option.name, name}
    for path in (root / "tasks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Head" and node.args:
                names.add(ast.literal_eval(node.args[0]))
    return names


def _of_node(node: ast.AST, names: set[str]) -> Iterator[tuple[int, str]]:
    match node:
        case ast.Constant(value=str(text)) if text in names:
            yield node.lineno, f"{text!r} is the name of a task"
        case ast.ImportFrom(module="dtrain.config.task") if others := {name.name for name in node.names} - SHARED:
            yield node.lineno, f"imports {', '.join(sorted(others))}, which belongs to one task"
        case ast.ImportFrom(module="dtrain.config") if any(name.name == "task" for name in node.names):
            yield node.lineno, "imports the option classes of all tasks"
        case ast.Import() if any(name.name == "dtrain.config.task" for name in node.names):
            yield node.lineno, "imports the option classes of all tasks"
        case ast.Match(subject=subject) if _is_name(subject):
            yield node.lineno, f"chooses by {ast.unparse(subject)}"
        case ast.Subscript(slice=index) if _is_name(index):
            yield node.lineno, f"looks {ast.unparse(index)} up in a table"
        case ast.Call(func=ast.Attribute(attr="get"), args=[key, *_]) if _is_name(key):
            yield node.lineno, f"looks {ast.unparse(key)} up in a table"
        case ast.Call(func=ast.Attribute(value=subject, attr=method)) if method in ASKING and _is_name(subject):
            yield node.lineno, f"asks for a part of {ast.unparse(subject)}"
        case ast.Compare(left=left, ops=ops, comparators=others):
            sides = [left, *others]
            is_table = any(isinstance(op, ast.In | ast.NotIn) for op in ops)
            has_text = any(isinstance(side, ast.Constant) for side in sides)
            if (is_table or has_text) and any(_is_name(side) for side in sides):
                yield node.lineno, f"asks {ast.unparse(node)}"


def _is_name(node: ast.AST) -> bool:
    """Returns whether an expression is the name of a task or of its head: `config.task.name`, `task_head.name`."""
    match node:
        case ast.Attribute(value=ast.Attribute(attr=owner) | ast.Name(id=owner), attr="name"):
            return owner.endswith(("task", "head"))
    return False


def test_nothing_outside_tasks_asks_which_task_runs() -> None:
    assert len(names_in(DTRAIN)) > 20, "found no tasks to look for"

    found = breaches(DTRAIN)

    assert not found, "\n".join(found)


OPTIONS = 'class Parrot(TaskOptions):\n    name: Literal["parrot"] = setting(..., "")\n    default_max_length = 64\n'


def write_tree(root: Path, files: dict[str, str]) -> Path:
    made_up = {"config/task.py": OPTIONS, "tasks/parrot.py": 'HEAD = Head("parrot_lm", AutoModel)\nname = "parrot"\n'}
    for name, text in {**made_up, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('def f(task):\n    return task == "parrot"', "a.py:2: 'parrot' is the name of a task"),
        ('TABLE = {"parrot": 64}', "a.py:1: 'parrot' is the name of a task"),
        ('match kind:\n    case "parrot":\n        pass', "a.py:2: 'parrot' is the name of a task"),
        ('def f(kind: Literal["parrot", "cat"]): ...', "'parrot' is the name of a task"),
        ('head == "parrot_lm"', "'parrot_lm' is the name of a task"),
        ('type(config.task).__name__ == "Parrot"', "'Parrot' is the name of a task"),
        ("from dtrain.config.task import Parrot, TaskSettings", "imports Parrot, which belongs to one task"),
        ("def f():\n    from dtrain.config import task as options", "a.py:2: imports the option classes of all tasks"),
        ("import dtrain.config.task", "imports the option classes of all tasks"),
        ("match self.config.task.name:\n    case _:\n        pass", "chooses by self.config.task.name"),
        ("TABLE[config.task.name]", "looks config.task.name up in a table"),
        ("TABLE.get(task.name, 128)", "looks task.name up in a table"),
        ('config.task.name.startswith("par")', "asks for a part of config.task.name"),
        ("config.task.name in TABLE", "asks config.task.name in TABLE"),
        ('"lm" in task_head.name', "asks 'lm' in task_head.name"),
        ('self._task.name != "par" "rots"', "asks self._task.name != 'parrots'"),
    ],
)
def test_each_question_about_a_task_is_named(tmp_path: Path, text: str, message: str) -> None:
    found = breaches(write_tree(tmp_path, {"commands/a.py": text}))

    assert any(message in one for one in found), found


def test_what_the_rule_allows_is_no_breach(tmp_path: Path) -> None:
    files = {
        "tasks/build.py": 'from dtrain.config import task\nconfig.task.name == "parrot"',
        "config/quickstart.py": 'QUICKSTART = {"task": {"name": "parrot"}}',
        "config/schema.py": "from dtrain.config.task import TaskSettings\ndefault = self.task.default_max_length",
        "training/card.py": "is_own = task != config.task.name\ntext = f'a {task.name} on parrots'",
        "commands/b.py": '"""Teaches a parrot."""\nlog.info("task.name=parrot needs seeds", config.task.name)\nTABLE[name]',
    }

    assert breaches(write_tree(tmp_path, files)) == []


# What each task says of itself


def all_options() -> list[TaskOptions]:
    """Returns the settings of every task with their defaults."""
    union, _ = get_args(TaskSettings)
    required = {"image_regression": {"targets": ["x", "y"]}}
    names = [get_args(option.model_fields["name"].annotation)[0] for option in get_args(union)]
    read: Any = TypeAdapter(TaskSettings).validate_python
    return [read({"name": name, **required.get(name, {})}) for name in names]


@pytest.mark.parametrize("options", all_options(), ids=lambda options: str(options.name))
def test_every_task_has_an_info_whose_parts_fit_together(options: Any) -> None:
    info = task_info(options)

    row = json.loads(json.dumps(info.example_row))
    assert row == info.example_row, "an example row is shown as JSON"
    assert row.keys() >= set(info.text_columns[:1]), "an example row has the column that a plain text fills"
    assert len(info.text_columns) == 2 if info.needs_text_pair else len(info.text_columns) <= 2
    assert isinstance(info.parse_text("a cat"), str | list)
    assert (info.prompt is None) or not options.generates_texts
    assert callable(info.head.auto_class.from_pretrained)


def test_the_hub_knows_most_tasks_under_a_name_of_its_own() -> None:
    found = {options.name: task_info(options).pipeline_tag for options in all_options()}  # type: ignore[attr-defined]

    expected = {
        "classification": "text-classification",
        "regression": "text-classification",
        "multiple_choice": "multiple-choice",
        "causal_lm": "text-generation",
        "chat": "text-generation",
        "masked_lm": "fill-mask",
        "question_answering": "question-answering",
        "token_classification": "token-classification",
        "image_classification": "image-classification",
        "image_regression": None,
        "seq2seq": "translation",
    }
    assert {name: found[name] for name in expected} == expected


def test_the_config_takes_the_tasks_own_length_where_none_is_set() -> None:
    found = {options.name: options.default_max_length for options in all_options()}  # type: ignore[attr-defined]

    expected = {"classification": 128, "causal_lm": 256, "chat": 256, "question_answering": 384}
    assert {name: found[name] for name in expected} == expected
