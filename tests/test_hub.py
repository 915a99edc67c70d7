"""The Hub border through the real client and a small local Hub; what that Hub can't show stands in the head
of `hub_server`."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from llmcompress import hub as border
from tests.clients import ask
from tests.hub_server import STRANGER, TOKEN, Fault, Hub, environment, serve

MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "README.md": b"a card",
    "recipe.yaml": b"stages: [quantize]",
    "model.safetensors": b"weights",
    "model-00001-of-00002.safetensors": b"shard",
    "model.safetensors.index.json": b"{}",
    "consolidated.safetensors": b"the same again",
    "pytorch_model.bin": b"a pickle",
    "original/consolidated.00.pth": b"a pickle",
    "modeling_evil.py": b"raise SystemExit",
    "credentials.json": b"{}",
    "notes.txt": b"mine",
    "training_args.bin": b"a pickle",
}
SMALL = {"README.md", "config.json", "model.safetensors.index.json", "recipe.yaml", "tokenizer.json"}
WHOLE = SMALL | {"model.safetensors", "model-00001-of-00002.safetensors"}
FETCH = """
import time
time.sleep = lambda seconds: None  # between the client's own tries
def names(model, revision=None, **settings):
    folder, commit = hub.fetch(model, revision, **settings)
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()), commit
"""
PUSH = """
from hashlib import sha256
def push(repo, folder, private=False, message="made", replaced=("model*.safetensors*", "*.png")):
    files = {file.name: file for file in Path(folder).iterdir()}
    return hub.push(repo, files, private=private, message=message, replaced=replaced).commit
