"""Imports once, before the ranks are forked, what every rank will import; starts no thread and touches no device."""

from __future__ import annotations

from collections.abc import MutableMapping

ONE_THREAD = ("OPENBLAS_NUM_THREADS",)
"""Set to 1: this library, in numpy and scipy, starts a thread for each core at its import. torch does not use it."""


def preload(env: MutableMapping[str, str]) -> None:
    """Imports torch, transformers and dtrain's training code.

    Args:
        env: os.environ. torch's question whether there is a GPU goes to NVML, which leaves no CUDA context that would break
            the ranks' own.
    """
    for name in ONE_THREAD:
        env.setdefault(name, "1")
    env.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import datasets  # noqa: F401 - the ranks use them
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from dtrain.distributed import collectives, process_group  # noqa: F401
    from dtrain.job import cpu_sharing, rank_checks, session  # noqa: F401
    from dtrain.training import prepare_run, run_claim  # noqa: F401
