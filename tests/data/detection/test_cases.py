"""Tests that annotation files and images from public bug reports are read or rejected correctly."""

import contextlib
import io
import json
import logging
import os
from collections import defaultdict

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from senet_transfer.config import get_senet_config
from senet_transfer.data.detection.coco import register_coco_dataset
from senet_transfer.data.detection.dataset_checks import (
    check_datasets_on_disk,
    check_segmentations,
    check_trainable,
)
from senet_transfer.data.detection.image_checks import check_images
from senet_transfer.data.detection.mapper import CheckedDatasetMapper
from senet_transfer.data.reading import reading_of
from senet_transfer.engine.setup import RunOptions, use_datasets
from senet_transfer.engine.train import main
from senet_transfer.engine.trainer import Trainer
from senet_transfer.errors import UserError
from tests.engine.conftest import SMALL

pytestmark = pytest.mark.usefixtures("catalogs")


def paths(cases, case):
    """Return the paths of a test case's annotation file and image folder."""
    folder = cases / case
    json_file = folder / ("train.json" if (folder / "train.json").exists() else "val.json")
    if (folder / "images").is_dir():
        return json_file, folder / "images"
    if case == "fn_backslash":  # its file names include the image folder
        return json_file, cases / "base"
    return json_file, cases / ("base_val" if case.startswith("val_") else "base") / "images"


def load(json_file, images, *, masks=False, evaluated=False, value_range=()):
    """Check an annotation file, and return the number of objects that the training mapper reads."""
    cfg = get_senet_config()
    cfg.MODEL.MASK_ON = masks
    cfg.INPUT.VALUE_RANGE = value_range
    if "sh_" not in str(json_file):  # images with extreme aspect ratios need the default size
        cfg.INPUT.MIN_SIZE_TRAIN = (96,)
    register_coco_dataset("own", json_file, images, segmentations=masks)
    check_datasets_on_disk(["own"], evaluated=["own"] if evaluated else [])
    check_trainable(["own"])
    if masks and check_segmentations(["own"]):
        cfg.INPUT.MASK_FORMAT = "bitmask"
    check_images(["own"], mode="decode", reading=reading_of(cfg))
    cfg.DATASETS.TRAIN = ("own",)
    mapper = CheckedDatasetMapper(cfg, is_train=True)
    return sum(len(mapper(record)["instances"]) for record in DatasetCatalog.get("own"))


# Number of objects and expected warning, if any, by case.
READ = {
    "base": (57, ""),
    "base_val": (44, ""),
    "area_missing": (57, "57 of 57 annotations have no `area`"),
    "area_null": (57, "57 of 57 annotations have no `area`"),
    "area_one": (57, "the `area` of 56 of 57 annotations does not match their box"),
    "bom": (57, ""),
    "cat0": (57, ""),
    "crlf": (57, ""),
    "dollar": (57, ""),
    "ex_upright": (57, ""),
    "fn_backslash": (57, "6 of the 6 file_names are spelled differently"),
    "fn_dup": (57, ""),
    "fn_nfd": (57, "6 of the 6 file_names are spelled differently"),
    "fn_pct": (57, "6 of the 6 file_names are spelled differently"),
    "fn_unicode": (57, ""),
    "ids_float": (57, ""),
    "ignore_null": (57, ""),
    "im_1": (57, ""),
    "im_12in16": (57, r"below 4096 of 65535.*INPUT.VALUE_RANGE to \[0, 4095\]"),
    "im_16": (57, ""),
    "im_bmp": (57, ""),
    "im_cmyk": (57, ""),
    "im_l": (57, ""),
    "im_la": (57, ""),
    "im_rgba": (57, ""),
    "im_webp": (57, ""),
    "iscrowd_bool": (57, ""),
    "iscrowd_missing": (57, "57 of 57 annotations have no `area` or no `iscrowd`"),
    "iscrowd_null": (57, "57 of 57 annotations have no `area` or no `iscrowd`"),
    "mostly_empty": (18, ""),
    "names_similar": (57, "differ only in spaces or upper and lower case"),
    "roboflow_root": (57, ""),
    "seg_flat_list": (57, ""),
    "seg_missing": (57, ""),
    "seg_null": (57, ""),
    "seg_two_points": (57, ""),
    "sh_3000x6": (57, ""),
    "taco": (57, ""),
    "val_alpha": (44, ""),
    "val_lacks": (44, ""),
    "val_otherids": (44, ""),
    "val_noiscrowd": (44, "44 of 44 annotations have no `area` or no `iscrowd`"),
    # Segmentations are not checked if the detector predicts only boxes.
    "m_none_one": (57, ""),
    "m_odd": (57, ""),
    "m_poly": (57, ""),
    "m_rle": (57, ""),
    "m_rle_garbage": (57, ""),
    "m_rle_pairs": (57, ""),
}