"""
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@pytest.fixture
def served() -> Iterator[tuple[Hub, str]]:
    with serve() as found:
        yield found


def test_an_id_is_spelled_as_the_hub_spells_it() -> None:
    assert all(map(border.is_id, ("user/name", "gpt2", "U-1/a.b_c", "a/b")))
    for name in (
        "a/b/c",
        "./a",
        "/a",
        "~/a",
        "",
        "a b",
        "a/",
        "user/name@v1",
        "ü/a",
        "..",
        "a\n",
        "-a/b",
        "a/.b",
    ):
        assert not border.is_id(name)


def test_a_revision_follows_an_at() -> None:
    assert border.split("user/name@v1") == ("user/name", "v1")
    assert border.split("user/name") == ("user/name", None)
    assert border.split("user/name@") == ("user/name", "")


def test_only_safetensors_tokenizer_and_text_are_asked_for(served: tuple[Hub, str], tmp_path: Path) -> None:
    hub, endpoint = served
    commit = hub.add("user/model", MODEL)
    script = FETCH + 'told(names, "user/model", weights=False)\ntold(names, "user/model")'
    small, whole = ask(environment(endpoint, tmp_path), script)
    assert (set(small[0]), small[1]) == (SMALL, commit)
    assert (set(whole[0]), whole[1]) == (WHOLE, commit)
    asked = {path.partition(f"/resolve/{commit}/")[2] for _, path in hub.log if "/resolve/" in path}
    assert asked == WHOLE  # no pickle, no code, nothing of another name
    got = [path for method, path in hub.log if method == "GET" and "/resolve/" in path]
    assert len(got) == len(set(got))  # nothing a second time
    offline = environment("http://127.0.0.1:9", tmp_path) | {"HF_HUB_OFFLINE": "1"}
    again, other = ask(
        offline, script.replace(", weights=False", "").replace("user/model", "user/other", 1) + ""
    )[::-1]
    assert set(again[0]) == WHOLE  # from the cache, without a network
    assert other.startswith(
        "ModelError: base user/other is not in the cache, and HF_HUB_OFFLINE is set; unset it"
    )


def test_a_branch_or_tag_is_the_commit_that_it_stands_for(served: tuple[Hub, str], tmp_path: Path) -> None:
    hub, endpoint = served
    old = hub.add("user/recipe", {"recipe.yaml": b"stages: [quantize]"})
    new = hub.add("user/recipe", {"recipe.yaml": b"stages: [prune]"})
    hub.tag("user/recipe", "v1", old)
    script = "\n".join(
        f'told(lambda: [str(x) for x in hub.read("user/recipe", "recipe.yaml", {revision!r}, largest=99, '
        'wanted="recipe", '
        f"error=RecipeError)])"
        for revision in (None, "main", "v1", old)
    )
    answers = ask(environment(endpoint, tmp_path), script)
    assert [commit for _, commit in answers] == [new, new, old, old]
    assert "prune" in answers[0][0] and "quantize" in answers[2][0]


def test_a_file_that_is_too_large_is_refused_and_not_fetched(served: tuple[Hub, str], tmp_path: Path) -> None:
    hub, endpoint = served
    hub.add("user/recipe", {"recipe.yaml": b"#" * 100})
    script = (
        'told(hub.read, "user/recipe", "recipe.yaml", None, largest=99, wanted="recipe", error=RecipeError)'
    )
    (answer,) = ask(environment(endpoint, tmp_path), script)
    assert (
        answer
        == "RecipeError: recipe.yaml of user/recipe has 100 bytes, and may have 99; give another recipe"
    )
    assert not [path for method, path in hub.log if method == "GET" and "/resolve/" in path]


def test_each_refusal_of_the_hub_is_one_clear_line(served: tuple[Hub, str], tmp_path: Path) -> None:
    hub, endpoint = served
    hub.add("user/model", MODEL)
    hub.add("user/private", MODEL, private=True)
    hub.add("user/gated", MODEL, gated=True)
    wanted = {
        '"user/nonesuch", None': f"is not on the Hub or is private; check the id, or {LOGIN}",
        '"user/private", None': f"is not on the Hub or is private; check the id, or {LOGIN}",
        '"user/gated", None': "is gated; accept its terms on the Hub and log in with `hf auth login`",
        '"user/model", "none"': "has no revision none; give a branch, tag or commit that it has",
        '"a b", None': "is neither a folder nor a Hub id; give a folder that exists, or an id like user/name",
    }
    script = "\n".join(f"told(hub.fetch, {call})" for call in wanted)
    read = '\ntold(hub.read, "user/model", "none.yaml", None, largest=9, wanted="recipe", error=RecipeError)'
    for token in (None, STRANGER):
        *answers, file = ask(environment(endpoint, tmp_path / str(token), token), script + read)
        for answer, (call, message) in zip(answers, wanted.items(), strict=True):
            assert answer == f"ModelError: base {call.split(chr(34))[1]} {message}"
        assert file.startswith("RecipeError: recipe user/model lacks none.yaml") and "\n" not in file
    script = FETCH + '\ntold(names, "user/private")\ntold(names, "user/gated")'
    mine = ask(environment(endpoint, tmp_path / "mine", TOKEN), script)
    assert [set(answer[0]) for answer in mine] == [WHOLE, WHOLE]


def test_no_network_is_one_clear_line(tmp_path: Path) -> None:
    (answer,) = ask(environment("http://127.0.0.1:9", tmp_path), 'told(hub.fetch, "user/model", None)')
    assert answer.startswith(
        "ModelError: base user/model can't be fetched (LocalEntryNotFoundError) and is not a folder here;"
    )


def test_names_that_lead_out_of_the_cache_write_nothing(served: tuple[Hub, str], tmp_path: Path) -> None:
    hub, endpoint = served
    inside, outside = tmp_path / "home", tmp_path / "evil.json"
    names = [
        "../../../../../evil.json",
        "a/../../../../../../evil.json",
        str(outside),
        "..\\evil.json",
        "C:/evil.json",
    ]
    for number, name in enumerate(names):
        hub.add(f"user/evil-{number}", {**MODEL, name: b"evil"})
    script = FETCH + "\n".join(f'told(names, "user/evil-{number}")' for number in range(len(names)))
    answers = ask(environment(endpoint, inside), script)
    assert {file.name for file in tmp_path.iterdir()} == {"home"}
    kept = {file.relative_to(inside / "hub").parts[0] for file in inside.rglob("*evil*") if file.is_file()}
    assert all(part.startswith(("models--", ".locks")) for part in kept)
    for answer in answers:
        assert isinstance(answer, list) or answer.startswith("ModelError: base user/evil")


def test_no_pattern_lets_a_pickle_or_code_through() -> None:
    for name in (
        "pytorch_model.bin",
        "model.pt",
        "model.pkl",
        "modeling.py",
        "model.ckpt",
        "a/b.pth",
        "model.h5",
        "model.gguf",
        "credentials.json",
        "notes.txt",
        "my.model",
    ):
        assert not any(fnmatch(name, pattern) for pattern in border.SMALL + border.WEIGHTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "out"
    made.mkdir()
    (made / "model.safetensors").write_bytes(bytes(3_000_000))
    (made / "before_after.png").write_bytes(b"\x89PNG" * 1000)
    (made / "README.md").write_text("---\nlicense: mit\n---\n# a card\n")
    (made / "config.json").write_text("{}")
    return made


def test_a_push_is_one_commit_and_the_same_again_is_none(
    served: tuple[Hub, str], tmp_path: Path, folder: Path
) -> None:
    hub, endpoint = served
    env = environment(endpoint, tmp_path / "home", TOKEN)
    first, second = ask(env, PUSH + f'told(push, "user/new", {str(folder)!r}, True)\n' * 2)
    there = hub.files("user/new")
    assert all(there[file.name] == file.read_bytes() for file in folder.iterdir())
    assert first == second == hub.commits("user/new")[-1]
    assert len(hub.commits("user/new")) == 2  # the repository's first, and ours
    assert sum(path.startswith("/lfs/") for method, path in hub.log if method == "PUT") == 2
    assert hub.repos["model", "user/new"].private


def test_what_an_earlier_artefact_left_goes_in_the_same_commit(
    served: tuple[Hub, str], tmp_path: Path, folder: Path
) -> None:
    hub, endpoint = served
    hub.add(
        "user/old",
        {
            "model-00001-of-00002.safetensors": b"a",
            "model.safetensors.index.json": b"{}",
            "notes.md": b"mine",
        },
    )
    before = len(hub.commits("user/old"))
    ask(environment(endpoint, tmp_path / "home", TOKEN), PUSH + f'told(push, "user/old", {str(folder)!r})')
    assert hub.files("user/old").keys() == {file.name for file in folder.iterdir()} | {"notes.md"}
    assert len(hub.commits("user/old")) == before + 1


def test_a_broken_upload_goes_on_where_it_broke(
    served: tuple[Hub, str], tmp_path: Path, folder: Path
) -> None:
    hub, endpoint = served
    env, script = (
        environment(endpoint, tmp_path / "home", TOKEN),
        PUSH + f'told(push, "user/new", {str(folder)!r})',
    )
    (folder / "model-00002-of-00002.safetensors").write_bytes(bytes([1]) * 2_000_000)
    hub.faults.append(Fault("POST .*/commit/main", "cut", times=99))
    (answer,) = ask(env, script)
    assert answer.startswith("OutputError: repository user/new can't be had (") and answer.endswith(
        "run the same command again: what arrived is not sent again"
    )
    sent = sum(method == "PUT" for method, _ in hub.log)
    assert sent == 3 and hub.files("user/new").keys() == {".gitattributes"}  # nothing half-way is to be seen
    hub.faults.clear()
    (commit,) = ask(env, script)
    assert commit == hub.commits("user/new")[-1]
    assert sum(method == "PUT" for method, _ in hub.log) == sent  # nothing was sent again
    assert hub.files("user/new")["model.safetensors"] == bytes(3_000_000)


@pytest.mark.parametrize(("token", "why"), [(None, "is not"), (STRANGER, "denies access (HTTP 403)")])
def test_a_push_without_the_right_to_is_one_clear_line(
    served: tuple[Hub, str], tmp_path: Path, folder: Path, token: str | None, why: str
) -> None:
    hub, endpoint = served
    hub.add("user/mine", {"README.md": b""})
    (answer,) = ask(
        environment(endpoint, tmp_path / "home", token), PUSH + f'told(push, "user/mine", {str(folder)!r})'
    )
    assert answer.startswith(f"OutputError: repository user/mine {why}") and LOGIN in answer
    assert hub.files("user/mine") == {"README.md": b""}


def test_a_card_that_the_hub_refuses_is_one_line_that_says_why(
    served: tuple[Hub, str], tmp_path: Path, folder: Path
) -> None:
    hub, endpoint = served
    (folder / "README.md").write_text("---\nlicense: my own\nbase_model: /home/me/base\n---\n# a card\n")
    (answer,) = ask(
        environment(endpoint, tmp_path / "home", TOKEN), PUSH + f'told(push, "user/new", {str(folder)!r})'
    )
    assert answer == (
        'OutputError: the Hub refuses the card: Invalid metadata in README.md. - "base_model" '
        "'/home/me/base' is not right - "
        "\"license\" 'my own' is not right; correct the head of README.md beside the weights, which is then "
        "pushed as it is"
    )
    assert not [path for method, path in hub.log if method == "PUT"]  # said before anything is sent


def test_offline_nothing_is_pushed(tmp_path: Path, folder: Path) -> None:
    env = environment("http://127.0.0.1:9", tmp_path / "home", TOKEN) | {"HF_HUB_OFFLINE": "1"}
    (answer,) = ask(env, PUSH + f'told(push, "user/new", {str(folder)!r})')
    assert answer == "OutputError: user/new can't be pushed while HF_HUB_OFFLINE is set; unset it"


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("kind", ["stall", "cut", "error"])
def test_a_server_that_fails_is_one_clear_line(served: tuple[Hub, str], tmp_path: Path, kind: str) -> None:
    hub, endpoint = served
    hub.add("user/model", MODEL)
    hub.faults.append(Fault(".*config.json", kind, times=999, seconds=3.0))  # type: ignore[arg-type]
    quick = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    (answer,) = ask(environment(endpoint, tmp_path) | quick, FETCH + 'told(names, "user/model")')
    assert answer.startswith("ModelError: base user/model can't be ")
    hub.faults.clear()
    (found,) = ask(environment(endpoint, tmp_path), FETCH + 'told(names, "user/model")')
    assert set(found[0]) == WHOLE  # what was half there is whole now


def test_evaluation_results_are_as_the_hub_wants_them() -> None:
    entry = {
        "dataset_id": "user/texts",
        "dataset_revision": "ab" * 20,
        "task_id": "perplexity",
        "value": 3.5,
        "notes": "sequences",
    }
    text = border.evaluation_results([entry])
    assert text.splitlines()[0] == "- dataset:"
    assert "  value: 3.5" in text and "task_id: perplexity" in text
