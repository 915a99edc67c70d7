"""The virtual environment of each rival, and scripts that run in it.

Every package is pinned, so pip resolves nothing and none can bring another torch. The pins name a CPU build
of torch (`+cpu`): where pip does not find one by itself, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS tell it where.
"""

from __future__ import annotations

import json
import os
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

from evaluation.results import ROOT

HERE = Path(__file__).resolve().parent
VERSIONS = (
    "import json, sys, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
)
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GPTQMODEL_CPU_WORKERS": "2",  # fewer, its default on two cores, and it dies at start
    "PYTHONPATH": str(ROOT),
}


class Environment:
    """The environment of a rival in a folder, made or brought up to its requirements where need be."""

    def __init__(self, folder: Path, rival: str, threads: int) -> None:
        requirements = (HERE / f"requirements-{rival}.txt").read_text("utf-8")
        stamp = folder / "requirements.txt"
        self.python, self.threads = folder / "bin" / "python", threads
        if not stamp.exists() or stamp.read_text("utf-8") != requirements:
            if not self.python.exists():
                venv.create(folder, with_pip=True)
            pinned = HERE / f"requirements-{rival}.txt"
            pip = [str(self.python), "-m", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run([*pip, "-r", str(pinned)], check=True)
            stamp.write_text(requirements, "utf-8")

    def run(self, module: str, options: Sequence[object], log: Path) -> None:
        """Run a module of this folder offline, output in `log`. Errors: RuntimeError with its last line."""
        command = [str(self.python), "-m", f"evaluation.rivals.{module}", *map(str, options)]
        variables = os.environ | SETTINGS | {"OMP_NUM_THREADS": str(self.threads)}
        with log.open("a") as out:
            done = subprocess.run(command, stdout=out, stderr=out, env=variables, cwd=log.parent, check=False)
        if done.returncode:
            said = [line.strip() for line in log.read_text().splitlines() if line.strip()]
            raise RuntimeError(said[-1][:300] if said else f"exit code {done.returncode}, no output")

    def versions(self, *packages: str) -> dict[str, str]:
        """The versions of some packages there."""
        found: dict[str, str] = json.loads(
            subprocess.check_output([self.python, "-c", VERSIONS, *packages], text=True)
        )
        return found
