"""Local server that implements the endpoints of the Hugging Face Hub that the tests need."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_token_of_a_test"


class Hub:
    """Repositories on a local Hub, with a log of requests.

    Attributes:
        address: URL of the server.
        commits: For each repository, a dict from commit hashes to the files in the commits.
        revisions: For each repository, the commit hash of each branch and tag.
        private: Names of private repositories.
        blobs: Uploaded large files, keyed by SHA-256.
        asked: Method, path and token of each request.
    """

    def __init__(self, port: int):
        self.address = f"http://127.0.0.1:{port}"
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.revisions: dict[str, dict[str, str]] = {}
        self.private: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str]] = []

    def create(self, repository: str) -> None:
        self.commits[repository], self.revisions[repository] = {}, {}
        self.commit(repository, {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        """Add files to the main branch of a repository and return the new commit's hash."""
        commits, revisions = self.commits[repository], self.revisions[repository]
        content = {**commits.get(revisions.get("main", ""), {}), **files}
        parts = [f"{name}:{_sha1(data)}" for name, data in sorted(content.items())]
        sha = hashlib.sha1(f"{repository} {parts}".encode()).hexdigest()
        commits[sha], revisions["main"] = content, sha
        return sha

    def add(self, repository: str, folder: Path) -> str:
        """Create a repository with the files in a folder and return the commit's hash."""
        self.create(repository)
        return self.commit(repository, {path.name: path.read_bytes() for path in folder.iterdir()})

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        sha = self.revisions[repository].get(revision, revision)
        return self.commits[repository][sha]


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _sha1(data)}
    if path.endswith(".safetensors"):
        sha256 = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10
    hub: Hub

    def do_GET(self) -> None:  # noqa: N802 - name required by the base class
        self._answer()

    def do_HEAD(self) -> None:  # noqa: N802
        self._answer()

    def do_POST(self) -> None:  # noqa: N802
        self._answer()

    def do_PUT(self) -> None:  # noqa: N802
        self._answer()

    def log_message(self, *args) -> None:
        """Disable the logging of requests."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.asked.append((self.command, path, self.token))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = path.split("/")
        if self.command in ("POST", "PUT"):
            self._write(path, parts, body)
        elif parts[:2] == ["api", "models"]:
            self._describe("/".join(parts[2:4]), parts[4:])
        elif len(parts) < 4:
            self._send(404, {})
        else:
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _write(self, path: str, parts: list[str], body: bytes) -> None:
        hub = self.hub
        if parts[0] == "blobs":  # upload URLs are signed, so they need no token
            if hashlib.sha256(body).hexdigest() != parts[1]:
                return self._send(400, {"error": "The SHA-256 differs."})
            hub.blobs[parts[1]] = body
            return self._send(200, {})
        if self.token != TOKEN:
            return self._send(401, {"error": "Invalid username or password."})
        repository, lines = "/".join(parts[2:4]), [json.loads(line) for line in body.splitlines()]
        if path == "api/repos/create":
            return self._create(lines[0])
        if path == "api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.address}/blobs/{one['oid']}"}}}
                for one in lines[0]["objects"]
            ]
            return self._send(200, {"transfer": "basic", "objects": objects})
        if parts[4] == "preupload":
            names = [one["path"] for one in lines[0]["files"]]
            modes = ["lfs" if name.endswith(".safetensors") else "regular" for name in names]
            files = [
                {"path": name, "uploadMode": mode, "shouldIgnore": False}
                for name, mode in zip(names, modes, strict=True)
            ]
            return self._send(200, {"files": files})
        return self._commit(repository, lines)

    def _create(self, content: dict) -> None:
        repository = f"{content['organization']}/{content['name']}"
        url = f"{self.hub.address}/{repository}"
        if repository in self.hub.commits:
            return self._send(409, {"error": "You already created this model repo", "url": url})
        self.hub.create(repository)
        if content.get("visibility") == "private":
            self.hub.private.add(repository)
        return self._send(200, {"url": url})

    def _commit(self, repository: str, lines: list[dict]) -> None:
        files = {}
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        sha = self.hub.commit(repository, files)
        url = f"{self.hub.address}/{repository}/commit/{sha}"
        self._send(200, {"commitUrl": url, "commitOid": sha})

    def _find(self, repository: str, revision: str) -> str:
        """Return the commit hash of a revision, or "" if the client can't access the revision.

        The client can't access a revision that doesn't exist, or one of a private repository
        without the right token. In these cases, the Hub's error response is sent.
        """
        hub = self.hub
        hidden = repository in hub.private and self.token != TOKEN
        if repository not in hub.commits or hidden:
            self._send(401 if not self.token else 404, {}, {"X-Error-Code": "RepoNotFound"})
            return ""
        sha = hub.revisions[repository].get(revision, revision)
        if sha not in hub.commits[repository]:
            self._send(404, {}, {"X-Error-Code": "RevisionNotFound"})
            return ""
        return sha

    def _describe(self, repository: str, rest: list[str]) -> None:
        kind, revision = (*rest, "revision", "main")[:2] if rest else ("revision", "main")
        if not (sha := self._find(repository, revision)):
            return None
        files = self.hub.commits[repository][sha]
        if kind == "tree":
            return self._send(200, [_entry(name, data) for name, data in files.items()])
        siblings = [{"rfilename": name} for name in files]
        private = repository in self.hub.private
        about = {"id": repository, "sha": sha, "private": private, "siblings": siblings, "tags": []}
        return self._send(200, about)

    def _resolve(self, repository: str, revision: str, name: str) -> None:
        if not (sha := self._find(repository, revision)):
            return None
        data = self.hub.commits[repository][sha].get(name)
        if data is None:
            return self._send(404, {}, {"X-Error-Code": "EntryNotFound"})
        entry = _entry(name, data)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        return self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": sha})

    def _send(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serving_hub():
    """Yield a Hub whose server runs until the ``with`` block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(server.server_address[1])
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
