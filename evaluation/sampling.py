"""Where a process spends its time, by the functions of llmcompress, even if it is killed.

A thread looks at the main thread's stack many times a second and charges the time since the last look to the
innermost function of llmcompress. What it has seen is written again and again. Work of a GPU is charged to
the function that waits for it.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import FrameType, TracebackType

import llmcompress

PACKAGE = Path(llmcompress.__file__).parent
EVERY_S, WRITTEN_S = 0.02, 2.0


class Sampler(threading.Thread):
    """Within the context, seconds by function are written to a JSON file."""

    def __init__(self, file: Path) -> None:
        super().__init__(daemon=True)
        self.file, self.watched = file, threading.get_ident()
        self.seconds, self.over = defaultdict[str, float](float), threading.Event()

    def __enter__(self) -> Sampler:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        self.join()

    def run(self) -> None:
        """Look until the context ends."""
        last = written = time.perf_counter()
        while not self.over.wait(EVERY_S):
            now = time.perf_counter()
            self.seconds[_function(sys._current_frames().get(self.watched))] += now - last
            last = now
            if now - written > WRITTEN_S:
                self.write()
                written = now
        self.write()

    def write(self) -> None:
        """Write what was seen so far; a reader finds the old or the new file."""
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(self.seconds), "utf-8")
        new.replace(self.file)


def longest(file: Path, count: int) -> dict[str, float]:
    """The functions that took longest, and their seconds; none if nothing was written."""
    if not file.is_file():
        return {}
    seconds: dict[str, float] = json.loads(file.read_text("utf-8"))
    order = sorted(seconds.items(), key=lambda entry: entry[1], reverse=True)
    return {name: round(took, 1) for name, took in order[:count]}


def _function(frame: FrameType | None) -> str:
    """The innermost function of llmcompress in a stack, as module:function:line."""
    while frame is not None:
        code = frame.f_code
        if (path := Path(code.co_filename)).is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{code.co_name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
