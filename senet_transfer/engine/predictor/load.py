"""Predictors for trained models, published weights, configs and exported files."""

import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from senet_transfer.config import is_classification
from senet_transfer.config.architectures import PIXELS, PROPOSALS, predicts
from senet_transfer.config.load import find_config
from senet_transfer.data.detection.coco import register_shapes
from senet_transfer.data.detection.dataset_checks import category_ids
from senet_transfer.engine.inference.ensembles import build_detectors
from senet_transfer.engine.model_from import LoadedModel, config_next_to, find_model
from senet_transfer.engine.predictor.exported import SUFFIXES, load_exported
from senet_transfer.engine.predictor.predictor import ClassifierPredictor, DetectorPredictor
from senet_transfer.engine.run_checks import check_augmentation
from senet_transfer.errors import UserError
from senet_transfer.evaluation.classification_evaluator import TOP
from senet_transfer.weights.hub.catalogue import names_published
from senet_transfer.weights.hub.repositories import is_hub_name
from senet_transfer.weights.hub.zoo import is_zoo_name, zoo_model

# File names in a run's folder, or in a folder with a Hugging Face model, in order of preference.
_CHECKPOINTS = ("model_best.pth", "model_final.pth", "model.safetensors")


def load(
    source: str | os.PathLike[str],
    *,
    config_file: str = "",
    options: Sequence[str] = (),
    device: str = "",
    half: bool = False,
    batch_size: int = 1,
    threshold: float = 0.5,
    top: int = TOP,
) -> ClassifierPredictor | DetectorPredictor:
    """Load a model, and return a predictor that can be called with images.

    ```python
    predictor = senet_transfer.load("output/model_final.pth")
    found = predictor("photo.jpg")
    print(found.names, found.scores, found.boxes)
    found.plot().save("drawing.jpg")
    ```

    Args:
        source: One of the following:

            - The output folder of a run. The best model is loaded or, without one, the final model.
            - A checkpoint or weight file.
            - A config file whose ``MODEL.WEIGHTS`` is a file with all weights of the model.
            - The name of published weights, such as "cadene/se_resnet50"; "senet_transfer/NAME" for
              weights in this package; or "timm/NAME" for weights that only timm provides.
            - A Hugging Face Hub repository, such as "hf-hub:owner/name".
            - A model in Detectron2's model zoo, such as "COCO-Detection/faster_rcnn_R_50_FPN_3x".
            - A file written by ``senet export`` (.onnx, .pt2 or .ts; for detectors, only .onnx).
        config_file: The config of a weight file. If empty, the ``config.yaml`` next to the file or,
            without one, the file's metadata is used.
        options: Alternating keys and values that override the config, such as
            ``["INPUT.MIN_SIZE_TEST", "600"]``.
        device: The device, such as "cpu" or "cuda:1". If empty, a GPU is used if available.
        half: If True, compute in half precision: float16 on a GPU, bfloat16 on the CPU.
        batch_size: The number of images per batch. Larger batches change results slightly, due to
            rounding and because Detectron2 pads smaller images to the size of the largest, which
            affects results near the edges.
        threshold: The minimum score of objects.
        top: The number of most probable classes to include in a classifier's results.

    Returns:
        A :class:`~senet_transfer.engine.predictor.predictor.ClassifierPredictor`, which returns
        :class:`~senet_transfer.engine.predictor.predictions.Classification`, or a
        :class:`~senet_transfer.engine.predictor.predictor.DetectorPredictor`, which returns
        :class:`~senet_transfer.engine.predictor.predictions.Detections`. With batches of one image,
        the results are bitwise identical to the predictions in evaluation.

    Raises:
        UserError: If the source is unknown, a file can't be read, or an argument is invalid.
    """
    name = os.fspath(source)
    shared = {"half": half, "batch_size": batch_size}
    if name.endswith(SUFFIXES) and not is_hub_name(name):
        _check_exported(name, device, half, [config_file, *options])
        return load_exported(name, threshold=threshold, top=top, batch_size=batch_size)
    loaded = load_trained(name, config_file, options, device)
    if is_classification(loaded.cfg):
        return ClassifierPredictor.of(loaded, top=top, **shared)
    return DetectorPredictor.of(loaded, threshold=threshold, **shared)


