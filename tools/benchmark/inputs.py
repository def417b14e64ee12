"""Benchmark ``loader``: speed of loading JPEG images, compared with torchvision and webdataset."""

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmark.compare import compare
from benchmark.networks import Options
from benchmark.report import Row
from senet_transfer.data.base import RawSample
from senet_transfer.data.classification.loader import build_classification_train_loader
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.images.transforms import TrainTransform
from senet_transfer.data.shards.tar import ShardWriter

IMAGES, BATCH, SIZE = 256, 32, 224

# torchvision's augmentation for ImageNet.
RECIPE = [v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()]
NORMALISE = [
    v2.ToImage(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
]


def draw_images(folder: Path, sizes: tuple[int, int], images: int = IMAGES) -> None:
    """Write JPEG images of two classes, with smooth random colours and the sizes of photographs."""
    draw = np.random.default_rng(0)
    for index in range(images):
        coarse = draw.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(sizes, Image.Resampling.BICUBIC)
        path = folder / f"class{index % 2}" / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)


def write_shard(folder: Path, shard: Path) -> None:
    """Write a folder's images to a tar shard that webdataset can read."""
    with shard.open("wb") as file:
        writer = ShardWriter(file)
        for index, path in enumerate(sorted(folder.rglob("*.jpg"))):
            writer.write(
                RawSample(f"{index:06d}", int(path.parent.name[-1]), path.read_bytes(), "")
            )
        writer.close()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to a single thread, as in a DataLoader worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_loader(options: Options) -> Iterator[Row]:
    """Time the loading of random 224 px crops in one process, for images of two sizes."""
    for sizes in ((256, 256), (500, 375)):
        with tempfile.TemporaryDirectory() as name, one_thread():
            folder, shard = Path(name) / "images", Path(name) / "shard.tar"
            draw_images(folder, sizes)
            write_shard(folder, shard)
            loaders = _loaders(folder, shard)
            found = compare(
                f"Training batches of {BATCH} JPEG images of {sizes[0]}x{sizes[1]}, one process",
                loaders,
                baseline="ImageFolder",
                control="ImageFolder again",
                seconds=options.seconds,
                pairs=[("ImageFolder", "ours"), ("webdataset", "ours"), ("bare", "ours")],
                profile=options.profile,
            )
        found.notes["images_per_round"] = IMAGES
        yield found


def _loaders(folder: Path, shard: Path) -> dict[str, Callable[[], None]]:
    files = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]
    return {
        "ImageFolder": _image_folder(folder),
        "ImageFolder again": _image_folder(folder),
        "webdataset": _webdataset(shard),
        "ours": _ours(folder),
        "bare": lambda: _bare(files),
    }


def _image_folder(folder: Path) -> Callable[[], None]:
    dataset = ImageFolder(folder, v2.Compose([*RECIPE, *NORMALISE]))
    return lambda: _exhaust(DataLoader(dataset, batch_size=BATCH, shuffle=True))


def _webdataset(shard: Path) -> Callable[[], None]:
    transform = v2.Compose([*RECIPE, *NORMALISE])
    dataset = (
        webdataset.WebDataset(str(shard), shardshuffle=False)
        .shuffle(100)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, lambda label: label)
        .batched(BATCH)
    )
    return lambda: _exhaust(dataset)


def _ours(folder: Path) -> Callable[[], None]:
    loader = build_classification_train_loader(
        open_dataset(folder),
        batch_size=BATCH,
        transform=TrainTransform(size=SIZE),
        seed=0,
    )
    batches = iter(loader)
    return lambda: _exhaust(itertools.islice(batches, IMAGES // BATCH))


def _bare(files: list[bytes]) -> None:
    """Decode each image and resize a random crop.

    The time for these two steps is a lower bound on the time of any data loader.
    """
    for data in files:
        RECIPE[0](torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1))


def _exhaust(batches: Iterable[object]) -> None:
    for _ in batches:
        pass
