"""Tests that the documentation site builds without warnings and that its links work."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("mkdocstrings"),
    reason="the extra `docs` is not installed; run `make docs`",
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Build the documentation site and return the output folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.long
def test_every_document_is_a_page(site):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    pages |= {"index", "tools", "datasets", "configs", "contributing", "changelog", "security"}
    assert pages <= {path.stem for path in site.glob("*.html")}


@pytest.mark.long
def test_every_local_link_of_a_page_leads_to_a_file(site):
    for page in site.glob("*.html"):
        if page.name == "404.html":
            continue
        for path in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text()):
            if path.startswith(("https:", "data:")):
                continue
            assert (page.parent / path).exists(), f"{page.name}: {path}"


@pytest.mark.long
def test_pages_load_nothing_from_other_servers(site):
    for page in site.glob("*.html"):
        assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?:', page.read_text())


@pytest.mark.long
def test_the_reference_shows_docstrings_and_no_role_names(site):
    text = (site / "api.html").read_text()
    assert 'id="senet_transfer.create_backbone"' in text
    assert not re.search(r":(func|class|meth|data|mod|attr):<code>|<code>~", text)


@pytest.mark.parametrize(
    ("document", "text", "expected"),
    [
        ("README.md", "[a](docs/weights.md#top)", "[a](weights.md#top)"),
        ("README.md", "![a](docs/images/gates.png)", "![a](images/gates.png)"),
        ("docs/weights.md", "[a](../tools/README.md)", "[a](tools.md)"),
        ("docs/weights.md", "[a](api.md)", "[a](api.md)"),
        ("configs/README.md", "[a](retinanet_se_r50.yaml)", "a"),
        (
            "CONTRIBUTING.md",
            "[a](#links), [b](https://arxiv.org)",
            "[a](#links), [b](https://arxiv.org)",
        ),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(document, text, expected):
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    assert hooks.relinked(text, document) == expected
