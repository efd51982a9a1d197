"""The house keeps its shape: who may import whom, and the one place of each thing.

`breaches` reads a tree with `ast`, imports nothing of it, and returns one sentence per breach. It runs on dtrain/,
which must have none, and on made-up bad trees, in each of which it must name the breach.
"""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

DTRAIN = Path(__file__).parents[1] / "dtrain"

ORDER = (
    "environment",
    "errors",
    "console",
    "config",
    "distributed",
    "cluster",
    "models",
    "runs",
    "data",
    "tasks",
    "engine",
    "checkpoint",
    "training",
    "job",
    "commands",
    "main",
    "dtrain",
)
"""The packages and files directly in dtrain/. Each imports only from those before it; `dtrain` is __init__.py."""

ONLY_IN = {
    "os.environ": (
        "main",
        "commands.launch",
        "commands.link_test",
        "cluster.remote_supervisor",
        "cluster.doctor.host_facts",
    ),
    "torch.distributed": (
        "distributed.process_group",
        "distributed.collectives",
        "job.watchdog.flight_recorder",
        "engine",
        "commands.link_test",
    ),
    "deepspeed": ("engine.deepspeed",),
    "yaml": ("config.raw_settings", "config.yaml_dialect"),
}
"""A thing, and the modules or packages that may use it."""

SAME_AS_ENVIRON = {"os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"}

WITHOUT_TORCH = (
    "environment",
    "errors",
    "console",
    "config",
    "cluster",
    "runs",
    "distributed.topology",
    "distributed.traffic",
    "distributed.network",
    "commands.arguments",
    "commands.doctor",
    "main",
    "dtrain",
)
"""Files and whole packages that are imported for --help, for errors in the config, or on a host without torch.

Whatever they import at import time comes along."""

HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "deepspeed",
    "sklearn",
    "scipy",
    "numpy",
    "pandas",
    "tokenizers",
    "tensorboard",
}

ENGINE_QUESTIONS = {
    *("zero_stage", "is_deepspeed", "powersgd", "local_steps", "gradient_wire", "bucket_mb"),
    *("local_sgd", "ds_numel", "ds_tensor", "ds_shape", "ds_id"),
}
"""Attributes that tell one engine from another. Only engine/ and config/ use them; the rest asks dtrain.engine.protocol."""

ENGINES = ("single", "ddp", "deepspeed", "fsdp")

ENGINE_API = (
    "build",
    "protocol",
    "optim",
    "schedules",
    "parameter_groups",
    "sharded_tensor",
    "state",
    "forward_only",
    "unused_parameters",
)
"""The files of engine/ that the rest may import: none of them belongs to one engine."""

LONGEST_FILE = 400
"""Lines. The aim is 300; from here on a file is two."""

GONE_FROM_STDLIB = {"asynchat", "asyncore", "cgi", "crypt", "distutils", "imp", "pipes", "smtpd", "telnetlib"}
"""In the standard library of some Python from 3.10 to 3.13, whichever runs this test."""


@dataclass
class Module:
    """One file.

    Attributes:
        name: dotted, below dtrain.
        path: of the file.
        lines: how many.
        uses: dotted name -> first line, for imports and attributes of imported names.
        at_import: those of `uses` outside functions.
        attributes: name of an attribute of anything -> first line.
    """

    name: str
    path: Path
    lines: int
    uses: dict[str, int] = field(default_factory=dict)
    at_import: set[str] = field(default_factory=set)
    attributes: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, line: int, *, at_import: bool) -> None:
        self.uses.setdefault(name, line)
        if at_import:
            self.at_import.add(name)


