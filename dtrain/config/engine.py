"""The engine's settings: back end, precision, and how ranks exchange their updates.

schema.py combines the sections. Nothing here reads or writes a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import model_validator

from dtrain.config.deepspeed_keys import unknown_keys
from dtrain.config.fields import Section, setting

OWNED_DEEPSPEED_KEYS: dict[str, str] = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "optim.max_grad_norm",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "torch_autocast": "engine.precision",
    "amp": "engine.precision",
    "optimizer": "optim.name",
    "scheduler": "schedule.name",
    "zero_optimization.stage": "engine.zero_stage",
}
"""DeepSpeed keys that must agree with a setting of dtrain, and that setting."""


class PowerSgd(Section):
    """Gradients exchanged as low-rank factors (Vogels et al. 2019, arXiv:1905.13727), which is another algorithm."""

    rank: int = setting(4, "rank of the factors: a higher rank is closer to the gradient and sends more", ge=1)
    start_step: int = setting(
        1000, "first steps, which exchange full gradients: about a tenth of the run, and the warm-up", ge=2
    )
    min_rate: float = setting(2.0, "a parameter that would not shrink by this factor is sent in full", ge=1)


class EngineSettings(Section):
    """The back end that runs forward, backward and optimizer step."""

    name: Literal["auto", "single", "ddp", "deepspeed"] = setting(
        "auto", "auto: deepspeed if zero_stage or deepspeed is set, else single (one process) or ddp", resume="free"
    )
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "precision of the forward pass; weights stay in fp32", resume="warn"
    )
    zero_stage: int | None = setting(
        None,
        "DeepSpeed ZeRO stage: 1 shards optimizer states, 2 also gradients, 3 also parameters",
        resume="free",
        ge=0,
        le=3,
    )
    deepspeed: dict[str, Any] = setting({}, "other keys of DeepSpeed's config, passed through unchanged", resume="free")
    find_unused: bool = setting(
        False,
        "single, ddp: keep parts that the first micro-batches do not use trainable, because later ones do (rare experts or heads)",
        resume="free",
    )

    gradient_wire: Literal["fp32", "bf16"] = setting(
        "fp32",
        "data type in which ranks exchange gradients: bf16 halves the bytes (same method, other rounding)",
        resume="warn",
    )
    powersgd: PowerSgd | None = setting(
        None, "ddp: exchange gradients as low-rank factors (another algorithm); null: in full", resume="refuse"
    )

    bucket_mb: float | None = setting(
        None,
        "ddp: MiB of gradients per collective; null: torch's default, 25 with a first bucket of 1",
        resume="free",
        gt=0,
    )

    @model_validator(mode="after")
    def _check_deepspeed_keys(self) -> EngineSettings:
        if self.name not in ("auto", "deepspeed") and (self.zero_stage is not None or self.deepspeed):
            key = "zero_stage" if self.zero_stage is not None else "deepspeed"
            raise ValueError(
                f"engine.{key} belongs to DeepSpeed, but engine.name={self.name}: set engine.name=deepspeed, "
                f"or remove engine.{key}"
            )
        zero = self.deepspeed.get("zero_optimization")
        zero_keys = zero if isinstance(zero, Mapping) else ()
        keys = {*self.deepspeed, *(f"zero_optimization.{key}" for key in zero_keys)}
        owned = [
            f"engine.deepspeed.{key} is controlled by {owner}: set that instead"
            for key, owner in OWNED_DEEPSPEED_KEYS.items()
            if key in keys
        ]
        if problems := owned or unknown_keys(self.deepspeed):
            raise ValueError("\n".join(problems))
        return self

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed runs, at any world size."""
        has_deepspeed_keys = self.zero_stage is not None or bool(self.deepspeed)
        return self.name == "deepspeed" or (self.name == "auto" and has_deepspeed_keys)


def exchange_conflicts(
    engine: EngineSettings, *, local_steps: int, sync_steps: Mapping[str, int], logs_gradients: bool
) -> list[str]:
    """Returns one message for each conflict between the settings for slow links, or with other settings.

    On one process they are no error and change no number, so that one config works on a laptop and on a cluster.

    Args:
        local_steps: train.local_steps.
        sync_steps: name and value of each setting that is a number of steps after which all ranks need equal weights.
        logs_gradients: whether train.log_gradients is set.
    """
    methods = [
        name
        for name, is_set in {
            "engine.gradient_wire=bf16": engine.gradient_wire == "bf16",
            "engine.powersgd": engine.powersgd is not None,
            f"train.local_steps={local_steps}": local_steps > 1,
        }.items()
        if is_set
    ]
    ddp_only = [name for name in methods if not name.startswith("engine.gradient_wire")]
    conflicts = []
    if len(methods) > 1:
        conflicts.append(f"{' and '.join(methods)} each choose how ranks exchange their updates: set only one of them")
    if engine.is_deepspeed:
        conflicts += _deepspeed_conflicts(engine, ddp_only)
    if engine.bucket_mb is not None and (ddp_only or engine.is_deepspeed):
        other = "DeepSpeed" if engine.is_deepspeed else ddp_only[0]
        conflicts.append(f"engine.bucket_mb={engine.bucket_mb:g} is for ddp's full gradients: {other} does not use it")
    if engine.precision == "fp16" and (engine.powersgd is not None or local_steps > 1):
        conflicts.append(
            f"{methods[-1]} with engine.precision=fp16: the loss scale changes, which would mix gradients of different "
            "scales. Use bf16 or fp32"
        )
    if engine.powersgd is not None and engine.find_unused:
        conflicts.append(
            "engine.powersgd with engine.find_unused: the approximation error kept from earlier steps would change "
            "parameters that a step does not use. Set only one of them"
        )
    if local_steps > 1:
        conflicts += _local_steps_conflicts(local_steps, sync_steps, logs_gradients=logs_gradients)
    return conflicts


def _local_steps_conflicts(local_steps: int, sync_steps: Mapping[str, int], *, logs_gradients: bool) -> list[str]:
    """Returns messages for settings that need equal weights or gradients between two averages."""
    conflicts = [
        f"{name}={steps} with train.local_steps={local_steps}: all ranks have the same weights only after every "
        f"{local_steps}th step and at the end of an epoch. Use a multiple of {local_steps}"
        for name, steps in sync_steps.items()
        if steps % local_steps
    ]
    if logs_gradients:
        conflicts.append(
            f"train.log_gradients measures the gradient over all ranks, which train.local_steps={local_steps} never "
            "computes: set train.log_gradients=null or train.local_steps=1"
        )
    return conflicts


def _deepspeed_conflicts(engine: EngineSettings, ddp_only: Sequence[str]) -> list[str]:
    """Returns messages for what DeepSpeed does not support.

    Measured on DeepSpeed 0.19.8: with torch_autocast, ZeRO >= 1 ignores communication_data_type.
    """
    conflicts = [
        f"{name} is for ddp, but DeepSpeed exchanges gradients itself: use engine.name=ddp, or remove the setting"
        for name in ddp_only
    ]
    if engine.gradient_wire == "bf16" and engine.zero_stage and engine.precision != "fp32":
        conflicts.append(
            f"engine.gradient_wire=bf16 with engine.precision={engine.precision} and "
            f"engine.zero_stage={engine.zero_stage}: DeepSpeed would still send fp32. Use engine.precision=fp32, ZeRO stage 0, or ddp"
        )
    if engine.gradient_wire == "bf16" and "communication_data_type" in engine.deepspeed:
        conflicts.append(
            "engine.deepspeed.communication_data_type is controlled by engine.gradient_wire: set that instead"
        )
    return conflicts
