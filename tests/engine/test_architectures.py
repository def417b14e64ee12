"""Tests for segmentation, region proposals, keypoints, rotated boxes, Pascal VOC and LVIS.

The models are trained and evaluated on a few synthetic images.
"""

import importlib.util
import itertools
import json

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances, RotatedBoxes
from detectron2.utils.events import EventStorage
from pycocotools import mask as mask_util

from senet_transfer import UserError
from senet_transfer.cli.arguments import argument_parser
from senet_transfer.cli.train import run_options
from senet_transfer.config.load import load_config
from senet_transfer.data.detection.coco import flip_pairs, register_coco_dataset
from senet_transfer.data.detection.mapper import read_labels
from senet_transfer.engine.predictor.files import predict_files
from senet_transfer.engine.predictor.load import load_trained
from senet_transfer.engine.predictor.predictor import DetectorPredictor
from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer
from senet_transfer.evaluation.evaluators import check_evaluators, evaluator_kinds
from senet_transfer.export.write import export_model
from tests.engine import drawn_objects as drawn
from tests.engine.conftest import SMALL

has_lvis = importlib.util.find_spec("lvis") is not None
needs_lvis = pytest.mark.skipif(not has_lvis, reason="the package lvis is not installed")

SEM_SEG = {"MODEL.SEM_SEG_HEAD.CONVS_DIM": "16", "MODEL.SEM_SEG_HEAD.NORM": ""}
MASKS = {"MODEL.MASK_ON": "True", "MODEL.ROI_MASK_HEAD.CONV_DIM": "16",
         "MODEL.ROI_MASK_HEAD.NUM_CONV": "1"}  # fmt: skip
