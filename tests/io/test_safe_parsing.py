"""What strangers write: any bytes give a value or one clear refusal, in bounded time and memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.errors import CompressError
from llmcompress.io.safe_parsing import DEEPEST, MOST, Unreadable, json_of, yaml_of
from llmcompress.recipe.recipe import LARGEST, Recipe
from llmcompress.report.schema import Report

SECONDS, BYTES = 10.0, 100 << 20  # for the worst text of a recipe's size, on a busy machine


def laughs(levels: int = 9, width: int = 9) -> str:
    """Few lines, each a list of the one above many times over."""
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"stages: *a{levels - 1}"])


HOSTILE: dict[str, str | bytes] = {
    "billion laughs": laughs(),
    "billion laughs in mappings": "\n".join(
        [
            "a0: &a0 {k: v}",
            *(f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(9))}}}" for n in range(1, 9)),
        ]
    ),
    "merge keys": "a: &a {x: 1}\n" + "\n".join(f"b{n}: &b{n} {{<<: [*a, *a, *a, *a]}}" for n in range(500)),
    "merge laughs": "a0: &a0 {x: 1}\n"
    + "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 9)),
    "itself": "stages: &a [*a]",
    "itself in a mapping": "&a {stages: *a}",
    "itself as a merge": "stages: &a {<<: *a}",
    "deep lists": "[" * (LARGEST - 1),
    "deep mappings": "{a: " * 6_000,
    "deep layers": "\n".join("  " * n + "a:" for n in range(300)),
    "deep dashes": "- " * 15_000,
    "many keys": "\n".join(f"k{n}: 1" for n in range(3000)),
    "long": b"#" * (LARGEST + 1),
    "long scalar": "base: " + "x" * (LARGEST - 10) + "\nstages: [quantize]",
    "huge number": "data: {samples: " + "9" * 20_000 + "}\nstages: [quantize]",
    "huge exponent": "data: {samples: 1e999999999}\nstages: [quantize]",
    "sexagesimal": "data: {samples: " + "59:" * 5_000 + "59}\nstages: [quantize]",
    "octal": "data: {samples: 0o" + "7" * 30_000 + "}\nstages: [quantize]",
    "hexadecimal": "data: {samples: 0x" + "f" * 30_000 + "}\nstages: [quantize]",
    "binary": "base: !!binary " + "A" * 30_000 + "\nstages: [quantize]",
    "bad binary": "base: !!binary =\nstages: [quantize]",
    "python object": "base: !!python/object/apply:os.system ['touch hacked']\nstages: [quantize]",
    "python name": "!!python/name:os.system ''",
    "python module": "!!python/module:antigravity",
    "unknown tag": "base: !exec ls\nstages: [quantize]",
    "set": "stages: !!set {quantize: null}",
    "ordered": "stages: !!omap [quantize: 1]",
    "pairs": "stages: !!pairs [quantize: 1]",
    "key of a list": "? [a, b]\n: 1",
    "key of a mapping": "{{a: b}: c}",
    "null key": "? \n: 1",
    "two documents": "stages: [quantize]\n---\nstages: []",
    "directive": "%YAML 9.9\n---\nstages: [quantize]",
    "tag directive": "%TAG ! tag:yaml.org,2002:python/\n---\n!object/apply:os.getcwd []",
    "utf-16": "stages: [quantize]".encode("utf-16"),
    "utf-32": "stages: [quantize]".encode("utf-32"),
    "byte order mark": "\ufeffstages: [quantise]".encode(),
    "half a code point": b"base: \xf0\x9f\nstages: [quantize]",
    "surrogate": b"base: \xed\xa0\x80\nstages: [quantize]",
    "null bytes": b"\x00" * 1000,
    "controls": "base: a\x1bb\nstages: [quantize]",
    "date": "base: 9999-99-99 99:99:99\nstages: [quantize]",
    "infinite": "data: {samples: .inf}\nstages: [quantize]",
    "not a number": "accept: {kl_nats: .nan}\nstages: [quantize]",
    "newer schema": "schema: 999\nstages: [quantize]",
    "schema of words": "schema: newest\nstages: [quantize]",
    "schema true": "schema: true\nstages: [quantize]",
    "gzip": b"\x1f\x8b\x08\x00" + bytes(range(256)),
    "pickle": b"\x80\x04cos\nsystem\n(S'ls'\ntR.",
    "html": "<!doctype html><html><body>404</body></html>",
    "json with a comment": '{"stages": ["quantize"]} // comment',
    "many stages": "stages: [" + "quantize, " * 3000 + "]",
    "path of a device": "base: /dev/zero\ndata: {source: /dev/random}\nstages: [{quantize: {skip: ['"
    + "*" * 5000
    + "a']}}]",
}


def bounded(call: Callable[[], Any]) -> Any:
    """What a call gives, or its CompressError; everything else, and too much time or memory, fails the
    test."""
    said = "nothing"
    tracemalloc.start()
    start = time.monotonic()
    try:
        found = call()
    except CompressError as error:
        found, said = None, str(error)
    except Unreadable:
        found = None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert time.monotonic() - start < SECONDS
    assert peak < BYTES
    assert said and len(said) < 2000 and said.isprintable()  # one line, which steers no terminal
    return found


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_text_is_a_recipe_or_one_line_that_refuses_it(text: str | bytes) -> None:
    assert isinstance(bounded(lambda: Recipe.parse(text)), Recipe | None)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_text_is_no_report(text: str | bytes) -> None:
    assert bounded(lambda: Report.from_json(text)) is None


@pytest.mark.parametrize(
    "text",
    [
        "[" * 1_000_000,
        '{"a":' * 100_000,
        '{"schema": 1e999}',
        '{"schema": ' + "9" * 100_000 + "}",
        '{"schema": NaN}',
        '{"schema": 1, "schema": 1}',
        '{"schema": {"a": []}}',
        '{"schema": 1, "environment": {"versions": {"llmcompress": ["x"]}}}',
        '{"schema": 1, "recipe_digest": "\\u001b]0;owned"}',
        '{"schema": 2, "environment": {"versions": {"llmcompress": "\\u001b[31m\\n9"}}}',
        "[]",
        "null",
        '"schema"',
        b"\xff\xfe{\x00}\x00",
        '{"\\ud800": 1}',
    ],
    ids=lambda text: repr(text[:24]),
)
def test_hostile_json_is_no_report(text: str | bytes) -> None:
    assert bounded(lambda: Report.from_json(text)) is None


@given(st.binary(max_size=400) | st.text(max_size=400))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_a_recipe_or_one_line_that_refuses_them(text: bytes | str) -> None:
    bounded(lambda: Recipe.parse(text))
    bounded(lambda: Report.from_json(text))


WORDS = st.sampled_from(
    [
        "stages",
        "data",
        "base",
        "quantize",
        "prune",
        "tie",
        "distill",
        "format",
        "nf4",
        "schema",
        "accept",
        "&a",
        "*a",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(VALUES)
@settings(max_examples=150, deadline=None)
def test_any_values_are_a_recipe_or_one_line_that_refuses_them(value: Any) -> None:
    bounded(lambda: Recipe.parse(yaml.safe_dump(value, allow_unicode=True)))
    bounded(lambda: Recipe.parse(yaml.safe_dump({"stages": value}, allow_unicode=True)))


PIECES = st.lists(
    st.sampled_from([*"[]{}:,-?&*!|>'\"%@`#\n \t", "a", "&a ", "*a", "<<: ", "!!", "- ", ": ", "stages", "1"])
)


@given(PIECES.map("".join))
@settings(max_examples=500, deadline=None)
def test_any_syntax_of_yaml_is_read_or_refused(text: str) -> None:
    bounded(lambda: yaml_of(text, largest=LARGEST))
    bounded(lambda: Recipe.parse(text))


@given(VALUES)
@settings(max_examples=200, deadline=None)
def test_what_is_within_bounds_is_read_as_plain_yaml_reads_it(value: Any) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    assert repr(yaml_of(text, largest=len(text.encode()))) == repr(yaml.safe_load(text))


def test_the_bounds_are_where_they_are_said_to_be() -> None:
    def nested(levels: int) -> str:
        return "[" * levels + "]" * levels

    assert yaml_of(nested(DEEPEST), largest=LARGEST) is not None
    with pytest.raises(Unreadable, match=f"more than {DEEPEST} levels deep"):
        yaml_of(nested(DEEPEST + 1), largest=LARGEST)
    assert len(yaml_of("[" + "1," * (MOST - 1) + "]", largest=3 * MOST)) == MOST - 1
    with pytest.raises(Unreadable, match=f"spells more than {MOST} values"):
        yaml_of("[" + "1," * MOST + "]", largest=3 * MOST)
    with pytest.raises(Unreadable, match="has 5 bytes and may have 4"):
        json_of(b"[1,2]", largest=4)
    assert json_of("[1, 2.5]", largest=8) == [1, 2.5]
    assert yaml_of("a: &x [1, 2]\nb: *x", largest=99) == {"a": [1, 2], "b": [1, 2]}


def test_nothing_in_a_recipe_is_run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in HOSTILE:
        if any(word in name for word in ("python", "tag", "pickle", "binary")):
            bounded(partial(Recipe.parse, HOSTILE[name]))
    assert list(tmp_path.iterdir()) == []


def mutated() -> Iterator[bytes]:
    """A good recipe with each byte in turn left out, doubled or turned into another."""
    text = b"base: a/b\ndata: {samples: 4}\nstages:\n  - prune: {axis: ffn, keep: 0.5}\n  - quantize\n"
    for place in range(len(text)):
        yield text[:place] + text[place + 1 :]
        yield text[:place] + text[place : place + 1] + text[place:]
        yield text[:place] + bytes([text[place] ^ 0x55]) + text[place + 1 :]


def test_a_damaged_recipe_is_a_recipe_or_refused() -> None:
    for text in mutated():
        bounded(partial(Recipe.parse, text))


def test_reports_cut_anywhere_are_refused() -> None:
    text = json.dumps({"schema": 1, "recipe_digest": "a", "stages": []})
    for stop in range(len(text)):
        assert bounded(partial(Report.from_json, text[:stop])) is None


@pytest.mark.parametrize("text", ["\\u0000", "a \\\\u001b[0m", "\\", "\\n"])
def test_text_that_spells_an_escape_is_text(text: str) -> None:
    assert json_of(json.dumps([text]), largest=100) == [text]


@pytest.mark.parametrize("text", ["\x00", "\\\x1b[0m", "\\\\\x7f", "\x9b"])
def test_an_escape_of_a_control_character_is_refused(text: str) -> None:
    with pytest.raises(Unreadable, match="control characters"):
        json_of(json.dumps([text]), largest=100)
