"""Everything that `import llmcompress` changes in other packages: done once, and only when it is needed.

- transformers learns the quantization method `llmcompress`, so that `from_pretrained` loads our formats;
- `save_pretrained` of a model in a native bitsandbytes layout first restores what a forward changed in it, or
  refuses;
- bitsandbytes' linears multiply few tokens on a CPU by our kernel, if it takes them;
- PEFT turns our modules into plain ones before it merges an adapter into them;
- `generate` makes a cache of codes for a model whose config asks for one, if its caller asks for no other;
- `generate` of a model that `accelerate` was called with has a static cache and a compiled step.

Each change is made when the package in question is imported, or at once if it already is. The modules that do
the work are imported when they are first needed: importing llmcompress takes milliseconds and imports neither
torch nor transformers.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

METHOD = "llmcompress"  # the same as quantization_config.METHOD
STOCK_PRODUCTS = "LLMCOMPRESS_BITSANDBYTES"  # `0`: bitsandbytes multiplies by itself
CACHE_FIELD = "llmcompress_kv_cache"  # the same as kv_cache.FIELD
DECODING_MARK = "llmcompress_decoding"  # the same as compiled_decoding.MARK


def register() -> None:
    """Make the changes, or prepare them; a second call changes nothing."""
    _when_imported("transformers.quantizers.auto", _teach_transformers)
    _when_imported("bitsandbytes.nn.modules", _multiply_packed)
    _when_imported("peft.tuners.tuners_utils", _prepare_merging)
    _when_imported("transformers.generation.utils", _change_generate)


def _teach_transformers(auto: ModuleType) -> None:
    """Register our quantization method with transformers, and make it call us before it saves native
    bitsandbytes models."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, _Config)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, _quantizer)
    for kind in (auto.Bnb4BitHfQuantizer, auto.Bnb8BitHfQuantizer):
        kind.get_state_dict_and_metadata = _before_saving


class _Config:
    """Stands in for our config class until a config is read."""

    @staticmethod
    def from_dict(*args: Any, **options: Any) -> Any:
        """Read a `quantization_config` of config.json."""
        from llmcompress.formats.quantization_config import CompressedConfig

        kind: Any = CompressedConfig
        return kind.from_dict(*args, **options)


def _quantizer(*args: Any, **options: Any) -> Any:
    """Return our quantizer, as a call of its class would."""
    from llmcompress.integrations.transformers_quantizer import Quantizer

    return Quantizer(*args, **options)


def _before_saving(quantizer: Any, model: Any) -> tuple[None, dict[str, str]]:
    """The hook that `save_pretrained` calls on a quantizer: mends the model and leaves its state dict as it
    is."""
    if not getattr(model, "_hf_peft_config_loaded", False):  # PEFT: then only adapters are saved
        from llmcompress.integrations.bitsandbytes_saving import mend

        mend(model)
    return None, {}


def _multiply_packed(modules: ModuleType) -> None:
    """Make bitsandbytes' linears ask our kernel first, unless an environment variable says not to."""
    if os.environ.get(STOCK_PRODUCTS) == "0":
        return
    for kind, name in ((modules.Linear4bit, "four_bit"), (modules.Linear8bitLt, "int8")):
        if not getattr(kind.forward, "packed", False):
            kind.forward = _asking(kind.forward, name)


def _asking(forward: Callable[[Any, Any], Any], name: str) -> Callable[[Any, Any], Any]:
    """A forward that is computed by a function of `bitsandbytes_products`, or as before where that returns
    None."""

    @functools.wraps(forward)
    def asking(self: Any, x: Any) -> Any:
        from llmcompress.integrations import bitsandbytes_products

        out = getattr(bitsandbytes_products, name)(self, x)
        return forward(self, x) if out is None else out

    asking.packed = True  # type: ignore[attr-defined]
    return asking


def _prepare_merging(tuners: ModuleType) -> None:
    """Make PEFT's check before merging prepare our modules for it."""
    kind: Any = vars(tuners)["BaseTuner"]
    check = kind._check_merge_allowed
    if getattr(check, "prepares", False):
        return

    @functools.wraps(check)
    def prepared(self: Any) -> None:
        from llmcompress.integrations.peft_merging import ready_to_merge

        check(self)
        ready_to_merge(self.model)

    prepared.prepares = True  # type: ignore[attr-defined]
    kind._check_merge_allowed = prepared


def _change_generate(utils: ModuleType) -> None:
    """Make `generate` do what a model's config and its mark ask for."""
    _give_caches(utils)
    _compile_steps(utils)


def _give_caches(utils: ModuleType) -> None:
    """Make `generate` store keys and values as the config of a model says. A cache that the caller gives, or
    names by `cache_implementation`, stays as it is."""
    kind: Any = vars(utils)["GenerationMixin"]
    prepare = kind._prepare_cache_for_generation
    if getattr(prepare, "quantizes", False):
        return

    @functools.wraps(prepare)
    def prepared(self: Any, generation_config: Any, model_kwargs: Any, *args: Any, **options: Any) -> Any:
        given = model_kwargs.get("past_key_values")
        returned = prepare(self, generation_config, model_kwargs, *args, **options)
        asked = generation_config.cache_implementation is not None
        if given is None and not asked and getattr(self.config, CACHE_FIELD, None) is not None:
            from llmcompress.integrations.kv_cache import store_as_config_says

            store_as_config_says(self, model_kwargs.get("past_key_values"))
        return returned

    prepared.quantizes = True  # type: ignore[attr-defined]
    kind._prepare_cache_for_generation = prepared


def _compile_steps(utils: ModuleType) -> None:
    """Make `generate` give models with the mark of `accelerate` a static cache, and compile their steps."""
    kind: Any = vars(utils)["GenerationMixin"]
    prepare, valid = kind._prepare_cache_for_generation, kind._valid_auto_compile_criteria
    if getattr(valid, "accelerates", False):
        return

    @functools.wraps(prepare)
    def prepared(
        self: Any, generation_config: Any, model_kwargs: Any, generation_mode: Any, *args: Any, **options: Any
    ) -> Any:
        if hasattr(self, DECODING_MARK):
            from llmcompress.integrations.compiled_decoding import ask_for_static

            ask_for_static(self, generation_config, model_kwargs, generation_mode)
        return prepare(self, generation_config, model_kwargs, generation_mode, *args, **options)

    @functools.wraps(valid)
    def accelerated(self: Any, model_kwargs: Any, generation_config: Any) -> Any:
        if hasattr(self, DECODING_MARK):
            from llmcompress.integrations.compiled_decoding import compiles

            if compiles(generation_config, model_kwargs):
                return True
        return valid(self, model_kwargs, generation_config)

    accelerated.accelerates = True  # type: ignore[attr-defined]
    kind._prepare_cache_for_generation = prepared
    kind._valid_auto_compile_criteria = accelerated


def _when_imported(name: str, act: Callable[[ModuleType], None]) -> None:
    """Call `act` with a module when it is imported, or now if it already is."""
    if name in sys.modules:
        act(sys.modules[name])
    elif not any(isinstance(finder, _WhenImported) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported(name, act))


class _WhenImported(importlib.abc.MetaPathFinder):
    """An import finder that finds one module as Python would, and acts on it once it is imported."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self.name, self.act = name, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of that module, whose execution is followed by `act`; None for any other module."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            self.act(module)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec
