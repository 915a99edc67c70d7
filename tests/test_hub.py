"""The Hub border through the real client: no network here, so what is tested is what is asked for and what is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llmcompress import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "README.md": b"a card",
    "model.safetensors": b"weights",
    "model-00001-of-00002.safetensors": b"shard",
    "model.safetensors.index.json": b"{}",
    "consolidated.safetensors": b"the same again",
    "pytorch_model.bin": b"a pickle",
    "original/consolidated.00.pth": b"a pickle",
    "modeling_evil.py": b"raise SystemExit",
    "training_args.bin": b"a pickle",
}
FETCH = """
import json, sys
from llmcompress.errors import ModelError
from llmcompress.hub import fetch
for model, revision, weights in json.loads(sys.argv[1]):
    try:
        folder, commit = fetch(model, revision, weights=weights)
        print(*sorted(file.name for file in folder.iterdir()), commit)
    except ModelError as error:
        print(f"ModelError: {error}")
"""
REFUSED = "ModelError: base {} can't be fetched ({}) and is not a folder here; check the path or the network"
Wish = tuple[str, str | None, bool]  # model, revision, with its weights


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP as a snapshot needs; a gated and a private model are there too."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "/resolve/" in self.path:
            self._answer(200, FILES.get(self.path.split(f"/resolve/{COMMIT}/")[-1], b""), "application/octet-stream")
        elif "gated" in self.path:
            self._answer(403, b"{}", "application/json", {"X-Error-Code": "GatedRepo"})
        elif "revision/none" in self.path:
            self._answer(404, b"{}", "application/json", {"X-Error-Code": "RevisionNotFound"})
        elif "/api/models/user/model" in self.path:
            answer = {"id": "user/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            if "/tree/" in self.path:
                entries = [{"type": "file", "path": n, "size": len(c), "oid": "a" * 40} for n, c in FILES.items()]
                self._answer(200, json.dumps(entries).encode(), "application/json")
            else:
                self._answer(200, json.dumps(answer).encode(), "application/json")
        else:
            self._answer(404, b"{}", "application/json", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _answer(self, code: int, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {"X-Repo-Commit": COMMIT, "ETag": '"e"', **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal of the tests."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.asked.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def fetch(home: Path, *wishes: Wish, **env: str) -> list[str]:
    """A line for each wish, printed by a fresh process: the client reads its settings when it is imported."""
    quiet = {"HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    arguments = [sys.executable, "-c", FETCH, json.dumps(wishes)]
    result = subprocess.run(arguments, env={**os.environ, **quiet, **env}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(wishes)
    return lines


@pytest.mark.slow
def test_only_safetensors_tokenizer_and_text_are_asked_for(endpoint: str, tmp_path: Path) -> None:
    small, whole = fetch(tmp_path, ("user/model", None, False), ("user/model", None, True), HF_ENDPOINT=endpoint)
    assert small.split() == ["README.md", "config.json", "model.safetensors.index.json", "tokenizer.json", COMMIT]
    found = set(whole.split())
    assert found == {*small.split(), "model.safetensors", "model-00001-of-00002.safetensors"}
    asked = {path.rpartition("/")[2] for path in Hub.asked if "/resolve/" in path}
    assert asked == found - {COMMIT}  # no pickle, no code, and no weights a second time
    again, other = fetch(tmp_path, ("user/model", None, True), ("user/other", None, True), HF_HUB_OFFLINE="1")
    assert set(again.split()) == found  # from the cache, without a network
    assert other == REFUSED.format("user/other", "LocalEntryNotFoundError")


def test_each_refusal_of_the_hub_is_one_clear_line(endpoint: str, tmp_path: Path) -> None:
    wishes: list[Wish] = [
        ("user/nonesuch", None, True),
        ("user/gated", None, True),
        ("user/model", "none", True),
        ("a b", None, True),
    ]
    lines = fetch(tmp_path, *wishes, HF_ENDPOINT=endpoint)
    for line, message in zip(
        lines,
        (
            "user/nonesuch is not on the Hub or is private; check the id, or log in",
            "user/gated is gated; accept its terms on the Hub",
            "user/model has no revision none; give a branch, tag or commit",
            "a b is neither a folder nor a Hub id; give a folder that exists, or an id like user/name",
        ),
        strict=True,
    ):
        assert line.startswith(f"ModelError: base {message}")


def test_no_network_is_one_clear_line(tmp_path: Path) -> None:
    (found,) = fetch(tmp_path, ("user/model", None, True), HF_ENDPOINT="http://127.0.0.1:9")
    assert found == REFUSED.format("user/model", "LocalEntryNotFoundError")


def test_no_pattern_lets_a_pickle_or_code_through() -> None:
    for name in (
        "pytorch_model.bin",
        "model.pt",
        "model.pkl",
        "modeling.py",
        "model.ckpt",
        "a/b.pth",
        "model.h5",
        "model.gguf",
    ):
        assert not any(fnmatch(name, pattern) for pattern in hub.SMALL + hub.WEIGHTS)
