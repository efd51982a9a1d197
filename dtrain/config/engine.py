"""The engine's settings, and what crosses ranks in a step: its precision, its compression, how often.

See schema.py for how the sections come together. Nothing here touches a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import model_validator

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
"""DeepSpeed keys that must agree with a setting of dtrain, and the setting that owns each."""


class PowerSgd(Section):
    """Gradients cross ranks as low-rank factors (Vogels et al. 2019, arXiv:1905.13727). Another algorithm."""

    rank: int = setting(4, "columns of each factor: more is nearer to the gradient, and more to send", ge=1)
    start_step: int = setting(
        1000, "steps that exchange whole gradients first: about a tenth of the run, and the warm-up", ge=2
    )
    min_rate: float = setting(2.0, "a parameter that would not shrink by this factor crosses whole", ge=1)


class Engine(Section):
    """The back end that runs forward, backward and step."""

    name: Literal["auto", "single", "ddp", "deepspeed"] = setting(
        "auto", "auto: deepspeed if zero_stage or deepspeed is set, else single (one process) or ddp", resume="free"
    )
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "of the forward pass; weights stay fp32", resume="warn"
    )
    zero_stage: int | None = setting(None, "shards 1 moments, 2 + gradients, 3 + parameters", resume="free", ge=0, le=3)
    deepspeed: dict[str, Any] = setting({}, "further keys of DeepSpeed's config, passed through", resume="free")
    find_unused: bool = setting(
        False, "ddp: models that use other parts in other steps; no probe (slower)", resume="free"
    )

    gradient_wire: Literal["fp32", "bf16"] = setting(
        "fp32", "in what gradients cross ranks: bf16 halves their bytes (same method, other rounding)", resume="warn"
    )
    powersgd: PowerSgd | None = setting(
        None, "ddp: gradients cross ranks as low-rank factors (another algorithm); null: whole", resume="refuse"
    )

    bucket_mb: float | None = setting(
        None,
        "ddp: MiB of gradients in one collective; null: torch's own, 25 with a first one of 1",
        resume="free",
        gt=0,
    )

    @model_validator(mode="after")
    def _deepspeed_keys_fit(self) -> Engine:
        if self.name in ("single", "ddp") and (self.zero_stage is not None or self.deepspeed):
            key = "zero_stage" if self.zero_stage is not None else "deepspeed"
            raise ValueError(
                f"engine.{key} belongs to DeepSpeed, but engine.name={self.name}: set engine.name=deepspeed, "
                f"or drop engine.{key}"
            )
        zero = self.deepspeed.get("zero_optimization")
        given = {*self.deepspeed, *(f"zero_optimization.{key}" for key in (zero if isinstance(zero, Mapping) else ()))}
        owned = [
            f"engine.deepspeed.{key} is decided by {owner}: set that instead"
            for key, owner in OWNED_DEEPSPEED_KEYS.items()
            if key in given
        ]
        if owned:
            raise ValueError("\n".join(owned))
        return self

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed will run, whatever the world size."""
        asked_for = self.zero_stage is not None or bool(self.deepspeed)
        return self.name == "deepspeed" or (self.name == "auto" and asked_for)


def wire_conflicts(
    engine: Engine, *, local_steps: int, loose_steps: Mapping[str, int], logs_gradients: bool
) -> list[str]:
    """What is wrong about the settings of slow links together with others, a sentence each.

    They say what crosses ranks, so that on one process they change no number and are no error: the same config goes from a
    laptop to a cluster and back.

    Args:
        local_steps: train.local_steps.
        logs_gradients: whether train.log_gradients is set.
        loose_steps: by its name, each setting that is a number of steps after which all ranks need the same weights.
    """
    asked = [
        name
        for name, is_set in {
            "engine.gradient_wire=bf16": engine.gradient_wire == "bf16",
            "engine.powersgd": engine.powersgd is not None,
            f"train.local_steps={local_steps}": local_steps > 1,
        }.items()
        if is_set
    ]
    factors_or_weights = [name for name in asked if not name.startswith("engine.gradient_wire")]
    found = []
    if len(asked) > 1:
        found.append(f"{' and '.join(asked)} each say how ranks exchange what they learned: give one of them")
    if engine.is_deepspeed:
        found += _deepspeed_conflicts(engine, factors_or_weights)
    if engine.bucket_mb is not None and (factors_or_weights or engine.is_deepspeed):
        other = "DeepSpeed" if engine.is_deepspeed else factors_or_weights[0]
        found.append(f"engine.bucket_mb={engine.bucket_mb:g} is for ddp's whole gradients: {other} does without it")
    if engine.precision == "fp16" and (engine.powersgd is not None or local_steps > 1):
        found.append(
            f"{asked[-1]} with engine.precision=fp16: a loss scale that changes would mix gradients of different scales. "
            "Use bf16 or fp32"
        )
    if engine.powersgd is not None and engine.find_unused:
        found.append(
            "engine.powersgd with engine.find_unused: what earlier steps left over would move parameters that a step does "
            "not use. Set one of them only"
        )
    if local_steps > 1:
        found += _local_conflicts(local_steps, loose_steps, logs_gradients=logs_gradients)
    return found


def _local_conflicts(local_steps: int, loose_steps: Mapping[str, int], *, logs_gradients: bool) -> list[str]:
    """What cannot be had between two averages."""
    found = [
        f"{name}={steps} with train.local_steps={local_steps}: the ranks have one and the same model only after every "
        f"{local_steps}th step and at the end of an epoch. Use a multiple of {local_steps}"
        for name, steps in loose_steps.items()
        if steps % local_steps
    ]
    if logs_gradients:
        found.append(
            f"train.log_gradients measures the gradient of all ranks together, which train.local_steps={local_steps} never "
            "makes: set one of them to null or 1"
        )
    return found


def _deepspeed_conflicts(engine: Engine, factors_or_weights: Sequence[str]) -> list[str]:
    """What DeepSpeed cannot do of it. Measured on 0.19.8: with torch_autocast, ZeRO >= 1 does not heed the setting."""
    found = [
        f"{setting} is ddp's, but DeepSpeed exchanges gradients in its own way: use engine.name=ddp, or leave it out"
        for setting in factors_or_weights
    ]
    if engine.gradient_wire == "bf16" and engine.zero_stage and engine.precision != "fp32":
        found.append(
            f"engine.gradient_wire=bf16 with engine.precision={engine.precision} and engine.zero_stage={engine.zero_stage}: "
            "DeepSpeed would send fp32 all the same. Use engine.precision=fp32, ZeRO stage 0, or ddp"
        )
    if engine.gradient_wire == "bf16" and "communication_data_type" in engine.deepspeed:
        found.append("engine.deepspeed.communication_data_type is decided by engine.gradient_wire: set that instead")
    return found
