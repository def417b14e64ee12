"""Config keys that this project adds to Detectron2's, with their defaults."""

from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode, get_cfg

# Keys whose value is "auto", True or False.
AUTO_KEYS = ("MODEL.SE.FUSED",)


def get_senet_config() -> CfgNode:
    """Return Detectron2's default config with this project's keys."""
    cfg = get_cfg()
    add_senet_config(cfg)
    return cfg


def config_items(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield all keys of a config, such as ``SOLVER.BASE_LR``, with their values."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from config_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def config_value(cfg: CfgNode, key: str) -> Any:
    """Return the value, or the sub-config, of a key such as ``SOLVER.BASE_LR``."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def add_senet_config(cfg: CfgNode) -> None:
    """Add this project's keys to a Detectron2 config, in place.

    Detectron2's own defaults do not change, so that its configs keep their meaning. The recipes
    override them in ``configs/base``.
    """
    _add_model_config(cfg)
    _add_data_config(cfg)
    _add_solver_config(cfg)
    _add_epochs(cfg)
    _add_classification_config(cfg)
    _add_classification_input(cfg)


def _add_model_config(cfg: CfgNode) -> None:
    # A name from `senet_transfer.list_models()`. Empty: `MODEL.RESNETS` describes a residual
    # backbone (depth, groups, widths), as in Detectron2.
    cfg.MODEL.BACKBONE.ARCH = ""
    # Padding of Inception-ResNet-v2: "valid", as in the published network, or "same", which keeps
    # feature maps aligned with the image. Empty: "same" for detectors, "valid" for classifiers.
    cfg.MODEL.BACKBONE.PADDING = ""

    # Border of the stem's max pool: "pad" (torchvision, Detectron2) or "ceil" (the authors' files).
    cfg.MODEL.RESNETS.STEM_POOL = "pad"

    cfg.MODEL.SE = CfgNode()
    # None: determined by the name in MODEL.BACKBONE.ARCH; without SE if that is empty.
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
    # Apply a ReLU before the gate, as in timm's legacy_seresnet18 and legacy_seresnet34.
    cfg.MODEL.SE.RELU_BEFORE = False
    # Fused Triton kernels for norm, gate, sum and ReLU of residual blocks, with and without SE:
    # "auto" (on a GPU), True (an error on other devices) or False.
    cfg.MODEL.SE.FUSED = "auto"

    # The family of the file in MODEL.WEIGHTS (a key of `senet_transfer.weights.FAMILIES`), needed
    # if several families share its tensor names, such as "torchvision_v2". Empty: detected.
    cfg.MODEL.WEIGHTS_FAMILY = ""
    # By default the config takes stride placement, stem pool, channel order, mean and std from the
    # file in MODEL.WEIGHTS. True: it keeps its own; if the file's differ, the run doesn't start.
    cfg.MODEL.WEIGHTS_PIN = False


def _add_data_config(cfg: CfgNode) -> None:
    # Own data sets in COCO's format: a list of [name, JSON file, image folder].
    cfg.DATASETS.REGISTER = []
    # Class names in the order of the class indices; filled in from the data sets when a run
    # starts, so that its saved config gives the meaning of a prediction.
    cfg.DATASETS.CLASSES = []
    # Ids of these classes in the data sets' JSON files; filled in when a run starts.
    cfg.DATASETS.CATEGORY_IDS = []


def _add_solver_config(cfg: CfgNode) -> None:
    # BASE_LR / IMS_PER_BATCH of the recipe; a run that deviates a lot from it logs a warning.
    # 0: no check.
    cfg.SOLVER.REFERENCE_LR_PER_IMAGE = 0.0
    # "SGD" (Detectron2's) or "AdamW", which learns faster from scratch. Both use BASE_LR,
    # WEIGHT_DECAY and the other keys of SOLVER about parameters and gradients.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # "float16" or "bfloat16", for SOLVER.AMP.ENABLED; empty: float16 on a GPU, bfloat16 on a CPU.
    cfg.SOLVER.AMP.DTYPE = ""
    # Gradient accumulation: the batch of a step is split into this many parts, whose gradients are
    # summed. Batch norm sees one part at a time.
    cfg.SOLVER.MICRO_BATCHES = 1
    # Learning rate of the backbone relative to the rest; below 1 for gentle fine-tuning.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    # Batch norms freeze their statistics for this many iterations at the end, so that training ends
    # with the network that is evaluated (the paper's appendix).
    cfg.SOLVER.FROZEN_BN_ITERS = 0

    # Number of newest checkpoints to keep, 0 for all; model_final.pth, model_best.pth and
    # model_ema.pth are always kept. At least 2, to fall back on if the newest is damaged.
    cfg.SOLVER.CHECKPOINTS_KEPT = 5
    # Number of steps with a non-finite loss or gradient that a run skips; one more ends the run
    # with an error and leaves its last checkpoint unchanged.
    cfg.SOLVER.MAX_NONFINITE_STEPS = 0

    # Exponential moving average of the weights, which is evaluated instead of the weights.
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False
    cfg.SOLVER.EMA.DECAY = 0.9999

    # For LR_SCHEDULER_NAME "WarmupPlateauLR": multiply the learning rate by GAMMA when METRIC has
    # not improved by more than THRESHOLD in more than PATIENCE evaluations, up to MAX_DROPS times.
    cfg.SOLVER.PLATEAU = CfgNode()
    cfg.SOLVER.PLATEAU.METRIC = "classification/top1_error"
    cfg.SOLVER.PLATEAU.PATIENCE = 5
    cfg.SOLVER.PLATEAU.THRESHOLD = 0.0
    cfg.SOLVER.PLATEAU.MAX_DROPS = 3


def _add_epochs(cfg: CfgNode) -> None:
    """Add the keys that count in epochs, and the one that selects the best model."""
    # For classification, whole or fractional. If EPOCHS is set, it replaces MAX_ITER, and
    # STEP_EPOCHS replaces STEPS. The others, if set, replace WARMUP_ITERS, FROZEN_BN_ITERS,
    # CHECKPOINT_PERIOD and TEST.EVAL_PERIOD.
    cfg.SOLVER.EPOCHS = None
    cfg.SOLVER.STEP_EPOCHS = ()
    cfg.SOLVER.WARMUP_EPOCHS = None
    cfg.SOLVER.FROZEN_BN_EPOCHS = None
    cfg.SOLVER.CHECKPOINT_EPOCHS = None
    cfg.TEST.EVAL_EPOCHS = None
    # Keep the model of the best evaluation in model_best.pth, by this metric as it is logged, such
    # as "classification/top1_error" or "bbox/AP"; lower is better for errors and losses. "": off.
    cfg.TEST.BEST_METRIC = ""


def _add_classification_config(cfg: CfgNode) -> None:
    """Add the keys that only MODEL.META_ARCHITECTURE "ImageClassifier" uses."""
    cfg.MODEL.CLASSIFIER = CfgNode()
    # Set from the data set when a run starts.
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 1000
    # Dropout probability before the linear layer, 0-1. None: the network's own.
    cfg.MODEL.CLASSIFIER.DROPOUT = None
    cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING = 0.0
    # Alpha of the Beta distribution; 0: off. With both, each batch randomly uses one of the two.
    cfg.MODEL.CLASSIFIER.MIXUP = 0.0
    cfg.MODEL.CLASSIFIER.CUTMIX = 0.0
    # The memory layout that tensor cores prefer.
    cfg.MODEL.CLASSIFIER.CHANNELS_LAST = False

    # For classification, DATASETS.TRAIN and DATASETS.TEST name folders, archives or addresses of
    # labelled images: shards, Places365 as downloaded, or one folder per class; with AUGMENT
    # "pad_crop" also CIFAR, as downloaded or by a name such as cifar10_train. Relative paths are
    # searched in the working directory, then in $DETECTRON2_DATASETS. DATASETS.CLASSES, if set, has
    # to agree with them. DATALOADER.SAMPLER_TRAIN is "TrainingSampler" or "ClassAwareSampler".

    # Folder for local copies of remote shards. Empty: stream them from their address.
    cfg.DATALOADER.CACHE_DIR = ""
    # A larger fraction of unreadable images than this, 0-1, ends training with an error.
    cfg.DATALOADER.MAX_SKIP_RATIO = 0.01
    # Number of samples of a shard that are shuffled together; more need more memory.
    cfg.DATALOADER.SHUFFLE_BLOCK = 1024


def _add_classification_input(cfg: CfgNode) -> None:
    """Add the keys of a classifier's image transforms."""
    cfg.INPUT.CLASSIFICATION = CfgNode()
    # Training: "region", a random crop by SCALE (fraction of the area) and RATIO (width / height),
    # resized to CROP x CROP pixels; or "pad_crop" for images of 32x32 pixels, which are kept in
    # memory: padding by PAD pixels and a random crop of the original size.
    cfg.INPUT.CLASSIFICATION.AUGMENT = "region"
    cfg.INPUT.CLASSIFICATION.CROP = 224
    cfg.INPUT.CLASSIFICATION.SCALE = (0.08, 1.0)
    cfg.INPUT.CLASSIFICATION.RATIO = (0.75, 4 / 3)
    # PADDING is "zero" or "reflect".
    cfg.INPUT.CLASSIFICATION.PAD = 4
    cfg.INPUT.CLASSIFICATION.PADDING = "zero"
    # Side of the square that Cutout blanks in an image of "pad_crop", in pixels; 0: off.
    cfg.INPUT.CLASSIFICATION.CUTOUT = 0
    # The probability of a horizontal flip, 0-1.
    cfg.INPUT.CLASSIFICATION.FLIP = 0.5
    # Decode large JPEGs at a fraction of their size: faster, with slightly different pixels.
    cfg.INPUT.CLASSIFICATION.DRAFT = False
    # "bilinear" or "bicubic", in training and evaluation.
    cfg.INPUT.CLASSIFICATION.INTERPOLATION = "bilinear"
    # Evaluation: "short_side" or "squash" to TEST_RESIZE pixels, then the central TEST_CROP; or
    # "ten_crop".
    cfg.INPUT.CLASSIFICATION.TEST_MODE = "short_side"
    cfg.INPUT.CLASSIFICATION.TEST_RESIZE = 256
    cfg.INPUT.CLASSIFICATION.TEST_CROP = 224


META_ARCHITECTURE = "ImageClassifier"


def is_classification(cfg: CfgNode) -> bool:
    """Return whether a config describes a classifier."""
    return cfg.MODEL.META_ARCHITECTURE == META_ARCHITECTURE
