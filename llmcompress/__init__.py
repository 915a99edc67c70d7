"""llmcompress makes causal language models of Hugging Face transformers small, and says what that cost."""

from llmcompress import interrupt as interrupt  # first: what comes takes seconds, in which Ctrl-C is answered

# isort: split
from llmcompress import adapters as adapters  # has PEFT merge into what we quantised
from llmcompress import plugin as plugin  # teaches from_pretrained our formats
from llmcompress.errors import AcceptError, CompressError
from llmcompress.evaluate import evaluate
from llmcompress.push import push
from llmcompress.recipe import Accept, Recipe
from llmcompress.report import Report
from llmcompress.reproduce import reproduce
from llmcompress.resave import save_native  # has save_pretrained mend or refuse what forwards did to native models
from llmcompress.run import compress
from llmcompress.stages.quantize import Quantize
from llmcompress.texts import DataSpec

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
