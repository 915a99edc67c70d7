"""A recipe: base, data, stages, accept, as one frozen value that YAML spells and a digest names.

Equal text gives an equal digest, and on the same machine and versions equal bytes out. Whatever is wrong with a recipe is
said in one line before anything is read: the key and where it stands, why it can't be, and the nearest right word.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_serializer, model_validator

from llmcompress.data import DataSpec
from llmcompress.errors import RecipeError
from llmcompress.stages.basis import Basis
from llmcompress.stages.cluster import Cluster
from llmcompress.stages.distill import Distill
from llmcompress.stages.formats import Override
from llmcompress.stages.prune import Prune
from llmcompress.stages.quantize import Quantize
from llmcompress.stages.share import Share
from llmcompress.stages.smooth import Smooth
from llmcompress.stages.sparsify import Sparsify
from llmcompress.stages.tie import Tie

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmcompress.report import Report

LARGEST = 1 << 20  # bytes of a recipe file: more is no recipe
Stage = Prune | Sparsify | Tie | Share | Cluster | Basis | Distill | Quantize
SHORT = reprlib.Repr()  # of a wrong value: aliases can make a few lines of YAML a list of billions
SHORT.maxlevel = 2


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice; plain YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f'"{key.value}" is given twice', key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class Accept(BaseModel):
    """Bounds that the result must keep, or nothing is published."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kl_nats: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="highest mean KL(base || compressed) per token"
    )
    perplexity_ratio: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="highest perplexity over the base's"
    )
    top1_agreement: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="lowest share of equal first tokens"
    )


def _prune_by(entry: Any) -> str:
    """Which schema of `prune` an entry is meant for: by whole units of an axis, or by a pattern of single weights."""
    if not isinstance(entry, dict):
        return PATTERN if isinstance(entry, Sparsify) else AXIS
    meant = difflib.get_close_matches("pattern", [key for key in entry if isinstance(key, str)], n=1, cutoff=0.7)
    return PATTERN if "pattern" in entry or (meant and "axis" not in entry) else AXIS


AXIS, PATTERN = "<axis>", "<pattern>"  # in the place of an error they are no keys
Pruning = Annotated[Annotated[Prune, Tag(AXIS)] | Annotated[Sparsify, Tag(PATTERN)], Discriminator(_prune_by)]


def _tie_by(entry: Any) -> str:
    """Which schema of `tie` an entry is meant for, by the key that only that one has."""
    if not isinstance(entry, dict):
        return next((tag for tag, schema in TIES.items() if isinstance(entry, schema)), "<weights>")
    for key, tag in TIE_KEYS.items():
        if key in entry or difflib.get_close_matches(key, [k for k in entry if isinstance(k, str)], n=1, cutoff=0.8):
            return tag
    return "<weights>"


TIES: dict[str, Any] = {"<weights>": Tie, "<layers>": Share, "<codebook>": Cluster, "<basis>": Basis}
TIE_KEYS = {"weights": "<weights>", "codebook": "<codebook>", "basis": "<basis>", "layers": "<layers>", "pairs": "<layers>"}
Tying = Annotated[
    Annotated[Tie, Tag("<weights>")]
    | Annotated[Share, Tag("<layers>")]
    | Annotated[Cluster, Tag("<codebook>")]
    | Annotated[Basis, Tag("<basis>")],
    Discriminator(_tie_by),
]


