"""Compact records of finished training runs, for version control.

``<folder>/<config>/seed<N>.json`` contains a run's metrics, training settings and command.
``seed<N>.csv`` contains the training loss and the evaluation results during training.
"""

import csv
import hashlib
import io
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from senet_transfer.analysis.repeated_runs import ORIGIN, Run, finished, initial_weights
from senet_transfer.analysis.report.run_folder import Run as RunFolder
from senet_transfer.analysis.report.run_folder import data_label, load_run
from senet_transfer.config import is_classification
from senet_transfer.config.load import load_config
from senet_transfer.data.build import find_dataset
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.engine.publish.contents import changed_items
from senet_transfer.engine.results import metrics, write_results
from senet_transfer.engine.train import evaluated_file
from senet_transfer.errors import UserError
from senet_transfer.models.build import backbone_name
from senet_transfer.utils.atomic_io import atomic_path
from senet_transfer.utils.environment import origin
from senet_transfer.utils.hashing import file_sha256
from senet_transfer.utils.text import first_of
from senet_transfer.weights.file_geometry import local_weights

# Display names of datasets. Other datasets are shown with their names in the config.
_DATA = {
    "shapes_val": "rendered shapes",
    "bccd_test": "BCCD, photographs of blood cells",
    "cifar10_test": "CIFAR-10",
    "cifar100_test": "CIFAR-100",
    "cifar10_jpeg": "CIFAR-10 recompressed as JPEG",
    "cifar10_jpeg/test": "CIFAR-10 recompressed as JPEG, enlarged to 64 pixels",
    "coco_2017_val": "COCO minival",
}
# Options that affect the speed of a run, but not its results.
_SPEED = {"SOLVER.COMPILE", "DATALOADER.NUM_WORKERS", "MODEL.DEVICE"}
_MOST_ROWS = 32
# Keys of a record that appear in the result tables or identify the run.
_KEYS = ("config", "options", "seed", "network", "data", "metric", "metrics", "training", "machine")


def write_record(run: Run, folder: str | Path) -> Path:
    """Write the record of a finished run. An existing record of the same run is not overwritten.

    Args:
        run: The run.
        folder: The parent folder of all records.

    Returns:
        The path of the record.

    Raises:
        UserError: If the run is not finished or has several test sets, or if the folder contains
            records of this config with different options.
    """
    config = Path(run.config_file).stem
    cfg = load_config(run.config_file, run.options)
    path = Path(folder) / config / f"seed{cfg.SEED}.json"
    record = _record(run, config, cfg)
    for other in sorted(path.parent.glob("seed*.json")):
        found = read_record(other)
        if difference := _difference(found, record, steps=not cfg.TEST.PATIENCE):
            raise UserError(
                f"{other} is the record of a run with different {difference}: "
                f"{found.get(difference)}; expected {record[difference]}, as in the new run. Write "
                "the records to a different folder, or delete this record."
            )
        if other == path and found["weights_sha256"] == record["weights_sha256"]:
            return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path.with_suffix(".csv")) as partial:
        Path(partial).write_text(_curve(load_run(run.output_dir), record["metric"]))
    write_results(path, record)
    return path


