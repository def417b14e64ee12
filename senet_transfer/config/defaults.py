"""Config keys that this project adds to Detectron2's config, and their defaults."""

from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode, get_cfg


def get_senet_config() -> CfgNode:
    """Return Detectron2's default config with this project's keys added."""
    cfg = get_cfg()
    add_senet_config(cfg)
    return cfg


def config_items(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield all dotted keys in a config, such as ``SOLVER.BASE_LR``, with their values."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from config_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def config_value(cfg: CfgNode, key: str) -> Any:
    """Return the value or sub-config for a dotted key such as ``SOLVER.BASE_LR``."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


# Keys whose value "auto" is replaced by True or False at the start of a run.
AUTO_KEYS = (
    "SOLVER.AMP.ENABLED",
    "SOLVER.TF32",
    "MODEL.CHANNELS_LAST",
    "MODEL.CLASSIFIER.CHANNELS_LAST",
    "CUDNN_BENCHMARK",
)
# All keys that accept "auto" as well as True and False.
ACCEPT_AUTO = (*AUTO_KEYS, "MODEL.SE.FUSED", "MODEL.WEIGHTS_EMA")

# Keys whose values are taken from the weight file unless the user sets them.
FILE_KEYS = (
    "MODEL.RESNETS.STRIDE_IN_1X1",
    "MODEL.RESNETS.STEM_POOL",
    "MODEL.SE.RELU_BEFORE",
    "INPUT.CHANNELS",
    "INPUT.FORMAT",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
)


def set_config_value(cfg: CfgNode, key: str, value: Any) -> None:
    """Set the value of a key such as ``SOLVER.BASE_LR``."""
    node, _, leaf = key.rpartition(".")
    (config_value(cfg, node) if node else cfg)[leaf] = value


def add_senet_config(cfg: CfgNode) -> None:
    """Add this project's keys to a Detectron2 config, in place.

    The defaults of Detectron2's own keys are not changed, so that existing Detectron2 configs have
    the same effect as before. The recipes in ``configs/base`` set keys of both Detectron2 and this
    project.
    """
    # If True, use deterministic algorithms on a GPU where PyTorch provides them. They are slower
    # and need more memory. The flag --deterministic sets this key. It has no effect on a CPU, where
    # runs are reproducible anyway.
    cfg.DETERMINISTIC = False
    # Experiment trackers that receive the metrics, in addition to metrics.json and TensorBoard:
    # "wandb" and "mlflow". The tracker's package must be installed.
    cfg.TRACKING = ()
    _add_model_config(cfg)
    _add_data_config(cfg)
    _add_detection_input(cfg)
    _add_solver_config(cfg)
    _add_epochs(cfg)
    _add_classification_config(cfg)
    _add_classification_input(cfg)


def _add_model_config(cfg: CfgNode) -> None:
    # A model name from `senet_transfer.list_models()`, or "timm/NAME" for a network that timm
    # builds. If empty, `MODEL.RESNETS` describes a residual backbone (depth, groups, widths), as in
    # Detectron2.
    cfg.MODEL.BACKBONE.ARCH = ""
    # The padding in Inception-ResNet-v2: "valid", as in the published network, or "same", which
    # keeps feature maps aligned with the image. If empty, detectors use "same" and classifiers
    # use "valid".
    cfg.MODEL.BACKBONE.PADDING = ""

    # The border mode of the stem's max pooling: "pad" (torchvision, Detectron2) or "ceil" (the
    # authors' weight files).
    cfg.MODEL.RESNETS.STEM_POOL = "pad"

    cfg.MODEL.SE = CfgNode()
    # If None, SE is enabled if MODEL.BACKBONE.ARCH names a network with SE.
    cfg.MODEL.SE.ENABLED = None
    # The reduction ratio r of the two fully connected layers.
    cfg.MODEL.SE.RATIO = 16
    # The pooling in the squeeze operation: "avg", "max" or "none".
    cfg.MODEL.SE.SQUEEZE = "avg"
    # The activation of the gates: "sigmoid", "tanh" or "relu".
    cfg.MODEL.SE.EXCITATION = "sigmoid"
    # The position of the gates: "standard", "pre", "post", "identity" or "3x3". Shake networks also
    # support "mixture".
    cfg.MODEL.SE.PLACEMENT = "standard"
    # The stages with SE.
    cfg.MODEL.SE.STAGES = (2, 3, 4, 5)
    # If True, the two fully connected layers have biases, as in the authors' weight files. The
    # networks in the paper's ablations have no biases.
    cfg.MODEL.SE.BIAS = True
    # The hidden width of the SE layers is rounded to a multiple of this value. timm uses 8 in
    # SE-ResNet-18 and -34.
    cfg.MODEL.SE.DIVISOR = 1
    # If True, apply a ReLU before the gate, as in timm's legacy_seresnet18 and legacy_seresnet34.
    cfg.MODEL.SE.RELU_BEFORE = False
    # The initialisation of the gates. "open": the gates hardly change the features at first, for
    # networks that start from the weights of a network without SE. "random": for training from
    # scratch, as in the paper.
    cfg.MODEL.SE.INIT = "open"
    # Fused Triton kernels for norm, gate, sum and ReLU of residual blocks, with and without SE.
    # "auto": use them on a GPU where they are faster, including the time to launch them. True:
    # always use them, and raise an error on other devices. With SOLVER.COMPILE "graph", "auto" is
    # the same as True.
    cfg.MODEL.SE.FUSED = "auto"

    # If True, a detector's feature maps and weights use the channels-last memory format, which is
    # faster on tensor cores. MODEL.CLASSIFIER.CHANNELS_LAST is the corresponding key for
    # classifiers.
    cfg.MODEL.CHANNELS_LAST = False

    # The family of the file in MODEL.WEIGHTS (a key of `senet_transfer.weights.FAMILIES`). It is
    # required for a family that shares its tensor names with others, such as "torchvision_v2". If
    # empty, the family is detected.
    cfg.MODEL.WEIGHTS_FAMILY = ""
    # The prefix of the network's tensor names, for a file that contains several networks, such as
    # "encoder_q." or "teacher.". The other tensors are ignored.
    cfg.MODEL.WEIGHTS_PREFIX = ""
    # For a checkpoint with plain and averaged (EMA) weights: True selects the averaged weights and
    # False the plain ones. "auto" makes the same choice as the project that saved the file: the
    # averaged weights for timm and mmengine, otherwise the plain ones.
    cfg.MODEL.WEIGHTS_EMA = "auto"
    # "strict": every tensor of the file must be used, except a classifier with a different number
    # of classes. "ignore": only the backbone is loaded, without the file's classifier or projection
    # head.
    cfg.MODEL.WEIGHTS_HEAD = "strict"
    # If False, the stride placement, stem pooling, channel order, mean and std are taken from the
    # file in MODEL.WEIGHTS, except for the keys in WEIGHTS_KEEP. If True, they are all taken from
    # the config, and an error is raised if the file itself or its entry in the catalogue specifies
    # other values. Values that were only guessed from the tensor names are overridden, with a
    # message in the log.
    cfg.MODEL.WEIGHTS_PIN = False
    # The keys whose values in the config are kept although WEIGHTS_PIN is False. Loading a config
    # adds the keys that are set in the user's config file or options.
    cfg.MODEL.WEIGHTS_KEEP = []


def _add_data_config(cfg: CfgNode) -> None:
    # The number of image channels, 1 to 16, for images that are not RGB or grayscale, such as
    # multispectral TIFF or NPY files. The channels are used in the order in which they are stored,
    # and MODEL.PIXEL_MEAN and PIXEL_STD need one value per channel. INPUT.FORMAT is set
    # automatically, such as to "C5" for 5 channels. If None, INPUT.FORMAT determines the channels.
    cfg.INPUT.CHANNELS = None
    # [low, high]: the values that become black and white in images with 16 or 32 bits per channel,
    # such as [0, 4095] for 12-bit data in 16-bit files. If empty, 16-bit images use 0 to 65535, and
    # 32-bit integers and floating-point numbers are rejected. Images with 8 bits are not changed.
    cfg.INPUT.VALUE_RANGE = ()
    # The handling of a photograph's EXIF orientation. "apply" rotates or mirrors the image, and
    # "ignore" uses the stored pixels. "auto" applies the orientation for detectors, as Detectron2
    # does, but ignores it for classifiers, as torchvision does, and if INPUT.CHANNELS is set. The
    # boxes in a detector's annotations must match the image as it is read.
    cfg.INPUT.EXIF = "auto"
    # The check of a detector's images before training and evaluation. "header" compares the image
    # sizes with the annotations. "decode" also decodes the images, which takes longer.
    cfg.DATALOADER.CHECK_IMAGES = "header"
    # Additional datasets for detection: a list of [name, annotations, image folder]. The
    # annotations are a JSON file in COCO's format, or a file or folder in the format of Pascal VOC,
    # YOLO, LabelMe, CVAT, Label Studio or VIA, followed by the split if there are several
    # (data.yaml:train). The image folder may be omitted.
    cfg.DATASETS.REGISTER = []
    # The class names in the order of the class indices. They are read from the datasets at the
    # start of a run, so the saved config is sufficient to interpret predictions.
    cfg.DATASETS.CLASSES = []
    # The ids of DATASETS.CLASSES in the datasets' JSON files. They are set at the start of a run.
    cfg.DATASETS.CATEGORY_IDS = []
    # The class names for semantic segmentation, in the order of the label values, and the names of
    # the keypoints. They are read from the datasets at the start of a run.
    cfg.DATASETS.STUFF_CLASSES = []
    cfg.DATASETS.KEYPOINTS = []
    # If True, a detector's training images are enlarged with PyTorch instead of Pillow. This is
    # over twice as fast but changes pixel values by up to 1. Evaluation always uses Pillow.
    cfg.INPUT.FAST_RESIZE = False


def _add_detection_input(cfg: CfgNode) -> None:
    """Add the keys for a detector's inputs, including the augmentation of training images."""
    # [minimum, maximum] of the factor by which the brightness, contrast or saturation of an image
    # is multiplied, such as [0.8, 1.2]. If empty, that property is not changed.
    cfg.INPUT.BRIGHTNESS = ()
    cfg.INPUT.CONTRAST = ()
    cfg.INPUT.SATURATION = ()
    # The probability of a vertical flip, in addition to RANDOM_FLIP.
    cfg.INPUT.VERTICAL_FLIP = 0.0
    # If True, rotate images by 0, 90, 180 or 270 degrees, with equal probability.
    cfg.INPUT.RIGHT_ANGLES = False
    # Large-scale jitter (Ghiasi et al. 2021), instead of MIN_SIZE_TRAIN: an image is resized to fit
    # in SIZE (height, width), scaled by a random factor from the range SCALE, and cropped to SIZE.
    cfg.INPUT.LARGE_SCALE_JITTER = CfgNode()
    cfg.INPUT.LARGE_SCALE_JITTER.ENABLED = False
    cfg.INPUT.LARGE_SCALE_JITTER.SCALE = (0.1, 2.0)
    cfg.INPUT.LARGE_SCALE_JITTER.SIZE = (1024, 1024)
    # The probability of copy-paste (Ghiasi et al. 2021): each object of another random image is
    # pasted with probability 0.5. Copy-paste requires a model that predicts masks.
    cfg.INPUT.COPY_PASTE = 0.0
    # The images of a detector with an FPN are padded to multiples of this number of pixels, in
    # training and evaluation. A larger value results in fewer distinct image sizes. 0 selects the
    # FPN's largest stride, as in Detectron2.
    cfg.INPUT.SIZE_DIVISIBILITY = 0


def _add_solver_config(cfg: CfgNode) -> None:
    # BASE_LR / IMS_PER_BATCH in the recipe. If this ratio differs by more than a factor of 2 in a
    # run, a warning is logged. 0 disables this check.
    cfg.SOLVER.REFERENCE_LR_PER_IMAGE = 0.0
    # "SGD" (as in Detectron2) or "AdamW", which converges faster from scratch. Both use BASE_LR,
    # WEIGHT_DECAY and the other SOLVER keys that concern parameters and gradients.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # The data type for SOLVER.AMP.ENABLED, "float16" or "bfloat16". If empty, it is float16 on a
    # GPU and bfloat16 on a CPU.
    cfg.SOLVER.AMP.DTYPE = ""
    # Whether to allow TF32 for float32 matrix products and convolutions on a GPU. "auto" is the
    # same as True. None keeps PyTorch's defaults, which allow TF32 for convolutions only.
    cfg.SOLVER.TF32 = None
    # "default": compile the network with torch.compile for training and evaluation: the whole
    # classifier, or the backbone of a detector. "graph": capture a CUDA graph of a classifier's
    # whole training step, from the augmentation of images in memory to the optimizer, or of a
    # detector's backbone, for up to 8 image sizes. "graph" requires a single process on a GPU.
    # Checkpoints are the same as with "none".
    cfg.SOLVER.COMPILE = "none"
    # Gradient accumulation: each batch is split into this many parts, whose gradients are
    # accumulated. Batch norms compute their statistics on one part at a time.
    cfg.SOLVER.MICRO_BATCHES = 1
    # A factor for the backbone's learning rate. Values below 1 fine-tune the backbone gently.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    # The decay d of the learning rate per stage of the backbone: the learning rate of res5 is
    # multiplied by d, that of res4 by d^2, and so on to the stem. The other parts, such as the
    # classifier, are not affected. Values below 1 keep the early stages, which are the most
    # general, close to the pretrained weights.
    cfg.SOLVER.LAYER_DECAY = 1.0
    # Gradual unfreezing: all stages of the backbone are frozen at the start. The first number is
    # the iteration at which the last stage is unfrozen, the second number applies to the stage
    # before it, and so on. Stages without a number stay frozen. If empty, no stage is frozen.
    cfg.SOLVER.UNFREEZE_ITERS = ()
    # The batch norm statistics are frozen for this number of iterations at the end of training.
    # During these iterations, batch norms work in the same way as in evaluation (the paper's
    # appendix).
    cfg.SOLVER.FROZEN_BN_ITERS = 0

    # The number of checkpoints to keep, or 0 to keep all. The oldest are deleted first. 1 is not
    # allowed, because a run could not resume if its only checkpoint were corrupted.
    # model_final.pth, model_best.pth and model_ema.pth are always kept.
    cfg.SOLVER.CHECKPOINTS_KEPT = 5
    # The number of steps with a non-finite loss or gradient that may be skipped. One more such step
    # ends the run with an error and leaves the last checkpoint unchanged.
    cfg.SOLVER.MAX_NONFINITE_STEPS = 0

    # The exponential moving average of the weights. If enabled, the average is evaluated instead of
    # the weights themselves.
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False
    cfg.SOLVER.EMA.DECAY = 0.9999

    # For LR_SCHEDULER_NAME "WarmupPlateauLR": the learning rate is multiplied by GAMMA if METRIC
    # has not improved by more than THRESHOLD for more than PATIENCE evaluations. This happens at
    # most MAX_DROPS times.
    cfg.SOLVER.PLATEAU = CfgNode()
    cfg.SOLVER.PLATEAU.METRIC = "classification/top1_error"
    cfg.SOLVER.PLATEAU.PATIENCE = 5
    cfg.SOLVER.PLATEAU.THRESHOLD = 0.0
    cfg.SOLVER.PLATEAU.MAX_DROPS = 3


def _add_epochs(cfg: CfgNode) -> None:
    """Add the keys for epoch-based schedules, model selection, early stopping and ensembles."""
    # Fractions of epochs are allowed. If EPOCHS is set, it replaces MAX_ITER, and STEP_EPOCHS
    # replaces STEPS. The other keys, if set, replace WARMUP_ITERS, UNFREEZE_ITERS, FROZEN_BN_ITERS,
    # CHECKPOINT_PERIOD and TEST.EVAL_PERIOD. WARMUP_EPOCHS 0 disables the warm-up. For a detector,
    # an epoch consists of the images that remain after FILTER_EMPTY_ANNOTATIONS.
    cfg.SOLVER.EPOCHS = None
    cfg.SOLVER.STEP_EPOCHS = ()
    cfg.SOLVER.WARMUP_EPOCHS = None
    cfg.SOLVER.UNFREEZE_EPOCHS = ()
    cfg.SOLVER.FROZEN_BN_EPOCHS = None
    cfg.SOLVER.CHECKPOINT_EPOCHS = None
    cfg.TEST.EVAL_EPOCHS = None
    # The metric for selecting the best model, which is saved to model_best.pth. Use the name in the
    # log, such as "classification/top1_error" or "bbox/AP". Lower values are better for errors and
    # losses. If empty, the best model is not saved.
    cfg.TEST.BEST_METRIC = ""
    # Early stopping: training ends if TEST.BEST_METRIC has not improved for this number of
    # evaluations. 0 disables early stopping.
    cfg.TEST.PATIENCE = 0
    # If True, each evaluation also computes the loss on DATASETS.TEST, logged as
    # validation/total_loss. For a detector, the parts of the loss are logged, too. They are the
    # training losses without augmentation and with frozen batch norms, averaged over images. For a
    # classifier, the loss is the cross-entropy without label smoothing.
    cfg.TEST.LOSS = False
    # The IoU types for which an evaluation computes a detector's diagnostics (error types,
    # confusion matrix, precision and recall), if the model predicts them: "bbox" for boxes and
    # "segm" for masks. The flag --iou-types sets this key. If empty, no diagnostics are computed.
    cfg.TEST.DIAGNOSTICS = ("bbox", "segm")
    # The weight files of further detectors, for evaluation with --eval-only. Their boxes are merged
    # with those of the detector in MODEL.WEIGHTS by weighted boxes fusion. Each detector is
    # described by the config.yaml next to its file or, if there is none, by this config. IOU is the
    # minimum IoU of boxes that are merged.
    cfg.TEST.ENSEMBLE = CfgNode()
    cfg.TEST.ENSEMBLE.WEIGHTS = ()
    cfg.TEST.ENSEMBLE.IOU = 0.55


def _add_classification_config(cfg: CfgNode) -> None:
    """Add the keys used only with MODEL.META_ARCHITECTURE "ImageClassifier"."""
    cfg.MODEL.CLASSIFIER = CfgNode()
    # Set to the number of classes in the dataset at the start of a run.
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 1000
    # The dropout probability before the linear layer, between 0 and 1. If None, the network's
    # default is used.
    cfg.MODEL.CLASSIFIER.DROPOUT = None
    cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING = 0.0
    # The training loss, "cross_entropy" or "focal". The focal loss (Lin et al. 2017, in its softmax
    # form) reduces the loss of images that are already classified well. A larger FOCAL_GAMMA
    # reduces it more; with 0, the focal loss equals the cross-entropy.
    cfg.MODEL.CLASSIFIER.LOSS = "cross_entropy"
    cfg.MODEL.CLASSIFIER.FOCAL_GAMMA = 2.0
    # The weight of each class in the training loss, as in F.cross_entropy: a list in the order of
    # DATASETS.CLASSES, or "auto". At the start of a run, "auto" is replaced by weights that are
    # inversely proportional to the number of training images per class and have a mean of 1. If
    # None, all weights are 1.
    cfg.MODEL.CLASSIFIER.CLASS_WEIGHTS = None
    # Alpha of the Beta distribution for mixup and CutMix, or 0 to disable them. If both are
    # enabled, one of them is selected at random for each batch.
    cfg.MODEL.CLASSIFIER.MIXUP = 0.0
    cfg.MODEL.CLASSIFIER.CUTMIX = 0.0
    # If True, use the channels-last memory format, which is faster on tensor cores.
    cfg.MODEL.CLASSIFIER.CHANNELS_LAST = False

    # For classification, DATASETS.TRAIN and DATASETS.TEST contain paths or URLs of labelled images:
    # shards, Places365 as downloaded, one folder per class, or a CSV file with the columns path and
    # label. With AUGMENT "pad_crop", CIFAR is also supported, as downloaded or by a name such as
    # cifar10_train. Relative paths are searched in the working directory, then in
    # $DETECTRON2_DATASETS. If DATASETS.CLASSES is set, it must match the data.
    # DATALOADER.SAMPLER_TRAIN is "TrainingSampler" or "ClassAwareSampler".

    # The folder for local copies of remote shards. If empty, shards are streamed from their URLs.
    cfg.DATALOADER.CACHE_DIR = ""
    # The maximum fraction of unreadable images to skip in training, between 0 and 1, for detectors
    # and classifiers. Training ends with an error if this fraction is exceeded.
    cfg.DATALOADER.MAX_SKIP_RATIO = 0.01
    # The number of samples in a shard to shuffle together. Larger values need more memory.
    cfg.DATALOADER.SHUFFLE_BLOCK = 1024


def _add_classification_input(cfg: CfgNode) -> None:
    """Add the keys for a classifier's image transforms."""
    cfg.INPUT.CLASSIFICATION = CfgNode()
    # The training augmentation. "region" takes a random crop, with limits SCALE (fraction of the
    # image area) and RATIO (width / height), and resizes it to CROP x CROP pixels. "pad_crop" pads
    # an image by PAD pixels and takes a random crop of the original size. It is meant for 32x32
    # images, which are kept in memory.
    cfg.INPUT.CLASSIFICATION.AUGMENT = "region"
    cfg.INPUT.CLASSIFICATION.CROP = 224
    cfg.INPUT.CLASSIFICATION.SCALE = (0.08, 1.0)
    cfg.INPUT.CLASSIFICATION.RATIO = (0.75, 4 / 3)
    # PADDING is "zero" or "reflect".
    cfg.INPUT.CLASSIFICATION.PAD = 4
    cfg.INPUT.CLASSIFICATION.PADDING = "zero"
    # The side length in pixels of the square that Cutout masks with AUGMENT "pad_crop". 0 disables
    # Cutout.
    cfg.INPUT.CLASSIFICATION.CUTOUT = 0
    # The probability of a horizontal flip, between 0 and 1.
    cfg.INPUT.CLASSIFICATION.FLIP = 0.5
    # The keys from here to ERASING add torchvision's augmentations to AUGMENT "region", in this
    # order. VERTICAL_FLIP is the probability of a vertical flip.
    cfg.INPUT.CLASSIFICATION.VERTICAL_FLIP = 0.0
    # If True, rotate images by 0, 90, 180 or 270 degrees, with equal probability.
    cfg.INPUT.CLASSIFICATION.RIGHT_ANGLES = False
    # "rand_augment" (Cubuk et al. 2020), "trivial_augment" (Mueller and Hutter 2021) or "none".
    # RAND_AUGMENT contains RandAugment's number of operations and their magnitude from 0 to 30.
    cfg.INPUT.CLASSIFICATION.POLICY = "none"
    cfg.INPUT.CLASSIFICATION.RAND_AUGMENT = (2, 9)
    # The strengths of random changes of brightness, contrast, saturation and hue, such as
    # (0.4, 0.4, 0.4, 0.1). If empty, the colours are not changed.
    cfg.INPUT.CLASSIFICATION.COLOR_JITTER = ()
    # The probability of a Gaussian blur, and the limits of its standard deviation in pixels.
    cfg.INPUT.CLASSIFICATION.BLUR = 0.0
    cfg.INPUT.CLASSIFICATION.BLUR_SIGMA = (0.1, 2.0)
    # The probability of random erasing (Zhong et al. 2020), which fills a rectangle with
    # MODEL.PIXEL_MEAN.
    cfg.INPUT.CLASSIFICATION.ERASING = 0.0
    # If True, decode large JPEG images at a fraction of their size. This is faster but changes the
    # pixel values slightly.
    cfg.INPUT.CLASSIFICATION.DRAFT = False
    # The interpolation for resizing in training and evaluation, "bilinear" or "bicubic".
    cfg.INPUT.CLASSIFICATION.INTERPOLATION = "bilinear"
    # The evaluation mode. "short_side" resizes the shorter side, and "squash" both sides, to
    # TEST_RESIZE pixels. Both then take the central crop of TEST_CROP pixels. "ten_crop" averages
    # the predictions for ten crops.
    cfg.INPUT.CLASSIFICATION.TEST_MODE = "short_side"
    cfg.INPUT.CLASSIFICATION.TEST_RESIZE = 256
    cfg.INPUT.CLASSIFICATION.TEST_CROP = 224


META_ARCHITECTURE = "ImageClassifier"


def is_classification(cfg: CfgNode) -> bool:
    """Return whether the config describes a classifier."""
    return cfg.MODEL.META_ARCHITECTURE == META_ARCHITECTURE
