"""What the package uses of transformers, accelerate, bitsandbytes and PEFT that their top level does not
export.

The tables below are the whole of it: a test finds every such import in the source and compares, so that a new
one is a decision; others look each name up in the installed versions, so that a release that moves one is
seen at once.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import llmcompress
from tests.models import pico

PACKAGE = Path(llmcompress.__file__).parent
FOREIGN = ("transformers", "accelerate", "bitsandbytes", "peft")
COMPAT = "integrations.transformers_compat"

# module -> name -> the files that import it
IMPORTED: dict[str, dict[str, set[str]]] = {
    "bitsandbytes": {"functional": {"formats.bitsandbytes_layout"}},
    "bitsandbytes.cextension": {"ErrorHandlerMockBNBNativeLibrary": {"formats.bitsandbytes_layout"}},
    "bitsandbytes.nn.modules": {
        "Int8Params": {"formats.bitsandbytes_linear"},
        "Linear4bit": {"formats.bitsandbytes_linear"},
        "Linear8bitLt": {"formats.bitsandbytes_linear"},
        "Params4bit": {"formats.bitsandbytes_linear"},
    },
    "peft.tuners": {"tuners_utils": {"integrations.registration"}},
    "transformers": {"initialization": {"architectures.unfilled"}},
    "transformers.cache_utils": {"DynamicLayer": {COMPAT}, "DynamicSlidingWindowLayer": {COMPAT}},
    "transformers.conversion_mapping": {"get_model_conversion_mapping": {COMPAT}},
    "transformers.core_model_loading": {
        "WeightConverter": {COMPAT},
        "WeightRenaming": {COMPAT},
        "convert_and_load_state_dict_in_model": {COMPAT},
        "rename_source_key": {COMPAT},
    },
    "transformers.dynamic_module_utils": {
        "get_class_from_dynamic_module": {"io.own_code"},
        "get_relative_imports": {"io.own_code"},
    },
    "transformers.generation": {"utils": {"integrations.registration"}},
    "transformers.integrations.bitsandbytes": {
        "Bnb4bitDeserialize": {COMPAT},
        "Bnb8bitDeserialize": {COMPAT},
    },
    "transformers.integrations.integration_utils": {
        "INTEGRATION_TO_CALLBACK": {COMPAT},
        "get_available_reporting_integrations": {COMPAT},
    },
    "transformers.modeling_utils": {"LoadStateDictConfig": {COMPAT}, "ModuleUtilsMixin": {COMPAT}},
    "transformers.models.auto.auto_factory": {"add_generation_mixin_to_remote_model": {COMPAT}},
    "transformers.models.auto.modeling_auto": {"MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": {COMPAT}},
    "transformers.models.auto.tokenization_auto": {
        "TOKENIZER_MAPPING_NAMES": {"io.tokenizer"},
        "tokenizer_class_from_name": {"io.tokenizer"},
    },
    "transformers.pytorch_utils": {"Conv1D": {COMPAT}},
    "transformers.quantizers": {"auto": {"integrations.registration"}},
    "transformers.quantizers.auto": {"AUTO_QUANTIZATION_CONFIG_MAPPING": {COMPAT}},
    "transformers.quantizers.base": {
        "HfQuantizer": {COMPAT},
        "MODULES_TO_PATCH_FOR_QUANTIZATION": {COMPAT},
    },
    "transformers.quantizers.quantizers_utils": {"should_convert_module": {"formats.bitsandbytes_layout"}},
    "transformers.utils": {"logging": {COMPAT}},
    "transformers.utils.import_utils": {"is_peft_available": {COMPAT}},
    "transformers.utils.quantization_config": {"QuantizationConfigMixin": {"formats.quantization_config"}},
}

# private attribute -> where it is found: a module or a class in one, or `model`: an instance of a causal
# model
ATTRIBUTES: dict[str, str] = {
    "_can_compile_fullgraph": "transformers.PreTrainedModel",
    "_check_merge_allowed": "peft.tuners.tuners_utils.BaseTuner",
    "_convert_weight_packed_for_cpu": "bitsandbytes.functional",
    "_convert_weight_packed_for_cpu_inverse": "bitsandbytes.functional",
    "_dequantize": "transformers.quantizers.base.HfQuantizer",
    "_experts_implementation_internal": "transformers.PretrainedConfig",
    "_from_config": "transformers.PreTrainedModel",
    "_get_train_sampler": "transformers.Trainer",
    "_is_hf_initialized": "",  # set by us on a module, and read by transformers where it initialises weights
    "_is_stateful": "transformers.PreTrainedModel",
    "_keys_to_ignore_on_save": "transformers.PreTrainedModel",
    "_name_or_path": "transformers.PretrainedConfig",
    "_prepare_cache_for_generation": "transformers.GenerationMixin",
    "_prepare_inputs": "transformers.Trainer",
    "_process_model_after_weight_loading": "transformers.quantizers.base.HfQuantizer",
    "_process_model_before_weight_loading": "transformers.quantizers.base.HfQuantizer",
    "_supports_default_dynamic_cache": "transformers.GenerationMixin",
    "_tied_weights_keys": "transformers.PreTrainedModel",
    "_valid_auto_compile_criteria": "transformers.GenerationMixin",
    "_weight_conversions": "",  # set by from_pretrained on a model whose checkpoint was converted
}
PRIVATE_OF_TORCH = {
    "_buffers": nn.Module(),
    "_dynamo": torch,
    "_int_mm": torch,
    "_is_amx_tile_supported": torch.cpu,
    "_is_avx512_bf16_supported": torch.cpu,
    "_parameters": nn.Module(),
    "_version": torch.zeros(1),
}
OF_PYTHON = {"_asdict", "_exit", "_replace"}


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Each module of the package, by its name in it."""
    for file in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(file.read_text())


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """What a module imports of FOREIGN that is private, as (module, name); a module that a string names
    counts too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [(node.module, alias.name) for alias in node.names]
            found = [(module, name) for module, name in names if "." in module or name.startswith("_")]
        elif isinstance(node, ast.Import):
            dotted = [alias.name.rpartition(".") for alias in node.names]
            found = [(module, name) for module, _, name in dotted if module]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_module(node.value):
            module, _, name = node.value.rpartition(".")
            found = [(module, name)]
        else:
            continue
        yield from ((module, name) for module, name in found if module.partition(".")[0] in FOREIGN)


def is_module(text: str) -> bool:
    """Whether a string is the name of a module that is imported by its name, and not by a statement."""
    return (
        re.fullmatch(r"(transformers|peft)(\.\w+)+", text) is not None
        and importlib.util.find_spec(text) is not None
    )


def attributes(trees: list[ast.Module]) -> set[str]:
    """The attributes with a leading underscore that the package reads, sets or overrides, and does not
    define itself."""
    used, own = set[str](), set[str]()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
            (own if of_self and isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
        elif isinstance(node, ast.Assign):
            own |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in used - own if name.startswith("_") and not name.startswith("__")}


def test_the_table_lists_every_private_import() -> None:
    found: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for user, tree in sources():
        for module, name in imports(tree):
            found[module][name].add(user)
    assert found == IMPORTED


def test_the_table_lists_every_private_attribute() -> None:
    overridden = {
        name
        for name, where in ATTRIBUTES.items()
        if where.endswith(("HfQuantizer", "Trainer")) and name != "_prepare_inputs"
    }
    found = attributes([tree for _, tree in sources()])
    assert found == (ATTRIBUTES.keys() - overridden) | PRIVATE_OF_TORCH.keys() | (found & OF_PYTHON)


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in IMPORTED.items() for name in names]
)
def test_each_import_is_found_in_the_installed_version(module: str, name: str) -> None:
    if module.startswith("peft"):
        pytest.importorskip("peft")
    there = importlib.import_module(module)
    assert hasattr(there, name) or importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize("name", [name for name, where in ATTRIBUTES.items() if where])
def test_each_attribute_is_found_in_the_installed_version(name: str) -> None:
    where = ATTRIBUTES[name]
    if where.startswith("peft"):
        pytest.importorskip("peft")
    try:
        owner = importlib.import_module(where)
    except ModuleNotFoundError:
        parent, _, kind = where.rpartition(".")
        owner = getattr(importlib.import_module(parent), kind)
    assert hasattr(owner, name) or hasattr(pico("llama").config, name)


def test_what_registration_changes_is_there() -> None:
    auto = importlib.import_module("transformers.quantizers.auto")
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING.keys() == auto.AUTO_QUANTIZER_MAPPING.keys()
    for kind in (auto.Bnb4BitHfQuantizer, auto.Bnb8BitHfQuantizer):
        assert hasattr(kind, "get_state_dict_and_metadata")


@pytest.mark.parametrize("name", PRIVATE_OF_TORCH)
def test_each_private_name_of_torch_is_found(name: str) -> None:
    assert hasattr(PRIVATE_OF_TORCH[name], name)


@pytest.mark.parametrize("name", [name for name, where in ATTRIBUTES.items() if not where])
def test_what_has_no_owner_is_still_read_by_transformers(name: str) -> None:
    modules = (
        "transformers.modeling_utils",
        "transformers.core_model_loading",
        "transformers.initialization",
    )
    texts = [Path(str(importlib.import_module(module).__file__)).read_text() for module in modules]
    assert any(name in text for text in texts)
