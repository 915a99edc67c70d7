"""Child processes that talk to the local Hub: the client reads its settings when it is imported, so each has
its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import llmcompress

PRELUDE = """
import json, sys, types
from pathlib import Path
package = types.ModuleType("llmcompress")  # without its imports
package.__path__ = [sys.argv.pop(1)]
sys.modules["llmcompress"] = package
from llmcompress import hub
from llmcompress.errors import CompressError, DataError, ModelError, OutputError, RecipeError
def told(call, *args, **settings):
    try:
        found = call(*args, **settings)
    except CompressError as error:
        found = f"{type(error).__name__}: {error}"
    print("TOLD", json.dumps(found, default=str), flush=True)
"""


def ask(env: Mapping[str, str], script: str, *arguments: str, timeout: int = 180) -> list[Any]:
    """What `told(...)` in a script says, call by call: what was returned, or `KindOfError: message`."""
    command = [sys.executable, "-c", PRELUDE + script, str(Path(llmcompress.__file__).parent), *arguments]
    result = subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stderr
    return [
        json.loads(line.removeprefix("TOLD "))
        for line in result.stdout.splitlines()
        if line.startswith("TOLD ")
    ]


class Result(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str


def shell(env: Mapping[str, str], *arguments: object, cwd: Path | None = None) -> Result:
    """Run `llmcompress ...` in a process of its own."""
    command = [sys.executable, "-m", "llmcompress", *map(str, arguments)]
    every = {**os.environ, "COLUMNS": "200", **env}
    done = subprocess.run(command, env=every, cwd=cwd, capture_output=True, text=True, timeout=300)
    return Result(done.returncode, done.stdout, done.stderr)
