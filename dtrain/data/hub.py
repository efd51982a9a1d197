"""Loads data sets from the Hugging Face hub: at one revision, with a time limit, and with offline instructions in errors.

The datasets and huggingface_hub libraries do the loading. Their long retries only help while the hub answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import datasets
import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from dtrain.errors import ConfigError, DataError
from dtrain.models.hub_offline import offline_instructions

REACH_TIMEOUT_S = 10.0
"""Time limit in seconds for the hub's first answer. The libraries themselves retry for 23 s for each file."""

# HTTPError of the HTTP library that this huggingface_hub uses (requests, httpx, ...); failed connections raise it too.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


def revision(name: str, config: str | None) -> str:
    """Returns the current version of the data set: its commit on the hub or, offline, the hash of the cached copy.

    Raises:
        DataError: the hub cannot be reached or has no such data set; or, offline, there is no cached copy.
    """
    if datasets.config.HF_HUB_OFFLINE:
        return _builder(name, config, None).hash or "cached"
    return _commit(name, config)


def load(name: str, config: str | None, splits: Mapping[str, str]) -> dict[str, datasets.Dataset]:
    """Returns the splits, memory-mapped from the library's cache, by our names.

    Args:
        splits: our split -> the hub's, which may be a slice such as "train[:10%]"; empty: all, by the hub's names.

    Raises:
        DataError: as for `revision`; or the configuration, a split or a file is missing or unreadable.
    """
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]  # public, but not in __all__
    commit = None if datasets.config.HF_HUB_OFFLINE else _commit(name, config)
    builder = _builder(name, config, commit)
    with _named_errors(name, config):
        builder.download_and_prepare()
        wanted = splits or {split: split for split in builder.info.splits or {}}
        loaded = {}
        for split, hub_split in wanted.items():
            rows = builder.as_dataset(split=hub_split)
            assert isinstance(rows, datasets.Dataset), "as_dataset returns one data set for one split"
            loaded[split] = rows
    return loaded


def _commit(name: str, config: str | None) -> str:
    _refuse_local(name)
    with _named_errors(name, config):
        info = huggingface_hub.HfApi().dataset_info(name, timeout=REACH_TIMEOUT_S)
    return info.sha or "main"


def _builder(name: str, config: str | None, commit: str | None) -> datasets.DatasetBuilder:
    _refuse_local(name)
    with _named_errors(name, config):
        return datasets.load_dataset_builder(name, config, revision=commit)


def _refuse_local(name: str) -> None:
    # load_dataset would read the folder and never contact the hub.
    if Path(name).exists():
        raise ConfigError(
            f"data.name={name} is a name on the hub, but there is a local folder or file {name}. To read it, set "
            f"data.path={name}"
        )


@contextmanager
def _named_errors(name: str, config: str | None) -> Iterator[None]:
    """Converts any error of the libraries into a DataError that names the data set."""
    dataset = f"the data set {name}" + (f" (configuration {config})" if config else "")
    where = huggingface_hub.constants.ENDPOINT
    try:
        yield
    except GatedRepoError:
        raise DataError(
            f"{dataset} at {where} is only available on request: accept its terms there, and set HF_TOKEN"
        ) from None
    except (RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError):
        raise DataError(
            f"There is no {dataset[4:]} at {where}, or it is private and HF_TOKEN is not set. "
            "Check data.name there; for a data set on this machine use data.path"
        ) from None
    except (OSError, _HTTP_ERROR, datasets.exceptions.DatasetsError) as error:
        state = (
            "is not in the cache, and HF_HUB_OFFLINE is set"
            if datasets.config.HF_HUB_OFFLINE
            else f"could not be downloaded from {where}"
        )
        raise DataError(f"{dataset} {state} ({_cause(error)}). {_offline_hint(name, config)}") from None
    except (ValueError, RuntimeError) as error:
        raise DataError(
            f"{dataset} could not be loaded: {_cause(error)}. data.config and data.splits select the part to load"
        ) from None


def _cause(error: BaseException) -> str:
    """Returns the message of the root cause in one line: what went wrong, and with which file."""
    text = str(error)
    while not text or isinstance(error, datasets.exceptions.DatasetGenerationError):
        following = error.__cause__ or error.__context__
        if following is None:
            break
        error, text = following, str(following)
    return " ".join(text.split())[:300].rstrip(". ") or type(error).__name__


def _offline_hint(name: str, config: str | None) -> str:
    part = f" data.config={config}" if config else ""
    is_set = datasets.config.HF_HUB_OFFLINE
    return offline_instructions("data.name", f"{name}{part}", is_set=is_set, folder_setting="data.path")
