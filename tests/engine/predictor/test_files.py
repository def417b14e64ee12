"""Tests for inference on image files, using models with known outputs."""

import csv
import itertools
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances, RotatedBoxes
from PIL import Image
from pycocotools import mask as mask_util
from torch import nn

from senet_transfer import UserError
from senet_transfer.config.defaults import get_senet_config
from senet_transfer.engine.model_from import LoadedModel
from senet_transfer.engine.predictor.files import predict_files, predict_video
from senet_transfer.engine.predictor.predictor import DetectorPredictor


class Answers(nn.Module):
    """Model that returns ``answer(height, width)`` for an image of this original size."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.shapes = answer, []

    def forward(self, inputs):
        self.shapes.append(tuple(inputs[0]["image"].shape[1:]))
        return [self.answer(inputs[0]["height"], inputs[0]["width"])]


def one_object(height, width, **fields) -> dict[str, Instances]:
    """Return a model output with one object of class 1 that covers the left half of the image."""
    box = torch.tensor([[0.0, 0.0, width / 2, height]])
    found = Instances((height, width), pred_boxes=Boxes(box), **fields)
    found.scores, found.pred_classes = torch.tensor([0.75]), torch.tensor([1])
    return {"instances": found}


def loaded(answer, **keys) -> LoadedModel:
    cfg = get_senet_config()
    cfg.DATASETS.CLASSES = ["cat", "$5$ note"]
    cfg.DATASETS.CATEGORY_IDS = [3, 8]
    cfg.MODEL.DEVICE = "cpu"
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    cfg.merge_from_list([word for item in keys.items() for word in item])
    return LoadedModel(Answers(answer), cfg)


@pytest.fixture
def images(tmp_path) -> list[str]:
    """Write three images, one of which is 3000 pixels high and 6 pixels wide."""
    paths = []
    for name, shape in (("a", (40, 60)), ("b", (3000, 6)), ("c", (50, 50))):
        paths.append(str(tmp_path / f"{name}.png"))
        cv2.imwrite(paths[-1], np.full((*shape, 3), 90, np.uint8))
    return paths


def predict(model, images, tmp_path):
    predict_files(DetectorPredictor.of(model), images, str(tmp_path / "out"), quiet=True)
    return written(tmp_path)


def written(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "predictions.json").read_text())


def test_an_image_of_extreme_shape_and_a_name_with_dollars_are_predicted(images, tmp_path):
    model = loaded(one_object)
    found = predict(model, images, tmp_path)
    assert [image["file_name"] for image in found["images"]] == images
    # The height of 3000 is scaled to 96, and the width of 6 to 0.19, which is rounded up to 1.
    assert model.model.shapes[1] == (96, 1)
    assert found["categories"] == [{"id": 3, "name": "cat"}, {"id": 8, "name": "$5$ note"}]
    assert [a["category_id"] for a in found["annotations"]] == [8, 8, 8]
    assert [a["bbox"] for a in found["annotations"]][1] == [0, 0, 3, 3000]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.jpg")) == [
        "a.jpg",
        "b.jpg",
        "c.jpg",
    ]


def test_images_whose_names_are_not_utf_8_are_drawn(images, tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 <&>\n.jpg")
    os.rename(images[0], name)
    predict(loaded(one_object), [name], tmp_path)
    (drawing,) = (tmp_path / "out").glob("*.jpg")
    assert os.fsencode(drawing.name) == b"caf\xe9 <&>\n.jpg"
    assert Image.open(drawing).format == "JPEG"
    with pytest.raises(UserError, match="is not valid UTF-8, which is required for videos"):
        predict_video(DetectorPredictor.of(loaded(one_object)), name + ".avi", str(tmp_path))


@pytest.mark.parametrize("error", [RuntimeError("size 0"), MemoryError(), ZeroDivisionError("x")])
def test_an_image_that_the_model_fails_on_does_not_affect_others(images, tmp_path, error):
    def answer(height, width):
        if height == 3000:
            raise error
        return one_object(height, width)

    with pytest.raises(UserError, match=f"(?s)1 of 3 images.*b.png.*{type(error).__name__}"):
        predict(loaded(answer), images, tmp_path)
    found = written(tmp_path)
    assert [image["id"] for image in found["images"]] == [1, 3]
    assert [a["image_id"] for a in found["annotations"]] == [1, 3]


def test_an_image_that_cannot_be_drawn_keeps_its_predictions(images, tmp_path, monkeypatch):
    def fail(self, instances):
        raise ValueError("no glyph")

    monkeypatch.setattr(
        "senet_transfer.engine.inference.drawing.PredictionDrawing.draw_instances", fail
    )
    with pytest.raises(UserError, match="(?s)3 of 3 images.*no drawing.*no glyph"):
        predict(loaded(one_object), images, tmp_path)
    assert len(written(tmp_path)["annotations"]) == 3


@pytest.mark.parametrize("form", ["json", "coco", "csv"])
def test_ctrl_c_keeps_the_results_so_far(images, tmp_path, form):
    def answer(height, width):
        if height == 50:
            raise KeyboardInterrupt
        return one_object(height, width)

    predictor = DetectorPredictor.of(loaded(answer))
    with pytest.raises(KeyboardInterrupt):
        predict_files(predictor, images, str(tmp_path / "out"), form=form, draw=False, quiet=True)
    (path,) = (tmp_path / "out").iterdir()
    text = path.read_text()
    assert [name in text for name in images] == [True, True, False]


def test_a_path_that_occurs_twice_is_predicted_once(images, tmp_path):
    found = predict(loaded(one_object), [*images, images[0]], tmp_path)
    assert [(image["id"], image["file_name"]) for image in found["images"]] == [
        (number, name) for number, name in enumerate(images, start=1)
    ]
    assert [a["image_id"] for a in found["annotations"]] == [1, 2, 3]


@pytest.mark.long
def test_workers_read_an_endless_iterable_only_as_far_as_needed(images):
    predictor, asked = DetectorPredictor.of(loaded(one_object)), []

    def endless():
        for number in itertools.count():
            asked.append(number)
            yield images[0] if number % 2 else Image.new("RGB", (20, 30))

    found = itertools.islice(predictor.stream(endless(), workers=2), 6)
    assert [result.instances.image_size for result in found] == [(30, 20), (40, 60)] * 3
    assert len(asked) < 30


def test_the_area_of_an_object_with_a_mask_equals_the_masks(images, tmp_path):
    def answer(height, width):
        mask = torch.zeros(1, height, width, dtype=torch.bool)
        mask[0, 10:20, 5:9] = True
        return one_object(height, width, pred_masks=mask)

    (annotation,) = predict(loaded(answer), images[:1], tmp_path)["annotations"]
    assert annotation["area"] == 40
    assert annotation["bbox"] == [0, 0, 30, 40]
    assert mask_util.decode(annotation["segmentation"]).sum() == 40
    (annotation,) = predict(loaded(one_object), images[:1], tmp_path)["annotations"]
    assert annotation["area"] == 30 * 40


def test_keypoints_are_written_with_their_names(images, tmp_path):
    def answer(height, width):
        points = torch.tensor([[[3.5, 4.5, 0.9], [10.5, 20.5, 0.2]]])
        return one_object(height, width, pred_keypoints=points)

    model = loaded(answer, **{"MODEL.KEYPOINT_ON": True, "DATASETS.KEYPOINTS": ["nose", "tail"]})
    found = predict(model, images[:1], tmp_path)
    assert found["categories"][1] == {
        "id": 8,
        "name": "$5$ note",
        "keypoints": ["nose", "tail"],
        "skeleton": [],
    }
    (annotation,) = found["annotations"]
    # COCO's keypoints are pixel indices; in Detectron2, the centre of pixel 0 is at 0.5.
    np.testing.assert_allclose(annotation["keypoints"], [3, 4, 0.9, 10, 20, 0.2], rtol=1e-6)
    assert annotation["num_keypoints"] == 2


def test_proposals_are_objects_of_one_class_scored_by_the_sigmoid(images, tmp_path):
    def answer(height, width):
        found = Instances((height, width))
        found.proposal_boxes = Boxes(torch.tensor([[1.0, 2, 11, 22], [0, 0, 5, 5]]))
        found.objectness_logits = torch.tensor([1.0, -1.0])
        return {"proposals": found}

    model = loaded(answer, **{"MODEL.META_ARCHITECTURE": "ProposalNetwork"})
    found = predict(model, images[:1], tmp_path)
    assert found["categories"] == [{"id": 1, "name": "object"}]
    (annotation,) = found["annotations"]
    assert annotation["bbox"] == [1, 2, 10, 20]
    assert annotation["score"] == pytest.approx(1 / (1 + np.exp(-1)))


def test_rotated_boxes_are_written_with_five_numbers_and_drawn(images, tmp_path):
    def answer(height, width):
        boxes = RotatedBoxes(torch.tensor([[30.0, 20, 20, 10, 45]]))
        found = Instances((height, width), pred_boxes=boxes)
        found.scores, found.pred_classes = torch.tensor([0.75]), torch.tensor([0])
        return {"instances": found}

    (annotation,) = predict(loaded(answer), images[:1], tmp_path)["annotations"]
    assert annotation["bbox"] == [30, 20, 20, 10, 45]
    assert annotation["area"] == 200
    predictor, out = DetectorPredictor.of(loaded(answer)), str(tmp_path / "out")
    with open(predict_files(predictor, images[:1], out, form="csv", quiet=True)) as file:
        (row,) = csv.DictReader(file)
    assert [float(row[k]) for k in ("x", "y", "width", "height", "angle")] == [30, 20, 20, 10, 45]
    with pytest.raises(UserError, match="The YOLO format does not support rotated boxes"):
        predict_files(predictor, images[:1], out, form="yolo", quiet=True)
    drawing = cv2.imread(str(tmp_path / "out" / "a.jpg"))
    # The box's right corner is 15 / sqrt(2) pixels from its centre, and the drawing is enlarged 4x.
    corner = drawing[70:90, 4 * 40 : 4 * 42].reshape(-1, 3).astype(int)
    assert (np.ptp(corner, 1) > 100).any()


def test_images_of_the_same_name_do_not_share_a_label_file(images, tmp_path):
    names = [images[0], str(tmp_path / "a.jpg")]
    names += [str(tmp_path / folder / "a.png") for folder in ("one", "two")]
    for name in names[1:]:
        Path(name).parent.mkdir(exist_ok=True)
        cv2.imwrite(name, np.full((40, 60, 3), 90, np.uint8))
    predictor, out = DetectorPredictor.of(loaded(one_object)), str(tmp_path / "out")
    options = {"form": "yolo", "draw": False, "quiet": True}
    labels = predict_files(predictor, names[:2], out, **options)
    assert sorted(path.name for path in Path(labels).iterdir()) == ["a.jpg.txt", "a.txt"]
    with pytest.raises(UserError, match="the same output file"):
        predict_files(predictor, names, out, **options)


def test_a_semantic_segmentation_is_written_as_one_mask_per_class(images, tmp_path):
    def answer(height, width):
        logits = torch.zeros(3, height, width)
        logits[2, :, :10] = 1
        logits[0, :, 10:] = 1
        return {"sem_seg": logits}

    model = loaded(answer)
    model.cfg.DATASETS.CLASSES, model.cfg.DATASETS.CATEGORY_IDS = [], []
    model.cfg.DATASETS.STUFF_CLASSES = ["sky", "sea", "sand"]
    found = predict(model, images[:1], tmp_path)
    assert [category["name"] for category in found["categories"]] == ["sky", "sea", "sand"]
    sky, sand = found["annotations"]
    assert [sky["category_id"], sky["area"], sky["bbox"]] == [1, 50 * 40, [10, 0, 50, 40]]
    assert [sand["category_id"], sand["area"], sand["bbox"]] == [3, 10 * 40, [0, 0, 10, 40]]


def test_a_panoptic_segmentation_is_written_as_objects_and_stuff(images, tmp_path):
    def answer(height, width):
        ids = torch.zeros(height, width, dtype=torch.int32)
        ids[:20], ids[30:] = 1, 2
        info = [
            {"id": 1, "isthing": True, "category_id": 1, "score": 0.75},
            {"id": 2, "isthing": False, "category_id": 1},
        ]
        masks = (ids == 1)[None]
        logits = torch.zeros(2, height, width)
        found = one_object(height, width, pred_masks=masks)
        return {**found, "sem_seg": logits, "panoptic_seg": (ids, info)}

    model = loaded(answer, **{"DATASETS.STUFF_CLASSES": ["things", "grass"]})
    thing, stuff = predict(model, images[:1], tmp_path)["annotations"]
    assert [thing["category_id"], thing["area"], thing["score"]] == [8, 20 * 60, 0.75]
    assert [stuff["category_id"], stuff["area"]] == [10, 10 * 60]
    assert "score" not in stuff
