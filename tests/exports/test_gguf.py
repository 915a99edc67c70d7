"""GGUF: codes and scales read back bit for bit, models as transformers and llama.cpp load them, tokenizers,
and what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import gguf
import gguf.quants
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from evaluation import gguf_export, llama_cpp, llama_cpp_speed
from evaluation.gguf_export import by_llama_cpp
from evaluation.speed import TINY
from llmcompress.errors import ModelError
from llmcompress.exports import gguf_tokenizer
from llmcompress.exports.artefact import Artefact
from llmcompress.exports.gguf_tokenizer import Kind, vocabulary_of
from llmcompress.formats import registry
from llmcompress.formats.codebook import CodebookLayout
from llmcompress.formats.four_bit import FourBitLayout
from llmcompress.formats.ggml import GgmlLayout
from llmcompress.formats.integer import IntegerLayout, IntegerWeight
from llmcompress.formats.registry import AnyLayout
from llmcompress.formats.schemes import GgmlScheme
from llmcompress.io.tokenizer import TEXTS
from llmcompress.pipeline.export import Exported, export
from llmcompress.pipeline.run import run_recipe
from llmcompress.recipe.recipe import Recipe
from tests.artefacts import distance, load, write_in
from tests.bases import llama_tokenizer, staged_recipe, write_text
from tests.exports.artefacts import grouped, rounded
from tests.formats.test_damaged_artefacts import made
from tests.models import pico

pytestmark = pytest.mark.usefixtures("short_runs")

SIZE = 264
TOKENS = torch.randint(1, 256, (2, 40), generator=torch.Generator().manual_seed(1))
# what transformers has for all such files
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
# as many layers as llama.cpp wants for the one that attends to all
GEMMA3 = {"num_hidden_layers": 6, "layer_types": [*["sliding_attention"] * 5, "full_attention"], **GEMMA}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"num_attention_heads": 4},  # transformers reads no width of heads from such a file
    "qwen3": {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA3,
}
LAYOUTS: dict[str, AnyLayout] = {
    "q4_0": GgmlLayout("q4_0"),
    "iq4_nl": GgmlLayout("iq4_nl"),
    "w8a16": IntegerLayout("w8a16"),
    "w8a8 static": IntegerLayout("w8a8", "static"),
    "w4a16": grouped(64),
    "w4a8": IntegerLayout("w4a8", group_size=32),
}
KINDS = {"q4_0": "Q4_0", "iq4_nl": "IQ4_NL", "w8": "Q8_0", "w4": "Q4_0"}


def merging_tokenizer(split: Any = None, **settings: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges, `<s>` and `</s>`: 262 tokens. `split` goes before its bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "hell")]
    letters = [*alphabet, *("".join(pair) for pair in merges)]
    bpe = tokenizers.Tokenizer(models.BPE({each: n for n, each in enumerate(letters)}, merges, **settings))
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None or "Digits" in str(split))
    bpe.pre_tokenizer = own if split is None else pre_tokenizers.Sequence([split, own])
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=96)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return tokenizer


def weight_in(W_RC: Tensor, layout: AnyLayout) -> Any:
    if isinstance(layout, GgmlLayout):
        return GgmlScheme(layout).nearest(W_RC)
    return rounded(W_RC, layout) if isinstance(layout, IntegerLayout) else made(W_RC, layout)


def written(folder: Path, layout: AnyLayout, family: str = "llama", **config: Any) -> Path:
    """A pico model with every linear but the head in a layout, and a tokenizer."""
    model = pico(family, **{"vocab_size": SIZE, **FAMILIES.get(family, {}), **config})
    write_in(folder, model, layout, lambda W_RC: weight_in(W_RC, layout))
    merging_tokenizer().save_pretrained(folder)
    return folder


def exported(folder: Path) -> Exported:
    return export(folder, "gguf", folder.parent / f"{folder.name}-gguf")


def tensors_of(file: Path) -> dict[str, tuple[str, Tensor]]:
    """The tensors of a GGUF file by name: their types, and their numbers as the gguf package reads them."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))),
        )
        for tensor in gguf.GGUFReader(file).tensors
    }


