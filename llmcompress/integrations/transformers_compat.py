"""Every name of transformers outside its top level, for the rooms from `integrations` on.

transformers may move or change these in any release, so pyproject.toml has an upper bound on its version.
Lower rooms import such names themselves: `io.own_code`, `io.tokenizer` and `formats`.
tests/integrations/test_transformers_compat.py lists all of these names and the private attributes that are
used, and checks that the installed version has them.
"""

import llmcompress.formats.bitsandbytes_layout  # noqa: F401  # first: it quiets the import of bitsandbytes

# isort: split
from transformers.cache_utils import DynamicLayer as DynamicLayer
from transformers.cache_utils import DynamicSlidingWindowLayer as DynamicSlidingWindowLayer
from transformers.conversion_mapping import get_model_conversion_mapping as get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter as WeightConverter
from transformers.core_model_loading import WeightRenaming as WeightRenaming
from transformers.core_model_loading import (
    convert_and_load_state_dict_in_model as convert_and_load_state_dict_in_model,
)
from transformers.core_model_loading import rename_source_key as rename_source_key
from transformers.modeling_utils import LoadStateDictConfig as LoadStateDictConfig
from transformers.modeling_utils import ModuleUtilsMixin as ModuleUtilsMixin
from transformers.models.auto.auto_factory import (
    add_generation_mixin_to_remote_model as add_generation_mixin_to_remote_model,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D as Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.quantizers.base import (
    MODULES_TO_PATCH_FOR_QUANTIZATION as MODULES_TO_PATCH_FOR_QUANTIZATION,
)
from transformers.quantizers.base import HfQuantizer as HfQuantizer
from transformers.utils import logging as logging
from transformers.utils.import_utils import is_peft_available as is_peft_available


def deserializers() -> tuple[type, ...]:
    """The operations by which a loader reads bitsandbytes' codes."""
    # imported here, because it imports bitsandbytes
    from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb8bitDeserialize

    return Bnb4bitDeserialize, Bnb8bitDeserialize


def trackers() -> list[str]:
    """The experiment trackers that the Trainer reports to, by name."""
    # imported here, because it imports the Trainer's modules
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return sorted(INTEGRATION_TO_CALLBACK)


def available_trackers() -> list[str]:
    """The trackers whose package is installed here."""
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    return list(get_available_reporting_integrations())
