"""The errors that users see. Each has the exit code of the process that it ends.

Raise them for what a user can fix. Use `assert` for mistakes in dtrain itself.
"""

from __future__ import annotations


class DtrainError(Exception):
    """Base of all errors with a message for the user: what was found, why it is wrong, and the fix."""

    exit_code = 1
    is_reported_elsewhere = False
    """Whether another rank raises and prints the same error, so that this rank need not print it."""
    is_recorded = True
    """Whether exit.json may record the error. False if the run folder belongs to another run."""


class ConfigError(DtrainError):
    """A wrong setting or argument, or settings that do not work together."""

    exit_code = 2


class DataError(DtrainError):
    """A file, row, column or label that cannot be used, or data that differs between nodes."""

    exit_code = 3


class TopologyError(DtrainError):
    """The ranks cannot form a job, or the job has lost ranks: launcher variables, addresses, connections."""

    exit_code = 4


class DeviceError(DtrainError):
    """A fault of one rank's GPU, of its driver, or of NCCL. The message names that rank where there are several.

    Attributes:
        exit_code: 4 where ranks cannot reach each other, or have no GPU of their own.
        is_bug: whether the traceback helps too.
    """

    is_bug = False

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class NonFiniteError(DtrainError):
    """A loss or gradient that is not finite, with `train.non_finite=stop`."""

    exit_code = 5


class CheckpointError(DtrainError):
    """A model or checkpoint that cannot be written, or cannot be read where one is required."""

    exit_code = 6


class Preempted(DtrainError):
    """A signal or `train.max_minutes` stopped the run after it saved a checkpoint. The same command resumes it."""

    exit_code = 75


class Interrupted(KeyboardInterrupt):
    """The user or the launcher stopped the job (SIGINT, SIGTERM), and nothing was saved.

    A KeyboardInterrupt, because libraries let it pass. Many of them catch an Exception or wrap it in one of their own.

    Attributes:
        exit_code: 75 where nothing was lost either, because nothing was trained yet.
    """

    exit_code = 1

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


NON_RETRYABLE_CODES = (ConfigError.exit_code, DataError.exit_code, CheckpointError.exit_code)
"""Exit codes of errors that the same command would run into again."""

FINAL_CODES = (0, *NON_RETRYABLE_CODES, Preempted.exit_code)
"""Exit codes after which a launcher does not start ranks again: the same error would come again, or all is saved."""

ERROR_TYPES: dict[str, type[DtrainError]] = {
    error_type.__name__: error_type
    for error_type in (
        DtrainError,
        ConfigError,
        DataError,
        TopologyError,
        NonFiniteError,
        CheckpointError,
        Preempted,
    )
}
"""Error types by name, so that ranks can exchange errors as JSON."""
