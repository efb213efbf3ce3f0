"""A stand-in for the Hub on loopback: repositories of files, with revisions, private and gated ones."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_cache(cache: Path, repository: str, files: dict[str, bytes], commit: str = COMMIT) -> None:
    """Lay files out as the Hub client's cache does."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    for name, content in files.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(content)
        link = root / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.reply(body=False)

    def do_GET(self):
        self.reply(body=True)

    def reply(self, body):
        hub = self.server.hub
        hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
        parts = self.path.lstrip("/").split("/")
        repository, rest = "/".join(parts[:2]), parts[2:]
        if repository not in hub.repositories or (
            repository in hub.private and self.headers.get("Authorization") != "Bearer secret"
        ):
            return self.refuse(401 if repository in hub.private else 404, "RepoNotFound")
        if repository in hub.gated:
            return self.refuse(403, "GatedRepo")
        if rest[:1] != ["resolve"] or rest[1] not in ("main", "v1", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        content = hub.repositories[repository].get("/".join(rest[2:]))
        if content is None:
            return self.refuse(404, "EntryNotFound")
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/octet-stream")
        self.end_headers()
        if body:
            self.wfile.write(content)
        return None

    def do_POST(self):
        """What an upload asks: make a repository, or a branch; which way files go; commit them."""
        hub, body = self.server.hub, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
        if self.headers.get("Authorization") != "Bearer secret":
            return self.refuse(401, "RepoNotFound")
        parts = self.path.partition("?")[0].strip("/").split("/")
        repository, what = "/".join(parts[2:4]), parts[4:]
        lines, url = [json.loads(line) for line in body.splitlines()], f"http://{self.headers['Host']}"
        if parts == ["api", "repos", "create"]:
            owner, name = lines[0].get("organization", "me"), lines[0]["name"]
            hub.repositories.setdefault(f"{owner}/{name}", {})
            return self.answer({"url": f"{url}/{owner}/{name}", "id": f"{owner}/{name}"})
        if what[0] == "branch":
            return self.answer({})
        if what[0] == "preupload":
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in lines[0]["files"]]
            return self.answer({"files": modes})
        for line in lines:
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                hub.repositories[repository][line["value"]["path"]] = content
        hub.commits.append((repository, what[1], lines[0]["value"]["summary"]))
        pull = {"pullRequestUrl": f"{url}/{repository}/discussions/1"} if "create_pr=1" in self.path else {}
        return self.answer({"commitUrl": f"{url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT, **pull})

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


class Hub:
    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []
        self.commits: list[tuple[str, str, str]] = []

    @contextlib.contextmanager
    def serving(self):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.hub = self
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
