"""Conversion of other projects' tensor names to those of this project, which follow Detectron2.

Each function maps a tensor name in a file of one weight family to this project's name, or to None
if the family has no such name. The backbone's names are ``stem.conv1.weight``,
``stem.conv1.norm.running_mean``, ``res2.0.conv1.weight``, ``res2.0.shortcut.norm.bias``,
``res2.0.se.fc1.weight``, ... The classifier's names are ``linear.weight`` and ``linear.bias``, and
``neck.fc1.weight`` etc. for hidden layers before ``linear``. Networks other than ResNets are
handled in :mod:`~.renaming_other`.
"""

import re
from collections.abc import Callable, Iterable

Rename = Callable[[str], str | None]

_NORM = "(weight|bias|running_mean|running_var|num_batches_tracked)"

# Prefixes of a classifier's tensors outside its backbone.
CLASSIFIER = ("linear.", "neck.")

# Prefixes of a backbone's tensors.
BACKBONE = ("stem.", "res")


def renamer(rules: Iterable[tuple[str, str]]) -> Rename:
    """Return a rename function that applies the first rule whose pattern matches the whole name.

    A rule consists of a pattern and a replacement. In a replacement, ``{n}`` stands for the n-th
    group of the match, and ``{n+1}`` and ``{n-1}`` stand for the number in this group plus or
    minus 1.
    """
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def rename(name: str) -> str | None:
        for pattern, replacement in compiled:
            if match := pattern.fullmatch(name):
                return _fill(replacement, match)
        return None

    return rename


def _fill(replacement: str, match: re.Match) -> str:
    def value(place: re.Match) -> str:
        group, shift = match[int(place[1])], int(place[2] or 0)
        return str(int(group) + shift) if shift else group

    return re.sub(r"\{(\d)([+-]\d)?\}", value, replacement)


def first_match(*renames: Rename) -> Rename:
    """Combine rename functions into one that returns the first result that is not None."""

    def rename(name: str) -> str | None:
        return next((ours for rename in renames if (ours := rename(name)) is not None), None)

    return rename


def _stem(prefix: str = "") -> list[tuple[str, str]]:
    at = re.escape(prefix)
    return [
        (rf"{at}conv1\.weight", "stem.conv1.weight"),
        (rf"{at}bn1\.{_NORM}", "stem.conv1.norm.{1}"),
    ]


def _blocks(prefix: str = "") -> list[tuple[str, str]]:
    block = rf"{re.escape(prefix)}layer(\d)\.(\d+)\."
    return [
        (rf"{block}conv(\d)\.weight", "res{1+1}.{2}.conv{3}.weight"),
        (rf"{block}bn(\d)\.{_NORM}", "res{1+1}.{2}.conv{3}.norm.{4}"),
        (rf"{block}downsample\.0\.weight", "res{1+1}.{2}.shortcut.weight"),
        (rf"{block}downsample\.1\.{_NORM}", "res{1+1}.{2}.shortcut.norm.{3}"),
    ]


def _classifier(name: str = "fc") -> tuple[str, str]:
    return (rf"{name}\.(weight|bias)", "linear.{1}")


def _se(attribute: str, first: str, second: str, prefix: str = "") -> list[tuple[str, str]]:
    block = rf"{re.escape(prefix)}layer(\d)\.(\d+)\.{attribute}\."
    return [
        (rf"{block}{first}\.(weight|bias)", "res{1+1}.{2}.se.fc1.{3}"),
        (rf"{block}{second}\.(weight|bias)", "res{1+1}.{2}.se.fc2.{3}"),
    ]


torchvision = renamer([*_stem(), *_blocks(), _classifier()])

moskomule = renamer([*_stem(), *_blocks(), _classifier(), *_se("se", r"fc\.0", r"fc\.2")])

timm = renamer([*_stem(), *_blocks(), _classifier(), *_se("se", "fc1", "fc2")])

timm_deep = renamer(
    [
        (r"conv1\.0\.weight", "stem.conv1.weight"),
        (rf"conv1\.1\.{_NORM}", "stem.conv1.norm.{1}"),
        (r"conv1\.3\.weight", "stem.conv2.weight"),
        (rf"conv1\.4\.{_NORM}", "stem.conv2.norm.{1}"),
        (r"conv1\.6\.weight", "stem.conv3.weight"),
        (rf"bn1\.{_NORM}", "stem.conv3.norm.{1}"),
        *_blocks(),
        _classifier(),
        *_se("se", "fc1", "fc2"),
    ]
)

cadene = renamer(
    [
        (r"layer0\.conv(\d)\.weight", "stem.conv{1}.weight"),
        (rf"layer0\.bn(\d)\.{_NORM}", "stem.conv{1}.norm.{2}"),
        *_blocks(),
        _classifier("last_linear"),
        *_se("se_module", "fc1", "fc2"),
    ]
)

_mmpretrain = renamer(
    [
        *_stem("backbone."),
        *_blocks("backbone."),
        _classifier(r"head\.fc"),
        # Older files use the second form.
        *_se("se_layer", r"conv1\.conv", r"conv2\.conv", "backbone."),
        *_se("se_layer", "conv1", "conv2", "backbone."),
    ]
)


def mmpretrain(name: str) -> str | None:
    """Rename a tensor of an mmpretrain classifier or of a separately saved mmpretrain backbone."""
    return _mmpretrain(name) or _mmpretrain(f"backbone.{name}")


