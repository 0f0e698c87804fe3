"""A Hub on this machine: repositories with commits, accounts with tokens, the endpoints that huggingface_hub calls.

Like the real one it makes a commit completely or not at all, stores large files only if their digest is right, and hides
what a token may not read. On request it closes the connection in the middle of an upload. Large files come by one of two
protocols, LFS or xet; of the second it stores the chunks and does not put them together.
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
    gated: bool = False
    """Its license has not been accepted."""
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{}]})
    messages: list[str] = field(default_factory=list)

    def find_commit(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for commits in [self.branches[revision]] if revision in self.branches else self.branches.values():
            for files in reversed(commits):
                if revision in self.branches or sha_of(files, commits) == revision:
                    return sha_of(files, commits), files
        return None


@dataclass
class Hub:
    """A fake Hub: its URL, its repositories, the requests it got, and the faults it simulates."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    xorbs: dict[str, bytes] = field(default_factory=dict)
    shards: list[bytes] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    dropped_uploads: int = 0
    """The number of next uploads whose connection is closed half-way."""
    echo_headers: bool = False
    """Refusals quote the headers of the request, as some proxies do."""
    corrupt_downloads: bool = False
    """Downloads have one byte changed."""
    refuse_cards: bool = False
    """The check of a card's header finds an error."""
    disable_xet: bool = False
    """The endpoint of the xet protocol is missing."""
    before_commit: object = None
    """Called once before the next commit."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def content(self, digest: str) -> bytes:
        """The content of a digest; if it was uploaded by xet, only a note that it was."""
        if digest in self.objects:
            return self.objects[digest]
        # a shard holds a digest as four little-endian integers of 64 bits
        packed = b"".join(bytes.fromhex(digest[start : start + 16])[::-1] for start in range(0, 64, 16))
        if not any(packed in shard for shard in self.shards):
            raise LookupError(digest)
        return f"chunks of {digest}".encode()

    def add(self, name: str, *, private: bool = False, **files: bytes) -> Repository:
        self.repositories[name] = Repository(private=private)
        self.repositories[name].branches["main"].append(dict(files))
        return self.repositories[name]


def sha_of(files: dict[str, bytes], commits: list[dict[str, bytes]]) -> str:
    index = next(index for index, commit in enumerate(commits) if commit is files)
    return hashlib.sha1(repr((index, sorted(files.items()))).encode(), usedforsecurity=False).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".png", ".bin", ".parquet"))


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
        for route_method, pattern, handler in ROUTES:
            if route_method == method and (matched := re.fullmatch(pattern, path)):
                handler(self, *matched.groups())
                return
        self.refuse(404, f"no such endpoint: {method} {path}")

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: object, *, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode())

    def refuse(self, status: int, message: str, *, code: str = "") -> None:
        text = f"{message} {dict(self.headers)}" if self.hub.echo_headers else message
        headers = {"X_Error_Code": code, "X_Error_Message": text} if code else {"X_Error_Message": text}
        self.send(status, json.dumps({"error": text}).encode(), **headers)

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def may_write(self, owner: str) -> bool:
        """Whether the token may write for the owner, who must be "me"; sends the refusal if not."""
        if self.token not in {WRITER, READER}:
            self.refuse(401, "Invalid username or password.")
        elif self.token == READER or owner != "me":
            self.refuse(403, f"Forbidden: you don't have the rights to write in {owner}.")
        else:
            return True
        return False

    def repository(self, name: str) -> Repository | None:
        """The repository, if the token may read it; sends the refusal if not."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.token):
            status = 404 if self.token in {WRITER, READER} else 401
            self.refuse(status, "Repository not found", code="RepoNotFound")
            return None
        if repository.gated:
            self.refuse(403, f"Access to model {name} is restricted.", code="GatedRepo")
            return None
        return repository

    def log_message(self, *details):
        pass


def create(request: Handler) -> None:
    body = json.loads(request.body())
    owner = body.get("organization") or "me"
    if request.may_write(owner):
        name = f"{owner}/{body['name']}"
        if name in request.hub.repositories:
            request.refuse(409, "You already created this model repo")
            return
        request.hub.repositories[name] = Repository(private=body.get("visibility") == "private")
        request.json({"url": f"{request.hub.url}/{name}", "name": name})


