"""Checks that a model's folder or hub repository can be reached, and turns loading errors into errors of ours.

A name that a setting gives can raise:

- ConfigError (exit 2): the setting names something that cannot be used: no such folder or repository, no config.json,
  no weights, an unknown architecture, code that the user has not allowed.
- DataError (exit 3): the name may be right, but the hub did not answer, and the file is not in the local cache.
- CheckpointError (exit 6): the files are present but damaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)

# The HTTP library's own base error. The library depends on the version of huggingface_hub.
from huggingface_hub.errors import HTTPError as HttpError  # type: ignore[attr-defined]
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from dtrain.config import bounded_json
from dtrain.config.near_folder import did_you_mean
from dtrain.console import log
from dtrain.errors import CheckpointError, ConfigError, DataError, DtrainError
from dtrain.models.hub_offline import offline_instructions

HUB_TIMEOUT_S = 10.0

LOADING_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    ImportError,
    StrictDataclassError,
    SafetensorError,
)
"""What transformers raises for a name, folder, file or value that it cannot use."""


def check_reachable(name: str, *, file: str, setting: str) -> bool:
    """Checks quickly that a name can be loaded. transformers itself would retry for minutes, file by file.

    Args:
        name: a folder or a name on the hub.
        file: the file to request from the hub, e.g. config.json.
        setting: the setting that gave the name, for messages.

    Returns:
        Whether to load from local files only: a folder, or a cached repository while the hub does not answer.

    Raises:
        ConfigError: there is no such folder or repository.
        DataError: the hub did not answer within HUB_TIMEOUT_S and the file is not in the cache.
    """
    if Path(name).is_dir():
        return True
    if Path(name).exists():
        raise ConfigError(
            f"{setting}={name} is a file. Give the folder that from_pretrained loads, or a name on the hub."
        )
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name:
        raise ConfigError(f"{setting}={name}: there is no such folder (relative to {Path.cwd()}).{did_you_mean(name)}")
    is_cached = isinstance(_cached(name, file, setting), str)
    try:
        get_hf_file_metadata(hf_hub_url(name, file), timeout=HUB_TIMEOUT_S)
    except RemoteEntryNotFoundError:
        return False  # The repository exists; transformers decides whether it needs the file.
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{setting}={name} is neither a local folder (in {Path.cwd()}) nor a repository that you can see on "
            f"{constants.ENDPOINT}.{did_you_mean(name)} Check the spelling; a private or gated one needs `hf auth login`."
        ) from error
    except (HttpError, OSError) as error:
        if not is_cached:
            raise unreachable_error(name, file=file, setting=setting, reason=_first_line(error)) from error
        if not isinstance(error, OfflineModeIsEnabled):
            log.info(
                "%s does not answer (%s): loading %s from the local cache",
                constants.ENDPOINT,
                _first_line(error),
                name,
            )
        return True
    return False


def is_local(name: str, file: str) -> bool:
    """Returns whether a file is on this machine, in a folder or in the cache of the hub."""
    return (Path(name) / file).is_file() if Path(name).is_dir() else isinstance(try_to_load_from_cache(name, file), str)


def _cached(name: str, file: str, setting: str) -> object:
    try:
        return try_to_load_from_cache(name, file)
    except HFValidationError as error:
        raise ConfigError(f"{setting}={name} is neither a folder nor a valid name on the hub: {error}") from error


def unreachable_error(name: str, *, file: str, setting: str, reason: str) -> DataError:
    """Returns the error for a hub that does not answer: which file was requested, and how to work without the hub."""
    if near := did_you_mean(name):
        return DataError(
            f"{setting}={name}: there is no such folder (relative to {Path.cwd()}).{near} If it is a name on the hub: "
            f"{constants.ENDPOINT} did not answer ({reason})."
        )
    return DataError(
        f"{setting}={name}: could not get {name}/{file} from {constants.ENDPOINT} ({reason}), and it is not in the local "
        f"cache {constants.HF_HUB_CACHE}. {offline_instructions(setting, name, is_set=constants.HF_HUB_OFFLINE)}."
    )


def explain(error: BaseException, *, name: str, setting: str) -> DtrainError:
    """Converts a loading error of transformers into one that names the setting and the fix.

    Args:
        error: one of LOADING_ERRORS.
        name: the folder or name that was being loaded.
        setting: the setting that gave it.
    """
    text = str(error)
    if "trust_remote_code" in text:
        return ConfigError(
            f"{setting}={name} contains Python code that has to run to load it. Read the code, and if you trust its "
            "author set model.trust_remote_code=true."
        )
    if isinstance(error, ValueError | RecursionError) and (damage := _damaged_json(Path(name))) is not None:
        return CheckpointError(f"{setting}={name}: {damage}. Copy or download it again.")
    if isinstance(error, SafetensorError | UnpicklingError | EOFError) or "is not a valid JSON" in text:
        return CheckpointError(
            f"{setting}={name}: a file in it is damaged ({_first_line(error)}). Copy or download it again."
        )
    if isinstance(error.__cause__, (LocalEntryNotFoundError, HfHubHTTPError)):
        cause = _first_line(error.__cause__)
        return unreachable_error(name, file="(weights or tokenizer)", setting=setting, reason=cause)
    return ConfigError(f"{setting}={name} cannot be loaded: {_first_line(error)}")


def _damaged_json(folder: Path) -> str | None:
    """Returns which JSON file of a model folder cannot be read, and why; None if all can."""
    for file in sorted(folder.glob("*.json")):
        try:
            bounded_json.loads(file.read_bytes())
        except ValueError as error:
            return f"{file.name} is damaged ({error})"
        except OSError:
            continue
    return None


def _first_line(error: BaseException) -> str:
    """Returns the first informative line of an error, without the list of all classes that transformers may append."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or [type(error).__name__])[0]
    return line if len(line) <= 300 else line[:300] + " ..."


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the load reports and progress bars of transformers; dtrain logs the important part in one line."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
