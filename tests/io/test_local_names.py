"""Paths of this machine: which texts are one, and what is told in their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmcompress.io.local_names import is_path, short_name, without, without_paths


@pytest.mark.parametrize(
    "text",
    [
        "/home/alice/model",
        "/home/alice/secret dir/model",
        "~/model",
        "~alice/model",
        "./model",
        "../model",
        "C:\\models\\a",
        "C:/models/a",
        "\\\\server\\share",
        "file:///home/alice/a",
        "/root/.cache/a.json",
    ],
)
def test_a_path_is_known_by_how_it_begins(text: str) -> None:
    assert is_path(text)


@pytest.mark.parametrize(
    "text",
    [
        "meta-llama/Llama-2-7b",
        "gelu",
        "/",
        "//",
        "</s>",
        "/no_think",
        "https://example.org/a/b",
        "a / b / c",
        "[INST] /x/\n/y/",
    ],
)
def test_other_text_is_none(text: str) -> None:
    assert not is_path(text)


def test_a_text_inside_the_home_folder_is_a_path_too() -> None:
    assert is_path(f"loaded from {Path.home()}/models")


def test_paths_in_a_text_are_told_by_their_last_names() -> None:
    said = (
        "rest in /home/alice/.cache/kept; of '~/texts/diary.txt' and C:\\models\\tiny, 5 of 8 kv/q at "
        "https://a.org/b/c"
    )
    assert without_paths(said) == "rest in kept; of 'diary.txt' and tiny, 5 of 8 kv/q at https://a.org/b/c"
    assert (
        without_paths("read secret dir/alice/diary.txt", ["secret dir/alice/diary.txt"]) == "read diary.txt"
    )
    assert without_paths("/a b/c/other and /a b/x", ["/a b/c/d"]) == "other and /a b/x"
    assert without("in /usr/local/bin and my/base", ["my/base", "plain"]) == "in /usr/local/bin and base"


@pytest.mark.parametrize("name", ["", ".", "..", "../", "/", "plain"])
def test_what_has_no_folder_before_it_changes_no_text(name: str) -> None:
    assert without_paths("a plain note. ../x / y", [name]) == "a plain note. ../x / y"


def test_a_last_name_is_of_either_slash_and_never_empty() -> None:
    assert [short_name(name) for name in ("user/name", "C:\\a\\b", "/a/b/", "..", "/")] == [
        "name",
        "b",
        "b",
        "model",
        "model",
    ]