class Reader(ast.NodeVisitor):
    """Collects what a module imports and which attributes of imported names it uses."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.bound: dict[str, str] = {}
        self.deferred = 0

    def _add(self, name: str, node: ast.AST) -> None:
        self.module.add(name, node.lineno, at_import=not self.deferred)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node)
            self.bound[alias.asname or alias.name.split(".")[0]] = (
                alias.name if alias.asname else alias.name.split(".")[0]
            )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level:
            package = ["dtrain", *self.module.name.split(".")]
            keep = len(package) - node.level + (self.module.path.name == "__init__.py")
            source = ".".join([*package[:keep], *filter(None, [node.module])])
            self._add(f"relative import of {source}", node)
        else:
            source = node.module or ""
        for alias in node.names:
            self.bound[alias.asname or alias.name] = f"{source}.{alias.name}"
            self._add(f"{source}.{alias.name}", node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.module.attributes.setdefault(node.attr, node.lineno)
        parts: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id in self.bound:
            self._add(".".join([self.bound[inner.id], *reversed(parts)]), node)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        self.deferred += 1
        self.generic_visit(node)
        self.deferred -= 1

    visit_AsyncFunctionDef = visit_FunctionDef
    visit_Lambda = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        is_for_types_only = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        self.deferred += is_for_types_only
        for child in node.body:
            self.visit(child)
        self.deferred -= is_for_types_only
        for child in [node.test, *node.orelse]:
            self.visit(child)


def read_tree(root: Path) -> dict[str, Module]:
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "dtrain"
        modules[name] = Module(name, path, lines=path.read_text(encoding="utf-8").count("\n"))
    for module in modules.values():
        Reader(module).visit(ast.parse(module.path.read_text(encoding="utf-8")))
    return modules


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def home_of(name: str) -> str:
    """The package that a module is in, or the module itself where it lies directly in dtrain/."""
    return name.partition(".")[0]


def target_of(used: str, modules: dict[str, Module]) -> str | None:
    """The module of dtrain that a dotted name lies in, None for other names and for dtrain's version."""
    if not is_in(used, "dtrain") or used == "dtrain.__version__":
        return None
    name = used.removeprefix("dtrain").removeprefix(".")
    while name and name not in modules and name not in ORDER:
        name = name.rpartition(".")[0]
    return name or "dtrain"


def breaches(root: Path) -> list[str]:
    """One sentence per breach of the house's rules below `root`, each with its file and line."""
    modules = read_tree(root)
    found: list[str] = []
    for module in modules.values():
        found += [
            f"{module.path.relative_to(root)}:{text}"
            for text in [*_of_order(module, modules), *_of_places(module), *_of_engines(module), *_of_size(module)]
        ]
    return [*found, *_of_cycles(modules), *_of_torch(modules), *_of_names(root), *_of_types(modules)]


def _of_order(module: Module, modules: dict[str, Module]) -> Iterator[str]:
    here = home_of(module.name)
    if here not in ORDER:
        yield f"1: {here} has no place in the order: move it into a package, or name it in tests/test_layers.py"
        return
    seen = set()
    for used, line in module.uses.items():
        if used.startswith("relative import"):
            yield f"{line}: {used}: imports are absolute, from dtrain.x import y"
        target = target_of(used, modules)
        if target is None or target in seen:
            continue
        seen.add(target)
        there = home_of(target)
        if there in ORDER and ORDER.index(there) > ORDER.index(here):
            yield f"{line}: {module.name} -> {target}: {here} comes before {there} and must not import from it"


def _of_cycles(modules: dict[str, Module]) -> Iterator[str]:
    """Cycles of files, imports inside functions and for types alone included."""
    imports = {
        name: {target for used in module.uses if (target := target_of(used, modules)) in modules and target != name}
        for name, module in modules.items()
    }
    while imports:
        free = {name for name, targets in imports.items() if not targets & imports.keys()}
        if not free:
            break
        imports = {name: targets for name, targets in imports.items() if name not in free}
    while imports:  # what is left imports a cycle or is in one
        used = set().union(*imports.values())
        if not (unused := imports.keys() - used):
            yield f"{', '.join(sorted(imports))}: import each other in a cycle"
            return
        imports = {name: targets for name, targets in imports.items() if name not in unused}


def _of_places(module: Module) -> Iterator[str]:
    for thing, homes in ONLY_IN.items():
        if any(is_in(module.name, home) for home in homes):
            continue
        names = {thing} | (SAME_AS_ENVIRON if thing == "os.environ" else set())
        lines = [line for used, line in module.uses.items() if any(is_in(used, name) for name in names)]
        if lines:
            yield f"{min(lines)}: {module.name} uses {thing}, which belongs to {', '.join(homes)}"
    if any(is_in(used, "deepspeed") for used in module.at_import):
        yield f"1: {module.name} imports deepspeed when it is imported, not when it is used"


def _engine_compared(node: ast.Compare) -> str | None:
    """The name of an engine that is compared with something else than a launcher's name or the name that the user has set."""
    sides = [node.left, *node.comparators]
    if any(ast.unparse(side).endswith(("launcher", "config.engine.name")) for side in sides):
        return None
    values = [constant.value for side in sides for constant in ast.walk(side) if isinstance(constant, ast.Constant)]
    return next((value for value in values if isinstance(value, str) and value in ENGINES), None)


