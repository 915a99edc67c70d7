"""Where a result appears: names that can be no folder are one line, and nothing that came meanwhile is
lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmcompress.errors import OutputError
from llmcompress.io.destination import appear, require_file, resolved, seen, write_file
from llmcompress.io.output_folder import partial_folder


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    folder = tmp_path / "fresh"
    folder.mkdir()
    (folder / "new").write_text("new")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (os.fsdecode(b"not-\xff-utf8"), "is not Unicode text"),
        ("x" * 5000, "File name too long"),
        ("x" * 250, "File name too long"),  # with .partial
        ("a\0b", "null"),
        ("loop", "Too many levels of symbolic links"),
        ("loop/below", "Too many levels of symbolic links"),
        ("dangling", "is a link to nothing"),
    ],
    ids=["no-utf8", "long", "long-partial", "nul", "loop", "below-a-loop", "dangling"],
)
def test_a_name_that_can_be_no_folder_is_one_line(name: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match=why) as caught:
        partial_folder(f"{tmp_path}/{name}")
    assert len(str(caught.value)) < 500 and len(str(caught.value).splitlines()) == 1
    assert names(tmp_path) == {"loop", "dangling"}


def test_a_link_to_a_folder_is_that_folder(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert resolved(tmp_path / "link") == tmp_path / "there"


def test_a_folder_appears_where_nothing_or_an_empty_folder_is(fresh: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert seen(out) == seen(tmp_path / "nothing") == ()
    appear(fresh, out, seen(out), tmp_path / "aside")
    assert names(tmp_path) == {"out"} and names(out) == {"new"}


def test_what_was_seen_is_replaced(fresh: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    appear(fresh, out, seen(out), tmp_path / "aside")
    assert names(tmp_path) == {"out"} and names(out) == {"new"}


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("now", ["file", "folder", "link", "changed"])
def test_what_appeared_meanwhile_stays_and_so_does_the_result(
    before: bool, now: str, fresh: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if before:
        out.mkdir()
        (out / "old").write_text("old")
    was = seen(out)
    if before and now != "changed":
        out.rename(tmp_path / "moved")
    if now == "file":
        out.write_text("letter")
    elif now == "folder":
        out.mkdir()
        (out / "old").write_text("old")  # the same content in another folder
    elif now == "link":
        out.symlink_to(fresh)
    elif before:
        (out / "old").write_text("older")
    else:
        (out / "deep" / "er").mkdir(parents=True)
    found = seen(out)
    with pytest.raises(FileExistsError):
        appear(fresh, out, was, tmp_path / "aside")
    assert seen(out) == found and names(fresh) == {"new"} and not (tmp_path / "aside").exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    (tmp_path / "link.json").symlink_to(file)
    require_file(file, "--json")
    assert not names(tmp_path) - {"link.json"}, "nothing is left of asking"
    write_file(tmp_path / "link.json", "{}", "--json")
    assert (tmp_path / "link.json").is_symlink() and file.read_text() == "{}"
    with pytest.raises(OutputError, match="surrogates not allowed"):
        write_file(file, "\udcff", "--json")
    assert file.read_text() == "{}" and names(tmp_path) == {"numbers.json", "link.json"}


def test_what_is_no_file_is_written_to_and_stays_what_it_is() -> None:
    require_file(Path("/dev/null"), "--json")
    write_file(Path("/dev/null"), "{}", "--json")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(
        OutputError, match=r"can't write /dev/full \(No space left on device\); give another --json file"
    ):
        write_file(Path("/dev/full"), "{}", "--json")


@pytest.mark.parametrize("name", ["", "none/numbers.json", "file/numbers.json", "x" * 300, "loop", "a\0b"])
def test_a_place_that_can_not_be_written_is_refused_before(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for act in (require_file, lambda file, option: write_file(file, "{}", option)):
        with pytest.raises(OutputError, match="give another --json file"):
            act(tmp_path / name, "--json")
    assert names(tmp_path) == {"file", "loop"}
