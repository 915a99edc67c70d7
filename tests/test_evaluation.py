"""The measurements of evaluation/: their entry, their result files, the tables and pictures made of these."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation import decode_speed, other_choices, pictures, results, tables
from evaluation.__main__ import SCRIPTS, main
from evaluation.results import ROOT, Head, Loss, OutlierRow, SharingRow, modern
from evaluation.speed import random
from llmcompress.frontier.costs import Cost, Priced

RECIPE = "# GPTQ on NF4.\ndata: {source: python-docs}\nstages:\n  - quantize: {format: nf4}\n"


def fidelity_row(recipe: str, kl: float) -> dict[str, object]:
    return {
        "recipe": recipe,
        "bits": 4.5,
        "size_bytes": 1_500_000,
        "kl_nats_mean": kl,
        "top1_agreement": 0.9,
        "perplexity": 35.0,
        "base_perplexity": 34.9,
        "seconds": 20.4,
        "commit": "abc1234",
        "environment": {"versions": {"torch": "2.13.0"}, "device": "a machine, 1 threads"},
    }


def write_fidelity(root: Path, rows: list[dict[str, object]]) -> None:
    file = root / "evaluation" / "results" / "fidelity-demo.json"
    head = {"command": "python -m evaluation bench", "model": "demo", "text": "python-docs"}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**head, "rows": rows}))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of one result and one recipe, its tables written."""
    write_fidelity(tmp_path, [fidelity_row("nf4-gptq", 0.02), fidelity_row("nf4-nearest", 0.08)])
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "nf4-gptq.yaml").write_text(RECIPE)
    (tmp_path / "recipes" / "README.md").write_text("# Recipes\n\n<!-- recipes -->\n<!-- end recipes -->\n")
    assert tables.main(["--root", str(tmp_path)]) == 0
    return tmp_path


# --- the entry


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_measurement_can_be_imported_and_shows_its_help(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")  # train-demo sets it when it is imported
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0
    assert f"python -m evaluation {name}" in capsys.readouterr().out


def test_without_a_name_all_measurements_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said and script.about in said for name, script in SCRIPTS.items())


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bnech"]) == 2
    assert "no measurement 'bnech'; choose one of bench," in capsys.readouterr().err


def test_what_runs_in_a_rivals_environment_imports_nothing_of_ours_but_the_job() -> None:
    folder = ROOT / "evaluation" / "rivals"
    for file in [folder / "job.py", folder / "score.py", *folder.glob("rival_*.py")]:
        nodes = list(ast.walk(ast.parse(file.read_text("utf-8"))))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        ours = {name for name in names if name.split(".")[0] in ("llmcompress", "evaluation", "pydantic")}
        assert ours <= {"evaluation.rivals.job"}, file.name


# --- choices that a search does not have


def test_the_corners_of_the_hull_are_those_that_some_slope_takes() -> None:
    points = [(10, 8.0), (12, 9.0), (20, 5.0), (30, 1.0), (40, 0.9), (50, 0.0), (60, 0.5)]
    slopes = [slope / 1000 for slope in range(1, 1000)]
    best = {min(points, key=lambda point: point[1] + slope * point[0]) for slope in slopes}
    assert other_choices.corners(points) == best == {(10, 8.0), (30, 1.0), (50, 0.0)}


def test_the_slope_from_which_linears_are_left_out_makes_both_cost_the_same() -> None:
    """At 0.02 nats/byte the first takes 10 bytes, the second 100: 0.5 + 0.2 + 0 + 2."""
    cheap, dear = (
        {
            name: Cost(nats=nats, foretold=nats, own_bytes=size, native_bytes=size)
            for name, (nats, size) in ways.items()
        }
        for ways in ({"kept": (0.0, 100), "codes": (0.5, 10)}, {"kept": (0.0, 100), "codes": (2.0, 10)})
    )
    units = [Priced(linears=(name,), costs=costs) for name, costs in (("a", cheap), ("b", dear))]
    assert other_choices.slope_from(2.7, units) == pytest.approx(0.02)


# --- tables


def test_a_table_holds_the_numbers_of_the_result_and_the_ratio_to_the_baseline(checkout: Path) -> None:
    text = (checkout / "evaluation" / "RESULTS.md").read_text()
    assert "| nf4-gptq | 4.500 | 1.50 | 0.02000 | 0.250 x | 90.00 % | 35.000 | 20 |" in text
    assert "| nf4-nearest (stock bitsandbytes) | 4.500 | 1.50 | 0.08000 |  | 90.00 % | 35.000 | 20 |" in text
    assert "`python -m evaluation bench`" in text and "a machine, 1 thread." in text
    assert "## Other quantisers" not in text  # there is no such result


