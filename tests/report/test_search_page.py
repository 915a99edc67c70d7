"""The page of a search: what it shows, that nothing is fetched or run, and that text stays text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmcompress.errors import CompressError
from llmcompress.report import charts
from llmcompress.report.page import search_page
from llmcompress.report.search_facts import SearchFacts, width_words
from tests.browser import Browser, browser, chromium
from tests.report.test_page import HOSTILE, ODD, SPELLED, Elements

WAYS = {"kept": 16.0, "w8a16": 8.0, "nf4": 4.5, "codebook of 4": 2.0}
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")


def one(asked: str, reached: float, nats: float, *, layers: int = 6, **changes: Any) -> dict[str, Any]:
    linears = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in KINDS]
    ways = {linear: list(WAYS)[place % len(WAYS)] for place, linear in enumerate(linears)}
    rows = [
        {"way": way, "linears": [*ways.values()].count(way), "size_bytes": 1000, "nats": 0.01} for way in WAYS
    ]
    found = {
        "file": f"{asked.replace('%', '-percent')}.yaml",
        "asked": asked,
        "reached": reached,
        "base_bytes": 10_000_000,
        "size_bytes": 4_000_000,
        "expected_nats": nats,
        "outside": "int8 embedding",
        "rows": rows,
        "ways": ways,
        "recipe": {"stages": ["quantize"]},
    }
    return found | changes


def facts(**changes: Any) -> SearchFacts:
    told = {
        "model": "someone/small",
        "counted": "size",
        "base": 10_000_000,
        "bits": WAYS,
        "found": [one("25%", 2.4e6, 0.2), one("40%", 3.9e6, 0.01)],
        "uniform": [
            {"way": "kept", "outside": "kept", "reached": 1e7, "size_bytes": 10**7, "nats": 0.0},
            {"way": "nf4", "outside": "kept", "reached": 3.5e6, "size_bytes": 3500000, "nats": 0.04},
            {"way": "nf4", "outside": "int8 embedding", "reached": 3e6, "size_bytes": 3000000, "nats": 0.05},
            {"way": "codebook of 4", "outside": "kept", "reached": 2.3e6, "size_bytes": 2300000, "nats": 0.5},
        ],
    }
    return SearchFacts.model_validate(told | changes)


def page(found: SearchFacts, recipe: str = "stages:\n- quantize: {format: nf4}") -> str:
    return search_page(found, {each.file: recipe for each in found.found})


def test_a_page_shows_what_was_found() -> None:
    found = Elements(page(facts()))
    for words in (
        "Searched: small",
        "Bytes on disk and expected distance from the base",
        "Within 25%",
        "2.4 MB, 24.00 % of the base; expected KL",
        "Outside the layers: int8 embedding.",
        "codebook of 4",
        "llmcompress run 40-percent.yaml",
        "- quantize: {format: nf4}",
        "mlp.down_proj, layer 5: codebook of 4, 2 bits per weight",
    ):
        assert words in found.text, words
    assert len(found.of_class("disc")) == 4, "two in the table, two before their sections"
    assert [about["aria-label"] for tag, about in found.tags if tag == "svg" and "aria-label" in about]
    links = [about["href"] for tag, about in found.tags if tag == "a"]
    assert links == ["#found-1", "#found-2"]
    assert {"found-1", "found-2"} <= {about.get("id") for _, about in found.tags}


def test_the_model_of_one_format_beside_it_is_no_larger() -> None:
    found = Elements(page(facts())).text
    assert "one format, no larger" in found
    first, second = found.split("Within 25%")[0].split("40%")[-2:]
    assert "codebook of 4" in first and "0.04000" in second


@pytest.mark.parametrize(
    ("counted", "words"),
    [
        ("memory", ("Bytes in memory", "In memory within 25%", "with the keys and values of 512 tokens")),
        ("tokens_per_s", ("Expected tokens/s", "Tokens/s of at least", "one format, no slower", "1.50 x")),
    ],
)
def test_a_page_says_what_is_counted(counted: str, words: tuple[str, ...]) -> None:
    speeds = [one("1.5x", 30.0, 0.2)] if counted == "tokens_per_s" else [one("25%", 2.4e6, 0.2)]
    base = 20.0 if counted == "tokens_per_s" else 1e7
    found = Elements(page(facts(counted=counted, found=speeds, base=base, context=512)))
    for each in words:
        assert each in found.text, each
    assert "4 MB on disk" in found.text


@pytest.mark.parametrize("words", [HOSTILE, ODD])
def test_hostile_text_is_text_wherever_it_stands(words: str) -> None:
    bits = {words: 4.0}
    ways = {f"model.layers.{words}.0.{words}": words, words: words}
    row = {"way": words, "linears": 1, "size_bytes": 1, "nats": 0.1}
    hostile = one(words, 1e6, 0.1, file=words, outside=words, ways=ways, rows=[row])
    beside = {"way": words, "outside": words, "reached": 1e6, "size_bytes": 1, "nats": 0.1}
    text = page(facts(model=f"someone/{words}", bits=bits, found=[hostile], uniform=[beside]), words)
    assert text.encode()
    tags = {tag for tag, _ in Elements(text).tags}
    assert tags <= {tag for tag, _ in Elements(page(facts())).tags}
    assert not [about for _, about in Elements(text).tags if "onerror" in about]
    assert (SPELLED if words is ODD else words) in Elements(text).text


def test_a_page_fetches_and_runs_nothing() -> None:
    text = page(facts())
    found = Elements(text)
    assert not {tag for tag, _ in found.tags} & {"script", "iframe", "object", "form", "img", "base"}
    for tag, about in found.tags:
        assert not [name for name in about if name.startswith("on") or name in ("src", "srcset", "style")]
        if "href" in about and tag != "a":
            assert (tag, about["href"]) == ("link", "data:,")
    assert "url(" not in text and "@import" not in text


@pytest.mark.parametrize("width", [680, 340])
def test_each_linear_is_a_cell_in_the_row_of_its_layer(width: int) -> None:
    told = facts()
    grid = charts.ways_grid(told, told.found[0], width)
    assert len(grid.cells) == 6 * len(KINDS)
    assert len({cell.y for cell in grid.cells}) == 6 and len({cell.x for cell in grid.cells}) == len(KINDS)
    assert {cell.level for cell in grid.cells} == {0, 1, 2, 3}
    heads = [row for row in grid.rows if row.anchor == "middle"]
    assert [row.text for row in heads] == ["q", "k", "gate", "down"]
    assert [row.text for row in grid.rows if row.anchor == "end"] == ["0", "1", "2", "3", "4", "5"]
    right = max(cell.x for cell in grid.cells) + grid.side[0]
    assert right <= width and max(cell.y for cell in grid.cells) < grid.frame.height


def test_long_heads_of_columns_stand_apart() -> None:
    heads = charts._staggered(["linear_in_all", "linear_out_all", "x", "another_linear"], 44.0, 40.0)
    boxes = [(each.y, each.x - 3.2 * len(each.text), each.x + 3.2 * len(each.text)) for each in heads]
    for place, (line, left, right) in enumerate(boxes):
        for other, begin, end in boxes[place + 1 :]:
            assert line != other or right <= begin or end <= left


def test_layers_that_are_missing_take_no_room() -> None:
    ways = {"layers.3.up": "nf4", "layers.900000000000.up": "nf4", "lm_head": "w8a16"}
    told = facts(found=[one("25%", 2.4e6, 0.2, ways=ways)])
    grid = charts.ways_grid(told, told.found[0], 340)
    assert [row.text for row in grid.rows if row.anchor == "end"] == ["3", "900000000000", "other"]
    assert len({cell.y for cell in grid.cells}) == 3 and grid.frame.height < 200


def test_what_was_found_is_joined_from_left_to_right() -> None:
    told = facts()
    picture = charts.frontier(told, "small", 680)
    assert [point.mark for point in picture.points if point.mark] == ["1", "2"]
    places = [float(place.split(",")[0]) for place in picture.line.split()]
    assert places == sorted(places) and len(places) == 2
    assert sum(point.coded for point in picture.points) == 1
    assert sum(point.base for point in picture.points) == 1, "the kept model is the base"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "can't be read"),
        ('{"model": "a"}', "counted: Field required"),
        (json.dumps({"model": 3}), "model: "),
        (facts().model_copy(update={"bits": {"kept": 16.0}}).model_dump_json(), "without its bits"),
    ],
)
def test_a_damaged_search_json_is_one_line(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(text)
    with pytest.raises(CompressError, match=why) as caught:
        SearchFacts.of(tmp_path)
    assert "\n" not in str(caught.value) and "search again" in str(caught.value)


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if chromium() is None:
        pytest.skip("needs a Chromium (apt install chromium), and this machine has none")
    with browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def test_a_browser_shows_a_page_without_complaint_on_a_phone_and_in_the_dark(
    chrome: Browser, tmp_path: Path
) -> None:
    deep = facts(found=[one("25%", 2.4e6, 0.2, layers=48), one("40%", 3.9e6, 0.01)])
    (tmp_path / "page.html").write_text(page(deep, f"# {'long ' * 60}\n{HOSTILE}"))
    papers = set()
    for width in (390, 1200):
        for dark in (False, True):
            chrome.open(tmp_path / "page.html", width=width, dark=dark)
            chrome.value("document.querySelectorAll('details').forEach(each => each.open = true)")
            assert chrome.value("document.documentElement.scrollWidth") <= width, (width, dark)
            papers.add(chrome.value("getComputedStyle(document.body).backgroundColor"))
            cells = "[...document.querySelectorAll('svg .cell')].filter(cell => cell.getClientRects().length)"
            assert chrome.value(f"{cells}.length") == 6 * len(KINDS), "of 48 layers the rows are too low"
    assert len(papers) == 2
    assert chrome.complaints == []


def test_widths_are_told_apart_from_parts_that_are_gone() -> None:
    assert width_words({"kv": (1, 2, 2), "ffn": (128, 0, 64)}) == [
        "units of kv in a layer: 1 to 2",
        "units of ffn in a layer: 64 to 128, none in 1 of 3",
    ]
