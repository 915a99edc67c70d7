"""What `import llmcompress` changes in other packages: everything is listed here, done once, and only when it
is wanted.

- transformers learns the quantization method `llmcompress`, so that `from_pretrained` loads our formats;
- `save_pretrained` of a model in a native bitsandbytes layout first mends what a forward did to it, or
  refuses;
- PEFT turns our modules into plain ones before it merges an adapter into them.

Each change is made when the package in question is imported, or at once where it has been. The modules that
do the work are imported when they are first needed: importing llmcompress takes milliseconds and imports
neither torch nor transformers.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

METHOD = "llmcompress"  # as quantization_config.METHOD


def register() -> None:
    """Make the changes, or prepare them; a second call changes nothing."""
    _when_imported("transformers.quantizers.auto", _teach_transformers)
    _when_imported("peft.tuners.tuners_utils", _prepare_merging)


def _teach_transformers(auto: ModuleType) -> None:
    """Have transformers know our quantization method, and ask us before it saves native bitsandbytes
    models."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, _Config)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, _quantizer)
    for kind in (auto.Bnb4BitHfQuantizer, auto.Bnb8BitHfQuantizer):
        kind.get_state_dict_and_metadata = _before_saving


class _Config:
    """Stands for our config class until one is read."""

    @staticmethod
    def from_dict(*args: Any, **options: Any) -> Any:
        """Read a `quantization_config` of config.json."""
        from llmcompress.formats.quantization_config import CompressedConfig

        kind: Any = CompressedConfig
        return kind.from_dict(*args, **options)


def _quantizer(*args: Any, **options: Any) -> Any:
    """Make our quantizer, as its class would."""
    from llmcompress.integrations.transformers_quantizer import Quantizer

    return Quantizer(*args, **options)


def _before_saving(quantizer: Any, model: Any) -> tuple[None, dict[str, str]]:
    """What `save_pretrained` asks a quantizer for: no other state dict than the model's, once that is
    right."""
    if not getattr(model, "_hf_peft_config_loaded", False):  # then adapters alone are saved
        from llmcompress.integrations.bitsandbytes_saving import mend

        mend(model)
    return None, {}


def _prepare_merging(tuners: ModuleType) -> None:
    """Have the check that PEFT makes before merging prepare our modules for it."""
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


def _when_imported(name: str, act: Callable[[ModuleType], None]) -> None:
    """Call `act` with a module once it is imported: now, if it has been."""
    if name in sys.modules:
        act(sys.modules[name])
    elif not any(isinstance(finder, _WhenImported) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported(name, act))


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds one module as Python would, and acts on it once it is there."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self.name, self.act = name, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of that module, whose execution `act` follows; None for any other."""
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