# Tensors of a BatchNorm and of the Scale layer after it, stored as one layer or as two.
_CAFFE_NORM = "(?:/bn)?(?:/scale)?/(weight|bias|running_mean|running_var)"

caffe = renamer(
    [
        (r"conv1/7x7_s2/(weight|bias)", "stem.conv1.{1}"),
        (rf"conv1/7x7_s2{_CAFFE_NORM}", "stem.conv1.norm.{1}"),
        (r"conv1_(\d)/3x3(?:_s2)?/(weight|bias)", "stem.conv{1}.{2}"),
        (rf"conv1_(\d)/3x3(?:_s2)?{_CAFFE_NORM}", "stem.conv{1}.norm.{2}"),
        *(
            rule
            for part, ours in [
                ("1x1_reduce", "conv1"),
                ("3x3", "conv2"),
                ("1x1_increase", "conv3"),
                ("1x1_proj", "shortcut"),
            ]
            for rule in [
                (rf"conv(\d)_(\d+)_{part}/(weight|bias)", f"res{{1}}.{{2-1}}.{ours}.{{3}}"),
                (rf"conv(\d)_(\d+)_{part}{_CAFFE_NORM}", f"res{{1}}.{{2-1}}.{ours}.norm.{{3}}"),
            ]
        ),
        (r"conv(\d)_(\d+)_1x1_down/(weight|bias)", "res{1}.{2-1}.se.fc1.{3}"),
        (r"conv(\d)_(\d+)_1x1_up/(weight|bias)", "res{1}.{2-1}.se.fc2.{3}"),
        (r"(?:classifier|fc[^/]*)/(weight|bias)", "linear.{1}"),
    ]
)

_BRANCHES = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}

_MSRA = re.compile(
    r"(res|bn|scale)(\d)([a-z])(\d*)_branch(1|2[abc])/(weight|bias|running_mean|running_var)"
)

_msra_ends = renamer(
    [
        (r"conv1/(weight|bias)", "stem.conv1.{1}"),
        (r"(?:bn|scale)_conv1/(weight|bias|running_mean|running_var)", "stem.conv1.norm.{1}"),
        (r"fc[^/]*/(weight|bias)", "linear.{1}"),
    ]
)


def msra_caffe(name: str) -> str | None:
    """Rename a tensor of He et al.'s Caffe models.

    The blocks of a stage are named a, b, c and so on, or a, b1, b2 and so on.
    """
    if match := _MSRA.fullmatch(name):
        kind, stage, letter, number, branch, tensor = match.groups()
        index = int(number) if number else ord(letter) - ord("a")
        norm = "" if kind == "res" else "norm."
        return f"res{stage}.{index}.{_BRANCHES[branch]}.{norm}{tensor}"
    return _msra_ends(name)


_DETECTRON_TENSORS = {
    "w": "weight",
    "b": "bias",
    "bn_s": "norm.weight",
    "bn_b": "norm.bias",
    "bn_gamma": "norm.weight",
    "bn_beta": "norm.bias",
    "bn_running_mean": "norm.running_mean",
    "bn_running_var": "norm.running_var",
    "bn_rm": "norm.running_mean",
    "bn_riv": "norm.running_var",
}

_DETECTRON = re.compile(rf"res(\d)_(\d+)_branch(1|2[abc])_({'|'.join(_DETECTRON_TENSORS)})")
_DETECTRON_STEM = re.compile(rf"(?:res_)?conv1_({'|'.join(_DETECTRON_TENSORS)})")
_DETECTRON_CLASSIFIER = re.compile(r"(?:pred|fc\d+)_(w|b)")


def detectron(name: str) -> str | None:
    """Convert a Caffe2 name from a ``.pkl`` file of Detectron or Detectron2 to this project's name.

    Return None if the name is unknown.
    """
    if match := _DETECTRON.fullmatch(name):
        stage, index, branch, tensor = match.groups()
        return f"res{stage}.{index}.{_BRANCHES[branch]}.{_DETECTRON_TENSORS[tensor]}"
    if match := _DETECTRON_STEM.fullmatch(name):
        return f"stem.conv1.{_DETECTRON_TENSORS[match[1]]}"
    if match := _DETECTRON_CLASSIFIER.fullmatch(name):
        return f"linear.{_DETECTRON_TENSORS[match[1]]}"
    return None


_RES5 = "roi_heads.res5."


def unchanged(name: str) -> str:
    """Return the name unchanged, for files from this project and Detectron2."""
    return name


def backbone_prefix(names: Iterable[str]) -> str:
    """Return the prefix of the backbone's tensor names in files from this project or Detectron2.

    The prefix is empty for a backbone, "backbone." for a classifier or a C4 detector, and
    "backbone.bottom_up." for a detector with an FPN.
    """
    names = list(names)
    for prefix in ("backbone.bottom_up.", "backbone."):
        if any(name.startswith(prefix) for name in names):
            return prefix
    return ""


def canonical(name: str, prefix: str) -> str:
    """Convert the name of a detector's backbone tensor to its name in a standalone backbone.

    The function removes the prefix of the backbone or, for res5 in a C4 head, the head's prefix.
    """
    if name.startswith(_RES5):
        return name.removeprefix("roi_heads.")
    return name.removeprefix(prefix)


def is_outside_backbone(name: str, prefix: str) -> bool:
    """Return whether a name belongs to a detector's FPN, proposal generator or heads."""
    return not name.startswith((prefix, _RES5, *CLASSIFIER))
