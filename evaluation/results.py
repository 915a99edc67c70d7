"""The result files: what each holds, and how it is read and written.

Every file in `results/` is one object: the command, commit, versions and hardware of the run (`Head`), then
its rows. The models below are the schema of both sides: the measurements construct them, the tables and
pictures read them. Rows of older files carry names that were since replaced; `modern` translates them, so
that old and new rows stand in one table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "evaluation" / "results"
RENAMED = (  # what earlier versions called a recipe or a row
    (r"^basis-heal$", "low-rank-heal"),
    (r"^basis-75$", "low-rank-75"),
    (r"\bbasis of (\d+) layers", r"low rank over \1 layers"),
    (r"\bcodebook of (\d+) a (row|linear)\b", r"codebook of \1 entries per \2"),
    (r"\bnf4, block (\d+)", r"nf4, group size \1"),
    (r"\bkept teacher, (\d+) likeliest", r"cached teacher, top \1"),
    (r"\bkept teacher\b", "cached teacher"),
    (r"\bblock's own output as target", "the layer's own output as target"),
)


def modern(name: str) -> str:
    """Today's name of a recipe or row, whatever the version that wrote it called it."""
    for old, new in RENAMED:
        name = re.sub(old, new, name)
    return name


Name = Annotated[str, AfterValidator(modern)]


class Facts(BaseModel):
    """A part of a result file; keys that are not declared are passed over when it is read."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class Head(Facts):
    """What was run, on what."""

    command: str
    commit: str = ""
    hardware: str = ""
    versions: dict[str, str] = {}


class Loss(Facts):
    """What a model lost: KL(base || model) in nats/token, and perplexities of both."""

    kl_nats_mean: float
    perplexity: float
    base_perplexity: float


class Environment(Facts):
    """Versions and machine of one row."""

    versions: dict[str, str]
    device: str


class FidelityRow(Loss):
    """A recipe on a model; `bits` are those of the format, per weight."""

    recipe: Name
    bits: float
    size_bytes: int
    kl_nats_p99: float | None = None
    top1_agreement: float
    perplexity_ratio: float | None = None
    perplexity_ratio_ci95: tuple[float, float] | None = None
    perplexity_2048: float | None = None
    base_perplexity_2048: float | None = None
    seconds: float
    cpu_seconds: float | None = None
    peak_memory_bytes: int | None = None
    recipe_digest: str = ""
    data_sha256: str = ""
    parameters: int | None = None
    kept: int = 0
    commit: str
    environment: Environment


class Fidelity(Head):
    """Every recipe on one model."""

    model: str
    text: str
    rows: list[FidelityRow]


class GpuRow(Loss):
    """A recipe on a GPU, with the KL that the same recipe has from a CPU."""

    model: str
    recipe: Name
    kl_nats_mean_cpu: float
    top1_agreement: float
    seconds: float
    size_bytes: int


class Failure(Facts):
    """A rival that did not run."""

    error: str


class GpuCompressionRow(Facts):
    """A quantisation of a random model, from the start to the written weights.

    `method` is a recipe, or a rival of that `version`. Of a recipe, `phases` are the seconds of its parts,
    `profile` those of the lines that took longest. Memory is the peak, without that of a GPU where none was
    used.
    """

    model: str
    layers: int
    method: str
    version: str | None = None
    tokens: int
    seconds: float
    phases: dict[str, float] = {}
    profile: dict[str, float] = {}
    peak_gpu_bytes: int | None = None
    peak_host_bytes: int


class GpuCompressionFailure(Failure):
    """A quantisation that was not measured, and of a recipe in which lines its seconds went."""

    model: str
    layers: int
    method: str
    version: str | None = None
    profile: dict[str, float] = {}


class Rival(Loss):
    """A quantiser of others, with all that its file stores."""

    versions: dict[str, str]
    method: str
    base_dtype: str = "auto"
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    kl_nats_stderr: float
    kl_nats_p99: float
    top1_agreement: float
    size_bytes: int
    base_size_bytes: int
    quantised_weights: int
    bits_per_weight: float

    @property
    def package(self) -> str:
        """Name and version of the package."""
        return next(f"{package} {version}" for package, version in self.versions.items())


class Sequences(Facts):
    """A file of token sequences: its shape, and the hash of its tokens."""

    file: str
    shape: tuple[int, int]
    sha256: str


class Rivals(Head):
    """The quantisers of others on one model, and the sequences that they read."""

    threads: int
    base: str
    calibration: Sequences
    evaluation: Sequences
    rivals: dict[str, Rival | Failure]


class AblationRow(Facts):
    """The solver with some of its parts."""

    variant: Name
    kl_nats_mean: float
    seconds: float


class ImportRow(Facts):
    """What a program imports, how long its process runs, and by how much longer than with transformers
    alone."""

    imports: str
    seconds: float
    over_transformers: float


class AdviseTimeRow(Facts):
    """A process that imports something or runs `advise`: its seconds on the wall and on the processor, and by
    how much longer it ran than the imports that it can't do without."""

    what: str
    seconds: float
    cpu_seconds: float
    over_imports: float


