"""Hub data sets through the real `datasets` and a local Hub: streamed at one commit, and what is said where
that can't be."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet  # type: ignore[import-untyped, unused-ignore]
import pytest

from tests.clients import ask
from tests.hub_server import OFFLINE, STRANGER, TOKEN, Hub, environment, serve

READ = """
from itertools import islice
from llmcompress.data.calibration import _texts
from llmcompress.data.sources import DataSpec
def sides(**spec):
    found = _texts(DataSpec(source=spec.pop("source", "user/texts"), **spec))
    evaluation = "".join(found.evaluation).split()
    return "".join(found.calibration).split(), evaluation, found.revision
"""


@pytest.fixture
def served() -> Iterator[tuple[Hub, str]]:
    with serve() as found:
        yield found


def jsonl(*texts: str, column: str = "text") -> bytes:
    return b"".join(
        json.dumps({"id": number, column: text}).encode() + b"\n" for number, text in enumerate(texts)
    )


def parquet(*texts: str) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), file)
    return file.getvalue()


def told(env: dict[str, str], *specs: str) -> list[Any]:
    return ask(env, READ + "\n".join(f"told(sides, {spec})" for spec in specs))


@pytest.mark.slow
def test_a_data_set_is_streamed_split_by_split_at_one_commit(served: tuple[Hub, str], tmp_path: Path) -> None:
    hub, endpoint = served
    old = hub.add(
        "user/texts",
        {f"{n}.jsonl": jsonl(f"{n}-old") for n in ("train", "validation", "test")},
        kind="dataset",
    )
    new = hub.add(
        "user/texts",
        {f"{n}.jsonl": jsonl(f"{n}-new") for n in ("train", "validation", "test")},
        kind="dataset",
    )
    hub.tag("user/texts", "v1", old, kind="dataset")
    hub.add("user/table", {"train.parquet": parquet("a", "b"), "test.parquet": parquet("c")}, kind="dataset")
    hub.add("user/other", {f"{n}.jsonl": jsonl(n, column="story") for n in ("train", "test")}, kind="dataset")
    specs = ["", "revision='v1', evaluation_split='test'", f"revision={old!r}", "source='user/table'"]
    specs += [
        "source='user/other', column='story'",
        "source='user/other'",
        "split='dev'",
        "evaluation_split='dev'",
    ]
    specs += ["evaluation_split='train'", "revision='none'"]
    answers = told(environment(endpoint, tmp_path), *specs)
    assert answers[0] == [["train-new"], ["validation-new"], new]
    assert answers[1] == [["train-old"], ["test-old"], old]
    assert answers[2] == [["train-old"], ["validation-old"], old]
    assert answers[3][:2] == [["a", "b"], ["c"]]
    assert answers[4][:2] == [["train"], ["test"]]
    assert (
        answers[5]
        == "DataError: user/other has no column 'text'; it has id, story: set column to one of them"
    )
    for answer in answers[6:8]:
        assert answer.startswith("DataError: user/texts has no split 'dev'; it has ")
    assert "can't evaluate on 'train', which calibrates" in answers[8]
    assert (
        answers[9]
        == "DataError: data set user/texts has no revision none; give a branch, tag or commit that it has"
    )


@pytest.mark.slow
def test_no_more_of_a_data_set_is_fetched_than_is_read(served: tuple[Hub, str], tmp_path: Path) -> None:
    hub, endpoint = served
    shards = {f"data/train-{number:05}-of-00050.jsonl": jsonl(*["word " * 200] * 200) for number in range(50)}
    hub.add("user/texts", shards, kind="dataset")
    script = READ + 'told(lambda: len(list(islice(_texts(DataSpec(source="user/texts")).calibration, 250))))'
    assert ask(environment(endpoint, tmp_path), script) == [250]
    fetched = {path for method, path in hub.log if method == "GET" and "/resolve/" in path}
    assert 1 <= len(fetched) < 10


@pytest.mark.slow
def test_a_data_set_of_one_split_evaluates_on_its_first_rows_and_calibrates_on_the_next(
    served: tuple[Hub, str], tmp_path: Path
) -> None:
    hub, endpoint = served
    hub.add("user/texts", {"train.jsonl": jsonl("first", "second", "third")}, kind="dataset")
    script = """
def walk():
    found = _texts(DataSpec(source="user/texts"))
    return next(iter(found.evaluation)).split(), "".join(found.calibration).split()
