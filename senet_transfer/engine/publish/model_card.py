"""Model cards: descriptions of published models in Markdown."""

import html
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from senet_transfer import __version__
from senet_transfer.config import is_classification
from senet_transfer.config.architectures import OBJECTS, predicts
from senet_transfer.engine.publish.contents import Contents, changed_items, read_json
from senet_transfer.engine.results import metric_texts, metrics
from senet_transfer.errors import UserError
from senet_transfer.models.build import backbone_name
from senet_transfer.utils.hashing import file_sha256
from senet_transfer.utils.text import first_of, mean_text, shown

_CLASSES = 100
_LIMITS = {
    "classes": "The model assigns every image to one of the classes below, even if it shows none "
    "of them. Its probabilities are not calibrated. Expect more errors for images that differ from "
    "the training data.",
    "objects": "The model detects only objects of the classes below. Its scores are not "
    "calibrated. Expect more errors for images that differ from the training data.",
}


@dataclass(frozen=True)
class Card:
    """Information for a model card that can't be read from the model itself.

    Attributes:
        name: Name or path for loading the model, such as "hf-hub:owner/name".
        title: Title of the card; default: the last part of the name.
        licence: Licence of the weights; empty if unspecified.
        data: Names of the training data; empty if unspecified.
        use: Intended use; empty if unspecified.
        runs: Records of all runs with the same config, one per seed; see :func:`read_runs`.
        evaluate: If True, the weight file is evaluated on the run's ``DATASETS.TEST``.
        opts: Config options for the evaluation, such as local datasets.
    """

    name: str
    title: str = ""
    licence: str = ""
    data: Sequence[str] = ()
    use: str = ""
    runs: Sequence[dict[str, Any]] = ()
    evaluate: bool = False
    opts: Sequence[str] = ()

    def of_file(self, contents: Contents, weights: Path) -> str:
        """Return the model card for a weight file, in Markdown. Unknown facts are omitted."""
        from huggingface_hub import ModelCardData

        cfg = contents.cfg
        evaluated = contents.evaluate(weights, self.opts) if self.evaluate else {}
        header = ModelCardData(
            library_name="senet_transfer",
            license=self.licence or None,
            datasets=list(self.data) or None,
            pipeline_tag=_task(cfg),
            tags=["senet_transfer", "detectron2", "pytorch"],
        )
        recipe = [
            (f"`{key}`", f"`{value}`")
            for key, value in changed_items(cfg).items()
            if key.startswith(("SOLVER.", "INPUT.", "MODEL.SE.", "SEED"))
        ]
        limits = _LIMITS["classes" if is_classification(cfg) else "objects"]
        sections = {
            "Use": "```python\nimport senet_transfer\n\n"
            f'predictor = senet_transfer.load("{self.name}")\nprint(predictor("photo.jpg"))\n```'
            f"\n\n```sh\nsenet predict --weights {self.name} --input photo.jpg\n```",
            "Intended use and limits": f"{self.use} {limits}".strip(),
            "Training": _table(("config key", "value"), recipe),
            "Results": self._results(contents, evaluated),
            "File": _table(("property", "value"), _file_rows(contents, weights)),
            "Classes": first_of(map(_escaped, [*cfg.DATASETS.CLASSES, *_stuff(cfg)]), _CLASSES),
        }
        parts = [
            f"---\n{header.to_yaml()}\n---\n\n# {self.title or self.name.rpartition('/')[2]}",
            f"This model card was written by `senet push` (senet_transfer {__version__}).",
            _table(("property", "value"), _properties(contents, self.data)),
            *(f"## {title}\n\n{text}" for title, text in sections.items() if text),
        ]
        return "\n\n".join(parts) + "\n"

    def _results(self, contents: Contents, evaluated: dict[str, Any]) -> str:
        """Return a table of metrics for the weight file, its run, and the runs with all seeds."""
        run = {key: value for key, value in contents.results.items() if key != "training"}
        columns = {
            "this file": _texts(evaluated),
            "this run": _texts(run),
            f"all runs ({len(self.runs)} seeds)": _over_runs(self.runs),
        }
        columns = {title: texts for title, texts in columns.items() if texts}
        if not columns:
            return ""
        tested = first_of((_escaped(data) for data in contents.cfg.DATASETS.TEST), 4)
        rows = (
            (name, *(texts.get(name, "-") for texts in columns.values()))
            for name in dict.fromkeys(name for texts in columns.values() for name in texts)
        )
        text = f"Evaluation data: {tested or 'unknown'}.\n\n{_table(('metric', *columns), rows)}"
        return "\n\n".join([text, *_provenance(contents, self.runs)])