def test_the_head_of_a_recipe_and_the_table_of_recipes_are_written(checkout: Path) -> None:
    said = (checkout / "recipes" / "nf4-gptq.yaml").read_text()
    loss = "KL 0.02000 nats (0.250 x stock bitsandbytes at the same bytes)"
    line = f"#   demo: {loss}, perplexity 34.900 -> 35.000, 20 s\n"
    assert line in said and said.endswith(RECIPE.partition("\n")[2])
    assert (
        "[nf4-gptq](nf4-gptq.yaml) | GPTQ on NF4. | 0.02000 |"
        in (checkout / "recipes" / "README.md").read_text()
    )


def test_the_recipe_of_a_llama_cpp_format_has_its_loss_from_its_own_results(checkout: Path) -> None:
    facts: dict[str, Any] = {"model": "demo", "format": "iq4_nl", "base_perplexity": 34.9}
    facts |= {"perplexity": 35.0, "kl_llama_cpp": 0.001, "top1_llama_cpp": 0.9, "tokens": 512}
    rows = [
        facts | {"rounding": "gptq", "kl_nats_mean": 0.03},
        facts | {"rounding": "llama.cpp", "kl_nats_mean": 0.06},
    ]
    file = checkout / "evaluation" / "results" / "gguf.json"
    file.write_text(json.dumps({"command": "python -m evaluation gguf", "rows": rows}))
    format = checkout / "recipes" / "iq4_nl.yaml"
    format.write_text(RECIPE)
    head = tables.wanted(checkout)[format]
    loss = "KL 0.03000 nats (0.500 x llama.cpp's rounding at the same bytes)"
    assert f"#   demo: {loss}, perplexity 34.900 -> 35.000\n" in head and "gguf.json" in head


def test_check_is_content_with_what_was_written(checkout: Path) -> None:
    assert tables.main(["--check", "--root", str(checkout)]) == 0


@pytest.mark.parametrize("name", ["evaluation/RESULTS.md", "recipes/nf4-gptq.yaml", "recipes/README.md"])
def test_check_fails_in_one_line_where_a_number_was_edited(
    checkout: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkout / name
    file.write_text(edited := file.read_text().replace("0.02000", "0.01000"))
    capsys.readouterr()
    assert tables.main(["--check", "--root", str(checkout)]) == 1
    said = capsys.readouterr()
    assert (
        said.err == f"not what results/*.json say: {name}; run python -m evaluation tables\n" and not said.out
    )
    assert file.read_text() == edited


def test_check_fails_where_a_result_changed(checkout: Path) -> None:
    write_fidelity(checkout, [fidelity_row("nf4-gptq", 0.03), fidelity_row("nf4-nearest", 0.08)])
    assert tables.main(["--check", "--root", str(checkout)]) == 1


def test_rows_under_their_earlier_names_give_the_same_tables(checkout: Path) -> None:
    texts = []
    for names in (("basis-heal", "basis-75"), ("low-rank-heal", "low-rank-75")):
        write_fidelity(checkout, [fidelity_row(names[0], 0.5), fidelity_row(names[1], 1.0)])
        (checkout / "recipes" / f"{names[0]}.yaml").write_text(RECIPE)
        wanted = tables.wanted(checkout)
        head = wanted[checkout / "recipes" / f"{names[0]}.yaml"]
        texts.append((wanted[checkout / "evaluation" / "RESULTS.md"], head))
    assert texts[0] == texts[1]
    assert "(0.500 x untrained at the same bytes)" in texts[0][1]
    assert "| low-rank-heal | 4.500 | 1.50 | 0.50000 | 0.500 x |" in texts[0][0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ways: 75 %, basis of 2 layers, healed", "ways: 75 %, low rank over 2 layers, healed"),
        ("ways: codebook of 16 a row", "ways: codebook of 16 entries per row"),
        ("ways: codebook of 256 a linear", "ways: codebook of 256 entries per linear"),
        ("ways: nf4, block 32", "ways: nf4, group size 32"),
        ("kept teacher, 64 likeliest", "cached teacher, top 64"),
    ],
)
def test_earlier_names_of_rows_are_read_as_todays(old: str, new: str) -> None:
    assert modern(old) == modern(new) == new


