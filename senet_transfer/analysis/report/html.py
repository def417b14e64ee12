"""Writer for self-contained HTML pages with embedded styles, scripts and images."""

import datetime
import socket
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from senet_transfer.errors import UserError
from senet_transfer.utils.atomic_io import atomic_file, nonfinite_to_null

_PACKAGE = "senet_transfer.analysis.report"


def write_html(output: Path, template: str, *, data: dict[str, Any], **values: Any) -> None:
    """Render a template, and write the page atomically.

    In file names that are not valid UTF-8, invalid bytes are written as question marks.

    Args:
        output: The HTML file.
        template: Name of a template in ``assets/``, which extends ``base.html``.
        data: The data for the scripts, which is embedded as JSON.
        values: The values for the template; text is escaped.

    Raises:
        UserError: If the file can't be written.
    """
    environment = Environment(
        loader=PackageLoader(_PACKAGE, "assets"), autoescape=True, undefined=StrictUndefined
    )
    html = environment.get_template(template).render(
        made=f"{datetime.datetime.now():%Y-%m-%d %H:%M} on {socket.gethostname()}",
        asset=lambda name: resources.files(_PACKAGE).joinpath("assets", name).read_text(),
        data=nonfinite_to_null(data),
        **values,
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(output) as stream:
            stream.write(html.encode(errors="replace"))
    except OSError as error:
        raise UserError(
            f"The page {output} can't be written: {error}. Choose a different path."
        ) from error
