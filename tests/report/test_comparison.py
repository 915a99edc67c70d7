"""Artefacts side by side: the order, who is beaten, and what does not compare."""

from __future__ import annotations

from typing import Any

import pytest

from llmcompress.report.comparison import compared, difference, warning_of
from llmcompress.report.page import comparison_page
from llmcompress.report.schema import Report
from tests.report.test_console import bare, facts, report


def made(size: int | None, kl: float | None, **changes: Any) -> Report:
    small = facts()["compressed"] | {"size_bytes": size}
    return report(**({"compressed": small, "fidelity": {"kl_nats_mean": kl}} | changes))


def test_the_smallest_is_first_and_one_is_beaten_by_what_is_no_larger_and_no_farther() -> None:
    reports = [
        ("large", made(9_000_000, 0.01)),
        ("small", made(5_000_000, 0.2)),
        ("worse", made(9_500_000, 0.02)),
        ("equal size", made(5_000_000, 0.3)),
        ("twin", made(9_000_000, 0.01)),
        ("unmeasured", made(None, None)),
    ]
    rows = compared(reports)
    assert [row.name for row in rows] == ["small", "equal size", "large", "twin", "worse", "unmeasured"]
    beaten = {row.name: row.beaten_by for row in rows}
    assert beaten == {
        "small": None,
        "equal size": "small",
        "large": None,
        "twin": None,
        "worse": "large",
        "unmeasured": None,
    }
    assert rows[0].share == 5_000_000 / 16794064 and rows[-1].share is None
    assert rows[0].loads_with == ("transformers", "bitsandbytes")


CHANGED: dict[str, dict[str, Any]] = {
    "base (wikilm-8m": {"base": {"model": "other/gpt"}},
    "commit of the base": {"base": {"revision": "ef" * 20}},
    "bytes of the base": {"base": {"size_bytes": 1}},
    "text (": {"data": {"source": "someone/else"}},
    "commit of the text": {"data": {"revision": "ef" * 20}},
    "number of evaluated tokens (262144, 5)": {"data": {"evaluation_tokens": 5}},
    "BOS": {"data": {"bos": True}},
    "evaluated text (perplexity": {"base": {"perplexity": 31.5}},
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_was_not_measured_alike_is_named_and_beats_nobody(what: str) -> None:
    changes = {key: facts()[key] | value for key, value in CHANGED[what].items()}
    one, other = made(5_000_000, 0.01), made(9_000_000, 0.02, **changes)
    told = difference(one, other)
    assert told is not None and told.startswith(what.replace("wikilm-8m", "someone/wikilm-8m"))
    assert [row.beaten_by for row in compared([("one", one), ("other", other)])] == [None, None]
    words = warning_of([("one", one), ("other", other)])
    assert words is not None and words.startswith(f"one and other differ in the {told}")
    assert "differ in the" in comparison_page([("one", one), ("other", other)])


def test_other_calibration_text_and_folders_of_one_name_compare() -> None:
    data = facts()["data"] | {"sha256": "ef" * 32, "calibration_tokens": 7}
    assert difference(report(), report(data=data)) is None
    here, there = (facts()["base"] | {"model": f"{at}/wikilm", "revision": None} for at in ("/a", "/b"))
    assert difference(report(base=here), report(base=there)) is None
    assert difference(report(), report(base=facts()["base"] | {"perplexity": 31.41593})) is None


def test_the_page_of_a_comparison_has_a_row_and_a_section_for_each() -> None:
    text = comparison_page(
        [("/home/alice/x/out", made(5_000_000, 0.01)), ("/b/out", made(9_000_000, 0.1)), ("c", bare())]
    )
    assert "alice" not in text and "3 artefacts compared" in text
    assert text.count('<details class="subject">') == 3
    for name in ("out (1)", "out (2)", "c"):
        assert f"{name}</th>" in text and f"<h2>{name}</h2>" in text
    assert "differ in the" in text  # the third has another base
