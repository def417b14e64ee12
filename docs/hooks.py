"""Hooks of MkDocs: the documents outside `docs/`, and links that work on the site and on GitHub.

A document links to others by relative paths in the repository, as GitHub shows them. Here each
such path becomes that of the page on the site. A link to a file that is no page is left out.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Documents of the repository, and the pages that they are on the site.
OUTSIDE = {
    "README.md": "index.md",
    "datasets/README.md": "data-sets.md",
    "configs/README.md": "configs.md",
    "tools/README.md": "tools.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}


def relinked(markdown: str, document: str) -> str:
    """Return a document's text with the links of the site.

    Args:
        markdown: the text.
        document: its path in the repository.
    """

    def link(match: re.Match) -> str:
        image, text, path, anchor = match.groups()
        if not path or re.match(r"\w+:", path):
            return match[0]
        target = os.path.normpath(os.path.join(os.path.dirname(document), path))
        if target in OUTSIDE:
            return f"[{text}]({OUTSIDE[target]}{anchor})"
        if target.startswith("docs/"):
            return f"{image}[{text}]({target.removeprefix('docs/')}{anchor})"
        return text

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*|)\)", link, markdown)


def on_files(files, config):
    """Add the documents outside `docs/`."""
    for document, page in OUTSIDE.items():
        text = (ROOT / document).read_text()
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Set the links of a page."""
    outside = {page: document for document, page in OUTSIDE.items()}
    return relinked(markdown, outside.get(page.file.src_uri, f"docs/{page.file.src_uri}"))


def on_page_content(html, page, config, files):
    """Leave out Sphinx's role names, which stand before code in docstrings."""
    return re.sub(r":(?:attr|class|data|func|meth|mod|obj):(?=<code>)", "", html)
