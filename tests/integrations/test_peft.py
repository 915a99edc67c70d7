"""What others build on a native artefact: PEFT puts a LoRA adapter on it and trains it, and the codes stay
what they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from llmcompress.pipeline.run import run_recipe
from tests.bases import VOCABULARY, save_base, small_recipe, write_text

pytestmark = pytest.mark.usefixtures("short_runs")


# PEFT asks transformers by an old name
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_an_adapter_on_a_native_artefact_learns_and_is_saved_and_loaded(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=1)
    run_recipe(small_recipe(write_text(tmp_path / "facts.txt"), base), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    codes = {
        name: module.weight.clone()
        for name, module in adapted.named_modules()
        if isinstance(module, Linear4bit)
    }
    assert codes
    # as every trainer does; bitsandbytes' CPU kernel with AVX512-BF16, which eval mode runs, has no gradient
    adapted.train()
    learning = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.02)
    tokens = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(5):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = {
        name: module.weight for name, module in adapted.named_modules() if isinstance(module, Linear4bit)
    }
    assert all(torch.equal(after[name], code) for name, code in codes.items())
    adapted.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tmp_path / "adapter"
    )
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, adapted.eval()(tokens).logits, rtol=1e-4, atol=1e-4)
