"""A hub of our own on this machine: as much of one as loading a model asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Hub:
    "Models by id and commit; the branch `main` may be moved while it runs."

    commits: dict[str, dict[str, Path]] = field(default_factory=dict)  # Id to commit to folder, oldest first
    address: str = ""
    after: tuple[str, Callable[[], object]] | None = None  # A file's name, and what happens once it was fetched

    def push(self, name: str, folder: Path) -> str:
        "Put a folder on `main`; its commit."
        commit = hashlib.sha1(f"{name} {folder}".encode(), usedforsecurity=False).hexdigest()
        self.commits.setdefault(name, {})[commit] = folder
        return commit

    def find(self, name: str, revision: str) -> tuple[str, Path] | None:
        "Commit and folder that a revision means now."
        known = self.commits.get(name, {})
        commit = list(known)[-1] if revision == "main" and known else revision
        return (commit, known[commit]) if commit in known else None


def answer(hub: Hub, path: str) -> tuple[int, dict[str, str], bytes]:
    "Status, headers and content of a request."
    parts = path.split("?")[0].strip("/").split("/")
    if parts[:2] == ["api", "models"]:
        name, kind = "/".join(parts[2:4]), parts[4:5]
        found = hub.find(name, parts[5] if kind else "main")
        if found is None:
            return 404, {"X-Error-Code": "RevisionNotFound" if name in hub.commits else "RepoNotFound"}, b"{}"
        if kind == ["tree"]:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        files = [{"rfilename": file.name} for file in sorted(found[1].iterdir())]
        info: dict[str, Any] = {"id": name, "sha": found[0], "siblings": files, "tags": [], "private": False}
        return 200, {}, json.dumps(info | {"cardData": {"license": "mit", "language": ["en"]}}).encode()
    found = hub.find("/".join(parts[:2]), parts[3]) if parts[2:3] == ["resolve"] else None
    file = found[1] / "/".join(parts[4:]) if found else None
    if found is None or file is None or not file.is_file():
        return 404, {"X-Error-Code": "EntryNotFound"}, b""
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return 200, {"X-Repo-Commit": found[0], "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}, content


@contextmanager
def served() -> Iterator[Hub]:
    "A hub that answers until the block ends; set `HF_ENDPOINT` to its address."
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, content = answer(hub, self.path)
            if status == 200 and (span := self.headers.get("Range")):
                first, _, last = span.removeprefix("bytes=").partition("-")
                end = min(int(last or len(content) - 1), len(content) - 1)
                headers["Content-Range"] = f"bytes {int(first)}-{end}/{len(content)}"
                status, content = 206, content[int(first) : end + 1]
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)
                if hub.after is not None and self.path.endswith(hub.after[0]):
                    happens, hub.after = hub.after[1], None
                    happens()

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *given: Any) -> None:
            "Say nothing."

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
