"""Tests for the package's architecture, such as the imports that are allowed in each layer."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "senet_transfer"

# A part may import from itself and from parts in the rows above it, but not from other parts in its
# row. `utils` imports nothing from the project except its errors.
LAYERS = (
    ("errors", "preprocessing"),
    ("utils",),
    ("layers",),
    ("config",),
    ("weights",),
    ("models", "data"),
    ("evaluation", "export"),
    ("engine",),
    ("analysis",),
    ("cli",),
)
RANK = {part: rank for rank, row in enumerate(LAYERS) for part in row}
# Parts in higher rows that `data` and `utils` still must not import.
FORBIDDEN = {"data": {"weights", "models", "layers"}, "utils": {"preprocessing"}}
MOST_FILES = 14


def modules() -> dict[str, Path]:
    """Map the dotted name of each module in the package to the module's path."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[dotted.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str, *, when_loaded: bool) -> set[str]:
    """Return the modules of this package that a module imports.

    Args:
        name: Dotted name of the importing module.
        when_loaded: If True, ignore imports inside functions and under ``TYPE_CHECKING``.
    """
    tree = ast.parse(MODULES[name].read_text())
    nodes = list(_outside_functions(tree)) if when_loaded else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {module for module in found if module in MODULES} - {name}


def _outside_functions(node: ast.AST):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _outside_functions(child)


def part(module: str) -> str:
    """Return the top-level subpackage or module that contains a module.

    For the root package itself, return "".
    """
    return (module.split(".") + [""])[1]


def import_cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Find import cycles with Tarjan's algorithm for strongly connected components."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in edges.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = []
            while not group or group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in edges:
        if node not in index:
            visit(node)
    return found


def test_a_cycle_is_found():
    assert import_cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


@pytest.mark.parametrize("name", [name for name in MODULES if part(name) in RANK])
@pytest.mark.long
def test_a_module_imports_only_from_layers_below_its_own(name):
    own = part(name)
    for target in imports(name, when_loaded=False):
        other = part(target)
        if other in ("", own):
            continue
        assert RANK[other] < RANK[own], f"{name} imports {target}"
        assert other not in FORBIDDEN.get(own, ()), f"{name} imports {target}"


def test_every_package_has_a_layer_in_the_architecture():
    assert {part(name) for name in MODULES} - {"", "_moved"} == set(RANK)


@pytest.mark.long
def test_modules_have_no_circular_imports():
    edges = {name: imports(name, when_loaded=True) for name in MODULES}
    assert import_cycles(edges) == []


@pytest.mark.long
def test_folders_have_no_circular_imports():
    # Imports between a folder and its subfolders are allowed: `backbones/` uses
    # `models/registry.py`, and `models/build.py` builds networks of `backbones/`.
    edges = {path.parent: set() for path in MODULES.values()}
    for name, path in MODULES.items():
        for target in imports(name, when_loaded=True):
            ends = path.parent, MODULES[target].parent
            if not (ends[0].is_relative_to(ends[1]) or ends[1].is_relative_to(ends[0])):
                edges[ends[0]].add(ends[1])
    assert import_cycles(edges) == []


def test_lower_layers_do_not_import_detectron2s_models_at_import():
    # Importing detectron2.modeling registers our models, and these import all lower-level parts.
    for name, path in MODULES.items():
        if part(name) in RANK and RANK[part(name)] < RANK["models"]:
            for node in _outside_functions(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom | ast.Import):
                    assert "detectron2.modeling" not in ast.unparse(node), name


def test_only_the_command_lines_parse_arguments():
    users = {name for name, path in MODULES.items() if "argparse" in path.read_text()}
    assert {part(name) for name in users} == {"cli"}


def foreign_private_names(tree: ast.AST, own: set[str]) -> list[str]:
    """Return the private attributes and modules of other libraries that a module uses.

    Args:
        tree: Syntax tree of the module.
        own: Private names that the package itself defines.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of_own_class = ast.unparse(node.value) in ("self", "cls", "super()")
            if node.attr not in own and not of_own_class and ast.unparse(node) != "os._exit":
                found.append(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            found += [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [part for name in names for part in name.split(".") if part not in own]
    return [name for name in found if name.startswith("_") and not name.endswith("__")]


def private_names(tree: ast.AST) -> set[str]:
    """Return the private names that a module defines, including attributes of ``self``."""
    found = {"_moved"}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
            found.update([node.attr] if isinstance(node.ctx, ast.Store) else [])
    return {name for name in found if name.startswith("_")}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("storage._history", ["_history"]),
        ("getattr(trainer, '_hooks')", ["_hooks"]),
        ("from torch.utils._pytree import tree_map", ["_pytree"]),
        ("import torch._inductor.config", ["_inductor"]),
        ("self._anything; cls._other; super()._third; other._own; os._exit(1)", []),
        ("x.__dict__", []),
    ],
)
def test_a_private_name_of_another_library_is_found(source, expected):
    assert foreign_private_names(ast.parse(source), {"_own"}) == expected


@pytest.mark.long
def test_private_apis_of_other_libraries_are_used_in_one_module():
    trees = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
    own = set().union(*map(private_names, trees.values()))
    users = {name: foreign_private_names(tree, own) for name, tree in trees.items()}
    del users["senet_transfer.utils.private_api"]
    assert {name: found for name, found in users.items() if found} == {}


def test_folders_contain_a_limited_number_of_files():
    count = Counter(path.parent for path in MODULES.values())
    assert {str(folder): n for folder, n in count.items() if n > MOST_FILES} == {}
