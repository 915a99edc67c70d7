"""Write the committed results into README.md and the heads of the recipes, so that no number there is typed by hand.

    python evaluation/tables.py [--check]

Between `<!-- NAME -->` and `<!-- end NAME -->` of README.md stands what is made here; in a recipe, the lines from `# measured`
to the first line that is no comment. With --check nothing is written, and the exit code is 1 where something would change.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from markdown import between, table
from recipe_tables import STOCK, ratio, recipe_texts

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "evaluation" / "results"
MODELS = ("demo", "wikilm-8m", "stories260k")
WIDEST = 10  # columns of a table of speeds


def load(name: str) -> dict[str, Any] | None:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def rows_of(model: str) -> dict[str, dict[str, Any]]:
    result = load(f"fidelity-{model}")
    return {row["recipe"]: row for row in result["rows"]} if result else {}


def fidelity() -> str:
    """One table a model: every recipe beside stock bitsandbytes at the same bytes."""
    parts = []
    for model in MODELS:
        result, rows = load(f"fidelity-{model}"), rows_of(model)
        if result is None:
            continue
        lines = [
            [
                name if name not in STOCK else f"{name} ({STOCK[name]})",
                f"{row['bits']:.3f}",
                f"{row['size_bytes'] / 1e6:.2f}",
                f"{row['kl_nats_mean']:.5f}",
                ratio(rows, name),
                f"{100 * row['top1_agreement']:.2f} %",
                f"{row['perplexity']:.3f}",
                f"{row['seconds']:.0f}",
            ]
            for name, row in rows.items()
        ]
        base = next(iter(rows.values()))["base_perplexity"]
        header = [
            "recipe",
            "bits a weight",
            "MB on disk",
            "KL, nats",
            "of its baseline",
            "same first token",
            "perplexity",
            "seconds",
        ]
        where = " / ".join(sorted({row["environment"]["device"] for row in rows.values()}))
        parts.append(f"**{model}** on {result['text']}, base perplexity {base:.3f} ({where}; commits in the file):\n")
        parts.append(table(header, lines) + "\n")
    return "\n".join(parts)


def rivals() -> str:
    """The rivals beside ours, calibrated and evaluated on the same windows."""
    parts = []
    for model in MODELS:
        result, ours = load(f"rivals-{model}"), rows_of(model)
        if result is None:
            continue
        lines = [
            [
                f"{entry['method']} ({next(f'{package} {version}' for package, version in entry['versions'].items())})",
                f"{entry['bits_per_weight']:.3f}",
                f"{entry['kl_nats_mean']:.5f}",
                f"{100 * entry['top1_agreement']:.2f} %",
                f"{entry['seconds']:.0f}",
            ]
            for entry in result["rivals"].values()
            if "kl_nats_mean" in entry
        ]
        for name in ("nf4-gptq-double", "nf4-learned-double", "nf4-learned"):
            if name in ours:
                row = ours[name]
                agreement, seconds = f"{100 * row['top1_agreement']:.2f} %", f"{row['seconds']:.0f}"
                lines.append([f"llmcompress {name}", f"{row['bits']:.3f}", f"{row['kl_nats_mean']:.5f}", agreement, seconds])
        parts.append(f"**{model}**:\n")
        lines.sort(key=lambda cells: float(cells[2]))
        parts.append(table(["what", "bits a weight", "KL, nats", "same first token", "seconds"], lines) + "\n")
    return "\n".join(parts)


def cost() -> str:
    """What a run costs against one forward pass, and how it grows."""
    result = load("cost")
    if result is None:
        return ""
    header = [
        "series",
        "layers",
        "width",
        "tokens",
        "quantize, s",
        "forward pass, s",
        "passes",
        "peak memory, MB",
        "checkpoint, MB",
    ]
    lines = [
        [
            row["series"],
            *(str(row[key]) for key in ("layers", "hidden", "tokens")),
            *(f"{row[key]:.1f}" for key in ("quantize_s", "forward_s", "forward_passes")),
            *(f"{row[key] / 1e6:.0f}" for key in ("run_memory_bytes", "checkpoint_bytes")),
        ]
        for row in result["rows"]
    ]
    return (
        "What a run costs against one plain forward pass over the same tokens, on random-weight Llamas, and how it grows "
        f"({result['hardware']}, commit {result['commit']}; memory is above what the imports hold):\n\n{table(header, lines)}\n"
    )


def speed() -> str:
    """How fast the formats are beside the reference of the same run, on a CPU and on a GPU."""
    return "\n".join(
        _speed(result) for name in ("speed-avx2", "speed-avx512", "speed-cuda") if (result := load(name)) is not None
    )


def _speed(result: Any) -> str:
    columns = list(dict.fromkeys((row["what"], row["batch"], row["tokens"]) for row in result["rows"]))
    if len(columns) > WIDEST:  # of the single linears the largest, and not every batch
        largest = [what for what, *_ in columns if what.startswith("linear")][-1]
        columns = [key for key in columns if key[0] == largest or not key[0].startswith("linear")]
        columns = [key for key in columns if key[1] in (1, max(batch for _, batch, _ in columns))]
    found = {(row["candidate"], row["what"], row["batch"], row["tokens"]): row["speedup_p10"] for row in result["rows"]}
    names = dict.fromkeys(row["candidate"] for row in result["rows"])
    header = [
        "candidate",
        *(f"{what}, {f'batch {batch}' if tokens == 1 else f'{tokens} tokens'}" for what, batch, tokens in columns),
    ]
    lines = [[name, *(f"{found[(name, *key)]:.2f} x" if (name, *key) in found else "" for key in columns)] for name in names]
    where = f"{result['hardware']}, {result['cpu_capability']}, commit {result['commit']}"
    return (
        f"Times as fast as {result['reference']} in the same run, at the 10th percentile ({where}):\n\n{table(header, lines)}\n"
    )


def pruning() -> str:
    """What structured pruning loses at the same share of the layers, ours and Torch-Pruning's."""
    ours, theirs, parts = load("pruning"), load("rivals-pruning"), []
    for model, share in dict.fromkeys((row["model"], row["share"]) for row in (ours or {"rows": []})["rows"]):
        lines = []
        for row in [*ours["rows"], *(theirs or {"rows": []})["rows"]]:
            if (row["model"], row["share"]) == (model, share):
                what = row["row"] if "row" in row else f"{row['rival']}: {row['importance']}, {row['scope']}"
                sizes = [f"{row[key] / 1e6:.3f}" for key in ("block_parameters", "parameters")]
                lines.append([what, *sizes, f"{row['kl_nats_mean']:.4f}", f"{row['perplexity']:.2f}", f"{row['seconds']:.0f}"])
        lines.sort(key=lambda cells: float(cells[3]))
        base = next(row["base_perplexity"] for row in ours["rows"] if row["model"] == model)
        parts.append(f"**{model}**, {100 * share:.0f} % of the parameters of its layers (base perplexity {base:.2f}):\n")
        parts.append(table(["what", "M in layers", "M in all", "KL, nats", "perplexity", "seconds"], lines) + "\n")
    return "\n".join(parts)


