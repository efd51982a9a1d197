"""The download command: a model or data set of the hub, for nodes without a network."""

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

OF_A_DOWNLOAD = Path(".cache") / "huggingface"
"""What huggingface_hub leaves in a folder that it has filled, to know what is there."""


def run_download(config: Config, context: RankContext) -> None:
    """Collective. One rank of each node fetches into the cache; rank 0 alone into `download.to`.

    Raises:
        ConfigError: nothing to fetch, a name that the hub does not have, a folder that is there already.
        DataError: the hub does not answer, or has no such data set.
    """
    wanted = _wanted(config)
    to = config.download.to
    if to is not None and len(wanted) > 1:
        names = " and ".join(wanted)
        raise ConfigError(f"download.to={to} takes one repository, but {names} are set: download one at a time.")
    if config.download.ignore and list(wanted) == ["data.name"]:
        raise ConfigError(f"download.ignore={list(config.download.ignore)} is for models: a data set is fetched whole.")

    def work() -> str:
        if to is not None and not context.is_main:
            return ""
        offline = [_fetch(setting, name, config) for setting, name in wanted.items()]
        cache = "" if to is not None else "HF_HUB_OFFLINE=1 "
        return f"To use it without a network: {cache}python dtrain/main.py {shlex.join(offline)}"

    log.info("%s", node_first(work, context))


def _wanted(config: Config) -> dict[str, str]:
    """Setting -> name, of everything that the config takes from the hub."""
    model, data = config.model, config.data
    found = {}
    if model.name_or_path is not None and not Path(model.name_or_path).is_dir():
        found["model.name_or_path"] = model.name_or_path
    is_name = model.tokenizer not in (None, *BUILT_TOKENIZERS, model.name_or_path) and not str(
        model.tokenizer
    ).endswith(".txt")
    if is_name and not Path(str(model.tokenizer)).is_dir():
        found["model.tokenizer"] = str(model.tokenizer)
    if data.name is not None and data.path is None and source_kind(data) == "hub":
        found["data.name"] = data.name
    if not found:
        raise ConfigError(
            "There is nothing to download: set model.name_or_path=NAME or data.name=NAME to a name on the hub "
            "(a folder here needs no download)."
        )
    return found


def _fetch(setting: str, name: str, config: Config) -> str:
    """Fetches it; gives the setting that finds it offline."""
    to = config.download.to
    if setting == "data.name":
        return _fetch_data(name, config)
    if to is not None and _refuse_taken(to, config, is_ours=(to / OF_A_DOWNLOAD).is_dir()):
        move_away(to)
    folder = download_model(name, to=to, ignore=config.download.ignore, setting=setting)
    log.info("%s: %d files in %s", name, sum(1 for file in folder.iterdir() if file.is_file()), folder)
    return f"{setting}={name if to is None else to}"


def _fetch_data(name: str, config: Config) -> str:
    """Every split. The data sets library reads its own cache and folders of its own offline, no copy of a repository."""
    to = config.download.to
    if to is not None:
        _refuse_taken(to, config, is_ours=False)
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


def _refuse_taken(to: Path, config: Config, *, is_ours: bool) -> bool:
    """Whether something is to be moved away first, as run.overwrite allows.

    Args:
        is_ours: an earlier download into it, which is gone on with.
    """
    if to.exists() and not to.is_dir():
        raise ConfigError(f"download.to={to} is a file: name a folder.")
    if is_ours or not to.exists() or not any(to.iterdir()):
        return False
    if not config.run.overwrite:
        raise ConfigError(
            f"download.to={to} is there already. Name another folder, or set run.overwrite=true to move it to "
            f"{to.name}.old-<time>."
        )
    return True
