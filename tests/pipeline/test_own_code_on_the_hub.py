"""A base on a local Hub that has code of its own: fetched only if the user allows it, at the commit of the
weights, and pushed with the artefact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmcompress.report.schema import Report
from tests.bases import write_text
from tests.clients import shell
from tests.hub_server import TOKEN, environment, serve
from tests.own_code import AUTO_MAP, FILES, save_own_base

pytestmark = pytest.mark.slow  # runs in processes of their own

LOAD = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not any(name.startswith("llmcompress") for name in sys.modules)
print(type(model).__name__, model.config.ffn_dim)
"""


def test_its_code_is_that_of_the_commit(tmp_path: Path) -> None:
    base, text = save_own_base(tmp_path / "base"), write_text(tmp_path / "text.txt")
    files = {file.name: file.read_bytes() for file in base.iterdir()}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: {{source: {text}, samples: 8, length: 24, evaluation_samples: 4}}\n"
        "stages: [{prune: {axis: ffn, keep: 0.5, multiple: 1}}]\n"
    )
    with serve() as (hub, endpoint):
        commit = hub.add("them/weft", files)
        hub.tag("them/weft", "v1", commit)
        hub.add("them/weft", dict.fromkeys(FILES, b"raise SystemExit('code of another commit was run')"))
        env = environment(endpoint, tmp_path / "home", TOKEN) | {"OMP_NUM_THREADS": "1"}
        run = ("run", recipe, "--base", "them/weft@v1", "--out", "out")
        asked = shell(env, *run, cwd=tmp_path)
        assert asked.code == 2 and "them" in asked.err and "add --trust-remote-code" in asked.err
        assert not any(".py" in line for line in map(str, hub.log))
        done = shell(env, *run, "--trust-remote-code", cwd=tmp_path)
        assert done.code == 0, done.err
        report = Report.of(tmp_path / "out")
        assert (report.base.model, report.base.revision) == ("them/weft", commit)
        assert {file.name: file.read_text() for file in (tmp_path / "out").glob("*.py")} == FILES
        assert shell(env, "push", "out", "me/weft", cwd=tmp_path).code == 0
        there = hub.files("me/weft")
        assert json.loads(there["config.json"])["auto_map"] == AUTO_MAP
        assert {name for name in there if name.endswith(".py")} == FILES.keys()
        assert 'name = "me/weft"' in there["README.md"].decode()
        assert b'device_map="auto", trust_remote_code=True)' in there["README.md"]
        every = {**os.environ, **env}
        plain = [sys.executable, "-c", LOAD, "me/weft"]
        loaded = subprocess.run(plain, env=every, capture_output=True, text=True, timeout=180)
        assert loaded.stdout.split() == ["WeftForCausalLM", "80"], loaded.stderr
        again = shell(env, "reproduce", "me/weft", "--data", text, "--trust-remote-code", cwd=tmp_path)
        assert again.code == 0 and "bit-equal" in again.out, again.err
        refused = shell(env, "reproduce", "me/weft", "--data", text, cwd=tmp_path)
        assert refused.code == 2 and "add --trust-remote-code" in refused.err