ROTATED = {
    "MODEL.PROPOSAL_GENERATOR.NAME": "RRPN",
    "MODEL.ANCHOR_GENERATOR.NAME": "RotatedAnchorGenerator",
    "MODEL.ANCHOR_GENERATOR.ANGLES": "[[-90, 0]]",
    "MODEL.RPN.BOUNDARY_THRESH": "-1",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": "100",
    "MODEL.RPN.PRE_NMS_TOPK_TEST": "100",
    "MODEL.RPN.BBOX_REG_WEIGHTS": "(1.0, 1.0, 1.0, 1.0, 1.0)",
    "MODEL.ROI_HEADS.NAME": "RROIHeads",
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignRotated",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": "(10.0, 10.0, 5.0, 5.0, 1.0)",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return drawn.draw(tmp_path_factory.mktemp("drawn") / "photos")


@pytest.fixture(autouse=True)
def forgotten():
    """Unregister the dataset "drawn" before and after each test."""
    drawn.forget("drawn")
    yield
    drawn.forget("drawn")


@pytest.fixture
def options(tmp_path):
    """Return a function that builds options for one training iteration on synthetic images."""

    def make(*flags: str, **keys: str):
        keys = {**SMALL, "OUTPUT_DIR": str(tmp_path / "run"), "DATASETS.TRAIN": "('drawn',)",
                "DATASETS.TEST": "('drawn',)", "SOLVER.MAX_ITER": "1", "SOLVER.STEPS": "()",
                **keys}  # fmt: skip
        words = ["--config-file", "configs/faster_rcnn_se_r50.yaml", *flags]
        words += [word for item in keys.items() for word in item]
        return run_options(argument_parser().parse_args(words))

    return make


def trained(args) -> Trainer:
    trainer = Trainer(setup(args))
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer


def predicted(images, tmp_path) -> dict:
    loaded = load_trained(str(tmp_path / "run" / "model_final.pth"))
    paths = [str(image.path) for image in images]
    predict_files(
        DetectorPredictor.of(loaded, threshold=0), paths, str(tmp_path / "out"), quiet=True
    )
    assert len(list((tmp_path / "out").glob("*.jpg"))) == len(images)
    return json.loads((tmp_path / "out" / "predictions.json").read_text())


@pytest.mark.long
def test_a_semantic_segmentation_is_trained_evaluated_and_predicted(images, options, tmp_path):
    drawn.register_labels("drawn", images)
    trainer = trained(options(**SEM_SEG, **{"MODEL.META_ARCHITECTURE": "SemanticSegmentor"}))
    assert trainer.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    # Compute the accuracy by hand from predictions at the original image size.
    found = predicted(images, tmp_path)
    right = total = 0
    names = [category["name"] for category in found["categories"]]
    assert names == ["background", *drawn.CLASSES]
    for image_id, image in enumerate(images, start=1):
        labels = read_labels(str(image.path.with_name(f"{image.path.stem}_labels.png")), (64, 96))
        for annotation in found["annotations"]:
            if annotation["image_id"] == image_id:
                mask = mask_util.decode(annotation["segmentation"]).astype(bool)
                right += (labels[mask] == annotation["category_id"] - 1).sum()
        total += (labels != 255).sum()
    assert trainer.results["sem_seg"]["pACC"] == pytest.approx(100 * right / total)


@pytest.mark.long
def test_a_panoptic_fpn_is_trained_evaluated_and_predicted(images, options, tmp_path):
    drawn.register_labels("drawn", images, objects=True)
    trainer = trained(options(**SEM_SEG, **MASKS, **{"MODEL.META_ARCHITECTURE": "PanopticFPN"}))
    assert {"bbox", "segm", "sem_seg"} == set(trainer.results)
    found = predicted(images, tmp_path)
    assert [c["name"] for c in found["categories"]] == [
        *drawn.CLASSES,
        "background",
        *drawn.CLASSES,
    ]


@pytest.mark.long
def test_a_region_proposal_network_is_trained_evaluated_predicted_and_exported(
    images, options, tmp_path
):
    json_file = drawn.coco_file(tmp_path / "drawn.json", images)
    own = ("--dataset", "drawn", str(json_file), str(images[0].path.parent))
    trainer = trained(options(*own, **{"MODEL.META_ARCHITECTURE": "ProposalNetwork"}))
    assert set(trainer.results) == {"box_proposals"}
    found = predicted(images, tmp_path)
    assert found["categories"] == [{"id": 1, "name": "object"}]
    assert len(found["annotations"]) > 0
    loaded = load_trained(str(tmp_path / "run" / "model_final.pth"))
    said = export_model(
        loaded.model, loaded.cfg, str(tmp_path / "rpn.ts"), image=str(images[0].path)
    )
    assert "both detect the same" in said


@pytest.mark.long
def test_keypoints_are_trained_evaluated_and_predicted_with_their_names(images, options, tmp_path):
    json_file = drawn.coco_file(tmp_path / "drawn.json", images)
    own = ("--dataset", "drawn", str(json_file), str(images[0].path.parent))
    keys = {"MODEL.KEYPOINT_ON": "True", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": "[16]"}
    with pytest.raises(UserError, match="KEYPOINT_OKS_SIGMAS has 0 values.*3 keypoints"):
        setup(options(*own, **keys))
    trainer = trained(options(*own, **keys, **{"TEST.KEYPOINT_OKS_SIGMAS": "[0.1, 0.1, 0.1]"}))
    assert trainer.cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 3
    assert set(trainer.results) == {"bbox", "keypoints"}
    found = predicted(images, tmp_path)
    assert found["categories"][0]["keypoints"] == drawn.KEYPOINTS
    assert {len(a["keypoints"]) for a in found["annotations"]} == {9}
    # A horizontal flip swaps the left and right ends.
    assert MetadataCatalog.get("drawn").keypoint_flip_map == [("left_end", "right_end")]


@pytest.mark.long
def test_rotated_boxes_are_trained_evaluated_and_predicted(images, options, tmp_path):
    drawn.register_rotated("drawn", images)
    turns = {"INPUT.VERTICAL_FLIP": "0.5", "INPUT.RIGHT_ANGLES": "True",
             "INPUT.BRIGHTNESS": "(0.8, 1.2)"}  # fmt: skip
    trainer = trained(options(**ROTATED, **turns))
    assert set(trainer.results) == {"bbox"}
    assert trainer.results["bbox"]["AP"] >= 0
    found = predicted(images, tmp_path)
    assert {len(annotation["bbox"]) for annotation in found["annotations"]} == {5}


@pytest.mark.long
@pytest.mark.parametrize(
    "keys",
    [
        {"MODEL.META_ARCHITECTURE": "RetinaNet", "MODEL.RETINANET.NUM_CONVS": "1",
         "MODEL.RETINANET.IN_FEATURES": "['p2', 'p3', 'p4', 'p5', 'p6']"},
        {**MASKS, "INPUT.CROP.ENABLED": "True", "INPUT.MASK_FORMAT": "bitmask"},
        {**MASKS, "INPUT.COPY_PASTE": "0.5"},
        {"MODEL.KEYPOINT_ON": "True", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": "[16]",
         "TEST.KEYPOINT_OKS_SIGMAS": "[0.1, 0.1, 0.1]",
         "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": "0"},
    ],
    ids=["RetinaNet", "masks and crops", "copy-paste", "keypoints"],
)  # fmt: skip
def test_images_without_objects_train_as_background(keys, images, options, tmp_path):
    path = drawn.coco_file(tmp_path / "drawn.json", images)
    content = json.loads(path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 1]
    path.write_text(json.dumps(content))
    own = ("--dataset", "drawn", str(path), str(images[0].path.parent))
    cfg = setup(options(*own, **keys, **{"DATALOADER.FILTER_EMPTY_ANNOTATIONS": "False"}))
    model, loader = Trainer.build_model(cfg), Trainer.build_train_loader(cfg, 0)
    samples = sum(itertools.islice(loader, 6), [])
    assert {sample["image_id"] for sample in samples} == set(range(1, len(images) + 1))
    samples.sort(key=lambda sample: len(sample["instances"]))
    assert len(samples[1]["instances"]) == 0 < len(samples[-1]["instances"])
    for batch in (samples[:2], [samples[0], samples[-1]]):
        with EventStorage():
            losses = model(batch)
        assert all(loss.isfinite() for loss in losses.values())
        model.zero_grad()
        sum(losses.values()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        # The network learns from the background.
        assert any(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.long
def test_pascal_voc_is_trained_and_evaluated(images, options):
    drawn.register_voc("drawn", images)
    trainer = trained(options())
    assert set(trainer.results["bbox"]) == {"AP", "AP50", "AP75"}


@pytest.mark.long
@needs_lvis
def test_lvis_is_trained_and_evaluated(images, options):
    drawn.register_lvis("drawn", images)
    trainer = trained(options())
    assert "APr" in trainer.results["bbox"]


# ---- evaluators


def evaluate(keys: dict[str, str], outputs: list[dict], images, tmp_path) -> dict:
    """Evaluate model outputs on the dataset "drawn" and return the metrics."""
    words = [word for item in keys.items() for word in item]
    cfg = load_config("", [*words, "OUTPUT_DIR", str(tmp_path)])
    cfg.DATASETS.TEST = ("drawn",)
    check_evaluators(cfg, (), ("drawn",))
    evaluator = Trainer.build_evaluator(cfg, "drawn")
    evaluator.reset()
    kinds = evaluator_kinds(cfg, "drawn")
    for index, (image, output) in enumerate(zip(images, outputs, strict=True)):
        # Image ids start at 1 in annotation files, but at 0 in the records of rotated boxes.
        image_id = image.path.stem if kinds == ["pascal_voc"] else index + (kinds != ["rotated"])
        record = {"file_name": str(image.path), "image_id": image_id, "height": 64, "width": 96}
        evaluator.process([record], [output])
    return evaluator.evaluate()


def truth(images, *, rotated: bool = False, first: int = 0) -> list[dict]:
    """Return detections equal to the ground truth, but none for the first ``first`` images."""
    outputs = []
    for index, image in enumerate(images):
        boxes = torch.tensor(image.boxes, dtype=torch.float32)
        if rotated:
            size = boxes[:, 2:] - boxes[:, :2]
            boxes = torch.cat([boxes[:, :2] + size / 2, size, torch.zeros(len(boxes), 1)], 1)
        found = Instances((64, 96))
        found.pred_boxes = RotatedBoxes(boxes) if rotated else Boxes(boxes)
        found.scores = torch.full((len(boxes),), 0.9)
        found.pred_classes = torch.tensor(image.classes)
        outputs.append({"instances": found[: 0 if index < first else len(found)]})
    return outputs


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("voc", {}),
        pytest.param("lvis", {}, marks=needs_lvis),
        ("rotated", ROTATED),
    ],
)
def test_perfect_predictions_have_an_ap_of_100_and_half_of_them_of_50(kind, keys, images, tmp_path):
    getattr(drawn, f"register_{kind}")("drawn", images)
    rotated = kind == "rotated"
    keys = {key: value for key, value in keys.items() if "REG_WEIGHTS" not in key}
    perfect = evaluate(keys, truth(images, rotated=rotated), images, tmp_path)["bbox"]
    assert perfect["AP"] == pytest.approx(100)
    assert perfect["AP50"] == pytest.approx(100)
    half = evaluate(keys, truth(images, rotated=rotated, first=2), images, tmp_path)["bbox"]
    # COCO and LVIS average the precision at recalls of 0, 0.01, ... 1. With half of the objects of
    # each class, only the 51 of 101 recalls up to 0.5 are reached.
    expected = 50 if kind == "voc" else 100 * 51 / 101
    assert half["AP50"] == pytest.approx(expected, abs=0.01)


def test_perfect_proposals_have_a_recall_of_100_and_half_of_them_of_50(images, tmp_path):
    json_file = drawn.coco_file(tmp_path / "drawn.json", images)
    register_coco_dataset("drawn", json_file, images[0].path.parent)
    keys = {"MODEL.META_ARCHITECTURE": "ProposalNetwork"}
    for first, expected in ((0, 100), (2, 50)):
        outputs = []
        for index, image in enumerate(images):
            found = Instances((64, 96))
            # Detectron2 requires at least one proposal per image.
            boxes = image.boxes if index >= first else [(0, 0, 1, 1)]
            found.proposal_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
            found.objectness_logits = torch.zeros(len(boxes))
            outputs.append({"proposals": found})
        results = evaluate(keys, outputs, images, tmp_path)["box_proposals"]
        assert results["AR@100"] == pytest.approx(expected)


def test_a_semantic_segmentation_is_evaluated_as_computed_by_hand(images, tmp_path):
    drawn.register_labels("drawn", images)
    outputs, common, either = [], np.zeros(3), np.zeros(3)
    for image in images:
        labels = read_labels(str(image.path.with_name(f"{image.path.stem}_labels.png")), (64, 96))
        predicted = np.where(labels == 255, 0, labels)
        predicted[:, :20] = 0
        outputs.append(
            {
                "sem_seg": torch.nn.functional.one_hot(torch.tensor(predicted).long(), 3).permute(
                    2, 0, 1
                )
            }
        )
        valid = labels != 255
        for index in range(3):
            one, other = (predicted == index) & valid, (labels == index) & valid
            common[index] += (one & other).sum()
            either[index] += (one | other).sum()
    keys = {"MODEL.META_ARCHITECTURE": "SemanticSegmentor"}
    results = evaluate(keys, outputs, images, tmp_path)["sem_seg"]
    assert results["mIoU"] == pytest.approx(100 * (common / either).mean())
    assert results["mIoU"] < 95


@pytest.mark.parametrize(
    ("kind", "architecture", "words"),
    [
        ("lvis", "GeneralizedRCNN", "package lvis.*pip install --no-deps lvis"),
        ("coco_panoptic_seg", "PanopticFPN", "package panopticapi.*pip install"),
        ("cityscapes_instance", "GeneralizedRCNN", "cityscapesscripts.*pip install"),
        ("cityscapes_sem_seg", "SemanticSegmentor", "cityscapesscripts.*pip install"),
        ("sem_seg", "GeneralizedRCNN", "evaluates pixel classes.*predicts objects"),
        ("pascal_voc", "SemanticSegmentor", "evaluates objects.*predicts pixel classes"),
        ("own", "GeneralizedRCNN", "is 'own'; expected one of: coco, "),
        ("sem_seg", "SemanticSegmentor", "no ignore_label"),
    ],
)
def test_the_requirements_of_evaluation_are_checked_at_start(
    kind, architecture, words, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    MetadataCatalog.pop("other", None)
    MetadataCatalog.get("other").set(evaluator_type=kind)
    cfg = load_config("", ["MODEL.META_ARCHITECTURE", architecture])
    with pytest.raises(UserError, match=f"(?s){words}"):
        check_evaluators(cfg, (), ("other",))


def test_annotations_of_lvis_need_its_package_for_training_too(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    MetadataCatalog.pop("other", None)
    MetadataCatalog.get("other").set(evaluator_type="lvis")
    with pytest.raises(UserError, match="package lvis"):
        check_evaluators(load_config(""), ("other",), ())


@pytest.mark.parametrize(
    ("architecture", "kind", "expected"),
    [
        ("GeneralizedRCNN", "coco_panoptic_seg", ["coco"]),
        ("SemanticSegmentor", "coco_panoptic_seg", ["sem_seg"]),
        ("PanopticFPN", "coco_panoptic_seg", ["coco", "sem_seg", "panoptic"]),
        ("ProposalNetwork", "coco", ["coco"]),
        ("RetinaNet", "lvis", ["lvis"]),
    ],
)
def test_a_data_set_is_evaluated_for_what_the_model_predicts(architecture, kind, expected):
    MetadataCatalog.pop("other", None)
    MetadataCatalog.get("other").set(evaluator_type=kind)
    cfg = load_config("", ["MODEL.META_ARCHITECTURE", architecture])
    assert evaluator_kinds(cfg, "other") == expected


# ---- data


def test_bad_label_images_are_rejected_by_name(images, options, tmp_path):
    drawn.register_labels("drawn", images)
    path = str(images[0].path.with_name(f"{images[0].path.stem}_labels.png"))
    assert set(np.unique(read_labels(path, (64, 96), (3, 255)))) == {0, 1, 2, 255}
    with pytest.raises(UserError, match=r"_labels.png.*labels \[2\].*0 to 1.*255"):
        read_labels(path, (64, 96), (2, 255))
    with pytest.raises(UserError, match="_labels.png is 96x64.*expected 64x96"):
        read_labels(path, (96, 64))
    with pytest.raises(UserError, match="cannot be read: the file does not exist"):
        read_labels(str(tmp_path / "none.png"), (64, 96))
    segmentation = {"MODEL.META_ARCHITECTURE": "SemanticSegmentor", **SEM_SEG}
    hidden = images[1].path.with_name(f"{images[1].path.stem}_labels.png")
    hidden.rename(tmp_path / "hidden.png")
    with pytest.raises(UserError, match="1 of 4 images of the dataset drawn have no label image"):
        setup(options(**segmentation))
    (tmp_path / "hidden.png").rename(hidden)
    MetadataCatalog.pop("drawn")
    MetadataCatalog.get("drawn").set(evaluator_type="sem_seg", ignore_label=255)
    with pytest.raises(UserError, match="no semantic segmentation classes"):
        setup(options(**segmentation))


def test_keypoints_are_exchanged_by_their_names():
    names = ["nose", "left_eye", "right_eye", "tailLeft", "tailRight", "left_only"]
    assert flip_pairs(names) == [("left_eye", "right_eye"), ("tailLeft", "tailRight")]