def _provenance(contents: Contents, runs: Sequence[dict[str, Any]]) -> Iterable[str]:
    """Yield a description of all training runs of the published model's config, in Markdown."""
    if not runs:
        return
    seeds = first_of(str(run.get("seed", "unknown")) for run in runs)
    command = runs[0].get("command", "unknown")
    if len(runs) == 1:
        yield f"The model was trained with `{command}` (seed {seeds})."
    else:
        yield (
            f"The model was trained in {len(runs)} separate runs, with the seeds {seeds}. "
            f"The first run was started with `{command}`."
        )
    for run in runs:
        if run.get("weights_sha256") == contents.sha256:
            yield f"The weights are from the run with seed {run['seed']}."
    machines = dict.fromkeys(
        ", ".join(f"{key}: {value}" for key, value in run["machine"].items())
        for run in runs
        if isinstance(run.get("machine"), dict)
    )
    commits = dict.fromkeys(str(run.get("commit", "unknown")) for run in runs)
    yield _table(
        ("training environment", "value"),
        (
            ("machine", first_of(map(_escaped, machines)) or "unknown"),
            ("commit of the code", first_of(map(_escaped, commits))),
        ),
    )


def read_runs(folder: str | Path) -> list[dict[str, Any]]:
    """Read the records ``seed<N>.json`` of one config's runs, sorted by seed.

    Raises:
        UserError: If there are no records, or a record is invalid.
    """
    files = sorted(Path(folder).glob("seed*.json"), key=lambda path: (len(path.name), path.name))
    if not files:
        raise UserError(f"{folder} contains no run records (seed<N>.json). Check the path.")
    records = [read_json(path, "Write the record for this run again.") for path in files]
    for path, record in zip(files, records, strict=True):
        if not isinstance(record, dict) or not isinstance(record.get("metrics"), dict):
            raise UserError(f"{path} has no metrics; expected a dictionary under the key metrics.")
    return records


def _over_runs(runs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the mean and standard deviation of each metric that all runs have."""
    found = [metrics(run["metrics"]) for run in runs]
    names = _texts(runs[0]["metrics"]) if runs else {}
    return {
        name: mean_text(values)
        for name in names
        if len(values := [one[name] for one in found if name in one]) == len(found)
    }


def _texts(results: dict[str, Any]) -> dict[str, str]:
    """Return metrics as text by name, without per-class metrics and image counts."""
    names = (name for name in metric_texts(results) if not name.endswith("/images"))
    found = metrics(results)
    return {name: "-" if math.isnan(found[name]) else f"{found[name]:.2f}" for name in names}


def _task(cfg: CfgNode) -> str:
    """Return the Hugging Face Hub's name for the model's task."""
    if is_classification(cfg):
        return "image-classification"
    if predicts(cfg) == {OBJECTS} and cfg.MODEL.KEYPOINT_ON:
        return "keypoint-detection"
    if predicts(cfg) == {OBJECTS} and not cfg.MODEL.MASK_ON:
        return "object-detection"
    return "image-segmentation"


def _properties(contents: Contents, data: Sequence[str]) -> Iterable[tuple[str, str]]:
    cfg, metadata = contents.cfg, contents.metadata
    image = metadata["preprocessing"]
    yield "model", f"{cfg.MODEL.META_ARCHITECTURE} with backbone {backbone_name(cfg)}"
    if data:
        yield "training data", first_of(map(_escaped, data))
    if origin := metadata["source"]:
        label = "initial weights" if contents.family == "senet_transfer" else "converted from"
        yield label, f"{_escaped(origin['file'])} (family {_escaped(origin['family'])})"
    mean, std = (", ".join(f"{value:g}" for value in image[key]) for key in ("mean", "std"))
    yield "input", f"{image['format']}, mean {mean}, std {std} (for pixel values from 0 to 255)"
    if is_classification(cfg):
        yield (
            "resize",
            f"shorter side {image['resize']} ({image['interpolation']}), crop {image['crop']}",
        )
    else:
        limits = f"shorter side {cfg.INPUT.MIN_SIZE_TEST}, at most {cfg.INPUT.MAX_SIZE_TEST}"
        yield "resize", limits


def _file_rows(contents: Contents, weights: Path) -> Iterable[tuple[str, str]]:
    kinds = Counter(str(t.dtype).removeprefix("torch.") for t in contents.tensors.values())
    yield "size", f"{weights.stat().st_size:,} bytes"
    yield "tensors", ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    yield "SHA-256", f"`{file_sha256(weights)}`"


def _stuff(cfg: CfgNode) -> list[str]:
    return [name for name in cfg.DATASETS.STUFF_CLASSES if name not in cfg.DATASETS.CLASSES]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, or "" if it has no rows."""
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) if len(lines) > 2 else ""


def _escaped(text: object) -> str:
    """Escape a name so that it does not affect the layout in Markdown."""
    words = html.escape(shown(text, 200), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|#" else c for c in words)
