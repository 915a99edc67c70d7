"""The page of a report: what it shows, that nothing is fetched or run, and that text stays text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llmcompress.report import charts
from llmcompress.report.comparison import compared
from llmcompress.report.page import HEAT, comparison_page, page
from llmcompress.report.redaction import WITHHELD, for_others
from llmcompress.report.schema import DistributionFacts, Report
from llmcompress.report.visible import visible
from tests.browser import Browser, browser, chromium
from tests.report.test_console import RECIPE, bare, facts, report, trained

HOSTILE = "</script></style><img src=x onerror=alert(1)>\"'{{7*7}}"
ODD = "a\x00b\u202ec\ud800d\u2028e\x1b[31m"
SPELLED = "a⟨U+0000⟩b⟨U+202E⟩c⟨U+D800⟩d⟨U+2028⟩e⟨U+001B⟩[31m"


def samples(*tokens: str) -> dict[str, Any]:
    """Samples whose paragraph is of these tokens, each guessed in a column of its own."""
    told = tokens or ("Return", " the", " first", "\n", "\n", "name")
    guesses = [[["the", 0.5], [" a", 0.25], ["\n", 0.125]]] * (len(told) - 1)
    other = [[[" a", 0.5], ["the", 0.25], ["\t", 0.125]]] * (len(told) - 1)
    fork = {"prompt": "One", "shared": " and", "base": " two", "compressed": "\n\nthree four"}
    same = {"prompt": "Two", "shared": " is two", "base": "", "compressed": ""}
    return {
        "paragraph": {
            "tokens": told,
            "kl_nats": [10.0**-place for place in range(len(told) - 1)],
            "base": guesses,
            "compressed": other,
        },
        "continuations": [
            fork | {"tokens": 40, "shared_tokens": 9},
            same | {"tokens": 40, "shared_tokens": 40},
        ],
    }


def spread() -> dict[str, Any]:
    return {
        "p50": 0.02,
        "p90": 0.03,
        "p99": 0.4,
        "largest": 2.0,
        "edges": [0.001, 0.01, 0.1, 1.0],
        "counts": [5, 20, 50, 5, 1],
    }


def full(**changes: Any) -> Report:
    measured = facts()["fidelity"] | {"kl_nats_distribution": spread()}
    return report(**({"samples": samples(), "fidelity": measured} | changes))


class Elements(HTMLParser):
    """Tags with their attributes, and the text of a page without its style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_data(self, data: str) -> None:
        self.text += "" if self._in_style else data

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [found for _, found in self.tags if name in (found.get("class") or "").split()]


def test_a_page_shows_what_the_report_says() -> None:
    found = Elements(page(full(), RECIPE))
    for words in (
        "small-nf4",
        "46.4 % of 16.8 MB",
        "0.002012",
        "31.51",
        "97.80 %",
        "81 tokens; bars",
        "median 0.02000",
        "largest 2.000",
        "self_attn.q_proj",
        "rounding: gptq",
        "pip install transformers accelerate bitsandbytes",
        'AutoModelForCausalLM.from_pretrained(name, device_map="auto")',
        "9 of 40 tokens are the same",
        "All 40 tokens are the same.",
        "one [bold] note",
    ):
        assert words in found.text, words
    link = f"https://huggingface.co/someone/wikilm-8m/tree/{facts()['base']['revision']}"
    assert [tag for tag, about in found.tags if about.get("href") == link] == ["a"]


def test_each_token_has_its_colour_and_what_both_models_predict_and_is_reached_by_keyboard() -> None:
    found = Elements(page(full(), RECIPE))
    tokens = found.of_class("t")
    assert len(tokens) == 5 and all(token["tabindex"] == "0" for token in tokens)
    heats = [int(re.findall(r"\bh(\d)", token["class"] or "")[0]) for token in tokens]
    assert heats == [sum(10.0**-place >= edge for edge in HEAT) for place in range(5)]
    assert all("d" in (token["class"] or "").split() for token in tokens)  # first choices differ
    assert len(found.of_class("tip")) == 5 and len(found.of_class("guess")) == 5 * 6
    assert "␣a" in found.text and "⇥" in found.text and "50.0 %" in found.text
    assert ".t:focus .tip" in page(full(), RECIPE)
    # two ends of line in a row take one line
    assert " first" in found.text and found.text.count("↵\n") == 1


