"""The house: folders by subject, each importing only what lies below it, and no module in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

SCRIPTS = ROOT / "scripts"
FLOORS = (  # lowest first
    *("network", "data", "cohorts", "registration", "phantoms", "training", "bundle", "study", "__main__"),
)


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SCRIPTS.rglob("*.py")}


def imported(path):
    """The modules of this bundle that a module imports, those of its functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found & MODULES.keys()


IMPORTS = {module: imported(path) for module, path in MODULES.items()}


def floor(module):
    return module.split(".")[1]


def test_every_module_has_a_floor_and_every_floor_says_what_it_is():
    assert {floor(module) for module in MODULES if "." in module} == set(FLOORS)
    for folder in {path.parent for path in MODULES.values()} - {SCRIPTS}:
        tree = ast.parse((folder / "__init__.py").read_text("utf-8"))
        assert len(tree.body) == 1 and "mport" in ast.get_docstring(tree)


@pytest.mark.parametrize("module", sorted(IMPORTS))
def test_no_module_imports_a_higher_floor_and_nobody_imports_the_verbs(module):
    for other in IMPORTS[module]:
        assert other != "scripts.__main__"
        assert FLOORS.index(floor(other)) <= FLOORS.index(floor(module)), f"{module} imports {other}"


def test_no_import_is_part_of_a_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
