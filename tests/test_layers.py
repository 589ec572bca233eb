"""Who may import whom, read from the imports themselves; `python tests/test_layers.py` prints the figures."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "okdc"

# The floors, bottom up: each wing (or lone file) and what it may import, which must stand above it in this table.
# "okdc" is the package itself: its version.
ALLOWED = {
    "okdc": "",
    "errors": "",
    "ranks": "",
    "losses": "errors ranks",
    "needs": "errors",
    "system": "errors ranks",
    "recipe": "errors system",
    "tasks": "errors losses ranks",
    "anatomy": "errors system tasks",
    "data": "errors needs ranks recipe system tasks",
    "report": "errors recipe system tasks",
    "settings": "recipe",
    "training": "errors ranks recipe system tasks",
    "verification": "errors system tasks",
    "cohort": "anatomy errors system tasks",
    "networks": "anatomy errors recipe tasks",
    "deploy": "errors networks okdc recipe system tasks verification",
    "methods": "anatomy cohort errors losses needs ranks system tasks",
    "pipeline": "anatomy cohort data deploy errors losses methods needs networks okdc ranks recipe report system "
    "tasks training",
    "testing": "anatomy errors methods needs networks ranks recipe system training",
    "measure": "anatomy cohort data deploy errors methods needs networks okdc pipeline recipe system tasks training "
    "verification",
    "comparing": "data errors measure methods networks pipeline recipe report system tasks",
    "cli": "anatomy comparing deploy errors measure methods networks okdc pipeline recipe report system tasks "
    "testing training",
    "__main__": "cli",
}


@cache
def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Every module by its dotted name."""
    files = sorted(package.rglob("*.py"))
    return {".".join(f.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def wing(module: str) -> str:
    """The folder that a module is in, or the lone file that it is."""
    return module.split(".")[1] if "." in module else module


@cache
def imports(module: str, package: Path = PACKAGE) -> frozenset[str]:
    """The modules of okdc that one imports, but for the names that it only needs in annotations."""
    tree = ast.parse(modules(package)[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "okdc":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules(package) else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "okdc"}
    return frozenset(found - {module})


def wings(package: Path = PACKAGE) -> dict[str, set[str]]:
    """What each wing imports of the others."""
    found: dict[str, set[str]] = {wing(module): set() for module in modules(package)}
    for module in modules(package):
        found[wing(module)] |= {wing(other) for other in imports(module, package)} - {wing(module)}
    return found


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The groups that import one another, directly or not."""
    reach = {name: set(others) for name, others in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    groups = {frozenset({other for other in reach[name] if name in reach[other]} | {name}) for name in graph}
    return [set(group) for group in groups if len(group) > 1]


def floors(graph: dict[str, set[str]]) -> int:
    """How many floors a graph without circles has."""

    @cache
    def height(name: str) -> int:
        return 1 + max((height(other) for other in graph[name]), default=0)

    return max(map(height, graph))


def test_every_file_is_in_a_wing_and_every_wing_on_a_floor() -> None:
    assert len(modules()) > 100
    assert set(wings()) == set(ALLOWED), "a wing or a lone file came or went: say in the table what it may import"
    hidden = [name for name in modules() if name.rpartition(".")[2].startswith("_") and name != "okdc.__main__"]
    assert not hidden, "a file in a wing is private to nobody: name it without the underscore"


def test_every_import_is_allowed_and_every_permission_used() -> None:
    table = {name: set(allowed.split()) for name, allowed in ALLOWED.items()}
    assert wings() == table


def test_the_face_of_a_wing_says_what_it_imports() -> None:
    faces = {name: PACKAGE / name / "__init__.py" for name in ALLOWED if (PACKAGE / name).is_dir()}
    assert len(faces) >= 15
    for name, path in faces.items():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        told = docstring.partition("Imports: ")[2].removesuffix(".")
        assert told.replace("`", "").replace(",", "").split() == (ALLOWED[name].split() or ["nothing"]), name


def test_imports_go_down() -> None:
    order = list(ALLOWED)
    for name, others in wings().items():
        above = [other for other in others if order.index(other) > order.index(name)]
        assert not above, f"{name} imports {above}, which stand on a higher floor"


def test_no_modules_import_each_other() -> None:
    faces = {name for name, path in modules().items() if path.name == "__init__.py"}
    graph = {name: set(imports(name)) - faces for name in set(modules()) - faces}
    assert circles(graph) == []


def test_what_can_be_imported_is_not_loaded_by_path() -> None:
    loaders = {
        name for name, path in modules().items() if "spec_from_file_location" in path.read_text(encoding="utf-8")
    }
    # Export targets are no part of the package: they must run where okdc is not.
    assert loaders == {"okdc.system.shipped", "okdc.verification.alone"}


def test_methods_do_not_know_each_other() -> None:
    files = [name for name in modules() if name.startswith("okdc.methods.") and ".shared" not in name]
    assert len(files) >= 16
    for name in files:
        others = {other for other in imports(name) if other.startswith("okdc.methods.")}
        assert all(other.startswith("okdc.methods.shared") for other in others), name


def test_export_targets_know_nothing_of_okdc() -> None:
    files = sorted((PACKAGE.parent / "export").glob("*.py"))
    assert len(files) >= 9
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not [name for name in names if name.split(".")[0] == "okdc"], file.name


def test_importing_okdc_does_not_import_torch() -> None:
    code = "import sys, okdc, okdc.cli, okdc.recipe; print([m for m in ('torch', 'timm', 'numpy') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


if __name__ == "__main__":
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE
    graph = wings(package)
    between = sum(len([o for o in imports(m, package) if wing(o) != wing(m)]) for m in modules(package))
    print(f"{len(modules(package))} files in {len(graph)} wings and lone files, on {floors(graph)} floors")
    print(f"{sum(map(len, graph.values()))} permissions, {between} imports between wings")
    print(f"circles of wings: {circles(graph)}")
    print(f"circles of files: {circles({m: set(imports(m, package)) for m in modules(package)})}")
