"""The order of the rooms: which room may import which, and that every public name says what it is.

`ROOMS` is the map of the project. `docs/architecture.md` shows it: `python -m tests.test_architecture` writes
it there.
"""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llmcompress"
FILES = sorted(PACKAGE.rglob("*.py"))
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: written by `python -m tests.test_architecture` -->", "<!-- end of rooms -->"

# Low to high: a room imports itself and the rooms above it in this table, and no others.
ROOMS = {
    "errors": "what a user's input can cause: one line, what was given, why not, what to do",
    "algorithms": "pure functions of tensors, one algorithm a file; they import torch and each other only",
    "architectures": "what the weights of each model family are, spelled in named axes",
    "io": "files: safetensors, the output folder, the journal, caches, locks, paths",
    "hub": "the Hugging Face Hub: models, recipes and data sets at a commit",
    "kernels": "compiled kernels (Triton, C) and their dispatch",
    "data": "text to token sequences: local files, Hub data sets, Python's documentation",
    "formats": "one weight format a file: what lies on the disk, and the module that runs it",
    "report": "the numbers of a run, and how they are shown: console, model card, plots",
    "integrations": "the borders to transformers, bitsandbytes, PEFT and several processes",
    "derivation": "the anatomy of a model whose family is not in the table, derived and proved",
    "modeling": "a model, one decoder layer at a time: in memory, on disk, or as shapes alone",
    "exports": "artefacts repacked for other engines: what each target takes, and how it writes it",
    "stages": "what changes weights: one folder a stage, which imports no other stage's folder",
    "recipe": "recipes: YAML, schema, digest, and which stages may follow which",
    "frontier": "the best model within a size: what each format costs each linear, and the choice",
    "pipeline": "the commands: order and bookkeeping, no algebra",
    "cli": "the command line: parsing, progress, exit codes",
    "__main__": "`python -m llmcompress`",
    "__init__": "the public names",
}
BORDERS = {
    "bitsandbytes": {"formats.bitsandbytes_layout", "formats.bitsandbytes_linear"},
    "datasets": {"data.hub_datasets"},
    "huggingface_hub": {"hub"},
}
TORCH_ONLY = {"__future__", "collections", "dataclasses", "functools", "itertools", "math", "typing", "torch"}


def module_of(file: Path) -> str:
    """`stages.quantize.stage`; the __init__ of a folder is the folder."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imports(node: ast.AST) -> Iterator[str]:
    """Every module imported at or below `node` at run time, by full name; what only a type checker reads is
    left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            assert child.module
            inner = {f"{child.module}.{alias.name}" for alias in child.names}
            own = {name for name in inner if name.removeprefix("llmcompress.") in MODULES}
            yield from own
            if len(own) < len(inner):
                yield child.module
        else:
            yield from imports(child)


def own_imports(module: str) -> set[str]:
    """The modules of this package that a module imports."""
    found = set(imports(ast.parse(MODULES[module].read_text())))
    return {name.removeprefix("llmcompress.") for name in found if name.startswith("llmcompress.")}


def room_of(module: str) -> int:
    """The place of a module's room in the order."""
    room = module.partition(".")[0]
    assert room in ROOMS, f"{module} is in no room: add {room} to ROOMS"
    return [*ROOMS].index(room)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_its_own_room_and_lower_ones(module: str) -> None:
    for seen in own_imports(module) - {module}:
        assert room_of(seen) <= room_of(module), f"{module} must not import {seen}"


def test_every_room_is_there() -> None:
    assert set(ROOMS) == {module.partition(".")[0] for module in MODULES}


def test_no_modules_import_each_other_in_a_circle() -> None:
    packages = {module for module, file in MODULES.items() if file.name == "__init__.py"}
    graph = {module: own_imports(module) - packages - {module} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_no_stage_imports_another_stage() -> None:
    stages = {file.parent.name for file in PACKAGE.glob("stages/*/stage.py")}
    assert len(stages) == 10
    for module in MODULES:
        parts = module.split(".")
        if parts[0] == "stages" and len(parts) == 3:
            others = {
                seen
                for seen in own_imports(module)
                if seen.split(".")[1:2] and seen.split(".")[1] in stages - {parts[1]}
            }
            assert not {seen for seen in others if seen.startswith("stages.")}, (
                f"{module} imports another stage"
            )


def test_algorithms_import_torch_and_each_other() -> None:
    for module in (name for name in MODULES if name.startswith("algorithms")):
        found = set(imports(ast.parse(MODULES[module].read_text())))
        outside = {name.partition(".")[0] for name in found if not name.startswith("llmcompress.algorithms")}
        assert not outside - TORCH_ONLY, f"{module} imports {outside - TORCH_ONLY}"


@pytest.mark.parametrize("package", BORDERS)
def test_a_foreign_package_has_one_border(package: str) -> None:
    users = {
        module
        for module, file in MODULES.items()
        if package in {name.partition(".")[0] for name in imports(ast.parse(file.read_text()))}
    }
    assert users
    assert users <= BORDERS[package]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_public_name_says_what_it_is(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree), f"{module} does not say what it is"
    owners: list[ast.Module | ast.ClassDef] = [
        tree,
        *(node for node in tree.body if isinstance(node, ast.ClassDef)),
    ]
    for owner in owners:
        for node in owner.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if "overload" in map(ast.unparse, getattr(node, "decorator_list", [])):
                    continue
                inherited = isinstance(owner, ast.ClassDef) and owner.bases and not ast.get_docstring(node)
                assert ast.get_docstring(node) or inherited, f"{module}: {node.name} has no docstring"


def first_sentence(module: str) -> str:
    """What a module says of itself: its docstring up to the first full stop that ends a sentence, or its
    first line."""
    text = " ".join(
        (ast.get_docstring(ast.parse(MODULES[module].read_text())) or "").split("\n\n")[0].split()
    )
    return text.partition(". ")[0].rstrip(".").replace("|", r"\|")


def rooms_table() -> str:
    """The map as Markdown: a row a room, and below it a row a file."""
    lines = [BEGIN, "", "| room | what it holds |", "|---|---|"]
    lines += [f"| `{room}` | {what} |" for room, what in ROOMS.items()]
    for room in ROOMS:
        inside = sorted(module for module in MODULES if module.startswith(f"{room}."))
        inside = [module for module in inside if MODULES[module].name != "__init__.py"]
        if inside:
            lines += ["", f"### `{room}/`", "", "| file | what it is |", "|---|---|"]
            names = {module: MODULES[module].relative_to(PACKAGE / room).as_posix() for module in inside}
            lines += [f"| `{names[module]}` | {first_sentence(module)} |" for module in inside]
    return "\n".join([*lines, "", END])


def test_the_page_shows_this_table() -> None:
    assert rooms_table() in PAGE.read_text(), "run python -m tests.test_architecture"


if __name__ == "__main__":
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(BEGIN)] + rooms_table() + page[page.index(END) + len(END) :])
