"""Registry of weight families, such as timm's or torchvision's weight files.

Each weight family has a record with its detection function, its tensor names, and properties that
tensor shapes do not determine: stride placement, stem pool, channel order, mean and std. The
properties are taken from each project's own model code and network definitions.

Some networks have the same tensor names and shapes but compute different outputs, such as timm's
``resnetaa50``. Information in the file itself identifies such networks; see :mod:`~.statements`.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from senet_transfer.preprocessing import Preprocessing
from senet_transfer.weights.families import detect
from senet_transfer.weights.families import renaming as names
from senet_transfer.weights.families import renaming_other as names_other
from senet_transfer.weights.families.architecture import Architecture
from senet_transfer.weights.families.geometry import Geometry


@dataclass(frozen=True)
class Family:
    """Family of weight files with the same tensor names and conventions, such as timm's.

    Attributes:
        name: Family name, such as "torchvision_v1".
        title: Description for messages, such as "Detectron2's model zoo".
        detect: Detection function, which takes a file's tensors and metadata.
        rename: Function that maps a tensor name in the file to this project's name, or to None if
            the name is unknown.
        geometry: Function that maps an architecture to its layer options in this family, such as
            the stride placement. Options that do not apply to the network are None.
        preprocessing: Function that maps an architecture to its preprocessing, or to None if the
            preprocessing is unknown.
        affine_norms: Whether norm statistics are folded into the norms' weights and biases. Such
            files require frozen norms.
        rename_deep: Same as ``rename``, for networks with a three-convolution stem, in which some
            names have a different meaning.
        background: Names of networks whose published classifiers have 1001 classes. The first
            class (background) is removed during loading.
        plain: Whether other projects use the tensor names of this family, so that a file may also
            contain another project's network.
    """

    name: str
    title: str
    detect: detect.Detector
    rename: names.Rename
    geometry: Callable[[Architecture], Geometry]
    preprocessing: Callable[[Architecture], Preprocessing | None]
    affine_norms: bool = False
    rename_deep: names.Rename | None = None
    background: tuple[str, ...] = ()
    plain: bool = False

    def renamed(self, found: Collection[str]) -> dict[str, str | None]:
        """Map each tensor name in a file to this project's name, or to None if it is unknown."""
        rename = self.rename
        if self.rename_deep is not None and "conv1.0.weight" in found:
            rename = self.rename_deep
        return {name: rename(name) for name in found}


def _stride_in_3x3(arch: Architecture) -> Geometry:
    """Return torchvision's layer options, such as the stride in the 3x3 convolution of bottlenecks.

    Most PyTorch projects use the same options.
    """
    return Geometry(
        stride_in_1x1=None if arch.is_senet154 or not arch.bottleneck else False,
        stem_pool="pad",
        se_relu_before=False if arch.se_stages else None,
    )


def _authors(arch: Architecture) -> Geometry:
    """Return the layer options in the SENet authors' definitions and their PyTorch ports.

    SE-ResNets have the stride in the first 1x1 convolution. SE-ResNeXts and SENet-154 have the
    stride in the 3x3 convolution.
    """
    return Geometry(
        stride_in_1x1=None if arch.is_senet154 or not arch.bottleneck else arch.groups == 1,
        stem_pool="ceil",
        se_relu_before=False if arch.se_stages else None,
    )


def _timm_legacy(arch: Architecture) -> Geometry:
    # The authors did not publish networks with basic blocks (depths 18 and 34). In the ports, these
    # blocks have a ReLU between the second norm and the gate.
    return Geometry(**{**vars(_authors(arch)), "se_relu_before": not arch.bottleneck})


def _msra(arch: Architecture) -> Geometry:
    """Return the layer options of the networks in Detectron and Detectron2.

    ResNets have the stride in the first 1x1 convolution, and ResNeXts have the stride in the 3x3
    convolution.
    """
    return Geometry(
        stride_in_1x1=arch.groups == 1 if arch.bottleneck else None,
        stem_pool="pad",
        se_relu_before=False if arch.se_stages else None,
    )


def _unknown(arch: Architecture) -> Geometry:
    return Geometry()


_RGB = Preprocessing()
_BGR = Preprocessing(format="BGR", mean=(104.0, 117.0, 123.0), std=(1.0, 1.0, 1.0))
# The publisher provides a mean image (places365CNN_mean.binaryproto). ImageNet's channel means are
# used instead. They differ from the averages of the mean image by a few units.
_PLACES_BGR = Preprocessing(format="BGR", mean=(104.007, 116.669, 122.679), std=(1.0, 1.0, 1.0))
_BGR_STD = (57.375, 57.12, 58.395)


def _detectron_pixels(mean: tuple[float, float, float]) -> Callable[[Architecture], Preprocessing]:
    # In Detectron, ResNeXts were trained with a std, but ResNets were not.
    resnet = Preprocessing(format="BGR", mean=mean, std=(1.0, 1.0, 1.0))
    resnext = Preprocessing(format="BGR", mean=(103.53, 116.28, 123.675), std=_BGR_STD)
    return lambda arch: resnet if arch.groups == 1 else resnext


def _always(preprocessing: Preprocessing | None) -> Callable[[Architecture], Preprocessing | None]:
    return lambda arch: preprocessing


# Preprocessing for Google's networks. Projects differ only in the resizing.
_INCEPTION = Preprocessing(mean=(127.5,) * 3, std=(127.5,) * 3, resize=341, crop=299)
_CADENE_BN_INCEPTION = Preprocessing(format="BGR", mean=(104.0, 117.0, 128.0), std=(1.0,) * 3)