def test_the_committed_tables_and_pictures_are_those_of_the_committed_results(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().err
    assert pictures.main(["--check"]) == 0, capsys.readouterr().err


# --- pictures


def test_a_picture_of_other_numbers_is_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("results", "pictures"):
        shutil.copytree(ROOT / "evaluation" / name, tmp_path / "evaluation" / name)
    file = tmp_path / "evaluation" / "results" / "speed-avx2.json"
    found = json.loads(file.read_text())
    row = next(each for each in found["rows"] if each["what"] == "111M model" and each["candidate"] == "w8a8")
    row["speedup_p10"] += 0.5
    file.write_text(json.dumps(found))
    assert pictures.main(["--check", "--root", str(tmp_path)]) == 1
    names = "evaluation/pictures/speed-light.svg, evaluation/pictures/speed-dark.svg"
    assert (
        capsys.readouterr().err
        == f"not drawn from results/*.json: {names}; run python -m evaluation pictures\n"
    )


def test_equal_numbers_are_drawn_alike_without_a_date(tmp_path: Path) -> None:
    picture = pictures.pictures(tables.Results(ROOT / "evaluation" / "results"))[0]
    for name in ("one", "other"):
        pictures.save(picture, pictures.DARK, tmp_path / name)
    text = (tmp_path / "one").read_text("utf-8")
    assert text == (tmp_path / "other").read_text("utf-8")
    assert picture.mark in text and "dc:date" not in text


# --- result files


def sharing_row(name: str, kl: float) -> SharingRow:
    return SharingRow(
        row=name,
        kl_nats_mean=kl,
        perplexity=35.0,
        base_perplexity=34.9,
        size_bytes=10,
        share_of_bytes=0.5,
        top1_agreement=0.9,
        seconds=1.0,
        commit="abc1234",
    )


def test_a_row_takes_the_place_of_the_one_of_its_earlier_name_and_others_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    other = {"row": "ways: nf4", "kl_nats_mean": 0.1, "of an earlier version": {"group_size": 64}}
    old = {"row": "ways: nf4, block 32", "kl_nats_mean": 0.2}
    (tmp_path / "sharing-demo.json").write_text(json.dumps({"command": "c", "rows": [old, other]}))
    rows = results.merge("sharing-demo", ("row",), sharing_row("ways: nf4, group size 32", 0.3))
    results.write("sharing-demo", Head(command="c"), {"rows": rows})
    kept, new = json.loads((tmp_path / "sharing-demo.json").read_text())["rows"]
    assert kept == other
    assert (new["row"], new["kl_nats_mean"]) == ("ways: nf4, group size 32", 0.3)
    assert "parameters" not in new  # what was not measured is not written


def test_a_result_reads_back_as_it_was_written(tmp_path: Path) -> None:
    loss = Loss(kl_nats_mean=0.1, perplexity=35.0, base_perplexity=34.9)
    row = OutlierRow(what="w8a8", planted=loss, original=loss)
    results.write(
        "outliers", Head(command="c", commit="abc1234"), {"rows": [row]}, tmp_path / "outliers.json"
    )
    assert json.loads((tmp_path / "outliers.json").read_text())["rows"][0]["as it was"]["perplexity"] == 35.0
    found = results.load(tmp_path, "outliers", results.Rows[OutlierRow])
    assert found is not None and found.rows == [row] and found.commit == "abc1234"


def test_the_rank_correlation_is_that_of_the_ranks() -> None:
    assert tables.rank_correlation([0.1, 0.2, 5.0], [3.0, 4.0, 7.0]) == 1
    assert tables.rank_correlation([1, 2, 3, 4], [8, 7, 6, 5]) == -1
    assert tables.rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)


def test_the_candidates_of_decode_speed_multiply_the_same_weight() -> None:
    weight = random(64, 128, torch.float32, torch.device("cpu"))
    x = random(3, 128, torch.float32, torch.device("cpu")) * 128**0.5
    exact, found = x @ weight.T, {}
    for one in decode_speed.chosen(None, torch.float32):
        with torch.no_grad():
            out = one.make(weight.to(one.dtype))()(x.to(one.dtype)).float()
        found[one.name] = float((out - exact).norm() / exact.norm())
    assert {"float32", "bfloat16", "w8a8", "w4a8", "int8", "nf4", "q4_0", "bitsandbytes nf4"} <= found.keys()
    assert all(error < 0.2 for error in found.values()), found