REJECTED = {
    "all_zero": r"all 57 boxes are \[0, 0, 0, 0\]",
    "bbox_empty": r"annotations\[0\] \(id 1\) has bbox \[\]",
    "bbox_nan": r"annotations\[3\] \(id 4\) has bbox \[1, 2, nan, 4\]",
    "bbox_neg": r"annotations\[3\] \(id 4\) has bbox .* with a negative size",
    "bbox_norm": "not fractions of the image size",
    "bbox_str": r"annotations\[0\] \(id 1\) has bbox \['55.35'",
    "cat_orphan": r"annotations\[5\] \(id 6\) has category_id 999, which is not in `categories`",
    "catid_str": r"has category_id '62', which is not in `categories`.*of type int",
    "cvat_crowd": "all 57 annotations have iscrowd=1.*CVAT.*set iscrowd to 0",
    "dup_ann_id": r"annotations\[1\] \(id 1\) has the same id as annotations\[0\]",
    "ex_lying": "which is outside its image of 256x166 pixels",
    "fn_abs": "expected a path inside the image folder",
    "im_f32": "6 of the 6 images .*floating-point numbers.* INPUT.VALUE_RANGE",
    "im_html": "1 of the 6 images .*000000000397.jpg cannot be read: it begins with b'<html>",
    "im_size": "1 of the 6 images .*000000000397.jpg .* is 128x96 pixels .* 256x192 pixels",
    "im_trunc": "1 of the 6 images .*000000000397.jpg cannot be read: image file is truncated",
    "imgid_str_ann": r"has image_id '110', which is not in `images`.*of type int",
    "size_float": r"images\[0\] \(id 110\) has width 256.0; expected a positive integer",
    "size_null": r"images\[0\] \(id 110\) has width None; expected a positive integer",
    "val_noann": "an empty `annotations` list.*allow_empty=True",
}


@pytest.mark.parametrize("case", READ)
@pytest.mark.long
def test_a_file_is_read_completely_with_a_warning_if_unusual(case, shared_cases, caplog):
    objects, warning = READ[case]
    with caplog.at_level(logging.WARNING, logger="senet_transfer"):
        assert load(*paths(shared_cases, case)) == objects
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == bool(warning), said
    if warning:
        (message,) = said
        pytest.raises(UserError, _raise, message).match(f"(?s){warning}")


def _raise(message):
    raise UserError(message)


@pytest.mark.parametrize("case", REJECTED)
def test_a_file_is_rejected_with_what_is_wrong(case, shared_cases):
    json_file, images = paths(shared_cases, case)
    with pytest.raises(UserError, match=f"(?s){REJECTED[case]}") as caught:
        load(json_file, images)
    assert str(json_file) in str(caught.value)


def test_two_classes_of_two_image_folders_are_read(shared_cases, tmp_path):
    for part in ("base", "base_val"):
        for image in (shared_cases / part / "images").iterdir():
            (tmp_path / image.name).symlink_to(image)
    assert load(shared_cases / "cls2" / "train.json", tmp_path) == 63


@pytest.mark.parametrize(("case", "value_range"), [("im_12in16", (0, 4095)), ("im_f32", (0, 1))])
def test_a_value_range_gives_the_images_of_8_bits(case, value_range, shared_cases, caplog):
    with caplog.at_level(logging.WARNING, logger="senet_transfer"):
        assert load(*paths(shared_cases, case), value_range=value_range) == 57
    assert not caplog.records


def test_a_file_without_iscrowd_is_not_evaluated_on(shared_cases):
    with pytest.raises(UserError, match="44 of 44 annotations have no `area` or no `iscrowd`"):
        load(*paths(shared_cases, "val_noiscrowd"), evaluated=True)


# ------------------------------------------------------------- masks


@pytest.mark.parametrize("case", ["m_poly", "m_rle", "ev3_poly", "ev3_rle", "ev3_rle_un"])
def test_segmentations_are_read_as_masks(case, shared_cases):
    assert load(*paths(shared_cases, case), masks=True) == 57


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("m_none_one", r"annotations\[0\] \(id 1\) has no `segmentation`"),
        ("m_odd", r"annotations\[0\] \(id 1\) .*an odd number of coordinates \(17\)"),
        ("m_rle_garbage", r"annotations\[0\] \(id 1\) .*counts 'not-an-rle!!'"),
        ("m_rle_pairs", r"annotations\[0\] \(id 1\) .*pairs of start and length"),
        ("seg_flat_list", r"annotations\[0\] \(id 1\) .*flat list of"),
        ("seg_missing", r"annotations\[0\] \(id 1\) has no `segmentation`"),
        ("seg_null", r"annotations\[0\] \(id 1\) has no `segmentation`"),
        ("seg_two_points", r"annotations\[0\] \(id 1\) .*2 points"),
    ],
)
def test_invalid_segmentations_are_rejected_by_name(case, message, shared_cases):
    json_file, images = paths(shared_cases, case)
    with pytest.raises(UserError, match=message) as caught:
        load(json_file, images, masks=True)
    assert str(caught.value).startswith(f"{json_file}: ")


