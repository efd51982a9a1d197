"""Collects facts about one host. Sent to the host and run by `python -`, so it uses the standard library only.

The first line, added by preflight.py, sets REQUEST. Prints one JSON object. Writes nothing to the host's disks.
"""

# ruff: noqa: F821 - REQUEST

from __future__ import annotations

import hashlib
import json
import platform
import socket
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from dtrain.distributed.cpu import allowed_cpus, cpu_time_limit, physical_cores

PACKAGES = ("torch", "transformers", "datasets", "deepspeed", "numpy", "safetensors", "tokenizers")


def package_versions() -> dict[str, str]:
    """Returns the versions of packages that may change results, without importing them."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def hash_source(root: Path) -> str | None:
    """Returns the SHA-256 of dtrain's source files; None if there are none."""
    digest, files = hashlib.sha256(), sorted((root / "dtrain").rglob("*.py"))
    for file in files:
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest() if files else None


def machine_id() -> str | None:
    """Returns an ID that is the same for all processes of one machine or container only; None if it is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return f"{boot} {socket.gethostname()}"


def find_free_port() -> int:
    """Returns a port of this host that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def is_port_free(port: int | None) -> bool:
    """Returns whether this host can listen on a port; True for None."""
    if port is None:
        return True
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError:
            return False
    return True


def resolve_names(names: list[str]) -> dict[str, str]:
    """Returns the IPv4 address that this host resolves each name to; names that do not resolve are left out."""
    addresses = {}
    for name in names:
        try:
            addresses[name] = str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
        except OSError:
            continue
    return addresses


def collect_basic_facts(request: dict[str, Any]) -> dict[str, Any]:
    """Returns the facts that a job needs before it starts.

    Args:
        request: `root`, dtrain's checkout; `folder`, the working folder; `hosts`, names to resolve; and optionally
            `port`, one to test.
    """
    began = time.time()
    root = Path(request["root"])
    return {
        "time": began,
        "host": socket.gethostname(),
        "machine": machine_id(),
        "python": platform.python_version(),
        "versions": package_versions(),
        "code": hash_source(root),
        "folder": Path(request["folder"]).is_dir(),
        "port": find_free_port(),
        "port_is_free": is_port_free(request.get("port")),
        "cores": len(physical_cores(allowed_cpus())),
        "cpu_limit": cpu_time_limit(),
        "addresses": resolve_names(request["hosts"]),
    }


if __name__ == "__main__":
    json.dump(collect_basic_facts(REQUEST), sys.stdout)  # type: ignore[name-defined]
