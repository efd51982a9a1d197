"""What one host has to say of itself. Sent to it and run by `python -`: standard library only, whatever is there.

The first line, added by look.py, sets ASKED. Prints one JSON object. Nothing is written, and nothing stays behind.
"""

# ruff: noqa: F821 - ASKED

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


def versions() -> dict[str, str]:
    """Of the packages whose version may change an answer; without importing them."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_of(root: Path) -> str | None:
    """SHA-256 over dtrain's source files; None where there are none."""
    digest, files = hashlib.sha256(), sorted((root / "dtrain").rglob("*.py"))
    for file in files:
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest() if files else None


def machine() -> str | None:
    """The same for all processes here, and unlike any other machine's or container's; None where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return f"{boot} {socket.gethostname()}"


def free_port() -> int:
    """A port that nobody here listens on, at this moment."""
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def is_free(port: int | None) -> bool:
    """Whether this host could listen on that port."""
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


def resolved(names: list[str]) -> dict[str, str]:
    """The IPv4 address that this host finds for each name; names that do not resolve are left out."""
    found = {}
    for name in names:
        try:
            found[name] = str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
        except OSError:
            continue
    return found


def basics(asked: dict[str, Any]) -> dict[str, Any]:
    """What a job needs to know before it starts."""
    began = time.time()
    root = Path(asked["root"])
    return {
        "time": began,
        "host": socket.gethostname(),
        "machine": machine(),
        "python": platform.python_version(),
        "versions": versions(),
        "code": code_of(root),
        "folder": Path(asked["folder"]).is_dir(),
        "port": free_port(),
        "port_is_free": is_free(asked.get("port")),
        "cores": len(physical_cores(allowed_cpus())),
        "cpu_limit": cpu_time_limit(),
        "addresses": resolved(asked["hosts"]),
    }


if __name__ == "__main__":
    json.dump(basics(ASKED), sys.stdout)  # type: ignore[name-defined]
