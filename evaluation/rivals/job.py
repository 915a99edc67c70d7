"""What every rival's script needs: its arguments, its calibration sequences, and a clock around the work.

Each script runs alone in the rival's own environment, so this module may import only what all of those
environments hold (torch and safetensors). The clock starts after the imports: a rival is charged for loading
the base, for quantising and for writing, not for the start of Python. What was spent goes to `facts.json`
beside the model, where the comparison reads it.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

PATHS = ("base", "calibration", "out", "facts")


class Rows(Dataset[dict[str, Tensor]]):
    """The calibration sequences one by one."""

    def __init__(self, tokens_SL: Tensor) -> None:
        self.tokens_SL = tokens_SL

    def __len__(self) -> int:
        return len(self.tokens_SL)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens_SL[index]}


class Job:
    """Base and output folder, calibration sequences `tokens_SL` int64 [S, L], group size, dtype to load in.

    `more` are arguments that one script alone takes, by name and type; `given` holds all arguments.
    """

    def __init__(self, **more: Callable[[str], Any]) -> None:
        parser = argparse.ArgumentParser()
        for name, kind in more.items():
            parser.add_argument(f"--{name}", type=kind, required=True)
        for name in PATHS:
            parser.add_argument(f"--{name}", type=Path, required=True)
        parser.add_argument("--group", type=int, default=128)
        parser.add_argument(
            "--dtype", default="auto", help="what the base is loaded in: auto (as on disk), float32"
        )
        parser.add_argument("--device", default="cpu", help="where it quantises: cpu, cuda")
        self.given = given = parser.parse_args()
        self.device: str = given.device
        self.base, self.out, self.facts, self.group = (
            str(given.base),
            str(given.out),
            given.facts,
            given.group,
        )
        self.dtype = given.dtype if given.dtype == "auto" else getattr(torch, given.dtype)
        self.tokens_SL = load_file(given.calibration)["windows"]
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        torch.manual_seed(0)
        self.started = time.perf_counter(), time.process_time()

    def finish(self, method: str, folder: str | None = None) -> None:
        """Write `method` in words, what was spent, and the model's `folder` if the rival chose another."""
        facts = {
            "method": method,
            "base_dtype": str(self.dtype).removeprefix("torch."),
            "seconds": round(time.perf_counter() - self.started[0], 1),
            "cpu_seconds": round(time.process_time() - self.started[1], 1),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "folder": str(Path(folder or self.out).relative_to(self.out)),
        }
        self.facts.write_text(json.dumps(facts, indent=1))
