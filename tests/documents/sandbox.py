"""Sandbox folder with small substitutes for the files that documented commands use."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torchvision
import webdataset
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image

from senet_transfer import create_classifier, save_weights
from senet_transfer.data.cifar.prepare import prepare_cifar
from senet_transfer.data.images.places365 import open_places365
from senet_transfer.data.shapes.class_folders import make_shape_classes
from senet_transfer.data.shapes.generate import make_shapes
from senet_transfer.data.shards.write import convert
from senet_transfer.weights.hub.catalogue import load_catalogue
from tests.data.cifar.cifar_files import official_files, write_tar
from tests.documents.commands import ROOT
from tests.documents.warm import LIMIT, WarmPython
from tests.weights.caffe_networks import senet

# Files and folders in the checkout to which the sandbox has symbolic links.
LINKS = ("tools", "configs", "Makefile", "pyproject.toml", "constraints.txt")
TINY = "datasets/shapes/annotations/instances_tiny.json"


def environment(folder: Path) -> dict[str, str]:
    """Return environment variables with which commands use this checkout and this Python."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    kept = {k: v for k, v in os.environ.items() if k not in ("DETECTRON2_DATASETS", "MAKEFLAGS")}
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "TORCH_HOME": str(folder / "hub")}  # fmt: skip