def fields_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def as_transformers(W: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in the order of transformers: those of llama.cpp pair adjacent channels."""
    return W.reshape(heads, -1, 2, *W.shape[1:]).transpose(1, 2).reshape(W.shape)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    return cast(Tensor, model(tokens).logits).float()


# Tensors.


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_numbers_are_those_of_the_artefact(name: str, tmp_path: Path) -> None:
    """Exactly, but for scales that become float16."""
    folder = written(tmp_path / "small", LAYOUTS[name])
    facts = exported(folder).facts
    artefact, found = Artefact(folder), tensors_of(tmp_path / "small-gguf" / "model.gguf")
    kind = KINDS[name if name in KINDS else name[:2]]
    assert set(facts.converted.values()) == {kind} and facts.converted.keys() == artefact.matrices.keys()
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "o_proj": "attn_output", "down_proj": "ffn_down"}
    worst = 0.0
    for part, theirs in parts.items():
        matrix = next(
            each for each in artefact.matrices.values() if each.name.endswith(f"1.{_of(part)}.{part}")
        )
        type_, W_RC = found[f"blk.1.{theirs}.weight"]
        if part in ("q_proj", "k_proj"):
            W_RC = as_transformers(W_RC, 8 if part == "q_proj" else 2)
        stored = artefact.stored(matrix)
        expected = artefact.weight(matrix)
        if isinstance(stored, IntegerWeight):
            factor = (
                stored.scale_R[:, None]
                if stored.multiplier_RG is None
                else stored.scale_R[:, None] * stored.multiplier_RG
            )
            worst = max(worst, float((factor.half().float() / factor - 1).abs().max()))
            C = matrix.shape[1]
            expected = stored.codes_RC * factor.half().float().repeat_interleave(C // factor.shape[1], 1)
        assert type_ == kind and torch.equal(W_RC, expected), part
        torch.testing.assert_close(W_RC, artefact.weight(matrix), rtol=2**-11, atol=0)
    said = [note for note in facts.notes if "float16" in note]
    assert bool(said) == (worst > 0) == (not name.startswith(("q4", "iq4")))
    if said:
        assert 0 < worst <= float(said[0].rpartition("is ")[2].split()[0]) * 1.06 <= 2**-11 * 1.1


def _of(part: str) -> str:
    return "mlp" if part == "down_proj" else "self_attn"


def test_what_is_kept_stays_in_its_dtype_and_vectors_become_float32(tmp_path: Path) -> None:
    folder = written(tmp_path / "small", GgmlLayout("q4_0"), "qwen2")
    tensors = load_file(folder / "model.safetensors")
    half = {"lm_head.weight": torch.bfloat16, "model.embed_tokens.weight": torch.float16}
    bias = "model.layers.0.self_attn.q_proj.bias"
    half |= {bias: torch.bfloat16, "model.norm.weight": torch.bfloat16}
    changed = {name: tensor.to(half.get(name, tensor.dtype)) for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    exported(folder)
    found = tensors_of(tmp_path / "small-gguf" / "model.gguf")
    for theirs, name, kind in (
        ("output.weight", "lm_head.weight", "BF16"),
        ("token_embd.weight", "model.embed_tokens.weight", "F16"),
        ("blk.0.attn_q.bias", bias, "F32"),
        ("output_norm.weight", "model.norm.weight", "F32"),
    ):
        assert found[theirs][0] == kind and torch.equal(found[theirs][1].float(), changed[name].float()), name


def test_an_embedding_and_a_head_in_8_bits_become_q8_0(tmp_path: Path) -> None:
    base = tmp_path / "base"
    pico("llama", vocab_size=SIZE, tie_word_embeddings=True).save_pretrained(base)
    merging_tokenizer().save_pretrained(base)
    told = {"quantize": {"format": "q4_0", "embedding": "int8"}}
    run_recipe(
        staged_recipe(write_text(tmp_path / "facts.txt"), base, told, samples=4, length=24), tmp_path / "out"
    )
    facts = exported(tmp_path / "out").facts
    found = tensors_of(tmp_path / "out-gguf" / "model.gguf")
    assert found["token_embd.weight"][0] == "Q8_0" and "output.weight" not in found
    assert facts.converted["model.embed_tokens"] == "Q8_0"
    ours = logits(load(tmp_path / "out"))
    assert distance(logits(loaded(tmp_path / "out-gguf")), ours) < 5e-3


def loaded(folder: Path) -> PreTrainedModel:
    """The model that transformers makes of the file."""
    return cast(
        PreTrainedModel,
        AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval(),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_same_model(family: str, tmp_path: Path) -> None:
    """Its logits show that rows of queries and keys are in the right order, and what norms are."""
    folder = written(tmp_path / "small", GgmlLayout("iq4_nl"), family)
    exported(folder)
    ours = logits(load(folder))
    assert distance(logits(loaded(tmp_path / "small-gguf")), ours) < 1e-5


def test_factors_of_long_waves_are_those_of_transformers(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = written(tmp_path / "small", GgmlLayout("q4_0"), rope_parameters=rope)
    exported(folder)
    model = load(folder)
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = tensors_of(tmp_path / "small-gguf" / "model.gguf")["rope_freqs.weight"][1]
    rotary = cast(Any, model).model.rotary_emb
    torch.testing.assert_close(plain / factors, rotary.inv_freq, rtol=1e-6, atol=0)
    assert float(factors.min()) == 1 and float(factors.max()) == 8 and len(factors.unique()) > 2


def test_the_file_says_what_the_model_is(tmp_path: Path) -> None:
    folder = written(tmp_path / "small", GgmlLayout("iq4_nl"))
    made_ = exported(folder)
    fields = fields_of(tmp_path / "small-gguf" / "model.gguf")
    assert {
        name: fields[name] for name in fields if name.startswith("llama.") or name.startswith("general.")
    } == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "small",
        "general.quantization_version": 2,
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_IQ4_NL),
        "llama.vocab_size": SIZE,
        "llama.context_length": 96,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 320,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
    }
    assert sorted(path.name for path in made_.folder.iterdir()) == ["README.md", "export.json", "model.gguf"]
    assert "/model.gguf -p" in (made_.folder / "README.md").read_text()
    assert made_.facts.size_bytes == (made_.folder / "model.gguf").stat().st_size


# Tokenizers.


def test_a_byte_level_tokenizer_is_written_token_by_token(tmp_path: Path) -> None:
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    found = vocabulary_of(tmp_path, SIZE)
    assert (found.model, found.pre) == ("gpt2", "gpt-2")
    assert list(found.merges) == ["h e", "l l", "he ll", "Ġ hell"]
    vocabulary = tokenizer.get_vocab()
    assert all(found.tokens[number] == token for token, number in vocabulary.items())
    assert list(found.tokens[-2:]) == ["[PAD262]", "[PAD263]"]
    kinds = [Kind.NORMAL] * 260 + [Kind.CONTROL] * 2 + [Kind.UNUSED] * 2
    assert list(found.kinds) == kinds
    assert found.ids == {"bos": 260, "eos": 261} and not found.begins and not found.ends
    assert found.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("split", "settings", "pre"),
    [
        (pre_tokenizers.Digits(individual_digits=True), {}, "smollm"),
        (
            pre_tokenizers.Split(Regex(gguf_tokenizer.LLAMA3), "isolated"),
            {"ignore_merges": True},
            "llama-bpe",
        ),
        (pre_tokenizers.Split(Regex(gguf_tokenizer.LLAMA3.replace("{1,3}", "")), "isolated"), {}, "qwen2"),
    ],
)
def test_the_rules_of_a_tokenizer_have_a_name(
    split: Any, settings: dict[str, Any], pre: str, tmp_path: Path
) -> None:
    merging_tokenizer(split, **settings).save_pretrained(tmp_path)
    assert vocabulary_of(tmp_path, SIZE).pre == pre


def test_merges_of_a_tokenizer_with_bytes_become_scores(tmp_path: Path) -> None:
    for name, text in llama_tokenizer().items():
        (tmp_path / name).write_text(text)
    size = len(AutoTokenizer.from_pretrained(tmp_path))
    said = json.loads((tmp_path / "tokenizer.json").read_text())
    said["model"]["byte_fallback"] = True
    vocabulary = said["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    found = vocabulary_of(tmp_path, size + 256)
    assert (found.model, found.pre, found.space_first, found.begins) == ("llama", "default", True, True)
    scores = dict(zip(found.tokens, found.scores, strict=True))
    ordered = ["▁h", "he", "ll", "hell", "hello", "▁hello", "▁▁"]
    assert [scores[token] for token in ordered] == [0, -1, -2, -3, -4, -5, -6]
    kinds = dict(zip(found.tokens, found.kinds, strict=True))
    expected = [Kind.UNKNOWN, Kind.CONTROL, Kind.BYTE, Kind.NORMAL]
    assert [kinds[token] for token in ("<unk>", "<s>", "<0x0A>", "hello")] == expected


def test_merges_that_no_scores_stand_for_are_refused() -> None:
    wrong = gguf_tokenizer._out_of_order
    assert wrong([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")], {*"abc", "ab", "bc", "abc"}) is None
    between = [("a", "b"), ("b", "c"), ("ab", "c"), ("c", "d"), ("a", "bc")]
    assert wrong(between, {*"abcd", "ab", "bc", "cd", "abc"}) == "abc"
    assert wrong([("a", "b"), ("b", "c"), ("ab", "c")], {*"abc", "ab", "bc", "abc"}) == "abc"
    assert wrong([("a", "b"), ("ab", "c")], {*"abc", "ab", "bc", "abc"}) is None  # bc never arises


# Refused.


@pytest.mark.parametrize(
    ("layout", "family", "config", "why"),
    [
        (
            FourBitLayout("nf4", 64),
            "llama",
            {},
            r"self_attn\.q_proj is nf4: GGUF has no nf4; use q4_0 or iq4_nl",
        ),
        (
            CodebookLayout(4, 1, "float16"),
            "llama",
            {},
            r"q_proj is codebook: GGUF has no codebooks but its own",
        ),
        (
            IntegerLayout("w4a16", "dynamic", 16),
            "llama",
            {},
            "its groups of 16 columns don't divide into blocks",
        ),
        (
            IntegerLayout("w8a16"),
            "llama",
            {"intermediate_size": 104},
            r"down_proj is w8a16: its 104 columns don't divide into blocks of 32; give it to skip",
        ),
        (GgmlLayout("q4_0"), "gpt_neox", {}, "a GGUF file of gpt_neox is not written here; only llama, "),
        (GgmlLayout("q4_0"), "llama", {"hidden_act": "relu"}, "has the activation silu, not relu"),
        (
            GgmlLayout("q4_0"),
            "gemma2",
            {"query_pre_attn_scalar": 64},
            "takes 256 for query_pre_attn_scalar, which is 64",
        ),
        (GgmlLayout("q4_0"), "gemma2", {"attn_logit_softcapping": None}, "caps the logits"),
        (
            GgmlLayout("q4_0"),
            "gemma3_text",
            {"layer_types": ["full_attention"] * 6},
            "one of 6 layers attends to all",
        ),
        (
            GgmlLayout("q4_0"),
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "the rotary embedding yarn is not written here",
        ),
        (GgmlLayout("q4_0"), "llama", {"vocab_size": 261}, "the tokenizer has 262 tokens and the model 261"),
    ],
)
def test_what_llama_cpp_would_not_compute_is_refused_in_one_line(
    layout: AnyLayout, family: str, config: dict[str, Any], why: str, tmp_path: Path
) -> None:
    folder = written(tmp_path / "small", layout, family, **config)
    with pytest.raises(ModelError, match=f"can't be exported to gguf: .*{why}") as caught:
        exported(folder)
    assert "\n" not in str(caught.value) and not (tmp_path / "small-gguf").exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"pre_tokenizer": {"type": "Whitespace"}},
            r"splits text in a way that llama.cpp has no name for \(Whitespace\)",
        ),
        ({"normalizer": {"type": "Lowercase"}}, r"normalises text \(Lowercase\), which llama.cpp does not"),
        ({"model": {"ignore_merges": True}}, "splits text as gpt-2 does and merges it in another way"),
        ({"model": {"merges": []}}, "has no merges"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(
    change: dict[str, Any], why: str, tmp_path: Path
) -> None:
    folder = written(tmp_path / "small", GgmlLayout("q4_0"))
    said = json.loads((folder / "tokenizer.json").read_text())
    for key, value in change.items():
        said[key] = said[key] | value if key == "model" else value
    (folder / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match=why):
        exported(folder)


def test_compressed_tensors_sends_these_formats_here(tmp_path: Path) -> None:
    folder = written(tmp_path / "small", GgmlLayout("q4_0"))
    with pytest.raises(ModelError, match=r"it is a format of llama\.cpp; export it to gguf"):
        export(folder, "compressed-tensors", tmp_path / "out")


def test_layers_of_different_widths_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    pico("llama", vocab_size=SIZE).save_pretrained(base)
    merging_tokenizer().save_pretrained(base)
    told = (
        {"prune": {"axis": "ffn", "keep": [64, 128]}},
        {"quantize": {"format": "q4_0", "rounding": "nearest"}},
    )
    run_recipe(
        staged_recipe(write_text(tmp_path / "facts.txt"), base, *told, samples=4, length=24), tmp_path / "out"
    )
    with pytest.raises(ModelError, match="its layers have widths of their own, and llama"):
        exported(tmp_path / "out")


def test_without_the_package_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path / "small", GgmlLayout("q4_0"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'llmcompress\[gguf\]'"):
        exported(folder)


# llama.cpp.

needs_llama_cpp = pytest.mark.skipif(not llama_cpp.INSTALLED, reason=llama_cpp.INSTALL)


def in_llama_cpp(folder: Path, tokens: Tensor, texts: tuple[str, ...] = ()) -> tuple[Tensor, list[list[int]]]:
    """The logits that llama.cpp computes, and the tokens that it makes of texts."""
    found, split = llama_cpp.run(folder / "model.gguf", tokens.tolist(), texts)
    return torch.from_numpy(found), split


def divergence(ours: Tensor, theirs: Tensor) -> float:
    """The mean KL divergence in nats/token."""
    one, other = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    return float((one.exp() * (one - other)).sum(-1).mean())


@needs_llama_cpp
@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["plain", "q4_0"])
def test_llama_cpp_computes_what_transformers_does(family: str, layout: str, tmp_path: Path) -> None:
    """Plain float32 weights show that the model is the same one; in q4_0 it rounds what linears read to 8
    bits."""
    folder = tmp_path / "small"
    if layout == "plain":
        pico(family, **{"vocab_size": SIZE, **FAMILIES[family]}).save_pretrained(folder)
        merging_tokenizer().save_pretrained(folder)
    else:
        written(folder, GgmlLayout("q4_0"), family)
    exported(folder)
    theirs, _ = in_llama_cpp(tmp_path / "small-gguf", TOKENS)
    assert divergence(logits(load(folder)), theirs) < (1e-5 if layout == "plain" else 1e-3)


SHARED = Path(__file__).parents[3] / "shared"
BASES = {"stories260k": SHARED / "models/stories260K", "wikilm-8m": SHARED / "models/wikilm-8m"}


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("format", ["q4_0", "iq4_nl", "w8a16"])
@pytest.mark.parametrize("name", BASES)
def test_llama_cpp_says_of_text_what_transformers_does(name: str, format: str, tmp_path: Path) -> None:
    """And it makes the same tokens of text."""
    if not BASES[name].is_dir():
        pytest.skip(f"there is no {BASES[name]}")
    skip = ["*.down_proj"] if (name, format) == ("stories260k", "w8a16") else []  # of 172 columns
    entries = {"format": format, "skip": skip, "rounding": "nearest"}
    told = {
        "base": str(BASES[name]),
        "data": {"source": "python-docs", "samples": 4, "length": 64, "evaluation_samples": 2},
        "stages": [{"quantize": entries}],
    }
    run_recipe(Recipe.model_validate(told), tmp_path / "out")
    exported(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = next(iter(sorted((SHARED / "data").rglob("*.txt")))).read_text()[:4000]
    tokens = torch.tensor(tokenizer(text).input_ids[:512]).reshape(4, 128)
    theirs, split = in_llama_cpp(tmp_path / "out-gguf", tokens, TEXTS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert divergence(logits(cast(PreTrainedModel, model.eval()), tokens), theirs) < 1e-3
    assert split == [tokenizer(each).input_ids for each in TEXTS]


@needs_llama_cpp
def test_the_quantiser_of_llama_cpp_writes_the_nearest_codes() -> None:
    """For Q4_0 under the scales that we take, for IQ4_NL under better ones."""
    W_RC = torch.randn(8, 96, generator=torch.Generator().manual_seed(3))
    theirs = {format: by_llama_cpp(W_RC, format) for format in gguf_export.FORMATS}
    lost = {format: (weight.dequantize() - W_RC).abs() for format, weight in theirs.items()}
    nearest = {
        format: registry.dequantize(GgmlScheme(weight.layout).nearest(W_RC))
        for format, weight in theirs.items()
    }
    assert torch.equal(theirs["q4_0"].dequantize(), nearest["q4_0"])
    assert lost["iq4_nl"].norm() < (nearest["iq4_nl"] - W_RC).norm()
    weight = theirs["iq4_nl"]
    for code in range(16):
        other = replace(weight, codes_RC=torch.full_like(weight.codes_RC, code))
        assert (lost["iq4_nl"] <= (other.dequantize() - W_RC).abs() + 1e-6).all()


@needs_llama_cpp
def test_what_llama_cpp_can_not_run_is_said_with_its_log(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(
        RuntimeError, match=r"could not run .*model\.gguf \(exit code 1\)(.|\n)*was not loaded"
    ):
        llama_cpp.run(file, [[1, 2]])


@needs_llama_cpp
@pytest.mark.parametrize("batch", [1, 3])
def test_a_shape_decodes_in_llama_cpp_after_what_it_has_read(batch: int, tmp_path: Path) -> None:
    """As `evaluation decode-speed` times it: the same token again and again, after the same others."""
    llama_cpp_speed.write(TINY, "Q8_0", tmp_path / "model.gguf")
    decode, other = (llama_cpp_speed.decoder(tmp_path / "model.gguf", batch, past, 1) for past in (8, 1))
    once, again = decode(), decode()
    assert once.shape == (batch, TINY.vocab_size) and np.isfinite(once).all()
    assert np.array_equal(once, again) and not np.allclose(once, other(), atol=0.1)
