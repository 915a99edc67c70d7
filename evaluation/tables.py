"""Write RESULTS.md, the heads of the recipes and their table from the result files.

    python -m evaluation tables [--check]

With --check nothing is written: the exit code is 1, with one line, where a file does not agree with
`results/*.json`.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from evaluation import recipe_heads
from evaluation.baselines import MEANING, STAGES, STOCK
from evaluation.markdown import table
from evaluation.options import parser
from evaluation.results import (
    ROOT,
    AblationRow,
    AdviseTimeRow,
    AttentionRow,
    BosRow,
    CacheRow,
    CalibrationTextRow,
    CodebookSpeedRow,
    CompressionSpeedRow,
    CostRow,
    DistillSpeed,
    ExpertsRow,
    Fidelity,
    FidelityRow,
    ForetoldRow,
    GgufRow,
    GpuCompressionFailure,
    GpuCompressionRow,
    GpuRow,
    HealingRow,
    Held,
    ImportRow,
    LookupSpeed,
    LowRankRow,
    OtherChoicesRow,
    OutlierRow,
    PrunedSpeedRow,
    PruningRow,
    Rival,
    RivalPruningFailure,
    RivalPruningRow,
    Rivals,
    Rows,
    SearchRow,
    SeveralRow,
    SharingRow,
    Speed,
    SublayerRow,
    ThroughputRow,
    TwoSidedRow,
    VocabularyMemoryRow,
    load,
)

MODELS = ("smollm2-135m", "demo", "wikilm-8m", "stories260k")
OURS = ("nf4-gptq-double", "nf4-learned-double", "nf4-learned")  # what stands beside the quantisers of others
WIDTH = 110  # of a paragraph
WIDEST = 10  # columns of a table of speeds
UNTRAINED = "KL in nats/token by share of the parameters that stay, untrained -> after a short distillation"
PARTS = ("attention", "ffn")  # of a layer
SHARES = ("90 %", "75 %", "60 %", "50 %")  # of the parameters, in sharing-*.json


PICTURE = """\
<picture>
  <source media="(prefers-color-scheme: dark)" srcset="pictures/{name}-dark.svg">
  <img src="pictures/{name}-light.svg" alt="{alt}">
