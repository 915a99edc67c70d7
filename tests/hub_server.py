"""A small Hugging Face Hub in memory, for tests that drive the real clients: huggingface_hub, transformers
and datasets.

A test opens it with `with serve() as (hub, endpoint):`, fills it with `hub.add`, and runs the client in a
child process with the variables of `environment`, since the client reads its settings when it is imported.
Then the test looks at `hub.files`, `hub.commits` and `hub.log`. `hub.faults` breaks answers on purpose.

What it can't show, because it is not the Hub: uploads and downloads through Xet; redirects to a CDN and
signed links (large files come from this server itself); rate limits, quotas and sizes that the Hub refuses;
its check of file names, and all of its check of cards (here it is what hub_cards.py knows of it); real
logins, roles and scopes of tokens (a token is the owner's or a stranger's, no more); TLS; pull requests,
paged listings, the dataset viewer and its Parquet copies. It answers what the client at hand (huggingface_hub
2.4) reads, and says nothing of a Hub that has changed since.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, unquote

from tests.caches import own_cache
from tests.hub_cards import wrong_with

TOKEN = "hf_test"  # the owner's: sees and writes everything
STRANGER = "hf_stranger"  # valid, but sees no private repository, has accepted no terms, and writes nothing
OWNER = "user"  # whoami's name; a repository that is created without a namespace goes under it
# over `environment`: no network, and nobody there
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
LARGE = 10_000_000  # bytes; what is larger is an LFS object, whatever its name
LARGE_NAMES = (".safetensors", ".png")  # these are LFS objects at any size
PIECE = 1 << 20
Kind = Literal["model", "dataset"]
Fields = dict[str, str]


@dataclass(frozen=True)
class Fault:
    """A breakdown that strikes the next `times` requests whose `METHOD path` has a match of the regular
    expression `path`.

    cut: the connection is closed in the middle: of the upload where there is one, else of the answer (HEAD:
    before it). stall: the answer comes after `seconds`. error: the answer is `status` and nothing is done.
    huge: the answer is filled up with blanks to `size` bytes, which its headers (Content-Length,
    X-Linked-Size) say too; a listing stays valid JSON. A fault is taken out of `hub.faults` when it has
    struck for the last time.
    """

    path: str
    kind: Literal["cut", "stall", "error", "huge"]
    times: int = 1
    seconds: float = 30.0
    status: int = 500
    size: int = 64 * PIECE


class File(NamedTuple):
    """One file of a commit: its content, and whether it is kept as an LFS object."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_id(self) -> str:
        """The id git gives the blob: of an LFS object, that is the id of the small pointer file which git
        holds."""
        pointer = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize "
            f"{len(self.content)}\n"
        )
        blob = pointer.encode() if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        """What the client compares to know whether it has the file already."""
        return self.sha256 if self.large else self.git_id

    def facts(self) -> dict[str, Any]:
        """The entry of a listing, without the path."""
        lfs = (
            {
                "lfs": {
                    **dict.fromkeys(("oid", "sha256"), self.sha256),
                    "size": len(self.content),
                    "pointerSize": 130,
                }
            }
            if self.large
            else {}
        )
        return {"type": "file", "size": len(self.content), "oid": self.git_id, **lfs}