class OutlierRow(Facts):
    """A format on the model with planted outliers, and on the model as it was."""

    what: str
    planted: Loss
    original: Loss | None = Field(default=None, validation_alias="as it was", serialization_alias="as it was")


class BosRow(Facts):
    """A recipe by whether its calibration and evaluation sequences begin with BOS."""

    recipe: Name
    calibrated_with_bos: bool
    scored_with_bos: bool
    perplexity: float
    kl_nats_mean: float
    kl_nats_p99: float
    top1_agreement: float


class TwoSidedRow(Loss):
    """A rounding in a format on a model, with or without all rows of a linear rounded together."""

    model: str
    format: str
    rounding: str
    two_sided: bool
    size_bytes: int
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int | None
    commit: str
    hardware: str


class GgufRow(Loss):
    """A model in a format of llama.cpp: what rounded it, and how far its logits in llama.cpp, on `tokens`
    tokens, are from those in transformers."""

    model: str
    format: str
    rounding: str
    kl_llama_cpp: float
    top1_llama_cpp: float
    tokens: int


class ExpertsRow(Loss):
    """A stage on a mixture, or a rival: `tokens` calibrated it, of which the expert with the fewest read
    `least_tokens`.

    For each column of its inputs each expert borrowed `borrowed` tokens of others, and was given `evened`
    tokens with even inputs if it read fewer tokens than it has columns.
    """

    name: str
    stage: dict[str, Any]
    tokens: int
    least_tokens: int | None
    borrowed: float
    evened: float
    size_bytes: int


class PruningRow(Loss):
    """A way to prune; `share` of the parameters of the decoder layers were to stay."""

    model: str
    share: float
    row: Name
    stages: list[dict[str, object]] = []
    parameters: int
    block_parameters: int
    widths: list[object] = []
    top1_agreement: float
    seconds: float
    share_reached: float
    commit: str


class RivalPruningRow(Loss):
    """Torch-Pruning in one of its scopes, by one of its scores."""

    model: str
    rival: str
    importance: str
    scope: str
    share: float
    method: str
    shape: dict[str, int]
    block_parameters: int
    base_block_parameters: int
    parameters: int
    base_parameters: int
    kl_nats_stderr: float
    kl_nats_p99: float
    top1_agreement: float
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    calibration: Sequences
    evaluation: Sequences
    commit: str = ""
    environment: Environment


class RivalPruningFailure(Failure):
    """A cut that could not be made."""

    model: str
    rival: str
    importance: str
    scope: str
    share: float


class HealingRow(Loss):
    """One training of a cut model, whose KL was `kl_cut`; the settings of the stage are extra keys."""

    model_config = ConfigDict(extra="allow")

    model: str
    row: Name
    cut: str
    steps: int
    batch: int
    learning_rate: float
    seconds: float
    kl_before: float
    kl_after: float
    kl_cut: float
    won_back: float
    commit: str


class SearchRow(Loss):
    """A model within a size: one that the search `found` among formats, or with `widths` among the choices,
    one of a `single` method, or one that is `random` or was `drawn` for the rank correlation; with the loss
    that the search expected of it, if it did."""

    model: str
    kind: str
    row: Name
    size_bytes: int
    share_of_bytes: float
    expected_nats: float | None = None
    second_order_nats: float | None = None
    seconds: float
    commit: str
    hardware: str


class LowRankRow(Facts):
    """Products of low rank in place of linears, each in the bytes of a format, with factors so stored: in how
    many of the linears a product loses less than the format, in how many it is a corner of the hull of bytes
    and nats, and the median of its nats over those of the format."""

    model: str
    factors: str
    format: str
    linears: int
    better: int
    on_hull: int
    median_ratio: float
    commit: str