</picture>"""


@dataclass(frozen=True)
class Results:
    """The result files of a folder."""

    folder: Path

    def load(self, name: str, kind: type[Held]) -> Held | None:
        """One file, or None where it is not there."""
        return load(self.folder, name, kind)

    def every(self, names: Iterable[str], kind: type[Held]) -> list[Held]:
        """Those of several files that are there."""
        return [found for name in names if (found := self.load(name, kind)) is not None]

    def recipes(self, model: str) -> dict[str, FidelityRow]:
        """The rows of a model by recipe, in the order of their KL."""
        result = self.load(f"fidelity-{model}", Fidelity)
        return {row.recipe: row for row in result.rows} if result else {}


@dataclass(frozen=True)
class Section:
    """A part of RESULTS.md: a heading, what is measured on which model by which command, and its tables."""

    title: str
    about: str
    make: Callable[[Results], str]
    picture: str = ""  # its name in pictures/
    alt: str = ""  # what it shows, in words

    def text(self, body: str) -> str:
        """The section, with its tables in `body`."""
        parts = [f"## {self.title}", wrapped(self.about), body]
        if self.picture:
            parts.insert(2, PICTURE.format(name=self.picture, alt=self.alt))
        return "\n\n".join(parts)


def percent(share: float, digits: int = 0) -> str:
    """A share in percent."""
    return f"{100 * share:.{digits}f} %"


def megabytes(size: float, digits: int = 2) -> str:
    """Bytes in units of 10^6."""
    return f"{size / 1e6:.{digits}f}"


def heading(model: str, about: str = "") -> str:
    """A heading for one model, and what is to be known of it."""
    return f"### {model}\n\n{about}\n" if about else f"### {model}\n"


def where(hardware: str, commit: str = "") -> str:
    """The machine and the measured commit, as a sentence."""
    machine = hardware.replace(" 1 threads", " 1 thread")
    return f"Measured on {machine}, commit {commit}." if commit else f"Measured on {machine}."


def joined(parts: Iterable[str]) -> str:
    """Tables below each other."""
    return "\n".join(parts)


def fidelity(results: Results) -> str:
    """A table for each model: every recipe, in the order of its KL."""
    parts = []
    for model, result in ((model, results.load(f"fidelity-{model}", Fidelity)) for model in MODELS):
        if result is None or not result.rows:
            continue
        rows = {row.recipe: row for row in result.rows}
        header = ["recipe", "bits per weight", "MB", "KL, nats/token", "over baseline", "top-1 agreement"]
        lines = [
            [
                f"{name} ({MEANING[name]})" if name in STAGES or name in STOCK else name,
                f"{row.bits:.3f}",
                megabytes(row.size_bytes),
                f"{row.kl_nats_mean:.5f}",
                recipe_heads.ratio(rows, name),
                percent(row.top1_agreement, 2),
                f"{row.perplexity:.3f}",
                *([] if row.perplexity_2048 is None else [f"{row.perplexity_2048:.3f}"]),
                f"{row.seconds:.0f}",
            ]
            for name, row in rows.items()
        ]
        long = result.rows[0].base_perplexity_2048
        machines = " / ".join(sorted({row.environment.device for row in result.rows}))
        base = f"Evaluated on {result.text}; perplexity of the base {result.rows[0].base_perplexity:.3f}"
        base += "." if long is None else f", on sequences of 2048 tokens {long:.3f}."
        longer = [] if long is None else ["perplexity, 2048 tokens"]
        parts.append(heading(model, f"{base} {where(machines)}"))
        parts.append(table([*header, "perplexity", *longer, "seconds"], lines))
    return joined(parts)


def rivals(results: Results) -> str:
    """The quantisers of others beside ours, in the order of their KL."""
    parts = []
    for model in MODELS:
        if (result := results.load(f"rivals-{model}", Rivals)) is None:
            continue
        found: list[tuple[float, list[str]]] = []
        for name, rival in result.rivals.items():
            if isinstance(rival, Rival):
                what = f"{rival.method} ({rival.package})"
                found.append((rival.kl_nats_mean, [what, f"{rival.bits_per_weight:.3f}", *_quality(rival)]))
            else:
                found.append((float("inf"), [f"{name}: did not run", "", "", "", "", ""]))
        ours = results.recipes(model)
        for name in OURS:
            if (row := ours.get(name)) is not None:
                found.append((row.kl_nats_mean, [f"llmcompress {name}", f"{row.bits:.3f}", *_quality(row)]))
        header = ["quantiser", "bits per weight", "MB", "KL, nats/token", "top-1 agreement", "seconds"]
        parts.append(heading(model, where(result.hardware)))
        parts.append(table(header, [line for _, line in sorted(found, key=lambda entry: entry[0])]))
    return joined(parts)


def _quality(row: Rival | FidelityRow) -> list[str]:
    """Bytes, KL, top-1 agreement and seconds."""
    sizes = [megabytes(row.size_bytes), f"{row.kl_nats_mean:.5f}"]
    return [*sizes, percent(row.top1_agreement, 2), f"{row.seconds:.0f}"]


def ablation(results: Results) -> str:
    """The solver, one ingredient after another."""
    if (result := results.load("ablation-demo", Rows[AblationRow])) is None:
        return ""
    lines = [[row.variant, f"{row.kl_nats_mean:.5f}", f"{row.seconds:.0f}"] for row in result.rows]
    return joined(
        [where(result.hardware, result.commit) + "\n", table(["variant", "KL, nats/token", "seconds"], lines)]
    )


def import_time(results: Results) -> str:
    """Seconds of processes that import this or that."""
    if (result := results.load("import_time", Rows[ImportRow])) is None:
        return ""
    lines = [[row.imports, f"{row.seconds:.2f}", f"{row.over_transformers:+.2f}"] for row in result.rows]
    header = ["a process that imports", "seconds", "over transformers"]
    return joined([where(result.hardware, result.commit) + "\n", table(header, lines)])


def advise_time(results: Results) -> str:
    """Seconds of `advise` beside those of its imports."""
    if (result := results.load("advise_time", Rows[AdviseTimeRow])) is None:
        return ""
    lines = [
        [row.what, f"{row.seconds:.2f}", f"{row.cpu_seconds:.2f}", f"{row.over_imports:+.2f}"]
        for row in result.rows
    ]
    header = ["a process that runs", "seconds", "seconds of the processor", "over the imports"]
    return joined([where(result.hardware, result.commit) + "\n", table(header, lines)])


def outliers(results: Results) -> str:
    """Perplexities of the model with planted outliers, and of the one without."""
    if (result := results.load("outliers", Rows[OutlierRow])) is None:
        return ""
    header = ["format", "KL with outliers, nats/token", "perplexity with outliers", "perplexity without"]
    lines = []
    for row in result.rows:
        original = f"{row.original.perplexity:.3f}" if row.original else ""
        lines.append([row.what, f"{row.planted.kl_nats_mean:.5f}", f"{row.planted.perplexity:.3f}", original])
    base = f"Perplexity of the base {result.rows[0].planted.base_perplexity:.3f}."
    return joined([f"{base} {where(result.hardware, result.commit)}\n", table(header, lines)])


def experts(results: Results) -> str:
    """Stages on a mixture, then what an expert is given by how much text calibrates: tokens of others, and
    tokens with even inputs."""
    if (result := results.load("experts", Rows[ExpertsRow])) is None:
        return ""
    most = max(row.tokens for row in result.rows)
    borrowed, evened = result.rows[0].borrowed, result.rows[0].evened
    lines = [
        [named(row), f"{row.size_bytes / 1e6:.1f}", f"{row.kl_nats_mean:.5f}", f"{row.perplexity:.3f}"]
        for row in result.rows
        if (row.tokens, row.borrowed, row.evened) == (most, borrowed, evened)
    ]
    nf4 = [row for row in result.rows if row.stage == {"format": "nf4"} and row.evened == evened]
    others = [row for row in result.rows if row.borrowed == borrowed and row.tokens < most]
    base = f"Perplexity of the base: {result.rows[0].base_perplexity:.3f}."
    return joined(
        [
            f"{where(result.hardware, result.commit)} {base}\n",
            table(["stage", "MB", "nats/token", "perplexity"], lines),
            by_share(nf4, "borrowed", lambda row: row.borrowed),
            by_share(others, "even", lambda row: row.evened),
        ]
    )


def by_share(rows: Sequence[ExpertsRow], word: str, share_of: Callable[[ExpertsRow], float]) -> str:
    """The KL of stages on each amount of text, by the share of tokens that an expert is given."""
    shares = sorted({share_of(row) for row in rows})
    header = ["stage", "tokens", "least of an expert", *(f"{share:g} {word}" for share in shares)]
    found: dict[tuple[str, int], dict[float, ExpertsRow]] = {}
    for row in rows:
        found.setdefault((named(row), row.tokens), {})[share_of(row)] = row
    lines = [
        [
            stage,
            f"{tokens:,}",
            str(min(row.least_tokens or 0 for row in of.values())),
            *(f"{of[share].kl_nats_mean:.5f}" if share in of else "" for share in shares),
        ]
        for (stage, tokens), of in sorted(found.items(), key=lambda item: item[0][1])
    ]
    return table(header, lines)


def named(row: ExpertsRow) -> str:
    """A stage in words: its format or name, and what differs from the defaults."""
    said = dict(row.stage)
    return ", ".join([str(said.pop("format", row.name)), *(f"{key}: {value}" for key, value in said.items())])


def bos(results: Results) -> str:
    """KL of each recipe by what calibrated and what evaluated it."""
    if (result := results.load("bos", Rows[BosRow])) is None:
        return ""
    found = {
        (row.recipe, row.calibrated_with_bos, row.scored_with_bos): row.kl_nats_mean for row in result.rows
    }
    cases = [(True, True), (False, True), (True, False), (False, False)]  # calibrated, evaluated
    words = {True: "with", False: "without"}
    header = ["recipe", *(f"calibrated {words[one]}, evaluated {words[other]}" for one, other in cases)]
    names = dict.fromkeys(recipe for recipe, *_ in found)
    lines = [[name, *(f"{found[name, one, other]:.5f}" for one, other in cases)] for name in names]
    return joined([where(result.hardware, result.commit) + "\n", table(header, lines)])


def two_sided(results: Results) -> str:
    """KL of each format and rounding with rows by themselves and together, over that of nearest NF4 codes,
    and the seconds of both."""
    if (result := results.load("two_sided", Rows[TwoSidedRow])) is None:
        return ""
    found = {(row.model, row.format, row.rounding, row.two_sided): row for row in result.rows}
    stock = {row.model: row for row in result.rows if row.rounding == "nearest"}
    header = ["model", "format", "bytes, of nf4's", "rounding", "KL, nats/token", "with `two_sided`"]
    header += ["over stock's", "with it", "s of the processor", "with it"]
    lines = []
    for (model, format, rounding, together), row in sorted(found.items()):
        if not together or (alone := found.get((model, format, rounding, False))) is None:
            continue
        over, pair = stock.get(model), (alone, row)
        cells = [f"{each.kl_nats_mean:.5f}" for each in pair]
        cells += [f"{each.kl_nats_mean / over.kl_nats_mean:.3f}" if over else "-" for each in pair]
        cells += [f"{each.cpu_seconds:.0f}" for each in pair]
        size = f"{row.size_bytes / over.size_bytes:.3f}" if over else "-"
        lines.append([model, format, size, rounding, *cells])
    return joined([where(result.hardware, result.commit) + "\n", table(header, lines)])


def gguf(results: Results) -> str:
    """llama.cpp's formats: what is lost by whose rounding, and what llama.cpp computes of it."""
    if (result := results.load("gguf", Rows[GgufRow])) is None:
        return ""
    theirs = {(row.model, row.format): row for row in result.rows if row.rounding == "llama.cpp"}
    header = ["model", "format", "KL of llama.cpp's codes, nats/token", "KL of ours", "ours / llama.cpp's"]
    header += [
        "perplexity of the base, of llama.cpp's, of ours",
        "KL of llama.cpp from transformers",
        "top-1",
    ]
    lines = []
    for row in result.rows:
        other = theirs.get((row.model, row.format))
        if row.rounding != "llama.cpp" and other is not None:
            perplexities = (row.base_perplexity, other.perplexity, row.perplexity)
            lines.append(
                [
                    row.model,
                    row.format,
                    f"{other.kl_nats_mean:.5f}",
                    f"{row.kl_nats_mean:.5f}",
                    f"{row.kl_nats_mean / other.kl_nats_mean:.2f}",
                    ", ".join(f"{each:.3f}" for each in perplexities),
                    f"{row.kl_llama_cpp:.1e}",
                    percent(row.top1_llama_cpp, 1),
                ]
            )
    return joined([where(result.hardware, result.commit) + "\n", table(header, lines)])


