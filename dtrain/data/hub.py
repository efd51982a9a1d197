"""Data sets of the Hugging Face hub: found in bounded time, pinned to one revision, every failure with the offline way.

The datasets and huggingface_hub libraries do the work; their retries with growing pauses are for a hub that answers.
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
"""Time for the hub's first answer. The libraries themselves retry for 23 s, and that for each file."""

# HTTPError of the HTTP library that this huggingface_hub uses (requests, httpx, ...); failed connections raise it too.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


def revision(name: str, config: str | None) -> str:
    """What the data set is now: its commit on the hub or, offline, the hash of the cached copy.

    Raises:
        DataError: the hub cannot be reached, has no such data set, or, offline, there is no cached copy.
    """
    if datasets.config.HF_HUB_OFFLINE:
        return _builder(name, config, None).hash or "cached"
    return _commit(name, config)


def load(name: str, config: str | None, splits: Mapping[str, str]) -> dict[str, datasets.Dataset]:
    """The splits, mapped from the library's cache, by our name for each.

    Args:
        splits: our split -> the hub's, which may be a slice such as "train[:10%]"; empty: all, by the hub's names.

    Raises:
        DataError: as for `revision`; or the configuration, a split or a file is not there or cannot be read.
    """
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]  # public, but not in __all__
    commit = None if datasets.config.HF_HUB_OFFLINE else _commit(name, config)
    builder = _builder(name, config, commit)
    with _failures_named(name, config):
        builder.download_and_prepare()
        wanted = splits or {split: split for split in builder.info.splits or {}}
        loaded = {}
        for ours, theirs in wanted.items():
            part = builder.as_dataset(split=theirs)
            assert isinstance(part, datasets.Dataset), "as_dataset gives one data set for one split"
            loaded[ours] = part
    return loaded


def _commit(name: str, config: str | None) -> str:
    _refuse_local(name)
    with _failures_named(name, config):
        found = huggingface_hub.HfApi().dataset_info(name, timeout=REACH_TIMEOUT_S)
    return found.sha or "main"


def _builder(name: str, config: str | None, commit: str | None) -> datasets.DatasetBuilder:
    _refuse_local(name)
    with _failures_named(name, config):
        return datasets.load_dataset_builder(name, config, revision=commit)


def _refuse_local(name: str) -> None:
    # load_dataset would read the folder and never ask the hub.
    if Path(name).exists():
        raise ConfigError(
            f"data.name={name} is a name on the hub, but there is a folder or file {name} here. To read it, say "
            f"data.path={name}"
        )


@contextmanager
def _failures_named(name: str, config: str | None) -> Iterator[None]:
    """Any failure of the libraries as a DataError that names what was wanted."""
    wanted = f"the data set {name}" + (f" (configuration {config})" if config else "")
    where = huggingface_hub.constants.ENDPOINT
    try:
        yield
    except GatedRepoError:
        raise DataError(
            f"{wanted} at {where} is given only to those who asked for it: accept its terms there, and set HF_TOKEN"
        ) from None
    except (RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError):
        raise DataError(
            f"There is no {wanted[4:]} at {where}, or it is private and HF_TOKEN is not set. "
            "Look data.name up there; a data set on this machine is data.path instead"
        ) from None
    except (OSError, _HTTP_ERROR, datasets.exceptions.DatasetsError) as error:
        state = (
            "is not in the cache, and HF_HUB_OFFLINE is set"
            if datasets.config.HF_HUB_OFFLINE
            else f"could not be had from {where}"
        )
        raise DataError(f"{wanted} {state} ({_cause(error)}). {_offline_way(name, config)}") from None
    except (ValueError, RuntimeError) as error:
        raise DataError(
            f"{wanted} could not be loaded: {_cause(error)}. data.config and data.splits say which part is wanted"
        ) from None


def _cause(error: BaseException) -> str:
    """First line of the error at the root: what went wrong, and with which file."""
    text = str(error)
    while not text or isinstance(error, datasets.exceptions.DatasetGenerationError):
        following = error.__cause__ or error.__context__
        if following is None:
            break
        error, text = following, str(following)
    return " ".join(text.split())[:300].rstrip(". ") or type(error).__name__


def _offline_way(name: str, config: str | None) -> str:
    part = f" data.config={config}" if config else ""
    is_set = datasets.config.HF_HUB_OFFLINE
    return offline_instructions("data.name", f"{name}{part}", is_set=is_set, folder_setting="data.path")
