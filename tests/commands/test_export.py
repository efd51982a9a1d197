"""The export command: what it copies, converts and refuses. test_export_launched.py loads the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from dtrain.commands.export import run_export
from dtrain.config.load import load_config
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import CheckpointError, ConfigError

WEIGHTS = {"layer.weight": torch.arange(6.0).reshape(2, 3) / 7, "layer.count": torch.tensor([1, 2])}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "model"
    (folder / "parts").mkdir(parents=True)
    save_file(WEIGHTS, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "bert", "architectures": ["BertModel"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "parts/more.json", ".hidden", "pytorch_model.bin", "training_args.pt"):
        (folder / name).write_text("{}")
    return folder


def export(model: Path, to: Path | None, *more: str) -> None:
    target = [] if to is None else [f"export.to={to}"]
    run_export(load_config(None, [f"model.name_or_path={model}", *target, *more], command="export"), ONE_PROCESS)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_is_copied_with_a_card_but_without_other_weight_formats(tmp_path: Path, model: Path) -> None:
    before = content(model)

    export(model, tmp_path / "out" / "mine")

    found = content(tmp_path / "out" / "mine")
    assert set(found) == {"config.json", "model.safetensors", "tokenizer.json", "parts/more.json", "README.md"}
    assert {name: found[name] for name in found if name != "README.md"} == {
        name: before[name] for name in found if name != "README.md"
    }
    assert content(model) == before
    assert ModelCard.load(tmp_path / "out" / "mine" / "README.md").data.to_dict()["library_name"] == "transformers"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"], "no draft is left"


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_weights_get_another_dtype_and_the_config_names_it(
    tmp_path: Path, model: Path, name: str, dtype: torch.dtype
) -> None:
    export(model, tmp_path / "out", f"export.dtype={name}")

    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["layer.weight"], WEIGHTS["layer.weight"].to(dtype))
    assert torch.equal(found["layer.count"], WEIGHTS["layer.count"])
    assert found["layer.count"].dtype == torch.int64
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert f"stored in {name}" in (tmp_path / "out" / "README.md").read_text()


def test_split_weights_stay_split_and_their_index_has_the_new_size(tmp_path: Path, model: Path) -> None:
    (model / "model.safetensors").unlink()
    for number, name in enumerate(WEIGHTS, 1):
        save_file({name: WEIGHTS[name]}, model / f"model-0000{number}-of-00002.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": 40}, "weight_map": dict.fromkeys(WEIGHTS, "...")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))

    export(model, tmp_path / "out", "export.dtype=bf16")

    index_after = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index_after == {**index, "metadata": {"total_size": 6 * 2 + 2 * 8}}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2


def test_weights_that_fp16_cannot_hold_are_refused_and_leave_no_files(tmp_path: Path, model: Path) -> None:
    save_file({"layer.weight": torch.tensor([1.0, 70000.0])}, model / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ConfigError, match=r"cannot hold layer.weight, whose largest value is 7e\+04: use bf16"):
        export(model, tmp_path / "out", "export.dtype=fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_existing_folder_is_replaced_only_with_overwrite(tmp_path: Path, model: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "notes.txt").write_text("mine")

    with pytest.raises(ConfigError, match=r"export.to=.*target exists already.*run.overwrite=true"):
        export(model, target)
    assert content(target) == {"notes.txt": b"mine"}

    export(model, target, "run.overwrite=true")
    (old,) = tmp_path.glob("target.old-*")
    assert content(old) == {"notes.txt": b"mine"}
    assert "notes.txt" not in content(target)


def test_an_empty_folder_is_a_valid_target(tmp_path: Path, model: Path) -> None:
    (tmp_path / "empty").mkdir()

    export(model, tmp_path / "empty")

    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_an_existing_card_is_kept_if_the_run_is_unknown(tmp_path: Path, model: Path) -> None:
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")

    export(model, tmp_path / "out")

    assert (tmp_path / "out" / "README.md").read_text() == "---\nlicense: mit\n---\n# Mine\n"


def test_a_source_that_cannot_be_exported_is_refused_with_advice(tmp_path: Path, model: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step-000100"
    bare = tmp_path / "bare"
    for folder in (step, bare):
        folder.mkdir(parents=True)
    wrong = [
        (Path("org/name"), r"is not a local folder.*download model.name_or_path=org/name"),
        (
            step.parent,
            r"contains checkpoints, but no model: set model\.name_or_path to one of them, e\.g\. .*step-000100",
        ),
        (bare, "has no config.json"),
    ]
    for source, message in wrong:
        with pytest.raises(ConfigError, match=message):
            export(source, tmp_path / "out")
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no \*.safetensors"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_target_that_cannot_be_written_is_refused_with_the_reason(tmp_path: Path, model: Path) -> None:
    (tmp_path / "file").write_text("")
    for target, message in (
        (None, "export.to is not set"),
        (tmp_path / "file", "export.to=.*file is a file"),
        (model, "overlaps model.name_or_path"),
        (model.parent, "overlaps model.name_or_path"),
        (model / "inside", "overlaps model.name_or_path"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(model, target, "run.overwrite=true")
    with pytest.raises(CheckpointError, match=r"cannot be written to .*file/below"):
        export(model, tmp_path / "file" / "below")
    assert (model / "model.safetensors").is_file()


@pytest.mark.parametrize("dtype", ["null", "bf16"])
def test_damaged_weights_are_named(tmp_path: Path, model: Path, dtype: str) -> None:
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-4])

    with pytest.raises(CheckpointError, match="a weights file is damaged"):
        export(model, tmp_path / "out", f"export.dtype={dtype}")
    assert not (tmp_path / "out").exists()