def pruned_speed() -> str:
    """How fast models of fewer parameters are."""
    result = load("pruned_speed")
    if result is None:
        return ""
    keys = ("block_parameters", "flops", "reading_time", "decoding_time")
    lines = [[row["cut"], *(f"{row[key]:.3f}" for key in keys), str(row["kv_cache_bytes_per_token"])] for row in result["rows"]]
    header = ["cut", "layer parameters", "operations", "time to read", "time to decode", "cache, bytes a token"]
    where = f"{result['hardware']}, commit {result['commit']}"
    return f"As shares of the whole model's, in the same run ({where}):\n\n{table(header, lines)}\n"


def healing() -> str:
    """What training wins back of what pruning lost."""
    result, parts = load("healing"), []
    for model in dict.fromkeys(row["model"] for row in (result or {"rows": []})["rows"]):
        rows = [row for row in result["rows"] if row["model"] == model]
        lines = [
            [
                row["row"],
                f"{row['steps']} x {row['batch'] * 256 / 1000:.0f} k",
                f"{row['learning_rate']:g}",
                f"{row['kl_nats_mean']:.4f}",
                f"{100 * row['won_back']:.0f} %",
                f"{row['perplexity']:.2f}",
                f"{row['seconds']:.0f}",
            ]
            for row in sorted(rows, key=lambda row: float(row["kl_nats_mean"]))
        ]
        first = rows[0]
        what = f"**{model}**, cut to 60 % of the parameters of its layers ({first['cut']}; KL {first['kl_cut']:.4f} untrained, "
        parts.append(f"{what}base perplexity {first['base_perplexity']:.2f}; {result['hardware']}):\n")
        parts.append(table(["training", "tokens", "rate", "KL, nats", "won back", "perplexity", "seconds"], lines) + "\n")
    return "\n".join(parts)