def _of_engines(module: Module) -> Iterator[str]:
    """A new engine must be one file and one `case`: nothing outside engine/ asks which engine runs, build.py but once."""
    home = home_of(module.name)
    for node in ast.walk(ast.parse(module.path.read_text(encoding="utf-8"))):
        if home != "config" and isinstance(node, ast.Compare) and (name := _engine_compared(node)):
            yield f"{node.lineno}: {module.name} compares with {name}: build.py has one `case` for it, the rest asks the engine"
    if home in ("engine", "config"):
        return
    for name in ENGINE_QUESTIONS & module.attributes.keys():
        yield f"{module.attributes[name]}: {module.name} asks for {name}: only engine/ tells engines apart"
    for used, line in module.uses.items():
        parts = used.split(".")
        if parts[:2] == ["dtrain", "engine"] and len(parts) > 2 and parts[2] not in ENGINE_API:
            yield f"{line}: {module.name} imports {used}, which belongs to one engine"


def _of_types(modules: dict[str, Module]) -> Iterator[str]:
    """A type's name means one thing in the whole package. Names that begin with an underscore stay in their file."""
    homes: dict[str, list[str]] = {}
    for module in modules.values():
        for node in ast.parse(module.path.read_text(encoding="utf-8")).body:
            is_alias = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            name = node.name if isinstance(node, ast.ClassDef) else node.targets[0].id if is_alias else ""
            if isinstance(node, ast.ClassDef) or (is_alias and _is_type_name(name)):
                homes.setdefault(name, []).append(module.name)
    for name, places in homes.items():
        if len(places) > 1 and not name.startswith("_"):
            yield f"{name}: a type of this name is in {' and '.join(places)}"


def _is_type_name(name: str) -> bool:
    return name[:1].isupper() and not name.isupper() and len(name) > 1  # T, U: type variables; CAPITALS: constants


def _of_size(module: Module) -> Iterator[str]:
    if module.lines > LONGEST_FILE:
        yield f"{module.lines}: {module.name} has {module.lines} lines, more than {LONGEST_FILE}: make two files of it"


def _of_torch(modules: dict[str, Module]) -> Iterator[str]:
    starts = [name for name in modules if any(is_in(name, start) for start in WITHOUT_TORCH)]
    for start in starts:
        waiting, seen = [(start,)], set()
        while waiting:
            chain = waiting.pop(0)
            if chain[-1] in seen or chain[-1] not in modules:
                continue
            seen.add(chain[-1])
            for used in sorted(modules[chain[-1]].at_import):
                if used.split(".")[0] in HEAVY:
                    yield f"{' -> '.join([*chain, used.split('.')[0]])}: imported for --help and config errors"
                    break
                if (target := target_of(used, modules)) is not None:
                    # Importing a.b runs the __init__.py of a first.
                    waiting += [(*chain, target), (*chain, home_of(target)), (*chain, "dtrain")]


@cache
def _library_names() -> frozenset[str]:
    installed = {name for name in importlib.metadata.packages_distributions() if name != "dtrain"}
    return frozenset(sys.stdlib_module_names | GONE_FROM_STDLIB | installed)


def _of_names(root: Path) -> Iterator[str]:
    # Running dtrain/main.py by path puts dtrain/ itself on sys.path: what lies directly in it can hide a library.
    for path in sorted(root.iterdir()):
        if (path.suffix == ".py" or path.is_dir()) and path.stem in _library_names():
            yield f"{path.name}: hides the library {path.stem}"