def gpu(results: Results) -> str:
    """Recipes run on a GPU, beside the same on a CPU."""
    if (result := results.load("gpu", Rows[GpuRow])) is None:
        return ""
    header = ["model", "recipe", "KL on the GPU, nats/token", "KL on a CPU", "seconds"]
    lines = [
        [
            row.model,
            row.recipe,
            f"{row.kl_nats_mean:.5f}",
            f"{row.kl_nats_mean_cpu:.5f}",
            f"{row.seconds:.0f}",
        ]
        for row in result.rows
    ]
    return joined([where(result.hardware, result.commit) + "\n", table(header, lines)])


def gpu_compression(results: Results) -> str:
    """What quantising random models takes on a GPU, each model's rows together, the missing ones last."""
    kind = Rows[GpuCompressionRow | GpuCompressionFailure]
    if (result := results.load("gpu_compression", kind)) is None:
        return ""
    header = ["model", "layers", "method", "seconds", "GPU memory, GB", "host memory, GB"]
    lines, missing = [], []
    for row in sorted(result.rows, key=lambda row: row.model):
        method = f"{row.method} {row.version}" if row.version else row.method
        if isinstance(row, GpuCompressionFailure):
            missing.append(f"- {row.model}, {method}: {row.error}")
            continue
        gpu = f"{row.peak_gpu_bytes / 1e9:.2f}" if row.peak_gpu_bytes is not None else ""
        memory = [gpu, f"{row.peak_host_bytes / 1e9:.2f}"]
        lines.append([row.model, str(row.layers), method, f"{row.seconds:.1f}", *memory])
    parts = [where(result.hardware, result.commit) + "\n", table(header, lines)]
    return joined([*parts, *(["Not measured:\n", "\n".join(missing) + "\n"] if missing else [])])


def pruning(results: Results) -> str:
    """A table for each model and share of the parameters, ours and Torch-Pruning's by their KL."""
    if (ours := results.load("pruning", Rows[PruningRow])) is None:
        return ""
    others = results.load("rivals-pruning", Rows[RivalPruningRow | RivalPruningFailure])
    theirs = [row for row in (others.rows if others else []) if isinstance(row, RivalPruningRow)]
    header = ["method", "M in layers", "M in all", "KL, nats/token", "perplexity", "seconds"]
    parts = []
    for model in dict.fromkeys(row.model for row in ours.rows):
        base = next(row.base_perplexity for row in ours.rows if row.model == model)
        parts.append(heading(model, f"Perplexity of the base {base:.2f}. {where(ours.hardware)}"))
        for share in dict.fromkeys(row.share for row in ours.rows if row.model == model):
            named = [(row.row, row) for row in ours.rows if (row.model, row.share) == (model, share)]
            lines = [_pruned(name, row) for name, row in named]
            lines += [
                _pruned(f"{row.rival}: {row.importance}, {row.scope}", row)
                for row in theirs
                if (row.model, row.share) == (model, share)
            ]
            lines.sort(key=lambda cells: float(cells[3]))
            parts.append(f"{percent(share)} of the parameters of the decoder layers:\n")
            parts.append(table(header, lines))
    return joined(parts)


def _pruned(name: str, row: PruningRow | RivalPruningRow) -> list[str]:
    sizes = [f"{row.block_parameters / 1e6:.3f}", f"{row.parameters / 1e6:.3f}"]
    return [name, *sizes, f"{row.kl_nats_mean:.4f}", f"{row.perplexity:.2f}", f"{row.seconds:.0f}"]


def healing(results: Results) -> str:
    """A table for each model: ways to train it after the same cut, in the order of their KL."""
    if (result := results.load("healing", Rows[HealingRow])) is None:
        return ""
    header = ["training", "tokens", "learning rate", "KL, nats/token", "recovered", "perplexity", "seconds"]
    parts = []
    for model in dict.fromkeys(row.model for row in result.rows):
        rows = sorted((row for row in result.rows if row.model == model), key=lambda row: row.kl_nats_mean)
        lines = [
            [
                row.row,
                f"{row.steps} x {row.batch * 256 / 1000:.0f} k",
                f"{row.learning_rate:g}",
                f"{row.kl_nats_mean:.4f}",
                percent(row.won_back),
                f"{row.perplexity:.2f}",
                f"{row.seconds:.0f}",
            ]
            for row in rows
        ]
        cut = f"Cut by {rows[0].cut}: KL {rows[0].kl_cut:.4f} before training."
        base = f"Perplexity of the base {rows[0].base_perplexity:.2f}."
        parts.append(heading(model, f"{cut} {base} {where(result.hardware)}"))
        parts.append(table(header, lines))
    return joined(parts)


def calibration_text(results: Results) -> str:
    """The mean loss over seeds for each amount and kind of text, and the range of the seeds."""
    if (result := results.load("calibration_text", Rows[CalibrationTextRow])) is None:
        return ""
    header = ["text", "thousand tokens", "KL, nats/token", "of each seed", "seconds"]
    parts = []
    for model in dict.fromkeys(row.model for row in result.rows):
        of = [row for row in result.rows if row.model == model]
        lines = []
        for text, tokens in dict.fromkeys((row.text, row.tokens) for row in of):
            rows = [row for row in of if (row.text, row.tokens) == (text, tokens)]
            losses = [row.kl_nats_mean for row in rows]
            lines.append(
                [
                    text,
                    f"{tokens / 1000:.0f}",
                    f"{mean(losses):.4g}",
                    ", ".join(f"{loss:.4g}" for loss in losses),
                    f"{mean(row.seconds for row in rows):.0f}",
                ]
            )
        parts.append(heading(model, where(" and ".join(dict.fromkeys(row.hardware for row in of)))))
        parts.append(table(header, lines))
    return joined(parts)


