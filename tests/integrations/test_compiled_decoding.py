"""`accelerate`: generate writes the same text, by one compiled graph, and a model is saved as it was."""

from __future__ import annotations

import copy
import filecmp
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompileConfig,
    DynamicCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import llmcompress
from llmcompress.errors import ModelError
from llmcompress.integrations import compiled_decoding, registration
from llmcompress.integrations.compiled_decoding import MARK, accelerate
from llmcompress.integrations.kv_cache import FIELD, CacheSettings
from tests.formats.test_compiled_models import FORMATS, model_of
from tests.models import pico

HELD = 40  # tokens
NEW = 12


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def prompt(length: int, batch: int = 1) -> Tensor:
    return torch.arange(batch * length).view(batch, length) % 150 + 5


def written(model: Any, length: int, **options: Any) -> Tensor:
    """The greedy text after a prompt, of the same length each time."""
    ids = prompt(length)
    given = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "do_sample": False, **options}
    found: Tensor = model.generate(ids, max_new_tokens=NEW, **given)
    return found


class Compiler:
    """A backend of torch.compile that counts: graphs, and how often each runs."""

    def __init__(self) -> None:
        self.runs: list[int] = []

    def config(self) -> CompileConfig:
        """What a call of generate is given; it demands whole graphs."""

        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
            number = len(self.runs)
            self.runs.append(0)
            aot: Any = torch._dynamo.lookup_backend("aot_eager")
            compiled = aot(graph, inputs)

            def run(*values: Any) -> Any:
                self.runs[number] += 1
                return compiled(*values)

            return run

        # a function, because generate copies the config and what is in it
        return CompileConfig(backend=backend, fullgraph=True, mode=None)  # type: ignore[arg-type]


def nf4(folder: Path) -> Any:
    """A model whose linears transformers made bitsandbytes' own, with its quantizer."""
    pico("llama").save_pretrained(folder)
    config: Any = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    assert not model.hf_quantizer.is_compileable
    return model


def made(name: str, folder: Path) -> Any:
    """A small Llama in a format."""
    if name == "float32":
        return pico("llama")
    return nf4(folder) if name == "nf4" else model_of(FORMATS[name][0])


every_format = pytest.mark.parametrize("name", ["float32", "nf4", "w8a8", "w4a16", "codebook of 16"])


@every_format
def test_the_step_is_one_graph_for_prompts_of_all_lengths(name: str, tmp_path: Path) -> None:
    model, compiler = made(name, tmp_path), Compiler()
    exact = [written(model, length) for length in (5, 11, 3)]
    assert accelerate(model, max_length=HELD) is model
    found = [written(model, 5, compile_config=compiler.config())]
    assert compiler.runs == [NEW - 1], "the first token comes of the prompt"
    again = model._last_compile_config  # the same backend: another one would be another compiled call
    found += [written(model, length, compile_config=again) for length in (11, 3)]
    assert compiler.runs == [3 * (NEW - 1)]
    assert all(torch.equal(one, other) for one, other in zip(found, exact, strict=True))


@pytest.mark.slow(keep=1)
@every_format
def test_the_compiled_text_is_that_of_the_eager_model(name: str, tmp_path: Path) -> None:
    """By the compiler that users have."""
    model = made(name, tmp_path)
    exact = [written(model, length) for length in (5, 11)]
    accelerate(model, HELD)
    counters = torch._dynamo.utils.counters
    for length, text in zip((5, 11), exact, strict=True):
        assert torch.equal(written(model, length), text)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "qwen3_moe", "opt"])
def test_other_families(family: str) -> None:
    model, compiler = pico(family), Compiler()
    exact = written(model, 20)
    accelerate(model, HELD)
    assert torch.equal(written(model, 20, compile_config=compiler.config()), exact)
    assert sum(compiler.runs) == NEW - 1, "each step is one graph"
    assert len(compiler.runs) == 1 or family == "gemma3_text"  # whose sliding window is full or not


def test_without_a_length_the_cache_grows_with_the_longest_call() -> None:
    model, compiler = accelerate(pico("llama")), Compiler()
    written(model, 11, compile_config=compiler.config())
    again: Any = model._last_compile_config
    written(model, 5, compile_config=again)
    assert len(compiler.runs) == 1
    written(model, 30, compile_config=again)
    assert len(compiler.runs) == 2


def test_a_call_longer_than_what_is_held_is_written_too() -> None:
    model, compiler = pico("llama"), Compiler()
    exact = written(model, 30)
    accelerate(model, 16)
    assert torch.equal(written(model, 30, compile_config=compiler.config()), exact)
    assert compiler.runs == [NEW - 1]


