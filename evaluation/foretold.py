"""How well does `plan` foretell the time of a run?

    python -m evaluation foretold [--models wikilm-8m demo] [--recipes nf4-gptq ...]

Each row is a plan, then the run that it is of, on few tokens. Both are in seconds of the processor, so that a
neighbour on the machine counts in neither; with one thread they are the seconds of an idle machine. The
stages begin with their first line of progress and end where the result is evaluated. SmolLM2, which `python
-m evaluation reference-models` makes, is measured with one recipe. The result goes to results/foretold.json.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation import machine, results
from evaluation.models import LENGTH, MODELS, present
from evaluation.options import parser
from evaluation.reference_models import SMOLLM2
from evaluation.results import ROOT, ForetoldRow
from llmcompress.data.sources import DataSpec
from llmcompress.modeling.sequential import EVALUATE
from llmcompress.pipeline.plan import plan_recipe
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe

SAMPLES, EVALUATED = 16, 8  # sequences
SHIPPED = ("nf4-nearest", "nf4-gptq", "w8a8", "ffn-75-obs")
STAGES = {
    "w8a8, neither smoothed nor protected": "quantize: {format: w8a8, rounding: gptq}",
    "nf4-learned in 40 steps": "quantize: {format: nf4, rounding: learned, steps: 40}",
}
RECIPES = {
    **{name: Recipe.from_file(ROOT / "recipes" / f"{name}.yaml") for name in SHIPPED},
    **{name: Recipe.parse(f"stages: [{{{stage}}}]") for name, stage in STAGES.items()},
}


@dataclass
class Clock:
    """Seconds of the processor at which each part of a run began, by its line of progress."""

    began: dict[str, float] = field(default_factory=dict)

    def track(self, things: Iterable[Any], what: str, count: int) -> Iterable[Any]:
        """The Track of a run."""
        self.began.setdefault(what, time.process_time())
        return things

    @property
    def stages_s(self) -> float:
        """Seconds from the beginning of the first stage to the evaluation of the result."""
        return self.began[EVALUATE] - min(self.began.values())


def recipe_of(model: str, name: str) -> Recipe:
    """A recipe on the text of a model."""
    data = DataSpec(source=MODELS[model].text, samples=SAMPLES, length=LENGTH, evaluation_samples=EVALUATED)
    return RECIPES[name].model_copy(update={"data": data})


def foretell(model: str, name: str) -> dict[str, float]:
    """What the plan of a run says, and what the plan itself took."""
    begun = time.process_time()
    plan = plan_recipe(recipe_of(model, name), base=MODELS[model].base)
    return {
        "stages_foretold_s": sum(row.seconds or 0.0 for row in plan.rows),
        "run_foretold_s": plan.seconds,
        "plan_cpu_s": time.process_time() - begun,
    }


def measure(model: str, name: str) -> dict[str, float]:
    """What the run takes."""
    clock, begun = Clock(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        run_recipe(recipe_of(model, name), out, base=MODELS[model].base, track=clock.track)
    return {"stages_cpu_s": clock.stages_s, "run_cpu_s": time.process_time() - begun}


def main(argv: Sequence[str]) -> int:
    """Foretell and measure, and write each row as soon as it is known."""
    options = parser("foretold", __doc__)
    options.add_argument("--models", nargs="+", choices=MODELS, default=present())
    options.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    given = machine.parse(options, argv, threads=1)
    for model in given.models:
        for name in given.recipes if model != SMOLLM2 else ["nf4-gptq"]:
            told, taken = foretell(model, name), measure(model, name)
            row = ForetoldRow.model_validate(
                {"model": model, "recipe": name, "tokens": SAMPLES * LENGTH, "commit": machine.commit()}
                | told
                | taken
            )
            facts = {"rows": results.merge("foretold", ("model", "recipe"), row)}
            results.write("foretold", machine.head(), facts)
            print(
                f"{model}, {name}: stages {row.stages_foretold_s:.1f} s foretold, {row.stages_cpu_s:.1f} s "
                f"measured; run {row.run_foretold_s:.1f} s and {row.run_cpu_s:.1f} s",
                file=sys.stderr,
                flush=True,
            )
    return 0