def call(words: list[str], folder: Path, python: WarmPython) -> subprocess.CompletedProcess:
    """Run a command in the sandbox."""
    if words[0] == "python":
        return python.call(words[1:])
    return subprocess.run(
        words, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=LIMIT,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def _shapes(root: Path) -> None:
    make_shapes(root / "datasets/shapes", quiet=True)


def _coco(root: Path) -> None:
    """Write the shapes dataset in the layout of COCO 2017, with COCO's 80 categories."""
    content = json.loads((root / TINY).read_text())
    keys = ("id", "name", "supercategory")
    things = [entry for entry in COCO_CATEGORIES if entry["isthing"]]
    content["categories"] = [{"supercategory": "thing", **entry} for entry in things]
    content["categories"] = [{key: e[key] for key in keys} for e in content["categories"]]
    (root / "datasets/coco/annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / f"datasets/coco/annotations/instances_{split}.json").write_text(json.dumps(content))
        shutil.copytree(root / "datasets/shapes/tiny", root / "datasets/coco" / split)


def _own_coco(root: Path) -> None:
    for name in ("train.json", "val.json", "annotations.json"):
        shutil.copy(root / TINY, root / name)
    shutil.copytree(root / "datasets/shapes/tiny", root / "images")


def _voc(root: Path) -> None:
    """Write the shapes dataset in Pascal VOC format, with the same images in train and val."""
    content = json.loads((root / TINY).read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    shutil.copytree(root / "datasets/shapes/tiny", root / "voc/JPEGImages")
    (root / "voc/Annotations").mkdir()
    for image in content["images"]:
        text = ""
        for item in content["annotations"]:
            if item["image_id"] == image["id"]:
                x, y, width, height = item["bbox"]
                corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
                box = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
                name = names[item["category_id"]]
                text += f"<object><name>{name}</name><bndbox>{box}</bndbox></object>"
        path = root / "voc/Annotations" / image["file_name"]
        path.with_suffix(".xml").write_text(f"<annotation>{text}</annotation>")
    stems = "\n".join(Path(image["file_name"]).stem for image in content["images"])
    (root / "voc/ImageSets/Main").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"voc/ImageSets/Main/{split}.txt").write_text(stems)


def _photos(root: Path) -> None:
    drawn = sorted((root / "datasets/shapes/tiny").iterdir())
    for place in ("photos/1.jpg", "photos/2.jpg", "more/3.jpg", "photo.jpg"):
        (root / place).parent.mkdir(exist_ok=True)
        shutil.copy(drawn.pop(), root / place)


def _five_channels(root: Path) -> None:
    """Write the images of the shapes dataset as NumPy arrays with five channels."""
    content = json.loads((root / TINY).read_text())
    (root / "five").mkdir()
    for image in content["images"]:
        path = root / "datasets/shapes/tiny" / image["file_name"]
        pixels = 16 * np.asarray(Image.open(path).convert("RGB")).astype(np.uint16)
        image["file_name"] = f"{path.stem}.npy"
        np.save(root / "five" / image["file_name"], np.dstack([pixels, pixels[..., :2]]))
    (root / "five.json").write_text(json.dumps(content))


def _flowers(root: Path) -> None:
    for split in ("train", "val", "test", "all"):
        (root / "flowers").mkdir(exist_ok=True)
        make_shape_classes(root / "datasets/shapes", root / "flowers" / split)


def _shape_classes(root: Path) -> None:
    make_shape_classes(root / "datasets/shapes", root / "datasets/shapes_classes")


def _places365(root: Path) -> None:
    """Write three Places365 splits in the original layout: lists, an image folder and archives."""
    source, rng = root / "SOURCE", np.random.default_rng(0)
    source.mkdir()
    classes = [f"/{'abc'[n % 3]}/class_{n}" for n in range(365)]
    lines = (f"{name} {label}\n" for label, name in enumerate(classes))
    (source / "categories_places365.txt").write_text("".join(lines))
    for split, folder in (
        ("val", "val_256"), ("train_standard", "data_256_standard"),
        ("train_challenge", "data_256_challenge"),
    ):  # fmt: skip
        names = [
            f"Places365_val_{n + 1:08d}.jpg" if split == "val" else f"{classes[n]}/{n:08d}.jpg"
            for n in range(12)
        ]
        for name in names:
            path = source / folder / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
        lines = (f"{name} {label}\n" for label, name in enumerate(names))
        (source / f"places365_{split}.txt").write_text("".join(lines))
    for archive, folder in (
        ("val_256.tar", "val_256"), ("train_256_places365challenge.tar", "data_256_challenge")
    ):  # fmt: skip
        with tarfile.open(source / archive, "w") as tar:
            tar.add(source / folder, folder)
        shutil.rmtree(source / folder)


def _places365_shards(split: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        if not (root / "SOURCE").exists():
            _places365(root)
        images = open_places365(root / "SOURCE", split)
        convert(images, root / "datasets/places365" / split, split=split, workers=1, quiet=True)

    return make


def _imagenet(place: str) -> Callable[[Path], None]:
    """Return a function that writes small ImageNet splits and the validation blacklist."""

    def make(root: Path) -> None:
        rng = np.random.default_rng(0)
        for split in ("train", "val"):
            for number in range(12):
                wnid = ("n01440764", "n01443537", "n01484850")[number % 3]
                stem = f"ILSVRC2012_val_{number + 1:08d}" if split == "val" else f"{wnid}_{number}"
                path = root / place / split / wnid / f"{stem}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
        blacklist = root / place / "ILSVRC2014_clsloc_validation_blacklist.txt"
        blacklist.write_text("3\n7\n")

    return make


def _foreign_shards(root: Path) -> None:
    """Write a WebDataset shard without this project's manifest, and a file with class names."""
    folder = root / "shards/train"
    folder.mkdir(parents=True)
    image = np.zeros((40, 40, 3), np.uint8)
    with webdataset.TarWriter(str(folder / "train-000000.tar")) as tar:
        for number in range(4):
            tar.write({"__key__": f"{number:06d}", "jpg": image, "cls": number % 2})
    (root / "classes.txt").write_text("cat\ndog\n")


def _cifar_archive(root: Path) -> None:
    write_tar(root / "cifar-10-python.tar.gz", official_files("cifar-10-python"))


def _cifar(name: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        source = write_tar(root / f"{name}.tar.gz", official_files(f"{name[:5]}-{name[5:]}-binary"))
        prepare_cifar(source, root / "datasets" / name, verify=False, quiet=True)

    return make


def _by_hand(root: Path) -> None:
    """Write random weights to torch.hub's cache, as if a user had downloaded the file manually."""
    path = root / "hub/hub/checkpoints" / load_catalogue()["places365/resnet50"].file
    path.parent.mkdir(parents=True)
    network = torchvision.models.resnet50(num_classes=365)
    tensors = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"arch": "resnet50", "state_dict": tensors}, path)


def _published(root: Path) -> None:
    import pretrainedmodels  # the import is slow because it builds networks

    path = root / "published" / load_catalogue()["torchvision/resnet50"].file
    path.parent.mkdir()
    torch.save(torchvision.models.resnet50().state_dict(), path)
    path = path.with_name(load_catalogue()["cadene/se_resnet50"].file)
    torch.save(pretrainedmodels.se_resnet50(pretrained=None).state_dict(), path)


def _caffemodel(root: Path) -> None:
    senet("SE-ResNet-50").write(root / "net.prototxt", root / "SE-ResNet-50.caffemodel")


def _classifier(root: Path) -> None:
    save_weights(create_classifier("se_resnet50"), root / "classifier.pth")


def _train(root: Path, config: str, *options: str) -> None:
    words = ["tools/train_net.py", "--config-file", f"configs/instant/{config}.yaml", *options]
    subprocess.run([sys.executable, *words], cwd=root, env=environment(root), check=True)


FLOWERS = ("DATASETS.TRAIN", "('flowers/train',)", "DATASETS.TEST", "('flowers/val',)")


def _classifier_run(root: Path) -> None:
    _train(root, "demo_places365_se_r18", *FLOWERS, "OUTPUT_DIR", "output")


def _flowers_run(root: Path) -> None:
    _train(root, "finetune_folder", *FLOWERS, "OUTPUT_DIR", "output/flowers")


def _detector_runs(root: Path) -> None:
    _train(root, "demo_faster_rcnn_se_r18", "OUTPUT_DIR", "output/demo")
    for name in ("r50", "se_r50"):
        shutil.copytree(root / "output/demo", root / "output" / name)


def _documents(root: Path) -> None:
    """Copy ``tests/test_documents.py`` and the files that it needs to update documents.

    The copy of configs/README.md contains no tables, so the tested command must add them.
    """
    (root / "configs").unlink()
    shutil.copytree(ROOT / "configs", root / "configs")
    for name in ("tests/test_documents.py", "CONTRIBUTING.md"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "configs/README.md").write_text("# Configs\n")


# Each row: a pattern of commands that need a path, the path, and a function that creates it. A
# function may need files from earlier rows.
STAND_INS = (
    (r"datasets/|tools/|senet train|make demo", "datasets/shapes", _shapes),
    (r"shapes_classes", "datasets/shapes_classes", _shape_classes),
    (r"coco_2017", "datasets/coco", _coco),
    (r"train\.json|val\.json", "train.json", _own_coco),
    (r"five\.json", "five.json", _five_channels),
    (r"\bvoc\b", "voc", _voc),
    (r"photos?\b|more/", "photos", _photos),
    (r"flowers|output/(model|config)", "flowers", _flowers),
    (r"SOURCE", "SOURCE", _places365),
    *(
        (rf"places365/{split}", f"datasets/places365/{split}", _places365_shards(split))
        for split in ("val", "train_standard", "train_challenge")
    ),
    (r"IMAGENET", "IMAGENET", _imagenet("IMAGENET")),
    (r"imagenet/train", "datasets/imagenet/train", _imagenet("datasets/imagenet")),
    (r"shards/train", "shards/train", _foreign_shards),
    (r"cifar-10-python\.tar\.gz|--download cifar10", "cifar-10-python.tar.gz", _cifar_archive),
    (r"cifar10_(train|test)", "datasets/cifar10", _cifar("cifar10")),
    (r"cifar100_(train|test)", "datasets/cifar100", _cifar("cifar100")),
    (r"places365/resnet50", "hub", _by_hand),
    (r"published/", "published", _published),
    (r"\.caffemodel", "SE-ResNet-50.caffemodel", _caffemodel),
    (r"classifier\.pth", "classifier.pth", _classifier),
    (r"output/(model|config)", "output", _classifier_run),
    (r"output/flowers/model", "output/flowers", _flowers_run),
    (r"tests/test_documents", "tests", _documents),
    (r"output/(demo|r50|se_r50)", "output/demo", _detector_runs),
)


def made(lines: Iterable[list[str]]) -> set[str]:
    """Return the output paths in the given command lines."""
    return {
        os.path.normpath(value)
        for words in lines
        for key, value in zip(words, words[1:], strict=False)
        if key in ("--output", "OUTPUT_DIR")
    }


def make_sandbox(folder: Path, lines: list[list[str]]) -> Path:
    """Create a folder with the input files of the given commands, except those that they write."""
    folder.mkdir()
    (folder / ".venv").symlink_to(sys.prefix)
    for name in LINKS:
        (folder / name).symlink_to(ROOT / name)
    (folder / "datasets").mkdir()
    for script in (ROOT / "datasets").glob("prepare_*.py"):
        (folder / "datasets" / script.name).symlink_to(script)
    text = "\n".join(" ".join(words) for words in lines)
    for mentioned, place, make in STAND_INS:
        if re.search(mentioned, text) and place not in made(lines):
            make(folder)
    return folder
