"""The command line that all measurements share."""

from __future__ import annotations

import argparse


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m evaluation NAME` whose help is the docstring of its module."""
    return argparse.ArgumentParser(
        prog=f"python -m evaluation {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
