"""Downloads a complete model repository from the hub, for machines without a network."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

# The HTTP library's own base error, as in hub_errors.py.
from huggingface_hub.errors import HTTPError as HttpError  # type: ignore[attr-defined]

from dtrain.errors import ConfigError, DataError
from dtrain.models.hub_errors import check_reachable


def download_model(name: str, *, to: Path | None, ignore: Sequence[str], setting: str) -> Path:
    """Downloads every file of the repository except those that match `ignore`. Returns the folder with the files.

    Args:
        to: folder for the files; None: the hub's cache. An interrupted download continues.
        ignore: patterns of file names, e.g. `*.bin`.
        setting: the setting that gave the name, for messages.

    Raises:
        ConfigError: there is no such repository, or a local folder has this name.
        DataError: the hub does not answer, or the connection breaks.
    """
    if Path(name).is_dir():
        raise ConfigError(f"{setting}={name} is already a local folder: there is nothing to download.")
    if check_reachable(name, file="config.json", setting=setting):
        raise DataError(
            f"{setting}={name} cannot be downloaded: {constants.ENDPOINT} does not answer, or HF_HUB_OFFLINE is set. "
            "Files that are already in the local cache are unchanged."
        )
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]  # public, but not in __all__
    try:
        folder = snapshot_download(name, local_dir=to, ignore_patterns=list(ignore) or None)
    except (HfHubHTTPError, HttpError, OSError) as error:
        raise DataError(
            f"{setting}={name} could not be downloaded completely from {constants.ENDPOINT}: "
            f"{' '.join(str(error).split())[:300]}. Run download again to continue."
        ) from error
    return Path(str(folder))
