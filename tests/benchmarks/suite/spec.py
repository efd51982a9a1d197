"""What one process of a contestant is told, and what it answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.suite import machine
from tests.benchmarks.suite.workloads import Workload

LOSSES = 10
"""Steps whose mean loss is compared between contestants; also the steps between two log lines of each."""


@dataclass(frozen=True)
class Contestant:
    """A trainer, with its options.

    Attributes:
        name: in the table.
        kind: dtrain, raw, hf, accelerate or lightning: a module of suite/contestants.
        options: of that module.
        needs: a package besides torch and transformers.
        settings: dtrain's settings that this one sets; the tree must know them.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def unavailable(self) -> str | None:
        """Returns why this one cannot run here; None if it can."""
        if self.needs is not None and not machine.is_installed(self.needs):
            return "not installed"
        unknown = [key for key in self.settings if not knows(key)]
        return f"this tree has no {', '.join(unknown)}" if unknown else None

    def with_settings(self, **settings: Any) -> Contestant:
        return replace(self, settings={**self.settings, **settings})


RAW = Contestant("RAW", "raw")
RAW_COLLATING = Contestant("RAW, collating in the loop", "raw", {"collate_in_loop": True})
HF = Contestant("HF Trainer", "hf", needs="accelerate")
HF_GROUPED = Contestant("HF Trainer, group_by_length (other batches)", "hf", {"grouped": True}, needs="accelerate")
HF_FIXED = Contestant("HF Trainer, padded to 128", "hf", {"pad_to": 128}, needs="accelerate")
ACCELERATE = Contestant("Accelerate", "accelerate", needs="accelerate")
LIGHTNING = Contestant("Lightning", "lightning", needs="lightning")
DTRAIN = Contestant("dtrain", "dtrain")


def dtrain_with(**settings: Any) -> Contestant:
    """Returns dtrain with further settings, given as train__micro_batch_tokens=4096, and named by them."""
    named = {key.replace("__", "."): value for key, value in settings.items()}
    name = ", ".join(f"{key}={json.dumps(value)}" for key, value in named.items())
    return Contestant(f"dtrain, {name}", "dtrain", settings=named)


def knows(key: str) -> bool:
    """Returns whether this tree of dtrain has that setting, e.g. train.micro_batch_tokens."""
    from dtrain.config.schema import Config

    section, _, name = key.partition(".")
    field = Config.model_fields.get(section)
    return field is not None and name in getattr(field.annotation, "model_fields", {})


@dataclass(frozen=True)
class Spec:
    """One process of a contestant.

    Attributes:
        contestant: which, and its options.
        workload: what it trains.
        folder: of the workload.
        output: this process's own folder.
        steps: optimizer steps.
        ranks: processes of the job.
        core: first core to be bound to, counted among those that are allowed; None: not bound.
        eval_every: steps between evaluations; None: none.
        freeze: modules that do not learn, as paths below the model's base ("embeddings", "encoder.layer[:3]").
        save_every: steps between checkpoints; None: none.
        gate: socket of the driver; None: runs through.
        warm, block: see Gate.
        counted: counts tokens and collectives instead of being timed.
        laps: steps after which the counts of a lap end and the next one begins.
        traced: keeps the time at which each step ended.
        cache: folder of tokenized data and other caches; None: one for all runs of the workload.
        gpu: computes on the GPU, if there is one; else there is none for it.
    """

    contestant: Contestant
    workload: Workload
    folder: Path
    output: Path
    steps: int
    ranks: int = 1
    core: int | None = None
    eval_every: int | None = None
    freeze: tuple[str, ...] = ()
    save_every: int | None = None
    learning_rate: float = 5e-5
    gate: Path | None = None
    warm: int = 1
    block: int = 1
    counted: bool = False
    laps: tuple[int, ...] = ()
    traced: bool = False
    cache: Path | None = None
    gpu: bool = False

    def write(self) -> Path:
        """Writes the spec into its output folder and returns the file."""
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / "spec.json"
        path.write_text(json.dumps(asdict(self), default=str), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> Spec:
        data = json.loads(path.read_text(encoding="utf-8"))
        data["contestant"] = Contestant(**data["contestant"])
        data["workload"] = Workload.from_json(data["workload"])
        data["freeze"], data["laps"] = tuple(data["freeze"]), tuple(data["laps"])
        for name in ("folder", "output", "gate", "cache"):
            data[name] = Path(data[name]) if data[name] else None
        return cls(**data)

    @property
    def cache_folder(self) -> Path:
        return self.cache or self.folder / "cache"

    @property
    def epochs(self) -> int:
        """Passes over the data that the steps begin."""
        return -(-self.steps // self.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.workload.rows // self.global_batch)

    @property
    def global_batch(self) -> int:
        return self.workload.batch * self.ranks

    def order(self) -> list[list[int]]:
        """Returns the rows of each step, in dtrain's order: peers get the same batches, except one that groups rows."""
        from dtrain.data.order import StepPlan

        if self.contestant.options.get("grouped"):
            return self._grouped()
        plan = StepPlan(self.workload.rows, self.global_batch, self.workload.batch, seed=0, shuffle=True)
        return [plan.indices(step) for step in range(self.steps)]

    def _grouped(self) -> list[list[int]]:
        """Returns batches of train_sampling_strategy=group_by_length, in an order in which a block is like an epoch.

        Trainer itself takes them by falling length within 50 batches, so that a few steps would say little.
        """
        import torch
        from transformers.trainer_pt_utils import get_length_grouped_indices

        lengths, size, block = self.workload.lengths("train"), self.workload.batch, max(self.block, 4)
        rows = get_length_grouped_indices(lengths.tolist(), size, generator=torch.Generator().manual_seed(0))
        batches = sorted(
            (rows[start : start + size] for start in range(0, len(rows) - size + 1, size)),
            key=lambda batch: max(lengths[batch]),
        )
        rounds = -(-self.steps // block)
        picked = []
        for turn in range(rounds):
            for part in range(block):  # one batch of each part of the lengths
                picked.append(batches[int((part + (turn + 0.5) / rounds) * len(batches) / block)])
        return picked[: self.steps]

    def real_tokens(self, *, after: int = 0) -> int:
        """Returns the tokens of the steps' rows, without padding and without the first `after` steps."""
        lengths = self.workload.lengths("train")
        return int(sum(lengths[indices].sum() for indices in self.order()[after:]))
