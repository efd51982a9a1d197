"""The errors that users meet, each with the exit code of a process that ends with it.

Raise these for what a user can mend; `assert` for what only we can break.
"""

from __future__ import annotations


class DtrainError(Exception):
    """Base of all errors with a message for the user. The message says what was found, why it is wrong and the fix."""

    exit_code = 1


class ConfigError(DtrainError):
    """A setting, an argument, or a refused combination of them."""

    exit_code = 2


class DataError(DtrainError):
    """A file, row, column or label that cannot be used, or data that differs between nodes."""

    exit_code = 3


class TopologyError(DtrainError):
    """Ranks, launchers, addresses: the job as a whole cannot be formed or has fallen apart."""

    exit_code = 4


class NonFiniteError(DtrainError):
    """A loss or gradient that is not finite, where `train.non_finite` says stop."""

    exit_code = 5


class CheckpointError(DtrainError):
    """A model or checkpoint that cannot be written, or read where one is required."""

    exit_code = 6


class Interrupted(DtrainError):
    """The user or the launcher asked the job to stop (SIGINT, SIGTERM) and nothing could be saved."""

    exit_code = 1


KINDS: dict[str, type[DtrainError]] = {
    kind.__name__: kind
    for kind in (DtrainError, ConfigError, DataError, TopologyError, NonFiniteError, CheckpointError, Interrupted)
}
"""By name, so that an error can cross ranks as JSON."""
