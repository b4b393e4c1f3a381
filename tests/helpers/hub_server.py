"""A small Hub on loopback: what the clients of huggingface_hub, timm, transformers and datasets ask it over HTTP.

It keeps everything in memory. Files are stored as the Hub stores them: text in the commit, the rest by LFS. Xet, the
Hub's own protocol for large files, is not spoken; HF_HUB_DISABLE_XET=1 makes the client use LFS.
"""

import base64
import hashlib
import json
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TEXT = {".json", ".md", ".txt", ".yaml", ".py", ".csv"}
OBJECTS = "/lfs/"


@dataclass
class Commit:
    title: str
    files: dict[str, bytes]
    oid: str = ""

    def __post_init__(self) -> None:
        names = "".join(f"{path} {hashlib.sha1(content).hexdigest()}\n" for path, content in self.files.items())
        self.oid = hashlib.sha1(f"{self.title}\n{id(self)}\n{names}".encode()).hexdigest()


@dataclass
class Repository:
    """A repository with one line of commits for each branch.

    Args:
        private: whether only its owner may see it.
        branches: commits of each branch, the last one is its head.
    """

    private: bool = False
    branches: dict[str, list[Commit]] = field(
        default_factory=lambda: {"main": [Commit("initial commit", {".gitattributes": b"*.bin filter=lfs\n"})]}
    )

    def commit(self, revision: str) -> Commit:
        if revision in self.branches:
            return self.branches[revision][-1]
        for commits in self.branches.values():
            for commit in commits:
                if commit.oid == revision:
                    return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commit(revision).files

    def titles(self, revision: str = "main") -> list[str]:
        return [commit.title for commit in self.branches[revision]]

    def add(self, files: dict[str, bytes], title: str = "a commit", revision: str = "main") -> Commit:
        """Commit files, whatever they are called."""
        commit = Commit(title, self.files(revision) | files)
        self.branches[revision].append(commit)
        return commit


class HubError(Exception):
    """An answer of 400 or more.

    Args:
        status: of the answer.
        message: for people.
        code: for the client.
    """

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Failure:
    """How requests fail: with a status, or, where that is None, by a connection that breaks in the middle of the body.

    Args:
        method: of the requests, such as "POST".
        path: regular expression, found anywhere in their path.
        status: of the answer, or None.
        times: how many requests fail.
    """

    method: str
    path: str
    status: int | None
    times: float


class _Server(ThreadingHTTPServer):
    """Ends the connections that clients keep open when it is closed, and waits for their threads."""

    daemon_threads = False

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: socket.socket) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        for connection in list(self.connections):
            with suppress(OSError):  # the client was faster
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()


class HubServer:
    """A Hub, whose repositories and requests a test can look into; runs as a context manager.

    Args:
        tokens: user of each token.
        part_size: bytes above which a file is uploaded in parts of so many bytes.
    """

    def __init__(self, tokens: dict[str, str], part_size: int = 2**30) -> None:
        self.tokens = tokens
        self.part_size = part_size
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.failures: list[Failure] = []
        self.lock = Lock()
        self._server = _Server(type("Handler", (_Handler,), {"hub": self}))
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def objects_url(self) -> str:
        """Where LFS objects lie: another host than the Hub's, as there, to which the client sends no token."""
        return f"http://localhost:{self._server.server_port}{OBJECTS}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *args: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(self, method: str, path: str, status: int | None, times: float = float("inf")) -> None:
        """Let requests fail, as `Failure` says."""
        self.failures.append(Failure(method, path, status, times))

    def failure(self, method: str, path: str) -> Failure | None:
        with self.lock:
            for failure in self.failures:
                if failure.times > 0 and failure.method == method and re.search(failure.path, path):
                    failure.times -= 1
                    return failure
        return None


