"""What a measurement ran on: threads, command, commit, versions and hardware."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from evaluation.results import ROOT, Head
from llmcompress.report.metrics import environment


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], threads: int | None = None
) -> argparse.Namespace:
    """Parse the options of a measurement, --threads among them, and have torch use so many."""
    parser.add_argument(
        "--threads", type=int, default=threads or torch.get_num_threads(), help="default: %(default)s"
    )
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    return given


def commit() -> str:
    """The short hash of the measured commit, with a `+` where the package differs from it.

    In a copy without git it is what EVALUATION_COMMIT says, or empty.
    """
    if told := os.environ.get("EVALUATION_COMMIT"):
        return told
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return f"{head}+" if _git("status", "--porcelain", "--", "llmcompress") else head
    except (OSError, subprocess.CalledProcessError):
        return ""


def head(device: torch.device | None = None) -> Head:
    """What every result file begins with; absolute paths in the command are cut to their last part."""
    about = environment(device or torch.device("cpu"))
    options = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return Head(
        command=shlex.join(["python", "-m", "evaluation", *options]),
        commit=commit(),
        hardware=about.device,
        versions=about.versions,
    )


def _git(*command: str) -> str:
    done = subprocess.run(["git", *command], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()
