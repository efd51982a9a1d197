"""The download command: fetches a model or data set from the hub, for nodes without internet access."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import datasets

from dtrain.config.model import BUILT_TOKENIZERS
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.data import hub
from dtrain.data.resolve_source import source_kind
from dtrain.data.split_readers import hub_name
from dtrain.distributed.collectives import node_first
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError, DataError
from dtrain.models.hub_download import download_model
from dtrain.runs.folder import move_away, replace_folder

DOWNLOAD_MARKER = Path(".cache") / "huggingface"
"""The folder in which huggingface_hub records what it has downloaded."""


def run_download(config: Config, context: RankContext) -> None:
    """Collective. Downloads on one rank of each node into the cache, or on rank 0 alone into `download.to`.

    Raises:
        ConfigError: nothing to download, a name that is not on the hub, or a target folder that already exists.
        DataError: the hub does not answer, or has no such data set.
    """
    repositories = _repositories(config)
    to = config.download.to
    if to is not None and len(repositories) > 1:
        names = " and ".join(repositories)
        raise ConfigError(f"download.to={to} takes one repository, but {names} are set: download one at a time.")
    if config.download.ignore and list(repositories) == ["data.name"]:
        raise ConfigError(
            f"download.ignore={list(config.download.ignore)} works only with models: data sets are downloaded completely."
        )

    def fetch_all() -> str:
        if to is not None and not context.is_main:
            return ""
        offline = [_fetch(setting, name, config) for setting, name in repositories.items()]
        cache = "" if to is not None else "HF_HUB_OFFLINE=1 "
        return f"To use it offline: {cache}python dtrain/main.py {shlex.join(offline)}"

    log.info("%s", node_first(fetch_all, context))


def _repositories(config: Config) -> dict[str, str]:
    """Returns setting and name of everything that the config takes from the hub."""
    model, data = config.model, config.data
    repositories = {}
    if model.name_or_path is not None and not Path(model.name_or_path).is_dir():
        repositories["model.name_or_path"] = model.name_or_path
    is_name = model.tokenizer not in (None, *BUILT_TOKENIZERS, model.name_or_path) and not str(
        model.tokenizer
    ).endswith(".txt")
    if is_name and not Path(str(model.tokenizer)).is_dir():
        repositories["model.tokenizer"] = str(model.tokenizer)
    if data.name is not None and data.path is None and source_kind(data) == "hub":
        repositories["data.name"] = data.name
    if not repositories:
        raise ConfigError(
            "There is nothing to download: set model.name_or_path=NAME or data.name=NAME to a name on the hub "
            "(a local folder needs no download)."
        )
    return repositories


def _fetch(setting: str, name: str, config: Config) -> str:
    """Downloads a repository and returns the setting that uses it offline."""
    to = config.download.to
    if setting == "data.name":
        return _fetch_data(name, config)
    if to is not None and _must_move_away(to, config, is_download=(to / DOWNLOAD_MARKER).is_dir()):
        move_away(to)
    folder = download_model(name, to=to, ignore=config.download.ignore, setting=setting)
    log.info("%s: %d files in %s", name, sum(1 for file in folder.iterdir() if file.is_file()), folder)
    return f"{setting}={name if to is None else to}"


def _fetch_data(name: str, config: Config) -> str:
    """Downloads every split and returns the setting that uses it offline.

    Offline, the datasets library reads its cache and folders it has saved, but not a copy of the hub's repository.
    """
    to = config.download.to
    if to is not None:
        _must_move_away(to, config, is_download=False)
    splits = hub.load(*hub_name(config.data), {})
    rows = ", ".join(f"{split} {len(part)}" for split, part in splits.items())
    if to is None:
        log.info("%s: %s rows, in %s", name, rows, datasets.config.HF_DATASETS_CACHE)
        return f"data.name={name}" + (f" data.config={config.data.config}" if config.data.config else "")
    draft = to.with_name(f".tmp-{to.name}")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.parent.mkdir(parents=True, exist_ok=True)
        datasets.DatasetDict(dict(splits)).save_to_disk(str(draft))
        if to.exists() and any(to.iterdir()):
            move_away(to)
        replace_folder(draft, to)
    except OSError as error:
        raise DataError(f"The data set cannot be written to {to}: {error}. Is the disk full?") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    log.info("%s: %s rows, in %s", name, rows, to)
    return f"data.path={to}"


def _must_move_away(to: Path, config: Config, *, is_download: bool) -> bool:
    """Returns whether the existing content of `to` must be moved away first.

    Args:
        to: the target folder.
        config: its run.overwrite allows moving.
        is_download: `to` holds an earlier download, which continues.

    Raises:
        ConfigError: `to` is a file, or has other content and run.overwrite is not set.
    """
    if to.exists() and not to.is_dir():
        raise ConfigError(f"download.to={to} is a file: set it to a folder.")
    if is_download or not to.exists() or not any(to.iterdir()):
        return False
    if not config.run.overwrite:
        raise ConfigError(
            f"download.to={to} already exists. Choose another folder, or set run.overwrite=true to move it to "
            f"{to.name}.old-<time>."
        )
    return True
