"""A whole repository of the hub on this machine, for where there is no network."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

# The HTTP library's own base error, as in source.py.
from huggingface_hub.errors import HTTPError as HttpError  # type: ignore[attr-defined]

from dtrain.errors import ConfigError, DataError
from dtrain.models.hub_errors import reach


def fetch_model(name: str, *, to: Path | None, ignore: Sequence[str], setting: str) -> Path:
    """Every file of the repository but those that a pattern of `ignore` matches; gives the folder they are in.

    Args:
        to: folder for the files; None: the hub's cache. What an earlier call left there is gone on with.
        ignore: patterns of file names, e.g. `*.bin`.
        setting: the setting that gave the name, for messages.

    Raises:
        ConfigError: no such repository, or a folder of that name.
        DataError: the hub does not answer, or stops to.
    """
    if Path(name).is_dir():
        raise ConfigError(f"{setting}={name} is a folder here already: there is nothing to download.")
    if reach(name, file="config.json", setting=setting):
        raise DataError(
            f"{setting}={name} cannot be downloaded: {constants.ENDPOINT} does not answer, or HF_HUB_OFFLINE is set. "
            "What the local cache holds of it stays as it is."
        )
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]  # public, but not in __all__
    try:
        found = snapshot_download(name, local_dir=to, ignore_patterns=list(ignore) or None)
    except (HfHubHTTPError, HttpError, OSError) as error:
        raise DataError(
            f"{setting}={name} could not be downloaded whole from {constants.ENDPOINT}: "
            f"{' '.join(str(error).split())[:300]}. Call download again to go on with what is there."
        ) from error
    return Path(str(found))