def test_the_first_word_that_differs_is_marked() -> None:
    text = page(full(), RECIPE)
    assert "<mark> two</mark>" in text and "<mark>↵↵three</mark> four" in text


@pytest.mark.parametrize("make", [full, report, bare, trained])
def test_a_page_fetches_and_runs_nothing(make: Any) -> None:
    text = page(make(), RECIPE, None)
    found = Elements(text)
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "iframe", "object", "embed", "form", "img", "video", "audio", "base"}
    for tag, about in found.tags:
        assert not [name for name in about if name.startswith("on") or name in ("src", "srcset", "style")]
        if "href" in about and tag != "a":
            assert (tag, about["href"]) == ("link", "data:,")
    assert "url(" not in text and "@import" not in text
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert [a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"] == [
        policy
    ]


@pytest.mark.parametrize("words", [HOSTILE, ODD])
def test_hostile_text_is_text_wherever_it_stands(words: str) -> None:
    linear = {"name": f"model.layers.0.{words}", "format": words, "bits": 4.5, "relative_error": 0.1}
    stage = facts()["stages"][0] | {
        "linears": [linear],
        "notes": [words],
        "kept": [{"name": words, "why": words}],
    }
    told = samples("first", words, words)
    told["paragraph"]["base"] = [[[words, 0.5]]] * 2
    told["continuations"][0] |= dict.fromkeys(("prompt", "shared", "base", "compressed"), words)
    named = facts()["base"] | {"model": words, "revision": None}
    found = full(
        samples=told,
        stages=[stage],
        base=named,
        data=facts()["data"] | {"source": words},
        environment={"versions": {words: words}, "device": words},
    )
    text = page(found, words)
    assert text.encode() and not [c for c in text if visible(c) != c]
    plain = Elements(page(full(), RECIPE))
    hostile = Elements(text)
    assert {tag for tag, _ in hostile.tags} <= {tag for tag, _ in plain.tags}
    assert not [about for _, about in hostile.tags if "onerror" in about]
    assert (SPELLED if words is ODD else words) in hostile.text and "49" not in hostile.text.replace(
        "149", ""
    )


def test_equal_reports_give_equal_pages_and_rendering_changes_nothing() -> None:
    one = full()
    before = one.to_json()
    assert page(one, RECIPE) == page(Report.from_json(before), RECIPE)
    assert one.to_json() == before


def test_a_page_names_no_folder_of_this_machine() -> None:
    base = facts()["base"] | {"model": "/home/alice/models/wikilm", "revision": None}
    small = facts()["compressed"] | {"model": "/home/alice/made/small"}
    data = facts()["data"] | {"source": "/home/alice/diary.txt", "revision": None}
    found = full(base=base, compressed=small, data=data)
    here = page(found, RECIPE)
    assert "alice" not in here and "wikilm" in here and "diary.txt" in here and "Return" in here
    # a text that is not public does not leave the machine
    there = page(found, RECIPE, "me/small")
    assert "alice" not in there and not Elements(there).of_class("t")
    assert "Not shown: the text is not public." in there
    assert for_others(found, "me/small").samples == WITHHELD
    assert for_others(full(), "me/small").samples == full().samples


def test_a_page_of_an_old_report_leaves_out_what_it_lacks() -> None:
    for found in (report(), bare()):
        text = page(found, None)
        assert not Elements(text).of_class("t") and "spread over tokens" not in text
        assert "Before and after" in text


