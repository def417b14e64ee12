import io
import tarfile

import pytest
import torch
from PIL import Image
from torchvision import transforms

from senet_transfer.data.classification.loader import build_classification_eval_loader
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.images.places365 import open_places365
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.data.shards.write import convert
from senet_transfer.errors import UserError
from tests.data.drawn_places import jpeg

SMALL = EvalTransform(resize=24, crop=16)


def evaluated(dataset, ranks=1, workers=0, transform=SMALL, batch_size=5):
    """Load a dataset with one loader per rank; return each image and label, keyed by sample key.

    No key may occur twice.
    """
    found = {}
    for rank in range(ranks):
        loader = build_classification_eval_loader(
            dataset,
            batch_size=batch_size,
            transform=transform,
            rank=rank,
            world_size=ranks,
            num_workers=workers,
        )
        batches = list(loader)
        assert len(batches) == len(loader)
        assert sum(len(batch["key"]) for batch in batches) == loader.expected
        for batch in batches:
            triples = zip(batch["key"], batch["image"], batch["label"].tolist(), strict=True)
            for key, image, label in triples:
                assert key not in found
                found[key] = (image.numpy().tobytes(), label)
    return found


@pytest.mark.parametrize("shards", [1, 3, 13])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.long
def test_every_image_is_loaded_exactly_once(make_shards, ranks, workers, shards):
    dataset = open_dataset(make_shards(26, shards))
    found = evaluated(dataset, ranks, workers)
    assert len(found) == 26
    assert sorted(int(key.rpartition("_")[2]) for key in found) == list(range(26))


def test_more_workers_than_images_are_supported(val, make_shards):
    for dataset in (open_dataset(make_shards(3, 2)), open_dataset(val)):
        assert len(evaluated(dataset, ranks=5, workers=0)) == len(dataset)


def sources(root, output):
    """Write a validation split in several formats and return the path of each."""
    archive = root / "val_256.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(root / "val_256", "val_256")
    convert(open_places365(root, "val"), output, split="val", shard_mb=1)
    return [root, root / "val_256", archive, output, output / "val-000000.tar"]


def test_folder_archive_and_shards_give_the_same_keys_labels_and_pixels(val, tmp_path):
    folder, images, archive, shards, shard = sources(val, tmp_path / "shards")
    expected = evaluated(open_dataset(folder))
    assert len(expected) == 24
    for other in (images, archive, shards, shard):
        assert evaluated(open_dataset(other)) == expected


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("mode", ["short_side", "squash", "ten_crop"])
@pytest.mark.long
def test_real_images_equal_a_pillow_and_torchvision_loop_bit_for_bit(
    shared_data, mode, interpolation
):
    root = shared_data / "mini_places365"
    kind = transforms.InterpolationMode(interpolation)
    resize = transforms.Resize((256, 256) if mode == "squash" else 256, interpolation=kind)
    crop = transforms.TenCrop(224) if mode == "ten_crop" else transforms.CenterCrop(224)
    images = open_dataset(root).images
    transform = EvalTransform(mode=mode, interpolation=interpolation)
    for index in range(0, len(images), 10):
        views = crop(resize(Image.open(root / "val_256" / images.names[index]).convert("RGB")))
        views = views if mode == "ten_crop" else [views]
        expected = torch.stack([transforms.functional.pil_to_tensor(view) for view in views])
        actual = transform(images.read(index).data)
        assert torch.equal(actual if mode == "ten_crop" else actual[None], expected)


@pytest.mark.parametrize("size", [(300, 201), (201, 300), (57, 400), (256, 256), (1000, 333)])
def test_resizing_and_cropping_equal_torchvision_at_odd_sizes(size):
    data = jpeg(1, size)
    plain = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    expected = transforms.functional.pil_to_tensor(plain(Image.open(io.BytesIO(data))))
    assert torch.equal(EvalTransform()(data), expected)


def test_ten_crops_give_a_batch_of_ten_views_per_image(val):
    transform = EvalTransform(mode="ten_crop", resize=24, crop=16)
    loader = build_classification_eval_loader(open_dataset(val), batch_size=7, transform=transform)
    batch = next(iter(loader))
    assert batch["image"].shape == (7, 10, 3, 16, 16)
    # The left crops of the mirrored image are the right crops of the original, mirrored.
    mirrored = batch["image"][:, [1, 0, 3, 2, 4]].flip(-1)
    assert torch.equal(batch["image"][:, 5:], mirrored)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_an_error_that_names_it(val, workers):
    broken = val / "val_256" / "Places365_val_00000011.jpg"
    broken.write_bytes(broken.read_bytes()[:-40])
    with pytest.raises(UserError, match="Cannot decode Places365_val_00000011"):
        evaluated(open_dataset(val), workers=workers)


def test_an_invalid_transform_is_rejected():
    with pytest.raises(UserError, match="five_crop"):
        EvalTransform(mode="five_crop")
    with pytest.raises(UserError, match="crop=300"):
        EvalTransform(crop=300)
    with pytest.raises(UserError, match="nearest"):
        EvalTransform(interpolation="nearest")
