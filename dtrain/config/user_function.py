"""Imports a user's function that a setting names as `package.module:function`."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtrain.errors import ConfigError

NAME = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
"""The form of such a setting."""


def import_function(spec: str, *, folder: Path, setting: str) -> Callable[..., Any]:
    """Returns the function. Its module is searched in `folder` first, then on Python's search path.

    Changes `sys.path` only during the import, so that no file in `folder` hides a library later.

    Args:
        spec: `package.module:function`.
        folder: the config file's folder.
        setting: the setting that holds `spec`, for error messages.

    Raises:
        ConfigError: no such module or function, or the import fails.
    """
    match = NAME.fullmatch(spec)
    if match is None:
        raise ConfigError(f"{setting}={spec} is not the name of a function: write package.module:function.")
    module_name, function_name = match.groups()
    search_folder = str(folder.resolve())
    sys.path.insert(0, search_folder)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        is_this_module = error.name is not None and f"{module_name}.".startswith(f"{error.name}.")
        cause = (
            f"there is no module {error.name}" if is_this_module else f"it imports {error.name}, which is not installed"
        )
        raise ConfigError(
            f"{setting}={spec} cannot be imported: {cause} (searched {search_folder}, the config file's folder, and "
            "then Python's search path)."
        ) from error
    except Exception as error:
        raise ConfigError(f"{setting}={spec} cannot be imported: {describe_error(error, module_name)}") from error
    finally:
        sys.path.remove(search_folder)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"{setting}={spec}: {module.__file__ or module_name} has no function {function_name}.")
    user_function: Callable[..., Any] = function
    return user_function


def describe_error(error: BaseException, module: str) -> str:
    """Returns the error and its last line in the user's module: `ValueError: bad value (my_metrics.py, line 12)`."""
    file = getattr(sys.modules.get(module), "__file__", None)
    location, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        is_user_code = code.co_filename == file if file else trace.tb_frame.f_globals.get("__name__") == module
        if is_user_code:
            location = f" ({Path(code.co_filename).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}{location}"
