"""Settings of the optimizer and of the learning rate schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from dtrain.config.fields import Beta, Section, setting


class OptimGroup(Section):
    """Modules that train with another learning rate or weight decay."""

    modules: tuple[str, ...] = setting(
        (), "paths as in freeze.modules: [embeddings, 'encoder.layer[:2]']", min_length=1
    )
    learning_rate: float | None = setting(None, "their peak learning rate; default: the others'", gt=0)
    weight_decay: float | None = setting(
        None, "their weight decay, not for biases and norm layers; default: the others'", ge=0
    )

    @model_validator(mode="after")
    def _sets_something(self) -> OptimGroup:
        if self.learning_rate is None and self.weight_decay is None:
            raise ValueError("a group of optim.groups sets learning_rate, weight_decay or both")
        return self


class Optim(Section):
    """The optimizer."""

    name: Literal["adamw", "sgd", "adafactor"] = setting("adamw", "torch.optim's AdamW, SGD or Adafactor")
    learning_rate: float = setting(5e-5, "peak learning rate", gt=0)
    weight_decay: float = setting(0.01, "decoupled weight decay; not applied to biases and norm layers", ge=0)
    max_grad_norm: float | None = setting(1.0, "clip the gradient's global L2 norm to this; null: no clipping", gt=0)
    betas: tuple[Beta, Beta] = setting((0.9, 0.999), "AdamW's betas")
    eps: float = setting(1e-8, "AdamW's eps", gt=0)
    momentum: float = setting(0.0, "SGD's momentum", ge=0, lt=1)
    groups: tuple[OptimGroup, ...] = setting(
        (), "other rates for some modules: [{modules: [...], learning_rate: ..., weight_decay: ...}]"
    )
    layer_decay: float | None = setting(
        None,
        "each layer's learning rate is this times that of the layer above; the head's is learning_rate",
        gt=0,
        le=1,
    )


USED_BY = {
    "min_ratio": ("cosine", "polynomial", "warmup_stable_decay"),
    "decay_steps": ("warmup_stable_decay",),
    "decay_ratio": ("warmup_stable_decay",),
    "decay_shape": ("warmup_stable_decay",),
    "cycles": ("cosine_with_restarts",),
    "power": ("polynomial",),
    "timescale": ("inverse_sqrt",),
}
"""Settings of a schedule that only some of them use."""


class Schedule(Section):
    """The learning rate schedule, by its Hugging Face name."""

    name: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = setting("linear", "shape after the warm-up: cosine, constant, ...; the names of Hugging Face")
    warmup_steps: int | None = setting(None, "steps of the linear warm-up from 0", ge=0)
    warmup_ratio: float | None = setting(None, "warm-up as a share of all steps", ge=0, le=1)
    min_ratio: float | None = setting(
        None,
        "cosine, polynomial, warmup_stable_decay: last learning rate as a share of the peak; default: 0",
        ge=0,
        lt=1,
    )
    decay_steps: int | None = setting(None, "warmup_stable_decay: steps of the decay at the end", ge=1)
    decay_ratio: float | None = setting(
        None, "warmup_stable_decay: the decay as a share of all steps; default: 0.1", gt=0, le=1
    )
    decay_shape: Literal["linear", "cosine", "1-sqrt"] | None = setting(
        None, "warmup_stable_decay: shape of the decay; default: linear"
    )
    cycles: int | None = setting(None, "cosine_with_restarts: number of cycles; default: 1", ge=1)
    power: float | None = setting(None, "polynomial: its power; default: 1", gt=0)
    timescale: int | None = setting(None, "inverse_sqrt: its time scale in steps; default: the warm-up's", ge=1)

    @model_validator(mode="after")
    def _one_warmup(self) -> Schedule:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("set schedule.warmup_steps or schedule.warmup_ratio, not both: set the other to null")
        if self.name == "constant" and (self.warmup_steps or self.warmup_ratio):
            key = "warmup_steps" if self.warmup_steps else "warmup_ratio"
            raise ValueError(
                f"schedule.name=constant has no warm-up: use constant_with_warmup, or set schedule.{key}=null"
            )
        return self

    @model_validator(mode="after")
    def _settings_of_this_schedule(self) -> Schedule:
        for key, names in USED_BY.items():
            if getattr(self, key) is not None and self.name not in names:
                raise ValueError(
                    f"schedule.{key} is for schedule.name={' or '.join(names)}, but schedule.name is {self.name}: "
                    f"remove schedule.{key}, or choose the other schedule"
                )
        if self.decay_steps is not None and self.decay_ratio is not None:
            raise ValueError("set schedule.decay_steps or schedule.decay_ratio, not both: set the other to null")
        return self
