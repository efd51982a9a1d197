"""A function that a setting names as `package.module:function`."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtrain.errors import ConfigError

NAME = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
"""What such a setting looks like."""


def import_function(spec: str, *, folder: Path, setting: str) -> Callable[..., Any]:
    """The function; its module is looked for in `folder` first, then where Python looks.

    Changes `sys.path` while the module is imported only, so that nothing in that folder hides a library later on.

    Args:
        spec: `package.module:function`.
        folder: of the config file.
        setting: the setting that gave it, for messages.

    Raises:
        ConfigError: no such module or function, or the module fails when it is imported.
    """
    named = NAME.fullmatch(spec)
    if named is None:
        raise ConfigError(f"{setting}={spec} names no function: write package.module:function.")
    name, function = named.groups()
    place = str(folder.resolve())
    sys.path.insert(0, place)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        is_itself = error.name is not None and f"{name}.".startswith(f"{error.name}.")
        what = f"there is no module {error.name}" if is_itself else f"it imports {error.name}, which is not installed"
        raise ConfigError(
            f"{setting}={spec} cannot be imported: {what} (looked in {place}, the config file's folder, then where "
            "Python looks)."
        ) from error
    except Exception as error:
        raise ConfigError(f"{setting}={spec} cannot be imported: {described(error, name)}") from error
    finally:
        sys.path.remove(place)
    found = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"{setting}={spec}: {module.__file__ or name} has no function {function}.")
    wanted: Callable[..., Any] = found
    return wanted


def described(error: BaseException, module: str) -> str:
    """`ValueError: bad value (my_metrics.py, line 12)`: the error, and the last line of the user's own code in it."""
    file = getattr(sys.modules.get(module), "__file__", None)
    where, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        own = code.co_filename == file if file else trace.tb_frame.f_globals.get("__name__") == module
        if own:
            where = f" ({Path(code.co_filename).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}{where}"