@pytest.mark.parametrize("case", ["m_poly", "m_rle"])
@pytest.mark.long
def test_mask_rcnn_trains_and_is_evaluated_on_both_kinds_of_segmentations(
    case, shared_cases, tmp_path
):
    json_file, images = paths(shared_cases, case)
    keys = {
        **SMALL,
        "SOLVER.MAX_ITER": "1",
        "SOLVER.STEPS": "()",
        "MODEL.ROI_MASK_HEAD.CONV_DIM": "8",
        "DATASETS.TRAIN": "('own',)",
        "DATASETS.TEST": "('own',)",
        "OUTPUT_DIR": str(tmp_path),
    }
    words = [word for item in keys.items() for word in item]
    dataset = ("own", str(json_file), str(images))
    main(RunOptions("mask_rcnn_se_r50", words, datasets=[dataset], quiet=True))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["segm"]["AP"] >= 0


# ------------------------------------------------------------- evaluation


SIGMAS = [0.05, 0.07, 0.09]  # for the three keypoints in ev3_kp


def renumbered(content):
    """Return a copy of COCO annotations with images, categories and objects renumbered from 1."""
    content = json.loads(json.dumps(content))
    images = {image["id"]: number for number, image in enumerate(content["images"], 1)}
    ordered = sorted(content["categories"], key=lambda category: category["id"])
    categories = {category["id"]: number for number, category in enumerate(ordered, 1)}
    for image in content["images"]:
        image["id"] = images[image["id"]]
    for category in content["categories"]:
        category["id"] = categories[category["id"]]
    for number, item in enumerate(content["annotations"], 1):
        item |= {
            "id": number,
            "image_id": images[item["image_id"]],
            "category_id": categories[item["category_id"]],
            "iscrowd": int(item["iscrowd"]),
        }
    return content


def detections(content, tasks):
    """Return detections keyed by image id: shifted and resized copies of most annotated objects.

    The keys of a detection are those of COCO's results format, except for ``"mask"``, which is
    an array ``(H, W)``.
    """
    rng = np.random.default_rng(0)
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    found = defaultdict(list)
    for item in content["annotations"]:
        x, y, w, h = item["bbox"]
        box = [x + rng.normal(0, 0.1) * w, y, w * rng.uniform(0.8, 1.2), max(h, 1)]
        one = {"image_id": item["image_id"], "category_id": item["category_id"], "bbox": box}
        one["score"] = float(rng.uniform(0.05, 1))
        if "segm" in tasks:
            height, width = sizes[item["image_id"]]
            mask = np.zeros((height, width), np.uint8)
            left, top, right, bottom = (round(v) for v in (x, y, x + box[2], y + box[3]))
            mask[max(top, 0) : bottom, max(left, 0) : right] = 1
            one["mask"] = mask
        if "keypoints" in tasks:
            points = np.array(item["keypoints"], float).reshape(-1, 3)
            points[:, :2] += rng.normal(0, 2, (len(points), 2))
            one["keypoints"] = points
        if rng.random() < 0.9:
            found[item["image_id"]].append(one)
    return found


