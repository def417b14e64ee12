"""Shell commands in the documentation, and rules that shorten them for tests on a CPU."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from senet_transfer.config.load import load_config
from senet_transfer.weights.hub.catalogue import load_catalogue

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md"), *ROOT.glob("docs/**/*.md"))
}
PROGRAMS = ("python", "torchrun", "make", "pip", "source", "bash", "git", "senet", "senet-train",
            "senet-predict", "senet-eval-places365", "install_detectron2.py", "detect_onnx.py",
            "ovc", "benchmark_app", "trtexec", "results/run.sh")  # fmt: skip

_CODE = re.compile(r"^```(\w*)\n(.*?)^```$|(?<!`)`([^`]+)`(?!`)", re.M | re.S)

COMMAND_NAME = r"senet (?!env)(data )?\w+"

# Commands that test_documented_commands.py parses but does not run, with the reason.
NOT_RUN = {
    r"source .venv/bin/activate": "the tests put their own Python first in PATH",
    r"make setup.*|install_detectron2\.py": "installs; test_installation.py does",
    r"pip (install|wheel).*": "installs; test_packaging.py does",
    r"detect_onnx\.py.*": "belongs to the wheel; test_packaging.py runs it",
    r"make (test(-fast|-narrow|-slow|-faults|-gpu)?|lint)": "runs the tests, or checks all files",
    r"make docs": "builds the site; test_site.py does",
    r"make bench": "takes 15 minutes; test_benchmark.py measures every part",
    r"(ovc|benchmark_app|trtexec) .*": "belongs to OpenVINO or TensorRT, which is not installed",
    r"python tools/export\.py .* --compile": "compiles for minutes; test_export.py does",
    r"python tools/benchmark\.py gpu.*": "needs a GPU; test_benchmark_gpu.py runs all its code",
    r"senet (push|predict --weights hf-hub:).*": "needs the Hub; test_hub.py imitates its server",
    r"senet predict --weights COCO-.*": "downloads a detector; test_load.py imitates the server",
    COMMAND_NAME: "is a command's name, without its required arguments",
    r"python .* configs/keypoint_rcnn.*": "needs COCO's keypoints; test_instant.py uses shapes",
    r"senet train --config-file lazy.py.*": "needs COCO; test_lazy_config.py trains on shapes",
    r"results/run\.sh .*": "trains for hours; test_records.py checks the configs and options",
    r"python tools/train_net\.py --config-file configs/(bccd|transfer|cifar10_64px)_\w+\.yaml": (
        "needs BCCD or CIFAR-10 as JPEG; test_instant.py runs the smoke-test config"
    ),
    r"python tools/benchmark/gpu_archive\.py|bash run\.sh .*": "downloads; needs a GPU",
}


@dataclass(frozen=True)
class Rule:
    """Rule that changes commands that would take too long or need missing files.

    Attributes:
        why: Reason why the commands can't be run unchanged.
        apply: Function that takes the words of a command line and returns the words to run instead.
    """

    why: str
    apply: Callable[[list[str]], list[str]]


def _replaced(pattern: str, by: str) -> Callable[[list[str]], list[str]]:
    return lambda words: shlex.split(re.sub(pattern, by, shlex.join(words)))


_TRAINS = ("tools/train_net.py", "tools/run_seeds.py", "tools/ablation.py", "senet-train")


def _instant(words: list[str]) -> list[str]:
    """Replace a recipe with its smoke-test config, but keep its datasets and output folder."""
    trains = {*_TRAINS} & {*words} or words[:2] == ["senet", "train"]
    if not trains or "--config-file" not in words:
        return words
    place = words.index("--config-file") + 1
    stem = words[place].removeprefix("configs/").removesuffix(".yaml")
    recipe = ROOT / "configs" / f"{stem}.yaml"
    if stem.startswith("instant/") or not recipe.is_file():
        return words
    cfg = load_config(str(recipe))
    words = [*words]
    words[place] = words[place].replace(stem, f"instant/{stem}")
    own = {"DATASETS.TRAIN": cfg.DATASETS.TRAIN, "DATASETS.TEST": cfg.DATASETS.TEST}
    if "tools/train_net.py" in words or words[0] in ("senet", "senet-train"):
        own["OUTPUT_DIR"] = cfg.OUTPUT_DIR
    for key, value in own.items():
        words += [] if key in words else [key, str(value)]
    return words


def _overwriting(words: list[str]) -> list[str]:
    """Add ``--overwrite`` to training commands, because several use the same output folder."""
    flags = {"--resume", "--eval-only", "--overwrite"}
    trains = {"tools/train_net.py", "senet-train"} & set(words) or words[:2] == ["senet", "train"]
    if not trains or flags & set(words):
        return words
    place = words.index("--data" if "--data" in words else "--config-file")
    return [*words[:place], "--overwrite", *words[place:]]


def _short_recipe(words: list[str]) -> list[str]:
    """Shorten a `senet train --data` command: one iteration on small images, from scratch."""
    short = {"SOLVER.MAX_ITER": "1", "SOLVER.IMS_PER_BATCH": "2", "MODEL.WEIGHTS": "",
             "INPUT.MIN_SIZE_TRAIN": "(96,)", "INPUT.MIN_SIZE_TEST": "96"}  # fmt: skip
    pairs = [word for key, value in short.items() if key not in words for word in (key, value)]
    return [*words, *pairs] if words[:2] == ["senet", "train"] and "--data" in words else words


def _published(words: list[str]) -> list[str]:
    return [
        f"published/{load_catalogue()[word].file}"
        if word in load_catalogue()
        and load_catalogue()[word].sha256
        and not load_catalogue()[word].folder
        else word
        for word in words
    ]


RULES = (
    Rule("a recipe's smoke-test config takes seconds", _instant),
    Rule("the commands of a document train in the same folder", _overwriting),
    Rule("a recipe for data takes an hour on a CPU, and downloads weights", _short_recipe),
    Rule("one core can run one process",
         _replaced(r"(--num-gpus|--nproc-per-node|--workers) \d+", r"\1 1")),
    Rule("one seed takes the same path as all", _replaced(r"--seeds( \d+)+", "--seeds 0")),
    Rule("two small scales take the same path as three",
         _replaced(r"--scales( \d+)+", "--scales 96 104")),
    Rule("two folds take the same path as five", _replaced(r"--folds 5", "--folds 2")),
    Rule("published weights can't be imitated: their name has their hash", _published),
    Rule("nothing is downloaded in the sandbox",
         _replaced(r"--download (cifar10)", r"--source cifar-10-python.tar.gz --output \1")),
    Rule("the sandbox's archive is not the official one",
         _replaced(r"(datasets/prepare_cifar.py)", r"\1 --any-checksum")),
    Rule("one part of the benchmark takes seconds, the others minutes",
         _replaced(r"(tools/benchmark.py).*", r"\1 augment --seconds 0.1")),
    Rule("the demo's smoke-test config takes seconds",
         _replaced(r"^make demo$", "make demo-instant")),
    Rule("no shell redirects the output", _replaced(r" '>' \S+$", "")),
    Rule("the sandbox has its environment", _replaced(r"^make", "make -o .venv/.ready")),
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """Shell command in a document or source file.

    Attributes:
        document: Path of the file, relative to the repository root.
        text: The command, joined to a single line.
    """

    document: str
    text: str

    @cached_property
    def words(self) -> list[str]:
        """Words of the command, split as by a shell."""
        return shlex.split(self.text, comments=True)

    @property
    def to_run(self) -> list[str]:
        """Words of the command as run by the tests, after applying all rules in ``RULES``."""
        words = self.words
        for rule in RULES:
            words = rule.apply(words)
        return words

    @property
    def form(self) -> str:
        """Command without the details in which similar commands differ.

        The number of GPUs is removed, and the config's path is replaced by the first word of its
        name, such as "cifar10". Of the commands in configs/README.md that have the same form, the
        tests run at most one.
        """
        line = re.sub(r"configs/([a-z0-9]+)_\w+\.yaml", r"\1", " ".join(self.words))
        return re.sub(r"(--num-gpus|--nproc-per-node) \d+", r"\1", line)

    @property
    def reason_not_run(self) -> str | None:
        """Reason why the tests don't run the command, or None if they run it."""
        line = shlex.join(self.words)
        for pattern, reason in NOT_RUN.items():
            if re.fullmatch(pattern, line):
                return reason
        return None


