"""The pages of the documentation as the tests read them: links, anchors and blocks of code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
NOT_RUN = "no-run"  # of blocks that need a network, a GPU or a tool of others

FENCE = re.compile(r"^(`{3,})(.*)$")
CODE = re.compile(r"`[^`]*`")
LINK = re.compile(r"(?<!\\)\[[^\]]*\]\(([^()\s]+)\)")
SOURCE = re.compile(r'\b(?:src|srcset|href)="([^"]+)"')
HEADING = re.compile(r"^#{1,6} +(.*)$")


@dataclass(frozen=True)
class Block:
    """A block of code: its section, language, what else its fence says, the number of its first line, its
    text."""

    page: Path
    section: str  # the heading above it
    language: str
    info: tuple[str, ...]
    line: int
    text: str

    @property
    def runs(self) -> bool:
        """Whether a test runs it."""
        return NOT_RUN not in self.info

    @property
    def file(self) -> str | None:
        """What its fence names as `file=`."""
        return next((word.removeprefix("file=") for word in self.info if word.startswith("file=")), None)

    @property
    def place(self) -> str:
        """`docs/hub.md:14`."""
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


@dataclass(frozen=True)
class Page:
    """A page, divided into prose and blocks."""

    prose: str
    blocks: tuple[Block, ...]

    @property
    def links(self) -> list[str]:
        """Where its links and pictures lead."""
        return LINK.findall(CODE.sub("", self.prose)) + SOURCE.findall(self.prose)

    @property
    def anchors(self) -> set[str]:
        """What a link may have after `#`, as GitHub makes it of headings."""
        found = Counter[str]()
        for line in self.prose.splitlines():
            if heading := HEADING.match(line):
                found[re.sub(r"[^\w\- ]", "", heading[1].lower()).strip().replace(" ", "-")] += 1
        again = {f"{anchor}-{number}" for anchor, count in found.items() for number in range(1, count)}
        return {*found} | again


@cache
def read(file: Path) -> Page:
    """A page of Markdown."""
    prose, blocks, section = list[str](), list[Block](), ""
    lines = enumerate(file.read_text(encoding="utf-8").splitlines(keepends=True), start=1)
    for number, line in lines:
        fence = FENCE.match(line)
        if fence is None:
            prose.append(line)
            heading = HEADING.match(line.rstrip())
            section = heading[1] if heading else section
            continue
        language, *info = fence[2].split() or [""]
        text = "".join(_until(fence[1], lines))
        blocks.append(Block(file, section, language, tuple(info), number + 1, text))
    return Page("".join(prose), tuple(blocks))


def _until(fence: str, lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    """The lines of a block."""
    for _, line in lines:
        if line.rstrip() == fence:
            return
        yield line
    raise AssertionError("a block of code does not end")


def blocks(*languages: str, pages: list[Path] = PAGES) -> list[Block]:
    """All blocks of some languages."""
    return [block for page in pages for block in read(page).blocks if block.language in languages]
