"""llmcompress makes causal language models of Hugging Face transformers small, and says what that cost."""

from llmcompress.cli import interrupt as interrupt  # first: what comes takes seconds, in which Ctrl-C is answered

# isort: split
from llmcompress.data.sources import DataSpec
from llmcompress.errors import AcceptError, CompressError
from llmcompress.integrations import peft_merging as peft_merging  # has PEFT merge into what we quantised
from llmcompress.integrations import transformers_quantizer as transformers_quantizer  # teaches from_pretrained our formats
from llmcompress.integrations.bitsandbytes_saving import (
    save_native,  # has save_pretrained mend or refuse what forwards did to native models
)
from llmcompress.pipeline.evaluate import evaluate
from llmcompress.pipeline.push import push
from llmcompress.pipeline.reproduce import reproduce
from llmcompress.pipeline.run import run_recipe as compress
from llmcompress.recipe.recipe import Accept, Recipe
from llmcompress.report.schema import Report
from llmcompress.stages.quantize.stage import Quantize

__version__ = "0.1.0"
__all__ = [
    "Accept",
    "AcceptError",
    "CompressError",
    "DataSpec",
    "Quantize",
    "Recipe",
    "Report",
    "compress",
    "evaluate",
    "push",
    "reproduce",
    "save_native",
]
