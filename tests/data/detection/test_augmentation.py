"""Tests for the optional augmentation for detectors: transforms, copy-paste, seeding, errors."""

import functools
import itertools
import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from senet_transfer import UserError
from senet_transfer.config.load import load_config, merge_options
from senet_transfer.data.detection.augmentation.build import (
    check_detection_augmentation,
    with_augmentation,
)
from senet_transfer.data.detection.augmentation.copy_paste import paste
from senet_transfer.data.detection.augmentation.right_angles import RightAngleRotation
from senet_transfer.data.detection.coco import register_coco_dataset
from senet_transfer.data.detection.loader import build_train_loader, seeded_rng
from senet_transfer.data.detection.mapper import CheckedDatasetMapper
from senet_transfer.data.shapes.generate import make_shapes

pytestmark = pytest.mark.usefixtures("catalogs")

EVERYTHING = {
    "INPUT.BRIGHTNESS": "(0.8, 1.2)",
    "INPUT.CONTRAST": "(0.8, 1.2)",
    "INPUT.SATURATION": "(0.8, 1.2)",
    "INPUT.VERTICAL_FLIP": "0.5",
    "INPUT.RIGHT_ANGLES": "True",
    "INPUT.COPY_PASTE": "0.5",
}
JITTER = {
    "INPUT.LARGE_SCALE_JITTER.ENABLED": "True",
    "INPUT.LARGE_SCALE_JITTER.SIZE": "(64, 80)",
    "INPUT.MASK_FORMAT": "bitmask",
}
HEIGHT, WIDTH = 6, 8


@functools.cache
def base():
    return load_config("configs/base/faster_rcnn_fpn.yaml")


def config(**options):
    keys = {"MODEL.MASK_ON": "True", "DATASETS.TRAIN": "('own',)", **options}
    keys.setdefault("INPUT.MIN_SIZE_TRAIN", "(64,)")
    words = [word for item in keys.items() for word in item]
    cfg = base().clone()
    merge_options(cfg, words)
    return cfg


# -------------------------------------------------------------------------- flips and rotations


@pytest.fixture
def person(tmp_path):
    """Return a dataset dict with one object, which has a box, a polygon and three keypoints."""
    MetadataCatalog.get("own").set(
        keypoint_names=["nose", "left_eye", "right_eye"],
        keypoint_flip_map=[("left_eye", "right_eye")],
    )
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return {
        "file_name": str(tmp_path / "a.png"),
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": [
            {
                "bbox": [1, 1, 3, 4],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 0,
                "segmentation": [[1, 1, 4, 1, 4, 3, 2, 3, 2, 5, 1, 5]],  # L-shaped
                "keypoints": [1.5, 1.5, 2, 3.5, 2.5, 2, 1.5, 4.5, 1],
            }
        ],
    }


def mapped(record, transform, **options):
    cfg = config(**{"MODEL.KEYPOINT_ON": "True", "INPUT.MASK_FORMAT": "bitmask", **options})
    arguments = CheckedDatasetMapper.from_config(cfg, is_train=True)
    return CheckedDatasetMapper(**arguments | {"augmentations": [transform]})(record)


TURNED = {
    "vertical flip": (T.VFlipTransform(HEIGHT), F.vertical_flip),
    "90": (RightAngleRotation(1, HEIGHT, WIDTH), lambda x: F.rotate(x, 90, expand=True)),
    "180": (RightAngleRotation(2, HEIGHT, WIDTH), lambda x: F.rotate(x, 180, expand=True)),
    "270": (RightAngleRotation(3, HEIGHT, WIDTH), lambda x: F.rotate(x, 270, expand=True)),
}


