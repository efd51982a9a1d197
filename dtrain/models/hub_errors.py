"""Where a model's files come from: a folder, or a hub that answers in bounded time or is named as unreachable.

Which error is which, for a name that a setting gives:

- ConfigError (exit 2): the setting names something that cannot be used: no such folder or repository, no config.json,
  no weights, an unknown architecture, code that the user has not allowed.
- DataError (exit 3): the name may be right, but the hub did not answer, and the file is not in the local cache.
- CheckpointError (exit 6): the files are there and damaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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

# The HTTP library's own base error; which library that is differs between versions of huggingface_hub.
from huggingface_hub.errors import HTTPError as HttpError  # type: ignore[attr-defined]
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from dtrain.console import log
from dtrain.errors import CheckpointError, ConfigError, DataError, DtrainError
from dtrain.models.hub_offline import without_network

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


def reach(name: str, *, file: str, setting: str) -> bool:
    """Makes sure that a name can be loaded at all, before transformers tries it file by file with minutes of retries.

    Args:
        name: a folder or a name on the hub.
        file: the file that tells whether the hub answers and the name is there, e.g. config.json.
        setting: the setting that gave the name, for the message.

    Returns:
        Whether to load from local files only: the hub does not answer, but has been downloaded from before.

    Raises:
        ConfigError: no such folder, or no such repository.
        DataError: the hub did not answer within HUB_TIMEOUT_S and its file is not in the cache.
    """
    if Path(name).is_dir():
        return True
    if Path(name).exists():
        raise ConfigError(
            f"{setting}={name} is a file. Give the folder that from_pretrained loads, or a name on the hub."
        )
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name:
        raise ConfigError(f"{setting}={name}: there is no such folder (seen from {Path.cwd()}).")
    cached = isinstance(_cached(name, file, setting), str)
    try:
        get_hf_file_metadata(hf_hub_url(name, file), timeout=HUB_TIMEOUT_S)
    except RemoteEntryNotFoundError:
        return False  # The hub answers and the name is there; whether the file is needed, transformers knows.
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{setting}={name} is neither a folder here ({Path.cwd()}) nor a repository that {constants.ENDPOINT} "
            "shows you. Check the spelling; a private or gated one needs `hf auth login`."
        ) from error
    except (HttpError, OSError) as error:
        if not cached:
            raise unreachable(name, file=file, setting=setting, why=_first_line(error)) from error
        if not isinstance(error, OfflineModeIsEnabled):
            log.info(
                "%s does not answer (%s): %s is taken from the local cache",
                constants.ENDPOINT,
                _first_line(error),
                name,
            )
        return True
    return False


def is_here(name: str, file: str) -> bool:
    """Whether a file of a folder, or of a hub's repository that has been loaded, is on this machine."""
    return (Path(name) / file).is_file() if Path(name).is_dir() else isinstance(try_to_load_from_cache(name, file), str)


def _cached(name: str, file: str, setting: str) -> object:
    try:
        return try_to_load_from_cache(name, file)
    except HFValidationError as error:
        raise ConfigError(
            f"{setting}={name} is neither a folder nor a name that the hub could have: {error}"
        ) from error


def unreachable(name: str, *, file: str, setting: str, why: str) -> DataError:
    """The error for a hub that does not answer: the file it was asked for, and how to do without it."""
    return DataError(
        f"{setting}={name}: could not get {name}/{file} from {constants.ENDPOINT} ({why}), and it is not in the local "
        f"cache {constants.HF_HUB_CACHE}. {without_network(setting, name, is_set=constants.HF_HUB_OFFLINE)}."
    )


def explain(error: BaseException, *, name: str, setting: str) -> DtrainError:
    """Says in a user's words what transformers found wrong with a folder or a name.

    Args:
        error: one of LOADING_ERRORS.
        name: the folder or name that was being loaded.
        setting: the setting that gave it.
    """
    text = str(error)
    if "trust_remote_code" in text:
        return ConfigError(
            f"{setting}={name} comes with Python code of its own, which has to run to load it. Read that code, and if "
            "you trust its author set model.trust_remote_code=true."
        )
    if isinstance(error, SafetensorError) or "is not a valid JSON" in text:
        return CheckpointError(
            f"{setting}={name}: a file in it is damaged ({_first_line(error)}). Copy or download it again."
        )
    if isinstance(error.__cause__, (LocalEntryNotFoundError, HfHubHTTPError)):
        return unreachable(name, file="(weights or tokenizer)", setting=setting, why=_first_line(error.__cause__))
    return ConfigError(f"{setting}={name} cannot be loaded: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    """The first line of an error that says something, cut where transformers goes on to list every class it has."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or [type(error).__name__])[0]
    return line if len(line) <= 300 else line[:300] + " ..."


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from printing load reports and progress bars; dtrain says in one line what matters."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
