"""MkDocs hooks that add documents outside `docs/` to the website and rewrite their links.

Documents link to each other by relative paths in the repository, which work on GitHub. The hooks
replace each of these paths with the path of the corresponding page on the website. Links to files
without a page become plain text.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Documents outside docs/, with their pages on the site.
OUTSIDE = {
    "README.md": "index.md",
    "datasets/README.md": "datasets.md",
    "configs/README.md": "configs.md",
    "tools/README.md": "tools.md",
    "senet_transfer/pretrained/README.md": "pretrained.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
# The model cards.
for _card in sorted((ROOT / "senet_transfer" / "pretrained").glob("*.md")):
    OUTSIDE.setdefault(f"senet_transfer/pretrained/{_card.name}", f"pretrained/{_card.name}")


def relinked(markdown: str, document: str) -> str:
    """Return the text of a document with its links rewritten for the website.

    Args:
        markdown: Text of the document.
        document: Path of the document in the repository.
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
    """Add the documents outside `docs/`, such as README.md, to the website."""
    for document, page in OUTSIDE.items():
        text = (ROOT / document).read_text()
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite the links of a page for the website; see :func:`relinked`."""
    outside = {page: document for document, page in OUTSIDE.items()}
    return relinked(markdown, outside.get(page.file.src_uri, f"docs/{page.file.src_uri}"))


def on_page_content(html, page, config, files):
    """Remove Sphinx roles, such as `:func:`, and shorten `~module.name` to `name`."""
    html = re.sub(r":(?:attr|class|data|func|meth|mod|obj):(?=<code>)", "", html)
    return re.sub(r"<code>~[\w.]*?(\w+)</code>", r"<code>\1</code>", html)
