"""Logs the run: metrics.jsonl, TensorBoard, and log lines or a progress bar.

Only rank 0 writes; on other ranks every method does nothing.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from dtrain.console import log
from dtrain.runs.jsonl import MetricsLog


class Tracker:
    """The log of one run. Use it as a context manager, so that the bar and files are always closed."""

    def __init__(self, folder: Path, *, is_main: bool, total_steps: int, first_step: int, tensorboard: bool) -> None:
        """
        Args:
            first_step: steps that were taken before this process started.
            tensorboard: whether to write event files below the folder.
        """
        self._is_main = is_main
        self._begin = time.monotonic()
        self._since, self._examples = self._begin, 0
        self._total_steps, self._first_step = total_steps, first_step
        self._log = MetricsLog(folder / "metrics.jsonl") if is_main else None
        shows_bar = is_main and sys.stdout.isatty() and sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True) if shows_bar else None
        self._previous_handlers = _log_above_bar() if self._bar is not None else None
        self._board: Any = None
        if is_main and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Steps that are repeated hide what an earlier start wrote for them.
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._previous_handlers is not None:
            log.handlers[:] = self._previous_handlers
        if self._board is not None:
            with suppress(OSError):
                self._board.close()
        if self._log is not None:
            self._log.close()

    @property
    def seconds(self) -> float:
        """Wall time in seconds since this log was opened."""
        return time.monotonic() - self._begin

    def event(self, event: str, **values: Any) -> None:
        """Writes one line of metrics.jsonl, with wall and monotonic time."""
        if self._log is not None:
            self._log.write({"event": event, **values, "time_s": time.time(), "monotonic_s": time.monotonic()})

    def step(self, examples: int) -> None:
        """Counts one step."""
        self._examples += examples
        if self._bar is not None:
            self._bar.update()

    def train(self, **values: Any) -> None:
        """Writes a train event; monitors.protocol.StepRecord describes the values."""
        now = time.monotonic()
        rate = self._examples / max(now - self._since, 1e-9)
        self._since, self._examples = now, 0
        self.event("train", **values, examples_per_second=rate)
        if not self._is_main:
            return
        step = values["step"]
        for name in ("loss", "grad_norm", "learning_rate"):
            self._scalar(f"train/{name}", values[name], step)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:.0f} examples/s")
        else:
            remaining = (self._total_steps - step) * (now - self._begin) / max(step - self._first_step, 1)
            log.info(
                "step %*d/%d  epoch %.2f  loss %.4f  grad_norm %.3f  lr %.2e  %.0f examples/s  %s left",
                len(str(self._total_steps)),
                step,
                self._total_steps,
                values["epoch"],
                values["loss"],
                values["grad_norm"],
                values["learning_rate"],
                rate,
                _duration(remaining),
            )

    def evaluation(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Writes an eval event."""
        self.event("eval", step=step, **metrics, seconds=seconds)
        for name, value in metrics.items():
            self._scalar(f"eval/{name}", value, step)
        log.info("eval at step %d: %s", step, "  ".join(f"{name} {value:.6g}" for name, value in metrics.items()))

    def gradients(self, step: int, norms: Mapping[str, float]) -> None:
        """Writes a gradients event: the norm in each part of the model, before clipping."""
        self.event("gradients", step=step, norms=dict(norms))
        for name, value in norms.items():
            self._scalar(f"gradients/{name}", value, step)

    def step_time(self, step: int, values: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        """Writes a step_time event: where the time went on each rank.

        Args:
            scalars: what TensorBoard shows, by name.
        """
        self.event("step_time", step=step, **values)
        for name, value in scalars.items():
            self._scalar(name, value, step)

    def _scalar(self, name: str, value: float, step: int) -> None:
        if self._board is not None and math.isfinite(value):
            try:
                self._board.add_scalar(name, value, step)
            except OSError as error:  # a full disk does not end the run
                log.warning("tensorboard/ cannot be written any more: %s", error.strerror or error)
                self._board = None


class _BarHandler(logging.Handler):
    """Prints above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


def _log_above_bar() -> list[logging.Handler]:
    """Prints log records above the bar. Returns the handlers to restore later."""
    previous = list(log.handlers)
    handler = _BarHandler()
    for old in previous:
        handler.setFormatter(old.formatter)
        for log_filter in old.filters:
            handler.addFilter(log_filter)
    log.handlers[:] = [handler]
    return previous


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