@pytest.mark.parametrize("name", TURNED)
def test_images_boxes_masks_and_keypoints_are_transformed_as_by_torchvision(name, person):
    ours, theirs = TURNED[name]
    before, after = mapped(person, T.NoOpTransform()), mapped(person, ours)
    assert torch.equal(after["image"], theirs(before["image"]))
    one, other = before["instances"], after["instances"]
    boxes = tv_tensors.BoundingBoxes(one.gt_boxes.tensor, format="XYXY", canvas_size=(6, 8))
    torch.testing.assert_close(other.gt_boxes.tensor, theirs(boxes).as_subclass(torch.Tensor))
    mask = theirs(tv_tensors.Mask(one.gt_masks.tensor.byte())).bool()
    assert torch.equal(other.gt_masks.tensor, mask.as_subclass(torch.Tensor))
    # torchvision treats keypoints as pixel indices in flips, but as coordinates in rotations. A
    # mirror image swaps the left and right eyes.
    flip = name == "vertical flip"
    shift, order = (0.5, [0, 2, 1]) if flip else (0, [0, 1, 2])
    points = one.gt_keypoints.tensor[0, :, :2] - shift
    points = theirs(tv_tensors.KeyPoints(points, canvas_size=(6, 8))).as_subclass(torch.Tensor)
    torch.testing.assert_close(other.gt_keypoints.tensor[0, :, :2], points[order] + shift)
    visible = other.gt_keypoints.tensor[0, :, 2].tolist()
    assert visible == [one.gt_keypoints.tensor[0, place, 2] for place in order]


def test_a_rotation_by_90_degrees_equals_a_manual_result(person):
    found = mapped(person, RightAngleRotation(1, HEIGHT, WIDTH))["instances"]
    assert found.image_size == (8, 6)
    assert found.gt_boxes.tensor.tolist() == [[1, 4, 5, 7]]
    assert found.gt_keypoints.tensor[0].tolist() == [[1.5, 6.5, 2], [2.5, 4.5, 2], [4.5, 6.5, 1]]
    rows = ["      ", "      ", "      ", "      ", " XX   ", " XX   ", " XXXX ", "      "]
    expected = [[character == "X" for character in row] for row in rows]
    assert found.gt_masks.tensor[0].tolist() == expected
    inverse = RightAngleRotation(1, HEIGHT, WIDTH).inverse()
    assert inverse.apply_coords(np.array([[1.5, 6.5]])).tolist() == [[1.5, 1.5]]


def test_both_flips_together_swap_no_keypoints(person):
    both = T.TransformList([T.HFlipTransform(WIDTH), T.VFlipTransform(HEIGHT)])
    points = mapped(person, both)["instances"].gt_keypoints.tensor[0]
    assert points.tolist() == [[6.5, 4.5, 2], [4.5, 3.5, 2], [6.5, 1.5, 1]]


def corners(box):
    """Return the corners of a rotated box (x, y, width, height, counter-clockwise angle)."""
    x, y, width, height, angle = box
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    local = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [width / 2, height / 2]
    return np.stack([cos * local[:, 0] + sin * local[:, 1] + x,
                     -sin * local[:, 0] + cos * local[:, 1] + y], axis=1)  # fmt: skip


@pytest.mark.parametrize("name", TURNED)
def test_rotated_boxes_keep_their_corners(name):
    transform, box = TURNED[name][0], np.array([[3.0, 2.0, 3.0, 1.5, 25.0]])
    expected = transform.apply_coords(corners(box[0]))
    found = corners(T.TransformList([transform]).apply_rotated_box(box)[0])
    order = lambda points: points[np.lexsort(points.round(6).T)]  # noqa: E731
    np.testing.assert_allclose(order(found), order(expected), atol=1e-6)


# ------------------------------------------------------------------- Detectron2's augmentations