@dataclass
class Repo:
    """A repository: its commits, oldest first, each with all its files; branches and tags are names of
    commits."""

    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: Fields = field(default_factory=dict)
    tags: Fields = field(default_factory=dict)

    def find(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit stands for."""
        return {**{sha: sha for sha in self.commits}, **self.tags, **self.branches}.get(revision)

    def commit(self, files: dict[str, File], branch: str = "main") -> str:
        """Put one commit with exactly these files on a branch; its sha."""
        listing = "".join(f"{name} {file.git_id}\n" for name, file in sorted(files.items()))
        sha = hashlib.sha1(
            f"{self.name} {self.branches.get(branch)} {len(self.commits)}\n{listing}".encode()
        ).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


class Hub:
    """The repositories of the server, what was asked of it, and how it is to fail. Its methods may be called
    while it serves.

    `log` has every request as (method, path without escapes and query). `tokens` are the owner's and
    `strangers` somebody else's valid tokens. `objects` has the LFS objects by their sha256, committed or not,
    `repos` what is told of Repo above.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.tokens: set[str] = {TOKEN}
        self.strangers: set[str] = {STRANGER}
        self.faults: list[Fault] = []
        self.objects: dict[str, bytes] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lock = threading.RLock()
        self.closing = threading.Event()

    def add(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        kind: Kind = "model",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Make one commit on main that adds or replaces files, in a repository which is made if there is
        none; its sha.

        The names of the files are not checked, so that a listing can be hostile. `private` and `gated` are
        set anew each time.
        """
        with self.lock:
            repo = self.repos.setdefault((kind, repo_id), Repo(repo_id))
            repo.private, repo.gated = private, gated
            new = {name: File(content, is_large(name, len(content))) for name, content in files.items()}
            self.objects.update({file.sha256: file.content for file in new.values() if file.large})
            return repo.commit({**repo.commits.get(repo.branches.get("main", ""), {}), **new})

    def tag(self, repo_id: str, name: str, sha: str, kind: Kind = "model") -> None:
        """Give a commit a name that stays."""
        with self.lock:
            self.repos[kind, repo_id].tags[name] = sha

    def files(self, repo_id: str, revision: str = "main", kind: Kind = "model") -> dict[str, bytes]:
        """All files of a repository at a revision. Errors: KeyError."""
        with self.lock:
            repo = self.repos[kind, repo_id]
            return {
                name: file.content for name, file in repo.commits[repo.find(revision) or revision].items()
            }

    def commits(self, repo_id: str, kind: Kind = "model") -> list[str]:
        """The commits of a repository, oldest first. Errors: KeyError."""
        with self.lock:
            return list(self.repos[kind, repo_id].commits)

    def note(self, method: str, path: str) -> Fault | None:
        """Log a request, and say which fault strikes it."""
        with self.lock:
            self.log.append((method, path))
            for place, fault in enumerate(self.faults):
                if re.search(fault.path, f"{method} {path}"):
                    self.faults[place : place + 1] = (
                        [replace(fault, times=fault.times - 1)] if fault.times > 1 else []
                    )
                    return fault
        return None


def is_large(name: str, size: int) -> bool:
    """Whether a file is kept as an LFS object; the client never sends an empty one as such."""
    return size > 0 and (name.endswith(LARGE_NAMES) or size > LARGE)


def entries(files: Mapping[str, File]) -> dict[str, dict[str, Any]]:
    """What a listing says of each file, and of each folder that files lie in."""
    folders = {name[:place] for name in files for place, letter in enumerate(name) if letter == "/" and place}
    named = {
        folder: {"type": "directory", "size": 0, "oid": hashlib.sha1(folder.encode()).hexdigest()}
        for folder in folders
    }
    named.update({name: file.facts() for name, file in files.items()})
    return {name: {**facts, "path": name} for name, facts in sorted(named.items())}


class Answer(NamedTuple):
    """What the client gets: of a value that is no bytes, the JSON."""

    value: Any = b""
    status: int = 200
    headers: Fields = {}  # noqa: RUF012


class RefusedError(Exception):
    """A request that is not granted: the client makes its own exception of the status, the code and the
    message."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Fields | None = None
    ) -> None:
        coded = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.answer = Answer({"error": message}, status, coded)


class Handler(BaseHTTPRequestHandler):
    """Reads a request, answers it with a method for each thing the Hub can be asked, and does what a fault
    wants."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.place, _, self.query = self.path.partition("?")
        fault = self.hub.note(self.command, unquote(self.place))
        kind = fault.kind if fault else None
        self.body = self.rfile.read(length // 2 if kind == "cut" else length)
        stalled = fault and kind == "stall" and self.hub.closing.wait(fault.seconds)
        # also: the client was killed
        if len(self.body) < length or stalled or (kind == "cut" and self.command == "HEAD"):
            self.close_connection = True
            return
        try:
            if fault and kind == "error":
                raise RefusedError(fault.status, "a fault of the test")
            self.send(self.answer(), fault)
        except RefusedError as refused:
            self.send(refused.answer, fault)

    do_HEAD = do_POST = do_PUT = do_GET

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that went away: tests kill clients, and cut and stall them
            super().handle()

    def send(self, answer: Answer, fault: Fault | None) -> None:
        content = answer.value if isinstance(answer.value, bytes) else json.dumps(answer.value).encode()
        size = str(fault.size if fault and fault.kind == "huge" else len(content))
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": size}.items():
            self.send_header(name, size if name == "X-Linked-Size" else value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.kind == "cut":
            content, size, self.close_connection = content[: len(content) // 2], "0", True
        self.wfile.write(content)
        for left in range(int(size) - len(content), 0, -PIECE):
            self.wfile.write(b" " * min(left, PIECE))

    def answer(self) -> Answer:
        self.base = f"http://{self.headers['Host']}"
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.owner = self.token in self.hub.tokens
        if self.token and not self.owner and self.token not in self.hub.strangers:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        for pattern, handle in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {self.place}"):
                self.asked = {
                    name: unquote(value) for name, value in match.groupdict().items() if value is not None
                }
                self.kind = "dataset" if self.asked.get("kind", "").startswith("datasets") else "model"
                with self.hub.lock:
                    return handle(self)
        raise RefusedError(501, f"tests/hub_server.py knows no {self.command} {self.place}")

    def repo(self, write: bool = False) -> Repo:
        """The repository, if it may be seen (or written). One that may not be seen is refused like one that
        isn't there.

        Without a token that is 401 with the code RepoNotFound, also for a write to a public repository: of
        the real Hub's bare 401 the client makes the same exception, but only where the address begins with
        https.
        """
        repo = self.hub.repos.get((self.kind, self.asked["repo"]))
        if self.token is None and (write or repo is None or repo.private):
            raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
        if repo is None or (repo.private and not self.owner):
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        if write and not self.owner:
            raise RefusedError(403, f"You don't have the rights to write to {self.asked['repo']}")
        return repo

    def commit_at(self, write: bool = False) -> tuple[Repo, str, dict[str, File]]:
        """The repository, the commit that is asked for, and its files."""
        repo, revision = self.repo(write), self.asked.get("revision", "main")
        if (sha := repo.find(revision)) is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, sha, repo.commits[sha]

    def whoami(self) -> Answer:
        if self.token is None:
            raise RefusedError(401, "Invalid username or password.")
        return Answer({"type": "user", "name": OWNER if self.owner else "stranger", "orgs": [], "auth": {}})

    def validate(self) -> Answer:
        wrong = wrong_with(json.loads(self.body)["content"])
        return Answer({"errors": [{"message": one} for one in wrong], "warnings": []}, 400 if wrong else 200)

    def create(self) -> Answer:
        wanted = json.loads(self.body)
        kind, repo_id = (
            wanted.get("type") or "model",
            f"{wanted.get('organization') or OWNER}/{wanted['name']}",
        )
        if not self.owner:
            raise RefusedError(
                403 if self.token else 401, f"You don't have the rights to create a {kind} under {OWNER}"
            )
        url = f"{self.base}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if (kind, repo_id) in self.hub.repos:
            return Answer({"error": f"You already created this {kind} repo", "url": url}, 409)
        self.hub.repos[kind, repo_id] = repo = Repo(repo_id, wanted.get("visibility") == "private")
        repo.commit(
            {".gitattributes": File("".join(f"*{end} filter=lfs\n" for end in LARGE_NAMES).encode(), False)}
        )
        return Answer({"url": url, "name": repo_id})

    def info(self) -> Answer:
        repo, sha, files = self.commit_at()
        siblings = [
            {"rfilename": name, "blobId": file.git_id, **file.facts()} for name, file in files.items()
        ]
        facts = {
            "id": self.asked["repo"],
            "sha": sha,
            "siblings": siblings,
            "private": repo.private,
            "tags": [],
        }
        dates = dict.fromkeys(("lastModified", "createdAt"), "2026-01-01T00:00:00.000Z")
        return Answer(
            {**facts, **dates, "gated": "manual" if repo.gated else False, "disabled": False, "downloads": 0}
        )

    def refs(self) -> Answer:
        repo = self.repo()

        def told(folder: str, refs: Fields) -> list[Fields]:
            return [
                {"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": sha}
                for name, sha in refs.items()
            ]

        return Answer(
            {"branches": told("heads", repo.branches), "tags": told("tags", repo.tags), "converts": []}
        )

    def tree(self) -> Answer:
        _, sha, files = self.commit_at()
        listed, folder = entries(files), self.asked.get("rest", "").rstrip("/")
        if folder and listed.get(folder, {}).get("type") != "directory":
            raise RefusedError(
                404, f"{folder} does not exist on {sha}", "EntryNotFound", {"X-Repo-Commit": sha}
            )
        start, deep = f"{folder}/" if folder else "", "recursive=true" in self.query.lower()
        below = {name: facts for name, facts in listed.items() if name.startswith(start)}
        return Answer([facts for name, facts in below.items() if deep or "/" not in name.removeprefix(start)])

    def paths(self) -> Answer:
        listed = entries(self.commit_at()[2])
        return Answer(
            [listed[name] for name in parse_qs(self.body.decode()).get("paths", []) if name in listed]
        )

    def preupload(self) -> Answer:
        files, said = self.commit_at(write=True)[2], []
        for wanted in json.loads(self.body)["files"]:
            there = files.get(wanted["path"])
            said.append({"path": wanted["path"], "shouldIgnore": False, "oid": there and there.etag})
            said[-1]["uploadMode"] = "lfs" if is_large(wanted["path"], wanted["size"]) else "regular"
        return Answer({"files": said})

    def batch(self) -> Answer:
        self.repo(write=True)
        said = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.base}/lfs/{wanted['oid']}"}}}
            said.append({**wanted, **({} if wanted["oid"] in self.hub.objects else upload)})
        return Answer({"transfer": "basic", "objects": said})

    def put(self) -> Answer:
        if hashlib.sha256(self.body).hexdigest() != self.asked["oid"]:
            raise RefusedError(400, "The content is not what its sha256 says")
        self.hub.objects[self.asked["oid"]] = self.body
        return Answer()

    def commit(self) -> Answer:
        repo, sha, files = self.commit_at(write=True)
        if self.asked["revision"] not in repo.branches:
            raise RefusedError(404, f"{self.asked['revision']} is no branch", "RevisionNotFound")
        files = dict(files)
        for line in map(json.loads, self.body.splitlines()):
            key, value, path = line["key"], line["value"], line["value"].get("path", "")
            if key == "header" and not sha.startswith(value.get("parentCommit", "")):
                raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
            if key == "file":
                files[path] = File(base64.b64decode(value["content"]), False)
                if path == "README.md" and (wrong := wrong_with(files[path].content.decode())):
                    raise RefusedError(
                        400, f"Your push was rejected during YAML metadata verification: {'; '.join(wrong)}"
                    )
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise RefusedError(400, f"The LFS object of {path} has not been uploaded")
                files[path] = File(self.hub.objects[value["oid"]], True)
            elif key.startswith("deleted"):  # deletedFile or deletedFolder
                start = path.rstrip("/") + "/"
                gone = [
                    name
                    for name in files
                    if name == path or (key == "deletedFolder" and name.startswith(start))
                ]
                if not gone:
                    raise RefusedError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                files = {name: file for name, file in files.items() if name not in gone}
        made = repo.commit(files, self.asked["revision"])
        return Answer(
            {
                "success": True,
                "commitOid": made,
                "commitUrl": f"{self.base}/{self.asked['repo']}/commit/{made}",
            }
        )

    def resolve(self) -> Answer:
        repo, sha, files = self.commit_at()
        if repo.gated and not self.owner:
            raise RefusedError(
                403 if self.token else 401, f"Access to {self.asked['repo']} is restricted.", "GatedRepo"
            )
        file, headers = files.get(self.asked["rest"]), {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if file is None:
            raise RefusedError(404, "Entry not found", "EntryNotFound", headers)
        size, headers["ETag"] = len(file.content), f'"{file.etag}"'
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(size)}
        if not (part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            return Answer(file.content, 200, headers)
        start, end = int(part[1]), min(int(part[2] or size), size - 1)
        return Answer(
            file.content[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{size}"}
        )

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal of the tests."""


API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+?(?:/[^/]+?)??)"
WEB = r"/(?P<kind>datasets/)?(?P<repo>[^/]+?(?:/[^/]+?)??)"
AT = r"/(?P<revision>[^/]+)"
ROUTES = [
    ("GET /api/whoami-v2", Handler.whoami),
    ("POST /api/validate-yaml", Handler.validate),
    ("POST /api/repos/create", Handler.create),
    (f"GET {API}/refs", Handler.refs),
    (f"GET {API}/tree{AT}(?:/(?P<rest>.*))?", Handler.tree),
    (f"GET {API}(?:/revision{AT})?", Handler.info),
    (f"POST {API}/paths-info{AT}", Handler.paths),
    (f"POST {API}/preupload{AT}", Handler.preupload),
    (f"POST {API}/commit{AT}", Handler.commit),
    (rf"POST {WEB}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT /lfs/(?P<oid>[0-9a-f]{64})", Handler.put),
    (f"(?:GET|HEAD) {WEB}/resolve{AT}/(?P<rest>.+)", Handler.resolve),
]


