"""Class names of published classifiers whose weight files do not contain class names."""

from senet_transfer.data.images.places365 import places365_classes

# Weight families whose classifiers have ImageNet's 1000 classes in torchvision's order. The
# original SENet Caffe models use the order in the ILSVRC development kit.
_IMAGENET = (
    "cadene",
    "mmpretrain",
    "moskomule",
    "timm",
    "timm_legacy",
    "timm_network",
    "torchvision_v1",
    "torchvision_v2",
)
_PLACES365 = ("places365", "places365_caffe")


def published_classes(family: str, count: int) -> list[str]:
    """Return the class names of a published classifier, or an empty list if they are unknown.

    Args:
        family: Family of the weight file, such as "timm" or "places365".
        count: Number of classes of the classifier.
    """
    if family in _IMAGENET and count == 1000:
        from torchvision.models import ResNet50_Weights

        return list(ResNet50_Weights.DEFAULT.meta["categories"])
    if family in _PLACES365 and count == 365:
        return list(places365_classes())
    return []
