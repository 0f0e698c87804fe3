"""A Hub on this machine: repositories with commits, accounts with tokens, the endpoints that huggingface_hub calls.

It keeps what the real one promises: a commit is there whole or not at all, large files are stored only if their digest
is right, and what a token may not see is not there. Where it is told to, it hangs up in the middle of an upload. Large
files come in either of two protocols, LFS or Xet; of the second it keeps the chunks and does not put them together.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

WRITER, READER = "hf_writer_0123456789", "hf_reader_0123456789"


@dataclass
class Repository:
    """Branches, each a list of commits; a commit maps paths to contents."""

    private: bool = False
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{}]})
    messages: list[str] = field(default_factory=list)

    def commit_of(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for commits in [self.branches[revision]] if revision in self.branches else self.branches.values():
            for files in reversed(commits):
                if revision in self.branches or sha_of(files, commits) == revision:
                    return sha_of(files, commits), files
        return None


@dataclass
class Hub:
    """Where it is, what it holds, what it was asked, and how it misbehaves."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    packs: dict[str, bytes] = field(default_factory=dict)
    shards: list[bytes] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    hang_up: int = 0
    """On how many of the next uploads to hang up half-way."""
    echo: bool = False
    """Whether refusals quote the request's headers, as careless proxies do."""
    damage: bool = False
    """Whether files arrive with a byte changed."""
    without_xet: bool = False
    """Whether to know nothing of the protocol of chunks."""
    between: object = None
    """Called once before the next commit."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def content(self, digest: str) -> bytes:
        """What has that digest; of what came as packed chunks, only that it has come."""
        if digest in self.objects:
            return self.objects[digest]
        words = (bytes.fromhex(digest[at : at + 16])[::-1] for at in range(0, 64, 16))  # little-endian in a shard
        stated = b"".join(words)
        if not any(stated in shard for shard in self.shards):
            raise LookupError(digest)
        return f"chunks of {digest}".encode()

    def add(self, name: str, *, private: bool = False, **files: bytes) -> Repository:
        self.repositories[name] = Repository(private=private)
        self.repositories[name].branches["main"].append(dict(files))
        return self.repositories[name]


def sha_of(files: dict[str, bytes], commits: list[dict[str, bytes]]) -> str:
    place = next(number for number, one in enumerate(commits) if one is files)
    return hashlib.sha1(repr((place, sorted(files.items()))).encode(), usedforsecurity=False).hexdigest()


def lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".png", ".bin"))


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub

    def do_GET(self):
        self.answer("GET")

    def do_HEAD(self):
        self.answer("GET")

    def do_POST(self):
        self.answer("POST")

    def do_PUT(self):
        self.answer("PUT")

    def answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
        for wanted, pattern, reply in ROUTES:
            if wanted == method and (found := re.fullmatch(pattern, path)):
                reply(self, *found.groups())
                return
        self.refuse(404, f"no such endpoint: {method} {path}")

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, thing: object, *, status: int = 200) -> None:
        self.send(status, json.dumps(thing).encode())

    def refuse(self, status: int, message: str, *, code: str = "") -> None:
        said = f"{message} {dict(self.headers)}" if self.hub.echo else message
        headers = {"X_Error_Code": code, "X_Error_Message": said} if code else {"X_Error_Message": said}
        self.send(status, json.dumps({"error": said}).encode(), **headers)

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def may_write(self, owner: str) -> bool:
        """Whether the token belongs to the owner, who is "me"; refuses if not."""
        if self.token not in {WRITER, READER}:
            self.refuse(401, "Invalid username or password.")
        elif self.token == READER or owner != "me":
            self.refuse(403, f"Forbidden: you don't have the rights to write in {owner}.")
        else:
            return True
        return False

    def repository(self, name: str) -> Repository | None:
        """What the token may see; refuses if it may not."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.token):
            status = 404 if self.token in {WRITER, READER} else 401
            self.refuse(status, "Repository not found", code="RepoNotFound")
            return None
        return found

    def log_message(self, *details):
        pass


def create(request: Handler) -> None:
    asked = json.loads(request.body())
    owner = asked.get("organization") or "me"
    if request.may_write(owner):
        name = f"{owner}/{asked['name']}"
        if name in request.hub.repositories:
            request.refuse(409, "You already created this model repo")
            return
        request.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
        request.json({"url": f"{request.hub.url}/{name}", "name": name})