def _check_exported(path: str, device: str, half: bool, config: Sequence[str]) -> None:
    """Raise a UserError for arguments that an exported file doesn't support."""
    if not os.path.isfile(path):
        raise UserError(f"The exported model {path} does not exist. Check the path.")
    if device not in ("", "cpu") or half or any(config):
        raise UserError(
            f"{path} is an exported model, which runs on the CPU with the precision and settings "
            "that it was exported with. Load the checkpoint to use a device, half precision or "
            "config options."
        )


def load_trained(
    weights: str, config_file: str = "", options: Sequence[str] = (), device: str = ""
) -> LoadedModel:
    """Load a model or ensemble, but not an exported file; see :func:`load` for the arguments."""
    config_file, weights = _find(weights, config_file)
    named = names_published(weights) or is_hub_name(weights)
    if not config_file and not named and not os.path.isfile(weights):
        raise UserError(
            f"The checkpoint {weights} does not exist. Pass the path of a .pth file, the output "
            "folder of a run, or the name of published weights (see "
            "senet_transfer.list_catalogue())."
        )
    try:
        found = find_model(config_file=config_file, weights=weights, options=options)
    except UserError as error:
        if config_file or named:
            raise
        raise UserError(
            f"{error} There is no config.yaml next to {weights}, where training writes it. If the "
            "model has a config, pass it with --config-file (config_file= in Python)."
        ) from error
    if not found.cfg.MODEL.WEIGHTS:
        raise UserError(
            f"{config_file} specifies no weights (MODEL.WEIGHTS is empty). Pass a checkpoint "
            "trained with this config, or set MODEL.WEIGHTS to published weights."
        )
    if not found.cfg.DATASETS.CLASSES:
        take_classes(found.cfg)
    found = found.examined()
    classes = found.cfg.DATASETS.CLASSES or found.cfg.DATASETS.STUFF_CLASSES
    # The boxes predicted by a region proposal network have no classes.
    if config_file and not classes and predicts(found.cfg) != {PROPOSALS}:
        raise UserError(
            f"{config_file} contains no class names (DATASETS.CLASSES is empty). Use the "
            "config.yaml in the run's output folder."
        )
    check_augmentation(found.cfg)
    return build_detectors(found, device)


def _find(name: str, config_file: str) -> tuple[str, str]:
    """Return the config file and the weights of a model; either may be empty."""
    if is_hub_name(name) or names_published(name):
        return config_file or config_next_to(name), name
    if is_zoo_name(name):
        zoo_config, zoo_weights = zoo_model(name)
        return config_file or zoo_config, str(zoo_weights)
    folder = os.path.dirname(name) if os.path.basename(name) == "config.yaml" else name
    if not config_file and os.path.isdir(folder or "."):
        for checkpoint in _CHECKPOINTS:
            path = os.path.join(folder, checkpoint)
            if os.path.isfile(path):
                return config_next_to(path), path
        if os.path.isdir(name):
            raise UserError(
                f"The folder {name} contains neither {' nor '.join(_CHECKPOINTS)}; expected the "
                "output folder of a finished run. Pass the path of a checkpoint."
            )
    if name.endswith((".yaml", ".yml")):
        return find_config(name), ""
    return config_file or config_next_to(name), name


def take_classes(cfg: CfgNode) -> None:
    """Copy the datasets' class names to the config if Detectron2's metadata contains them."""
    register_shapes()
    for name in [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]:
        known = MetadataCatalog.get(name).as_dict() if name in MetadataCatalog else {}
        if known.get("thing_classes"):
            cfg.DATASETS.CLASSES = list(known["thing_classes"])
            cfg.DATASETS.CATEGORY_IDS = category_ids(name)
            cfg.DATASETS.KEYPOINTS = list(known.get("keypoint_names", ()))
            if PIXELS in predicts(cfg):
                cfg.DATASETS.STUFF_CLASSES = list(known.get("stuff_classes", ()))
            return