def test_colours_change_before_resizing_and_follow_the_channel_order():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    results = []
    for image_format, image in (("RGB", pixels), ("BGR", pixels[..., ::-1])):
        cfg = config(**EVERYTHING, **{"INPUT.FORMAT": image_format})
        augmentations = with_augmentation(cfg, [T.ResizeShortestEdge(4)])
        kinds = [type(augmentation).__name__ for augmentation in augmentations]
        assert kinds == ["RandomBrightness", "RandomContrast", "RandomSaturation",
                         "ResizeShortestEdge", "RandomFlip", "RandomRightAngles"]  # fmt: skip
        with seeded_rng(1):
            results.append(augmentations[2](T.AugInput(image)).apply_image(image))
    np.testing.assert_array_equal(results[0], results[1][..., ::-1])
    with seeded_rng(1):
        expected = T.RandomSaturation(0.8, 1.2)(T.AugInput(pixels)).apply_image(pixels)
    np.testing.assert_array_equal(results[0], expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes", train=12, val=2)


@pytest.fixture
def records(folder):
    register_coco_dataset("own", folder / "annotations" / "instances_train.json", folder / "train")
    return DatasetCatalog.get("own")


@pytest.mark.long
def test_large_scale_jitter_equals_detectron2s(records):
    cfg = config(**JITTER)
    theirs = [T.ResizeScale(0.1, 2.0, 64, 80), T.FixedSizeCrop((64, 80), pad=False), T.RandomFlip()]
    options = {"is_train": True, "augmentations": theirs, "image_format": cfg.INPUT.FORMAT,
               "use_instance_mask": True, "instance_mask_format": "bitmask",
               "recompute_boxes": True}  # fmt: skip
    mappers = CheckedDatasetMapper(cfg, is_train=True), DatasetMapper(**options)
    for index, record in enumerate(records):
        results = []
        for mapper in mappers:
            with seeded_rng(index):
                results.append(mapper(record))
        ours, expected = results
        assert torch.equal(ours["image"], expected["image"])
        one, other = ours["instances"], expected["instances"]
        assert torch.equal(one.gt_boxes.tensor, other.gt_boxes.tensor)
        assert torch.equal(one.gt_masks.tensor, other.gt_masks.tensor)


# ------------------------------------------------------------------------------------ copy-paste


def mapped_image(colour, size, *boxes):
    """Return a single-colour image in the output format of Detectron2's dataset mapper.

    Each of the ``boxes`` (x0, y0, x1, y1) contains one object, whose mask fills the box.
    """
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    instances = Instances(size, gt_boxes=Boxes(torch.tensor(boxes).float().view(-1, 4)),
                          gt_classes=torch.full((len(boxes),), colour))  # fmt: skip
    if boxes:
        instances.gt_masks = BitMasks(masks)
    return {"image": torch.full((3, *size), colour, dtype=torch.uint8), "instances": instances}


@pytest.fixture
def every_object(monkeypatch):
    """Make copy-paste select all objects of an image."""
    monkeypatch.setattr(torch, "rand", lambda count: torch.zeros(count))


@pytest.mark.usefixtures("every_object")
def test_pasted_objects_cover_others_and_hidden_ones_are_removed():
    target = mapped_image(1, (10, 12), (0, 0, 4, 4), (4, 4, 7, 6), (8, 0, 12, 3))
    # The source image is smaller in one dimension and larger in the other.
    source = mapped_image(9, (20, 8), (3, 3, 8, 12), (0, 15, 3, 18))
    before = target["image"].clone()
    found = paste(target, source)
    covered = torch.zeros(10, 12, dtype=torch.bool)
    covered[3:10, 3:8] = True
    assert torch.equal(found["image"], torch.where(covered, 9, before))
    assert torch.equal(target["image"], before)
    instances = found["instances"]
    assert instances.gt_classes.tolist() == [1, 1, 9]
    # The first object loses a corner pixel but keeps its box. The second object is hidden.
    boxes = [[0, 0, 4, 4], [8, 0, 12, 3], [3, 3, 8, 10]]
    assert instances.gt_boxes.tensor.tolist() == boxes
    assert instances.gt_masks.tensor.flatten(1).sum(1).tolist() == [15, 12, 35]
    assert not (instances.gt_masks.tensor[:2] & covered).any()
    assert torch.equal(instances.gt_masks.tensor[2], covered)


@pytest.mark.usefixtures("every_object")
def test_a_box_is_fitted_to_the_visible_part():
    target = mapped_image(1, (10, 10), (0, 0, 6, 4))
    source = mapped_image(9, (10, 10), (4, 0, 9, 9))
    found = paste(target, source)["instances"]
    assert found.gt_boxes.tensor.tolist() == [[0, 0, 4, 4], [4, 0, 9, 9]]


@pytest.mark.usefixtures("every_object")
def test_images_without_objects_are_pasted_on_but_not_pasted():
    empty, full = mapped_image(1, (10, 10)), mapped_image(9, (10, 10), (1, 1, 3, 3))
    assert paste(empty, full)["instances"].gt_classes.tolist() == [9]
    assert paste(full, empty) is full


def test_each_object_is_chosen_with_probability_one_half():
    source = mapped_image(9, (20, 20), *((x, 0, x + 1, 1) for x in range(20)))
    torch.manual_seed(0)
    counts = [len(paste(mapped_image(1, (20, 20)), source)["instances"]) for _ in range(50)]
    assert 450 < sum(counts) < 550  # expected 500, with a standard deviation of 16
    assert len(set(counts)) > 5


# --------------------------------------------------------------------------- seeding and sampling


@pytest.fixture
def batches(records):
    def load(cfg, count, *, workers=0, start_iter=0, seed=5):
        cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = workers, 3
        mapper = CheckedDatasetMapper(cfg, is_train=True)
        loader = build_train_loader(cfg, mapper, seed=seed, start_iter=start_iter)
        return list(itertools.islice(loader, count))

    return load


def assert_same(found, expected):
    assert len(found) == len(expected)
    for image, again in zip(sum(found, []), sum(expected, []), strict=True):
        assert torch.equal(image["image"], again["image"])
        one, other = image["instances"], again["instances"]
        assert torch.equal(one.gt_boxes.tensor, other.gt_boxes.tensor)
        assert torch.equal(one.gt_classes, other.gt_classes)
        assert type(one.gt_masks) is type(other.gt_masks)
        for mask, as_before in zip(one.gt_masks, other.gt_masks, strict=True):
            # A bit mask is one array; a list of polygons has one array per polygon.
            for part, before in zip(mask, as_before, strict=True):
                np.testing.assert_array_equal(part, before)


@pytest.mark.parametrize("options", [{}, JITTER])
@pytest.mark.long
def test_batches_depend_only_on_seed_and_iteration(batches, options):
    cfg = config(**EVERYTHING, **options)
    straight = batches(cfg, 6)
    assert_same(batches(cfg, 6, workers=1), straight)
    assert_same(batches(cfg, 4, workers=2, start_iter=2), straight[2:])
    objects = {len(image["instances"]) for batch in straight for image in batch}
    masks = {type(image["instances"].gt_masks) for batch in straight for image in batch}
    assert len(objects) > 2
    assert BitMasks in masks


@pytest.mark.long
def test_repeat_factors_equal_detectron2s_and_continue_exactly(batches, records, folder):
    cfg = config(**{"DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler",
                    "DATALOADER.REPEAT_THRESHOLD": "0.9", "MODEL.MASK_ON": "False",
                    "DATALOADER.ASPECT_RATIO_GROUPING": "False"})  # fmt: skip
    assert cfg.SEED == -1

    def ids(found):
        return [image["image_id"] for batch in found for image in batch]

    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(records, 0.9)
    assert factors.unique().numel() > 1
    order = itertools.islice(RepeatFactorTrainingSampler(factors, seed=5), 30)
    expected = [records[index]["image_id"] for index in order]
    assert ids(batches(cfg, 10)) == expected
    assert ids(batches(cfg, 3, start_iter=7)) == expected[21:]
    assert ids(batches(cfg, 10, seed=6)) != expected


@pytest.mark.long
def test_images_without_objects_are_loaded_on_request(folder, batches, tmp_path):
    content = json.loads((folder / "annotations" / "instances_train.json").read_text())
    ids = sorted(image["id"] for image in content["images"])
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids[:4]]
    (tmp_path / "few.json").write_text(json.dumps(content))
    register_coco_dataset("few", tmp_path / "few.json", folder / "train")
    seen = {}
    for filtered in ("True", "False"):
        options = {"DATALOADER.FILTER_EMPTY_ANNOTATIONS": filtered, "INPUT.CROP.ENABLED": "True",
                   "DATASETS.TRAIN": "('few',)", "INPUT.MASK_FORMAT": "bitmask"}  # fmt: skip
        found = batches(config(**options), 4 if filtered == "False" else 2)
        seen[filtered] = {image["image_id"]: len(image["instances"]) for image in sum(found, [])}
    assert set(seen["True"]) <= set(ids[:4])
    assert set(seen["False"]) == set(ids)
    assert not any(count for image, count in seen["False"].items() if image in ids[4:])


