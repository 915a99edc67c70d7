"""The report of a compression: measurements before and after, written into the artefact as report.json.

The keys below are a contract with everyone who parses the file, so they are defined once, as frozen pydantic
models that refuse unknown keys; only a stage and a linear may carry further facts. A number that was not
measured is null, never 0. `metrics` computes the numbers, `console` prints them, `model_card` and `plots`
show them on the Hub.
"""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    NonNegativeInt,
    ValidationError,
    model_validator,
)

from llmcompress.errors import AcceptError, CompressError
from llmcompress.io.safe_parsing import Unreadable, json_of
from llmcompress.io.user_paths import path_of

# raised when a key changes its meaning or is removed; for a new key, only once a reader needs it
SCHEMA = 1
FILE = "report.json"
LARGEST = 1 << 25  # bytes: a linear takes 200 of them
# the Hub looks for evaluations under the second name
CARD, EVALUATIONS = ("README.md", ".eval_results/llmcompress.yaml")
PAGE = "report.html"
ERROR_PICTURE, CHANGE_PICTURE, TRAINING_PICTURE = "error_per_layer.png", "before_after.png", "training.png"
# keys of data for a Hub data set or a table
DATA_PLACE = ("revision", "config", "split", "evaluation_split", "column")
TRAINS = "distill"  # the stage whose facts are TrainingFacts
CACHE = "kv_cache"  # the stage that stores the KV cache in fewer bits

