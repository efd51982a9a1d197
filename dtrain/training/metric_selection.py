"""Which metrics an evaluation reports: the task's, or some of them, and those of a function of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from dtrain.config import schema
from dtrain.config.user_function import describe_error, import_function
from dtrain.errors import ConfigError
from dtrain.tasks.protocol import Task

RESERVED = ("loss", "event", "step", "seconds", "time_s", "monotonic_s")
"""What else stands in an `eval` line of metrics.jsonl."""


@dataclass(frozen=True)
class OwnMetrics:
    """A function of the user's: (predictions, references) in data order -> metrics by name. spec: what it is called."""

    spec: str
    function: Callable[..., Any]

    def __call__(self, records: Sequence[Mapping[str, Any]], *, taken: Sequence[str]) -> dict[str, float]:
        """Its metrics for the examples that have a reference.

        Args:
            records: one per example, with `prediction` and `reference`.
            taken: names of the task's own metrics.

        Raises:
            ConfigError: there is no reference, the function fails, or what it returns is no dict of new names and numbers.
        """
        judged = [record for record in records if record["reference"] is not None]
        if not judged:
            raise ConfigError(
                f"{self._called} has nothing to judge: this task writes no references (predictions/*.jsonl). Drop it."
            )
        try:
            found = self.function([record["prediction"] for record in judged], [r["reference"] for r in judged])
        except Exception as error:
            cause = describe_error(error, self.spec.partition(":")[0])
            raise ConfigError(f"{self._called} failed: {cause}. It is given two lists, in data order.") from error
        if not isinstance(found, Mapping):
            raise ConfigError(f"{self._called} returned {found!r:.100}: it must return a dict of names and numbers.")
        return {self._name(name, taken): self._number(name, value) for name, value in found.items()}

    @property
    def _called(self) -> str:
        return f"evaluation.factory={self.spec}"

    def _name(self, name: object, taken: Sequence[str]) -> str:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{self._called} returned a metric called {name!r}: a name must be text.")
        if name in (*RESERVED, *taken):
            raise ConfigError(f"{self._called} returned a metric called {name}, which is taken. Give it another name.")
        return name

    def _number(self, name: object, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):  # numpy's numbers are Real, tensors are not
            raise ConfigError(
                f"{self._called} returned {name}={value!r:.100}: a metric must be a number, e.g. float(x)."
            )
        return float(value)


@dataclass(frozen=True)
class Reported:
    """What is reported beside `loss`. chosen: of the task's metrics; None: all. own: further ones."""

    chosen: tuple[str, ...] | None = None
    own: OwnMetrics | None = None

    def of_task(self, task: Task) -> list[str]:
        """Names of the task's metrics that are reported, `loss` first."""
        return ["loss", *(name for name in task.metric_names if self.chosen is None or name in self.chosen)]


def reported(settings: schema.Evaluation, task: Task, *, folder: Path) -> Reported:
    """What the evaluation section asks for.

    Args:
        folder: of the config file, where `evaluation.factory` is looked for unless factory_folder says where.

    Raises:
        ConfigError: a metric that this task does not have, or a function that cannot be imported.
    """
    known = ("loss", *task.metric_names)
    if unknown := [name for name in settings.metrics or () if name not in known]:
        raise ConfigError(
            f"evaluation.metrics: {', '.join(unknown)} is not a metric of task.name={task.name}. "
            f"It has {', '.join(known)}; a split's prefix is left out here."
        )
    spec = settings.factory
    place = settings.factory_folder or folder
    own = None if spec is None else import_function(spec, folder=place, setting="evaluation.factory")
    return Reported(settings.metrics, None if own is None or spec is None else OwnMetrics(spec, own))
