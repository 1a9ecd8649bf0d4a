"""A look-alike of the Hugging Face hub on loopback: repository info, tree, files with ETag and Range, a "CDN" port.

    with serve({("dataset", "owner/name"): {"main": {"a.parquet": b"..."}}}) as hub:
        connect(monkeypatch, hub, tmp_path)      # for another process: env=os.environ | hub.environment(tmp_path)

Kinds are "model" and "dataset"; a revision is a branch, and its commit id is an answer too. Large files lie on the
second port. Files named in `gated` repositories need the token `TOKEN`. `hub.requests` lists what was asked;
`hub.cut[path] = [5, 0]` ends the next answers with that file after so many bytes.

`hub.faults["/api/"] = [503, "hang"]` spoils the next answers to requests with that in their path: a status, or one of
"hang" (no answer until the end), "gone" (the connection closes), "html" (a page), "loop" (a redirect to itself), "long"
and "short" (a Content-Length that lies).
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".parquet", ".safetensors", ".zip", "tokenizer.json")  # kept outside git, as on the hub
TOKEN = "hf_lookalike"
Repos = dict[tuple[str, str], dict[str, dict[str, bytes]]]


@dataclass
class Hub:
    repos: Repos
    gated: tuple[str, ...]
    url: str = ""
    cdn: str = ""
    requests: list[dict] = field(default_factory=list)
    cut: dict[str, list[int]] = field(default_factory=dict)
    faults: dict[str, list] = field(default_factory=dict)
    closed: threading.Event = field(default_factory=threading.Event)

    def commit(self, kind: str, repo: str, revision: str) -> str:
        """The commit id of a branch: a hash of what it holds."""
        content = [
            (name, hashlib.sha256(data).hexdigest())
            for name, data in sorted(self.repos[kind, repo][revision].items())
        ]
        return hashlib.sha1(json.dumps([kind, repo, revision, content]).encode()).hexdigest()

    def environment(self, cache: Path) -> dict[str, str]:
        """Environment variables that point another process at this hub, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "*",
        }


def connect(monkeypatch, hub: Hub, cache: Path, offline: bool = False) -> None:
    """Point huggingface_hub in this process at a hub, with a cache of its own and no token."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("NO_PROXY", "*")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    close_session()


@contextlib.contextmanager
def serve(repos: Repos, gated: tuple[str, ...] = ()) -> Iterator[Hub]:
    """Serve repositories until the block ends; a port is free again afterwards, so later requests are refused."""
    hub = Hub(repos, gated)
    servers = [
        ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
        for _ in range(2)
    ]
    hub.url, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.closed.set()
        for server in servers:
            server.shutdown()
            server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.0"  # a connection a request, so nothing outlives the server
    lie = 0  # added to the length of an answer

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path
        asked = {"method": self.command, "path": unquote(path)}
        self.hub.requests.append(
            {
                **asked,
                "range": self.headers.get("Range"),
                "token": self.headers.get("Authorization"),
            }
        )
        if self.headers.get("X-Fault") == "hang":
            return self.spoil("hang")
        if (
            fault := next(
                (f.pop(0) for part, f in self.hub.faults.items() if f and part in path), None
            )
        ) is not None:
            self.lie = {"long": 10, "short": -10}.get(fault, 0)
            if not self.lie:
                return self.spoil(fault)
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[0] == "cdn":
            return self.file(*self.large(parts[1]))
        if parts[0] == "api" and len(parts) >= 4 and parts[1] in ("models", "datasets"):
            kind, repo, rest = parts[1][:-1], "/".join(parts[2:4]), parts[4:]
            return self.api(kind, repo, rest or ["revision", "main"])
        kind = "dataset" if parts[0] == "datasets" else "model"
        parts = parts[kind == "dataset" :]
        if len(parts) < 5 or parts[2] != "resolve":
            return self.refuse(404, "NotFound")
        return self.resolve(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def branch(self, kind: str, repo: str, revision: str) -> str | None:
        """The branch of a revision (a branch or a commit id), or None after an answer that says what is not there."""
        if (kind, repo) not in self.hub.repos:
            return self.refuse(401, "RepoNotFound")
        for name in self.hub.repos[kind, repo]:
            if revision in (name, self.hub.commit(kind, repo, name)):
                return name
        return self.refuse(404, "RevisionNotFound")

    def api(self, kind: str, repo: str, rest: list[str]) -> None:
        branch = self.branch(kind, repo, rest[1])
        if branch is None:
            return None
        files = self.hub.repos[kind, repo][branch]
        if rest[0] == "revision":
            info = {
                "id": repo,
                "sha": self.hub.commit(kind, repo, branch),
                "gated": repo in self.hub.gated,
            }
            return self.json({**info, "siblings": [{"rfilename": name} for name in files]})
        folders = {
            "/".join(name.split("/")[:i]) for name in files for i in range(1, name.count("/") + 1)
        }
        tree = [
            {"type": "directory", "path": name, "oid": git_id(name.encode()), "size": 0}
            for name in sorted(folders)
        ]
        for name, data in files.items():
            entry = {"type": "file", "path": name, "oid": git_id(data), "size": len(data)}
            lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            tree.append(entry | {"lfs": lfs} if name.endswith(LARGE) else entry)
        return self.json(tree)

    def resolve(self, kind: str, repo: str, revision: str, name: str) -> None:
        branch = self.branch(kind, repo, revision)
        if branch is None:
            return None
        token = self.headers.get("Authorization")
        if repo in self.hub.gated and token != f"Bearer {TOKEN}":
            return self.refuse(403 if token else 401, "GatedRepo")
        commit = {"X-Repo-Commit": self.hub.commit(kind, repo, branch)}
        data = self.hub.repos[kind, repo][branch].get(name)
        if data is None:
            return self.refuse(404, "EntryNotFound", commit)
        if not name.endswith(LARGE):
            return self.file(name, data, {"ETag": f'"{git_id(data)}"', **commit})
        key = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-ETag": f'"{key}"', "X-Linked-Size": str(len(data))}
        return self.answer(302, b"", {"Location": f"{self.hub.cdn}/cdn/{key}", **linked, **commit})

    def large(self, key: str) -> tuple[str, bytes, dict]:
        branches = [branch for repo in self.hub.repos.values() for branch in repo.values()]
        files = [file for branch in branches for file in branch.items()]
        name, data = next(
            (name, data) for name, data in files if hashlib.sha256(data).hexdigest() == key
        )
        return name, data, {"ETag": f'"{key}"'}

    def file(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        part = data[start:]
        cuts = self.hub.cut.get(name) if self.command == "GET" else None
        if start:
            headers = {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        self.answer(
            206 if start else 200,
            part,
            {"Accept-Ranges": "bytes", **headers},
            cuts.pop(0) if cuts else None,
        )

    def json(self, value) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def spoil(self, fault: int | str) -> None:
        """An answer that is none."""
        if fault == "hang":
            self.hub.closed.wait()
        elif fault == "html":
            self.answer(
                200, b"<html>Please log in to this network</html>", {"Content-Type": "text/html"}
            )
        elif fault == "loop":
            self.answer(302, b"", {"Location": self.path})
        elif fault != "gone":
            self.answer(fault, b"<html>sorry</html>", {"Content-Type": "text/html"})

    def answer(
        self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(max(len(body) + self.lie, 0)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])


def git_id(data: bytes) -> str:
    """The id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