def code(text: str) -> list[tuple[str, str]]:
    """Return (language, text) pairs for all code in a document, with "inline" for inline code."""
    return [(m[1], m[2]) if m[3] is None else ("inline", m[3]) for m in _CODE.finditer(text)]


def commands_in(document: str, text: str) -> list[Command]:
    """Return the commands in the ``sh`` blocks and inline code of a document."""
    found = []
    for language, content in code(text):
        joined = re.sub(r"\s*\\\n\s*", " ", content)
        if language == "sh":
            lines = [line for line in joined.splitlines() if line.strip()]
        elif language == "inline" and re.match(rf"({'|'.join(PROGRAMS)})\s", joined):
            lines = [" ".join(joined.split())]
        else:
            lines = []
        found += [Command(document, line) for line in lines]
    return list(dict.fromkeys(found))


COMMANDS = {document: commands_in(document, text) for document, text in DOCUMENTS.items()}


def run_here(document: str) -> list[Command]:
    """Return the commands in a document that the tests run.

    The tables in configs/README.md contain a command for each recipe. The tests run only one of
    several commands with the same form, or none if another document contains a command with this
    form, because test_instant.py tests all recipes.
    """
    found = [command for command in COMMANDS[document] if not command.reason_not_run]
    if document != "configs/README.md":
        return found
    others = {c.form for name, cs in COMMANDS.items() if name != document for c in cs}
    forms = {command.form: command for command in reversed(found)}
    return [command for form, command in reversed(forms.items()) if form not in others]
