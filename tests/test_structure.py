"""Files and functions stay short enough to be read at once."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_OF_FILE, MOST_OF_FUNCTION = 400, 50


def sources(suffix: str) -> list[Path]:
    folders = ("senet_transfer", "tools", "datasets", "tests")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob(f"*{suffix}"))]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(text: str) -> dict[str, int]:
    """The lines of each function of a Python file, its docstring included."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return {f"{f.name}, line {f.lineno}": f.end_lineno - f.lineno + 1 for f in found}


def statements(text: str) -> list[str]:
    """The outermost statements of a JavaScript file, and the comments between them."""
    return re.split(r"\n(?![\s)}\]])", text.strip())


def test_the_counts_see_what_is_nested_and_what_is_a_docstring():
    text = 'def a():\n    """One.\n\n    Two."""\n    def b():\n        return 1\n\n    return b\n'
    assert functions(text) == {"a, line 1": 8, "b, line 5": 2}
    text = "/** a\n */\nconst a = 1;\n\nfunction b() {\n  // Why.\n\n  return 1;\n}\nc();\n"
    lengths = [len(part.strip().splitlines()) for part in statements(text)]
    assert lengths == [2, 1, 5, 1]


@pytest.mark.parametrize("path", sources(".py"), ids=name)
def test_a_python_file_and_its_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) < MOST_OF_FILE
    assert {f: n for f, n in functions(text).items() if n >= MOST_OF_FUNCTION} == {}


@pytest.mark.parametrize("path", sources(".js"), ids=name)
def test_a_javascript_file_and_its_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) < MOST_OF_FILE
    for statement in statements(text):
        # A function is in one statement, which is cut nowhere if its braces are in pairs.
        assert statement.count("{") == statement.count("}"), statement
        assert len(statement.strip().splitlines()) < MOST_OF_FUNCTION, statement
