"""dtrain, as a user runs it: a config file and dtrain.fit. Whatever the tree does by default is what is measured."""

from __future__ import annotations

import json
from typing import Any

from tests.benchmarks.suite.gate import Gate
from tests.benchmarks.suite.spec import LOSSES, Spec


def config_of(spec: Spec) -> dict[str, Any]:
    """Returns the config: defaults, except what the workload says and what would make files that peers do not."""
    config: dict[str, Any] = {
        "run": {"name": "dtrain", "output_dir": str(spec.output)},
        "task": {"name": "classification"},
        "model": {"name_or_path": str(spec.folder / "model")},
        "data": {"path": str(spec.folder), "max_length": 128, "cache_dir": str(spec.cache_folder)},
        "optim": {"learning_rate": spec.learning_rate},
        "train": {
            "global_batch_size": spec.global_batch,
            "micro_batch_size": spec.workload.batch,
            "max_steps": spec.steps,
            "eval_every": spec.eval_every or "never",
            "log_every": LOSSES,
            "hang_timeout": None,  # a contestant waits for its turn, for as long as the others compute
        },
        "checkpoint": {"every": spec.save_every},
        "tracking": {"tensorboard": False},
    }
    if spec.freeze:
        config["freeze"] = {"modules": list(spec.freeze)}
    if "train.micro_batch_tokens" in spec.contestant.settings:
        del config["train"]["micro_batch_size"]  # one of them says how a step is cut
    for key, value in spec.contestant.settings.items():
        section, _, name = key.partition(".")
        config.setdefault(section, {})[name] = value
    return config


def train(spec: Spec, gate: Gate) -> list[float]:
    """Runs dtrain.fit; returns the loss of each step."""
    import dtrain

    path = spec.output / "dtrain.yaml"
    path.write_text(json.dumps(config_of(spec)), encoding="utf-8")  # JSON is YAML
    losses: list[float] = []

    class AtTheGate:
        """A monitor: it is called after each step and its evaluation."""

        def needs_at_once(self, _end: Any) -> bool:
            """On a GPU a step may be counted while the next one is computed: nobody waits for its loss."""
            return False

        def after_step(self, record: Any) -> None:
            losses.append(record.loss)
            gate.after_step()

    dtrain.fit(dtrain.load_config(path, []), monitors=[AtTheGate()])  # type: ignore[list-item]  # None continues
    return losses