@contextmanager
def serve() -> Iterator[tuple[Hub, str]]:
    """An empty Hub and the address where it answers, as long as the layer runs."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("HandlerOfHub", (Handler,), {"hub": hub})) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield hub, f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            hub.closing.set()  # what is stalled is let go
            server.shutdown()


def environment(endpoint: str, home: Path, token: str | None = None) -> dict[str, str]:
    """The variables that make a child process ask this server only, keep its caches in `home`, and send
    `token` or none.

    They go over those of the parent, `{**os.environ, **environment(...)}`, and switch off a token or offline
    mode set there.
    """
    given = {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": token or "",
        "HF_TOKEN_PATH": f"{home}/token",
        "NO_PROXY": "*",
        "no_proxy": "*",
    }
    places = {"HF_HOME": f"{home}", "HF_HUB_CACHE": f"{home}/hub", "HF_DATASETS_CACHE": f"{home}/datasets"}
    places["LLMCOMPRESS_CACHE"] = str(own_cache(home / "llmcompress"))
    on = dict.fromkeys(
        ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"), "1"
    )
    # the second else asks a server of Amazon
    off = dict.fromkeys(("HF_HUB_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS"), "0")
    return {**given, **places, **on, **off, "HUGGING_FACE_HUB_TOKEN": ""}
