"""Tests that documents and code contain none of the words that CONTRIBUTING.md advises against."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Patterns of the files to check.
CHECKED = (
    "*.md",
    "*.toml",
    "Makefile",
    "configs/**/*.yaml",
    "configs/*.md",
    "datasets/*.md",
    "datasets/*.py",
    "docs/**/*.md",
    "docs/**/*.py",
    "mkdocs.yml",
    "senet_transfer/**/*.py",
    "senet_transfer/**/*.js",
    "senet_transfer/**/*.html",
    "tests/**/*.py",
    "tools/**/*.md",
    "tools/**/*.py",
)
# Allowed uses of the words to avoid: in the list of these words itself, and in names that users of
# version 0.1 depend on.
NAMES = {
    "CONTRIBUTING.md": r"^\| .* \| .* \|$",
    "senet_transfer/_moved.py": r"senet_transfer\.backbones\.trunk",
    "senet_transfer/engine/trainer.py": r'"images a step"',
    "tests/faults/test_jobs.py": r"images a step 4 before",
}
# Words and phrases that are hard to understand or have a different meaning in this field, as
# regular expressions, with their replacements.
AVOIDED = {
    r"(?<!--)trunks?": "backbone",
    r"likewise": "the same, or repeat it",
    r"beside": "next to, compared with",
    r"borne": "tolerated, supported",
    r"(instant )?twins?": "counterpart, smoke-test config",
    r"(that|which) (is|are) none|(is|are) no number": "non-finite, invalid",
    r"whole or not( at all| there)?|wholly or not": "atomic, completely",
    r"(is|are|be|was|were|been|when) told|told (to|by)": "is reported, is asked",
    r"with the remedy": "with an error that says how to fix it",
    r"(is|are|was|were|be) taken up|takes up what": "resumes",
    r"(is|are|was|were|be) taken for": "is detected as",
    r"(run|job|training) (goes|go|went) on": "continues",
    r"a (folder|image|line|row|file|recipe|shard) an? (class|image|file|run|step|model|task)": (
        "one folder per class"
    ),
    r"(images|bytes|steps|batches) a (second|step|GPU)|a second a (node|GPU)": "images per second",
    r"the very (bits|batch|step)": "exactly the same bits",
}


def prose(path: Path) -> str:
    """Return the text of a file; code and link targets are removed from Markdown files."""
    text = path.read_text()
    if path.suffix == ".md":
        text = re.sub(r"^```.*?^```", _blank_lines, text, flags=re.M | re.S)
        text = re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", text)
    if names := NAMES.get(path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""):
        text = re.sub(names, "", text, flags=re.M)
    return text


def _blank_lines(match: re.Match) -> str:
    return "\n" * match[0].count("\n")


def found_in(text: str) -> list[str]:
    """Return the discouraged words in a text, with line numbers and replacements."""
    return [
        f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}; write: {instead}"
        for pattern, instead in AVOIDED.items()
        for match in re.finditer(rf"\b(?:{pattern})\b", text.replace("\n", " "), re.IGNORECASE)
    ]


FILES = sorted(
    {
        path
        for pattern in CHECKED
        for path in ROOT.glob(pattern)
        if path != Path(__file__) and "configs" not in path.relative_to(ROOT).parts[1:]
    }
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
@pytest.mark.long
def test_a_file_has_none_of_the_words_to_avoid(path):
    assert not found_in(prose(path))


def test_every_glob_finds_a_file():
    for pattern in CHECKED:
        assert list(ROOT.glob(pattern)), pattern


def test_words_are_found_across_lines_and_not_in_code(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("One `trunk`, and\n```sh\nx --trunk\n```\na folder\na class, and a trunk.\n")
    assert [line.split(";")[0] for line in found_in(prose(page))] == [
        "line 6: 'trunk'",
        "line 5: 'a folder a class'",
    ]
