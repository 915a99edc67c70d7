"""An artefact's tokenizer gives the base's tokens, whatever config is beside it, and runs no code of anyone's
repository."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmcompress.errors import ModelError
from llmcompress.io.tokenizer import difference, keep_tokens, tokenizer_of, vocabulary_files
from llmcompress.pipeline.run import run_recipe
from tests.bases import byte_tokenizer, llama_tokenizer, save_base, small_recipe, staged_recipe, write_text

pytestmark = pytest.mark.usefixtures("short_runs")

TEMPLATE = "{{ bos_token }}{% for message in messages %}[INST] {{ message.content }} [INST]{% endfor %}"
CHAT = [{"role": "user", "content": " hello hello"}, {"role": "user", "content": "\n1"}]
EVIL = "raise SystemExit('the code of a repository was run')\n"
CODE = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "facts.txt")


def llama_base(
    folder: Path, family: str = "llama", settings: dict[str, Any] | None = None, **config: Any
) -> Path:
    """A base whose tokenizer is built as a Llama's."""
    save_base(folder, family, num_hidden_layers=1, **config)
    for name, content in llama_tokenizer(chat_template=TEMPLATE, **(settings or {})).items():
        (folder / name).write_text(content)
    return folder


def configure(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def tokens(folder: Path, words: str) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.tokenize(words)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast"])
def test_a_llama_that_becomes_a_mistral_keeps_its_tokens(name: str, text: Path, tmp_path: Path) -> None:
    base, out = (
        llama_base(tmp_path / "base", settings={"tokenizer_class": name}, num_key_value_heads=8),
        tmp_path / "out",
    )
    configure(base / "config.json", transformers_version="4.43.0")
    run_recipe(staged_recipe(text, base, {"prune": {"axis": "kv", "keep": 5}}, samples=4, length=16), out)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "mistral"
    # else the tokenizer is said to be an old Mistral's
    assert config["transformers_version"] == transformers.__version__
    copied = Path(shutil.copytree(base, tmp_path / "copied"))
    configure(copied / "config.json", model_type="mistral")
    assert (
        tokens(base, "<s>hello") == ["<s>", "hello"] == tokens(out, "<s>hello") != tokens(copied, "<s>hello")
    )
    ours, theirs = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(out)
    assert difference(ours, theirs) is None
    assert ours.apply_chat_template(CHAT) == theirs.apply_chat_template(CHAT)
    assert (ours.padding_side, theirs.padding_side) == ("left", "left")
    read = ["<s>hello", "hello</s> </s></s>", " hello\n\n 12 🙂", ""]
    assert dict(ours(read, padding=True)) == dict(theirs(read, padding=True))


def test_where_the_copied_files_give_the_same_tokens_they_stay_as_they_are(
    text: Path, tmp_path: Path
) -> None:
    base, out = llama_base(tmp_path / "base"), tmp_path / "out"
    run_recipe(small_recipe(text, base, rounding="nearest"), out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_a_supported_model_needs_no_code_of_its_repository(text: Path, tmp_path: Path) -> None:
    base, out = llama_base(tmp_path / "base", "phi3"), tmp_path / "out"
    (base / "modeling_evil.py").write_text(EVIL)
    configure(base / "config.json", auto_map=CODE)
    configure(
        base / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "modeling_evil.EvilTokenizer"]}
    )
    run_recipe(small_recipe(text, base, rounding="nearest"), out)
    assert not list(out.rglob("*.py"))
    assert not any(
        "auto_map" in (out / name).read_text() for name in ("config.json", "tokenizer_config.json")
    )
    ours = tokenizer_of(base)
    # as phi3 without auto_map would not have it from the copied files
    assert tokens(out, "<s>hello") == ["<s>", "hello"]
    for trust in (True, False):
        assert type(AutoConfig.from_pretrained(out, trust_remote_code=trust)).__module__.startswith(
            "transformers."
        )
        model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=trust)
        assert type(model).__module__.startswith("transformers.models.phi3")
        assert difference(ours, AutoTokenizer.from_pretrained(out, trust_remote_code=trust)) is None


