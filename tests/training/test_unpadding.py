"""The choice of model.unpad in the life of a run: made once, written to config.yaml, kept by every later start."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dtrain.commands.evaluate import run_evaluate
from dtrain.config.earlier_runs import as_begun
from dtrain.config.load import differences, load_config, to_yaml
from dtrain.config.schema import Config
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError
from dtrain.models.unpadding import prepare_unpadding
from dtrain.tasks.protocol import Padding
from tests.support import resuming, tiny, training
from tests.support.training import Setting

SHORT = {"train.max_steps": 2, "checkpoint.keep": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resuming.material(tmp_path_factory.mktemp("unpadding"))


def start(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    return resuming.life(ONE_PROCESS, str(folder), name, {**SHORT, **changes})


def config_file(folder: Path, name: str) -> Path:
    return folder / "runs" / name / "config.yaml"


def choice(folder: Path, name: str) -> str:
    (value,) = re.findall(r"^  unpad: (.*)$", config_file(folder, name).read_text(encoding="utf-8"), re.MULTILINE)
    return str(value).strip("\"'")


def test_a_run_writes_its_choice_and_goes_on_with_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="dtrain"):
        start(folder, "chosen")
        assert choice(folder, "chosen") == "on"
        saved = folder / "runs" / "chosen" / "checkpoints" / "step-000002" / "config.yaml"
        assert 'unpad: "on"' in saved.read_text(encoding="utf-8").replace("'", '"')
        assert "unpad      on (tested for bert)" in caplog.text
        caplog.clear()

        more = start(folder, "chosen", **{"train.max_steps": 3})

    assert [step for step, _ in more["taken"]] == [2]
    assert choice(folder, "chosen") == "on"
    assert "model.unpad" not in caplog.text
    with pytest.raises(ConfigError, match=r"model\.unpad: 'on' -> 'off'"):
        start(folder, "chosen", **{"train.max_steps": 4, "model.unpad": "off"})


def with_choice(config: Config, unpad: str) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"unpad": unpad})})


def test_padding_and_no_padding_train_the_same_without_dropout(folder: Path) -> None:
    still = {"model.config": "{hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}", "train.max_steps": 8}
    start(folder, "padded", **still, **{"model.unpad": "off"})
    start(folder, "unpadded", **still)

    assert (choice(folder, "padded"), choice(folder, "unpadded")) == ("off", "on")
    padded, unpadded = resuming.losses(folder, "padded"), resuming.losses(folder, "unpadded")
    assert len(padded) == 8
    assert unpadded == pytest.approx(padded, rel=1e-5)


def test_a_run_of_a_version_without_the_setting_goes_on_padded(folder: Path) -> None:
    start(folder, "older", **{"model.unpad": "off"})
    text = re.sub(r"  unpad: .*\n", "", config_file(folder, "older").read_text(encoding="utf-8"))
    assert "  unpad:" not in text
    config = load_config(None, resuming.settings(folder, "older", {**SHORT, "train.max_steps": 3}))

    begun = as_begun(text, config)

    assert begun.model.unpad == "off"
    assert [change.key for change in differences(text, begun)] == ["train.max_steps"]
    asked = with_choice(config, "on")
    assert as_begun(text, asked) == asked
    assert ("model.unpad", "'off'", "'on'", "refuse") in [tuple(change) for change in differences(text, asked)]

    start(folder, "older", **{"train.max_steps": 3})
    assert choice(folder, "older") == "off"


def test_a_choice_that_was_not_made_is_made_by_the_next_start(folder: Path) -> None:
    config = load_config(None, resuming.settings(folder, "open", SHORT))

    assert as_begun(to_yaml(config), config) == config
    assert as_begun(None, config) == config
    assert as_begun(to_yaml(with_choice(config, "on")), config).model.unpad == "on"
    assert as_begun("{torn", config) == config  # `differences` says so


def test_a_run_that_begins_again_chooses_again(folder: Path) -> None:
    start(folder, "again", **{"model.unpad": "off"})
    start(folder, "again", **{"run.overwrite": True})

    assert choice(folder, "again") == "on"


def test_an_evaluation_gives_the_same_loss_and_predictions_with_and_without_padding(folder: Path) -> None:
    found = []
    for unpad in ("on", "off"):
        changes = {"model.unpad": unpad, "model.name_or_path": folder / "runs" / "trained" / "model"}
        if unpad == "on":
            start(folder, "trained")
        settings = resuming.settings(folder, f"evaluated-{unpad}", changes)
        found.append(run_evaluate(load_config(None, settings, command="evaluate"), ONE_PROCESS).metrics)

    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0]["loss"] != found[1]["loss"] or found[0] == found[1]


def test_on_is_an_error_where_the_model_cannot(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        start(folder, "refused", **{"model.unpad": "on", "model.attn_implementation": "eager"})

    assert str(caught.value) == (
        "model.unpad=on: this model cannot be computed without padding: model.attn_implementation=eager. Set "
        "model.unpad=off, or auto, which falls back to padding."
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("change", [{"model.compile": True}, {"model.attn_implementation": "eager"}])
def test_a_choice_that_an_allowed_change_rules_out_ends_with_a_warning(change: dict[str, Any], caplog: Any) -> None:
    base: dict[str, Any] = {"run": {"name": "test"}, "task": {"name": "classification"}}
    began = with_choice(Config.model_validate(base), "on")
    model = {name.removeprefix("model."): value for name, value in change.items()}

    begun = as_begun(to_yaml(began), Config.model_validate({**base, "model": model}))
    decision = prepare_unpadding(tiny.bert(), begun.model)

    assert (begun.model.unpad, decision.value) == ("on", "off")
    assert "was on when this run began" in caplog.text
    named = Config.model_validate({**base, "model": {**model, "unpad": "on"}})
    with pytest.raises(ConfigError, match="cannot be computed without padding"):
        prepare_unpadding(tiny.bert(), named.model)


def test_a_model_that_reads_padding_computes_it(caplog: Any) -> None:
    learns = training.task(Setting())
    learns.padding = Padding(length=32)  # what try_model decides for such a model

    built = training.build(ONE_PROCESS, Setting(), tiny.bert(), learns)

    assert str(built.prepared.unpadding) == "off (its answer for a row depends on the row's padding)"
    assert training.build(ONE_PROCESS, Setting()).prepared.unpadding.value == "on"
