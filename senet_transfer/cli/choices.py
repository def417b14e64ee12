"""Values that arguments can take, stated here so that a parser imports nothing else.

They are those of the package; a test compares them.
"""

ABLATION_AXES = ("ratio", "squeeze", "excitation", "stages", "placement", "bias")
CIFAR_DOWNLOADS = ("cifar10", "cifar100")
EVAL_MODES = ("short_side", "squash", "ten_crop")
PLACES365_SIZES = ("256", "large")
PLACES365_SPLITS = ("val", "train_standard", "train_challenge")
WEIGHT_FAMILIES = (
    "senet_transfer",
    "caffe",
    "places365_caffe",
    "cadene",
    "timm_legacy",
    "places365",
    "torchvision_v1",
    "torchvision_v2",
    "timm",
    "moskomule",
    "mmpretrain",
    "detectron1",
    "detectron2",
    "detectron2_torchvision",
)
WEIGHT_TARGETS = (
    "senet_transfer",
    "detectron2",
    "torchvision",
    "timm",
    "timm_legacy",
    "cadene",
    "mmpretrain",
)