@pytest.mark.parametrize(
    "options",
    [
        {"disable_compile": True},
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"num_beams": 2},
        {"past_key_values": None},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_call_that_asks_for_something_else_gets_it(options: dict[str, Any]) -> None:
    model, compiler = pico("llama"), Compiler()
    if "past_key_values" in options:
        options = {"past_key_values": DynamicCache(config=model.config)}
    exact = written(model, 6, **copy.deepcopy(options))
    accelerate(model, HELD)
    found: Any = written(model, 6, return_dict_in_generate=True, **options)
    assert torch.equal(found.sequences, exact)
    assert compiler.runs == [] and not torch._dynamo.utils.counters["stats"]
    assert isinstance(found.past_key_values, StaticCache) == ("disable_compile" in options)


def test_a_call_has_its_own_cache_and_leaves_the_models_settings() -> None:
    model: Any = pico("llama")
    before = model.generation_config.to_dict()
    accelerate(model, HELD)
    found: Any = written(model, 6, compile_config=Compiler().config(), return_dict_in_generate=True)
    assert found.past_key_values.get_max_length() == HELD
    assert model.generation_config.to_dict() == before


def test_a_saved_model_is_as_if_never_accelerated(tmp_path: Path) -> None:
    model: Any = pico("llama")
    model.save_pretrained(tmp_path / "before")
    accelerate(model, HELD)
    written(model, 6, compile_config=Compiler().config())
    model.save_pretrained(tmp_path / "after")
    files = sorted(file.name for file in (tmp_path / "before").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "after").iterdir())
    assert {"config.json", "generation_config.json"} <= {*files}
    same, *other = filecmp.cmpfiles(tmp_path / "before", tmp_path / "after", files, shallow=False)
    assert sorted(same) == files and other == [[], []]
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert not hasattr(loaded, MARK)
    assert torch.equal(written(loaded, 6), written(model, 6, disable_compile=True))


def test_other_models_decode_as_before() -> None:
    accelerate(pico("llama"), HELD)
    found: Any = written(pico("llama"), 6, return_dict_in_generate=True)
    assert type(found.past_key_values) is DynamicCache


def test_names_agree() -> None:
    assert registration.DECODING_MARK == MARK
    assert llmcompress.accelerate is accelerate


@pytest.mark.slow
def test_transformers_may_be_imported_first_or_last() -> None:
    """The hooks are there either way, and once each."""
    for lines in ("import llmcompress, transformers", "import transformers, llmcompress"):
        code = (
            f"{lines}; from transformers import GenerationMixin as G; "
            "assert G._valid_auto_compile_criteria.accelerates; "
            "kept = G._prepare_cache_for_generation; assert kept.quantizes; "
            "llmcompress.integrations.registration.register(); "
            "assert G._prepare_cache_for_generation is kept"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


def small(kind: str, **fields: Any) -> Any:
    """The config of a model of one layer."""
    sizes = {"vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 1, "num_layers": 1}
    return AutoConfig.for_model(kind, **{**sizes, **fields})


@pytest.mark.parametrize("length", [0, -1, 1.5, True, "8"])
def test_a_length_that_is_none_is_refused(length: Any) -> None:
    with pytest.raises(ModelError, match=r"max_length is .* whole number"):
        accelerate(pico("llama"), max_length=length)


def test_models_that_cannot_are_refused() -> None:
    coded: Any = pico("llama")
    setattr(coded.config, FIELD, CacheSettings().to_dict())
    mamba: Any = AutoModelForCausalLM.from_config(small("mamba"))
    gpt_neo: Any = AutoModelForCausalLM.from_config(
        small("gpt_neo", attention_types=[[["global"], 1]], num_heads=4)
    )
    offloaded: Any = pico("llama")
    offloaded.lm_head.weight = nn.Parameter(offloaded.lm_head.weight.to("meta"))
    with torch.device("meta"):
        absent: Any = AutoModelForCausalLM.from_config(small("llama", num_attention_heads=4))
    refused: list[tuple[Any, str]] = [
        (nn.Linear(2, 2), "a Linear has no generate"),
        (pico("llama").model, "a LlamaModel has no generate"),
        (coded, "stores its cache as codes"),
        (mamba, "a mamba model keeps a state of its own"),
        (gpt_neo, "can't compile gpt_neo models"),
        (offloaded, "offloaded"),
        (absent, "offloaded"),
    ]
    for model, why in refused:
        with pytest.raises(ModelError, match=why) as error:
            accelerate(model)
        assert "\n" not in str(error.value)
        assert not hasattr(model, MARK)


def test_an_encoder_is_refused() -> None:
    config = T5Config(vocab_size=160, d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="a t5 model has an encoder"):
        accelerate(T5ForConditionalGeneration(config))


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ModelError, match="no no-such-compiler; install"):
        compiled_decoding.accelerate(pico("llama"))
