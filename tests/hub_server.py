"""A data set hub as huggingface_hub meets it over HTTP: repositories, commits, LFS, ranges; in memory, on loopback."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_tests"
_LARGE = (".tar", ".parquet", ".npy")
_PAGE = 5
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repo:
    """``commits``: id -> path -> content; ``branches``: name -> commit id."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


@dataclass
class Hub:
    """What the server holds. ``before`` may answer a request with a status of its own, or change the hub meanwhile."""

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    before: Callable[[str], int | None] = lambda request: None
    ignored: tuple[str, ...] = ()
    endless: str = ""
    """A path whose content never ends, whatever range is asked for."""

    def count(self, what: str) -> int:
        return sum(request.startswith(what) for request in self.requests)


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and content leave in one packet: a second one would wait 40 ms for the first one's receipt.
    wbufsize = -1
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *_: object) -> None:
        return None

    def do_GET(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def _handle(self, method: str) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self._read()
        request = f"{method} {url.path}"
        self.hub.requests.append(request)
        try:
            if status := self.hub.before(request):
                raise _Refused(status, message="asked to fail")
            for pattern, action in _ROUTES:
                if match := re.fullmatch(pattern, request):
                    action(self, **{name: unquote(value) for name, value in match.groupdict().items()})
                    return
            raise _Refused(404, message=f"the fake hub does not know {request}")
        except _Refused as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self._send(error.status, {"error": error.message}, {k: v for k, v in headers.items() if v})

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _send_for_ever(self) -> None:
        self.close_connection = True
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):  # the other side has had enough
            while True:
                self.wfile.write(bytes(1 << 20))

    def _logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _writer(self) -> None:
        if not self._logged_in():
            raise _Refused(401, message="Invalid username or password.")

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._logged_in()):
            raise _Refused(404 if self._logged_in() else 401, "RepoNotFound", "Repository not found")
        return repo

    def _commit(self, repo: str, revision: str) -> str:
        found = self._repo(repo)
        oid = found.branches.get(revision, revision)
        if oid not in found.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    def create(self) -> None:
        self._writer()
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/datasets/{name}"}
        if name in self.hub.repos:
            self._send(409, url)
            return
        repo = self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit("main", {".gitattributes": b"*.tar filter=lfs\n"})
        self._send(200, url)

    def info(self, repo: str, revision: str = "main") -> None:
        oid = self._commit(repo, revision)
        self._send(200, {"id": repo, "sha": oid, "private": self._repo(repo).private, "tags": [], "siblings": []})

    def tree(self, repo: str, revision: str) -> None:
        files = sorted(self._repo(repo).commits[self._commit(repo, revision)].items())
        start = int(self.query.get("cursor", ["0"])[0])
        entries: list[dict[str, Any]] = []
        for path, data in files[start : start + _PAGE]:
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)}
            if path.endswith(_LARGE):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        if start == 0:
            entries.append({"type": "directory", "path": "meta", "oid": "0" * 40})
        link = f'<{self.hub.endpoint}{urlsplit(self.path).path}?recursive=true&cursor={start + _PAGE}>; rel="next"'
        self._send(200, entries, {"Link": link} if start + _PAGE < len(files) else {})

    def preupload(self, repo: str, revision: str) -> None:
        self._writer()
        there = self._repo(repo).commits[self._commit(repo, revision)]
        answers = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            large = path.endswith(_LARGE)
            oid = None if path not in there else (hashlib.sha256 if large else _blob_id)(there[path])
            answers.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": path.endswith(self.hub.ignored) if self.hub.ignored else False,
                    "oid": oid.hexdigest() if large and oid is not None else oid,
                }
            )
        self._send(200, {"files": answers})

    def batch(self, repo: str) -> None:
        self._writer()
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid = asked["oid"]
            upload = {"actions": {"upload": {"href": f"{self.hub.endpoint}/large/{oid}", "header": {}}}}
            objects.append({"oid": oid, "size": asked["size"], **({} if oid in self.hub.large else upload)})
        self._send(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, message="sha256 differs")
        self.hub.large[oid] = self.body
        self._send(200, {})

    def commit(self, repo: str, revision: str) -> None:
        self._writer()
        head = self._commit(repo, revision)
        files = dict(self._repo(repo).commits[head])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit") not in (None, head):
                raise _Refused(412, message="A commit has happened since. Please refresh and try again.")
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            if item["key"] == "deletedFile":
                del files[value["path"]]
        oid = self._repo(repo).commit(revision, files)
        self._send(200, {"commitUrl": f"{self.hub.endpoint}/datasets/{repo}/commit/{oid}", "commitOid": oid})

    def branch(self, repo: str, revision: str) -> None:
        self._writer()
        found = self._repo(repo)
        if revision in found.branches:
            raise _Refused(409, message="Reference already exists")
        found.branches[revision] = found.branches["main"]
        self._send(200, {})

    def validate(self) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        files = self._repo(repo).commits[self._commit(repo, revision)]
        if path not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        if path == self.hub.endless:
            self._send_for_ever()
            return
        if path.endswith(_LARGE):
            oid = hashlib.sha256(files[path]).hexdigest()
            self.hub.large.setdefault(oid, files[path])
            self._send(302, {}, {"Location": f"{self.hub.endpoint}/large/{oid}"})
        else:
            self._ranged(files[path])

    def large(self, oid: str) -> None:
        self._ranged(self.hub.large[oid])

    def _ranged(self, data: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            self._send(200, data)
            return
        start, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
        if start >= len(data):
            raise _Refused(416, message="Range not satisfiable")
        self._send(206, data[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_ROUTES: tuple[tuple[str, Callable[..., None]], ...] = (
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"GET /api/datasets/{_REPO}", _Handler.info),
    (rf"GET /api/datasets/{_REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    (rf"GET /api/datasets/{_REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (rf"POST /api/datasets/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (rf"POST /api/datasets/{_REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (rf"POST /api/datasets/{_REPO}/branch/(?P<revision>[^/]+)", _Handler.branch),
    (rf"POST /datasets/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /large/(?P<oid>\w+)", _Handler.store),
    (r"GET /large/(?P<oid>\w+)", _Handler.large),
    (rf"GET /datasets/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
)
