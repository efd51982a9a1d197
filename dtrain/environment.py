"""Says which Python to use where the current one lacks a module that dtrain needs. Needs no module but Python's own."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The checkout, or the folder that dtrain is installed in."""

MODULES = {
    "torch": "torch",
    "transformers": "transformers",
    "datasets": "datasets",
    "deepspeed": "deepspeed",
    "mpi4py": "mpi4py",
    "yaml": "pyyaml",
    "pydantic": "pydantic",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "huggingface_hub": "huggingface-hub",
    "pyarrow": "pyarrow",
    "numpy": "numpy",
    "sklearn": "scikit-learn",
    "scipy": "scipy",
    "sacrebleu": "sacrebleu",
    "rouge_score": "rouge-score",
    "seqeval": "seqeval",
    "PIL": "pillow",
    "jinja2": "jinja2",
    "tqdm": "tqdm",
    "tensorboard": "tensorboard",
}
"""Module -> its package in pyproject.toml."""


def missing_module(error: BaseException) -> str | None:
    """Returns the message for a module of dtrain's dependencies that this Python lacks; None for any other error."""
    name = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else None
    if name not in MODULES:
        return None
    return f"{sys.executable or 'This Python'} has no module {name}, which dtrain needs.\n{_cure(MODULES[name], ROOT)}"


def _cure(package: str, root: Path) -> str:
    venv = root / ".venv"
    if not (root / "launch" / "quickstart").is_file():
        return f"Install it: {shlex.quote(sys.executable)} -m pip install {package}"
    activate = f"source {shlex.quote(str(venv / 'bin' / 'activate'))}"
    is_venv = Path(sys.prefix) == venv
    if (venv / "bin" / "python").exists() and not is_venv:
        return f"Use the environment of this checkout: {activate}"
    if is_venv or sys.prefix != sys.base_prefix:
        return f"Install it: {shlex.quote(sys.executable)} -m pip install -e {shlex.quote(str(root))}"
    return f"Create an environment (it also trains a small model): {shlex.quote(str(root / 'launch' / 'quickstart'))} && {activate}"


def end_own_program(error: ModuleNotFoundError) -> None:
    """Ends a program of dtrain with the message for a missing module. Returns in other programs, which get the error.

    Raises:
        SystemExit: with code 1, after the message on standard error.
    """
    message = missing_module(error)
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    # While `python -m dtrain.x` imports the package, the program has no file yet, and its name is -m.
    started = Path(sys.argv[0] if sys.argv else "").name
    is_own = started in ("-m", "dtrain") or (main is not None and Path(main).resolve().is_relative_to(ROOT / "dtrain"))
    if message is not None and is_own:
        sys.exit(f"error: {message}")
