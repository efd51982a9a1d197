"""The export command: copies a run's model to a folder, converts it to another dtype if set, and adds a model card."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dtrain.checkpoint import format
from dtrain.config import bounded_json
from dtrain.config.load import load_config
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.collectives import on_main
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import CheckpointError, ConfigError, DtrainError
from dtrain.models import adapters, merging
from dtrain.models.foreign_files import copy_command, leads_outside
from dtrain.runs.folder import move_away, replace_folder, write_json_atomic, write_text_atomic
from dtrain.training.build import verify_start
from dtrain.training.model_card import CARD, bare_card, trained_card

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot")
"""Suffixes of weight files. Only .safetensors files are exported; the others are left out."""


def run_export(config: Config, context: RankContext) -> None:
    """Collective. Writes the model to `export.to` on rank 0; the others wait.

    Raises:
        ConfigError: the model does not exist, the target does, or the dtype cannot hold the weights.
        CheckpointError: the weights are damaged, or the disk is full.
    """

    def write() -> str:
        source, target = _source(config), _target(config)
        draft = target.with_name(f".tmp-{target.name}")
        shutil.rmtree(draft, ignore_errors=True)  # Left by an export that did not finish.
        try:
            draft.mkdir(parents=True)
            dtype = None if config.export.dtype is None else DTYPES[config.export.dtype]
            if config.export.merge:
                with TemporaryDirectory(prefix=".tmp-merged-", dir=draft.parent) as folder:
                    _copy(_merge_adapters(source, Path(folder), config.model.lora_base), draft, dtype)
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
        return f"{source} exported to {target}" + (f"; the old folder is now {moved}" if moved else "")

    log.info("%s", on_main(write, context))


def _source(config: Config) -> Path:
    """Returns the folder of the model to export, after checking that it can be exported."""
    name = str(config.model.name_or_path)
    folder = Path(name)
    if not folder.is_dir():
        raise ConfigError(
            f"model.name_or_path={name} is not a local folder: export takes a run's model (<run>/model). To get a model "
            f"from the hub, run: download model.name_or_path={name} download.to=FOLDER"
        )
    if (folder / format.MANIFEST).is_file():
        verify_start(name)
        if not list(folder.glob(f"{format.MODEL}*.safetensors")):
            raise ConfigError(
                f"model.name_or_path={name} is a sharded checkpoint, whose weights are split into pieces. A run can start "
                "with it or resume from it; to export, use the run's model/."
            )
    if not any((folder / config_file).is_file() for config_file in ("config.json", adapters.CONFIG_FILE)):
        raise ConfigError(
            f"model.name_or_path={name} has no config.json: it is not a folder that from_pretrained loads."
        )
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model.name_or_path={name} has no *.safetensors file: export reads no other format.")
    return folder


def _target(config: Config) -> Path:
    """Returns the target folder, after checking that it may be written."""
    target = config.export.to
    if target is None:
        raise ConfigError("export.to is not set: set it to a folder, e.g. export.to=my-model.")
    source, resolved = Path(str(config.model.name_or_path)).resolve(), target.resolve()
    if resolved == source or resolved in source.parents or source in resolved.parents:
        raise ConfigError(
            f"export.to={target} overlaps model.name_or_path={config.model.name_or_path}: choose another."
        )
    if target.is_dir() and not any(target.iterdir()):
        return target
    if target.exists() and not target.is_dir():
        raise ConfigError(f"export.to={target} is a file: set it to a folder.")
    if target.exists() and not config.run.overwrite:
        raise ConfigError(
            f"export.to={target} exists already. Choose another folder, or set run.overwrite=true to rename it to "
            f"{target.name}.old-<time>."
        )
    return target


def _merge_adapters(source: Path, folder: Path, base: str | None) -> Path:
    """Merges adapters into their base model and writes it to `folder`, with the tokenizer. Returns `folder`."""
    merging.merge_folder(source, folder, base=base)
    for file in _model_files(source):
        target = folder / file.relative_to(source)
        if file.suffix not in WEIGHT_SUFFIXES and file.name != adapters.CONFIG_FILE and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return folder


def _copy(source: Path, draft: Path, dtype: torch.dtype | None) -> None:
    """Copies every file of the model. Converts the weights to `dtype`, unless it is None."""
    for file in _model_files(source):
        target = draft / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            _convert(file, target, dtype)
        elif file.suffix not in WEIGHT_SUFFIXES and file.relative_to(source) != Path(CARD):
            shutil.copyfile(file, target)
    if dtype is None:
        return
    for name in ("config.json", "model.safetensors.index.json"):
        if (draft / name).is_file():
            values = bounded_json.loads((draft / name).read_text(encoding="utf-8"))
            write_json_atomic(draft / name, _update_json(values, draft, dtype))


def _model_files(source: Path) -> Iterator[Path]:
    """Yields the files of the model. In a checkpoint, leaves out the optimizer and the state of the run."""
    if (source / format.MANIFEST).is_file():
        names = sorted(format.read_manifest(source)["files"])
        not_model = (format.STATE, format.CONFIG, f"{format.OPTIMIZER}.safetensors")
        yield from (source / n for n in names if n not in not_model and not n.startswith(f"{format.OPTIMIZER}-"))
        return
    for file in sorted(source.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(source).parts)
        if file.is_file() and not is_hidden:
            if file.suffix not in WEIGHT_SUFFIXES and leads_outside(file, source):
                raise ConfigError(
                    f"{file} is a link to {file.resolve()}, outside of the model's folder, which may be private: it is not "
                    f"exported. Remove the link, or replace it by a copy: {copy_command(file)}"
                )
            yield file


def _convert(file: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Writes one file of weights in `dtype`. Memory holds one original tensor at a time, and all converted ones."""
    if dtype is None:
        with safe_open(file, framework="pt") as opened:
            opened.keys()  # Reads the header, so that a damaged file is not copied.
        shutil.copyfile(file, target)
        return
    converted = {}
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - it is not a mapping
            value = opened.get_tensor(name)
            converted[name] = value.to(dtype) if value.is_floating_point() else value
            if not converted[name].isfinite().all() and value.isfinite().all():
                raise ConfigError(
                    f"export.dtype=fp16 cannot hold {name}, whose largest value is {value.abs().max():.3g}: use bf16."
                )
    save_file(converted, target, metadata={"format": "pt"})


