"""Detection of a file's weight family from its tensor names and metadata.

Each weight family has one detection function. If several functions return True for a file, the
first of these families in the registry is assumed unless the user specifies a family.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from senet_transfer.weights.formats.reader import OWN_METADATA

Tensors = Mapping[str, Tensor]
Metadata = Mapping[str, Any]
Detector = Callable[[Tensors, Metadata], bool]


def having(*needed: str) -> Detector:
    """Return a function that detects a weight family by patterns of its tensor names.

    The function returns True for a file if each pattern fully matches at least one tensor name.
    Each pattern should match many names. A file with missing tensors is then still detected, and
    the error message can list the missing tensors.
    """
    patterns = [re.compile(pattern) for pattern in needed]

    def detect(tensors: Tensors, metadata: Metadata) -> bool:
        return all(any(p.fullmatch(name) for name in tensors) for p in patterns)

    return detect


def any_of(*detectors: Detector) -> Detector:
    """Return a function that detects a weight file if any of the given functions detects it."""
    return lambda tensors, metadata: any(d(tensors, metadata) for d in detectors)


_plain_blocks = having(r"layer\d\.\d+\.conv\d\.weight", r"(conv1|bn1)\.weight")
_any_se = having(r"layer\d\.\d+\.se(_layer|_module)?\..*")
_deep_stem = having(r"conv1\.\d\.weight")
_bottlenecks = having(r"layer\d\.\d+\.conv3\.weight")
_vgg_with_norms = having(r"features\.\d+\.weight", r"features\.\d+\.running_(mean|var)")
_bn_inception = having(r"inception_\d[a-e]_3x3\.weight", r"inception_\d[a-e]_3x3_bn\..*")
_inception_resnet = having(
    r"(mixed_\d[a-z]|repeat(_\d)?\.\d+)\.branch\d.*\.bn\..*", r"repeat(_\d)?\.\d+\.conv2d\..*"
)


def plain_torchvision(tensors: Tensors, metadata: Metadata) -> bool:
    """Detect weight files of ResNets and ResNeXts with torchvision's tensor names."""
    others = any_of(_any_se, _deep_stem)
    return _plain_blocks(tensors, metadata) and not others(tensors, metadata)


torchvision_v1 = any_of(plain_torchvision, _vgg_with_norms)


def places365(tensors: Tensors, metadata: Metadata) -> bool:
    """Detect weight files of CSAIL's Places365 PyTorch models by their 365 classifier outputs."""
    shape = tuple(tensors["fc.weight"].shape) if "fc.weight" in tensors else ()
    return plain_torchvision(tensors, metadata) and shape[:1] == (365,)


def timm(tensors: Tensors, metadata: Metadata) -> bool:
    """Detect timm's weight files, except those of its legacy_se* models."""
    if _inception_resnet(tensors, metadata):
        return "last_linear.weight" not in tensors
    with_se = having(r"(conv1|bn1)\.weight", r"layer\d\.\d+\.se\.fc\d\.weight")
    deep = _plain_blocks(tensors, metadata) and _deep_stem(tensors, metadata)
    return deep or plain_torchvision(tensors, metadata) or with_se(tensors, metadata)


cadene_like = having(r"layer0\.(conv|bn)\d\.weight", r"layer\d\.\d+\.se_module\.fc\d\.weight")


def cadene(tensors: Tensors, metadata: Metadata) -> bool:
    """Detect weight files of Cadene's pretrainedmodels, where all SE ResNets have bottlenecks."""
    if _inception_resnet(tensors, metadata):
        return "classif.weight" not in tensors
    with_se = cadene_like(tensors, metadata) and _bottlenecks(tensors, metadata)
    return with_se or _bn_inception(tensors, metadata)


caffe = any_of(
    having(r"conv\d_\d+_1x1_reduce/weight", r"conv\d_\d+_3x3/bn/.*"),
    having(r"inception_\d[a-e]/double3x3a/weight", r"inception_\d[a-e]/3x3/bn/.*"),
)

_own_names = having(
    r"(.*\.)?stem\.(\d\.)?conv\d?\.(norm\.)?weight", r"(.*\.)?res\d\.\d+\.\w+(\.\d)*\.weight"
)

# State dicts of this project's networks other than ResNets. Their norms are named as in Detectron2.
own_of_another_kind = having(r".*\.norm\.running_var", r"linear\.weight")


def own(tensors: Tensors, metadata: Metadata) -> bool:
    """Detect weight files of this project by their metadata or their tensor names."""
    if OWN_METADATA in metadata:
        return True
    if metadata.get("__author__"):
        return False
    return _own_names(tensors, metadata) or own_of_another_kind(tensors, metadata)


def detectron1(tensors: Tensors, metadata: Metadata) -> bool:
    """Detect weight files of the original Detectron, which store a batch norm as scale and bias."""
    folded = having(r"res\d_\d+_branch2a_w", r"res\d_\d+_branch2a_bn_s")
    return folded(tensors, metadata) and not detectron2(tensors, metadata)


def detectron2(tensors: Tensors, metadata: Metadata) -> bool:
    """Detect Detectron2's weight files, which use the tensor names of Caffe2 or of Detectron2."""
    if OWN_METADATA in metadata:
        return False
    caffe2 = having(r"res\d_\d+_branch2a_w", r"res\d_\d+_branch2a_bn_(gamma|riv|running_var)")
    return caffe2(tensors, metadata) or (
        _own_names(tensors, metadata) and metadata.get("__author__") != "torchvision"
    )


def converted(tensors: Tensors, metadata: Metadata) -> bool:
    """Detect torchvision weights converted with Detectron2's convert-torchvision-to-d2.py."""
    if OWN_METADATA in metadata:
        return False
    return _own_names(tensors, metadata) and metadata.get("__author__") in (None, "torchvision")