@pytest.mark.parametrize(
    "named", [["tok.MyTokenizer", None], "tok.MyTokenizer", {"AutoTokenizer": [None, "tok.MyTokenizer"]}]
)
@pytest.mark.parametrize("kind", ["MyTokenizer", None, "AutoModel"])
def test_a_tokenizer_that_needs_code_of_its_own_is_refused_in_one_line(
    named: Any, kind: Any, tmp_path: Path
) -> None:
    base = llama_base(tmp_path / "base")
    (base / "tok.py").write_text(EVIL)
    configure(base / "tokenizer_config.json", tokenizer_class=kind, auto_map=named)
    with pytest.raises(
        ModelError, match=r"the tokenizer of .* has code of its own \(tok.MyTokenizer\), .* run unasked"
    ):
        run_recipe(small_recipe(tmp_path / "text.txt", base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_lies_elsewhere_is_refused_before_the_run(text: Path, tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    (base / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (base / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(
        ModelError, match=r"tokenizer.json is a link that leaves the folder; put the file itself in its place"
    ):
        run_recipe(small_recipe(text, base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    written = Path(shutil.copytree(base, tmp_path / "written"))
    tokenizer = tokenizer_of(base)
    tokenizer.split_special_tokens = True  # what a saved tokenizer does not say
    tokenizer._tokenizer.encode_special_tokens = True
    with pytest.raises(
        ModelError,
        match=r"the tokenizer of .* would not be the same in the result: .* is .* and not .*; save it",
    ):
        keep_tokens(written, tokenizer, base)


def test_what_tells_tokenizers_apart_is_seen() -> None:
    assert difference(byte_tokenizer(), byte_tokenizer()) is None
    changes: dict[str, tuple[str, Any]] = {
        "padding_side is 'left' and not 'right'": ("padding_side", "left"),
        "chat_template is 'a' and not None": ("chat_template", "a"),
        "model_max_length is 5 and not 96": ("model_max_length", 5),
        "model_input_names": ("model_input_names", ["input_ids"]),
        "special_tokens_map": ("bos_token", "a"),
    }
    for said, (trait, value) in changes.items():
        other = byte_tokenizer()
        setattr(other, trait, value)
        assert (difference(byte_tokenizer(), other) or "").startswith(said)
    larger = byte_tokenizer()
    larger.add_tokens(["<new>"])
    assert difference(byte_tokenizer(), larger) == "the vocabularies differ"
    stripping, plain = byte_tokenizer(), byte_tokenizer()
    stripping.add_tokens([transformers.AddedToken("<new>", lstrip=True)])
    plain.add_tokens([transformers.AddedToken("<new>")])
    assert "'hello <new> hello' is" in (difference(plain, stripping) or "")


def test_what_a_tokenizer_has_no_token_for_is_compared_too() -> None:
    def known(*words: str) -> transformers.PreTrainedTokenizerFast:
        # raises for other words
        level = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)})
        return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(level))

    assert difference(known("hello", "0"), known("hello", "0")) is None
    other = known("hello", "0")
    other.backend_tokenizer.normalizer = tokenizers.normalizers.Strip()
    assert (
        difference(known("hello", "0"), other)
        == "' ' is [] and not WordLevel error: Missing [UNK] token from the vocabulary"
    )


def test_the_files_of_a_tokenizer_are_those_of_its_class(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    assert vocabulary_files(base) == ["tokenizer.json", "tokenizer.model"]
    named = ["tokenizer.4.0.0.json", "../x", "*.txt", "/etc/passwd"]
    configure(
        base / "tokenizer_config.json", tokenizer_class="GPTNeoXJapaneseTokenizer", fast_tokenizer_files=named
    )
    assert set(vocabulary_files(base)) == {"vocab.txt", "emoji.json", "tokenizer.4.0.0.json"}
