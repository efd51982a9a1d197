"""The errors that users meet, each with the exit code of a process that ends with it.

Raise these for what a user can mend; `assert` for what only we can break.
"""

from __future__ import annotations


class DtrainError(Exception):
    """Base of all errors with a message for the user. The message says what was found, why it is wrong and the fix.

    is_said_elsewhere: another rank raises the very same and prints it, so that this one need not.
    is_noted: exit.json may tell; not where the run folder is another run's.
    """

    exit_code = 1
    is_said_elsewhere = False
    is_noted = True


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


class Preempted(DtrainError):
    """Asked to stop (a signal, `train.max_minutes`), and stopped with a checkpoint: the same command goes on from it."""

    exit_code = 75


class Interrupted(KeyboardInterrupt):
    """The user or the launcher asked the job to stop (SIGINT, SIGTERM) and nothing could be saved.

    A KeyboardInterrupt, which libraries let through; many swallow an Exception or wrap it in one of their own.
    """

    exit_code = 1


KINDS: dict[str, type[DtrainError]] = {
    kind.__name__: kind
    for kind in (
        DtrainError,
        ConfigError,
        DataError,
        TopologyError,
        NonFiniteError,
        CheckpointError,
        Preempted,
    )
}
"""By name, so that an error can cross ranks as JSON."""
