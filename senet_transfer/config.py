"""Every config key that this project adds to Detectron2's."""

from detectron2.config import CfgNode, get_cfg


def get_senet_config() -> CfgNode:
    """Detectron2's default config with this project's keys."""
    cfg = get_cfg()
    add_senet_config(cfg)
    return cfg


def add_senet_config(cfg: CfgNode) -> None:
    """Adds this project's keys to a Detectron2 config, in place.

    No default of Detectron2's own is changed, so that its own configs mean here what they mean
    there; what this project's recipes want otherwise stands in ``configs/base``.
    """
    # The name of any model of `senet_transfer.list_models()`. Empty: `MODEL.RESNETS` describes a
    # residual trunk (depth, groups, widths), as it does in Detectron2.
    cfg.MODEL.BACKBONE.ARCH = ""

    # How the stem's max pool ends: "pad" (torchvision, Detectron2) or "ceil" (the authors' files).
    cfg.MODEL.RESNETS.STEM_POOL = "pad"

    cfg.MODEL.SE = CfgNode()
    # None: as the name in MODEL.BACKBONE.ARCH says, which is without SE where that is empty.
    cfg.MODEL.SE.ENABLED = None
    # Reduction ratio r of the two layers.
    cfg.MODEL.SE.RATIO = 16
    # "avg", "max" or "none".
    cfg.MODEL.SE.SQUEEZE = "avg"
    # "sigmoid", "tanh" or "relu".
    cfg.MODEL.SE.EXCITATION = "sigmoid"
    # "standard", "pre", "post", "identity" or "3x3"; for shake networks also "mixture".
    cfg.MODEL.SE.PLACEMENT = "standard"
    # The stages with SE.
    cfg.MODEL.SE.STAGES = (2, 3, 4, 5)
    # Biases of the two layers: True in the authors' files, False in the paper's ablations.
    cfg.MODEL.SE.BIAS = True
    # The hidden width is rounded to a multiple of this: 8 in timm's SE-ResNet-18 and -34.
    cfg.MODEL.SE.DIVISOR = 1
    # A ReLU before the gate, as in timm's legacy_seresnet18 and 34.
    cfg.MODEL.SE.RELU_BEFORE = False

    # The family of the file in MODEL.WEIGHTS (`senet_transfer.weights.FAMILIES`), where its keys
    # are those of several, such as "torchvision_v2". Empty: recognised, or the stated default.
    cfg.MODEL.WEIGHTS_FAMILY = ""
    # The config takes stride placement, stem pool, channel order, mean and std from the file in
    # MODEL.WEIGHTS. True: it keeps its own, and where the file's differ, the run doesn't start.
    cfg.MODEL.WEIGHTS_PIN = False

    # Own data sets in COCO's format: a list of [name, JSON file, image folder].
    cfg.DATASETS.REGISTER = []
    # Class names in the order of the class indices; filled in from the data sets when a run
    # starts, so that its saved config tells what a prediction means.
    cfg.DATASETS.CLASSES = []

    # What BASE_LR / IMS_PER_BATCH is in the recipe, for a warning where a run is far off that.
    # 0 means: no such rule.
    cfg.SOLVER.REFERENCE_LR_PER_IMAGE = 0.0
    # "SGD" (Detectron2's) or "AdamW", which learns faster from scratch; both take BASE_LR,
    # WEIGHT_DECAY and what else SOLVER says of parameters and gradients.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # "float16" or "bfloat16", for SOLVER.AMP.ENABLED; empty: float16 on a GPU, bfloat16 on a CPU.
    cfg.SOLVER.AMP.DTYPE = ""
