"""The order of the house: who may import whom, how long a file may be, and that every public name says what it is."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "llmcompress"
FILES = sorted(HOUSE.rglob("*.py"))
LONGEST = 350  # lines

# A module sees those in the lines above its own, and no others.
LAYERS = (
    ("errors", "axes", "methods", "processes", "untrusted", "interrupt", "places"),
    ("cache", "words", "companions"),
    ("family", "pydocs", "hub", "lock", "manifest", "scratch", "rows", "damage"),
    ("shard",),
    ("texts", "shelf", "target"),
    ("hub_texts", "local_texts"),
    ("widths",),
    ("anatomy", "data", "block", "rotate"),
    ("native", "checkpoint", "report", "triton_kernels"),
    ("integer", "kernels", "journal", "tokenizer", "configs"),
    ("integer_linear", "lookup"),
    ("four_bit", "integer_embedding", "sparse_linear", "factored", "codebook_linear"),
    ("stored",),
    ("said",),
    ("plain",),
    ("adapters",),
    ("plugin", "resave", "artifact", "residency", "resize"),
    ("ondisk", "walk"),
    ("stages.context", "stages.coding"),
    ("stages.formats", "stages.trial", "stages.choice", "stages.fisher", "stages.units", "stages.budget", "stages.making"),
    ("stages.rounding", "stages.smooth", "stages.protect", "stages.embedding"),
    ("stages.depth", "stages.experts", "stages.hidden"),
    ("stages.allocation", "stages.grouping"),
    ("stages.sublayers",),
    ("stages.student",),
    ("stages.teacher", "stages.lesson"),
    ("stages.matching",),
    ("stages.training",),
    ("stages.quantize", "stages.prune", "stages.sparsify", "stages.distill"),
    ("stages.tie", "stages.share", "stages.cluster", "stages.basis"),
    ("steps",),
    ("recipe",),
    ("prepare", "contents"),
    ("foreign",),
    ("evaluate", "plan"),
    ("chain", "joint"),
    ("run", "live", "push"),
    ("reproduce",),
    ("__init__", "__main__"),
)
ROOMS = ("methods", "report")  # folders whose modules see each other
LATE = {("recipe", "live")}  # an import inside a function, so that Recipe.apply is there without a circle
BORDERS = {"bitsandbytes": {"native"}, "datasets": {"hub_texts"}, "huggingface_hub": {"hub"}}


def module_of(file: Path) -> str:
    """`stages.quantize`; a folder's __init__ is the folder."""
    parts = file.relative_to(HOUSE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imports(node: ast.AST) -> Iterator[str]:
    """Every module imported at or below `node` at run time, by full name; what only a type checker reads is left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, "imports are absolute"
            inner = {f"{child.module}.{alias.name}" for alias in child.names}
            own = {name for name in inner if name.removeprefix("llmcompress.") in MODULES}
            yield from own
            if len(own) < len(inner):
                yield child.module
        else:
            yield from imports(child)


def own_imports(module: str) -> set[str]:
    found = set(imports(ast.parse(MODULES[module].read_text())))
    return {name.removeprefix("llmcompress.") for name in found if name.startswith("llmcompress.")}


def place(module: str) -> int:
    """The layer of a module, or of the room that it is in."""
    found = [i for i, layer in enumerate(LAYERS) if module in layer or module.partition(".")[0] in layer]
    assert found or module == "stages", f"{module} has no place in the house: add it to LAYERS"
    return found[0] if found else 0


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_sees_only_the_layers_below_it(module: str) -> None:
    room = module.partition(".")[0]
    for seen in own_imports(module) - {module}:
        assert place(seen) < place(module) or (module, seen) in LATE or (room in ROOMS and seen.partition(".")[0] == room), (
            f"{module} must not import {seen}"
        )


def test_the_late_imports_are_made_inside_functions() -> None:
    for module, seen in LATE:
        assert seen in own_imports(module), f"{module} imports {seen} no more: take it out of LATE"
        tree = ast.parse(MODULES[module].read_text())
        top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        assert f"llmcompress.{seen}" not in set(imports(top))


def test_every_place_in_the_list_is_taken() -> None:
    named = {module for layer in LAYERS for module in layer}
    assert not named - set(MODULES), "LAYERS names modules that are gone"


def test_methods_see_torch_and_each_other() -> None:
    allowed = {"__future__", "collections", "dataclasses", "functools", "itertools", "math", "typing", "torch"}
    for module in (name for name in MODULES if name.startswith("methods")):
        found = set(imports(ast.parse(MODULES[module].read_text())))
        outside = {name.partition(".")[0] for name in found if not name.startswith("llmcompress.methods")}
        assert not outside - allowed, f"{module} imports {outside - allowed}"


@pytest.mark.parametrize("package", BORDERS)
def test_a_foreign_package_has_one_border(package: str) -> None:
    users = {
        module
        for module, file in MODULES.items()
        if package in {name.partition(".")[0] for name in imports(ast.parse(file.read_text()))}
    }
    assert users and users <= BORDERS[package]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_public_name_says_what_it_is(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree), f"{module} does not say what it is"
    owners: list[ast.Module | ast.ClassDef] = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
    for owner in owners:
        for node in owner.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                inherited = isinstance(owner, ast.ClassDef) and owner.bases and not ast.get_docstring(node)
                assert ast.get_docstring(node) or inherited, f"{module}: {node.name} has no docstring"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(HOUSE)))
def test_no_file_is_long(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LONGEST