def test_samples_are_one_line_of_the_report_and_are_read_again() -> None:
    text = full().to_json()
    assert Report.from_json(text) == full()
    (line,) = [line for line in text.splitlines() if '"samples"' in line]
    assert '"paragraph"' in line and '"continuations"' in line
    assert '"samples"' not in report().to_json() and "distribution" not in report().to_json()


def test_a_report_whose_text_spells_an_escape_is_read_again() -> None:
    found = full(samples=samples("a", "\\u0000", "\\\\u001b"))
    assert Report.from_json(found.to_json()) == found


def test_many_linears_make_a_table_of_bounded_length() -> None:
    linear = facts()["stages"][0]["linears"][0]
    many = [
        linear | {"name": f"model.layers.{layer}.mlp.experts.{i}.up"} for layer in range(4) for i in range(99)
    ]
    found = full(stages=[facts()["stages"][0] | {"linears": many}])
    text = page(found, RECIPE)
    assert "And 96 with smaller errors, in report.json." in text


@pytest.mark.parametrize("width", [680, 340])
def test_no_two_labels_of_a_picture_overlap(width: int) -> None:
    picture = charts.histogram(DistributionFacts.model_validate(spread()), 0.025, width)
    boxes = [(m.label.x, m.label.y, m.label.x + charts.LETTER * len(m.label.text)) for m in picture.marks]
    assert len(boxes) == 5 and all(left >= 0 and right <= width + 1 for left, _, right in boxes)
    for place, (left, y, right) in enumerate(boxes):
        for other, line, end in boxes[place + 1 :]:
            assert y != line or right <= other or end <= left
    near = [
        ("a" * n, report(compressed=facts()["compressed"] | {"size_bytes": 7794064 + n})) for n in range(1, 9)
    ]
    found = charts.scatter(compared(near), "base", 16794064, width)
    assert found is not None and len(found.points) == 9
    for i, one in enumerate(found.points):
        for another in found.points[i + 1 :]:
            assert (one.x - another.x) ** 2 + (one.y - another.y) ** 2 > 15**2


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if chromium() is None:
        pytest.skip("needs a Chromium (apt install chromium), and this machine has none")
    with browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.mark.parametrize("kind", ["one", "many"])
def test_a_browser_shows_a_page_without_complaint_on_a_phone_and_in_the_dark(
    kind: str, chrome: Browser, tmp_path: Path
) -> None:
    long = full(samples=samples("first", *["a" * 90, HOSTILE, "\n"] * 20))
    text = page(long, RECIPE) if kind == "one" else comparison_page([("a/one", long), ("a/two", report())])
    (tmp_path / "page.html").write_text(text)
    papers = set()
    for width in (390, 1200):
        for dark in (False, True):
            chrome.open(tmp_path / "page.html", width=width, dark=dark)
            for opened in (False, True):
                assert chrome.value("document.documentElement.scrollWidth") <= width, (width, dark, opened)
                chrome.value("document.querySelectorAll('details').forEach(each => each.open = true)")
            papers.add(chrome.value("getComputedStyle(document.body).backgroundColor"))
    assert len(papers) == 2
    assert chrome.complaints == []


def test_focus_shows_what_was_predicted_within_the_window(chrome: Browser, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page(full(), RECIPE))
    for width in (390, 1200):
        chrome.open(tmp_path / "page.html", width=width)
        shown = (
            "[...document.querySelectorAll('.tip')].filter(tip => getComputedStyle(tip).display != 'none')"
        )
        assert chrome.value(f"{shown}.length") == 0
        chrome.value("document.querySelectorAll('.t')[1].focus()")
        chrome.settle()
        assert chrome.value(f"{shown}.length") == 1
        box = chrome.value(f"{shown}.map(tip => tip.getBoundingClientRect().toJSON())[0]")
        assert box["left"] >= 0 and box["right"] <= width and box["top"] >= 0 and box["bottom"] <= 844
        assert "base" in chrome.value(f"{shown}[0].innerText")
    assert chrome.complaints == []
