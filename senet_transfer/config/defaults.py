"""Every config key that this project adds to Detectron2's."""

from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode, get_cfg


def get_senet_config() -> CfgNode:
    """Detectron2's default config with this project's keys."""
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
    """The value, or the part of the config, that a key such as ``SOLVER.BASE_LR`` names."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def add_senet_config(cfg: CfgNode) -> None:
    """Adds this project's keys to a Detectron2 config, in place.

    No default of Detectron2's own is changed, so that its own configs mean here what they mean
    there; what this project's recipes want otherwise stands in ``configs/base``.
    """
    _add_model_config(cfg)
    _add_data_config(cfg)
    _add_solver_config(cfg)
    _add_epochs(cfg)
    _add_classification_config(cfg)
    _add_classification_input(cfg)


def _add_model_config(cfg: CfgNode) -> None:
    # The name of any model of `senet_transfer.list_models()`. Empty: `MODEL.RESNETS` describes a
    # residual backbone (depth, groups, widths), as it does in Detectron2.
    cfg.MODEL.BACKBONE.ARCH = ""
    # Of Inception-ResNet-v2: "valid", the published network, or "same", for maps that are aligned
    # with the image. Empty: "same" under a detector, "valid" in a classifier.
    cfg.MODEL.BACKBONE.PADDING = ""

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


def _add_data_config(cfg: CfgNode) -> None:
    # Own data sets in COCO's format: a list of [name, JSON file, image folder].
    cfg.DATASETS.REGISTER = []
    # Class names in the order of the class indices; filled in from the data sets when a run
    # starts, so that its saved config tells what a prediction means.
    cfg.DATASETS.CLASSES = []
    # Their ids in the data sets' JSON files, likewise.
    cfg.DATASETS.CATEGORY_IDS = []


def _add_solver_config(cfg: CfgNode) -> None:
    # What BASE_LR / IMS_PER_BATCH is in the recipe, for a warning where a run is far off that.
    # 0 means: no such rule.
    cfg.SOLVER.REFERENCE_LR_PER_IMAGE = 0.0
    # "SGD" (Detectron2's) or "AdamW", which learns faster from scratch; both take BASE_LR,
    # WEIGHT_DECAY and what else SOLVER says of parameters and gradients.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # "float16" or "bfloat16", for SOLVER.AMP.ENABLED; empty: float16 on a GPU, bfloat16 on a CPU.
    cfg.SOLVER.AMP.DTYPE = ""
    # The images of a step are pushed through the network in this many parts, whose gradients are
    # added up: the batch of a large machine on a small one. Batch norm sees one part at a time.
    cfg.SOLVER.MICRO_BATCHES = 1
    # Learning rate of the backbone as a multiple of that of the rest; below 1 to fine-tune gently.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    # Batch norms keep their statistics for this many iterations at the end, so that training ends
    # with the network that is tested (the paper's appendix).
    cfg.SOLVER.FROZEN_BN_ITERS = 0

    # The newest so many checkpoints stay, 0 for all; model_final.pth, model_best.pth and
    # model_ema.pth always do. At least 2, so that there is one before a damaged one.
    cfg.SOLVER.CHECKPOINTS_KEPT = 5
    # Steps whose loss or gradients are not finite are left out up to so many times in a run; at
    # one more it ends, with its last checkpoint as it was.
    cfg.SOLVER.MAX_NONFINITE_STEPS = 0

    # An average of the weights over the run, which is evaluated in their place.
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False
    cfg.SOLVER.EMA.DECAY = 0.9999

    # For LR_SCHEDULER_NAME "WarmupPlateauLR": the rate is multiplied by GAMMA where a metric has
    # not improved by more than THRESHOLD in more than PATIENCE evaluations, MAX_DROPS times.
    cfg.SOLVER.PLATEAU = CfgNode()
    cfg.SOLVER.PLATEAU.METRIC = "classification/top1_error"
    cfg.SOLVER.PLATEAU.PATIENCE = 5
    cfg.SOLVER.PLATEAU.THRESHOLD = 0.0
    cfg.SOLVER.PLATEAU.MAX_DROPS = 3


def _add_epochs(cfg: CfgNode) -> None:
    """The keys that count in passes over the data, and what is kept of an evaluation."""
    # Classification counts in epochs, whole or not, where EPOCHS is set: it takes the place of
    # MAX_ITER, STEP_EPOCHS that of STEPS. The others take the place of WARMUP_ITERS,
    # FROZEN_BN_ITERS, CHECKPOINT_PERIOD and TEST.EVAL_PERIOD where they are set themselves.
    cfg.SOLVER.EPOCHS = None
    cfg.SOLVER.STEP_EPOCHS = ()
    cfg.SOLVER.WARMUP_EPOCHS = None
    cfg.SOLVER.FROZEN_BN_EPOCHS = None
    cfg.SOLVER.CHECKPOINT_EPOCHS = None
    cfg.TEST.EVAL_EPOCHS = None
    # The model of the best evaluation is kept in model_best.pth: the metric as logged, such as
    # "classification/top1_error" or "bbox/AP"; lower is better for an error or a loss. Empty: none.
    cfg.TEST.BEST_METRIC = ""


def _add_classification_config(cfg: CfgNode) -> None:
    """The keys of MODEL.META_ARCHITECTURE "ImageClassifier" alone."""
    cfg.MODEL.CLASSIFIER = CfgNode()
    # Taken from the data set when a run starts.
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 1000
    # Before the linear layer, 0-1. None: the network's own.
    cfg.MODEL.CLASSIFIER.DROPOUT = None
    cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING = 0.0
    # Alpha of the Beta distribution; 0 turns it off. With both, each batch draws one of the two.
    cfg.MODEL.CLASSIFIER.MIXUP = 0.0
    cfg.MODEL.CLASSIFIER.CUTMIX = 0.0
    # The memory layout that tensor cores want.
    cfg.MODEL.CLASSIFIER.CHANNELS_LAST = False

    # DATASETS.TRAIN and DATASETS.TEST hold folders, archives or addresses of labelled images:
    # shards, Places365 as it comes, or a folder a class; with AUGMENT "pad_crop" also CIFAR, as
    # cifar10_train and the like or as it comes. What is not found from the working folder is
    # looked for below $DETECTRON2_DATASETS. DATASETS.CLASSES, where it is set, has to
    # agree with them. DATALOADER.SAMPLER_TRAIN: "TrainingSampler" or "ClassAwareSampler".
    # A folder for local copies of remote shards; empty: they are read from where they are.
    cfg.DATALOADER.CACHE_DIR = ""
    # Broken images beyond this share, 0-1, end the training.
    cfg.DATALOADER.MAX_SKIP_RATIO = 0.01
    # Samples of a shard that are shuffled together; more need memory.
    cfg.DATALOADER.SHUFFLE_BLOCK = 1024


def _add_classification_input(cfg: CfgNode) -> None:
    """What a classifier sees of an image."""
    cfg.INPUT.CLASSIFICATION = CfgNode()
    # Training takes "region", a random region by area and by width over height, resized to
    # CROP x CROP pixels; or "pad_crop", for images of 32x32 pixels, which are kept in memory: PAD
    # pixels around the image and a random crop of its own size.
    cfg.INPUT.CLASSIFICATION.AUGMENT = "region"
    cfg.INPUT.CLASSIFICATION.CROP = 224
    cfg.INPUT.CLASSIFICATION.SCALE = (0.08, 1.0)
    cfg.INPUT.CLASSIFICATION.RATIO = (0.75, 4 / 3)
    # Around the image, PADDING: "zero" or "reflect".
    cfg.INPUT.CLASSIFICATION.PAD = 4
    cfg.INPUT.CLASSIFICATION.PADDING = "zero"
    # The side of the square that Cutout blanks in an image of "pad_crop", in pixels; 0: none.
    cfg.INPUT.CLASSIFICATION.CUTOUT = 0
    # The probability of a horizontal flip, 0-1.
    cfg.INPUT.CLASSIFICATION.FLIP = 0.5
    # Lets large JPEGs be decoded at a fraction of their size: faster, with other pixels.
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
    """Whether a config is of a classifier."""
    return cfg.MODEL.META_ARCHITECTURE == META_ARCHITECTURE
