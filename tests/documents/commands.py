"""The shell commands of the documents, and the small rules by which a CPU can run them."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from senet_transfer.config.load import load_config
from senet_transfer.weights.hub.catalogue import load_catalogue

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("*/README.md"))
}
PROGRAMS = ("python", "torchrun", "make", "pip", "source", "bash", "git", "senet-train",
            "senet-predict", "senet-eval-places365")  # fmt: skip

_CODE = re.compile(r"^```(\w*)\n(.*?)^```$|(?<!`)`([^`]+)`(?!`)", re.M | re.S)

# What no test can run, and why. Each is parsed all the same: see test_documented_commands.py.
NOT_RUN = {
    r"source .venv/bin/activate": "the tests put their own Python first in PATH",
    r"make setup.*|pip install .*": "installs; test_installation.py and test_packaging.py do",
    r"make (test(-fast|-narrow|-slow|-faults)?|lint)": "runs the tests, or checks all files",
    r"make bench": "takes 15 minutes; test_benchmark.py measures every part",
}


@dataclass(frozen=True)
class Rule:
    """What stands in for something that a CPU can't do in seconds.

    Attributes:
        why: the reason.
        apply: from a command's words to the words that are run.
    """

    why: str
    apply: Callable[[list[str]], list[str]]


def _replaced(pattern: str, by: str) -> Callable[[list[str]], list[str]]:
    return lambda words: shlex.split(re.sub(pattern, by, shlex.join(words)))


_TRAINS = ("tools/train_net.py", "tools/run_seeds.py", "tools/ablation.py", "senet-train")


def _instant(words: list[str]) -> list[str]:
    """The instant twin of a recipe, on the data and in the folder of the recipe."""
    if not any(word in _TRAINS for word in words) or "--config-file" not in words:
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
    if "tools/train_net.py" in words or words[0] == "senet-train":
        own["OUTPUT_DIR"] = cfg.OUTPUT_DIR
    for key, value in own.items():
        words += [] if key in words else [key, str(value)]
    return words


def _published(words: list[str]) -> list[str]:
    return [
        f"published/{load_catalogue()[word].file}"
        if word in load_catalogue() and load_catalogue()[word].sha256
        else word
        for word in words
    ]


RULES = (
    Rule("a recipe's instant twin takes seconds", _instant),
    Rule("one core bears one process",
         _replaced(r"(--num-gpus|--nproc-per-node|--workers) \d+", r"\1 1")),
    Rule("one seed goes the way of all", _replaced(r"--seeds( \d+)+", "--seeds 0")),
    Rule("published weights can't be made up: their name holds their hash", _published),
    Rule("nothing is downloaded in the sandbox",
         _replaced(r"--download (cifar10)", r"--source cifar-10-python.tar.gz --output \1")),
    Rule("so does an archive, which is not the official one here",
         _replaced(r"(datasets/prepare_cifar.py)", r"\1 --any-checksum")),
    Rule("a part that takes seconds, where the others take minutes",
         _replaced(r"(tools/benchmark.py).*", r"\1 augment --seconds 0.1")),
    Rule("the demo's instant twin takes seconds", _replaced(r"^make demo$", "make demo-instant")),
    Rule("the sandbox has its environment", _replaced(r"^make", "make -o .venv/.ready")),
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command of a document.

    Attributes:
        document: its path.
        text: the command as it stands there, on one line.
    """

    document: str
    text: str

    @property
    def words(self) -> list[str]:
        """As a shell splits it."""
        return shlex.split(self.text, comments=True)

    @property
    def to_run(self) -> list[str]:
        """By the rules."""
        words = self.words
        for rule in RULES:
            words = rule.apply(words)
        return words

    @property
    def form(self) -> str:
        """What it has in common with those of other recipes of its task."""
        line = re.sub(r"configs/([a-z0-9]+)_\w+\.yaml", r"\1", " ".join(self.words))
        return re.sub(r"(--num-gpus|--nproc-per-node) \d+", r"\1", line)

    @property
    def reason_not_run(self) -> str | None:
        """Why no test runs it, or None."""
        for pattern, reason in NOT_RUN.items():
            if re.fullmatch(pattern, shlex.join(self.words)):
                return reason
        return None


def code(text: str) -> list[tuple[str, str]]:
    """All code of a document: the language of a block, or "inline", and the code."""
    return [(m[1], m[2]) if m[3] is None else ("inline", m[3]) for m in _CODE.finditer(text)]


def commands_in(document: str, text: str) -> list[Command]:
    """The commands of a document in their order: blocks of sh, and code in sentences and tables."""
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
    """What the test of a document runs.

    The table of configs has a command for each recipe. What they run is what test_instant.py runs
    for every recipe; here it is one of each form of command and task.
    """
    found = [command for command in COMMANDS[document] if not command.reason_not_run]
    if document != "configs/README.md":
        return found
    others = {c.form for name, cs in COMMANDS.items() if name != document for c in cs}
    forms = {command.form: command for command in reversed(found)}
    return [command for form, command in reversed(forms.items()) if form not in others]