def test_dtrain_keeps_its_layers_and_each_thing_its_place() -> None:
    assert read_tree(DTRAIN), "found no code to check"

    found = breaches(DTRAIN)

    assert not found, "\n".join(found)


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"data/order.py": "import torch\nfrom dtrain.training.loop import fit"},
            "data/order.py:2: data.order -> training: data comes before training and must not import from it",
        ),
        ({"data/order.py": "def f():\n    import dtrain.training.loop"}, "data/order.py:2: data.order -> training"),
        ({"data/order.py": "from dtrain.training import loop"}, "data.order -> training"),
        ({"data/order.py": "from dtrain import fit"}, "data.order -> dtrain: data comes before dtrain"),
        ({"models/load.py": "from dtrain.data.order import StepPlan"}, "models.load -> data: models comes before data"),
        ({"console.py": "from dtrain.config.load import x"}, "console -> config: console comes before config"),
        (
            {
                "engine/ddp.py": "from dtrain.engine.local import a",
                "engine/local.py": "from dtrain.engine.ddp import b",
            },
            "engine.ddp, engine.local: import each other in a cycle",
        ),
        (
            {
                "engine/a.py": "def f():\n    import dtrain.engine.b",
                "engine/b.py": "import dtrain.engine.c",
                "engine/c.py": "import typing\nif typing.TYPE_CHECKING:\n    import dtrain.engine.a",
                "engine/d.py": "import dtrain.engine.a",
            },
            "engine.a, engine.b, engine.c: import each other in a cycle",
        ),
        ({"data/order.py": "from ..models import load"}, "relative import of dtrain.models"),
        (
            {"data/seeding.py": "import os\nSEED = os.environ['SEED']"},
            "data/seeding.py:2: data.seeding uses os.environ",
        ),
        ({"data/seeding.py": "import os as o\no.getenv('SEED')"}, "data.seeding uses os.environ"),
        ({"data/seeding.py": "from os import environ"}, "data.seeding uses os.environ"),
        (
            {"training/loop.py": "import torch\ndef f(): torch.distributed.barrier()"},
            "training/loop.py:2: training.loop uses torch.distributed",
        ),
        ({"training/loop.py": "from torch import distributed as d"}, "training.loop uses torch.distributed"),
        ({"training/loop.py": "import torch.distributed as d"}, "training.loop uses torch.distributed"),
        ({"training/loop.py": "def f():\n    import deepspeed"}, "training/loop.py:2: training.loop uses deepspeed"),
        ({"engine/deepspeed.py": "import deepspeed"}, "engine.deepspeed imports deepspeed when it is imported"),
        ({"runs/folder.py": "import yaml"}, "runs.folder uses yaml, which belongs to config"),
        ({"config/load.py": "import torch"}, "config.load -> torch: imported for --help"),
        (
            {"main.py": "import dtrain.commands.train", "commands/train.py": "import numpy"},
            "main -> commands.train -> numpy: imported",
        ),
        (
            {"__init__.py": "from dtrain.training.loop import fit", "training/loop.py": "import torch"},
            "dtrain -> training.loop -> torch: imported",
        ),
        (
            {"training/plan.py": "def f(config):\n    return config.engine.zero_stage == 3"},
            "training/plan.py:2: training.plan asks for zero_stage: only engine/ tells engines apart",
        ),
        (
            {"training/loop.py": "from dtrain.engine.ddp import DdpEngine"},
            "training/loop.py:1: training.loop imports dtrain.engine.ddp.DdpEngine, which belongs to one engine",
        ),
        (
            {"engine/build.py": "is_deepspeed = engine_name(config, context)[0] == 'deepspeed'"},
            "engine/build.py:1: engine.build compares with deepspeed: build.py has one `case` for it",
        ),
        (
            {"data/cache.py": "Json = dict", "engine/state.py": "class Json:\n    pass"},
            "Json: a type of this name is in data.cache and engine.state",
        ),
        ({"cluster/ssh.py": "import torch"}, "cluster.ssh -> torch: imported for --help"),
        ({"helpers.py": ""}, "helpers.py:1: helpers has no place in the order"),
        ({"utils/text.py": ""}, "utils/text.py:1: utils has no place in the order"),
        ({"logging.py": ""}, "logging.py: hides the library logging"),
        ({"yaml/__init__.py": ""}, "yaml: hides the library yaml"),
        ({"distutils.py": ""}, "distutils.py: hides the library distutils"),
        ({"training/loop.py": "x = 1\n" * 401}, "training.loop has 402 lines, more than 400"),
    ],
)
def test_each_breach_is_named(tmp_path: Path, files: dict[str, str], said: str) -> None:
    found = breaches(write_tree(tmp_path, files))

    assert any(said in text for text in found), found


def test_what_the_rules_allow_is_no_breach(tmp_path: Path) -> None:
    files = {
        "__init__.py": '__version__ = "0"\ndef fit():\n    from dtrain.commands.train import fit',
        "main.py": "import os\nfrom dtrain.commands import train\nos.environ",
        "commands/train.py": "def fit():\n    from dtrain.training.loop import fit\n    import torch",
        "training/loop.py": "import torch\nfrom dtrain import __version__\nfrom dtrain.engine.protocol import Engine",
        "engine/protocol.py": "import torch\nfrom dtrain.distributed.topology import Topology",
        "engine/deepspeed.py": "import torch.distributed\nimport dtrain.distributed.topology\ndef f():\n    import deepspeed",
        "distributed/topology.py": "import typing\nif typing.TYPE_CHECKING:\n    import torch\nimport dtrain.errors",
        "distributed/launcher_env.py": "from dtrain.errors import TopologyError",
        "config/raw_settings.py": "import yaml\nfrom dtrain.config.schema import Config",
        "models/load.py": "from dtrain.models.compatibility import check_fit\ndistributed = 1\nx = distributed",
        "models/compatibility.py": "import os\nos.path",
        "errors.py": "",
        "config/schema.py": "import pydantic",
    }

    assert breaches(write_tree(tmp_path, files)) == []
