"""Tests for the loaders of in-memory datasets."""

from itertools import islice

import pytest
import torch
from torchvision.transforms.v2.functional import normalize

from senet_transfer import UserError, create_classifier
from senet_transfer.data.cifar.in_memory import ImageArrays, load_images, split_file
from senet_transfer.data.cifar.loader import CifarEvalLoader, CifarTrainLoader
from senet_transfer.data.cifar.prepare import prepare_cifar
from senet_transfer.data.cifar.transforms import CifarAugment
from senet_transfer.preprocessing import CIFAR10


def numbered(images: int = 50) -> ImageArrays:
    """Return images whose pixels and labels are equal to the image index."""
    labels = torch.arange(images)
    pixels = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32).clone()
    return ImageArrays(pixels, labels, [str(n) for n in range(images)], "numbered")


def labels(loader: CifarTrainLoader, batches: int) -> list[int]:
    return [label for batch in islice(loader, batches) for label in batch["label"].tolist()]


def test_batches_have_the_format_of_the_classifiers_input():
    loader = CifarTrainLoader(numbered(), batch_size=8, seed=0, augment=CifarAugment())
    batch = next(iter(loader))
    assert batch.keys() == {"image", "label"}
    assert batch["image"].shape == (8, 3, 32, 32)
    assert (batch["image"].dtype, batch["label"].dtype) == (torch.uint8, torch.int64)
    centre = batch["image"][:, 0, 16, 16]
    assert centre.tolist() == batch["label"].tolist()


def test_every_epoch_has_every_image_once_in_a_different_order():
    seen = labels(CifarTrainLoader(numbered(), batch_size=8, seed=0), 25)
    epochs = [seen[start : start + 50] for start in range(0, 200, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert seen != labels(CifarTrainLoader(numbered(), batch_size=8, seed=1), 25)


@pytest.mark.parametrize("start", [0, 1, 6, 7, 13, 40])
def test_a_resumed_run_continues_with_identical_batches(start):
    options = {"batch_size": 8, "seed": 5, "augment": CifarAugment(cutout=8, padding="reflect")}
    straight = list(islice(CifarTrainLoader(numbered(), **options), start + 5))[start:]
    resumed = list(islice(CifarTrainLoader(numbered(), **options, start_iter=start), 5))
    for one, other in zip(straight, resumed, strict=True):
        assert one.keys() == other.keys() == {"image", "label", "cutout"}
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_processes_split_the_batches_of_one_process():
    options = {"seed": 2, "augment": CifarAugment(cutout=8)}
    alone = CifarTrainLoader(numbered(), batch_size=12, **options)
    shared = [
        CifarTrainLoader(numbered(), batch_size=3, rank=rank, world_size=4, **options)
        for rank in range(4)
    ]
    for whole, *parts in islice(zip(alone, *shared, strict=True), 10):
        for key, value in whole.items():
            assert torch.equal(value, torch.cat([part[key] for part in parts]))


def test_a_batch_larger_than_the_dataset_repeats_it():
    seen = labels(CifarTrainLoader(numbered(10), batch_size=25, seed=0), 2)
    assert sorted(seen) == sorted(list(range(10)) * 5)


def test_a_batch_has_the_sampled_crops_and_cutout_centres():
    data, augment = numbered(), CifarAugment(cutout=16)
    loader = CifarTrainLoader(data, batch_size=8, seed=3, augment=augment)
    batch = loader.batch(4)
    draws = augment.draw(8, seed=3, iteration=4)
    assert torch.equal(batch["image"], augment.move(data.images[loader.indices(4)], draws))
    assert torch.equal(batch["cutout"], draws.centre)


@pytest.mark.parametrize("world_size", [1, 3, 7])
def test_evaluation_sees_every_image_once_over_all_processes(world_size):
    seen, keys = [], []
    for rank in range(world_size):
        loader = CifarEvalLoader(numbered(), batch_size=8, rank=rank, world_size=world_size)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert sum(len(batch["label"]) for batch in batches) == loader.expected
        for batch in batches:
            assert batch["image"][:, 0, 0, 0].tolist() == batch["label"].tolist()
            seen += batch["label"].tolist()
            keys += batch["key"]
    assert seen == list(range(50))
    assert len(set(keys)) == 50


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"rank": 2, "world_size": 2}, {"seed": -1}, {"start_iter": -1}],
)
def test_invalid_values_are_rejected(options):
    with pytest.raises(UserError, match="expected"):
        CifarTrainLoader(numbered(), **{"batch_size": 8, "seed": 0, **options})


def test_training_batches_are_infinite():
    with pytest.raises(TypeError, match="infinite"):
        len(CifarTrainLoader(numbered(), batch_size=8, seed=0))


@pytest.mark.slow
def test_the_real_images_are_prepared_and_a_network_learns_on_them(shared_data, tmp_path):
    folder = prepare_cifar(shared_data / "cifar10_jpeg", tmp_path / "cifar10")
    train, test = (load_images(split_file(folder, split)) for split in ("train", "test"))
    assert (len(train), len(test), len(train.classes)) == (50_000, 10_000, 10)
    assert set(train.class_counts()) == {5000}
    # The mean in the recipes is that of the original images, not of these JPEG-compressed ones.
    mean = train.images.double().mean((0, 2, 3)).tolist()
    assert mean == pytest.approx(CIFAR10.mean, abs=1)
    torch.manual_seed(0)
    model = create_classifier("se_cifar_resnet8", 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    loader = CifarTrainLoader(train, batch_size=64, seed=0, augment=CifarAugment())
    losses = []
    for batch in islice(loader, 100):
        logits = model(normalize(batch["image"].float(), CIFAR10.mean, CIFAR10.std))
        loss = torch.nn.functional.cross_entropy(logits, batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.85 * losses[0]
