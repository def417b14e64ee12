"""Tests that compare fused detections with ensemble-boxes, Detectron2 and simple loops."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.modeling import DatasetMapperTTA, GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from torchvision.ops import batched_nms

import senet_transfer
from senet_transfer import UserError, save_weights
from senet_transfer.cli.evaluate import main, parser
from senet_transfer.config.load import load_config
from senet_transfer.engine import model_from, train
from senet_transfer.engine.inference.augmentation import with_augmentation
from senet_transfer.engine.inference.box_fusion import fuse_boxes
from senet_transfer.engine.inference.ensembles import check_same_classes
from senet_transfer.engine.inference.fused_detector import FusedDetector
from senet_transfer.engine.model_from import ModelSource
from senet_transfer.engine.run_checks import check_augmentation, check_run
from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer
from tests.engine.conftest import SMALL

# Boxes fused by ensemble-boxes, from write_fused_boxes.py.
FUSED = json.loads(Path(__file__).with_name("fused_boxes.json").read_text())
DETECTIONS = "coco_instances_results.json"
SIZES = (64, 80)
AUG = {"TEST.AUG.ENABLED": "True", "TEST.AUG.MIN_SIZES": str(SIZES), "TEST.AUG.MAX_SIZE": "120"}
# At this image size, this network is ten times as fast as the one in SMALL.
RESNET18 = {
    "MODEL.RESNETS.DEPTH": "18",
    "MODEL.RESNETS.NUM_GROUPS": "1",
    "MODEL.RESNETS.WIDTH_PER_GROUP": "64",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "64",
}
CONFIGS = {
    "RetinaNet": (
        "configs/retinanet_se_r50.yaml",
        {
            "MODEL.RETINANET.SCORE_THRESH_TEST": "0.0",
            "MODEL.RETINANET.TOPK_CANDIDATES_TEST": "20",
            "MODEL.RETINANET.NUM_CONVS": "1",
            "MODEL.RETINANET.NUM_CLASSES": "3",
            **RESNET18,
        },
    ),
    "GeneralizedRCNN": (
        "configs/faster_rcnn_se_r50.yaml",
        {"MODEL.ROI_HEADS.NUM_CLASSES": "3", **RESNET18},
    ),
}


@pytest.mark.parametrize("case", FUSED, ids=lambda case: f"iou {case['iou']}")
def test_weighted_boxes_fusion_equals_that_of_ensemble_boxes(case):
    def tensors(name: str) -> list[torch.Tensor]:
        return [torch.tensor(values) for values in case[name]]

    boxes = [part.view(-1, 4) for part in tensors("boxes")]
    classes = [part.long() for part in tensors("classes")]
    found = fuse_boxes(boxes, tensors("scores"), classes, case["iou"])
    assert 3 < len(case["fused"]) < sum(map(len, boxes)) / 2
    for values, name in zip(found, ("fused", "fused_scores", "fused_classes"), strict=True):
        np.testing.assert_allclose(values, case[name], rtol=0, atol=1e-5)


def built(architecture: str, seed: int = 0, **keys: str):
    """Return a config, and a detector that is built from it with random weights."""
    config, own = CONFIGS[architecture]
    options = {**SMALL, "MODEL.RESNETS.NORM": "GN", **own, **AUG, **keys}
    cfg = load_config(config, [word for pair in options.items() for word in pair])
    torch.manual_seed(seed)
    return cfg, Trainer.build_model(cfg).eval()


@pytest.fixture(scope="module")
def item(shapes) -> dict:
    """Return a detector's input dict, whose ``height`` and ``width`` are twice the image size."""
    pixels = read_image(min(shapes.glob("tiny/*.jpg")), "BGR")
    height, width = pixels.shape[:2]
    image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    return {"image": image, "height": 2 * height, "width": 2 * width}


