"""Builds DeepSpeed's config, and describes its engine before it is built. Imports no deepspeed."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from dtrain.config.schema import Config
from dtrain.engine.optim import slots_per_value
from dtrain.engine.protocol import BytesPerNumber, EngineTraits
from dtrain.errors import ConfigError

HARMLESS_KEYS = (
    *("zero_optimization", "zero_allow", "zero_force", "steps_per_print", "wall_clock", "dump_state", "memory_break"),
    *("overlap_comm", "contiguous_gradients", "reduce_bucket", "allgather_bucket", "reduce_scatter", "sub_group_size"),
    *("stage3_", "round_robin_gradients", "flops_profiler", "comms_logger", "tensorboard", "csv_monitor"),
)
"""Prefixes of the DeepSpeed keys that change no number. Any other key moves a run to a looser row of the exactness table."""


CONFIG_READERS = frozenset({"_initialize_params", "_do_sanity_check", "_do_optimizer_sanity_check", "get_data_types"})
"""Functions of DeepSpeed that read values of its config, and compare them with the model."""


def deepspeed_traits(config: Config, *, world_size: int) -> EngineTraits:
    """Returns the properties of the engine, before it is built."""
    stage = config.engine.zero_stage or 0
    # ZeRO keeps a flat fp32 master copy of its shard beside the module's parameters.
    optimizer = 4.0 * (slots_per_value(config.optim) + (stage >= 1)) / (world_size if stage >= 1 else 1)
    keys = {**config.engine.deepspeed, **config.engine.deepspeed.get("zero_optimization", {})}
    inexact = sorted(key for key in keys if not key.startswith(HARMLESS_KEYS))
    is_bf16 = config.engine.gradient_wire == "bf16" and world_size > 1
    return EngineTraits(
        memory=BytesPerNumber(
            weights=4.0 / (world_size if stage == 3 else 1),
            gradients=4.0 / (world_size if stage >= 2 else 1),
            optimizer=optimizer,
        ),
        detail=f"ZeRO {stage}",
        is_sharded=stage == 3,
        lock_step=needs_lock_step(stage),
        other_rounding=(*(["bf16 on the wire"] if is_bf16 else []), *([", ".join(inexact)] if inexact else [])),
        evaluation_note="ZeRO 3: 1e-6" if stage == 3 else "",
    )


def needs_lock_step(stage: int) -> bool:
    """Returns whether forward or backward is a collective: ZeRO 2 sends gradients in backward, ZeRO 3 also parameters in forward."""
    return stage >= 2


def deepspeed_config(config: Config, *, world_size: int) -> dict[str, Any]:
    """Returns DeepSpeed's config: the user's keys, overridden by the keys that dtrain owns."""
    passed = dict(config.engine.deepspeed)
    stage = config.engine.zero_stage or 0
    owned: dict[str, Any] = {
        # Only one of its three batch keys is needed; dtrain marks the accumulation boundary itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": config.optim.max_grad_norm or 0.0 if stage > 0 else 0.0,
        "zero_optimization": {**passed.pop("zero_optimization", {}), "stage": stage},
    }
    if config.engine.precision != "fp32":
        owned["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16" if config.engine.precision == "bf16" else "float16",
            # Otherwise most gradients are sent in the lower precision, which single and ddp do not do.
            "lower_precision_safe_modules": ["torch.nn.Identity"],
        }
    if config.engine.gradient_wire == "bf16" and world_size > 1:
        owned["communication_data_type"] = "bf16"
    # Offload would require DeepSpeed's CPU Adam, which it compiles; torch's optimizer gives the same result.
    defaults = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9}
    return {**defaults, **passed, **owned}


@contextmanager
def explain_refused_config() -> Iterator[None]:
    """Turns DeepSpeed's errors about its config into ones that name the setting.

    Raises:
        ConfigError: DeepSpeed does not accept a value.
    """
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"DeepSpeed does not accept engine.deepspeed: {key}={first['input']!r:.80} in {error.title}: {first['msg']}."
        ) from error
    except Exception as error:
        if CONFIG_READERS.isdisjoint(frame.name for frame in traceback.extract_tb(error.__traceback__)):
            raise
        raise ConfigError(f"DeepSpeed does not accept engine.deepspeed: {error}") from error
