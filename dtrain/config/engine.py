"""The engine's settings: back end, precision, and how ranks exchange their updates.

schema.py combines the sections. Nothing here reads or writes a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import model_validator

from dtrain.config.deepspeed_keys import unknown_keys
from dtrain.config.fields import Section, setting
from dtrain.config.model import Model
from dtrain.config.optim import Optim

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

    name: Literal["auto", "single", "ddp", "deepspeed", "fsdp"] = setting(
        "auto",
        "auto: deepspeed if zero_stage or deepspeed is set, else single (one process) or ddp; fsdp: torch's FSDP2",
        resume="free",
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
    offload: bool = setting(False, "fsdp: keep weights, gradients and moments on the host", resume="free")
    reshard_after_forward: bool = setting(
        True,
        "fsdp: free a layer's weights between forward and backward; false: more memory, fewer transfers",
        resume="free",
    )
    find_unused: bool = setting(
        False,
        "single, ddp, fsdp: keep parts that the first micro-batches do not use trainable, because later ones do (rare experts or heads)",
        resume="free",
    )

    bitwise: bool = setting(
        False,
        "single, ddp: every bit of weights and losses is the same at any number of ranks (slow links: slower)",
        resume="warn",
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
    def _check_keys(self) -> EngineSettings:
        if self.name not in ("auto", "deepspeed") and (self.zero_stage is not None or self.deepspeed):
            key = "zero_stage" if self.zero_stage is not None else "deepspeed"
            raise ValueError(
                f"engine.{key} belongs to DeepSpeed, but engine.name={self.name}: set engine.name=deepspeed, "
                f"or remove engine.{key}"
            )
        for key, default in (("offload", False), ("reshard_after_forward", True)):
            if self.name != "fsdp" and getattr(self, key) != default:
                raise ValueError(
                    f"engine.{key} is for FSDP2, but engine.name={self.name}: set engine.name=fsdp, or remove engine.{key}"
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


def engine_conflicts(
    engine: EngineSettings,
    optim: Optim,
    model: Model,
    *,
    local_steps: int,
    sync_steps: Mapping[str, int],
    logs_gradients: bool,
    checks_replicas: bool,
) -> list[str]:
    """Returns one message for each setting that the chosen engine does not support, alone or with another one.

    On one process the settings for slow links are no error and change no number, so that one config works on a laptop and on a
    cluster.

    Args:
        engine: the engine section.
        optim: the optim section.
        model: the model section.
        local_steps: train.local_steps.
        sync_steps: name and value of each setting that is a number of steps after which all ranks need equal weights.
        logs_gradients: whether train.log_gradients is set.
        checks_replicas: whether train.check_replicas is set.
    """
    conflicts = []
    if engine.is_deepspeed:
        conflicts += _zero_conflicts(engine, optim, checks_replicas=checks_replicas)
    if engine.name == "fsdp":
        conflicts += _fsdp_conflicts(engine, optim, model, checks_replicas=checks_replicas)
    if engine.bitwise:
        conflicts += _bitwise_conflicts(engine, model, local_steps)
    conflicts += _exchange_conflicts(engine, local_steps)
    if local_steps > 1:
        conflicts += _local_steps_conflicts(local_steps, sync_steps, logs_gradients=logs_gradients)
    return conflicts


def _exchange_conflicts(engine: EngineSettings, local_steps: int) -> list[str]:
    """Returns messages for settings for slow links that the engine does not support, or that exclude each other."""
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
    if engine.name == "fsdp":
        conflicts += [f"{name} is for ddp, but FSDP2 sends fp32 itself: use engine.name=ddp" for name in methods]
    if engine.bucket_mb is not None and (ddp_only or engine.is_deepspeed or engine.name == "fsdp"):
        other = "DeepSpeed" if engine.is_deepspeed else "FSDP2" if engine.name == "fsdp" else ddp_only[0]
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
    return conflicts


def _bitwise_conflicts(engine: EngineSettings, model: Model, local_steps: int) -> list[str]:
    """Returns one message for each setting with which engine.bitwise cannot keep its promise."""
    if engine.is_deepspeed or engine.name not in ("auto", "single", "ddp"):
        name = "deepspeed" if engine.is_deepspeed else engine.name
        return [
            f"engine.bitwise adds gradients in an order of its own, but engine.name={name} adds them itself: use engine.name=auto "
            "without engine.zero_stage and engine.deepspeed, or engine.bitwise=false"
        ]
    rounds = engine.gradient_wire == "bf16"
    reasons = {
        "engine.gradient_wire=bf16": (rounds, "rounds what crosses ranks, as one process never does"),
        "engine.powersgd": (engine.powersgd is not None, "approximates what crosses ranks, as one process never does"),
        f"train.local_steps={local_steps}": (
            local_steps > 1,
            "averages the weights of ranks, as one process never does",
        ),
        "model.compile": (model.compile, "chooses kernels by the shapes that a rank has seen"),
        "model.batch_norm=train": (model.batch_norm == "train", "updates running statistics on each rank alone"),
    }
    return [
        f"engine.bitwise promises the same bits at any number of ranks, but {name} {why}: set only one of them"
        for name, (is_set, why) in reasons.items()
        if is_set
    ]


def _zero_conflicts(engine: EngineSettings, optim: Optim, *, checks_replicas: bool) -> list[str]:
    """Returns messages for settings that DeepSpeed with its ZeRO stage does not support."""
    stage = engine.zero_stage
    conflicts = []
    if optim.name == "adafactor" and stage:
        conflicts.append(
            f"optim.name=adafactor with engine.zero_stage={stage}: ZeRO passes flat shards to Adafactor, whose row "
            "and column statistics would be meaningless. Use ZeRO stage 0, ddp, or AdamW"
        )
    if engine.precision == "fp16" and stage and optim.max_grad_norm is not None:
        conflicts.append(
            f"engine.precision=fp16 with engine.zero_stage={stage} and optim.max_grad_norm={optim.max_grad_norm}: "
            "DeepSpeed clips gradients before it removes the loss scale. Use bf16, or optim.max_grad_norm=null"
        )
    if checks_replicas and stage == 3:
        conflicts.append(
            "train.check_replicas compares complete weights, but with engine.zero_stage=3 each rank holds only a "
            "shard: set it to null, or use stage 0, 1 or 2"
        )
    if engine.find_unused:
        conflicts.append("engine.find_unused is for ddp: DeepSpeed would decay unused parameters. Use engine.name=ddp")
    return conflicts


def _fsdp_conflicts(engine: EngineSettings, optim: Optim, model: Model, *, checks_replicas: bool) -> list[str]:
    """Returns messages for settings that FSDP2 does not support here."""
    conflicts = []
    if optim.name == "adafactor":
        conflicts.append(
            "optim.name=adafactor with engine.name=fsdp: each rank has some rows of a parameter only, so Adafactor's statistics "
            "of rows and columns would be meaningless. Use optim.name=adamw, or engine.name=ddp"
        )
    if engine.precision == "fp16":
        conflicts.append(
            "engine.precision=fp16 with engine.name=fsdp: the ranks would not agree on the loss scale. Use engine.precision=bf16"
        )
    if model.compile:
        conflicts.append(
            "model.compile with engine.name=fsdp: gathering a layer's weights breaks the compiled graph at every layer. "
            "Set model.compile=false, or use engine.name=ddp"
        )
    if checks_replicas:
        conflicts.append(
            "train.check_replicas compares complete weights, but with engine.name=fsdp each rank holds only a shard: set "
            "train.check_replicas=null"
        )
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