def info(request: Handler, name: str, revision: str | None = None) -> None:
    found = request.repository(name)
    if found is None:
        return
    commit = found.commit_of(revision or "main")
    if commit is None:
        request.refuse(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return
    sha, files = commit
    stated = card_data(files.get("README.md", b""))
    request.json(
        {
            "id": name,
            "sha": sha,
            "private": found.private,
            "tags": stated.get("tags", []),
            "cardData": stated,
            "siblings": [described(path, content) for path, content in files.items()],
        }
    )


def described(path: str, content: bytes) -> dict[str, object]:
    found = {"rfilename": path, "size": len(content), "blobId": "0" * 40}
    if lfs(path):
        found["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 100}
    return found


def card_data(card: bytes) -> dict[str, object]:
    parts = card.decode().split("---\n", 2)
    return yaml.safe_load(parts[1]) if len(parts) == 3 else {}


def branch(request: Handler, name: str, new: str) -> None:
    request.body()
    found = request.repository(name)
    if found is not None and request.may_write(name.partition("/")[0]):
        if new in found.branches:
            request.refuse(409, "Reference already exists")
            return
        found.branches[new] = list(found.branches["main"])
        request.json({})


def validate(request: Handler) -> None:
    card_data(json.loads(request.body())["content"].encode())
    request.json({"errors": [], "warnings": []})


def preupload(request: Handler, name: str, _revision: str) -> None:
    asked = json.loads(request.body())["files"]
    if request.repository(name) is not None and request.may_write(name.partition("/")[0]):
        modes = [{"path": one["path"], "uploadMode": "lfs" if lfs(one["path"]) else "regular"} for one in asked]
        request.json({"files": [one | {"shouldIgnore": False} for one in modes]})


def batch(request: Handler, name: str) -> None:
    asked = json.loads(request.body())["objects"]
    if request.repository(name) is None or not request.may_write(name.partition("/")[0]):
        return
    found = []
    for one in asked:
        upload = {"upload": {"href": f"{request.hub.url}/lfs/{one['oid']}"}}
        there = one["oid"] in request.hub.objects
        found.append(one if there else one | {"actions": upload})
    request.json({"transfer": "basic", "objects": found})


def upload(request: Handler, digest: str) -> None:
    with request.hub.lock:
        hanging_up, request.hub.hang_up = request.hub.hang_up > 0, max(request.hub.hang_up - 1, 0)
    if hanging_up:
        request.rfile.read(64)
        request.connection.close()
        return
    content = request.body()
    if hashlib.sha256(content).hexdigest() != digest:
        request.refuse(400, "the content has another digest")
        return
    request.hub.objects[digest] = content
    request.send(200)


def xet_token(request: Handler, name: str, _revision: str) -> None:
    if request.hub.without_xet:
        request.refuse(404, "no such endpoint")
    elif request.repository(name) is not None and request.may_write(name.partition("/")[0]):
        request.json({"accessToken": "xet", "exp": 2**40, "casUrl": f"{request.hub.url}/xet"})


def xet_pack(request: Handler, digest: str) -> None:
    """Keep a pack of chunks, or hang up in the middle of it."""
    with request.hub.lock:
        hanging_up, request.hub.hang_up = request.hub.hang_up > 0, max(request.hub.hang_up - 1, 0)
    if hanging_up:
        request.rfile.read(64)
        request.connection.close()
        return
    request.hub.packs[digest] = request.body()
    request.json({"was_inserted": True})


def xet_shard(request: Handler) -> None:
    """Keep what says which chunks make which file."""
    request.hub.shards.append(request.body())
    request.json({"result": 1})


def commit(request: Handler, name: str, revision: str) -> None:
    lines = [json.loads(line) for line in request.body().splitlines()]
    found = request.repository(name)
    if found is None or not request.may_write(name.partition("/")[0]):
        return
    if request.hub.between is not None:
        between, request.hub.between = request.hub.between, None
        between(found)
    commits = found.branches[revision]
    header = lines[0]["value"]
    if header.get("parentCommit") not in {None, sha_of(commits[-1], commits)}:
        request.refuse(412, "A commit has happened since. Please refresh and try again.")
        return
    files = dict(commits[-1])
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "lfsFile":
            files[value["path"]] = request.hub.content(value["oid"])
        elif line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        else:
            request.refuse(400, f"nobody asked for {line['key']}")
            return
    commits.append(files)
    found.messages.append(header["summary"])
    sha = sha_of(files, commits)
    request.json({"commitUrl": f"{request.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})


def resolve(request: Handler, name: str, revision: str, path: str) -> None:
    found = request.repository(name)
    if found is None:
        return
    sha, files = found.commit_of(revision) or ("", {})
    if path not in files:
        request.refuse(404, "Entry not found", code="EntryNotFound")
        return
    content = files[path]
    etag = hashlib.sha256(content).hexdigest()
    served = bytes([content[0] ^ 1]) + content[1:] if request.hub.damage else content
    request.send(200, served, ETag=f'"{etag}"', X_Repo_Commit=sha, X_Linked_Size=str(len(content)))


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate),
    ("POST", f"/api/models/{NAME}/branch/(.+)", branch),
    ("POST", f"/api/models/{NAME}/preupload/(.+)", preupload),
    ("POST", f"/api/models/{NAME}/commit/(.+)", commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", batch),
    ("GET", f"/api/models/{NAME}/xet-write-token/(.+)", xet_token),
    ("POST", "/xet/v1/xorbs/default/([0-9a-f]+)", xet_pack),
    ("POST", "/xet/v1/shards", xet_shard),
    ("PUT", "/lfs/([0-9a-f]+)", upload),
    ("GET", f"/api/models/{NAME}/revision/(.+)", info),
    ("GET", f"/api/models/{NAME}", info),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", resolve),
]


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve on a free port of this machine until the block ends."""
    hub = Hub()

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            pass

    with Quiet(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub})) as listening:
        hub.url = f"http://127.0.0.1:{listening.server_address[1]}"
        thread = threading.Thread(target=listening.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield hub
        finally:
            listening.shutdown()
            thread.join()
