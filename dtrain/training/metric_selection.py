"""Selects the metrics that an evaluation reports: all or some of the task's, and those of the user's own function."""

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
"""The other fields of an `eval` line of metrics.jsonl."""


@dataclass(frozen=True)
class UserMetrics:
    """The user's function, which maps (predictions, references) in data order to metrics by name.

    Attributes:
        spec: package.module:function.
        function: imported from there.
    """

    spec: str
    function: Callable[..., Any]

    def __call__(self, records: Sequence[Mapping[str, Any]], *, task_names: Sequence[str]) -> dict[str, float]:
        """Returns its metrics for the examples that have a reference.

        Args:
            records: one per example, with `prediction` and `reference`.
            task_names: names of the task's metrics.

        Raises:
            ConfigError: there is no reference, the function fails, or it does not return a dict of new names and numbers.
        """
        labeled = [record for record in records if record["reference"] is not None]
        if not labeled:
            raise ConfigError(
                f"{self._setting} cannot be used: this task writes no references (predictions/*.jsonl). Remove it."
            )
        try:
            metrics = self.function([record["prediction"] for record in labeled], [r["reference"] for r in labeled])
        except Exception as error:
            cause = describe_error(error, self.spec.partition(":")[0])
            raise ConfigError(f"{self._setting} failed: {cause}. It gets two lists, in data order.") from error
        if not isinstance(metrics, Mapping):
            raise ConfigError(f"{self._setting} returned {metrics!r:.100}: it must return a dict of names and numbers.")
        return {self._name(name, task_names): self._number(name, value) for name, value in metrics.items()}

    @property
    def _setting(self) -> str:
        return f"evaluation.factory={self.spec}"

    def _name(self, name: object, task_names: Sequence[str]) -> str:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{self._setting} returned a metric called {name!r}: a name must be text.")
        if name in (*RESERVED, *task_names):
            raise ConfigError(
                f"{self._setting} returned a metric called {name}, but another metric has that name. Rename it."
            )
        return name

    def _number(self, name: object, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):  # numpy's numbers are Real, tensors are not
            raise ConfigError(
                f"{self._setting} returned {name}={value!r:.100}: a metric must be a number, e.g. float(x)."
            )
        return float(value)


@dataclass(frozen=True)
class Reported:
    """The metrics that are reported in addition to `loss`.

    Attributes:
        chosen: names of the task's metrics; None selects all.
        user: the user's metric function, if there is one.
    """

    chosen: tuple[str, ...] | None = None
    user: UserMetrics | None = None

    def of_task(self, task: Task) -> list[str]:
        """Returns the names of the task's metrics that are reported, `loss` first."""
        return ["loss", *(name for name in task.metric_names if self.chosen is None or name in self.chosen)]


def reported(settings: schema.Evaluation, task: Task, *, folder: Path) -> Reported:
    """Returns what the evaluation section selects.

    Args:
        folder: of the config file; `evaluation.factory` is looked up there unless factory_folder is set.

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
    if spec is None:
        return Reported(settings.metrics)
    function = import_function(spec, folder=place, setting="evaluation.factory")
    return Reported(settings.metrics, UserMetrics(spec, function))


def check_best(config: schema.Config, names: Sequence[str]) -> None:
    """Refuses an `evaluation.best.metric` that no evaluation of this run will have."""
    best = config.evaluation.best
    if best is not None and best.metric not in names:
        known = (
            f"This task has {', '.join(names)}"
            if names
            else "There is nothing to evaluate: set data.validation_fraction or data.splits"
        )
        raise ConfigError(f"evaluation.best.metric={best.metric} is not a metric of this run. {known}.")