def search(results: Results) -> str:
    """For each model and size what the search found, the best of one format, and random choices."""
    if (result := results.load("search", Rows[SearchRow])) is None:
        return ""
    header = ["size", "found", "expected", "best of one format", "its KL", "ratio"]
    header += ["healed", "healed of one format", "pruned", "random"]
    parts = []
    for model in dict.fromkeys(row.model for row in result.rows):
        of = [row for row in result.rows if row.model == model]
        by_row = {(row.kind, row.row): row for row in of}
        lines = []
        for found in (row for row in of if row.kind == "found"):
            singles = [row for row in of if row.kind == "single" and row.size_bytes <= found.size_bytes]
            best = min(singles, key=lambda row: row.kl_nats_mean, default=None)
            pruned = by_row.get(("single", f"pruned, {found.row}"))
            random = by_row.get(("random", found.row))
            lines.append(
                [
                    f"{found.row}, {megabytes(found.size_bytes)} MB",
                    kl(found),
                    f"{found.expected_nats:.3g}" if found.expected_nats is not None else "",
                    f"{best.row}, {percent(best.share_of_bytes)}" if best else "none so small",
                    kl(best),
                    f"{found.kl_nats_mean / best.kl_nats_mean:.2f}" if best else "",
                    *(kl(by_row.get(("healed", f"{kind}, {found.row}"))) for kind in ("found", "single")),
                    kl(pruned),
                    kl(random),
                ]
            )
        drawn = correlations([row for row in of if row.kind == "drawn"])
        hardware = " and ".join(dict.fromkeys(row.hardware for row in of))
        parts.append(heading(model, f"{drawn}{where(hardware)}"))
        parts.append(table(header, lines))
        wide = [
            [
                f"{row.row}, {megabytes(row.size_bytes)} MB",
                kl(row),
                f"{row.expected_nats:.3g}" if row.expected_nats is not None else "",
                kl(by_row.get(("found", row.row))) or "none so small",
            ]
            for row in of
            if row.kind == "widths"
        ]
        if wide:
            parts.append(table(["size", "with widths", "expected", "formats alone"], wide))
        rivals = [
            [row.row, megabytes(row.size_bytes), kl(row), *beside(by_row.get(("beside a rival", row.row)))]
            for row in of
            if row.kind == "rival"
        ]
        if rivals:
            parts.append(table(["AutoRound", "MB", "KL", "found, MB", "its KL"], rivals))
    return joined(parts)


def other_choices(results: Results) -> str:
    """What a search would make of products of low rank and of missing sublayers."""
    products = results.load("other_choices-low_rank", Rows[LowRankRow])
    sizes = results.load("other_choices-sizes", Rows[OtherChoicesRow])
    parts = results.load("other_choices-sublayers", Rows[SublayerRow])
    if products is None or sizes is None or parts is None:
        return ""
    found = [where(products.hardware, products.commit) + "\n"]
    for model in dict.fromkeys(row.model for row in products.rows):
        rows = [row for row in products.rows if row.model == model]
        found += [heading(model, f"{rows[0].linears} linears."), as_products(rows)]
        if chosen := [row for row in sizes.rows if row.model == model]:
            found.append(within(chosen))
        found.append(left_out([row for row in parts.rows if row.model == model]))
    return joined(found)


def as_products(rows: Sequence[LowRankRow]) -> str:
    """In how many linears of a model a product loses less than a format of the same bytes."""
    header, by_format = ["in the bytes of"], dict[str, list[str]]()
    for name in dict.fromkeys(row.factors for row in rows):
        header += [f"{name}: lose less", "on the hull", "median ratio"]
    for row in rows:
        cells = [str(row.better), str(row.on_hull), f"{row.median_ratio:.3g}"]
        by_format.setdefault(row.format, [row.format]).extend(cells)
    return table(header, [*by_format.values()])


def within(rows: Sequence[OtherChoicesRow]) -> str:
    """The least nats that are expected within each size of a model."""
    header = ["size", "formats", *(f"and {name} products" for name in rows[0].products)]
    header += ["and widths", "and parts left out", "parts"]
    lines = []
    for row in rows:
        nats = [row.formats, *row.products.values(), row.widths, row.sublayers]
        lines.append([row.size, *map(few, nats), str(row.gone)])
    return table(header, lines)


def left_out(rows: Sequence[SublayerRow]) -> str:
    """What a model loses without each part, and the slope from which that is better, in nats/MB."""
    by_part = {(row.layer, row.part): row for row in rows}
    lines = []
    for layer in sorted({row.layer for row in rows}):
        here = [by_part.get((layer, part)) for part in PARTS]
        losses = [few(row.kl_nats_mean if row else None) for row in here]
        slopes = [few(1e6 * row.slope if row and row.slope else None) for row in here]
        lines.append([str(layer), *losses, *slopes])
    header = ["layer", *(f"KL without its {part}" for part in PARTS), *(f"slope, {part}" for part in PARTS)]
    return table(header, lines)


def few(value: float | None) -> str:
    """A number in three digits, if there is one."""
    return "" if value is None else f"{value:.3g}"


def beside(row: SearchRow | None) -> list[str]:
    """The size and the KL of a row, if there is one."""
    return [megabytes(row.size_bytes), kl(row)] if row else ["", ""]


def kl(row: SearchRow | None) -> str:
    """The KL of a row, if there is one."""
    return f"{row.kl_nats_mean:.3g}" if row else ""