@pytest.mark.parametrize("image_format", ["BGR", "L"])
def test_16_bit_images_are_augmented_as_8_bit_images(tmp_path, image_format):
    pixels = np.random.default_rng(0).integers(0, 4096, (40, 48), dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "height": 40, "width": 48, "annotations": []}
    options = {**EVERYTHING, "INPUT.FORMAT": image_format, "INPUT.VALUE_RANGE": "(0, 4095)"}
    if image_format == "L":
        options["INPUT.SATURATION"] = "()"
    mapper = CheckedDatasetMapper(config(**options), is_train=True)
    for seed in range(8):
        with seeded_rng(seed):
            image = mapper(record)["image"]
        assert image.dtype == torch.uint8
        assert len(image) == len(image_format)
        assert image.float().std() > 20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"INPUT.BRIGHTNESS": "(1.2, 0.8)"}, "INPUT.BRIGHTNESS is .* two positive numbers"),
        ({"INPUT.SATURATION": "(0.8, 1.2)", "INPUT.FORMAT": "L"}, "have no saturation"),
        ({"INPUT.RANDOM_FLIP": "both"}, "expected one of: horizontal, vertical, none"),
        ({"INPUT.CROP.TYPE": "any"}, "INPUT.CROP.TYPE is 'any'"),
        ({"INPUT.CROP.SIZE": "(0.5, 1.5)"}, "expected two fractions from 0 to 1"),
        ({"INPUT.LARGE_SCALE_JITTER.SIZE": "(1024,)"}, "the height and width in pixels"),
        ({"INPUT.LARGE_SCALE_JITTER.SCALE": "()"}, "SCALE is .*; expected two positive numbers"),
        ({"INPUT.COPY_PASTE": "0.5", "MODEL.MASK_ON": "False"}, "MODEL.MASK_ON is False"),
        ({"INPUT.COPY_PASTE": "0.5", "MODEL.KEYPOINT_ON": "True"}, "MODEL.KEYPOINT_ON is True"),
        ({"INPUT.COPY_PASTE": "0.5", "MODEL.META_ARCHITECTURE": "PanopticFPN"}, "is PanopticFPN"),
        ({**JITTER, "MODEL.PROPOSAL_GENERATOR.NAME": "RRPN"}, "can't crop rotated boxes"),
    ],
)
def test_invalid_values_are_rejected(options, said):
    with pytest.raises(UserError, match=said):
        check_detection_augmentation(config(**options))


def test_the_defaults_are_valid_and_change_nothing():
    cfg = config()
    check_detection_augmentation(cfg)
    augmentations = [T.RandomCrop("relative", (1, 1)), T.ResizeShortestEdge(4), T.RandomFlip()]
    assert with_augmentation(cfg, augmentations) == augmentations