class Step(BaseModel):
    """One entry of `stages`: the name of a stage and its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prune: Pruning | None = None
    tie: Tying | None = None
    distill: Distill | None = None
    quantize: Quantize | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, entry: Any) -> Any:
        """`- quantize` is the stage with all defaults; `- quantize:` too."""
        if isinstance(entry, str):
            return {entry: {}}
        if not isinstance(entry, dict):
            return entry
        return {name: {} if settings is None else settings for name, settings in entry.items()}

    @model_validator(mode="after")
    def _one_stage(self) -> Step:
        if len(self.model_fields_set) != 1:
            given = " and ".join(sorted(self.model_fields_set)) or "nothing"
            raise ValueError(f"an entry is one stage, this one has {given}; use one of {', '.join(STAGES)}")
        return self

    @model_serializer(mode="wrap")
    def _only_its_stage(self, handler: Any) -> Any:
        return {name: settings for name, settings in handler(self).items() if name in self.model_fields_set}

    @property
    def stage(self) -> Stage:
        """The stage itself."""
        stage = self.prune or self.tie or self.distill or self.quantize
        assert stage is not None
        return stage


STAGES = tuple(Step.model_fields)


class Recipe(BaseModel):
    """What to do to which model, on which text, and how much it may lose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str | None = Field(
        default=None, min_length=1, description="Hub id or folder of the model; `demo` is the embedded one"
    )
    revision: str | None = Field(default=None, min_length=1, description="commit, branch or tag of a base on the Hub")
    data: DataSpec = Field(default=DataSpec(), description="text that calibrates and evaluates")
    stages: Annotated[tuple[Step, ...], Field(min_length=1)]
    accept: Accept = Accept()

    @model_validator(mode="after")
    def _stages_can_follow_each_other(self) -> Recipe:
        quantized = shared = False
        coded: Cluster | None = None
        for number, step in enumerate(self.stages):
            lesson = step.distill
            if shared and step.prune:
                raise ValueError("prune comes before tie: weights that are shared, products or codes can't be cut any more")
            healed = any(before.distill for before in self.stages[:number])
            if healed and isinstance(step.tie, Tie | Share | Basis) and not any(s.distill for s in self.stages[number:]):
                raise ValueError("distill heals what comes before it, and tie comes after the last one; put distill after tie")
            if (
                coded
                and step.quantize
                and coded.skip == ()
                and (step.quantize.head, step.quantize.embedding) == ("keep", "keep")
            ):
                raise ValueError(
                    "codebook and quantize are two codes for the same linears, and codebook takes all; give it skip, or leave "
                    "one"
                )
            if quantized and (lesson is None or lesson.train == "lora"):
                raise ValueError(
                    "a quantised model can't be changed again, but for what is not in codes: after the one quantize comes "
                    "nothing, or distill with train: scales, norms or all"
                )
            if lesson and lesson.train == "scales" and not (quantized or coded):
                raise ValueError("train: scales is for what quantize or a codebook left; put one of them before it")
            if lesson and lesson.student and number:
                raise ValueError("a student takes the place of what the stages before it made; let its distill be the first")
            quantized = quantized or step.quantize is not None
            coded = step.tie if isinstance(step.tie, Cluster) else coded
            shared = shared or isinstance(step.tie, Share | Cluster | Basis)
        for step, after in zip(self.stages, self.stages[1:], strict=False):
            if isinstance(step.prune, Sparsify):
                why = "rounding would move its zeros" if after.quantize else "its zeros are stored by place"
                raise ValueError(f"prune with a pattern is the last stage: {why}; cut whole units before it, and quantise none")
        return self

    @model_serializer(mode="wrap")
    def _only_what_was_set(self, handler: Any) -> Any:
        return {key: value for key, value in handler(self).items() if value not in (None, {})}

    def training_tokens(self, length: int) -> int:
        """How many tokens the stages that train ask for, where windows of the data have `length`."""
        return max((step.distill.tokens(length) for step in self.stages if step.distill), default=0)

    @property
    def student(self) -> str | None:
        """The model that takes the place of the base, if one does."""
        first = self.stages[0].distill
        return first.student if first else None

    @property
    def teachers(self) -> tuple[str, ...]:
        """The models that teach besides the base."""
        return tuple(step.distill.teacher for step in self.stages if step.distill and step.distill.teacher)

    @property
    def digest(self) -> str:
        """sha256 of the recipe with every default filled in."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """The recipe as YAML, without what is left at its default; reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)

    @classmethod
    def parse(cls, text: str | bytes, where: str = "recipe") -> Recipe:
        """A recipe from YAML; raises RecipeError with one line that begins with `where`."""
        try:
            entries = yaml.load(text, _Loader)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
            line = getattr(getattr(error, "problem_mark", None), "line", None)
            place = f" (line {line + 1})" if line is not None else ""
            raise RecipeError(f"{where} is no YAML{place}: {_one_line(getattr(error, 'problem', None) or error)}") from None
        if not isinstance(entries, dict):
            raise RecipeError(f"{where} holds {_kind(entries)}, not a mapping; a recipe begins with base:, data: or stages:")
        try:
            return cls.model_validate(entries)
        except ValidationError as error:
            raise RecipeError(f"{where}: {_one_line(_explain(error))}") from None

    @classmethod
    def from_file(cls, file: str | Path) -> Recipe:
        """A recipe from a YAML file; raises RecipeError where there is none or it is wrong."""
        path = Path(file)
        if not path.is_file():
            raise RecipeError(f"no recipe file {path}; give the path of a .yaml file")
        if path.stat().st_size > LARGEST:
            raise RecipeError(f"{path} has {path.stat().st_size} bytes, a recipe has at most {LARGEST}; give a recipe file")
        return cls.parse(path.read_bytes(), str(path))

    def apply(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, Report]:
        """Compress a model in memory: it is changed in place and returned with its report.

        `base` and `revision` of the recipe are not looked at. Raises CompressError as `compress` does.
        """
        from llmcompress.live import apply  # it knows recipes, so a recipe finds it only when asked

        return apply(self, model, tokenizer)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _explain(error: ValidationError) -> str:
    """The first thing wrong, as `stages.0.quantize.blok: unknown key; did you mean block?`."""
    errors = error.errors(include_url=False)
    beside = [one for one in errors if one["type"] == "extra_forbidden" and one["loc"][:-1] == errors[0]["loc"][:-1]]
    first = beside[0] if errors[0]["type"] == "missing" and beside else errors[0]  # what is missing may be misspelt
    path, kind, given = first["loc"], first["type"], first.get("input")
    place = ".".join(str(part) for part in path if not str(part).startswith(KINDS))
    if kind == "extra_forbidden":
        known = _known(path[:-1])
        if path[:-2] == ("stages",):
            place, wrong = f"stages.{path[1]}", f'"{path[-1]}" is no stage'
        else:
            wrong = "unknown key"
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        return f"{place}: {wrong}; " + (f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}")
    if kind == "missing":
        return f"{place}: is missing; add it"
    message = first["msg"].removeprefix("Value error, ")
    shown = f", not {SHORT.repr(given)[:80]}" if kind != "value_error" else ""
    return f"{place + ': ' if place else ''}{message}{shown}"


KINDS = ("literal[", "constrained-", AXIS, PATTERN, *TIES)  # what pydantic puts into a place beside the keys
KEYS = {"data": DataSpec, "accept": Accept, AXIS: Prune, PATTERN: Sparsify, "quantize": Quantize, "smooth": Smooth}
KEYS |= {"distill": Distill, **TIES}


def _known(path: tuple[int | str, ...]) -> list[str]:
    """The keys that may stand at a place of the recipe."""
    model: Any = Recipe
    for part in path:
        if part == "stages":
            model = Step
        elif model is Quantize and part == "overrides":
            model = Override
        elif isinstance(part, str):
            model = KEYS.get(part, model)
    return list(model.model_fields)
