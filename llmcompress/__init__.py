"""llmcompress compresses causal language models of Hugging Face transformers and reports what that cost.

Importing it lets `from_pretrained` load the formats that it writes (`integrations.registration`). The public
names below are imported when they are first used.
"""

# imported first: the imports of a command take seconds, during which Ctrl-C must work
from llmcompress.cli import interrupt as interrupt

# isort: split
from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmcompress.integrations.registration import register

if TYPE_CHECKING:
    from llmcompress.data.sources import DataSpec as DataSpec
    from llmcompress.errors import AcceptError as AcceptError
    from llmcompress.errors import CompressError as CompressError
    from llmcompress.errors import DataError as DataError
    from llmcompress.errors import ModelError as ModelError
    from llmcompress.errors import OutputError as OutputError
    from llmcompress.errors import ProcessError as ProcessError
    from llmcompress.errors import RecipeError as RecipeError
    from llmcompress.integrations.bitsandbytes_saving import save_native as save_native
    from llmcompress.integrations.compiled_decoding import accelerate as accelerate
    from llmcompress.pipeline.advise import Advised as Advised
    from llmcompress.pipeline.advise import advise as advise
    from llmcompress.pipeline.api import compress as compress
    from llmcompress.pipeline.api import plan as plan
    from llmcompress.pipeline.compare import compare as compare
    from llmcompress.pipeline.evaluate import Evaluation as Evaluation
    from llmcompress.pipeline.evaluate import evaluate as evaluate
    from llmcompress.pipeline.export import Exported as Exported
    from llmcompress.pipeline.export import export as export
    from llmcompress.pipeline.plan import Plan as Plan
    from llmcompress.pipeline.push import push as push
    from llmcompress.pipeline.reproduce import Reproduction as Reproduction
    from llmcompress.pipeline.reproduce import reproduce as reproduce
    from llmcompress.pipeline.search import Searched as Searched
    from llmcompress.pipeline.search import search as search
    from llmcompress.recipe.recipe import Accept as Accept
    from llmcompress.recipe.recipe import Recipe as Recipe
    from llmcompress.report.comparison import ComparedRow as ComparedRow
    from llmcompress.report.schema import Report as Report
    from llmcompress.stages.budget.stage import Budget as Budget
    from llmcompress.stages.codebook.stage import Codebook as Codebook
    from llmcompress.stages.distill.stage import Distill as Distill
    from llmcompress.stages.kv_cache.stage import KVCache as KVCache
    from llmcompress.stages.low_rank.stage import LowRank as LowRank
    from llmcompress.stages.prune.stage import Prune as Prune
    from llmcompress.stages.quantize.config import Override as Override
    from llmcompress.stages.quantize.smoothing import Smooth as Smooth
    from llmcompress.stages.quantize.stage import Quantize as Quantize
    from llmcompress.stages.share.stage import Share as Share
    from llmcompress.stages.sparsify.stage import Sparsify as Sparsify
    from llmcompress.stages.tie.stage import Tie as Tie

__version__ = "0.1.0"

_PUBLIC = {
    **dict.fromkeys(("Advised", "advise"), "pipeline.advise"),
    **dict.fromkeys(("compress", "plan"), "pipeline.api"),
    **dict.fromkeys(("Evaluation", "evaluate"), "pipeline.evaluate"),
    **dict.fromkeys(("Exported", "export"), "pipeline.export"),
    **dict.fromkeys(("Reproduction", "reproduce"), "pipeline.reproduce"),
    **dict.fromkeys(("Searched", "search"), "pipeline.search"),
    **dict.fromkeys(("Accept", "Recipe"), "recipe.recipe"),
    **dict.fromkeys(
        (
            "AcceptError",
            "CompressError",
            "DataError",
            "ModelError",
            "OutputError",
            "ProcessError",
            "RecipeError",
        ),
        "errors",
    ),
    "ComparedRow": "report.comparison",
    "Plan": "pipeline.plan",
    "compare": "pipeline.compare",
    "push": "pipeline.push",
    "save_native": "integrations.bitsandbytes_saving",
    "accelerate": "integrations.compiled_decoding",
    "CacheSettings": "integrations.kv_cache",
    "kv_cache": "integrations.kv_cache",
    "DataSpec": "data.sources",
    "Report": "report.schema",
    "Budget": "stages.budget.stage",
    "Codebook": "stages.codebook.stage",
    "Distill": "stages.distill.stage",
    "KVCache": "stages.kv_cache.stage",
    "LowRank": "stages.low_rank.stage",
    "Prune": "stages.prune.stage",
    "Override": "stages.quantize.config",
    "Smooth": "stages.quantize.smoothing",
    "Quantize": "stages.quantize.stage",
    "Share": "stages.share.stage",
    "Sparsify": "stages.sparsify.stage",
    "Tie": "stages.tie.stage",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


register()
