"""Checks weights in PyTorch's own format (pytorch_model.bin), which is a pickle: a program that may do anything when it runs.

transformers reads such a file with `weights_only`, so that its code does not run. But the errors are raised by many
libraries, and none names the file.
"""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path

import torch

from dtrain.errors import CheckpointError

PICKLE_ERRORS = (pickle.UnpicklingError, EOFError, AttributeError, IndexError, UnicodeDecodeError)
"""What reading a damaged or foreign pickle raises, besides hub_errors.LOADING_ERRORS."""


def damaged_pickle(name: str) -> CheckpointError | None:
    """Returns the error for the first .bin file of a folder that holds something else than weights; None without one."""
    for file in sorted(Path(name).glob("*model*.bin")) if Path(name).is_dir() else []:
        if (problem := _problem(file)) is not None:
            return CheckpointError(f"model.name_or_path={name}: {file.name} {problem}")
    return None


def _problem(file: Path) -> str | None:
    again = "Copy or download it again."
    if file.stat().st_size == 0:
        return f"is empty. {again}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        # torch names the function that the pickle would call, e.g. "Unsupported global: GLOBAL posix.system".
        code = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)|Unsupported class ([\w.]+)", text)
        if code is None:
            return f"is damaged or no file of weights. {again}"
        called = next(part for part in code.groups() if part)
        return (
            f"would run code ({called}) when it is loaded, so it was not. Weights need none: take a model.safetensors from a "
            "source that you trust instead."
        )
    except (*PICKLE_ERRORS, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        return f"is damaged ({type(error).__name__}). {again}"
    if not isinstance(content, dict) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        return "holds no weights. Save a model's state_dict there, or use model.safetensors."
    return None
