"""Reports of healthy hosts, for tests of the doctor's checks."""

from __future__ import annotations

from typing import Any

from dtrain.cluster.doctor.findings import OK, Finding
from dtrain.cluster.doctor.host_checks import HostReport

GIB = 1 << 30

SHM = {"path": "/dev/shm", "total": 16 * GIB, "free": 16 * GIB, "writable": True}

DISK = {"path": "/data", "total": 500 * GIB, "free": 100 * GIB, "writable": True}

FACTS: dict[str, Any] = {
    "host": "node",
    "python": "3.11.7",
    "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"},
    "code": "0123456789abcdef",
    "folder": True,
    "port": 40000,
    "cores": 8,
    "addresses": {"node1": "10.0.0.1", "node2": "10.0.0.2", "node3": "10.0.0.3"},
    "own_address": "10.0.0.1",
    "open_files": [65536, 1 << 20],
    "locked_memory": [8 << 20, 8 << 20],
    "shm": SHM,
    "runs": DISK,
    "hf_cache": {**DISK, "path": "/cache"},
    "memory": {"total": 64 * GIB, "available": 60 * GIB},
    "cpu_limit": None,
    "infiniband": [],
    "gpus": None,
}

GPUS = {"names": ["H200", "H200"], "driver": "570.1", "cuda": "12.8", "usable": 2, "nccl": "2.27.3"}


def healthy(host: str, *, slots: int = 2, offset_s: float = 0.0, **facts: Any) -> HostReport:
    """Returns the report of a healthy host, with the given facts changed."""
    return HostReport(host, slots, "", {**FACTS, "machine": host, **facts}, offset_s)


def not_ok(findings: list[Finding]) -> list[Finding]:
    """Returns the findings with the states `warn` and `red`."""
    return [finding for finding in findings if finding.state != OK]