def write_probe_record(
    probe: dict[str, Any], path: str | Path, *, words: Sequence[str], data: str, seed: int
) -> None:
    """Write the record of a linear probe.

    Args:
        probe: The results of :func:`senet_transfer.engine.little_data.probe.run_probe`.
        path: The record to write, such as ``results/probe_cifar10_64px_r18/seed0.json``.
        words: The command line, split into words, which is stored in the record.
        data: The evaluation data, as on the command line.
        seed: The seed for choosing the held-out images.
    """
    path = Path(path)
    name = probe["model"].removeprefix("se_").replace("resnet", "ResNet-")
    record = {
        "config": path.parent.name,
        "options": [],
        "seed": seed,
        "network": f"{name}, linear probe",
        "data": _data(data, probe["images"]),
        "metric": "classification/top1_error",
        "metrics": {f"classification/{key}": probe[key] for key in ("top1_error", "top5_error")}
        | {"neighbours/top1_error": probe["neighbours"]["top1_error"]},
        "training": {
            "images": probe["train_images"],
            "minutes": round(sum(probe["seconds"].values()) / 60, 2),
        },
        **origin(),
        "command": " ".join(map(_quoted, ["senet", "probe", *words])),
        "weights_sha256": file_sha256(local_weights(probe["weights"])[0]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_results(path, record)


def write_gates_record(
    counts: Sequence[tuple[str, int]], path: str | Path, *, words: Sequence[str], weights: str
) -> None:
    """Write a record of a gate analysis: command, machine, and number of images per class.

    Args:
        counts: Name and number of images of each class.
        path: The file to write, such as ``results/gates/cifar10.json``.
        words: The arguments of ``senet gates``. The complete command is stored in the record.
        weights: The value of ``--weights``. The SHA-256 of this file is stored in the record.
    """
    record = {
        "command": " ".join(map(_quoted, ["senet", "gates", *words])),
        "images": dict(counts),
        "weights_sha256": file_sha256(local_weights(weights)[0]),
        **origin(),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_results(path, record)


def read_record(path: Path) -> dict[str, Any]:
    """Read the JSON record of a training run or of a linear probe.

    Raises:
        UserError: If the file can't be read, or does not contain a complete record.
    """
    try:
        record = json.loads(path.read_text())
        missing = [key for key in _KEYS if key not in record]
        if missing or record["metric"] not in record["metrics"]:
            raise ValueError(f"it doesn't contain {first_of(missing) or record['metric']}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a record of a run: {error}. Delete it.") from error
    return dict(record)


def _difference(found: dict[str, Any], record: dict[str, Any], *, steps: bool) -> str:
    """Return the first training setting in which two records differ, ignoring the seed.

    Return "" if they don't differ.
    """
    if unlike := training_difference([found], [record], steps=steps):
        return unlike
    keys = ("settings", "initial_weights_sha256")
    return next((key for key in keys if found.get(key) != record.get(key)), "")


def training_difference(
    found: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], *, steps: bool = True
) -> str:
    """Return the first key in which two networks' training settings differ.

    Return "" if they don't differ.

    Args:
        found: The records of one network.
        others: The records of the other network.
        steps: If False, the number of steps may differ, as with early stopping.
    """

    def options(one: dict[str, Any]) -> dict[str, str]:
        pairs = zip(one["options"][::2], one["options"][1::2], strict=True)
        return {key: value for key, value in pairs if key not in _SPEED}

    for key in ("data", "metric"):
        if found[0][key] != others[0][key]:
            return key
    if options(found[0]) != options(others[0]):
        return "options"
    sizes = [one["training"].get("images_per_step") for one in (found[0], others[0])]
    lengths = [{one["training"].get("steps") for one in some} for some in (found, others)]
    # With early stopping, the number of steps differs between runs.
    same = not steps or lengths[0] == lengths[1] or max(map(len, lengths)) > 1
    return "" if sizes[0] == sizes[1] and same else "training"


def _settings(cfg: CfgNode) -> str:
    """Return a hash of all settings that determine a run's result, except for the seed."""
    own = (*_SPEED, "SEED", "OUTPUT_DIR")
    if "se" not in backbone_name(cfg).split("_"):
        own += ("MODEL.SE.",)
    changed = {key: value for key, value in changed_items(cfg).items() if not key.startswith(own)}
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:16]


def _record(run: Run, config: str, cfg: CfgNode) -> dict[str, Any]:
    results = finished(run.output_dir)
    if results is None:
        raise UserError(f"The run in {run.output_dir} is not finished. Finish it first.")
    if len(cfg.DATASETS.TEST) != 1:
        raise UserError(
            f"DATASETS.TEST of {config} is {cfg.DATASETS.TEST}; expected a single dataset, because "
            "--results records the metrics of only one dataset. Remove --results."
        )
    folder = load_run(run.output_dir)
    tested = cfg.DATASETS.TEST[0]
    pairs = zip(run.options[::2], run.options[1::2], strict=True)
    options = [word for pair in pairs if pair[0] != "SEED" for word in pair]
    command = ["senet", "train", "--config-file", config, *options, "SEED", str(cfg.SEED)]
    task, value = ("classification", "top1_error") if is_classification(cfg) else ("bbox", "AP")
    found = metrics({k: v for k, v in results.items() if k != "training"})
    if f"{task}/{value}" not in found:
        raise UserError(
            f"The run in {run.output_dir} has no finite value of {task}/{value}, so it can't be "
            "recorded. See the cause in its log.txt, and repeat the run in an empty folder."
        )
    begun, on_gpu = run.output_dir / ORIGIN, cfg.MODEL.DEVICE != "cpu"
    return {
        "config": config,
        "options": options,
        "settings": _settings(cfg),
        "initial_weights_sha256": initial_weights(run.output_dir),
        "seed": cfg.SEED,
        "network": _network(cfg),
        "data": _data(tested, results.get(task, {}).get("images")),
        "metric": f"{task}/{value}",
        "metrics": found,
        "training": {
            "steps": results["training"]["iterations"],
            "images_per_step": cfg.SOLVER.IMS_PER_BATCH,
            "minutes": None if folder.seconds is None else round(folder.seconds / 60, 2),
        },
        **(json.loads(begun.read_text()) if begun.is_file() else origin(on_gpu=on_gpu)),
        "command": " ".join(map(_quoted, command)),
        "weights_sha256": file_sha256(run.output_dir / evaluated_file(cfg)),
    }


def _quoted(word: str) -> str:
    """Quote a word for a shell.

    Double quotes are preferred because options can contain single quotes.
    """
    quoted = shlex.quote(word)
    return quoted if quoted == word or re.search(r'["$`\\]', word) else f'"{word}"'


def _data(tested: str, images: float | None) -> str:
    """Return the display name of a dataset, given its name or path."""
    if tested.endswith("places365/val"):
        if images == 36_500:
            return "Places365"
        labels = open_dataset(find_dataset(tested)).labels()
        return f"{len(set(labels))} of 365 classes of Places365, {len(labels):,} images"
    return _DATA.get(tested, data_label(tested))


def _network(cfg: CfgNode) -> str:
    """Return the network's name without "SE", such as "Faster R-CNN, ResNet-18 FPN"."""
    name = backbone_name(cfg).removeprefix("se_").removeprefix("cifar_")
    name = re.sub(r"^resnet", "ResNet-", name)
    if is_classification(cfg):
        return name
    narrow = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
    widths = {16: "a quarter of the width", 32: "half the width"}
    suffix = f", {widths[narrow]}" if narrow in widths else ""
    return f"Faster R-CNN, {name} FPN{suffix}"


def _curve(folder: RunFolder, metric: str) -> str:
    """Return the training loss and a metric as CSV, subsampled to a few dozen rows."""
    rows: dict[int, list[Any]] = {}
    for column, name in ((1, "total_loss"), (2, metric)):
        points = folder.curves.get(name, [])
        step = max(-(-len(points) // _MOST_ROWS), 1)
        for iteration, value in points[::-1][::step]:  # keep the last one
            rows.setdefault(iteration, [iteration, "", ""])[column] = f"{value:.5g}"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([["iteration", "total_loss", metric], *(rows[key] for key in sorted(rows))])
    return text.getvalue()