def correlations(rows: Sequence[SearchRow]) -> str:
    """How well the loss of random choices is foretold, in words."""
    if not rows:
        return ""
    measured = [row.kl_nats_mean for row in rows]
    corrected, alone = (
        rank_correlation(measured, [expected or 0.0 for expected in each])
        for each in ([row.expected_nats for row in rows], [row.second_order_nats for row in rows])
    )
    return (
        f"Rank correlation of the loss of {len(rows)} random choices with the expected one: {corrected:.3f}, "
        f"to second order alone {alone:.3f}. "
    )


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation of two lists without equal values."""
    ranks = [[sorted(values).index(value) for value in values] for values in (one, other)]
    gaps: int = sum((a - b) ** 2 for a, b in zip(*ranks, strict=True))
    return 1 - 6 * gaps / (len(one) * (len(one) * len(one) - 1))


def sharing(results: Results) -> str:
    """Ways to make each model smaller, to tie its embedding and head, and to group layers that share."""
    parts = []
    for model in MODELS:
        if (result := results.load(f"sharing-{model}", Rows[SharingRow])) is None:
            continue
        rows = {row.row: row for row in result.rows}
        base = f"Perplexity of the base {result.rows[0].base_perplexity:.2f}."
        parts.append(heading(model, f"{base} {where(result.hardware)}"))
        parts.append(f"{UNTRAINED}:\n")
        parts.append(_ways(rows))
        tied = _losses(rows, "tied")
        if tied:
            tied.append(["least squares", *_loss(rows, "ways: tie embedding and head")[1:]])
        grouped = _losses(rows, "grouping")
        for what, lines in (("tied embedding and head", tied), ("how layers that share are found", grouped)):
            if lines:
                lines.sort(key=lambda cells: float(cells[2].split()[0]))
                parts.append(table([what, "bytes", "KL, nats/token", "perplexity"], lines))
    return joined(parts)


def _losses(rows: Mapping[str, SharingRow], kind: str) -> list[list[str]]:
    """The rows of a kind, untrained and trained in one line."""
    names = [name for name in rows if name.startswith(f"{kind}: ") and not name.endswith("healed")]
    return [_loss(rows, name) for name in names]


def _ways(rows: Mapping[str, SharingRow]) -> str:
    """By way and share of the parameters; codes have one size, and stand where it is small enough."""
    sized = tuple(f"ways: {share}" for share in SHARES)
    ways = dict.fromkeys(name.split(", ")[1] for name in rows if name.startswith(sized))
    lines = [[way, *(_loss(rows, f"ways: {share}, {way}")[2] for share in SHARES)] for way in ways]
    others = [name for name in rows if name.startswith("ways: ") and not name.startswith(sized)]
    for name in others:
        if name.endswith("healed"):
            continue
        way, size, loss, _ = _loss(rows, name)
        small = [loss if float(size[:-2]) <= float(share[:-2]) + 0.5 else "" for share in SHARES]
        lines.append([f"{way} ({size} of the bytes)", *small])
    return table(["method", *SHARES], lines)


def _loss(rows: Mapping[str, SharingRow], name: str) -> list[str]:
    """What was done, its share of the bytes, KL and perplexity untrained -> trained."""
    found = [rows[each] for each in (name, f"{name}, healed") if each in rows]
    if not found:
        return [name, "", "", ""]
    kl = " -> ".join(f"{row.kl_nats_mean:.4f}" for row in found)
    perplexity = " -> ".join(f"{row.perplexity:.2f}" for row in found)
    return [name.partition(": ")[2], percent(found[0].share_of_bytes), kl, perplexity]


def cost(results: Results) -> str:
    """Each run beside a forward pass over the same tokens."""
    if (result := results.load("cost", Rows[CostRow])) is None:
        return ""
    header = ["series", "layers", "width", "tokens", "quantize, s", "forward pass, s", "passes", "memory, MB"]
    lines = [
        [
            row.series,
            str(row.layers),
            str(row.hidden),
            str(row.tokens),
            f"{row.quantize_s:.1f}",
            f"{row.forward_s:.1f}",
            f"{row.forward_passes:.1f}",
            megabytes(row.run_memory_bytes, 0),
            megabytes(row.checkpoint_bytes, 0),
        ]
        for row in result.rows
    ]
    about = f"Memory is the peak above what the imports hold. {where(result.hardware, result.commit)}\n"
    return joined([about, table([*header, "checkpoint, MB"], lines)])


def compression_speed(results: Results) -> str:
    """Our quantisers and those of others on each model, the fastest first."""
    if (result := results.load("compression_speed", Rows[CompressionSpeedRow])) is None:
        return ""
    header = ["quantiser", "CPU seconds", "seconds", "peak memory, MB", "KL, nats/token"]
    header += ["whole run, CPU seconds", "its peak memory, MB"]
    parts = [where(result.hardware, result.commit) + "\n"]
    for model in dict.fromkeys(row.model for row in result.rows):
        rows = sorted((row for row in result.rows if row.model == model), key=lambda row: row.cpu_seconds)
        lines = [
            [
                row.what if row.package == "llmcompress" else f"{row.what} ({row.package})",
                f"{row.cpu_seconds:.0f}",
                f"{row.seconds:.0f}",
                megabytes(row.peak_memory_bytes, 0),
                "" if row.kl_nats_mean is None else f"{row.kl_nats_mean:.5f}",
                "" if row.run_cpu_seconds is None else f"{row.run_cpu_seconds:.0f}",
                "" if row.run_peak_memory_bytes is None else megabytes(row.run_peak_memory_bytes, 0),
            ]
            for row in rows
        ]
        parts += [heading(model), table(header, lines)]
    return joined(parts)


def several(results: Results) -> str:
    """Each rounding in one process and in several."""
    if (result := results.load("several_processes", Rows[SeveralRow])) is None:
        return ""
    header = ["model", "rounding", "processes", "stage, s", "speed-up", "run, s", "codes that differ"]
    header += ["in the first layer", "KL"]
    lines = [
        [
            row.model,
            row.rounding,
            str(row.processes),
            f"{row.stage_s:.1f}",
            f"{row.stage_speedup:.2f} x",
            f"{row.run_s:.1f}",
            percent(row.codes_that_differ, 1),
            percent(row.codes_that_differ_first_layer, 3),
            f"{row.kl_nats_mean:.6f}",
        ]
        for row in result.rows
    ]
    return joined([where(result.hardware, result.commit) + "\n", table(header, lines)])


def vocabulary_memory(results: Results) -> str:
    """Peak memory of runs on models of growing vocabulary."""
    if (result := results.load("vocabulary_memory", Rows[VocabularyMemoryRow])) is None:
        return ""
    sizes = ("checkpoint", "whole logits", "imports", "run", "peak")
    header = ["vocabulary", "rounding", *(f"{what}, MB" for what in sizes)]
    lines = [
        [
            str(row.vocabulary),
            row.rounding,
            megabytes(row.checkpoint_bytes, 0),
            megabytes(row.whole_logits_bytes, 0),
            megabytes(row.baseline_memory_bytes, 0),
            megabytes(row.run_memory_bytes, 0),
            megabytes(row.peak_memory_bytes, 0),
        ]
        for row in result.rows
    ]
    about = (
        "Whole logits are one float32 copy of those of the two sequences that are evaluated; the run is the "
        f"peak above what the imports hold. {where(result.hardware, result.commit)}\n"
    )
    return joined([about, table(header, lines)])


def foretold(results: Results) -> str:
    """The time that a plan foretold beside that of the run, in seconds of the processor."""
    if (result := results.load("foretold", Rows[ForetoldRow])) is None:
        return ""
    header = ["model", "recipe", "tokens", "stages foretold, s", "measured, s", "ratio"]
    lines = [
        [
            row.model,
            row.recipe,
            str(row.tokens),
            f"{row.stages_foretold_s:.1f}",
            f"{row.stages_cpu_s:.1f}",
            f"{row.stages_foretold_s / row.stages_cpu_s:.2f}",
            f"{row.run_foretold_s:.1f}",
            f"{row.run_cpu_s:.1f}",
            f"{row.run_foretold_s / row.run_cpu_s:.2f}",
        ]
        for row in sorted(result.rows, key=lambda row: MODELS.index(row.model))
    ]
    run = ["run foretold, s", "measured, s", "ratio"]
    return joined([where(result.hardware, result.commit) + "\n", table([*header, *run], lines)])


def throughput(results: Results) -> str:
    """Tokens/s of evaluation, and its ratio to bare forward passes."""
    if (result := results.load("throughput", Rows[ThroughputRow])) is None:
        return ""
    header = [
        "model",
        "bare, tokens/s",
        "perplexity, tokens/s",
        "ratio",
        "with KL, tokens/s",
        "ratio to two passes",
    ]
    lines = [
        [
            row.model,
            f"{row.bare_tokens_per_s:.0f}",
            f"{row.perplexity_tokens_per_s:.0f}",
            f"{row.perplexity_ratio:.3f}",
            f"{row.perplexity_kl_tokens_per_s:.0f}",
            f"{row.perplexity_kl_ratio:.3f}",
        ]
        for row in result.rows
    ]
    return joined([where(result.hardware, result.commit) + "\n", table(header, lines)])


def distill_speed(results: Results) -> str:
    """Steps/s of each way to train, for each student."""
    if (result := results.load("distill_speed", DistillSpeed)) is None:
        return ""
    header = ["student", "training", "steps/s", "over the bare loop"]
    lines = [
        [
            f"{percent(student.layers, 1)} of the layers",
            row.what,
            f"{row.steps_per_s:.3f}",
            f"{row.of_bare_loop:.2f} x",
        ]
        for student in result.students
        for row in student.rows
    ]
    shape = f"Steps of {result.batch} sequences of {result.length} tokens on {result.model}."
    return joined([f"{shape} {where(result.hardware, result.commit)}\n", table(header, lines)])


def speed(results: Results) -> str:
    """A table for each processor."""
    names = (
        "speed-avx2",
        "speed-avx512",
        "speed-cuda",
        "speed-cuda-decode",
        "speed-avx2-decode",
        "speed-avx512-decode",
    )
    return joined(_speed(result) for result in results.every(names, Speed))


def _speed(result: Speed) -> str:
    columns = list(dict.fromkeys((row.what, row.batch, row.tokens) for row in result.rows))
    if len(columns) > WIDEST:  # the largest of the single linears, and not every batch
        largest = [what for what, *_ in columns if what.startswith("linear")][-1]
        columns = [key for key in columns if key[0] == largest or not key[0].startswith("linear")]
        most = max(batch for _, batch, _ in columns)
        columns = [key for key in columns if key[1] in (1, most)]
    found = {(row.candidate, row.what, row.batch, row.tokens): row.speedup_p10 for row in result.rows}
    header = ["format"]
    header += [
        f"{what}, {f'batch {batch}' if tokens == 1 else f'{tokens} tokens'}"
        for what, batch, tokens in columns
    ]
    lines = []
    for name in dict.fromkeys(row.candidate for row in result.rows):
        cells = [found.get((name, *key)) for key in columns]
        lines.append([name, *(f"{cell:.2f} x" if cell is not None else "" for cell in cells)])
    processor = "GPU" if ";" in result.hardware else result.cpu_capability
    processor += "" if any(tokens > 1 for *_, tokens in columns) else ", decoding"
    about = f"How many times as fast as {result.reference}. {where(result.hardware, result.commit)}"
    return joined([heading(processor, about), table(header, lines)])


def lookup_speed(results: Results) -> str:
    """A table for each kind of CPU."""
    names = ("lookup_speed-avx2", "lookup_speed-avx512")
    return joined(_lookup(result) for result in results.every(names, LookupSpeed))


def _lookup(result: LookupSpeed) -> str:
    found = {(row.what, row.dtype, row.candidate, row.tokens): row.time_of_nf4_p10 for row in result.rows}
    names = [name for name in dict.fromkeys(row.candidate for row in result.rows) if "nf4" not in name]
    tokens = list(dict.fromkeys(row.tokens for row in result.rows))
    lines = [
        [
            what.removeprefix("linear "),
            dtype,
            name,
            *(f"{found[what, dtype, name, count]:.2f}" for count in tokens),
        ]
        for what, dtype in dict.fromkeys((row.what, row.dtype) for row in result.rows)
        for name in names
    ]
    header = ["linear", "inputs", "weight", *(f"{count} token{'s' * (count > 1)}" for count in tokens)]
    return joined(
        [heading(result.cpu_capability, where(result.hardware, result.commit)), table(header, lines)]
    )


def attention_speed(results: Results) -> str:
    """The kernel's share of torch's time, for the output and for gradients."""
    if (result := results.load("attention_speed", Rows[AttentionRow])) is None:
        return ""
    found = {(row.what, row.gradients, row.way): row for row in result.rows}
    lines = []
    for what in dict.fromkeys(row.what for row in result.rows):
        cells = [
            (found[what, gradients, "torch"], found[what, gradients, "kernel"]) for gradients in (False, True)
        ]
        lines.append(
            [
                what,
                *(
                    f"{1e3 * ours.p10_s:.1f} and {1e3 * theirs.p10_s:.1f} ({ours.time_of_torch_p10:.2f})"
                    for theirs, ours in cells
                ),
                *(f"{ours.relative_error:.4f} and {theirs.relative_error:.4f}" for theirs, ours in cells),
            ]
        )
    header = ["attention", "output, ms", "gradients, ms", "error of the output", "error of the gradients"]
    return joined([where(result.hardware, result.commit) + "\n", table(header, lines)])


def codebook_speed(results: Results) -> str:
    """Seconds of each linear and of all together, and what they lose."""
    if (result := results.load("codebook_speed", Rows[CodebookSpeedRow])) is None:
        return ""
    sizes = list(dict.fromkeys(row.entries for row in result.rows))
    found: dict[tuple[str, int], dict[str, CodebookSpeedRow]] = {}
    for row in result.rows:
        found.setdefault((row.linear, row.entries), {})[row.way] = row

    def cell(pairs: Sequence[Mapping[str, CodebookSpeedRow]]) -> str:
        theirs, ours = (sum(pair[way].cpu_seconds for pair in pairs) for way in ("torch", "kernels"))
        return f"{ours:.2f} and {theirs:.2f} ({theirs / ours:.1f})"

    linears = {row.linear: f"{row.rows} x {row.columns}" for row in result.rows}
    lines = []
    for linear, shape in linears.items():
        pairs = [found[linear, entries] for entries in sizes]
        errors = ", ".join(
            f"{pair['kernels'].output_error:.4f} and {pair['torch'].output_error:.4f}" for pair in pairs
        )
        lines.append([linear, shape, *(cell([pair]) for pair in pairs), errors])
    lines.append(["all", "", *(cell([found[linear, size] for linear in linears]) for size in sizes), ""])
    header = ["linear", "shape", *(f"{size} values, s" for size in sizes), "error of the output, of each"]
    return joined([where(result.hardware, result.commit) + "\n", table(header, lines)])


def pruned_speed(results: Results) -> str:
    """Each cut model as a share of the whole."""
    if (result := results.load("pruned_speed", Rows[PrunedSpeedRow])) is None:
        return ""
    header = [
        "cut",
        "parameters of the layers",
        "operations",
        "time to read",
        "time to decode",
        "cache, bytes per token",
    ]
    lines = []
    for row in result.rows:
        shares = [row.block_parameters, row.flops, row.reading_time, row.decoding_time]
        lines.append([row.cut, *(f"{share:.3f}" for share in shares), str(row.kv_cache_bytes_per_token)])
    return joined([where(result.hardware, result.commit) + "\n", table(header, lines)])


def kv_cache(results: Results) -> str:
    """Each KV cache beside a plain one of the same model."""
    if (result := results.load("kv_cache", Rows[CacheRow])) is None:
        return ""
    header = ["cache", "tokens of text", "bytes per token", "KL, nats/token", "of nf4's", "perplexity"]
    parts = [where(result.hardware, result.commit) + "\n"]
    for model in dict.fromkeys(row.model for row in result.rows):
        rows = [row for row in result.rows if row.model == model]
        plain = {row.length: (row.plain_bytes_per_token, row.plain_perplexity) for row in rows}
        lines = [
            ["plain", f"{length:,}", f"{size:,.0f}", "", "", f"{perplexity:.3f}"]
            for length, (size, perplexity) in sorted(plain.items())
        ]
        for row in sorted(rows, key=lambda row: (-row.bits, row.cache, row.length)):
            share = f"{100 * row.kl_nats_mean / row.nf4_kl_nats:.3f} %"
            size = f"{row.bytes_per_token:,.0f}"
            losses = [f"{row.kl_nats_mean:.7f}", share, f"{row.perplexity:.3f}"]
            lines.append([row.cache, f"{row.length:,}", size, *losses])
        nf4 = f"Stock nf4 of this model loses {rows[0].nf4_kl_nats:.5f} nats/token."
        parts += [heading(model, nf4), table(header, lines)]
    return joined(parts)


SECTIONS = (
    Section(
        "Recipes",
        "The loss of every recipe and of its baseline, on SmolLM2-135M and three smaller models: `python -m "
        "evaluation bench`. Seconds are those of the stages on a shared machine of two cores: orders of "
        "magnitude.",
        fidelity,
    ),
    Section(
        "Other quantisers",
        "AutoRound, GPTQModel and llm-compressor, each in its own environment, calibrated and evaluated "
        "on the same sequences of the same models: `python -m evaluation rivals`. Their bits are measured "
        "on disk, ours are those of the format; MB is the whole file. On stories260k, whose ffn width of "
        "172 neither bitsandbytes nor the two that did not run take, ours quantise attention alone and "
        "AutoRound every linear.",
        rivals,
        "kl-against-bytes",
        "KL to the base against bytes on wikilm-8m, of llmcompress, stock bitsandbytes and other quantisers",
    ),
    Section(
        "The 4-bit solver",
        "What each ingredient contributes, in nf4 with a group size of 64, on the demo model: "
        "`python -m evaluation ablation`.",
        ablation,
    ),
    Section(
        "Activations with outliers",
        "8-bit formats on the demo model after four channels of every norm were multiplied by 50 to 100: "
        "`python -m evaluation outliers`.",
        outliers,
    ),
    Section(
        "Experts of a mixture",
        "A mixture of eight experts made of wikilm-8m, whose layers send a token to two of them: `python -m "
        "evaluation experts`. In the other tables an expert is given so many tokens for each column of its "
        "inputs, of which it has 256 and 768: tokens of the others, and, if it read fewer tokens than it has "
        "columns, tokens whose inputs are all equally large. The default of both is 0.25.",
        experts,
    ),
    Section(
        "BOS",
        "KL in nats/token of recipes on stories260k, whose tokenizer adds BOS, calibrated and evaluated "
        "with and without it: `python -m evaluation bos`.",
        bos,
    ),
    Section(
        "Rows rounded together",
        "Formats with `two_sided` and without, whole runs with their evaluation. `nf4`, `w4a16` and `w4a8` "
        "have groups of 64, `nf4` with scales in 8 bits, and codebooks are those of a row. Stock is nearest "
        "codes in that `nf4`, which leaves linears of 172 columns, on stories260k, as they are. Both seconds "
        "of a row are of one machine, but not those of all rows: `python -m evaluation two-sided`.",
        two_sided,
    ),
    Section(
        "GGUF",
        "Linears in llama.cpp's 4-bit formats, by GPTQ here and by llama.cpp's own quantiser without an "
        "importance matrix, each measured against the base in transformers. Ours are also run by llama.cpp "
        "on 512 tokens, against the same in transformers; llama.cpp rounds what such linears "
        "read to 8 bits in groups of 32, which is in that number: `python -m evaluation gguf`.",
        gguf,
    ),
    Section(
        "Import",
        "Processes that import what loading a model needs, from start to end; the differences are medians of "
        "pairs: `python -m evaluation import-time`.",
        import_time,
    ),
    Section(
        "Advice",
        "Processes that run `llmcompress advise`, from start to end, beside one that imports torch and the "
        "classes of a Llama, without which no shapes are known; the differences are medians of pairs: "
        "`python -m evaluation advise-time`.",
        advise_time,
    ),
    Section(
        "On a GPU",
        "The loss of recipes that ran on a GPU, beside the same on a CPU, on small models: `python -m "
        "evaluation gpu`. The models are small, so seconds say little.",
        gpu,
    ),
    Section(
        "Quantising on a GPU",
        "Seconds and peak memory of quantising random Llamas of 1 B and 8 B from disk to disk, on 128 "
        "sequences of 2048 tokens, beside the quantisers of others: `python -m evaluation gpu-compression`. "
        "What takes too long on all layers is measured on four. The goal is 8 B by nf4-gptq in at most 250 s "
        "and 6 GB.",
        gpu_compression,
    ),
    Section(
        "Pruning",
        "The loss of structured pruning without training at the same share of the decoder layers' "
        "parameters: `python -m evaluation pruning`, and `rivals-pruning` for Torch-Pruning. Ours "
        "calibrate on 64 sequences, Torch-Pruning on 256, on SmolLM2 both on 64. Scores cut `ffn` alone; "
        "`hidden` narrows embedding and head as well, so its models are smaller than the others at the "
        "same share.",
        pruning,
    ),
    Section(
        "The best model within a size",
        "KL in nats/token of what `search` finds among formats within a share of the base's bytes, beside "
        "what it expected, the measured recipe of one format with the least loss at no more bytes, both "
        "after the same 200 steps on scales and levels (`healed`), `ffn` and `kv` pruned to that size, and "
        "the formats of the search at random; then what it finds with widths among the choices: "
        "`python -m evaluation search`.",
        search,
    ),
    Section(
        "Other choices of a search",
        "Linears as products of low rank in the bytes of a format of `search`, with factors in bfloat16, as "
        "`low_rank` stores them, and in int8 and nf4, which nothing stores: in how many linears a product is "
        "expected to lose less than the format, in how many it is a corner of the convex hull of bytes and "
        "nats, and the median ratio of their losses. Then the least nats/token that are expected within a "
        "share of the bytes among formats, with products beside them, with widths, and with attentions and "
        "feed-forward parts left out; and what the model loses without each of these parts, with the nats/MB "
        "from which it is better left out than in any format: `python -m evaluation other-choices`.",
        other_choices,
    ),
    Section(
        "How much text, and of which kind",
        "`nf4-gptq` with little and much of the text that a model is evaluated on, and with 65 thousand "
        "tokens of other kinds: `python -m evaluation calibration-text`. The loss is that on the model's own "
        "kind.",
        calibration_text,
    ),
    Section(
        "Distillation after pruning",
        "How much of a cut's loss training recovers, by loss function, on the demo model and wikilm-8m "
        "cut to 60 % of the decoder layers' parameters: `python -m evaluation healing`. `long` is forward "
        "KL for more steps.",
        healing,
    ),
    Section(
        "Sharing, low rank, codebooks",
        "What each way to make a model smaller loses at the same size, on the demo model and wikilm-8m: "
        "`python -m evaluation sharing`.",
        sharing,
    ),
    Section(
        "Cost of a run",
        "Seconds and peak memory of `quantize` against one forward pass over the same tokens, on random "
        "Llamas of growing size: `python -m evaluation cost`.",
        cost,
    ),
    Section(
        "Speed of compression",
        "The same calibration sequences, one process after another: `python -m evaluation "
        "compression-speed`. Seconds are those of loading the base, quantising and writing, without imports "
        "and without what llmcompress measures afterwards, which the whole run has.",
        compression_speed,
    ),
    Section(
        "Several processes",
        "A run to `nf4` in one process and in two on the CPU, a thread each: `python -m evaluation "
        "several-processes`.",
        several,
    ),
    Section(
        "Memory by vocabulary",
        "Peak memory of a run with `nf4-nearest`, `nf4-gptq` and learned rounding, on random Gemma 3 models "
        "of two layers and width 640 in bfloat16: `python -m evaluation vocabulary-memory`.",
        vocabulary_memory,
    ),
    Section(
        "Time foretold",
        "What `plan` foretells against what the run takes, of the stages and of the whole run, in seconds of "
        "the processor with one thread of a shared machine, on few tokens: `python -m evaluation foretold`.",
        foretold,
    ),
    Section(
        "Cost of evaluation",
        "Tokens/s of perplexity, and of perplexity with KL, against bare forward passes, on the demo "
        "model and wikilm-8m: `python -m evaluation throughput`.",
        throughput,
    ),
    Section(
        "Cost of distillation",
        "Steps/s of the `distill` stage against the plainest training loop, on wikilm-8m: "
        "`python -m evaluation distill-speed`. A ratio is the median of those of each round.",
        distill_speed,
    ),
    Section(
        "Speed of the formats",
        "Single linears, a random Llama of 111 M parameters and, on the GPU, one of 8 B, decoding a token "
        "and reading a prompt, at the 10th percentile of calls that take turns in one process: `python -m "
        "evaluation speed`.",
        speed,
        "speed",
        "Speed of the formats over that of floats on two CPUs and a GPU, decoding and reading a prompt",
    ),
    Section(
        "Speed of codebooks",
        "Time of random linears over that of bitsandbytes' nf4 in the same run, at the 10th percentile: "
        "`python -m evaluation lookup-speed`.",
        lookup_speed,
    ),
    Section(
        "Speed of attention in calibration",
        "The C kernel and torch, both in bfloat16, at the 10th percentile of calls that take turns in one "
        "process, and the largest relative error against float64: `python -m evaluation attention-speed`.",
        attention_speed,
    ),
    Section(
        "Speed of solving for codebooks",
        "The C kernels and torch's loops on the linears of the last layer of smollm2-4-layers, under the "
        "second moments of their own inputs, in seconds of the processor with one thread, the fastest of "
        "turns in one process, and how many times as fast the kernels are: `python -m evaluation "
        "codebook-speed`.",
        codebook_speed,
    ),
    Section(
        "KV caches",
        "Keys and values of earlier tokens in fewer bits, beside a plain cache of the same model on the same "
        "text, read in pieces of 32 tokens: `python -m evaluation kv-cache`. `fp8`, `hqq` and `quanto` are "
        "caches of transformers, the last two with the package of that name; the others are ours. Bytes are "
        "those of a model in bfloat16.",
        kv_cache,
    ),
    Section(
        "Speed of pruned models",
        "A random Llama cut along each axis, as shares of the whole model in the same run: "
        "`python -m evaluation pruned-speed`.",
        pruned_speed,
    ),
)
ABOVE = (
    "Every table is written by `python -m evaluation tables` from [results/](results/), which holds more "
    "numbers than are shown, with command, commit, versions and hardware. KL is KL(base || compressed), "
    "the mean over all tokens of held-out text; lower is better. The models are small: their tables show "
    "how methods compare, not what a model of 7 B parameters loses."
)


def wrapped(text: str) -> str:
    """A paragraph in lines of at most WIDTH columns, code not broken."""
    whole = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), text)
    return textwrap.fill(whole, WIDTH, break_on_hyphens=False).replace("\0", " ")


def document(results: Results) -> str:
    """RESULTS.md: a section for each kind of result that is there."""
    parts, contents = [], []
    for section in SECTIONS:
        if body := section.make(results):
            anchor = section.title.lower().replace(",", "").replace(" ", "-")
            contents.append(f"- [{section.title}](#{anchor})")
            parts.append(section.text(body))
    above = f"# Results\n\n{wrapped(ABOVE)}\n"
    return "\n".join([above, "\n".join(contents) + "\n", *parts])


def wanted(root: Path) -> dict[Path, str]:
    """What RESULTS.md and the recipes of a checkout should say."""
    results = Results(root / "evaluation" / "results")
    rows = {model: found for model in MODELS if (found := results.recipes(model))}
    gguf_rows = results.load("gguf", Rows[GgufRow])
    return {
        root / "evaluation" / "RESULTS.md": document(results),
        **recipe_heads.texts(root / "recipes", rows, gguf_rows.rows if gguf_rows else ()),
    }


def stale(texts: Mapping[Path, str]) -> list[Path]:
    """The files that do not say what they should."""
    return [file for file, text in texts.items() if not file.is_file() or file.read_text("utf-8") != text]


def main(argv: Sequence[str]) -> int:
    """Write what is stale, or with --check say so and return 1."""
    options = parser("tables", __doc__)
    options.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file is stale")
    options.add_argument("--root", type=Path, default=ROOT, help="the checkout; default: this one")
    given = options.parse_args(argv)
    texts = wanted(given.root)
    files = stale(texts)
    names = ", ".join(str(file.relative_to(given.root)) for file in files)
    if given.check and files:
        print(f"not what results/*.json say: {names}; run python -m evaluation tables", file=sys.stderr)
        return 1
    for file in files:
        file.write_text(texts[file], "utf-8")
        print(f"written: {file.relative_to(given.root)}")
    return 0