def assert_same(found, boxes, scores, classes) -> None:
    assert len(found) > 5
    torch.testing.assert_close(found.scores, scores)
    assert torch.equal(found.pred_classes, classes)
    torch.testing.assert_close(found.pred_boxes.tensor, boxes, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def plain_views(model, item) -> tuple[torch.Tensor, ...]:
    """Return the detections at each image size in ``SIZES``, with and without horizontal flip."""
    pixels, found = item["image"].permute(1, 2, 0).numpy(), []
    for size in SIZES:
        factor = size / min(pixels.shape[:2])
        height, width = (round(factor * side) for side in pixels.shape[:2])
        resized = np.asarray(Image.fromarray(pixels).resize((width, height), Image.BILINEAR))
        for flip in (False, True):
            view = torch.from_numpy(resized[:, ::-1].copy() if flip else resized.copy())
            (output,) = model([{**item, "image": view.permute(2, 0, 1)}])
            one = output["instances"]
            boxes = one.pred_boxes.tensor.clone()
            if flip:
                boxes[:, [2, 0]] = item["width"] - boxes[:, [0, 2]]
            found.append((boxes, one.scores, one.pred_classes))
    return tuple(map(torch.cat, zip(*found, strict=True)))


@pytest.mark.long
def test_augmentation_of_retinanet_equals_a_plain_loop(item):
    cfg, model = built("RetinaNet")
    boxes, scores, classes = plain_views(model, item)
    keep = batched_nms(boxes, scores, classes, 0.5)[:100]
    augmented = with_augmentation(cfg, model)
    assert not augmented.training
    with torch.no_grad():
        (found,) = augmented([item])
    assert_same(found["instances"], boxes[keep], scores[keep], classes[keep])


@pytest.mark.long
def test_augmentation_of_an_r_cnn_equals_that_of_detectron2(item):
    cfg, model = built("GeneralizedRCNN")
    with torch.no_grad():
        (expected,) = GeneralizedRCNNWithTTA(cfg, model, batch_size=1)([item])
        (found,) = FusedDetector(cfg, [model], DatasetMapperTTA(cfg))([item])
    expected = expected["instances"]
    box = expected.pred_boxes.tensor
    assert_same(found["instances"], box, expected.scores, expected.pred_classes)


@pytest.mark.long
def test_boxes_of_different_architectures_and_of_all_views_are_fused(item):
    (cfg, first), (_, second) = built("RetinaNet"), built("GeneralizedRCNN", 1)
    with torch.no_grad():
        outputs = [model([item])[0]["instances"] for model in (first, second)]
        parts = [
            [one.pred_boxes.tensor for one in outputs],
            [one.scores for one in outputs],
            [one.pred_classes for one in outputs],
        ]
        model = FusedDetector(cfg, [first, second])
        (found,) = model([item])
        assert_same(found["instances"], *(field[:100] for field in fuse_boxes(*parts)))
        augmented = with_augmentation(cfg, model)
        assert isinstance(augmented, FusedDetector)
        assert len(augmented([item])[0]["instances"]) > len(outputs[0])


@pytest.mark.long
def test_an_image_without_detections_has_an_empty_result(item):
    cfg, model = built("RetinaNet", **{"MODEL.RETINANET.SCORE_THRESH_TEST": "0.99"})
    for detector in (with_augmentation(cfg, model), FusedDetector(cfg, [model, model])):
        (found,) = detector([item])
        assert len(found["instances"]) == 0


def test_detectors_without_class_names_need_the_same_number_of_classes():
    def source(architecture: str, **keys: str) -> ModelSource:
        config, own = CONFIGS[architecture]
        options = {**own, **keys}
        return ModelSource(load_config(config, [word for pair in options.items() for word in pair]))

    check_same_classes([source("RetinaNet"), source("GeneralizedRCNN")])
    other = source("RetinaNet", **{"MODEL.RETINANET.NUM_CLASSES": "4"})
    with pytest.raises(UserError, match="have 3 and 4 classes"):
        check_same_classes([source("GeneralizedRCNN"), other])


@pytest.mark.long
def test_checkpoints_are_evaluated_together_with_and_without_augmentation(command, tmp_path):
    def evaluate(*words: str) -> dict:
        flags = ["--weights", *weights, "--workers", "0", "--quiet", *words]
        # With these options, augmentation uses a single view: the unflipped image at one size.
        return main(parser().parse_args([*flags, "--scales", "64", "TEST.AUG.FLIP", "False"]))

    config, keys = CONFIGS["RetinaNet"]
    cfg = setup(command(config=config, **keys))
    run = tmp_path / "run"
    weights = [str(run / name) for name in ("a.pth", "b.pth")]
    for path in weights:
        save_weights(Trainer.build_model(cfg), path, classes=cfg.DATASETS.CLASSES)
    before = (run / "config.yaml").read_text()
    evaluate("--output", str(tmp_path / "results.json"))
    assert (run / "config.yaml").read_text() == before
    assert not (run / "results.json").exists()
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["weights"], results["scales"]) == (weights, [64])
    assert {"bbox", "bbox_TTA"} <= set(results)
    found = [
        json.loads((run / "evaluation" / folder / "own" / DETECTIONS).read_text())
        for folder in ("inference", "inference_TTA")
    ]
    assert len(found[0]) > 100
    for one, augmented in zip(*found, strict=True):
        assert augmented["bbox"] == pytest.approx(one["bbox"], abs=1e-2)
        assert augmented["score"] == pytest.approx(one["score"], abs=1e-6)
    ensemble = ["TEST.ENSEMBLE.WEIGHTS", str(tuple(weights[1:])), "INPUT.MIN_SIZE_TEST", "64"]
    predict = senet_transfer.load(weights[0], options=ensemble, device="cpu", threshold=0)
    photo = DatasetCatalog.get("own")[0]
    expected = [row for row in found[0] if row["image_id"] == photo["image_id"]]
    boxes = BoxMode.convert(predict(photo["file_name"]).boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    np.testing.assert_array_equal(boxes, [row["bbox"] for row in expected])
    with pytest.raises(UserError, match="--crops can't be used for a detector"):
        evaluate("--crops", "10")
    save_weights(Trainer.build_model(cfg), weights[1], classes=cfg.DATASETS.CLASSES[::-1])
    with pytest.raises(UserError, match="class orders of .* differ"):
        evaluate()


def test_results_are_written_next_to_a_checkpoint_and_not_to_a_weights_folder(
    tmp_path, monkeypatch
):
    runs = []
    monkeypatch.setattr(train, "main", lambda run: runs.append(run) or {})
    source = ModelSource(load_config("configs/faster_rcnn_se_r50.yaml", []))
    monkeypatch.setattr(model_from, "find_model", lambda *args, **options: source)
    checkpoint = tmp_path / "model_final.pth"
    checkpoint.touch()
    for weights in (str(checkpoint), "owner/detector"):
        main(parser().parse_args(["--weights", weights, "DATALOADER.NUM_WORKERS", "0"]))
    found = [load_config("configs/faster_rcnn_se_r50.yaml", list(run.options)) for run in runs]
    outputs = [cfg.OUTPUT_DIR for cfg in found]
    assert outputs == [str(tmp_path / "evaluation"), "output/evaluation"]
    assert [cfg.DATALOADER.NUM_WORKERS for cfg in found] == [0, 0]
    with pytest.raises(UserError, match="--batch-size can't be used for a detector"):
        main(parser().parse_args(["--weights", str(checkpoint), "--batch-size", "32"]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"MODEL.META_ARCHITECTURE": "PanopticFPN"},
            "predicts objects and panoptic segments and pixel classes",
        ),
        ({"MODEL.META_ARCHITECTURE": "SemanticSegmentor"}, "predicts pixel classes"),
        ({"MODEL.META_ARCHITECTURE": "ImageClassifier"}, "senet eval has --scales"),
        ({"MODEL.META_ARCHITECTURE": "RetinaNet", "MODEL.MASK_ON": "True"}, "masks .* only for"),
        ({"MODEL.KEYPOINT_ON": "True"}, "keypoints"),
        ({"MODEL.ROI_HEADS.NAME": "RROIHeads"}, "rotated boxes"),
        ({"TEST.ENSEMBLE.WEIGHTS": "('b.pth',)", "MODEL.MASK_ON": "True"}, "masks .* only for"),
        ({"TEST.ENSEMBLE.WEIGHTS": "('b.pth',)", "TEST.LOSS": "True"}, "TEST.LOSS is True"),
        ({"TEST.ENSEMBLE.WEIGHTS": "('b.pth',)", "TEST.ENSEMBLE.IOU": "1.5"}, "IOU is 1.5"),
        ({"MODEL.MASK_ON": "True"}, None),
    ],
)
def test_predictions_other_than_boxes_are_rejected(keys, message):
    options = {"TEST.AUG.ENABLED": "True", **keys}
    config = "configs/faster_rcnn_se_r50.yaml"
    cfg = load_config(config, [word for pair in options.items() for word in pair])
    if message is None:
        check_augmentation(cfg)
        return
    with pytest.raises(UserError, match=message):
        check_augmentation(cfg)


def test_several_detectors_are_rejected_in_training():
    options = ["TEST.ENSEMBLE.WEIGHTS", "('b.pth',)"]
    cfg = load_config("configs/faster_rcnn_se_r50.yaml", options)
    with pytest.raises(UserError, match=r"WEIGHTS is \['b.pth'\].*Set the key to \(\)"):
        check_run(cfg, eval_only=False, resume=False)


def test_other_predictions_of_an_unknown_architecture_are_rejected(item):
    class WithMasks(torch.nn.Module):
        def forward(self, inputs):
            fields = {"pred_boxes": Boxes(torch.zeros(0, 4)), "pred_masks": torch.zeros(0, 1, 1)}
            empty = torch.zeros(0)
            return [{"instances": Instances((1, 1), **fields, scores=empty, pred_classes=empty)}]

    cfg = load_config("configs/faster_rcnn_se_r50.yaml", [])
    with pytest.raises(UserError, match="predicts pred_masks; expected only axis-aligned"):
        FusedDetector(cfg, [WithMasks()])([item])
