"""The small files beside a model: those that travel are known by name, links out of the folder are not
followed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from llmcompress.io.companion_files import RARE, TRAVELS, is_inside, kept, links_out, shareable


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"file": "{Path(name).name}"}}')
    return folder


def test_what_transformers_knows_by_name_travels_and_nothing_else(tmp_path: Path) -> None:
    known = (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "preprocessor_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/tool.jinja",
        "LICENSE",
        "LICENSE.txt",
        "LICENSE.md",
        "NOTICE",
        "NOTICE.md",
    )
    others = (
        "credentials.json",
        "notes.txt",
        "users.txt",
        "secrets.json",
        "my.model",
        "prompts.jinja",
        "LICENSE_KEYS.txt",
        "requirements.txt",
        "report.json",
        "model.safetensors.index.json",
        "modeling_phi3.py",
        "tokenizer.json.bak",
        "additional_chat_templates/notes.txt",
        "emoji.json",
        ".env",
        "sub/tokenizer.json",
    )
    folder = fill(tmp_path, *known, *others)
    assert set(kept(folder)) == set(known)
    # as a class of tokenizers names it
    assert set(kept(folder, ["emoji.json", "gone.txt"])) == {*known, "emoji.json"}


def test_every_file_that_a_tokenizer_of_transformers_reads_has_its_place() -> None:
    names = {name for name in TOKENIZER_MAPPING_NAMES.values() if name}
    names |= {name for name in dir(transformers) if name.endswith("Tokenizer")}
    found = set[str]()
    for name in sorted(names):
        try:
            found |= set(getattr(tokenizer_class_from_name(name), "vocab_files_names", {}).values())
        except ImportError:
            continue  # a class that needs what is not installed
    assert len(found) > 10 and found <= {*TRAVELS, *RARE}


def test_a_link_is_followed_inside_the_folder_and_not_out_of_it(tmp_path: Path) -> None:
    folder, other = (
        fill(tmp_path / "base", "real/vocab.json"),
        fill(tmp_path / "other", "LICENSE", "templates/tool.jinja"),
    )
    (folder / "vocab.json").symlink_to("real/vocab.json")
    (folder / "merges.txt").symlink_to("/etc/passwd")
    (folder / "LICENSE").symlink_to(other / "LICENSE")
    (folder / "additional_chat_templates").symlink_to(other / "templates")
    (folder / "NOTICE").symlink_to("gone")
    assert kept(folder) == {"vocab.json": (folder / "real/vocab.json").read_bytes()}
    assert links_out(folder) == ["merges.txt", "additional_chat_templates/tool.jinja", "LICENSE"]
    (tmp_path / "by a link").symlink_to(folder)  # a folder that is a link itself is none that leads out
    assert set(kept(tmp_path / "by a link")) == {"vocab.json"}


def test_in_the_cache_of_the_hub_links_lead_to_the_blobs(tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    snapshot, blobs = (
        cache / "models--user--name" / "snapshots" / "abc",
        cache / "models--user--name" / "blobs",
    )
    fill(blobs, "1"), fill(cache / "blobs" / "2f", "2f2f"), fill(cache / "models--user--other" / "blobs", "3")
    snapshot.mkdir(parents=True)
    (blobs / "2").symlink_to("../../blobs/2f/2f2f")  # a blob that several repositories share
    (snapshot / "vocab.json").symlink_to("../../blobs/1")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/2")
    (snapshot / "merges.txt").symlink_to("../../../models--user--other/blobs/3")
    assert set(kept(snapshot)) == {"vocab.json", "tokenizer.json"}
    elsewhere = fill(tmp_path / "mine" / "snapshots" / "abc", "x").parent / "abc"
    fill(tmp_path / "mine" / "blobs", "1")
    (elsewhere / "vocab.json").symlink_to("../../blobs/1")
    assert not is_inside(elsewhere / "vocab.json", elsewhere)  # which is no cache


HOME = "/home/alice/models/base"
CONFIG: dict[str, Any] = {
    "_name_or_path": "alice/base",
    "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    "model_type": "llama",
    "rope_scaling": None,
    "text_config": {"_name_or_path": HOME, "hidden_size": 64},
    "trained_on": [HOME, "wikitext"],
    "tokenizer_file": "base/tokenizer.json",
    "eos_token": "/home/alice",
    "added_tokens_decoder": {"5": {"content": "/usr/bin/env"}},
    "chat_template": "/home/alice/{{ messages }}",
    "extra_special_tokens": ["~/a/b"],
}
LEFT = {
    "model_type": "llama",
    "rope_scaling": None,
    "text_config": {"hidden_size": 64},
    "trained_on": ["wikitext"],
    **{
        key: CONFIG[key]
        for key in ("eos_token", "added_tokens_decoder", "chat_template", "extra_special_tokens")
    },
}


def test_a_config_goes_without_code_and_places_and_its_tokens_stay() -> None:
    assert shareable(CONFIG) == LEFT


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"]
)
def test_a_config_that_names_nothing_of_here_keeps_its_bytes(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(odd := '{ "model_type":"llama",\t"n": 1e30 }')
    assert kept(tmp_path) == {name: odd.encode()}
    file.write_text(json.dumps(CONFIG))
    assert json.loads(kept(tmp_path)[name]) == LEFT


def test_what_is_no_file_does_not_travel(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    os.mkfifo(tmp_path / "vocab.json")
    assert kept(tmp_path) == {}
