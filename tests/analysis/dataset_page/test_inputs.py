"""Tests that a dataset's HTML page shows the images that the mapper and the loader return."""

import base64
import io

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from PIL import Image

from senet_transfer.analysis.dataset_page.cards import crop_around, input_card
from senet_transfer.analysis.dataset_page.inputs import training_views
from senet_transfer.analysis.dataset_page.splits import data_config
from senet_transfer.data.build import eval_transform, open_train_dataset, train_loader
from senet_transfer.data.cifar.in_memory import ImageArrays, save_images
from senet_transfer.data.detection.loader import seeded_rng
from senet_transfer.data.detection.mapper import CheckedDatasetMapper
from senet_transfer.data.shapes.generate import make_shapes

SMALL = ["INPUT.MIN_SIZE_TRAIN", "(96, 128)", "INPUT.MIN_SIZE_TEST", "112", "INPUT.FORMAT", "BGR"]


@pytest.fixture(scope="module")
def shapes_config(tmp_path_factory):
    root = make_shapes(tmp_path_factory.mktemp("data") / "shapes", train=6, val=1)
    options = [*SMALL, "MODEL.MASK_ON", "True", "SEED", "3", "SOLVER.IMS_PER_BATCH", "2"]
    return data_config(
        str(root / "annotations" / "instances_train.json"),
        images=str(root / "train"),
        options=options,
    )


@pytest.mark.long
def test_the_images_boxes_and_masks_shown_equal_the_mappers(shapes_config):
    cfg = shapes_config
    records = {record["file_name"]: record for record in DatasetCatalog.get(cfg.DATASETS.TRAIN[0])}
    views = training_views(cfg, 4)
    # An image's augmentation depends on its position in the run, so try the first positions.
    positions = set()
    for view, plain in views:
        record = records[view.name]
        for position in range(12):
            with seeded_rng(cfg.SEED, 0, position, 1):
                mapped = CheckedDatasetMapper(cfg, is_train=True)(record)
            pixels = mapped["image"].permute(1, 2, 0).numpy()[..., ::-1]
            if np.array_equal(view.pixels, pixels) and position not in positions:
                break
        else:
            pytest.fail("the image shown is not an output of the mapper")
        positions.add(position)
        found = mapped["instances"]
        np.testing.assert_allclose(view.boxes, found.gt_boxes.tensor.numpy())
        assert view.classes == found.gt_classes.tolist()
        polygons = [polygon for one in found.gt_masks.polygons for polygon in one]
        assert len(view.outlines) == len(polygons) >= len(found)
        for (_, points), polygon in zip(view.outlines, polygons, strict=True):
            assert points.ravel().tolist() == polygon.tolist()
        theirs = DatasetMapper(cfg, is_train=False)(record)["image"].permute(1, 2, 0).numpy()
        assert plain.name == view.name
        assert np.array_equal(plain.pixels, theirs[..., ::-1])
        assert plain.classes == [item["category_id"] for item in record["annotations"]]


@pytest.mark.long
def test_pasted_objects_are_only_in_the_training_input(shapes_config):
    cfg = shapes_config.clone()
    cfg.defrost()
    cfg.INPUT.COPY_PASTE = 1.0
    views, plain = zip(*training_views(cfg, 6), strict=True)
    expected = [view for _, view in training_views(shapes_config, 6)]
    assert [view.classes for view in plain] == [view.classes for view in expected]
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(plain, expected, strict=True))
    pairs = zip(views, plain, strict=True)
    assert any(len(view.classes) > len(other.classes) for view, other in pairs)


@pytest.mark.long
def test_a_card_contains_these_pixels_and_boxes(shapes_config):
    view, plain = training_views(shapes_config, 1)[0]
    card = input_card((view, plain), shapes_config.DATASETS.CLASSES, detection=True)
    picture = card["panels"][0]
    assert (picture["width"], picture["height"]) == view.pixels.shape[1::-1]
    with Image.open(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2]))) as image:
        difference = np.abs(np.asarray(image).astype(int) - view.pixels)
    assert difference.mean() < 4  # the page contains JPEG images, which are lossy
    left, top, width, height, label = np.array(picture["boxes"]).T
    assert label.tolist() == view.classes
    np.testing.assert_allclose(
        np.stack([left, top, left + width, top + height], 1), view.boxes, atol=0.11
    )


def test_a_classifiers_images_equal_the_loaders(tree):
    options = ["SOLVER.IMS_PER_BATCH", "4", "INPUT.CLASSIFICATION.CROP", "32"]
    options += ["INPUT.CLASSIFICATION.TEST_CROP", "32", "INPUT.CLASSIFICATION.TEST_RESIZE", "36"]
    cfg = data_config(str(tree), options=options)
    views = training_views(cfg, 6)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    batches = iter(train_loader(cfg, seed=0))
    first, second = next(batches), next(batches)
    images = torch.cat([first["image"], second["image"]])[:6].permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack([view.pixels for view, _ in views]), images)
    labels = torch.cat([first["label"], second["label"]])[:6].tolist()
    assert [view.classes for view, _ in views] == [[label] for label in labels]
    dataset = open_train_dataset(cfg)
    samples = map(dataset.read_sample, range(len(dataset)))
    plain = {sample.key: eval_transform(cfg)(sample.data) for sample in samples}
    for view, other in views:
        assert np.array_equal(other.pixels, plain[view.name].permute(1, 2, 0).numpy())


def test_small_images_are_shown_with_their_erased_squares(tmp_path):
    images = torch.full((40, 3, 32, 32), 200, dtype=torch.uint8)
    images[:, :, 0] = torch.arange(40, dtype=torch.uint8)[:, None, None]
    labels = torch.arange(40) % 2
    save_images(ImageArrays(images, labels, ["a", "b"], ""), tmp_path / "train.safetensors", "")
    options = ["INPUT.CLASSIFICATION.CUTOUT", "8", "SOLVER.IMS_PER_BATCH", "4"]
    cfg = data_config(str(tmp_path / "train.safetensors"), options=options)
    mean = np.rint(cfg.MODEL.PIXEL_MEAN).astype(int).tolist()
    for view, plain in training_views(cfg, 4):
        number = plain.pixels[0, 0, 0]
        assert np.array_equal(plain.pixels, images[number].permute(1, 2, 0).numpy())
        assert view.classes == plain.classes == [number % 2]
        erased = (view.pixels == mean[:: -1 if cfg.INPUT.FORMAT == "BGR" else 1]).all(2)
        assert 16 <= erased.sum() <= 64


def test_a_crop_contains_the_box_and_lies_inside_the_image():
    assert crop_around(np.zeros((0, 4)), 100, 80) == (0, 0, 100, 80)
    assert crop_around(np.array([[40, 30, 60, 50]]), 100, 80) == (25, 15, 75, 65)
    assert crop_around(np.array([[-300, 0, -250, 20]]), 100, 80) == (0, 0, 63, 73)
    assert crop_around(np.array([[10, 10, 11, 11]]), 100, 80) == (0, 0, 35, 35)