def _by_network(
    usual: Preprocessing, **others: Preprocessing
) -> Callable[[Architecture], Preprocessing | None]:
    return lambda arch: others.get(arch.network, usual)


def _detectron2_name(name: str) -> str:
    return names.detectron(name) or names.unchanged(name)


# If several families match a file, the first one is assumed, and the others are logged.
_RECORDS = (
    Family(
        "senet_transfer",
        "this project's own format",
        detect.own,
        names.unchanged,
        _unknown,
        _always(None),
    ),
    Family(
        "caffe",
        "the SENet authors' Caffe models",
        detect.caffe,
        names.first_match(names.caffe, names_other.caffe_bn_inception),
        _authors,
        _always(_BGR),
    ),
    Family(
        "places365_caffe",
        "CSAIL's Places365 Caffe models, named as in He et al.'s ResNets",
        detect.having(r"res\d[a-z]\d*_branch2a/weight", r"bn\d[a-z]\d*_branch2a/.*"),
        names.msra_caffe,
        lambda arch: Geometry(stride_in_1x1=True if arch.bottleneck else None, stem_pool="ceil"),
        _always(_PLACES_BGR),
    ),
    Family(
        "cadene",
        "Cadene's pretrainedmodels",
        detect.cadene,
        names.first_match(
            names.cadene, names_other.cadene_bn_inception, names_other.cadene_inception_resnet
        ),
        _authors,
        _by_network(_RGB, bn_inception=_CADENE_BN_INCEPTION, inception_resnet_v2=_INCEPTION),
        background=("inception_resnet_v2",),
    ),
    Family(
        "timm_legacy",
        "timm's legacy_se* models",
        detect.cadene_like,
        names.cadene,
        _timm_legacy,
        _always(_RGB),
    ),
    Family(
        "places365",
        "CSAIL's Places365 PyTorch models",
        detect.places365,
        names.torchvision,
        _stride_in_3x3,
        _always(_RGB),
        plain=True,
    ),
    Family(
        "torchvision_v1",
        "torchvision's IMAGENET1K_V1 weights",
        detect.torchvision_v1,
        names.first_match(names.torchvision, names_other.torchvision_vgg),
        _stride_in_3x3,
        _always(_RGB),
        plain=True,
    ),
    Family(
        "torchvision_v2",
        "torchvision's IMAGENET1K_V2 weights",
        detect.plain_torchvision,
        names.torchvision,
        _stride_in_3x3,
        _always(Preprocessing(resize=232)),
        plain=True,
    ),
    Family(
        "timm",
        "timm's resnet*, resnext*, seresnet*, seresnext*, senet154, inception_resnet_v2",
        detect.timm,
        names.first_match(names.timm, names_other.timm_inception_resnet),
        _stride_in_3x3,
        _by_network(
            Preprocessing(interpolation="bicubic"),
            inception_resnet_v2=replace(_INCEPTION, resize=333, interpolation="bicubic"),
        ),
        rename_deep=names.timm_deep,
        background=("inception_resnet_v2",),
        plain=True,
    ),
    Family(
        "moskomule",
        "moskomule's senet.pytorch",
        detect.having(r"(conv1|bn1)\.weight", r"layer\d\.\d+\.se\.fc\.[02]\.weight"),
        names.moskomule,
        _stride_in_3x3,
        _always(_RGB),
    ),
    Family(
        "mmpretrain",
        "mmpretrain (MMClassification)",
        detect.having(
            r"(backbone\.layer\d\.\d+|layer\d\.\d+\.se_layer)\..*", r"(backbone\.)?conv1\.weight"
        ),
        names.mmpretrain,
        _stride_in_3x3,
        _always(_RGB),
    ),
    Family(
        "detectron1",
        "Detectron's .pkl files with folded norms",
        detect.detectron1,
        names.detectron,
        _msra,
        _detectron_pixels((102.9801, 115.9465, 122.7717)),
        affine_norms=True,
    ),
    Family(
        "detectron2",
        "Detectron2's model zoo",
        detect.detectron2,
        _detectron2_name,
        _msra,
        _detectron_pixels((103.53, 116.28, 123.675)),
    ),
    Family(
        "detectron2_torchvision",
        "torchvision's weights, converted with Detectron2's script",
        detect.converted,
        names.unchanged,
        _stride_in_3x3,
        _always(_RGB),
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _RECORDS}

# Unsupported networks with a family's tensor names: a pattern for a tensor name, the tensor's
# number of dimensions (None for any), and a description of the difference.
_OTHER_NETWORKS = (
    (r"layer\d\.\d+\.downsample\.1\.weight", 4, "its shortcuts have average pooling"),
    (r"(backbone\.)?stem\.0\.weight", 4, "its stem has three convolutions"),
    (r".*\.(se|attn)\.conv\.weight", None, "its attention is ECA, not SE"),
    (r".*\.(ca|attn)\..*", None, "its attention is not SE"),
    (r".*\.gn\d\..*", None, "its norms are group norms"),
)


def unsupported_reason(tensors: Mapping[str, Tensor]) -> str | None:
    """Describe why a file's network is not supported, or return None if no reason is found.

    This function detects networks that resemble a supported network, such as timm's resnet50d.
    """
    for pattern, dimensions, words in _OTHER_NETWORKS:
        for name, tensor in tensors.items():
            if re.fullmatch(pattern, name) and dimensions in (None, tensor.ndim):
                return f"{words} ({name})"
    return None