def info(request: Handler, name: str, revision: str | None = None) -> None:
    repository = request.repository(name)
    if repository is None:
        return
    commit = repository.find_commit(revision or "main")
    if commit is None:
        request.refuse(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return
    sha, files = commit
    card = card_data(files.get("README.md", b""))
    request.json(
        {
            "id": name,
            "sha": sha,
            "private": repository.private,
            "tags": card.get("tags", []),
            "cardData": card,
            "siblings": [sibling(path, content) for path, content in files.items()],
        }
    )


def sibling(path: str, content: bytes) -> dict[str, object]:
    entry = {"rfilename": path, "size": len(content), "blobId": "0" * 40}
    if is_lfs(path):
        entry["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 100}
    return entry


def card_data(card: bytes) -> dict[str, object]:
    parts = card.decode().split("---\n", 2)
    return yaml.safe_load(parts[1]) if len(parts) == 3 else {}


def branch(request: Handler, name: str, branch_name: str) -> None:
    request.body()
    repository = request.repository(name)
    if repository is not None and request.may_write(name.partition("/")[0]):
        if branch_name in repository.branches:
            request.refuse(409, "Reference already exists")
            return
        repository.branches[branch_name] = list(repository.branches["main"])
        request.json({})


def validate(request: Handler) -> None:
    card_data(json.loads(request.body())["content"].encode())
    errors = [{"message": '"base_model" is not valid'}] if request.hub.refuse_cards else []
    request.json({"errors": errors, "warnings": []}, status=400 if errors else 200)


def preupload(request: Handler, name: str, _revision: str) -> None:
    files = json.loads(request.body())["files"]
    if request.repository(name) is not None and request.may_write(name.partition("/")[0]):
        modes = [{"path": file["path"], "uploadMode": "lfs" if is_lfs(file["path"]) else "regular"} for file in files]
        request.json({"files": [mode | {"shouldIgnore": False} for mode in modes]})


def batch(request: Handler, name: str) -> None:
    objects = json.loads(request.body())["objects"]
    if request.repository(name) is None or not request.may_write(name.partition("/")[0]):
        return
    answers = []
    for item in objects:
        actions = {"upload": {"href": f"{request.hub.url}/lfs/{item['oid']}"}}
        answers.append(item if item["oid"] in request.hub.objects else item | {"actions": actions})
    request.json({"transfer": "basic", "objects": answers})


def upload(request: Handler, digest: str) -> None:
    with request.hub.lock:
        drop, request.hub.dropped_uploads = request.hub.dropped_uploads > 0, max(request.hub.dropped_uploads - 1, 0)
    if drop:
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
    if request.hub.disable_xet:
        request.refuse(404, "no such endpoint")
    elif request.repository(name) is not None and request.may_write(name.partition("/")[0]):
        request.json({"accessToken": "xet", "exp": 2**40, "casUrl": f"{request.hub.url}/xet"})


def xet_xorb(request: Handler, digest: str) -> None:
    """Store a xorb, which is a pack of chunks, or close the connection in the middle of it."""
    with request.hub.lock:
        drop, request.hub.dropped_uploads = request.hub.dropped_uploads > 0, max(request.hub.dropped_uploads - 1, 0)
    if drop:
        request.rfile.read(64)
        request.connection.close()
        return
    request.hub.xorbs[digest] = request.body()
    request.json({"was_inserted": True})


def xet_shard(request: Handler) -> None:
    """Store a shard, which lists the chunks of each file."""
    request.hub.shards.append(request.body())
    request.json({"result": 1})


def commit(request: Handler, name: str, revision: str) -> None:
    lines = [json.loads(line) for line in request.body().splitlines()]
    repository = request.repository(name)
    if repository is None or not request.may_write(name.partition("/")[0]):
        return
    if request.hub.before_commit is not None:
        before_commit, request.hub.before_commit = request.hub.before_commit, None
        before_commit(repository)
    commits = repository.branches[revision]
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
            request.refuse(400, f"unexpected operation {line['key']}")
            return
    commits.append(files)
    repository.messages.append(header["summary"])
    sha = sha_of(files, commits)
    request.json({"commitUrl": f"{request.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})


def resolve(request: Handler, name: str, revision: str, path: str) -> None:
    repository = request.repository(name)
    if repository is None:
        return
    sha, files = repository.find_commit(revision) or ("", {})
    if path not in files:
        request.refuse(404, "Entry not found", code="EntryNotFound")
        return
    content = files[path]
    etag = hashlib.sha256(content).hexdigest()
    body = bytes([content[0] ^ 1]) + content[1:] if request.hub.corrupt_downloads else content
    request.send(200, body, ETag=f'"{etag}"', X_Repo_Commit=sha, X_Linked_Size=str(len(content)))


NAME = r"([\w.-]+/[\w.-]+)"
KIND = "(?:models|datasets)"
ROUTES = [
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", validate),
    ("POST", f"/api/{KIND}/{NAME}/branch/(.+)", branch),
    ("POST", f"/api/{KIND}/{NAME}/preupload/(.+)", preupload),
    ("POST", f"/api/{KIND}/{NAME}/commit/(.+)", commit),
    ("POST", rf"/(?:datasets/)?{NAME}\.git/info/lfs/objects/batch", batch),
    ("GET", f"/api/{KIND}/{NAME}/xet-write-token/(.+)", xet_token),
    ("POST", "/xet/v1/xorbs/default/([0-9a-f]+)", xet_xorb),
    ("POST", "/xet/v1/shards", xet_shard),
    ("PUT", "/lfs/([0-9a-f]+)", upload),
    ("GET", f"/api/{KIND}/{NAME}/revision/(.+)", info),
    ("GET", f"/api/{KIND}/{NAME}", info),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", resolve),
]


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve on a free port of this machine until the block ends."""
    hub = Hub()

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            pass

    with Quiet(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub})) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
