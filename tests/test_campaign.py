"""A small fault campaign; `make campaign` runs a larger one and prints what it counts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign.__main__ import PARTS

ROOT = Path(__file__).parents[1]
# times the tries of tests/campaign/__main__.py
SCALE = str(0.1 * float(os.environ.get("LLMCOMPRESS_CAMPAIGN", "1")))
COUNTED = re.compile(r"^(\w+): (\d+) tried, (\d+) faults", re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_small_campaign_finds_no_fault(part: str) -> None:
    command = [sys.executable, "-m", "tests.campaign", "--scale", SCALE, "--only", part]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    counted = {name: (int(tried), int(faults)) for name, tried, faults in COUNTED.findall(done.stdout)}
    assert counted.keys() == {part} and counted[part][0] > 0, done.stdout + done.stderr
    assert counted[part][1] == 0 and done.returncode == 0, done.stdout
