"""A hub of local folders: enough of the Hugging Face hub's HTTP interface for from_pretrained and load_dataset.

A test serves `models` and `datasets` (name -> folder), gives the address to a subprocess as HF_ENDPOINT (read once, at
import) and takes away what it wants to see missing.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Hub:
    """A running server. requests: "METHOD path" of all that was asked."""

    address: str
    lost: Callable[[str], bool]
    requests: list[str] = field(default_factory=list)


@contextmanager
def serve_hub(
    *, models: Mapping[str, Path], datasets: Mapping[str, Path], lost: Callable[[str], bool] = lambda request: False
) -> Iterator[Hub]:
    """Serves the folders on a free port of this machine until the block ends.

    Args:
        lost: answers "METHOD path" requests for which it is true as if there were no such file.
    """
    hub = Hub("", lost)
    folders = {("models", name): folder for name, folder in models.items()}
    folders |= {("datasets", name): folder for name, folder in datasets.items()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub, folders))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, folders: Mapping[tuple[str, str], Path], *args: Any) -> None:
        self._hub = hub
        self._folders = folders
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        request = f"{self.command} {self.path}"
        self._hub.requests.append(request)
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = self._folders.get((kind, name))
        if folder is None:
            self._error("RepoNotFound")
        elif self._hub.lost(request):
            self._error("EntryNotFound")
        elif not is_api:
            self._file(folder, "/".join(rest[2:]))  # resolve/<revision>/<path>
        elif not rest or rest[0] == "revision":
            self._json(_info(name, folder))
        elif rest[0] == "tree":
            self._tree(folder, "/".join(rest[2:]))
        elif rest[0] == "paths-info":
            self._json(_paths_info(folder, body))
        else:
            self._error("EntryNotFound")

    def _tree(self, folder: Path, below: str) -> None:
        place = folder / below
        if not place.is_dir():
            return self._error("EntryNotFound")
        deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
        return self._json([_entry(folder, path) for path in sorted(place.rglob("*") if deep else place.iterdir())])

    def _file(self, folder: Path, path: str) -> None:
        file = folder / path
        if not file.is_file():
            return self._error("EntryNotFound")
        content = file.read_bytes()
        start, total = 0, len(content)
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, content = int(first), content[int(first) : int(last) + 1 if last else None]
        headers = {"ETag": f'"{_sha1(file.read_bytes())}"', "X-Repo-Commit": _commit(folder), "Accept-Ranges": "bytes"}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{total}"
        return self._send(206 if wanted else 200, content, headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _info(name: str, folder: Path) -> dict[str, Any]:
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        "id": name,
        "sha": _commit(folder),
        "private": False,
        "gated": False,
        "tags": [],
        "siblings": [{"rfilename": file} for file in files],
    }


def _paths_info(folder: Path, body: bytes) -> list[dict[str, Any]]:
    text = body.decode()
    paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
    return [_entry(folder, folder / path) for path in paths if (folder / path).exists()]


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": _sha1(name.encode()), "size": 0}
    return {"type": "file", "path": name, "oid": _sha1(path.read_bytes()), "size": path.stat().st_size}


def _commit(folder: Path) -> str:
    """A commit as the hub writes it, of 40 hex digits, that follows the content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return _sha1("".join(_sha1(file.read_bytes()) + file.name for file in files).encode())


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