Interval = Annotated[tuple[FiniteFloat, FiniteFloat], Field(strict=False)]  # (low, high); JSON has no tuples
Amount = Annotated[FiniteFloat, Field(ge=0)]
# tokens with their probabilities, most likely first
Guesses = Annotated[
    tuple[Annotated[tuple[str, Annotated[FiniteFloat, Field(ge=0, le=1)]], Field(strict=False)], ...],
    Field(strict=False),
]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class _OpenFacts(BaseModel):
    """Facts that may carry more keys than the contract names, as long as JSON can hold them."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)


class ModelFacts(_Facts):
    """One model as measured: `revision` is the commit on the Hub, null for a folder. tokens_per_s is for
    prefill, decode_tokens_per_s for decoding.

    `active_parameters` are those that a token goes through, null if it goes through all. `memory_bytes` are
    those of the model's tensors once from_pretrained has loaded it.
    """

    model: str
    revision: str | None = None
    parameters: NonNegativeInt | None
    active_parameters: NonNegativeInt | None = None
    size_bytes: NonNegativeInt | None
    perplexity: Amount | None
    perplexity_ci95: Interval | None = None
    tokens_per_s: Amount | None = None
    decode_tokens_per_s: Amount | None = None
    memory_bytes: NonNegativeInt | None = None


class DistributionFacts(_Facts):
    """How KL is spread over the tokens: quantiles, and how many tokens lie between two edges in nats.

    The first count is of tokens below the first edge, the last of those at the last edge or above it.
    """

    p50: Amount
    p90: Amount
    p99: Amount
    largest: Amount
    edges: Annotated[tuple[Amount, ...], Field(strict=False, min_length=1)]
    counts: Annotated[tuple[NonNegativeInt, ...], Field(strict=False)]

    @model_validator(mode="after")
    def _has_a_count_on_each_side(self) -> "DistributionFacts":
        if len(self.counts) != len(self.edges) + 1 or not sum(self.counts):
            raise ValueError("counts are one more than edges, and not all 0")
        if any(low >= high for low, high in pairwise(self.edges)):
            raise ValueError("edges rise")
        return self


class FidelityFacts(_Facts):
    """The distance of the compressed model from its base, per token of the evaluation text; KL is KL(base ||
    compressed)."""

    kl_nats_mean: Amount | None = None
    kl_nats_p99: Amount | None = None
    kl_nats_distribution: DistributionFacts | None = None
    top1_agreement: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    perplexity_ratio: Amount | None = None
    perplexity_ratio_ci95: Interval | None = None


class DataFacts(_Facts):
    """The text: `sha256` is over the calibration and evaluation tokens.

    For a Hub data set, `revision` is the commit; `split` is the calibration text, and `evaluation_split` or
    the first rows of `split` are the evaluation text. `bos` is present, and true, if each sequence begins
    with the BOS token; what is predicted there is not scored.
    """

    source: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    evaluation_split: str | None = None
    column: str | None = None
    sha256: str
    calibration_tokens: NonNegativeInt
    evaluation_tokens: NonNegativeInt
    bos: bool | None = None


class EffortFacts(_Facts):
    """The effort of the run, and what it chose where the recipe says nothing: keys of the recipe with their
    values."""

    level: str
    chosen: dict[str, int | str]


class RecipeFacts(_Facts):
    """Where a recipe comes from: a repository on the Hub, at a commit."""

    source: str
    revision: str


class LinearFacts(_OpenFacts):
    """One linear after its stage: `name` in the model, format, bits per weight, |Y - Y'| / |Y| of its
    calibration outputs Y."""

    name: str
    format: str
    bits: Amount
    relative_error: Amount


class KeptFacts(_Facts):
    """A linear that a stage left in its dtype, and the reason."""

    name: str
    why: str


class StageFacts(_OpenFacts):
    """What one stage did, with further facts of its own."""

    name: str
    seconds: Amount
    linears: Annotated[tuple[LinearFacts, ...], Field(strict=False)] = ()
    kept: Annotated[tuple[KeptFacts, ...], Field(strict=False)] = ()
    notes: Annotated[tuple[str, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _tells_its_training(self) -> "StageFacts":
        if self.name == TRAINS:
            TrainingFacts.of(self)
        return self


class TrainingFacts(_OpenFacts):
    """How a stage trained: settings, and KL(teacher || student) on held-out text in nats/token, before, at
    best and by step.

    `steps` is the requested number, of `batch` sequences with `length` tokens; `curve` ends where the
    training did, and null marks an evaluation that gave no number.
    """

    loss: str
    steps: NonNegativeInt
    learning_rate: Amount
    batch: NonNegativeInt
    length: NonNegativeInt
    kl_before: FiniteFloat
    kl_after: FiniteFloat
    curve: Annotated[
        tuple[Annotated[tuple[NonNegativeInt, FiniteFloat | None], Field(strict=False)], ...],
        Field(strict=False),
    ]

    @classmethod
    def of(cls, stage: StageFacts) -> "TrainingFacts":
        """Read the training facts of a stage that trained."""
        return cls.model_validate(stage.model_extra)

    @property
    def steps_done(self) -> int:
        """Steps until the last evaluation; fewer than `steps` if the training ended early."""
        return self.curve[-1][0] if self.curve else 0

    @property
    def points(self) -> tuple[tuple[int, float], ...]:
        """(step, KL) of the start and of every evaluation that gave a number."""
        return ((0, self.kl_before), *((step, kl) for step, kl in self.curve if kl is not None))

    @property
    def best(self) -> tuple[int, float]:
        """(step, KL) of the student that was kept: step 0 if training improved nothing."""
        return min(self.points, key=lambda point: point[1])

    @property
    def recovered(self) -> float | None:
        """The share of the KL that training recovered; None if the KL before it was zero or less."""
        return 1 - self.kl_after / self.kl_before if self.kl_before > 0 else None


class ParagraphFacts(_Facts):
    """The first tokens of the evaluation text as both models predict them.

    `tokens` has one more item than the rest: nothing is predicted of the first. Item i of the rest is of the
    prediction of token i + 1: its KL in nats, and what each model ranks first with probabilities.
    """

    tokens: Annotated[tuple[str, ...], Field(strict=False)]
    kl_nats: Annotated[tuple[Amount, ...], Field(strict=False)]
    base: Annotated[tuple[Guesses, ...], Field(strict=False)]
    compressed: Annotated[tuple[Guesses, ...], Field(strict=False)]

    @model_validator(mode="after")
    def _has_one_of_each(self) -> "ParagraphFacts":
        predicted = len(self.tokens) - 1
        if not len(self.kl_nats) == len(self.base) == len(self.compressed) == predicted:
            raise ValueError("kl_nats, base and compressed have one item less than tokens")
        return self


class ContinuationFacts(_Facts):
    """A prompt that both models went on with greedily: `shared` is what both wrote first, `base` and
    `compressed` what each wrote from the first token that differs."""

    prompt: str
    shared: str
    base: str
    compressed: str
    tokens: NonNegativeInt  # that each wrote
    shared_tokens: NonNegativeInt


class SampleFacts(_Facts):
    """What both models make of some of the evaluation text; `left_out` says why there are no
    continuations."""

    paragraph: ParagraphFacts | None = None
    continuations: Annotated[tuple[ContinuationFacts, ...], Field(strict=False)] = ()
    left_out: str | None = None


class CachedLengthFacts(_Facts):
    """The KV cache at a length of text: KL(plain cache || stored cache) in nats/token, and perplexity and
    bytes per token with either."""

    length: NonNegativeInt
    kl_nats_mean: Amount
    perplexity: Amount
    plain_perplexity: Amount
    bytes_per_token: Amount
    plain_bytes_per_token: Amount


class CacheFacts(_Facts):
    """What it costs to store the keys and values of earlier tokens in `bits`: the compressed model beside
    itself with a plain cache, on `tokens` of the evaluation text."""

    bits: NonNegativeInt
    per: str
    tokens: NonNegativeInt
    lengths: Annotated[tuple[CachedLengthFacts, ...], Field(strict=False, min_length=1)]


class CostFacts(_Facts):
    """The cost of the whole run."""

    seconds: Amount
    peak_memory_bytes: NonNegativeInt | None


class EnvironmentFacts(_Facts):
    """The result of `metrics.environment`."""

    versions: dict[str, str]
    device: str


class Report(_Facts):
    """report.json, key by key; equal reports give equal text."""

    version: Annotated[int, Field(alias="schema", ge=SCHEMA, le=SCHEMA)] = SCHEMA
    recipe_digest: str
    recipe: RecipeFacts | None = None
    effort: EffortFacts | None = None
    auto_class: str | None = None  # that loads the model, if it is not AutoModelForCausalLM
    plug_in: bool | None = None  # True if transformers loads the model only once llmcompress is imported
    own_code: bool | None = None  # True if the model is loaded by code of its own, beside its weights
    base: ModelFacts
    compressed: ModelFacts
    fidelity: FidelityFacts
    data: DataFacts
    stages: Annotated[tuple[StageFacts, ...], Field(strict=False)]
    cost: CostFacts
    environment: EnvironmentFacts
    kv_cache: CacheFacts | None = None  # present if config.json stores the cache in fewer bits
    samples: SampleFacts | None = None

    @property
    def linears(self) -> tuple[LinearFacts, ...]:
        """Every linear that a stage changed, as the last such stage left it, in the order of the model."""
        return tuple({linear.name: linear for stage in self.stages for linear in stage.linears}.values())

    @property
    def kept(self) -> tuple[KeptFacts, ...]:
        """Every linear that a stage kept, with the reason given last."""
        return tuple({kept.name: kept for stage in self.stages for kept in stage.kept}.values())

    @property
    def trainings(self) -> tuple[TrainingFacts, ...]:
        """The training facts of each stage that trained, in the order of the run."""
        return tuple(TrainingFacts.of(stage) for stage in self.stages if stage.name == TRAINS)

    def to_json(self) -> str:
        """The text of report.json: keys in the order of the contract, floats in full precision. Raises
        ValueError for NaN in a stage's facts."""
        facts = self.model_dump(mode="json", by_alias=True)
        samples = facts.pop("samples")
        facts["environment"]["versions"] = dict(sorted(facts["environment"]["versions"].items()))
        # present only if they are set
        optional = [
            (facts, "recipe"),
            (facts, "effort"),
            (facts, "auto_class"),
            (facts, "plug_in"),
            (facts, "own_code"),
            (facts, "kv_cache"),
            (facts["fidelity"], "kl_nats_distribution"),
            *((facts["data"], key) for key in (*DATA_PLACE, "bos")),
        ]
        for holder, key in optional:
            if holder[key] is None:
                del holder[key]
        text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False)
        if samples is not None:
            # on one line, as they are thousands of numbers
            told = json.dumps(samples, ensure_ascii=False, allow_nan=False)
            text = f'{text.removesuffix("}").rstrip()},\n  "samples": {told}\n}}'
        return text + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str | Path = FILE) -> "Report":
        """Parse report.json. Raises CompressError, which names the file `where`, if anything is malformed."""
        try:
            raw = json_of(text, largest=LARGEST)
        except Unreadable as error:
            raise CompressError(f"{where} {error}: take {FILE} as llmcompress wrote it") from None
        if not isinstance(raw, dict) or "schema" not in raw:
            raise CompressError(
                f"{where} is not a report of llmcompress: it has no key schema; give a folder that `run` "
                "wrote"
            )
        if raw["schema"] != SCHEMA or isinstance(raw["schema"], bool):
            raise CompressError(
                f"{where} has schema {raw['schema']!r}, this llmcompress reads {SCHEMA}: install "
                f"{_writer(raw)}"
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            key = " ".join(".".join(map(str, first["loc"])).split())
            raise CompressError(
                f"{where}: {key}: {first['msg']}; take {FILE} as llmcompress wrote it"
            ) from None

    @classmethod
    def of(cls, folder: str | Path) -> "Report":
        """Read the report inside an artefact. Raises CompressError if there is none."""
        file = path_of(folder, "folder") / FILE
        try:
            with file.open("rb") as opened:
                text = opened.read(LARGEST + 1)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise CompressError(
                f"{file} can't be read ({reason}): give a folder that `llmcompress run` wrote"
            ) from None
        return cls.from_json(text, file)

    def require(
        self,
        kl_nats: float | None = None,
        perplexity_ratio: float | None = None,
        top1_agreement: float | None = None,
    ) -> None:
        """Raise AcceptError, with one line for all bounds that are missed. The first two are upper bounds,
        the agreement is a lower bound.

        A value that was not measured misses its bound. A bound of None is not checked.
        """
        measured = self.fidelity
        misses = [
            *_miss("kl_nats", measured.kl_nats_mean, kl_nats, at_most=True),
            *_miss("perplexity_ratio", measured.perplexity_ratio, perplexity_ratio, at_most=True),
            *_miss("top1_agreement", measured.top1_agreement, top1_agreement, at_most=False),
        ]
        if misses:
            tries = [_GENTLER[stage.name] for stage in self.stages if stage.name in _GENTLER]
            advice = ", ".join(dict.fromkeys([*tries, "or a looser bound"]))
            raise AcceptError(
                f"the result misses accept: {'; '.join(misses)}; try {advice.removeprefix('or ')}"
            )


# for each stage, the change to a recipe that compresses less
_GENTLER = {
    "prune": "a larger keep",
    "sparsify": "a larger keep",
    "tie": "no tie",
    "share": "more groups",
    "low_rank": "a larger keep or rank",
    "codebook": "more entries",
    "distill": "more distillation steps",
    "quantize": "rounding: learned, a smaller group_size or more calibration samples",
}


def _miss(name: str, measured: float | None, bound: float | None, *, at_most: bool) -> list[str]:
    if bound is None:
        return []
    asked = f"at {'most' if at_most else 'least'} {bound:g} was asked"
    if measured is None:
        return [f"{name} was not measured and {asked}"]
    held = measured <= bound if at_most else measured >= bound
    return [] if held else [f"{name} is {measured:.9g} and {asked}"]


def _writer(raw: dict[str, Any]) -> str:
    """The release that wrote a report of another schema, as a hint what to install."""
    environment = raw.get("environment")
    versions = environment.get("versions") if isinstance(environment, dict) else None
    version = versions.get("llmcompress") if isinstance(versions, dict) else None
    known = isinstance(version, str) and re.fullmatch(r"[\w.+!-]{1,32}", version, re.ASCII)
    return f"llmcompress=={version}, which wrote it" if known else "the newest llmcompress"
