import io
import pickle
import random

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.detection_utils import read_image as detectron2_read_image
from PIL import Image, ImageFile

from senet_transfer.data.detection.coco import register_coco_dataset
from senet_transfer.data.detection.mapper import CheckedDatasetMapper, read_image
from senet_transfer.data.images.decode import AS_STORED, Reading
from senet_transfer.errors import UserError

pytestmark = pytest.mark.usefixtures("catalogs")

ORIENTATION = 274


@pytest.fixture
def mapper():
    """Return a dataset mapper for evaluation, without resizing or augmentation."""
    return CheckedDatasetMapper(is_train=False, augmentations=[], image_format="BGR")


@pytest.fixture
def photo():
    """Return a 48x32 RGB image with smooth gradients and fine detail."""
    x, y = np.meshgrid(np.linspace(0, 1, 48), np.linspace(0, 1, 32))
    channels = [255 * x, 255 * y, 127 * (1 + np.sin(12 * x * y))]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def record(path, width=48, height=32):
    return {"file_name": str(path), "image_id": 17, "width": width, "height": height}


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ------------------------------------------------------------- equality with Detectron2's mapper


@pytest.fixture
def coco128(shared_data):
    register_coco_dataset(
        "mine",
        shared_data / "coco128/annotations/instances_train2017.json",
        shared_data / "coco128/train2017",
    )
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("mine",)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (96, 128), 128
    cfg.DATALOADER.NUM_WORKERS = 1
    return cfg


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if key == "instances":
            assert ours[key].image_size == value.image_size
            fields = value.get_fields()
            assert ours[key].get_fields().keys() == fields.keys()
            assert torch.equal(ours[key].gt_boxes.tensor, fields["gt_boxes"].tensor)
            assert torch.equal(ours[key].gt_classes, fields["gt_classes"])
            if "gt_masks" in fields:
                for one, other in zip(ours[key].gt_masks, fields["gt_masks"], strict=True):
                    np.testing.assert_equal(one, other)
        elif torch.is_tensor(value):
            assert torch.equal(ours[key], value)
        else:
            assert ours[key] == value


@pytest.mark.parametrize("image_format", ["BGR", "RGB", "L", "YUV-BT.601"])
@pytest.mark.parametrize(
    ("is_train", "masks", "crop"),
    [(True, False, True), (True, True, False), (False, False, False)],
)
@pytest.mark.long
def test_maps_real_images_exactly_as_detectron2_does(is_train, masks, crop, image_format, coco128):
    coco128.INPUT.FORMAT = image_format
    coco128.MODEL.MASK_ON, coco128.INPUT.CROP.ENABLED = masks, crop
    mappers = [cls(coco128, is_train) for cls in (CheckedDatasetMapper, DatasetMapper)]
    for sample in DatasetCatalog.get("mine")[::16]:
        mapped = []
        for mapper in mappers:
            random.seed(5)
            np.random.seed(5)
            mapped.append(mapper(sample))
        assert_same(*mapped)


def test_the_mapped_record_is_not_modified(coco128):
    sample = DatasetCatalog.get("mine")[0]
    before = pickle.dumps(sample)
    CheckedDatasetMapper(coco128, is_train=True)(sample)
    assert pickle.dumps(sample) == before


def test_proposals_and_semantic_labels_are_mapped_as_detectron2_does(tmp_path, photo):
    photo.save(tmp_path / "a.png")
    Image.fromarray(np.arange(48 * 32, dtype=np.uint8).reshape(32, 48)).save(tmp_path / "s.png")
    sample = {
        **record(tmp_path / "a.png"),
        "sem_seg_file_name": str(tmp_path / "s.png"),
        "proposal_boxes": np.array([[1.0, 2, 20, 30], [4, 4, 4, 9]]),
        "proposal_objectness_logits": np.array([0.5, 0.1]),
        "proposal_bbox_mode": 0,
    }
    arguments = {
        "is_train": True,
        "augmentations": [],
        "image_format": "BGR",
        "precomputed_proposal_topk": 5,
    }
    ours, theirs = (cls(**arguments)(sample) for cls in (CheckedDatasetMapper, DatasetMapper))
    assert torch.equal(ours["sem_seg"], theirs["sem_seg"])
    one, other = ours.pop("proposals"), theirs.pop("proposals")
    assert torch.equal(one.proposal_boxes.tensor, other.proposal_boxes.tensor)
    assert_same(ours, theirs)