REPO = r"(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
FILE_REPO = r"/(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)"
Answer = dict[str, Any] | list[Any]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self) -> None:
        """Take the request, and send what the function of its route returns, or an error."""
        url = urlsplit(self.path)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {url.path}")
        length = int(self.headers.get("Content-Length") or 0)
        failure = self.hub.failure(self.command, url.path)
        if failure is not None and failure.status is None:
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        self.body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        self.query = parse_qs(url.query)
        try:
            if failure is not None:
                raise HubError(failure.status, "as the test wants it")
            for method, pattern, function in ROUTES:
                found = re.fullmatch(pattern, url.path)
                if found and self.command in method:
                    result = function(self, **{name: unquote(text or "") for name, text in found.groupdict().items()})
                    if result is not None:
                        self.send(200, json.dumps(result).encode(), {"Content-Type": "application/json"})
                    return
            raise HubError(404, f"{self.command} {url.path} is not known here")
        except HubError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            content = json.dumps({"error": error.message}).encode()
            self.send(error.status, content, {"Content-Type": "application/json", **headers})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    # ---- who may do what ----

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def repository(self, kind: str, repo: str, write: bool = False) -> Repository:
        user, owner = self.user(), repo.split("/")[0]
        found = self.hub.repositories.get(_key(kind, repo))
        if found is None or (found.private and user != owner):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise HubError(403 if user else 401, f"You may not write to {repo}")
        return found

    # ---- repositories ----

    def whoami(self) -> Answer:
        user = self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        return {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def create(self) -> Answer | None:
        user, asked = self.user(), self.json
        if user is None:
            raise HubError(401, "Invalid username or password.")
        owner = asked.get("organization") or user
        if owner != user:
            raise HubError(403, f"You may not create repositories of {owner}")
        kind = f"{asked.get('type') or 'model'}s"
        repo = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{_key(kind, repo)}"}
        if _key(kind, repo) in self.hub.repositories:
            self.send(409, json.dumps(answer).encode(), {"X-Error-Message": "You already created this repo"})
            return None
        self.hub.repositories[_key(kind, repo)] = Repository(asked.get("visibility") == "private")
        return answer

    def info(self, kind: str, repo: str, revision: str = "main") -> Answer:
        found = self.repository(kind, repo)
        commit = found.commit(revision)
        return {
            "id": repo,
            "sha": commit.oid,
            "private": found.private,
            "tags": [],
            "downloads": 0,
            "siblings": [{"rfilename": path} for path in commit.files],
        }

    def refs(self, kind: str, repo: str) -> Answer:
        branches = self.repository(kind, repo).branches
        heads = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": c[-1].oid} for name, c in branches.items()
        ]
        return {"branches": heads, "tags": [], "converts": []}

    def create_branch(self, kind: str, repo: str, branch: str) -> Answer:
        found = self.repository(kind, repo, write=True)
        if branch in found.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        found.branches[branch] = list(found.branches["main"])
        return {}

    def validate_card(self) -> Answer:
        return {"errors": [], "warnings": []}

    # ---- upload ----

    def preupload(self, kind: str, repo: str, revision: str) -> Answer:
        files = self.repository(kind, repo, write=True).files(revision)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(file["path"], files[file["path"]]) if file["path"] in files else None,
                }
                for file in self.json["files"]
            ]
        }

    def batch(self, repo: str, kind: str) -> Answer:
        self.repository(kind or "models", repo, write=True)
        return {"transfer": "basic", "objects": [self._upload_of(**asked) for asked in self.json["objects"]]}

    def _upload_of(self, oid: str, size: int) -> Answer:
        if oid in self.hub.objects:
            return {"oid": oid, "size": size}
        target = f"{self.hub.objects_url}{oid}"
        upload: dict[str, Any] = {"href": target}
        if size > self.hub.part_size:
            parts = range(1, -(-size // self.hub.part_size) + 1)
            header = {str(part): f"{target}/{part}" for part in parts}
            upload = {"href": target, "header": {"chunk_size": str(self.hub.part_size), **header}}
        verify = {"href": f"{self.hub.url}/verify"}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def put_object(self, oid: str) -> Answer:
        self._store(oid, self.body)
        return {}

    def put_part(self, oid: str, part: str) -> None:
        with self.hub.lock:
            self.hub.parts.setdefault(oid, {})[int(part)] = self.body
        self.send(200, b"", {"ETag": f'"{part}"'})

    def complete(self, oid: str) -> Answer:
        numbers = [part["partNumber"] for part in self.json["parts"]]
        self._store(oid, b"".join(self.hub.parts[oid][number] for number in numbers))
        return {}

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "the content is not that of the SHA256")
        with self.hub.lock:
            self.hub.objects[oid] = content

    def verify(self) -> Answer:
        if len(self.hub.objects.get(self.json["oid"], b"")) != self.json["size"]:
            raise HubError(422, "the object is not there")
        return {}

    def commit(self, kind: str, repo: str, revision: str) -> Answer:
        found = self.repository(kind, repo, write=True)
        files, title = dict(found.files(revision)), ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    title = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile" if value["oid"] in self.hub.objects:
                    files[value["path"]] = self.hub.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
                case other:
                    raise HubError(400, f"{other} cannot be committed")
        commit = Commit(title, files)
        found.branches[revision].append(commit)
        return {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit.oid}"}

    # ---- download ----

    def tree(self, kind: str, repo: str, revision: str, path: str) -> Answer:
        files = self.repository(kind, repo).files(revision)
        inside = {name: content for name, content in files.items() if not path or name.startswith(f"{path}/")}
        if path and not inside:
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        return [_entry(name, content) for name, content in inside.items()]

    def paths_info(self, kind: str, repo: str, revision: str) -> Answer:
        files = self.repository(kind, repo).files(revision)
        asked = parse_qs(self.body.decode())["paths"]
        folders = [path for path in asked if any(name.startswith(f"{path}/") for name in files)]
        entries = [_entry(path, files[path]) for path in asked if path in files]
        return entries + [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]

    def resolve(self, kind: str, repo: str, revision: str, path: str) -> None:
        commit = self.repository(kind or "models", repo).commit(revision)
        if path not in commit.files:
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        content, headers = commit.files[path], {"X-Repo-Commit": commit.oid}
        oid = _oid(path, content)
        if not _is_large(path):
            return self.send(200, content, {**headers, "ETag": f'"{oid}"'})
        self.hub.objects[oid] = content
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        return self.send(302, b"", {**headers, **linked, "Location": f"{self.hub.objects_url}{oid}"})

    def get_object(self, oid: str) -> None:
        if "Authorization" in self.headers:
            raise HubError(400, "a token was sent to another host than the Hub")
        self.send(200, self.hub.objects[oid], {"ETag": f'"{oid}"'})


def _key(kind: str, repo: str) -> str:
    return repo if kind == "models" else f"{kind}/{repo}"


def _is_large(path: str) -> bool:
    return PurePosixPath(path).suffix not in TEXT and not path.endswith(".gitattributes")


def _oid(path: str, content: bytes) -> str:
    """What tells the content of a file: SHA256 of one in LFS, else git's name of it."""
    if _is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> Answer:
    oid = _oid(path, content)
    entry = {"type": "file", "path": path, "size": len(content), "oid": oid[:40]}
    return entry | ({"lfs": {"oid": oid, "size": len(content), "pointerSize": 134}} if _is_large(path) else {})


ROUTES: list[tuple[tuple[str, ...], str, Callable[..., Answer | None]]] = [
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate_card),
    (("GET",), f"/api/{REPO}", _Handler.info),
    (("GET",), f"/api/{REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    (("GET",), f"/api/{REPO}/refs", _Handler.refs),
    (("POST",), f"/api/{REPO}/branch/(?P<branch>[^/]+)", _Handler.create_branch),
    (("POST",), f"/api/{REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (("POST",), f"/api/{REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (("GET",), f"/api/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", _Handler.tree),
    (("POST",), f"/api/{REPO}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    (("POST",), rf"{FILE_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), f"{OBJECTS}(?P<oid>[0-9a-f]+)", _Handler.put_object),
    (("PUT",), f"{OBJECTS}(?P<oid>[0-9a-f]+)/(?P<part>[0-9]+)", _Handler.put_part),
    (("POST",), f"{OBJECTS}(?P<oid>[0-9a-f]+)", _Handler.complete),
    (("POST",), "/verify", _Handler.verify),
    (("GET", "HEAD"), f"{OBJECTS}(?P<oid>[0-9a-f]+)", _Handler.get_object),
    (("GET", "HEAD"), f"{FILE_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
