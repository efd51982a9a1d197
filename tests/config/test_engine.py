"""The settings for slow links: their conflicts, and how the plan describes a run that uses them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dtrain.config import deepspeed_keys
from dtrain.config.deepspeed_keys import known_keys
from dtrain.config.load import load_config
from dtrain.config.schema import Config
from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.distributed.topology import SINGLE
from dtrain.engine.build import engine_traits
from dtrain.errors import ConfigError
from dtrain.training import checkpoints, plan
from dtrain.training.monitors.protocol import RunState
from dtrain.training.plan import exactness

TWO = replace(SINGLE, world_size=2)


@pytest.mark.parametrize(
    ("overrides", "phrases"),
    [
        (
            ["engine.gradient_wire=bf16", "engine.zero_stage=1", "engine.precision=bf16"],
            ["engine.gradient_wire=bf16", "engine.precision=bf16", "engine.zero_stage=1", "would still send fp32"],
        ),
        (
            ["engine.gradient_wire=bf16", "engine.deepspeed.communication_data_type=bf16"],
            ["engine.deepspeed.communication_data_type", "engine.gradient_wire"],
        ),
        (["engine.powersgd={rank: 2}", "engine.name=deepspeed"], ["engine.powersgd is for ddp"]),
        (["train.local_steps=4", "engine.deepspeed.steps_per_print=5"], ["train.local_steps=4 is for ddp"]),
        (["train.local_steps=4", "engine.gradient_wire=bf16"], ["engine.gradient_wire=bf16 and train.local_steps=4"]),
        (["engine.powersgd={}", "engine.gradient_wire=bf16"], ["engine.gradient_wire=bf16 and engine.powersgd"]),
        (["engine.powersgd={}", "train.local_steps=4"], ["engine.powersgd and train.local_steps=4", "set only one"]),
        (["engine.powersgd={}", "engine.precision=fp16"], ["engine.powersgd with engine.precision=fp16"]),
        (["train.local_steps=4", "engine.precision=fp16"], ["train.local_steps=4 with engine.precision=fp16"]),
        (["engine.powersgd={}", "engine.find_unused=true"], ["engine.powersgd with engine.find_unused"]),
        (["train.local_steps=4", "train.eval_every=6"], ["train.eval_every=6", "multiple of 4"]),
        (["train.local_steps=4", "checkpoint.every=10"], ["checkpoint.every=10", "multiple of 4"]),
        (["train.local_steps=4", "train.check_replicas=1"], ["train.check_replicas=1", "multiple of 4"]),
        (["train.local_steps=4", "train.log_gradients=4"], ["train.log_gradients", "train.local_steps=4"]),
        (["engine.bucket_mb=5", "engine.powersgd={}"], ["engine.bucket_mb=5", "engine.powersgd does not use it"]),
        (["engine.bucket_mb=5", "engine.zero_stage=1"], ["engine.bucket_mb=5", "DeepSpeed does not use it"]),
        (["engine.bucket_mb=5", "engine.zero_stage=1", "engine.gradient_wire=bf16"], ["bucket_mb=5", "DeepSpeed does"]),
        (["engine.bucket_mb=5", "train.local_steps=4"], ["bucket_mb=5", "train.local_steps=4 does not use it"]),
        (
            ["engine.name=fsdp", "optim.name=adafactor"],
            ["optim.name=adafactor with engine.name=fsdp", "engine.name=ddp"],
        ),
        (["engine.name=fsdp", "engine.precision=fp16"], ["engine.precision=fp16", "Use engine.precision=bf16"]),
        (["engine.name=fsdp", "model.compile=true"], ["model.compile with engine.name=fsdp", "model.compile=false"]),
        (["engine.name=fsdp", "train.check_replicas=5"], ["only a shard", "train.check_replicas=null"]),
        (["engine.name=fsdp", "train.local_steps=4"], ["train.local_steps=4 is for ddp, but FSDP2"]),
        (["engine.name=fsdp", "engine.powersgd={}"], ["engine.powersgd is for ddp, but FSDP2"]),
        (["engine.name=fsdp", "engine.gradient_wire=bf16"], ["engine.gradient_wire=bf16 is for ddp, but FSDP2"]),
        (["engine.name=fsdp", "engine.bucket_mb=5"], ["engine.bucket_mb=5", "FSDP2 does not use it"]),
        (["engine.name=fsdp", "engine.zero_stage=3"], ["engine.zero_stage belongs to DeepSpeed"]),
        (["engine.offload=true"], ["engine.offload is for FSDP2, but engine.name=auto", "set engine.name=fsdp"]),
        (["engine.reshard_after_forward=false", "engine.name=ddp"], ["engine.reshard_after_forward is for FSDP2"]),
        (["engine.bucket_mb=0"], ["engine.bucket_mb=0", "0"]),
        (["engine.bitwise=true", "engine.zero_stage=1"], ["engine.bitwise", "engine.name=deepspeed adds them itself"]),
        (["engine.bitwise=true", "engine.name=deepspeed"], ["engine.name=deepspeed adds", "use engine.name=auto"]),
        (["engine.bitwise=true", "engine.gradient_wire=bf16"], ["engine.bitwise", "engine.gradient_wire=bf16 rounds"]),
        (["engine.bitwise=true", "engine.powersgd={}"], ["engine.bitwise", "engine.powersgd approximates"]),
        (["engine.bitwise=true", "train.local_steps=4"], ["engine.bitwise", "train.local_steps=4 averages"]),
        (["engine.bitwise=true", "model.compile=true"], ["engine.bitwise", "model.compile chooses kernels"]),
        (["engine.bitwise=true", "model.batch_norm=train"], ["engine.bitwise", "model.batch_norm=train updates"]),
        (["engine.bitwise=true", "engine.name=fsdp"], ["engine.bitwise", "engine.name=fsdp adds them itself"]),
        (["train.local_steps=0"], ["train.local_steps=0", "at least 1"]),
        (["engine.gradient_wire=fp16"], ["engine.gradient_wire", "bf16"]),
        (["engine.powersgd={rank: 0}"], ["engine.powersgd.rank=0", "at least 1"]),
        (["engine.powersgd={start_step: 1}"], ["engine.powersgd.start_step=1", "at least 2"]),
        (["engine.powersgd={ranks: 1}"], ["engine.powersgd.ranks", "engine.powersgd.rank"]),
    ],
)
def test_conflicting_settings_are_refused(overrides: list[str], phrases: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, overrides)

    assert all(phrase in str(refused.value) for phrase in phrases), refused.value


def test_deepspeed_accepts_a_bf16_exchange_where_it_supports_it() -> None:
    load_config(None, ["engine.gradient_wire=bf16", "engine.zero_stage=3"])
    load_config(None, ["engine.gradient_wire=bf16", "engine.zero_stage=0", "engine.precision=bf16"])


def test_a_bucket_size_and_a_bf16_exchange_work_together() -> None:
    load_config(None, ["engine.bucket_mb=5", "engine.gradient_wire=bf16"])


def test_settings_for_slow_links_are_accepted_for_one_process_and_for_a_cluster() -> None:
    for setting in ("engine.gradient_wire=bf16", "engine.powersgd={rank: 2}", "train.local_steps=4"):
        for engine in ("auto", "single", "ddp"):
            load_config(None, [setting, f"engine.name={engine}"])


def test_multiples_of_the_local_steps_and_ends_of_epochs_are_accepted() -> None:
    load_config(None, ["train.local_steps=4", "train.eval_every=8", "checkpoint.every=4", "train.check_replicas=12"])
    load_config(None, ["train.local_steps=4", "train.eval_every=2 epochs"])
    load_config(None, ["train.local_steps=4", "train.eval_every=never"])


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        ([], "same loss at every step"),
        (["engine.gradient_wire=bf16"], "same method, other rounding (bf16 on the wire)"),
        (["engine.powersgd={rank: 2, start_step: 50}"], "another algorithm: gradients of rank 2 from step 50 on"),
        (["train.local_steps=4"], "another algorithm: weights averaged every 4 steps"),
    ],
)
def test_the_plan_says_how_exact_a_run_is(overrides: list[str], label: str) -> None:
    config = load_config(None, overrides)

    assert exactness(config, engine_traits(config, RankContext(TWO))).startswith(label)
    assert exactness(config, engine_traits(config, ONE_PROCESS)).startswith("same loss at every step")


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (
            ["engine.powersgd={start_step: 20}"],
            "gradients will never be sent as factors, because engine.powersgd.start_step=20",
        ),
        (["engine.powersgd={start_step: 19}"], ""),
        (["train.local_steps=4", "train.eval_every=never"], "waits for the next average of the weights, up to 4 steps"),
    ],
)
def test_the_plan_warns_of_settings_without_effect_and_of_their_cost(overrides: list[str], warning: str) -> None:
    config = load_config(None, [*overrides, "train.max_steps=20"])

    notes = "\n".join(engine_traits(config, RankContext(TWO), total_steps=20).notes)

    assert warning in notes
    assert bool(warning) == bool(notes)
    assert engine_traits(config, ONE_PROCESS, total_steps=20).notes == ()


def _memory(config: Config, context: RankContext) -> str:
    return plan._memory(engine_traits(config, context), context, 2**20, 2**20)


@pytest.mark.parametrize(
    ("overrides", "exchange"), [([], None), (["engine.gradient_wire=bf16"], "2.0"), (["engine.powersgd={}"], "12.0")]
)
def test_the_plan_counts_the_memory_of_the_exchange(overrides: list[str], exchange: str | None) -> None:
    config = load_config(None, overrides)

    words = _memory(config, RankContext(TWO))

    assert ("exchange" in words) == (exchange is not None)
    assert exchange is None or f"exchange {exchange} MiB" in words
    assert "exchange" not in _memory(config, ONE_PROCESS)


@pytest.mark.parametrize(("extra", "slots"), [(0, 2), (1, 3)])
def test_only_ranks_that_exchange_need_room_for_what_they_remember(
    monkeypatch: pytest.MonkeyPatch, extra: int, slots: int
) -> None:
    reserved: list[int] = []

    class Saver:
        def __init__(self, *_arguments: Any, **_more: Any) -> None: ...

        def prepare(self, _module: Any, *, slots: int) -> None:
            reserved.append(slots)

    monkeypatch.setattr(checkpoints, "Saver", Saver)
    config, nothing = load_config(None, ["engine.powersgd={}", "checkpoint.every=5"]), Any
    engine: Any = SimpleNamespace(module=None, extra_slots=extra)

    checkpoints.CheckpointMonitor(
        config, ONE_PROCESS, nothing, state=RunState(), tracker=nothing, engine=lambda: engine
    )  # type: ignore[arg-type]

    assert reserved == [slots]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "zero_optimisation.overlap_comm",
            "zero_optimisation is not a key of DeepSpeed {}. Did you mean zero_optimization?",
        ),
        (
            "zero_optimization.overlap_com",
            "zero_optimization.overlap_com is not a key of DeepSpeed {}. Did you mean overlap_comm?",
        ),
        (
            "zero_optimization.offload_optimizer.devise",
            "zero_optimization.offload_optimizer.devise is not a key of DeepSpeed {}. Did you mean device?",
        ),
        (
            "activation_checkpointing.partition_activation",
            "activation_checkpointing.partition_activation is not a key of DeepSpeed {}. Did you mean partition_activations?",
        ),
        ("overlap_comm", "overlap_comm is not a key of DeepSpeed {} at this place. Move it below zero_optimization."),
        (
            "zero_optimization.wall_clock_breakdown",
            "zero_optimization.wall_clock_breakdown is not a key of DeepSpeed {} at this place. "
            "Move it to engine.deepspeed.wall_clock_breakdown.",
        ),
        ("gibberish", "gibberish is not a key of DeepSpeed {}: remove it."),
        ("sparse_gradients", "sparse_gradients is not a key of DeepSpeed {}"),
    ],
)
def test_a_key_that_deepspeed_does_not_know_is_refused_with_the_nearest_one(
    tmp_path: Path, key: str, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [f"engine.deepspeed.{key}=1"])

    expected = message.format(importlib.metadata.version("deepspeed"))
    assert str(refused.value).startswith(f"command line: engine.deepspeed.{expected}")

    *sections, last = f"engine.deepspeed.{key}".split(".")
    text = (
        "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(sections))
        + f"{'  ' * len(sections)}{last}: 1\n"
    )
    path = tmp_path / "own.yaml"
    path.write_text(f"task: {{name: causal_lm}}\n{text}")
    with pytest.raises(ConfigError, match=rf"^{path}, line \d: engine\.deepspeed\."):
        load_config(path, [])


def test_the_known_keys_are_those_that_deepspeeds_own_config_reads() -> None:
    """Runs in another process, because deepspeed takes seconds to import and changes the process."""
    script = """