def test_the_size_is_added_if_a_data_set_has_none(tmp_path, photo, mapper):
    photo.save(tmp_path / "a.png")
    mapped = mapper({"file_name": str(tmp_path / "a.png")})
    assert (mapped["width"], mapped["height"]) == (48, 32)


def test_empty_boxes_are_dropped_in_training(tmp_path, photo):
    photo.save(tmp_path / "a.png")
    box = {"bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    annotations = [{**box, "bbox": [3, 3, 0, 8]}, {**box, "bbox": [3, 3, 5, 8]}]
    mapper = CheckedDatasetMapper(is_train=True, augmentations=[], image_format="BGR")
    mapped = mapper({**record(tmp_path / "a.png"), "annotations": annotations})
    assert mapped["instances"].gt_boxes.tensor.tolist() == [[3, 3, 8, 11]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_images_of_every_8_bit_mode_load_as_detectron2_loads_them(mode, tmp_path, photo, mapper):
    kind = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    path = tmp_path / f"a.{kind}"
    photo.convert(mode).save(path)
    image = mapper(record(path))["image"]
    assert image.dtype == torch.uint8
    assert image.shape == (3, 32, 48)
    assert np.array_equal(image.permute(1, 2, 0), detectron2_read_image(str(path), "BGR"))
    if mode not in ("1", "L", "LA"):
        # Colours and channel order are preserved, apart from palette or JPEG losses.
        error = np.abs(image.permute(1, 2, 0).numpy()[:, :, ::-1].astype(int) - np.asarray(photo))
        assert error.mean() < 16


@pytest.mark.parametrize("kind", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_images_are_scaled_to_8_bits(kind, channels, tmp_path, mapper):
    pixels = np.random.default_rng(0).integers(0, 65536, (32, 48, channels)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / f"a.{kind}"), pixels)
    image = mapper(record(tmp_path / f"a.{kind}"))["image"].permute(1, 2, 0)
    # For colour images, Pillow keeps the upper 8 bits.
    expected = np.round(pixels / 257) if channels == 1 else pixels >> 8
    assert np.array_equal(image, np.broadcast_to(expected, (32, 48, 3)))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_images_without_a_range_are_rejected(dtype, tmp_path, mapper):
    Image.fromarray(np.zeros((32, 48), dtype)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="INPUT.VALUE_RANGE.*convert the image to 8 bits"):
        mapper(record(tmp_path / "a.tif"))


@pytest.mark.parametrize("value_range", [(0, 4095), (-10, 3000.5)])
@pytest.mark.parametrize(
    ("dtype", "channels", "kind"),
    [
        (np.uint16, 1, "png"),
        (np.uint16, 3, "png"),
        (np.uint16, 1, "tif"),
        (np.uint16, 3, "tif"),
        (np.int32, 1, "tif"),
        (np.float32, 1, "tif"),
    ],
)
def test_a_value_range_is_mapped_to_8_bits(dtype, channels, kind, value_range, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 5000, (32, 48, channels)).astype(dtype)
    path = tmp_path / f"a.{kind}"
    if dtype == np.uint16:
        cv2.imwrite(str(path), pixels)
    else:
        Image.fromarray(pixels[:, :, 0]).save(path)
    low, high = value_range
    expected = np.round(np.clip((pixels.astype(float) - low) / (high - low) * 255.0, 0, 255))
    mapper = CheckedDatasetMapper(
        is_train=False, augmentations=[], image_format="BGR", reading=Reading(value_range)
    )
    image = mapper(record(path))["image"].permute(1, 2, 0)
    assert np.array_equal(image, np.broadcast_to(expected, (32, 48, 3)))


def test_a_value_range_leaves_8_bit_images_unchanged(tmp_path, photo):
    photo.save(tmp_path / "a.png")
    read = read_image(str(tmp_path / "a.png"), "RGB", Reading((0, 4095)))
    assert np.array_equal(read, np.asarray(photo))


# ------------------------------------------------------------- orientation and size


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_images_are_turned_upright_before_their_size_is_compared(
    orientation, mode, tmp_path, photo, mapper
):
    gray = np.asarray(photo.convert("L"))
    image = photo if mode == "RGB" else Image.fromarray(gray.astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "a.png"
    image.save(path, exif=exif)
    size = (32, 48) if orientation >= 5 else (48, 32)
    loaded = mapper(record(path, *size))["image"].permute(1, 2, 0).numpy()
    (photo if mode == "RGB" else Image.fromarray(gray)).save(path, exif=exif)
    assert np.array_equal(loaded, detectron2_read_image(str(path), "BGR"))
    with pytest.raises(UserError) as caught:
        mapper(record(path, *size[::-1]))
    if orientation >= 5:
        assert f"its EXIF orientation, {orientation}, but" in str(caught.value)
        assert "set INPUT.EXIF to ignore" in str(caught.value)
    else:
        assert "Width and height are swapped" in str(caught.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_ignored_if_requested(orientation, tmp_path, photo):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    photo.save(tmp_path / "a.png", exif=exif)
    mapper = CheckedDatasetMapper(
        is_train=False, augmentations=[], image_format="RGB", reading=AS_STORED
    )
    loaded = mapper(record(tmp_path / "a.png", 48, 32))["image"].permute(1, 2, 0)
    assert np.array_equal(loaded, np.asarray(photo))
    advice = "Set INPUT.EXIF to apply" if orientation >= 5 else "Width and height are swapped"
    with pytest.raises(UserError, match=advice):
        mapper(record(tmp_path / "a.png", 32, 48))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_files_are_turned_once(orientation, tmp_path, photo):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    photo.save(tmp_path / "a.tif", exif=exif)
    photo.save(tmp_path / "a.png", exif=exif)
    expected = detectron2_read_image(str(tmp_path / "a.png"), "BGR")
    assert np.array_equal(read_image(str(tmp_path / "a.tif"), "BGR"), expected)


def test_an_image_of_another_size_is_named_with_both_sizes(tmp_path, photo, mapper):
    photo.save(tmp_path / "a.jpg")
    with pytest.raises(UserError) as caught:
        mapper(record(tmp_path / "a.jpg", 640, 480))
    assert str(caught.value).startswith(f"Image {tmp_path}/a.jpg (id 17) is 48x32 pixels")
    assert "expected an image of 640x480 pixels" in str(caught.value)
    assert "restore the file that was annotated" in str(caught.value)


# ------------------------------------------------------------- broken images


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the file does not exist"),
        (b"", r"it is empty \(0 bytes\)"),
        (b"<html>404 Not Found</html>", "it begins with b'<html>404"),
        (b"\xff\xd8\xff\xe0", "it begins with"),
        (b"\0" * 4096, "it begins with"),
    ],
)
def test_files_other_than_images_are_named_and_described(content, message, tmp_path, mapper):
    path = tmp_path / "a.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        mapper(record(path))
    assert str(caught.value).startswith(f"Image {path} (id 17) cannot be read: ")
    assert "Expected an image of 48x32 pixels" in str(caught.value)


def test_a_folder_in_place_of_an_image_is_rejected(tmp_path, mapper):
    with pytest.raises(UserError, match="it is a folder"):
        mapper(record(tmp_path))


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("GIF", {}),
    ],
)
def test_a_truncated_file_is_an_error_or_has_all_pixels(
    kind, options, tolerant, tmp_path, photo, mapper, monkeypatch
):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    path, content = tmp_path / "image", encoded(photo, kind, **options)
    path.write_bytes(content)
    whole, errors = mapper(record(path))["image"], 0
    for end in range(0, len(content), max(1, len(content) // 50)):
        path.write_bytes(content[:end])
        try:
            assert torch.equal(mapper(record(path))["image"], whole)
        except UserError:
            errors += 1
    assert errors >= 40
    assert tolerant is ImageFile.LOAD_TRUNCATED_IMAGES


def test_half_a_photograph_is_an_error(shared_data, tmp_path, mapper):
    content = (shared_data / "coco128/train2017/000000000009.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="truncated"):
        mapper(record(tmp_path / "a.jpg", 640, 480))


def test_damaged_bytes_raise_only_this_projects_errors(tmp_path, photo, mapper):
    rng = np.random.default_rng(0)
    messages = []
    for kind in ("JPEG", "PNG", "TIFF", "GIF", "PPM"):
        content = encoded(photo, kind)
        for _ in range(30):
            damaged = np.frombuffer(content, np.uint8).copy()
            damaged[rng.integers(0, len(damaged), 8)] = rng.integers(0, 256, 8)
            (tmp_path / "a").write_bytes(damaged.tobytes())
            try:
                mapper(record(tmp_path / "a"))
            except UserError as error:
                messages.append(str(error))
    assert messages
    assert all(message.startswith(f"Image {tmp_path}/a (id 17) ") for message in messages)


def test_a_decompression_bomb_is_rejected(tmp_path, photo, mapper, monkeypatch):
    photo.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 32 // 2 - 1)
    with pytest.raises(UserError, match="increase PIL.Image.MAX_IMAGE_PIXELS"):
        mapper(record(tmp_path / "a.png"))


def test_running_out_of_memory_is_not_reported_as_a_file_error(
    tmp_path, photo, mapper, monkeypatch
):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("senet_transfer.data.detection.mapper.read_image", fail)
    with pytest.raises(MemoryError):
        mapper(record(tmp_path / "a.png"))


# ------------------------------------------------------------- in Detectron2's loaders


@pytest.mark.parametrize("is_train", [True, False])
def test_loads_through_detectron2s_loaders_with_workers(is_train, coco128):
    mapper = CheckedDatasetMapper(coco128, is_train=is_train)
    if is_train:
        coco128.SOLVER.IMS_PER_BATCH = 2
        loader = build_detection_train_loader(coco128, mapper=mapper)
    else:
        loader = build_detection_test_loader(coco128, "mine", mapper=mapper)
    batch = next(iter(loader))
    assert len(batch) == (2 if is_train else 1)
    assert ("instances" in batch[0]) == is_train


def test_a_worker_reports_the_image_and_its_annotation_file(data, files):
    path, images = files(data)
    register_coco_dataset("mine", path, images)
    cfg = get_cfg()
    cfg.DATASETS.TEST = ("mine", "never_registered")
    cfg.DATALOADER.NUM_WORKERS = 1
    (images / "b.png").write_bytes(b"")
    mapper = pickle.loads(pickle.dumps(CheckedDatasetMapper(cfg, is_train=False)))
    loader = build_detection_test_loader(cfg, "mine", mapper=mapper)
    with pytest.raises(UserError) as caught:
        list(loader)
    expected = f"Image {images}/b.png (id 3, listed in {path}) cannot be read: it is empty"
    assert expected in str(caught.value)


def test_read_image_needs_no_data_set(tmp_path, photo):
    photo.save(tmp_path / "a.png")
    assert np.array_equal(read_image(str(tmp_path / "a.png"), "RGB"), np.asarray(photo))