told(walk)
"""
    assert ask(environment(endpoint, tmp_path), READ + script) == [[["first"], ["second", "third"]]]


@pytest.mark.slow
def test_private_and_gated_data_sets_want_the_users_token(served: tuple[Hub, str], tmp_path: Path) -> None:
    hub, endpoint = served
    files = {"train.jsonl": jsonl("a"), "test.jsonl": jsonl("b")}
    hub.add("user/private", files, kind="dataset", private=True)
    hub.add("user/gated", files, kind="dataset", gated=True)
    specs = ("source='user/private'", "source='user/gated'", "source='user/none'")
    for token in (None, STRANGER):
        private, gated, none = told(environment(endpoint, tmp_path / str(token), token), *specs)
        assert private.startswith(
            "DataError: data set user/private is not on the Hub or is private; check the id, or log in"
        )
        assert none.startswith(
            "DataError: data set user/none is not on the Hub or is private; check the id, or log in"
        )
        assert gated.startswith("DataError: ") and "user/gated" in gated and "accept its terms" in gated
    mine = told(environment(endpoint, tmp_path / "mine", TOKEN), *specs[:2])
    assert [answer[:2] for answer in mine] == [[["a"], ["b"]]] * 2


@pytest.mark.slow
def test_offline_what_is_cached_is_read_and_what_is_not_says_so(
    served: tuple[Hub, str], tmp_path: Path
) -> None:
    hub, endpoint = served
    commit = hub.add("user/texts", {"train.jsonl": jsonl("a"), "test.jsonl": jsonl("b")}, kind="dataset")
    env = environment(endpoint, tmp_path)
    load = 'import datasets\ntold(lambda: list(datasets.load_dataset("user/texts")))'
    assert ask(env, load) == [["train", "test"]]
    cached, other = told(env | OFFLINE, "", "source='user/other'")
    assert cached == [["a"], ["b"], commit]
    assert (
        other.startswith("DataError: the Hub data set user/other is not in the cache (")
        and "HF_HUB_OFFLINE is set" in other
    )


@pytest.mark.slow
def test_what_was_streamed_is_there_offline_as_far_as_it_was_read(
    served: tuple[Hub, str], tmp_path: Path
) -> None:
    hub, endpoint = served
    words = [f"word{number}" for number in range(10)]
    files = {"train.jsonl": jsonl(*words), "test.jsonl": jsonl("b"), "other.txt": b"no data"}
    old = hub.add("user/texts", files, kind="dataset")
    hub.tag("user/texts", "v1", old, kind="dataset")
    env = environment(endpoint, tmp_path)
    some = """
def some(count, **spec):
    found = _texts(DataSpec(source="user/texts", **spec))
    first = "".join(islice(found.calibration, count)).split()
    return first, "".join(found.evaluation).split(), found.revision
"""
    asked = 'told(some, 4, revision="v1")\n'
    assert ask(env, READ + some + asked) == [[words[:4], ["b"], old]]
    before = len(hub.log)
    assert ask(env, READ + some + asked) == [[words[:4], ["b"], old]]
    # no row comes twice
    assert not [path for _, path in hub.log[before:] if path.endswith((".jsonl", ".txt"))]
    before, more = (
        len(hub.log),
        f"told(some, 4, revision={old!r})\ntold(some, 5, revision='v1')\ntold(some, 1)",
    )
    answers = ask(env | OFFLINE, READ + some + asked + more)
    assert len(hub.log) == before
    assert answers[:2] == [[words[:4], ["b"], old]] * 2
    assert answers[2].startswith(
        "DataError: 4 rows of train of user/texts are in the cache, more are asked for, and HF_HUB_OFFLINE "
        "is set; unset it, "
    )
    assert answers[3].startswith("DataError: the Hub data set user/texts is not in the cache (")
    # goes on after the fourth, to the end
    assert ask(env, READ + some + "told(some, 99)") == [[words, ["b"], old]]
    assert ask(env | OFFLINE, READ + some + "told(some, 99)") == [[words, ["b"], old]]
    new = hub.add("user/texts", files | {"train.jsonl": jsonl("new")}, kind="dataset")
    assert ask(env, READ + some + "told(some, 9)") == [[["new"], ["b"], new]]
    assert ask(env | OFFLINE, READ + some + asked + "told(some, 9)") == [
        [words[:4], ["b"], old],
        [["new"], ["b"], new],
    ]
