"""lm-evaluation-harness evaluates an artefact with its own `hf` model and nothing of ours; needs `pip install
lm_eval`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from llmcompress.pipeline.run import run_recipe
from tests.bases import save_base, small_recipe, write_text

TASK = """
task: facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
EVALUATE = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

pytestmark = pytest.mark.usefixtures("short_runs")
folder, tasks = sys.argv[1:]
manager = TaskManager(include_path=tasks, include_defaults=False)
about = {"pretrained": folder, "max_length": 96, "prefix_token_id": 0}
found = simple_evaluate(
    model="hf", model_args=about, tasks=["facts"], task_manager=manager, device="cpu", batch_size=1
)
assert not any(module.startswith("llmcompress") for module in sys.modules)
print("FOUND", json.dumps(found["results"]["facts"]["byte_perplexity,none"]))
"""


def byte_perplexity(folder: Path, tasks: Path, home: Path) -> float:
    """What the harness says, in a process that does not know us."""
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", EVALUATE, str(folder), str(tasks)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return float(
        next(line for line in done.stdout.splitlines() if line.startswith("FOUND ")).removeprefix("FOUND ")
    )


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install lm_eval")
def test_the_harness_evaluates_an_artefact_as_it_does_its_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    run_recipe(small_recipe(write_text(tmp_path / "facts.txt"), base), tmp_path / "out")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    lines = (tmp_path / "facts.txt").read_text().splitlines()[-20:]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (tasks / "facts.yaml").write_text(TASK.format(file=tmp_path / "facts.jsonl"))
    small, whole = (byte_perplexity(folder, tasks, tmp_path / "home") for folder in (tmp_path / "out", base))
    assert small == pytest.approx(whole, rel=0.05) and small != whole
