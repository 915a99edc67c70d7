"""Run the campaign and print what it counted."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.caches import own_cache
from tests.campaign.artefacts import artefacts
from tests.campaign.bench import Bench, Count
from tests.campaign.configs import configs
from tests.campaign.journals import journals
from tests.campaign.kills import kills
from tests.campaign.pairs import pairs
from tests.campaign.weights import weights
from tests.campaign.words import words

PARTS: dict[str, tuple[Callable[[Bench, int], Count], int]] = {  # each with its tries at scale 1
    "kills": (kills, 30),
    "pairs": (pairs, 30),
    "configs": (configs, 300),
    "journals": (journals, 30),
    "artefacts": (artefacts, 100),
    "weights": (weights, 100),
    "words": (words, 300),
}


def main() -> int:
    """Run the parts; the exit code is 1 where one found a fault."""
    parser = argparse.ArgumentParser(
        description="A fault campaign: what it tries, how it ended, and the faults."
    )
    parser.add_argument("--scale", type=float, default=1.0, help="times the tries of each part")
    parser.add_argument("--seed", type=int, default=0, help="draws the cases")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not be there in a forked child
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLMCOMPRESS_CACHE"] = str(own_cache(Path(folder) / "cache"))
        bench = Bench.set_up(Path(folder), given.seed)
        for name in given.only:
            part, tries = PARTS[name]
            start = time.monotonic()
            count = part(bench, max(1, round(tries * given.scale)))
            outcomes = ", ".join(f"{number} {outcome}" for outcome, number in sorted(count.outcomes.items()))
            print(
                f"{name}: {count.tried} tried, {len(count.faults)} faults, {time.monotonic() - start:.0f} s "
                f"({outcomes})",
                flush=True,
            )
            for fault in count.faults:
                print(f"  fault: {fault}", flush=True)
            faults += len(count.faults)
    print(f"{faults} faults with seed {given.seed}", flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
