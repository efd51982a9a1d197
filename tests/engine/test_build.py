"""Which engine `engine.name=auto` means, and what only the world size shows to be wrong."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field
from torch import nn

from dtrain.config.schema import Config
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.engine.build import engine_name
from dtrain.engine.ddp import build_comm_hook
from dtrain.engine.deepspeed_config import CONFIG_READERS, explain_refused_config
from dtrain.errors import ConfigError
from tests.support.contexts import placed

TWO = placed(ONE_PROCESS, world_size=2, local_world_size=2, launcher="torchrun")


def config(**engine: Any) -> Config:
    return Config.model_validate({"task": {"name": "causal_lm"}, "engine": engine})


def test_auto_is_single_for_one_process_ddp_for_more_and_deepspeed_where_its_settings_are_set() -> None:
    assert engine_name(config(), ONE_PROCESS)[0] == "single"
    assert engine_name(config(), TWO)[0] == "ddp"
    assert engine_name(config(zero_stage=0), ONE_PROCESS)[0] == "deepspeed"
    assert engine_name(config(deepspeed={"steps_per_print": 5}), TWO)[0] == "deepspeed"


def test_single_on_several_ranks_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"torchrun started 2: each would train alone.*engine.name=ddp"):
        engine_name(config(name="single"), TWO)


def test_only_powersgd_on_several_ranks_keeps_an_error_for_each_value() -> None:
    powersgd = config(powersgd={})

    assert build_comm_hook(powersgd, ONE_PROCESS, nn.Linear(2, 2)).extra_slots == 0
    assert build_comm_hook(powersgd, TWO, nn.Linear(2, 2)).extra_slots == 1


def test_the_functions_that_read_deepspeeds_config_are_still_its_own() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine

    assert {name for name in CONFIG_READERS if hasattr(DeepSpeedConfig, name) or hasattr(DeepSpeedEngine, name)} == (
        CONFIG_READERS
    )


@pytest.mark.parametrize("reader", sorted(CONFIG_READERS))
def test_a_value_that_a_reader_of_the_config_refuses_is_named(reader: str) -> None:
    scope: dict[str, Any] = {}
    exec(f"def {reader}():\n    raise NotImplementedError('unsupported mix')", scope)

    with pytest.raises(ConfigError, match=r"engine\.deepspeed: unsupported mix"), explain_refused_config():
        scope[reader]()


def test_a_value_that_deepspeed_does_not_accept_is_named() -> None:
    class Known(BaseModel):
        bucket: Annotated[int, Field(gt=0)] = 1

    def _initialize_params(error: str) -> None:
        raise ValueError(error)

    refusal = r"^DeepSpeed does not accept engine\.deepspeed: "
    with pytest.raises(ConfigError, match=f"{refusal}bucket=-1 in Known: Input should be"), explain_refused_config():
        Known(bucket=-1)
    with pytest.raises(ConfigError, match=f"{refusal}no such type$"), explain_refused_config():
        _initialize_params("no such type")
    with pytest.raises(KeyError), explain_refused_config():
        raise KeyError("elsewhere")
