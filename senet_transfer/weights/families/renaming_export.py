"""Conversion of this project's tensor names to those of other projects, for export.

The functions are the inverses of those in :mod:`~.renaming`, for the backbone and its classifier.
Each function returns None for a name that has no equivalent in the other project.
"""

from senet_transfer.weights.families.renaming import Rename, renamer

_TENSOR = "(weight|bias|running_mean|running_var|num_batches_tracked)"
_BLOCK = r"res(\d)\.(\d+)\."


def _like_torchvision(
    prefix: str = "",
    *,
    classifier: str,
    se: tuple[str, str] | None = None,
    stem: list[tuple[str, str]] | None = None,
) -> Rename:
    """Return a function that converts a ResNet's tensor names to torchvision's naming scheme."""
    block = prefix + "layer{1-1}.{2}."
    rules = stem or [
        (r"stem\.conv1\.weight", f"{prefix}conv1.weight"),
        (rf"stem\.conv1\.norm\.{_TENSOR}", f"{prefix}bn1.{{1}}"),
    ]
    rules += [
        (rf"{_BLOCK}conv(\d)\.weight", f"{block}conv{{3}}.weight"),
        (rf"{_BLOCK}conv(\d)\.norm\.{_TENSOR}", f"{block}bn{{3}}.{{4}}"),
        (rf"{_BLOCK}shortcut\.weight", f"{block}downsample.0.weight"),
        (rf"{_BLOCK}shortcut\.norm\.{_TENSOR}", f"{block}downsample.1.{{3}}"),
        (r"linear\.(weight|bias)", f"{classifier}.{{1}}"),
    ]
    for number, layer in enumerate(se or (), 1):
        rules.append((rf"{_BLOCK}se\.fc{number}\.(weight|bias)", f"{block}{layer}.{{3}}"))
    return renamer(rules)


_DEEP_STEM = [
    (r"stem\.conv1\.weight", "conv1.0.weight"),
    (rf"stem\.conv1\.norm\.{_TENSOR}", "conv1.1.{1}"),
    (r"stem\.conv2\.weight", "conv1.3.weight"),
    (rf"stem\.conv2\.norm\.{_TENSOR}", "conv1.4.{1}"),
    (r"stem\.conv3\.weight", "conv1.6.weight"),
    (rf"stem\.conv3\.norm\.{_TENSOR}", "bn1.{1}"),
]

_LAYER0 = [
    (r"stem\.conv(\d)\.weight", "layer0.conv{1}.weight"),
    (rf"stem\.conv(\d)\.norm\.{_TENSOR}", "layer0.bn{1}.{2}"),
]

torchvision = _like_torchvision(classifier="fc")

timm = _like_torchvision(classifier="fc", se=("se.fc1", "se.fc2"))

timm_deep = _like_torchvision(classifier="fc", se=("se.fc1", "se.fc2"), stem=_DEEP_STEM)

cadene = _like_torchvision(
    classifier="last_linear", se=("se_module.fc1", "se_module.fc2"), stem=_LAYER0
)

mmpretrain = _like_torchvision(
    "backbone.", classifier="head.fc", se=("se_layer.conv1.conv", "se_layer.conv2.conv")
)
