"""The command line in a child that is forked from a process which has imported everything: a case costs no
start-up."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmcompress.cli.app import main

CPU_SECONDS = 120  # after which a child counts as hung
MEMORY = 6 << 30  # bytes of address space beyond what the parent has


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code (minus the signal that killed it), what it printed, what it left in
    its TMPDIR."""

    code: int
    out: str
    err: str
    left: tuple[str, ...]

    @property
    def crashed(self) -> str | None:
        """Why this is no way to end, or None: a traceback, a signal, code 1, or a refusal that is not one
        line."""
        if "Traceback" in self.err or self.code not in (0, 2, 3):
            return f"exit code {self.code}: {self.err[-600:]}"
        errors = [line for line in self.err.splitlines() if line.startswith("error:")]
        if self.code and len(errors) != 1 and "Usage:" not in self.err:  # which the parser of options prints
            return f"exit code {self.code} with {len(errors)} error lines: {self.err[-600:]}"
        return None


class Child:
    """A forked process that runs the command line, or any function, with its own TMPDIR, and bounds on time
    and memory."""

    def __init__(
        self,
        folder: Path,
        *words: str,
        call: Callable[[], object] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self._child(words, call, env or {}))

    def _child(
        self, words: tuple[str, ...], call: Callable[[], object] | None, env: Mapping[str, str]
    ) -> int:
        code = 1
        try:
            for number, name in ((1, "out"), (2, "err")):
                file = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, number)
            os.environ.update({"TMPDIR": str(self.temporary), "COLUMNS": "1000"} | dict(env))
            tempfile.tempdir = None
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            limit = _address_space() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            if call is not None:
                call()
            else:
                sys.argv = ["llmcompress", *words]
                main()
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        return code

    @property
    def alive(self) -> bool:
        """Whether the child has not ended yet; `wait` is still to be called."""
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return ended is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Wait for the end of the child."""
        _, status = os.waitpid(self.pid, 0)
        out, err = (
            (self.folder / name).read_text(errors="replace") if (self.folder / name).exists() else ""
            for name in ("out", "err")
        )
        left = tuple(sorted(path.name for path in self.temporary.iterdir()))
        return Ended(os.waitstatus_to_exitcode(status), out, err, left)


def run(folder: Path, *words: str, env: Mapping[str, str] | None = None) -> Ended:
    """Run the command line to its end."""
    return Child(folder, *words, env=env).wait()


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
