"""Tests for the optional augmentation in classification: transforms, seeding and errors."""

import functools
import io
import random
from itertools import islice

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from senet_transfer import UserError
from senet_transfer.config.load import load_config, merge_options
from senet_transfer.data.build import use_classification_datasets
from senet_transfer.data.classification.loader import build_classification_train_loader
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.images.augmentation import build_augmentation
from senet_transfer.data.images.decode import Reading
from senet_transfer.data.images.transforms import TrainTransform

KEY = "INPUT.CLASSIFICATION."
EVERYTHING = {
    "VERTICAL_FLIP": "0.5",
    "RIGHT_ANGLES": "True",
    "POLICY": "rand_augment",
    "COLOR_JITTER": "(0.4, 0.4, 0.4, 0.1)",
    "BLUR": "0.5",
    "ERASING": "0.5",
}
PICTURE = torch.arange(3 * 6 * 6, dtype=torch.uint8).view(3, 6, 6)


load = functools.cache(load_config)


def config(base="classification", **options):
    words = [word for key, value in options.items() for word in (KEY + key, value)]
    cfg = load(f"configs/base/{base}.yaml").clone()
    merge_options(cfg, words)
    return cfg


def augment(image=PICTURE, draws=1, **options):
    """Augment an image several times and return the distinct results, keyed by their bytes."""
    torch.manual_seed(0)
    transform = build_augmentation(config(**options))
    return {(image := transform(image0)).numpy().tobytes(): image for image0 in [image] * draws}


def test_nothing_is_added_by_default():
    assert build_augmentation(config()) is None


def test_flips_and_right_angles_equal_numpys():
    (flipped,) = augment(VERTICAL_FLIP="1.0").values()
    np.testing.assert_array_equal(flipped, PICTURE.numpy()[:, ::-1])
    turned = augment(draws=40, RIGHT_ANGLES="True")
    expected = [np.rot90(PICTURE.numpy(), k, axes=(1, 2)) for k in range(4)]
    assert set(turned) == {np.ascontiguousarray(image).tobytes() for image in expected}


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"POLICY": "rand_augment", "RAND_AUGMENT": "(3, 12)"},
         v2.RandAugment(3, 12, interpolation=v2.InterpolationMode.BILINEAR)),
        ({"POLICY": "trivial_augment"},
         v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)),
        ({"COLOR_JITTER": "(0.4, 0.3, 0.2, 0.1)"}, v2.ColorJitter(0.4, 0.3, 0.2, 0.1)),
    ],
)  # fmt: skip
def test_policies_and_colours_equal_torchvisions(options, theirs):
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    ours = build_augmentation(config(**options))
    for seed in range(10):
        torch.manual_seed(seed)
        found = ours(image)
        torch.manual_seed(seed)
        assert torch.equal(found, theirs(image))


def test_blur_equals_opencvs_up_to_rounding():
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    (found,) = augment(image, BLUR="1.0", BLUR_SIGMA="(1.5, 1.5)").values()
    pixels = image.permute(1, 2, 0).double().numpy()
    expected = cv2.GaussianBlur(pixels, (11, 11), 1.5, borderType=cv2.BORDER_REFLECT_101)
    np.testing.assert_allclose(found.permute(1, 2, 0), expected, atol=0.51)


@pytest.mark.parametrize(
    ("image_format", "mean", "filled"),
    [("RGB", "[10., 20., 30.]", [10, 20, 30]), ("BGR", "[10., 20., 30.]", [30, 20, 10])],
)
def test_erasing_fills_a_rectangle_with_the_mean_colour(image_format, mean, filled):
    cfg = config(ERASING="1.0")
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN = image_format, eval(mean)
    image = torch.full((3, 20, 20), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    erased = build_augmentation(cfg)(image)
    inside = (erased != 255).all(0)
    rows, columns = inside.any(1).sum(), inside.any(0).sum()
    assert inside.sum() == rows * columns > 0
    assert erased[:, inside].unique(dim=1).flatten().tolist() == filled


@pytest.fixture
def folder(tmp_path):
    """Write two class folders with 8-bit and 16-bit images of random pixels."""
    rng = np.random.default_rng(0)
    for number in range(8):
        path = tmp_path / "data" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < 6:
            pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        else:
            pixels = rng.integers(0, 4096, (40, 48), dtype=np.uint16)
        Image.fromarray(pixels).save(path)
    return tmp_path / "data"


@pytest.mark.long
def test_batches_depend_only_on_seed_and_iteration_and_own_random_state(folder):
    cfg = config(**EVERYTHING)
    transform = TrainTransform(
        size=24, reading=Reading((0, 4095)), augment=build_augmentation(cfg)
    )  # fmt: skip

    def batches(count, **options):
        loader = build_classification_train_loader(
            open_dataset(folder), batch_size=4, transform=transform, seed=3, **options
        )
        return [batch["image"] for batch in islice(loader, count)]

    torch.manual_seed(0)
    straight = batches(4)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(1) == drawn
    torch.manual_seed(99)
    # A single worker yields the same samples as the main process.
    for again in (batches(4, num_workers=1), [*batches(2), *batches(2, start_iter=2)]):
        assert all(map(torch.equal, again, straight))
    # With two workers, the order of the images differs but their augmentation does not.
    images = lambda found: {image.numpy().tobytes() for batch in found for image in batch}  # noqa: E731
    assert images(batches(4, num_workers=2)) == images(straight)
    resumed = batches(2, num_workers=2, start_iter=2)
    assert all(map(torch.equal, resumed, batches(4, num_workers=2)[2:]))
    assert len(images(straight)) == 16


def test_disabled_augmentation_does_not_change_the_crops(folder):
    data = (folder / "a" / "0.png").read_bytes()
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    plain = TrainTransform(size=24)
    expected = v2.functional.resized_crop(
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        *plain.region(40, 48, random.Random(5)), [24, 24], antialias=True,
    )  # fmt: skip
    found = plain(data, random.Random(5))
    assert torch.equal(found, expected) or torch.equal(found, expected.flip(-1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"POLICY": "auto"}, "expected one of: none, rand_augment, trivial_augment"),
        ({"COLOR_JITTER": "(0.4, 0.4)"}, "expected four non-negative numbers"),
        ({"COLOR_JITTER": "(0.1, 0.1, 0.1, 0.6)"}, "at most 0.5"),
        ({"RAND_AUGMENT": "(2, 31)"}, "magnitude from 0 to 30"),
        ({"BLUR_SIGMA": "(2.0, 1.0)"}, "minimum and the maximum"),
    ],
)
def test_invalid_values_are_rejected(options, said):
    with pytest.raises(UserError, match=said):
        build_augmentation(config(**options))


@pytest.mark.parametrize("key", EVERYTHING)
def test_images_in_memory_reject_every_key_at_the_start(key):
    cfg = config("cifar10", **{key: EVERYTHING[key]})
    with pytest.raises(UserError, match=rf"CLASSIFICATION.{key} is .* requires AUGMENT region"):
        use_classification_datasets(cfg)
