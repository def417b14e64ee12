"""Functions that add trained models to this package.

See :mod:`senet_transfer.weights.hub.bundled` for the files of a model.
"""

import os
import re
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from senet_transfer.engine.publish.contents import changed_items, contents_of
from senet_transfer.engine.publish.model_card import Card
from senet_transfer.errors import UserError
from senet_transfer.utils.hashing import file_sha256
from senet_transfer.weights.hub.bundled import MAX_BYTES, PUBLISHER, bundled_files, stated_metadata
from senet_transfer.weights.save import write_own

USE = (
    "The model is intended for trying this package without a download, for comparing networks with "
    "and without SE, and for initialising other models. It was trained on a small research dataset "
    "and has not been tested for any other use."
)


def bundle(
    source: str | os.PathLike[str],
    name: str,
    folder: Path,
    *,
    config_file: str = "",
    half: bool = False,
    **statements: Any,
) -> Path:
    """Write a model to this package's weights folder. Existing files of this model are replaced.

    The files are ``NAME-HASH.safetensors``, ``NAME.yaml`` and ``NAME.md``. The same model
    and arguments always result in the same weight file and hash.

    Args:
        source: The model; see :func:`~senet_transfer.engine.publish.push.push`.
        name: The name under which the model is loaded, "senet_transfer/NAME".
        folder: The folder to write to.
        config_file: The config of a weight file; see :func:`senet_transfer.load`.
        half: If True, store tensors with two or more dimensions in float16.
        **statements: Fields of :class:`~senet_transfer.engine.publish.model_card.Card`.

    Returns:
        The path of the weight file.

    Raises:
        UserError: If the name is malformed, the model can't be loaded, the weights in the folder
            would exceed ``MAX_BYTES``, or a file can't be written.
    """
    short = name.removeprefix(f"{PUBLISHER}/")
    if not re.fullmatch(rf"{PUBLISHER}/\w+", name):
        raise UserError(
            f"{name} is not a valid name for weights in this package; expected {PUBLISHER}/NAME, "
            "with letters, digits and underscores."
        )
    contents = contents_of(source, config_file, half=half)
    stated: dict[str, Any] = {k: v for k, v in statements.items() if k in ("licence", "data")}
    new = folder / f"{short}.safetensors"
    write_own(new, contents.tensors, {**contents.metadata, **stated})
    try:
        others = {key: path for key, (path, _) in bundled_files(folder).items() if key != short}
        total = sum(path.stat().st_size for path in (new, *others.values()))
        if total > MAX_BYTES:
            raise UserError(
                f"With {name}, the weights in {folder} take up {total:,} bytes; expected at most "
                f"{MAX_BYTES:,}. Remove a network, or choose a smaller one."
            )
        path = new.with_name(f"{short}-{file_sha256(new)[:8]}.safetensors")
        card = Card(name, use=USE, **statements).of_file(contents, new)
        for old in folder.glob(f"{short}-*.safetensors"):
            old.unlink()
        new.rename(path)
        path.with_name(f"{short}.yaml").write_text(_changes(contents.cfg), encoding="utf-8")
        path.with_name(f"{short}.md").write_text(card, encoding="utf-8")
        (folder / "README.md").write_text(index(folder), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} can't be written: {error}. Choose a different path.") from error
    finally:
        new.unlink(missing_ok=True)
    return path


def _changes(cfg: CfgNode) -> str:
    """Return ``VERSION`` and the config values that differ from the defaults, as YAML."""
    tree = CfgNode()
    for key, value in {"VERSION": cfg.VERSION, **changed_items(cfg)}.items():
        node = tree
        *parts, leaf = key.split(".")
        for part in parts:
            node = node.setdefault(part, CfgNode())
        node[leaf] = value
    return str(tree.dump())


def index(folder: Path) -> str:
    """Return the README.md text for a weights folder, with a table of the folder's networks."""
    lines = [
        "# Weights in this package",
        "",
        "`senet push --bundle` writes the files in this folder, including this README. The",
        "networks are loaded without a download. To load a network, pass its name as `--weights`,",
        "or set `MODEL.WEIGHTS` to the name.",
        "",
    ]
    if not bundled_files(folder):
        return "\n".join([*lines, "There are no networks yet."]) + "\n"
    lines += [
        "| name, with its model card | training data | licence | size | SHA-256 |",
        "|---|---|---|---|---|",
    ]
    for name, (path, sha256) in bundled_files(folder).items():
        stated = stated_metadata(path)
        size = f"{path.stat().st_size / 1e6:.2f} MB"
        data = ", ".join(stated.get("data", ()))
        link = f"[`{PUBLISHER}/{name}`]({name}.md)"
        lines.append(f"| {link} | {data} | {stated.get('licence', '')} | {size} | `{sha256}...` |")
    return "\n".join(lines) + "\n"
