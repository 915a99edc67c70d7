"""How much longer is a program that loads a model, for importing llmcompress too?

    python -m evaluation import-time

Processes of three kinds take turns: one imports what loading a model needs of transformers, one llmcompress
besides, one llmcompress alone. Each is timed whole, from its start to its end.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median

from evaluation import machine, results
from evaluation.options import parser
from evaluation.results import ImportRow

TURNS = 9
TRANSFORMERS = "from transformers import AutoModelForCausalLM, AutoTokenizer"
PROGRAMS = {
    "transformers": TRANSFORMERS,
    "llmcompress and transformers": f"import llmcompress; {TRANSFORMERS}",
    "llmcompress": "import llmcompress",
    "nothing": "pass",
}


def seconds(program: str) -> float:
    """How long a process takes that runs it."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return time.perf_counter() - start


def main(argv: Sequence[str]) -> int:
    """Time the programs in turn, once unmeasured, and write the medians."""
    machine.parse(parser("import-time", __doc__), argv)
    turns = [{name: seconds(program) for name, program in PROGRAMS.items()} for _ in range(TURNS + 1)][1:]
    rows = [
        ImportRow(
            imports=name,
            seconds=median(turn[name] for turn in turns),
            over_transformers=median(turn[name] - turn["transformers"] for turn in turns),
        )
        for name in PROGRAMS
    ]
    for row in rows:
        print(
            f"{row.imports}: {row.seconds:.3f} s, {row.over_transformers:+.3f} s over transformers",
            flush=True,
        )
    results.write("import_time", machine.head(), {"turns": TURNS, "rows": rows})
    return 0