def _update_json(values: Any, draft: Path, dtype: torch.dtype) -> Any:
    """Returns config.json with the new dtype, which from_pretrained reads, or the index with the new number of bytes."""
    if not isinstance(values, dict):
        return values
    updated = {key: _update_json(value, draft, dtype) for key, value in values.items()}
    for key in updated.keys() & {"dtype", "torch_dtype"}:
        updated[key] = str(dtype).removeprefix("torch.")
    if "total_size" in updated:
        updated["total_size"] = sum(_tensor_bytes(file) for file in draft.glob("*.safetensors"))
    return updated


def _tensor_bytes(file: Path) -> int:
    """Returns the bytes of all tensors in a file of weights."""
    with safe_open(file, framework="pt") as opened:
        return sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118 - it is not a mapping


def _write_card(source: Path, draft: Path, config: Config) -> None:
    """Writes the model card: from the run's results if there are any, else the model's existing card, else a minimal one."""
    # The metrics of a run are those at its end, not those of a checkpoint.
    is_checkpoint = (source / format.MANIFEST).is_file()
    text = None if is_checkpoint else _card_of_run(source.resolve().parent, draft)
    if text is None and (source / CARD).is_file():
        text = (source / CARD).read_text(encoding="utf-8")
    text = bare_card(str(config.export.to and config.export.to.name), draft) if text is None else text
    if config.export.dtype is not None:
        text = f"{text.rstrip()}\n\nThe weights are stored in {config.export.dtype}.\n"
    write_text_atomic(draft / CARD, text)


def _card_of_run(run: Path, draft: Path) -> str | None:
    """Returns a card made from the config.yaml and summary.json of a training run.

    None if `run` is not a training run, or one of another version.

    Args:
        draft: the exported model.
    """
    if not (run / "summary.json").is_file():  # opening a pipe of that name would wait forever
        return None
    try:
        summary = bounded_json.loads((run / "summary.json").read_text(encoding="utf-8"))
        if summary.get("command") != "train":
            return None
        settings = load_config(run / "config.yaml", [])
        return trained_card(settings, summary, task=str(summary.get("task", settings.task.name)), folder=draft)
    except (OSError, ValueError, KeyError, AttributeError, DtrainError):
        return None