def as_instances(found, size):
    instances = Instances(size)
    boxes = torch.tensor([one["bbox"] for one in found]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    instances.pred_boxes = Boxes(boxes)
    instances.scores = torch.tensor([one["score"] for one in found])
    instances.pred_classes = torch.tensor([one["category_id"] - 1 for one in found]).long()
    if found and "mask" in found[0]:
        instances.pred_masks = torch.tensor(np.stack([one["mask"] for one in found])).bool()
    if found and "keypoints" in found[0]:
        points = torch.tensor(np.stack([one["keypoints"] for one in found])).float()
        instances.pred_keypoints = points
    return instances


def evaluate(cfg, content, found):
    """Evaluate detections with the evaluator of a training run, and return the metrics.

    ``found`` maps the position of each image in the annotation file, starting at 1, to its
    detections.
    """
    evaluator = Trainer.build_evaluator(cfg, "own")
    evaluator.reset()
    for number, image in enumerate(content["images"], 1):
        instances = as_instances(found[number], (image["height"], image["width"]))
        record = {"image_id": image["id"], "file_name": image["file_name"]}
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()


def expected_results(content, found, task, most):
    """Evaluate detections with pycocotools and return the AP and AP50 in percent.

    ``content`` contains COCO annotations returned by :func:`renumbered`. ``found`` maps each image
    id to the detections in the image.
    """
    results = []
    for image in content["images"]:
        size = image["height"], image["width"]
        instances = as_instances(found[image["id"]], size)
        boxes = instances.pred_boxes.tensor.clone()
        boxes[:, 2:] -= boxes[:, :2]
        for index, one in enumerate(found[image["id"]]):
            row = {key: one[key] for key in ("image_id", "category_id")}
            row |= {"bbox": boxes[index].tolist(), "score": instances.scores[index].item()}
            if task == "segm":
                row["segmentation"] = coco_mask.encode(np.asfortranarray(one["mask"]))
                row.pop("bbox")
            if task == "keypoints":
                points = instances.pred_keypoints[index].clone()
                points[:, :2] -= 0.5
                row["keypoints"] = points.flatten().tolist()
                row.pop("bbox")
            results.append(row)
    truth = COCO()
    truth.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), task)
        if task == "keypoints":
            evaluation.params.kpt_oks_sigmas = np.array(SIGMAS)
        else:
            evaluation.params.maxDets = [1, 10, most]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"AP": 100 * evaluation.stats[0], "AP50": 100 * evaluation.stats[1]}


EVALUATED = [
    *(f"ev_{name}" for name in (
        "plain", "ann_2p62", "ann_2p64", "ann_zero", "area_zero", "cat_2p40", "cat_2p64",
        "cat_negative", "cat_zero", "crowd_bool", "float_ids", "ignore0", "img_2p40", "img_2p63",
        "img_2p64", "img_negative", "noseg", "zero_width", "s_plain", "s_ann_u128", "s_ann_u64",
        "s_datetime17", "s_u128",
    )),
    "ev3_poly", "ev3_rle", "ev3_rle_un", "ev3_crowdpoly", "ev3_kp", "val_uuid_ann", "base_val",
]  # fmt: skip


@pytest.mark.parametrize("case", EVALUATED)
@pytest.mark.long
def test_metrics_equal_pycocotools_for_numbered_ids(case, shared_cases, tmp_path):
    json_file, images = paths(shared_cases, case)
    content = json.loads(json_file.read_text())
    numbered = renumbered(content)
    tasks = {"ev3_kp": ["bbox", "keypoints"]}.get(case, ["bbox", "segm"])
    tasks = tasks if case.startswith("ev3_") else ["bbox"]
    register_coco_dataset("own", json_file, images)
    cfg = get_senet_config()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.DATASETS.TEST = ("own",)
    cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON = "segm" in tasks, "keypoints" in tasks
    cfg.TEST.KEYPOINT_OKS_SIGMAS = SIGMAS
    found = detections(numbered, tasks)
    with contextlib.redirect_stdout(io.StringIO()):
        results = evaluate(cfg, content, found)
    for task in tasks:
        expected = expected_results(numbered, found, task, 100)
        for metric, value in expected.items():
            assert results[task][metric] == pytest.approx(value, rel=1e-12, nan_ok=True), metric


@pytest.mark.long
def test_more_than_100_objects_are_counted_with_the_key(shared_cases, tmp_path):
    json_file, images = paths(shared_cases, "dense")
    content = json.loads(json_file.read_text())
    found = {1: [{**item, "score": 0.9} for item in content["annotations"]]}
    register_coco_dataset("own", json_file, images)
    cfg = get_senet_config()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.TEST.DETECTIONS_PER_IMAGE = 300
    with contextlib.redirect_stdout(io.StringIO()):
        assert evaluate(cfg, content, found)["bbox"]["AP"] == pytest.approx(100)


def test_classes_in_another_order_are_mapped_or_rejected_with_both_lists(shared_cases):
    json_file, images = paths(shared_cases, "val_alpha")
    cfg = get_senet_config()
    cfg.DATASETS.REGISTER = [["own", str(json_file), str(images)]]
    cfg.DATASETS.TEST = ("own",)
    cfg.DATASETS.CLASSES = ["person", "cup", "chair"]
    message = ""
    try:
        use_datasets(cfg, eval_only=True, keep_classes=True)
    except UserError as error:
        message = str(error)
    if message:
        assert "['person', 'cup', 'chair']" in message
        assert "['chair', 'cup', 'person']" in message
    else:
        assert cfg.DATASETS.CLASSES == ["person", "cup", "chair"]
        assert MetadataCatalog.get("own").thing_classes == cfg.DATASETS.CLASSES


def test_every_case_has_an_outcome(shared_cases):
    folders = {entry for entry in os.listdir(shared_cases) if (shared_cases / entry).is_dir()}
    others = {"cls2", "dense"}
    assert folders == {*READ, *REJECTED, *EVALUATED, *others}
