"""Live native models saved again, bit for bit; what is refused is in test_resave_folder, what happens without
us in _stock.

A CPU without AVX512-BF16 repacks nothing, so `repack` tells bitsandbytes that it has that and runs a forward.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmcompress import save_native
from llmcompress.errors import ModelError
from llmcompress.formats import bitsandbytes_layout, bitsandbytes_linear
from llmcompress.pipeline.in_memory import apply_recipe
from tests.bases import byte_tokenizer, save_base, small_recipe, write_text
from tests.models import pico

pytestmark = pytest.mark.usefixtures("short_runs")

TOKENS = torch.arange(3, 27)[None]
# biases, Conv1D, tied heads, renamed experts
FAMILIES = ("llama", "qwen2", "phi3", "gpt2", "opt", "gpt_neox", "qwen3_moe")
FOUR = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
EIGHT = {"load_in_8bit": True}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": FOUR | {"bnb_4bit_quant_type": "nf4"},
    "nf4-double": FOUR | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4-bf16": FOUR | {"bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "fp4-double": FOUR | {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": EIGHT | {"llm_int8_threshold": 6.0},
    "int8-all": EIGHT | {"llm_int8_threshold": 0.0},
}
by_kind = pytest.mark.parametrize("kind", KINDS)
by_four = pytest.mark.parametrize("kind", [kind for kind in KINDS if "int8" not in kind])


def load(folder: Path | str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def quantised(base: Path, kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A base that is quantised as it is loaded."""
    return load(base, dtype=dtype, quantization_config=cast(Any, BitsAndBytesConfig)(**KINDS[kind], **more))


