"""Published top-1 and top-5 errors for comparison."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from senet_transfer.data.cifar.open import cifar_name


@dataclass(frozen=True)
class Published:
    """A published single-crop result.

    Attributes:
        name: Network name.
        top1_error: Top-1 error in percent.
        top5_error: Top-5 error in percent; None if it wasn't published.
        source: Publication and table.
    """

    name: str
    top1_error: float
    top5_error: float | None
    source: str


_TABLE_VI = "Squeeze-and-Excitation Networks, Table VI"
_TABLE_VIII = "Squeeze-and-Excitation Networks, Table VIII, crop of {} pixels"

# Results on the Places365 validation set.
PLACES365 = (
    Published("ResNet-152", 41.15, 11.61, _TABLE_VI),
    Published("SE-ResNet-152", 40.37, 11.01, _TABLE_VI),
    Published("Places-365-CNN", 41.07, 11.48, _TABLE_VI),
)

_AUTHORS = "the authors' released networks"
_CADENE = "the table of pretrainedmodels"

# Results of published weights on the ImageNet validation set, by weight family and model name.
IMAGENET = {
    ("caffe", "se_resnet50"): Published("SE-ResNet-50", 22.37, 6.36, _AUTHORS),
    ("caffe", "se_resnet101"): Published("SE-ResNet-101", 21.75, 5.72, _AUTHORS),
    ("caffe", "se_resnet152"): Published("SE-ResNet-152", 21.34, 5.54, _AUTHORS),
    ("caffe", "se_resnext50_32x4d"): Published("SE-ResNeXt-50", 20.97, 5.54, _AUTHORS),
    ("caffe", "se_resnext101_32x4d"): Published("SE-ResNeXt-101", 19.81, 4.96, _AUTHORS),
    ("caffe", "senet154"): Published("SENet-154", 18.68, 4.47, _AUTHORS),
    ("caffe", "se_bn_inception"): Published("SE-BN-Inception", 23.62, 7.04, _AUTHORS),
    ("cadene", "se_resnet50"): Published("SE-ResNet-50", 22.364, 6.248, _CADENE),
    ("cadene", "se_resnet101"): Published("SE-ResNet-101", 21.604, 5.742, _CADENE),
    ("cadene", "se_resnet152"): Published("SE-ResNet-152", 21.342, 5.626, _CADENE),
    ("cadene", "se_resnext50_32x4d"): Published("SE-ResNeXt-50", 20.924, 5.566, _CADENE),
    ("cadene", "se_resnext101_32x4d"): Published("SE-ResNeXt-101", 19.764, 4.972, _CADENE),
    ("cadene", "senet154"): Published("SENet-154", 18.696, 4.502, _CADENE),
    ("cadene", "bn_inception"): Published("BN-Inception", 26.476, 8.438, _CADENE),
}


def _tables_ii_iii_and_viii() -> dict[str, Published]:
    found = {}
    for table, model, title, plain, se in (
        ("II", "resnet50", "ResNet-50", (24.80, 7.48), (23.29, 6.62)),
        ("II", "resnet101", "ResNet-101", (23.17, 6.52), (22.38, 6.07)),
        ("II", "resnet152", "ResNet-152", (22.42, 6.34), (21.57, 5.73)),
        ("II", "resnext50_32x4d", "ResNeXt-50", (22.11, 5.90), (21.10, 5.49)),
        ("II", "resnext101_32x4d", "ResNeXt-101", (21.18, 5.57), (20.70, 5.01)),
        ("II", "vgg16_bn", "VGG-16 with batch norm", (27.02, 8.81), (25.22, 7.70)),
        ("II", "bn_inception", "BN-Inception", (25.38, 7.89), (24.23, 7.14)),
        ("II", "inception_resnet_v2", "Inception-ResNet-v2", (20.37, 5.21), (19.80, 4.79)),
        ("III", "mobilenet", "MobileNet", (28.4, 9.4), (25.3, 7.7)),
        ("III", "shufflenet_g3", "ShuffleNet", (32.6, 12.5), (31.0, 11.1)),
    ):
        source = f"Squeeze-and-Excitation Networks, Table {table}"
        found[model] = Published(title, *plain, source)
        found[f"se_{model}"] = Published(f"SE-{title}", *se, source)
    found["senet154"] = Published("SENet-154", 18.68, 4.47, _TABLE_VIII.format(224))
    return found


# The paper's ImageNet results by model name, with crops of the usual size.
TRAINED_ON_IMAGENET = _tables_ii_iii_and_viii()

# ImageNet results for other crop sizes, by model name and crop size.
LARGE_CROPS = {("senet154", 320): Published("SENet-154", 17.28, 3.79, _TABLE_VIII.format(320))}


def published_on_imagenet(classes: Sequence[str], model: str) -> Published | None:
    """Return the SENet paper's result for a model on ImageNet.

    Args:
        classes: The class names of the data. For ImageNet, these are WordNet ids.
        model: The model name.

    Returns:
        The result, or None if the classes are not those of ImageNet, or if the paper contains no
        result for the model.
    """
    imagenet = len(classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in classes)
    return TRAINED_ON_IMAGENET.get(model) if imagenet else None


def _tables_iv_and_v() -> dict[tuple[str, str], Published]:
    found = {}
    for data, model, title, plain, se in (
        ("cifar10", "cifar_resnet110", "ResNet-110", 6.37, 5.21),
        ("cifar10", "cifar_resnet164", "ResNet-164", 5.46, 4.39),
        ("cifar10", "wrn16_8", "WRN-16-8", 4.27, 3.88),
        ("cifar10", "shake_shake26_2x96d", "Shake-Shake 26 2x96d + Cutout", 2.56, 2.12),
        ("cifar100", "cifar_resnet110", "ResNet-110", 26.88, 23.85),
        ("cifar100", "cifar_resnet164", "ResNet-164", 24.33, 21.31),
        ("cifar100", "wrn16_8", "WRN-16-8", 20.43, 19.14),
        ("cifar100", "shake_even29_2x4x64d", "Shake-Even 29 2x4x64d + Cutout", 15.85, 15.41),
    ):
        source = f"Squeeze-and-Excitation Networks, Table {'IV' if data == 'cifar10' else 'V'}"
        # The CIFAR-100 baseline was published before Cutout.
        bare = title.removesuffix(" + Cutout") if data == "cifar100" else title
        note = "" if bare == title else "; with Cutout 15.20, by the authors of Cutout"
        found[data, model] = Published(bare, plain, None, source + note)
        found[data, f"se_{model}"] = Published(f"SE-{title}", se, None, source)
    return found


# Results on the CIFAR test sets, by dataset and model name.
CIFAR = _tables_iv_and_v()


def published_on_cifar(dataset: str, model: str) -> Published | None:
    """Return the published result of a model on a CIFAR dataset, or None if it wasn't published.

    Args:
        dataset: The name or path of the dataset, as in a config.
        model: The model name.
    """
    name = cifar_name(dataset)
    return None if name is None else CIFAR.get((name, model))
