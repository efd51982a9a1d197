"""Imports once, before the ranks are forked, what every rank will import; starts no thread and touches no device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
import signal
from types import FrameType

from dtrain.distributed.topology import SINGLE
from dtrain.job.failure import interrupted_early
from dtrain.job.forked_ranks import STOP_SIGNALS

ONE_THREAD = ("OPENBLAS_NUM_THREADS",)
"""Set to 1: this library starts a thread for each core at its import. torch does not use it."""


def preload(env: MutableMapping[str, str]) -> None:
    """Imports torch, transformers and dtrain's training code.

    Args:
        env: os.environ. torch's question whether there is a GPU goes to NVML, which leaves no CUDA context that would break
            the ranks' own.

    Raises:
        Interrupted: a signal told the job to stop.
    """
    for name in ONE_THREAD:
        env.setdefault(name, "1")
    env.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    with _interruptible():
        import datasets  # noqa: F401 - the ranks use them
        import torch  # noqa: F401
        import transformers  # noqa: F401

        from dtrain.distributed import collectives, process_group  # noqa: F401
        from dtrain.job import cpu_sharing, rank_checks, session  # noqa: F401
        from dtrain.training import prepare_run  # noqa: F401


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets a signal end the imports. No helper thread, unlike signals.py: it would be one at the fork."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise interrupted_early(SINGLE, signal.Signals(number).name)

    handlers: dict[signal.Signals, Callable[..., object] | int | None] = {}
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            handlers[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