def artefact(
    folder: Path,
    kind: str,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    skip: list[str] | None = None,
    **config: Any,
) -> Path:
    """A native checkpoint with scales that no nearest rounding gives, saved before any forward."""
    base = folder.with_name(f"{folder.name}-base")
    cast(Any, pico(family, **config)).to(dtype).save_pretrained(base)
    quantised(base, kind, dtype, llm_int8_skip_modules=skip).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    double = any(name.endswith(".nested_absmax") for name in tensors)
    for name, tensor in tensors.items():
        if name.endswith(".nested_absmax" if double else (".absmax", ".SCB")):
            tensors[name] = tensor * 1.0123
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    shutil.rmtree(base)
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def different(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that are not equal in every bit."""
    return [
        n
        for n in sorted(a.keys() | b.keys())
        if n not in a or n not in b or a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])
    ]


@torch.no_grad()
def forward(model: Any) -> Tensor:
    return cast(Tensor, model(TOKENS).logits)


def repack(model: Any) -> int:
    """A forward as bitsandbytes runs it on a CPU with AVX512-BF16; how many linears it repacked. On others
    logits are wrong."""
    linears: list[Any] = [
        module for module in model.modules() if type(module) is bitsandbytes_linear.LINEARS[0]
    ]
    for module in linears:
        module.support_avx512bf16_for_cpu = True
    forward(model)
    for module in linears:
        module.support_avx512bf16_for_cpu = bitsandbytes_layout.stock().has_avx512bf16()
    return sum(module.weight.quant_state.packing_format_for_cpu for module in linears)


@by_kind
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_saved_bit_for_bit_before_and_after_forwards(
    family: str, kind: str, tmp_path: Path
) -> None:
    made = artefact(tmp_path / "made", kind, family)
    model, expected = load(made), stored(made)
    assert save_native(model, tmp_path / "loaded") == tmp_path / "loaded"
    assert not different(stored(tmp_path / "loaded"), expected)
    before = forward(model)
    assert not different(stored(save_native(model, tmp_path / "run")), expected)
    assert torch.equal(forward(model), before)
    repack(model)
    assert not different(stored(save_native(model, tmp_path / "repacked")), expected)
    four_bit: list[Any] = [
        module for module in model.modules() if type(module) is bitsandbytes_linear.LINEARS[0]
    ]
    assert all(module.quant_state is module.weight.quant_state for module in four_bit)
    assert torch.equal(forward(model), before), "the live model is mended too"
    written = json.loads((tmp_path / "repacked" / "config.json").read_text())
    assert (
        written["quantization_config"]
        == json.loads((made / "config.json").read_text())["quantization_config"]
    )
    assert (tmp_path / "repacked" / "generation_config.json").is_file()


@by_kind
@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("llama", False), ("gpt2", False), ("qwen2", True)]
)
def test_heads_are_saved_tied_or_not_or_quantised(family: str, tied: bool, kind: str, tmp_path: Path) -> None:
    skip = ["lm_head"] if tied else [r"none of them"]
    made = artefact(tmp_path / "made", kind, family, skip=skip, tie_word_embeddings=tied)
    model, names = load(made), stored(made).keys()
    mark = "lm_head.SCB" if "int8" in kind else "lm_head.weight.absmax"
    assert (mark in names) is (not tied) and ("lm_head.weight" in names) is (not tied)
    forward(model)
    repack(model)
    assert not different(stored(save_native(model, tmp_path / "again")), stored(made))


@by_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_biases_keep_their_type_whatever_the_kernels_compute_in(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    made = artefact(tmp_path / "made", kind, "qwen2", dtype)
    model = load(made)
    forward(model)
    repack(model)
    assert not different(stored(save_native(model, tmp_path / "again")), stored(made))


@by_four
def test_scales_are_found_again_after_state_dicts_between_forwards(kind: str, tmp_path: Path) -> None:
    made = artefact(tmp_path / "made", kind)
    model = load(made)
    for turn in range(3):
        repack(model)
        model.state_dict()  # turns the codes back and leaves the scales wrong
        assert bitsandbytes_linear.scales_lost(model.model.layers[0].mlp.up_proj)
        with pytest.raises(ModelError, match="load it again"):
            bitsandbytes_linear.packed_of(model.model.layers[0].mlp.up_proj)
        if turn:
            assert not different(stored(save_native(model, tmp_path / f"{turn}")), stored(made))


@by_kind
def test_what_is_not_quantised_is_saved_as_it_is_now(kind: str, tmp_path: Path) -> None:
    made = artefact(tmp_path / "made", kind, "qwen2")
    model, expected = load(made), stored(made)
    forward(model)
    repack(model)
    names = ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.v_proj.bias")
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data * 0.5 + 0.25
        expected[name] = parameter.data.float()
    assert not different(stored(save_native(model, tmp_path / "again")), expected)
    assert different(expected, stored(made)) == sorted(names)


@by_four
def test_a_model_quantised_as_it_was_loaded_is_quantised_again(kind: str, tmp_path: Path) -> None:
    save_base(tmp_path / "base", "qwen2")
    model = quantised(tmp_path / "base", kind)
    model.save_pretrained(tmp_path / "before")
    forward(model)
    repack(model)
    assert not different(stored(save_native(model, tmp_path / "after")), stored(tmp_path / "before"))


LOADER = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        save_file({"logits": model(torch.arange(3, 27)[None]).logits}, folder + ".seen")
assert not any(name.startswith("llmcompress") for name in sys.modules)
"""


@pytest.mark.slow
def test_plain_transformers_computes_the_same_from_it(tmp_path: Path) -> None:
    expected = {}
    for family in ("llama", "qwen2", "gpt2", "opt"):
        for kind in KINDS:
            model = load(artefact(tmp_path / f"{family}-{kind}", kind, family))
            expected[f"{family}-{kind}-again"] = forward(model)
            repack(model)
            save_native(model, tmp_path / f"{family}-{kind}-again", max_shard_size="100KB")
    text, base = write_text(tmp_path / "text.txt"), save_base(tmp_path / "base")
    for format in ("nf4", "int8"):  # made in this process, and never loaded
        model, _ = apply_recipe(small_recipe(text, base, format=format), load(base), byte_tokenizer())
        expected[format] = forward(model)
        save_native(model, tmp_path / format)
    assert (tmp_path / "opt-nf4-again" / "model.safetensors.index.json").is_file()
    subprocess.run(
        [sys.executable, "-c", LOADER, *(str(tmp_path / name) for name in expected)], check=True, timeout=300
    )
    for name, logits in expected.items():
        assert torch.equal(load_file(tmp_path / f"{name}.seen")["logits"], logits), name


FROM_CACHE = """
import os, sys, urllib.error, urllib.request
from pathlib import Path
import pytest
from tests.integrations.test_bitsandbytes_saving import (
    ModelError, different, load, repack, save_native, stored
)
model = load("user/name", local_files_only=True)
with pytest.raises(urllib.error.HTTPError):
    urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/loaded")
repack(model)
assert not different(stored(save_native(model, sys.argv[1])), stored(Path(sys.argv[2])))
repack(model)
model.config._name_or_path = "user/absent"
with pytest.raises(ModelError, match="user/absent can't be loaded again"):
    save_native(model, sys.argv[1], overwrite=True)
"""


@pytest.mark.slow
def test_a_hub_model_is_read_again_from_the_cache_and_nothing_is_asked_of_the_network(tmp_path: Path) -> None:
    made, commit, asked = artefact(tmp_path / "made", "nf4-double"), "0" * 40, []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET

    cached = tmp_path / "home" / "hub" / "models--user--name"
    shutil.copytree(made, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        own = {
            "HF_HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
        }
        arguments = [sys.executable, "-c", FROM_CACHE, str(tmp_path / "again"), str(made)]
        subprocess.run(
            arguments, check=True, timeout=300, cwd=Path(__file__).parents[2], env=os.environ | own
        )
        server.shutdown()
    assert asked[-1] == "/loaded", "loading asks for adapters, saving for nothing"


@by_kind
def test_plain_save_pretrained_is_right_once_we_are_imported(kind: str, tmp_path: Path) -> None:
    made = artefact(tmp_path / "made", kind, "qwen2")
    model = load(made)
    forward(model)
    repack(model)
    model.save_pretrained(tmp_path / "again")
    assert not different(stored(tmp_path / "again"), stored(made))
