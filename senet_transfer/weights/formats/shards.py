"""Index files that list the shards of a model, as written by huggingface_hub."""

import json
import re
from pathlib import Path

from senet_transfer.errors import UserError
from senet_transfer.utils.text import first_of, shown

_MAX_INDEX = 2**24
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def shard_files(path: Path) -> dict[Path, set[str]]:
    """Return the shards listed in an index file, with the names of each shard's tensors.

    Raises:
        UserError: If the shards are missing or are not safetensors files.
        ValueError: If the index is malformed.
    """
    if path.stat().st_size > _MAX_INDEX:
        raise ValueError("the index is far larger than that of any model")
    content = json.loads(path.read_bytes())
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(
            f"{path} is a JSON file without a weight_map; expected the index of a sharded model, "
            "such as model.safetensors.index.json. Check the path."
        )
    files: dict[Path, set[str]] = {}
    for name, file in names.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file:
            raise ValueError(f"the file listed for {shown(name)} is not in the folder of the index")
        files.setdefault(path.parent / file, set()).add(name)
    other = [file.name for file in files if file.suffix != ".safetensors"]
    if other:
        raise UserError(
            f"{path} lists files that are not safetensors files ({first_of(other, 4)}). Use the "
            "index for the safetensors files, or save the model again as a single file."
        )
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{path} lists files that are missing from its folder: {first_of(missing, 4)}. "
            "Download these files, too."
        )
    return files


def check_not_a_shard(path: Path) -> None:
    """Raise a UserError if a file is one of several shards and contains only part of a network."""
    match = _SHARD.fullmatch(path.name)
    if match and int(match[3]) > 1:
        index = path.with_name(f"{match[1]}.safetensors.index.json")
        if index.is_file():
            raise UserError(
                f"{path} contains only part of a network, which is split into {int(match[3])} "
                f"files. Use the index that lists all files: {index}."
            )
