"""What transformers and bitsandbytes do by themselves to a native model that is saved again.

Where one of these fails they have mended it, and part of `llmcompress.integrations.bitsandbytes_saving` may
go.
"""

from pathlib import Path

import pytest
import torch
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from llmcompress.formats import bitsandbytes_layout, bitsandbytes_linear
from tests.bases import save_base
from tests.integrations.test_bitsandbytes_saving import (
    artefact,
    by_four,
    by_kind,
    different,
    forward,
    load,
    quantised,
    repack,
    stored,
)


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers as it is where llmcompress was never imported."""
    for quantizer in (Bnb4BitHfQuantizer, Bnb8BitHfQuantizer):
        monkeypatch.delattr(quantizer, "get_state_dict_and_metadata")


@by_kind
@pytest.mark.usefixtures("stock")
def test_transformers_alone_cannot_save_what_it_loaded(kind: str, tmp_path: Path) -> None:
    model = load(artefact(tmp_path / "made", kind))
    with pytest.raises(NotImplementedError):
        model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").is_file(), "what it leaves looks like a model"


@by_four
@pytest.mark.usefixtures("stock")
def test_transformers_alone_writes_other_weights_after_a_repacking(kind: str, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    model = quantised(tmp_path / "base", kind)
    model.save_pretrained(tmp_path / "before")
    assert repack(model) == 14
    model.save_pretrained(tmp_path / "after")
    before, after = stored(tmp_path / "before"), stored(tmp_path / "after")
    scales = [name for name in before if name.endswith("absmax")]
    assert different(before, after) and set(different(before, after)) <= {
        *scales,
        *(n for n in before if "quant_state" in n),
    }
    # training decodes exactly, on any CPU
    old, new = (load(tmp_path / "before").train(), load(tmp_path / "after").train())
    error = float((forward(new) - forward(old)).norm() / forward(old).norm())
    assert error > (1e-3 if "double" in kind else 0.1)  # measured: 5e-3 and 0.36


@pytest.mark.usefixtures("stock")
def test_transformers_alone_saves_rounded_biases_after_a_forward(tmp_path: Path) -> None:
    save_base(tmp_path / "base", "qwen2")
    model = quantised(tmp_path / "base", "fp4-bf16")
    bias = model.model.layers[0].self_attn.q_proj.bias.clone()
    forward(model)
    model.save_pretrained(tmp_path / "after")
    found = stored(tmp_path / "after")["model.layers.0.self_attn.q_proj.bias"]
    assert found.dtype == torch.bfloat16 and not torch.equal(found.float(), bias)


@pytest.mark.usefixtures("stock")
def test_transformers_alone_saves_trainable_int8_so_that_it_does_not_load(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    quantised(tmp_path / "base", "int8", llm_int8_has_fp16_weight=True).save_pretrained(tmp_path / "after")
    with pytest.raises(RuntimeError, match="floating point"):
        load(tmp_path / "after")


@by_four
def test_a_forward_on_such_a_cpu_rounds_scales_for_good(kind: str, tmp_path: Path) -> None:
    model = load(artefact(tmp_path / "made", kind))
    linear = model.model.layers[0].mlp.up_proj
    assert not bitsandbytes_linear.scales_lost(linear)
    exact = bitsandbytes_linear.packed_of(linear).absmax_RG
    assert repack(model) == 14 and bitsandbytes_linear.scales_lost(linear)
    held = linear.weight.quant_state.absmax
    assert (
        held.dtype == torch.bfloat16
        and torch.equal(held, exact.T.bfloat16())
        and not torch.equal(held.float(), exact.T)
    )


@pytest.mark.skipif(
    not bitsandbytes_layout.stock().has_avx512bf16(),
    reason="this CPU has no AVX512-BF16, so bitsandbytes repacks nothing",
)
@by_four
def test_a_cpu_that_has_it_needs_no_telling(kind: str, tmp_path: Path) -> None:
    model = load(artefact(tmp_path / "made", kind))
    forward(model)
    assert bitsandbytes_linear.scales_lost(model.model.layers[0].mlp.up_proj)
