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
def test_a_small_campaign_finds_no_fault() -> None:
    command = [sys.executable, "-m", "tests.campaign", "--scale", SCALE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    counted = {name: (int(tried), int(faults)) for name, tried, faults in COUNTED.findall(done.stdout)}
    assert counted.keys() == PARTS.keys(), done.stdout + done.stderr
    assert all(tried for tried, _ in counted.values()), done.stdout
    assert not any(faults for _, faults in counted.values()) and done.returncode == 0, done.stdout
