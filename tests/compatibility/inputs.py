"""Inputs shared by the compatibility fixtures and their tests; identical on every machine."""

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).resolve().parents[2]

# Options of create_classifier for the narrow SE-ResNet-50 in fixtures/weights.
NARROW = {"stem_out_channels": 4, "res2_out_channels": 8, "width_per_group": 1, "se_ratio": 4}

# Modules without an `__all__` whose public names must remain importable.
WITHOUT_ALL = ("config", "data.coco", "errors", "preprocessing")
DOCUMENTS = ("README", "CONTRIBUTING", "tools/README", "datasets/README", "configs/README")


def draw_images(folder: Path, *, classes: int = 3, images: int = 8) -> None:
    """Write 32x32 images to ``folder/train`` and ``folder/val``, one folder per class.

    Each class has its own colour, with noise. ``RandomState`` gives the same numbers in all
    versions of NumPy.
    """
    for split, seed in (("train", 1), ("val", 2)):
        numbers = np.random.RandomState(seed)
        for label in range(classes):
            place = folder / split / f"class_{label}"
            place.mkdir(parents=True)
            for index in range(images):
                pixels = numbers.randint(0, 160, size=(32, 32, 3))
                pixels[..., label] += 90
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{index}.png")


def draw_pixels() -> np.ndarray:
    """Return a float32 batch ``(2, 3, 64, 64)`` of RGB images with values from 0 to 255."""
    return np.random.RandomState(3).randint(0, 256, size=(2, 3, 64, 64)).astype(np.float32)


def flatten(values: dict, prefix: str = "") -> dict[str, object]:
    """Flatten a nested config to keys such as ``SOLVER.BASE_LR``, and convert tuples to lists."""
    found: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = _plain(value)
    return found


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def parse_options(text: str) -> dict[str, str]:
    """Map each option in a ``--help`` text to its metavar.

    Positional arguments are included; their names are used as both key and value. Python 3.13
    prints the metavar of ``-s, --long VALUE`` once; earlier versions print it twice.
    """
    found = {}
    section = re.search(r"^positional arguments:\n(.*?)^\S", f"{text}\nend", re.M | re.S)
    for name in re.findall(r"^  (\S+)", section[1] if section else "", re.M):
        found[name] = name
    for line in re.findall(r"^  (-\S.*)$", text, re.M):
        parts = [part.partition(" ")[::2] for part in line.split("  ")[0].split(", ")]
        found |= {option: parts[-1][1] for option, _ in parts}
    return found


def tensor_sums(tensors: dict) -> dict[str, list[float]]:
    """Return the sum and the sum of absolute values of each tensor, computed in float64."""
    return {
        name: [float(tensor.double().sum()), float(tensor.double().abs().sum())]
        for name, tensor in tensors.items()
    }


def last_metrics(run: Path) -> dict[str, float]:
    """Return the last value of each metric in a run's ``metrics.json``."""
    metrics: dict[str, float] = {}
    for line in (run / "metrics.json").read_text().splitlines():
        metrics |= json.loads(line)
    return metrics