class SublayerRow(Facts):
    """A model without one attention or feed-forward part, and what a byte has to be worth, in nats, so that
    the part is better left out than in any format; None if it is not priced."""

    model: str
    layer: int
    part: str
    kl_nats_mean: float
    slope: float | None
    commit: str


class OtherChoicesRow(Facts):
    """The least nats that are expected within a size: among formats, with products of low rank beside them,
    by how their factors are stored, with widths, and with parts left out, of which so many are then `gone`;
    None where nothing is so small."""

    model: str
    size: str
    formats: float | None
    products: dict[str, float | None]
    widths: float | None
    sublayers: float | None
    gone: int
    commit: str


class SharingRow(Loss):
    """A way to make a model smaller, with its share of the base's bytes."""

    row: Name
    stages: list[dict[str, object]] = []
    size_bytes: int
    share_of_bytes: float
    parameters: int | None = None
    top1_agreement: float
    seconds: float
    facts: list[dict[str, object]] = []
    commit: str


class CostRow(Facts):
    """One run from disk to disk, and one forward pass over the same tokens."""

    series: str
    layers: int
    hidden: int
    tokens: int
    rounding: str
    checkpoint_bytes: int
    quantize_s: float
    forward_s: float
    forward_passes: float
    run_s: float
    baseline_memory_bytes: int
    peak_memory_bytes: int
    run_memory_bytes: int
    others_cpu_share: float
    attempts: int = 1


class CompressionSpeedRow(Facts):
    """What a compression takes up to the written weights, and with all that llmcompress measures (`run`)."""

    model: str
    what: Name
    package: str
    threads: int
    cpu_seconds: float
    seconds: float
    peak_memory_bytes: int
    run_cpu_seconds: float | None = None
    run_peak_memory_bytes: int | None = None
    kl_nats_mean: float | None = None
    others_cpu_share: float
    commit: str


class SeveralRow(Facts):
    """A rounding on a model in so many processes, and the share of its codes that are not those of one."""

    model: str
    rounding: str
    tokens: int
    processes: int
    stage_s: float
    run_s: float
    stage_speedup: float
    run_speedup: float
    codes_that_differ: float
    codes_that_differ_first_layer: float
    kl_nats_mean: float
    others_cpu_share: float


class VocabularyMemoryRow(Facts):
    """The peak memory of one run on a model of one vocabulary; `whole_logits_bytes` is what one float32 copy
    of the logits of its evaluation would take."""

    vocabulary: int
    hidden: int
    rounding: str
    checkpoint_bytes: int
    whole_logits_bytes: int
    baseline_memory_bytes: int
    peak_memory_bytes: int
    run_memory_bytes: int


class ForetoldRow(Facts):
    """Processor seconds that `plan` foretold and a run took: of the stages, and of the whole run."""

    model: str
    recipe: Name
    tokens: int
    stages_foretold_s: float
    stages_cpu_s: float
    run_foretold_s: float
    run_cpu_s: float
    plan_cpu_s: float
    commit: str = ""


class ThroughputRow(Facts):
    """Tokens/s of bare forward passes, of perplexity, of perplexity with KL, and ratios to the first."""

    model: str
    tokens: int
    turns: int
    bare_tokens_per_s: float
    perplexity_tokens_per_s: float
    perplexity_kl_tokens_per_s: float
    perplexity_ratio: float
    perplexity_ratio_range: tuple[float, float]
    perplexity_kl_ratio: float
    perplexity_kl_ratio_range: tuple[float, float]


class TrainingRow(Facts):
    """Steps/s of one way to train, in the median and of each round, and the median ratio to the bare loop."""

    what: Name
    steps_per_s: float
    of_bare_loop: float
    all: list[float]


class Student(Facts):
    """All ways to train a student of a share of the layers."""

    layers: float
    rows: list[TrainingRow]
    kept_over_live: float


class DistillSpeed(Head):
    """All students of one model."""

    model: str
    batch: int
    length: int
    steps: int
    students: list[Student]


class SpeedRow(Facts):
    """Seconds of a call and its speed-up over the reference, at the 10th percentile and in the median."""

    what: str
    batch: int
    tokens: int
    candidate: str
    calls: int
    p10_s: float
    median_s: float
    speedup_p10: float
    speedup_median: float
    relative_error: float | None = None


class Speed(Head):
    """All formats on one processor; `absent` holds what could not be measured."""

    cpu_capability: str
    reference: str
    absent: list[dict[str, object]] = []
    rows: list[SpeedRow]