import json, sys
from deepspeed.runtime import config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

class Recorder(dict):
    read = set()
    def note(self, key):
        if isinstance(key, str):
            self.read.add(key)
    def __getitem__(self, key):
        self.note(key)
        return super().__getitem__(key)
    def __contains__(self, key):
        self.note(key)
        return super().__contains__(key)
    def get(self, key, default=None):
        self.note(key)
        return super().get(key, default)
    def keys(self):
        return self
    def __copy__(self):
        return self

config.DeepSpeedConfig(Recorder(train_batch_size=1))
def fields(model):
    return sorted({*model.model_fields, *(field.alias for field in model.model_fields.values() if field.alias)})
removed = config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys()
print(json.dumps([sorted(Recorder.read - removed), fields(DeepSpeedZeroConfig), fields(DeepSpeedZeroOffloadOptimizerConfig)]))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    read, zero, offload = json.loads(ended.stdout.strip().splitlines()[-1])

    known = known_keys()

    assert known is not None
    assert set(read) <= known.names
    assert set(zero) == known.sections["zero_optimization"].names
    assert set(offload) == known.sections["zero_optimization"].sections["offload_optimizer"].names


def test_without_deepspeed_or_with_one_that_is_written_in_another_way_no_key_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deepspeed_keys, "known_keys", known_keys.__wrapped__)
    monkeypatch.setattr(deepspeed_keys, "START", ("no_such_function", "param_dict"))

    assert load_config(None, ["engine.deepspeed.gibberish=1"]).engine.deepspeed == {"gibberish": 1}

    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert load_config(None, ["engine.deepspeed.gibberish=1"]).engine.deepspeed == {"gibberish": 1}


def test_no_key_is_looked_up_without_a_config_of_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_keys, "known_keys", lambda: pytest.fail("read the source of DeepSpeed"))

    load_config(None, [])
