"""The export command: a run's model to a folder of its own, in another dtype if wanted, with a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dtrain.checkpoint import format
from dtrain.config.load import load_config
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.collectives import on_main
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import CheckpointError, ConfigError, DtrainError
from dtrain.models import adapters
from dtrain.runs.folder import move_away, replace_folder, write_json_atomic, write_text_atomic
from dtrain.training.build import check_whole
from dtrain.training.model_card import CARD, bare_card, trained_card

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot")
"""Suffixes of files that are not copied as they are: weights, of which only safetensors are read."""


def run_export(config: Config, context: RankContext) -> None:
    """Collective. Rank 0 writes `export.to`; the others wait.

    Raises:
        ConfigError: no such model, a target that is there already, or weights that the dtype cannot hold.
        CheckpointError: damaged weights, or a disk that is full.
    """

    def write() -> str:
        source, target = _source(config), _target(config)
        draft = target.with_name(f".tmp-{target.name}")
        shutil.rmtree(draft, ignore_errors=True)  # of an export that was cut short
        try:
            draft.mkdir(parents=True)
            dtype = None if config.export.dtype is None else DTYPES[config.export.dtype]
            if config.export.merge:
                with TemporaryDirectory(prefix=".tmp-load_merged-", dir=draft.parent) as place:
                    _copy(_merged(source, Path(place)), draft, dtype)
            else:
                _copy(source, draft, dtype)
            _write_card(source, draft, config)
            moved = move_away(target) if target.exists() else None
            replace_folder(draft, target)
        except SafetensorError as error:
            raise CheckpointError(f"{source}: a weights file is damaged ({error}). Copy it again.") from error
        except OSError as error:
            raise CheckpointError(f"The model cannot be written to {target}: {error}. Is the disk full?") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return f"{source} exported to {target}" + (f"; what was there is {moved} now" if moved else "")

    log.info("%s", on_main(write, context))


def _source(config: Config) -> Path:
    """The folder of the model to export."""
    name = str(config.model.name_or_path)
    folder = Path(name)
    if not folder.is_dir():
        raise ConfigError(
            f"model.name_or_path={name} is not a folder here: export takes a run's model (<run>/model). A model of the "
            f"hub is fetched by: download model.name_or_path={name} download.to=FOLDER"
        )
    if folder.name == "checkpoints":
        raise ConfigError(f"model.name_or_path={name} holds checkpoints: name one of them, or the run's model/.")
    if (folder / format.MANIFEST).is_file():
        check_whole(name)
        if not list(folder.glob(f"{format.MODEL}*.safetensors")):
            raise ConfigError(
                f"model.name_or_path={name} is a sharded checkpoint, whose weights lie in pieces. A run can begin with it or "
                "go on from it; what is exported is the run's model/."
            )
    if (folder / "model" / "config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(f"model.name_or_path={name} is a run folder: its model is {folder / 'model'}.")
    if not any((folder / config_file).is_file() for config_file in ("config.json", adapters.CONFIG_FILE)):
        raise ConfigError(
            f"model.name_or_path={name} has no config.json: it is not a folder that from_pretrained loads."
        )
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model.name_or_path={name} has no *.safetensors: export reads no other kind of weights.")
    return folder


def _target(config: Config) -> Path:
    """Where to; nothing is there that may not be replaced."""
    target = config.export.to
    if target is None:
        raise ConfigError("export.to is not set: say to which folder, e.g. export.to=my-model.")
    source, place = Path(str(config.model.name_or_path)).resolve(), target.resolve()
    if place == source or place in source.parents or source in place.parents:
        raise ConfigError(f"export.to={target} overlaps model.name_or_path={config.model.name_or_path}: name another.")
    if target.is_dir() and not any(target.iterdir()):
        return target
    if target.exists() and not target.is_dir():
        raise ConfigError(f"export.to={target} is a file: name a folder.")
    if target.exists() and not config.run.overwrite:
        raise ConfigError(
            f"export.to={target} is there already. Name another folder, or set run.overwrite=true to move it to "
            f"{target.name}.old-<time>."
        )
    return target


def _merged(source: Path, place: Path) -> Path:
    """The plain model of a folder of adapters, with its tokenizer, in `place`."""
    adapters.load_merged(source).save_pretrained(str(place))
    for file in _files(source):
        target = place / file.relative_to(source)
        if file.suffix not in WEIGHTS and file.name != adapters.CONFIG_FILE and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return place


def _copy(source: Path, draft: Path, dtype: torch.dtype | None) -> None:
    """Every file of the model; weights in `dtype`, None: as they are."""
    for file in _files(source):
        place = draft / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            _convert(file, place, dtype)
        elif file.suffix not in WEIGHTS and file.relative_to(source) != Path(CARD):
            shutil.copyfile(file, place)
    if dtype is None:
        return
    for name in ("config.json", "model.safetensors.index.json"):
        if (draft / name).is_file():
            values = json.loads((draft / name).read_text(encoding="utf-8"))
            write_json_atomic(draft / name, _told(values, draft, dtype))


def _files(source: Path) -> Iterator[Path]:
    """What belongs to the model; of a checkpoint, neither the optimizer nor the state of the run."""
    if (source / format.MANIFEST).is_file():
        names = sorted(format.read_manifest(source)["files"])
        not_model = (format.STATE, format.CONFIG, f"{format.OPTIMIZER}.safetensors")
        yield from (source / n for n in names if n not in not_model and not n.startswith(f"{format.OPTIMIZER}-"))
        return
    for file in sorted(source.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(source).parts)
        if file.is_file() and not hidden:
            yield file


def _convert(file: Path, place: Path, dtype: torch.dtype | None) -> None:
    """One file of weights, one tensor at a time in memory beside the converted ones."""
    if dtype is None:
        with safe_open(file, framework="pt") as opened:
            opened.keys()  # reads the header: a damaged file is not passed on
        shutil.copyfile(file, place)
        return
    converted = {}
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - it is no mapping
            value = opened.get_tensor(name)
            converted[name] = value.to(dtype) if value.is_floating_point() else value
            if not converted[name].isfinite().all() and value.isfinite().all():
                raise ConfigError(
                    f"export.dtype=fp16 cannot hold {name}, whose largest value is {value.abs().max():.3g}: use bf16."
                )
    save_file(converted, place, metadata={"format": "pt"})


def _told(values: Any, draft: Path, dtype: torch.dtype) -> Any:
    """config.json with the new dtype, which from_pretrained goes by; an index with the new number of bytes."""
    if not isinstance(values, dict):
        return values
    told = {key: _told(value, draft, dtype) for key, value in values.items()}
    for key in told.keys() & {"dtype", "torch_dtype"}:
        told[key] = str(dtype).removeprefix("torch.")
    if "total_size" in told:
        told["total_size"] = sum(_bytes(file) for file in draft.glob("*.safetensors"))
    return told


def _bytes(file: Path) -> int:
    """Of the tensors in a file of weights."""
    with safe_open(file, framework="pt") as opened:
        return sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118 - it is no mapping


def _write_card(source: Path, draft: Path, config: Config) -> None:
    """The run's card, written anew from what the run left; else the one that is there; else what config.json tells."""
    is_checkpoint = (source / format.MANIFEST).is_file()  # whose metrics are not those of the run's end
    text = None if is_checkpoint else _card_of_run(source.resolve().parent, draft)
    if text is None and (source / CARD).is_file():
        text = (source / CARD).read_text(encoding="utf-8")
    text = bare_card(str(config.export.to and config.export.to.name), draft) if text is None else text
    if config.export.dtype is not None:
        text = f"{text.rstrip()}\n\nThe weights are stored in {config.export.dtype}.\n"
    write_text_atomic(draft / CARD, text)


def _card_of_run(run: Path, draft: Path) -> str | None:
    """From config.yaml and summary.json of a training run; None where it is none, or one of another version.

    draft: what is exported.
    """
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        if summary.get("command") != "train":
            return None
        settings = load_config(run / "config.yaml", [])
        return trained_card(settings, summary, task=str(summary.get("task", settings.task.name)), folder=draft)
    except (OSError, ValueError, KeyError, AttributeError, DtrainError):
        return None