class LookupRow(Facts):
    """Seconds of a call, and over that of bitsandbytes' nf4."""

    what: str
    dtype: str
    tokens: int
    candidate: Name
    calls: int
    p10_s: float
    median_s: float
    time_of_nf4_p10: float
    time_of_nf4_median: float
    relative_error: float
    memory_bytes: int


class LookupSpeed(Head):
    """Codebook linears on one processor."""

    cpu_capability: str
    kernel: str
    rows: list[LookupRow]


class AttentionRow(Facts):
    """Seconds of causal attention, or of its gradients, and over those of torch's."""

    what: str
    gradients: bool
    way: Name
    calls: int
    p10_s: float
    median_s: float
    time_of_torch_p10: float
    time_of_torch_median: float
    relative_error: float


class CodebookSpeedRow(Facts):
    """Processor seconds to solve for the codebooks of a linear, its relative output error, and the share of
    its weights that are those that torch's loops find."""

    linear: str
    rows: int
    columns: int
    entries: int
    way: Name
    cpu_seconds: float
    output_error: float
    same_weights: float


class PrunedSpeedRow(Facts):
    """A cut model as shares of the whole one, seconds, and bytes of cache per token, counted and planned."""

    cut: str
    block_parameters: float
    flops: float
    reading_time: float
    decoding_time: float
    reading_s: float
    decoding_s: float
    kv_cache_bytes_per_token: int
    kv_cache_bytes_per_token_planned: int


class CacheRow(Facts):
    """A KV cache on a model at a length of text, beside a plain one of the same model: losses as in reports,
    bytes per token with states in two bytes, and the KL of stock nf4 on that model."""

    model: str
    cache: str
    bits: int
    length: int
    tokens: int
    kl_nats_mean: float
    perplexity: float
    plain_perplexity: float
    bytes_per_token: float
    plain_bytes_per_token: float
    nf4_kl_nats: float


class CalibrationTextRow(Facts):
    """What calibration with so many tokens of a kind of text lost on a model's own evaluation text."""

    model: str
    text: str
    tokens: int
    seed: int
    kl_nats_mean: float
    perplexity: float
    seconds: float
    commit: str
    hardware: str


Row = TypeVar("Row")
Held = TypeVar("Held", bound=BaseModel)


class Rows(Head, Generic[Row]):
    """A result file that is its rows."""

    rows: list[Row]


def load(folder: Path, name: str, kind: type[Held]) -> Held | None:
    """`NAME.json` of a folder of results, or None where it is not there. Errors: pydantic.ValidationError."""
    file = folder / f"{name}.json"
    return kind.model_validate_json(file.read_text("utf-8")) if file.is_file() else None


def write(name: str, head: Head, facts: Mapping[str, object], file: Path | None = None) -> None:
    """Write a result: its head, then its facts; to results/NAME.json, or to another file."""
    target = file or RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {**_plain(head), **facts}
    target.write_text(json.dumps(content, indent=2, default=_plain) + "\n", "utf-8")


def without(
    name: str, file: Path | None = None, hardware: str | None = None, **key: object
) -> list[dict[str, object]]:
    """The rows of results/NAME.json, or of another file, as they are, but for the one of a key; none if they
    are of another `hardware` than is given."""
    source = file or RESULTS / f"{name}.json"
    content = json.loads(source.read_text("utf-8")) if source.is_file() else {"rows": []}
    other = hardware is not None and content.get("hardware") != hardware
    rows: list[dict[str, object]] = [] if other else content["rows"]
    return [row for row in rows if any(_modern(row.get(part)) != value for part, value in key.items())]


def merge(
    name: str, key: Iterable[str], row: Facts, file: Path | None = None, hardware: str | None = None
) -> list[dict[str, object]]:
    """The rows of results/NAME.json as they are, `row` in place of the one of the same key; the others as for
    `without`."""
    return [*without(name, file, hardware, **{part: getattr(row, part) for part in key}), _plain(row)]


def _modern(value: object) -> object:
    return modern(value) if isinstance(value, str) else value


def _plain(value: Any) -> dict[str, object]:
    """A part of a result as JSON types: the keys that were set, by the names that files have."""
    if not isinstance(value, BaseModel):
        raise TypeError(f"{type(value).__name__} is no part of a result")
    return value.model_dump(mode="json", by_alias=True, exclude_unset=True)
