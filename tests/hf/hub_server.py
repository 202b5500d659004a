"""A Hub in memory, on loopback: as much of its API as `create_repo` and `upload_folder` speak."""

import base64
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Commit(NamedTuple):
    message: str
    files: tuple[str, ...]


class Hub:
    """What the server holds.

    Attributes:
        url: The endpoint.
        repos: The files of each repository.
        commits: Every commit, in order.
        created: The bodies of the requests that create repositories.
        broken: Whether commits are refused.
        gate: Cleared, it holds commits back.
    """

    def __init__(self):
        self.url = ""
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[Commit] = []
        self.created: list[dict] = []
        self.tokens: set[str | None] = set()
        self.broken = self.refuses_repos = False
        self.gate = threading.Event()
        self.gate.set()

    def create(self, body):
        if self.refuses_repos:
            return 403, {"error": "You don't have the rights to create a model"}
        asked = json.loads(body)
        self.created.append(asked)
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        known = name in self.repos
        self.repos.setdefault(name, {})
        return (409 if known else 200), {"url": f"{self.url}/{name}", "name": name, "id": "1"}

    def preupload(self, body):
        asked = json.loads(body)["files"]
        return 200, {
            "files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in asked]
        }

    def commit(self, name, body):
        assert self.gate.wait(20)
        if self.broken:
            return 403, {"error": "the disk of the Hub is full"}
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        new = {v["path"]: base64.b64decode(v["content"]) for k, v in map(dict.values, lines) if k == "file"}
        message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        self.repos[name].update(new)
        self.commits.append(Commit(message, tuple(sorted(new))))
        oid = f"{len(self.commits):040x}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}

    def answer(self, method, path, body):
        path = path.split("?")[0]
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "id": "u", "name": "tester", "orgs": []}
        if path == "/api/repos/create":
            return self.create(body)
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if found := re.match(r"/api/models/([^/]+/[^/]+)/preupload/", path):
            return self.preupload(body)
        if found := re.match(r"/api/models/([^/]+/[^/]+)/commit/", path):
            return self.commit(found[1], body)
        if found := re.match(r"/api/models/([^/]+/[^/]+)(/revision/.+)?$", path):
            return 200, {"id": found[1], "modelId": found[1], "sha": "0" * 40, "tags": [], "siblings": []}
        return 404, {"error": f"{method} {path}"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def handle_any(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.hub.tokens.add(self.headers.get("Authorization"))
        status, answer = self.server.hub.answer(self.command, self.path, body)
        raw = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any


@contextmanager
def serving():
    """A `Hub`, while its server runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = Hub()
    server.hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.hub.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()