def sharing() -> str:
    """What each way of making a model smaller loses at the same bytes, and how what is shared is best found."""
    parts = []
    for model in MODELS:
        if (result := load(f"sharing-{model}")) is None:
            continue
        rows = {row["row"]: row for row in result["rows"]}
        base = next(iter(rows.values()))["base_perplexity"]
        parts.append(f"**{model}** (base perplexity {base:.2f}; {result['hardware']}), KL in nats alone -> healed:\n")
        parts.append(_ways(rows) + "\n")
        for kind, what in (("tied", "embedding and head as one"), ("grouping", "how layers that share are found")):
            if lines := [_lost(rows, name) for name in rows if name.startswith(f"{kind}: ") and not name.endswith("healed")]:
                if kind == "tied":
                    lines.append(["least squares", *_lost(rows, "ways: tie embedding and head")[1:]])
                lines.sort(key=lambda cells: float(cells[2].split()[0]))
                parts.append(table([what, "bytes", "KL, nats", "perplexity"], lines) + "\n")
    return "\n".join(parts)


def _ways(rows: dict[str, Any]) -> str:
    """By way and share of the parameters; codes in one line each, with the bytes that they have."""
    shares = ("90 %", "75 %", "60 %", "50 %")
    ways = list(dict.fromkeys(name.split(", ")[1] for name in rows if name.startswith(tuple(f"ways: {s}" for s in shares))))
    lines = [[way, *(_lost(rows, f"ways: {share}, {way}")[2] for share in shares)] for way in ways]
    codes = [name for name in rows if name.startswith("ways: ") and not name.startswith(tuple(f"ways: {s}" for s in shares))]
    for name in [name for name in codes if not name.endswith("healed")]:
        way, size, lost, _ = _lost(rows, name)
        lines.append(
            [f"{way} ({size} of the bytes)", *(lost if float(size[:-2]) <= float(s[:-2]) + 0.5 else "" for s in shares)]
        )
    return table(["of the parameters", *shares], lines)


def _lost(rows: dict[str, Any], name: str) -> list[str]:
    """What was done, its share of the bytes, KL alone and healed, and perplexity likewise."""
    alone, healed = rows.get(name), rows.get(f"{name}, healed")
    found = [row for row in (alone, healed) if row]
    if not found:
        return [name, "", "", ""]
    size = f"{100 * found[0]['share_of_bytes']:.0f} %"
    lost, perplexity = (" -> ".join(f"{row[k]:.{n}f}" for row in found) for k, n in (("kl_nats_mean", 4), ("perplexity", 2)))
    return [name.partition(": ")[2], size, lost, perplexity]


def lookup_speed() -> str:
    """How long a codebook that is looked up takes, and a plain linear, beside stock nf4, on each kind of CPU."""
    results = [load(f"lookup_speed-{kind}") for kind in ("avx2", "avx512")]
    return "\n".join(_lookup(result) for result in results if result is not None)


def _lookup(result: Any) -> str:
    found = {(row["what"], row["dtype"], row["tokens"], row["candidate"]): row["time_of_nf4_p10"] for row in result["rows"]}
    names = [name for name in dict.fromkeys(key[3] for key in found) if "nf4" not in name]
    tokens = list(dict.fromkeys(key[2] for key in found))
    lines = [
        [what.removeprefix("linear "), dtype, name, *(f"{found[what, dtype, count, name]:.2f}" for count in tokens)]
        for what, dtype in dict.fromkeys(key[:2] for key in found)
        for name in names
    ]
    header = ["linear", "inputs", "candidate", *(f"{count} token{'s' * (count > 1)}" for count in tokens)]
    where = f"{result['hardware']}, {result['cpu_capability']}, commit {result['commit']}"
    return f"Time over that of bitsandbytes' nf4 in the same run, at the 10th percentile ({where}):\n\n{table(header, lines)}\n"


MORE = (
    *(("pruning", pruning), ("pruned speed", pruned_speed), ("healing", healing)),
    *(("sharing", sharing), ("lookup speed", lookup_speed)),
)


def main() -> int:
    wanted = {ROOT / "README.md": (ROOT / "README.md").read_text()}
    for name, make in (
        ("fidelity", fidelity),
        ("rivals", rivals),
        ("cost", cost),
        ("speed", speed),
        *MORE,
    ):
        wanted[ROOT / "README.md"] = between(wanted[ROOT / "README.md"], name, make())
    wanted |= recipe_texts({model: rows_of(model) for model in MODELS})
    stale = [file for file, text in wanted.items() if file.read_text() != text]
    for file in stale:
        print(f"{'stale' if '--check' in sys.argv else 'written'}: {file.relative_to(ROOT)}")
        if "--check" not in sys.argv:
            file.write_text(wanted[file])
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
