"""The heads of the recipes and the table of all of them, made from the committed results; `tables.py` writes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from markdown import between, table

RECIPES = Path(__file__).parent.parent / "recipes"
Results = dict[str, dict[str, dict[str, Any]]]  # model -> recipe -> its row
BASELINE = {"demo": "nf4-nearest", "nf4-gptq": "nf4-nearest", "nf4-learned": "nf4-nearest", "fp4-gptq": "fp4-nearest"}
BASELINE |= {f"{name}-double": "nf4-nearest-double" for name in ("nf4-gptq", "nf4-learned")}
BASELINE |= dict.fromkeys(("nf4-awq-gptq", "nf4-rotate-gptq"), "nf4-nearest")
BASELINE |= dict.fromkeys(("int8-smooth", "int8-smooth-all", "w8a8", "w8a8-all", "w8a8-static"), "int8-nearest") | {
    "w4a8": "w4a16"
}
STOCK = dict.fromkeys(("nf4-nearest", "nf4-nearest-double", "fp4-nearest", "int8-nearest"), "stock bitsandbytes")
STOCK |= {"int8-nearest-6": "stock bitsandbytes, outliers in float16", "w4a16": "w4a8 with activations as they are"}
STOCK |= {"int8-smooth-all": "nothing spared", "w8a8-all": "nothing spared"}
BASELINE |= {"ffn-75-obs": "ffn-75-magnitude", "kv-half": "kv-half-magnitude", "depth-75-kl": "depth-75-influence"}
BASELINE |= {"ffn-budget": "ffn-budget-uniform", "hidden-75": "hidden-75-plain"}
BASELINE |= {"wanda-2-4": "magnitude-2-4", "sparsegpt-2-4": "magnitude-2-4", "sparsegpt-50": "magnitude-50"}
STOCK |= dict.fromkeys(("ffn-75-magnitude", "kv-half-magnitude"), "magnitude, nothing repaired")
STOCK |= {"depth-75-influence": "layer influence", "ffn-budget-uniform": "as many in every layer"}
STOCK |= {"hidden-75-plain": "nothing repaired"}
STOCK |= dict.fromkeys(("magnitude-2-4", "magnitude-50"), "magnitude, one shot")
STOCK["wanda-50"] = "wanda, one shot"
BASELINE |= {"heal-after-prune": "ffn-budget", "prune-heal-quantize": "ffn-75-nf4", "small-student": "depth-50-kl"}
BASELINE |= {"scale-tuning-nf4": "nf4-gptq", "nf4-learned-tuned": "nf4-gptq"}
UNTRAINED = {"ffn-budget": "untrained", "ffn-75-nf4": "untrained", "depth-50-kl": "untrained", "nf4-gptq": "gptq alone"}
BASELINE |= {"tie-head": "tie-plain", "share-ffn-heal": "share-ffn", "basis-heal": "basis-75", "codebook-16": "nf4-gptq-32"}
UNTRAINED |= dict.fromkeys(("tie-plain", "share-ffn", "basis-75"), "untrained") | {"nf4-gptq-32": "nf4 in layers of 32"}


def ratio(rows: dict[str, dict[str, Any]], name: str) -> str:
    base = BASELINE.get(name)
    if base not in rows:
        return ""
    return f"{rows[name]['kl_nats_mean'] / rows[base]['kl_nats_mean']:.3f} x"


def head(recipe: str, results: Results) -> str:
    """The measured lines of a recipe's head."""
    lines = []
    for model, rows in results.items():
        if recipe in rows:
            row, against = rows[recipe], ratio(rows, recipe)
            baseline = (STOCK | UNTRAINED)[BASELINE[recipe]] if against else ""
            bytes_ = row["size_bytes"] / rows[BASELINE[recipe]]["size_bytes"] if against else 1.0
            where = " at the same bytes" if abs(bytes_ - 1) < 0.01 else f" at {bytes_:.2f} x the bytes"
            times = f" ({against} {baseline}{where})" if against else ""
            ppl = f"perplexity {row['base_perplexity']:.3f} -> {row['perplexity']:.3f}"
            lines.append(f"#   {model}: KL {row['kl_nats_mean']:.5f} nats{times}, {ppl}, {row['seconds']:.0f} s")
    return "\n".join(["# measured (evaluation/results/fidelity-*.json; small models):", *lines]) + "\n" if lines else ""


def with_head(text: str, recipe: str, results: Results) -> str:
    """A recipe's text with its measured lines made new."""
    return re.sub(
        r"\A((?:#(?! measured).*\n)+)(?:# measured.*\n(?:#.*\n)*)?", lambda found: found[1] + head(recipe, results), text
    )


def recipe_texts(results: Results) -> dict[Path, str]:
    """What each recipe file and the table of them should say."""
    files = sorted(RECIPES.glob("*.yaml"))
    texts = {file: with_head(file.read_text(), file.stem, results) for file in files}
    index = RECIPES / "README.md"
    return texts | {index: between(index.read_text(), "recipes", listed(files, results))}


def listed(files: list[Path], results: Results) -> str:
    """A row for each recipe: what it does, and for each model what it costs and brings."""
    header = ["recipe", "what it does", *(f"{model}: KL, nats" for model in results), *(f"{model}: MB" for model in results)]
    lines = []
    for file in files:
        found = [rows.get(file.stem) for rows in results.values()]
        about = file.read_text().splitlines()[0].removeprefix("# ")
        costs = [f"{row['kl_nats_mean']:.5f}" if row else "" for row in found]
        sizes = [f"{row['size_bytes'] / 1e6:.2f}" if row else "" for row in found]
        lines.append([f"[{file.stem}]({file.name})", about, *costs, *sizes])
    return table(header, lines) + "\n"
