"""How long does `llmcompress advise` take, and how much of that is importing torch and transformers?

    python -m evaluation advise-time [--turns 5]

Processes take turns: one imports torch, one the classes of a Llama of transformers as well, which is the
least that knows the shapes of a model, and one for each model runs the command. Each is timed whole, from
its start to its end, on the wall and on the processor, after one turn that is not timed. Only configs and
headers are read. The result goes to results/advise_time.json.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from evaluation import machine, results
from evaluation.gpu_compression import EIGHT_B
from evaluation.models import MODELS, present
from evaluation.options import parser
from evaluation.reference_models import SMOLLM2
from evaluation.results import AdviseTimeRow

TORCH, LLAMA = "import torch", "import torch and a Llama of transformers"
IMPORTS = {TORCH: "import torch", LLAMA: "import torch; from transformers import LlamaForCausalLM"}
COMMAND = """
import sys
from llmcompress.cli.app import main
sys.argv = ["llmcompress", *sys.argv[1:]]
main()
"""


def cost(program: str, *arguments: str) -> tuple[float, float]:
    """Seconds of a process on the wall and on the processor."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, processor


def programs(folder: Path) -> dict[str, tuple[str, ...]]:
    """What is timed: a program, and its arguments."""
    EIGHT_B.config(8192).save_pretrained(folder)
    bases = {name: MODELS[name].base for name in ("demo", SMOLLM2) if name in present()}
    bases["a config of a Llama of 8 B parameters"] = str(folder)
    commands: dict[str, tuple[str, ...]] = {what: (program,) for what, program in IMPORTS.items()}
    commands |= {f"advise, {name}": (COMMAND, "advise", base) for name, base in bases.items()}
    commands["advise --for llama.cpp, demo"] = (COMMAND, "advise", "demo", "--for", "llama.cpp")
    return commands


def main(argv: Sequence[str]) -> int:
    """Time the programs in turn, once unmeasured, and write the medians."""
    options = parser("advise-time", __doc__)
    options.add_argument("--turns", type=int, default=5, help="default: %(default)s")
    given = machine.parse(options, argv)
    with tempfile.TemporaryDirectory() as folder:
        timed = programs(Path(folder))
        turns = [{what: cost(*each) for what, each in timed.items()} for _ in range(given.turns + 1)][1:]
    rows = [
        AdviseTimeRow(
            what=what,
            seconds=median(turn[what][0] for turn in turns),
            cpu_seconds=median(turn[what][1] for turn in turns),
            over_imports=median(turn[what][0] - turn[LLAMA][0] for turn in turns),
        )
        for what in timed
    ]
    for row in rows:
        print(f"{row.what}: {row.seconds:.2f} s, {row.cpu_seconds:.2f} s of the processor", flush=True)
    results.write("advise_time", machine.head(), {"turns": given.turns, "rows": rows})
    return 0
