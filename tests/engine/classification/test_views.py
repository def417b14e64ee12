"""Tests that compare multi-scale, multi-crop and ensemble evaluation with simple loops."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms

from senet_transfer import UserError, create_classifier, get_senet_config, save_weights
from senet_transfer.cli.evaluate import main, parser
from senet_transfer.data.images.multi_scale import pack
from senet_transfer.engine.inference.ensembles import check_same_classes
from senet_transfer.engine.inference.evaluate import _check_order
from senet_transfer.engine.model_from import ModelSource
from senet_transfer.models.backbones.vgg import VGGNeck
from senet_transfer.models.dense import DenseClassifier
from senet_transfer.models.image_classifier import wrap_classifier

SCALES = (40, 48, 57)
TENSOR = transforms.Compose(
    [
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Return a folder with four images, two of which have the same size."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for index, size in enumerate([(60, 50), (60, 50), (50, 83), (64, 64)]):
        folder = root / f"class{index % 2}"
        folder.mkdir(exist_ok=True)
        image = Image.fromarray(random.integers(0, 255, (6, 7, 3), dtype=np.uint8)).resize(size)
        image.save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Return two torchvision networks with different random weights, and their weight files."""
    folder, found = tmp_path_factory.mktemp("weights"), []
    for seed in range(2):
        torch.manual_seed(seed)
        network = torchvision.models.resnet18(num_classes=2).eval()
        path = folder / f"{seed}.pth"
        torch.save(network.state_dict(), path)
        found.append((network, str(path)))
    return found


def evaluate(*words: str) -> dict:
    return main(parser().parse_args([*map(str, words), "--workers", "0", "--quiet"]))


def logits_of(photos: Path, out: Path, *words: str) -> tuple[dict, torch.Tensor]:
    """Run the evaluation command; return the metrics, and the logits sorted by image path."""
    files = ["--predictions", out / "logits.csv", "--logits", "--output", out / "results.json"]
    model = ["--model", "resnet18", "--family", "torchvision_v1", "--data", photos]
    evaluate(*words, *model, *files)
    with open(out / "logits.csv", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["path"])
    results = json.loads((out / "results.json").read_text())
    return results, torch.tensor([[float(row["logit0"]), float(row["logit1"])] for row in rows])


@torch.inference_mode()
def plain_loop(network, photos: Path, view) -> torch.Tensor:
    """Return the logits of each image, averaged over all scales and crops.

    Args:
        network: The classifier.
        photos: Folder with the images.
        view: Function that returns a list of crops of a resized image.
    """
    logits = []
    for path in sorted(photos.rglob("*.png")):
        image = Image.open(path).convert("RGB")
        crops = [crop for s in SCALES for crop in view(transforms.Resize(s)(image))]
        logits.append(torch.stack([network(TENSOR(crop)[None])[0] for crop in crops]).mean(0))
    return torch.stack(logits)


VIEWS = {
    "centre": (["--crop", "32"], lambda image: [transforms.CenterCrop(32)(image)], 1),
    "ten": (["--crop", "32", "--crops", "10"], transforms.TenCrop(32), 10),
    "dense": (["--dense"], lambda image: [image], "dense"),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", VIEWS)
def test_logits_at_several_scales_equal_a_plain_loop(networks, photos, tmp_path, kind):
    words, view, crops = VIEWS[kind]
    network, weights = networks[0]
    results, logits = logits_of(photos, tmp_path, "--weights", weights, "--scales", *SCALES, *words)
    expected = plain_loop(network, photos, view)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert results["images"] == 4
    wrong = expected.argmax(1) != torch.tensor([0, 0, 1, 1])
    assert results["top1_error"] == 100 * wrong.double().mean().item()
    assert (results["scales"], results["crops"], results["weights"]) == (
        list(SCALES),
        crops,
        weights,
    )


@pytest.mark.long
def test_mean_probabilities_are_the_same_in_one_pass_and_from_saved_logits(
    networks, photos, tmp_path
):
    single, files = [], []
    for index, (_, weights) in enumerate(networks):
        out = tmp_path / str(index)
        out.mkdir()
        single.append(
            logits_of(photos, out, "--resize", "40", "--crop", "32", "--weights", weights)
        )
        files.append(out / "logits.csv")
    weights = [weights for _, weights in networks]
    results, logits = logits_of(
        photos, tmp_path, "--weights", *weights, "--resize", "40", "--crop", "32"
    )
    expected = torch.stack([found.double().softmax(1) for _, found in single]).mean(0)
    torch.testing.assert_close(logits.double().softmax(1), expected, rtol=0, atol=1e-7)
    assert results["weights"] == weights
    assert results["scales"] == [40]
    # List the images in the second file in a different order.
    header, *rows = files[1].read_text().splitlines(keepends=True)
    files[1].write_text("".join([header, *reversed(rows)]))
    saved = tmp_path / "saved.csv"
    again = evaluate("--saved-logits", *files, "--predictions", saved, "--logits")
    assert saved.read_text() == (tmp_path / "logits.csv").read_text()
    keys = ("images", "top1_error", "top5_error", "worst_classes", "most_confused")
    assert {key: again[key] for key in keys} == {key: results[key] for key in keys}


class SmallNeck(VGGNeck):
    out_channels = 64


def test_dense_evaluation_applies_fully_connected_layers_at_all_positions():
    torch.manual_seed(0)
    classifier = create_classifier("cifar_resnet8", 5)
    classifier.neck = SmallNeck(64, dropout=0.5)
    classifier.linear = torch.nn.Linear(64, 5)
    model = wrap_classifier(classifier).eval()
    images = [torch.randint(0, 255, (3, 36, size), dtype=torch.uint8) for size in (32, 44, 32)]
    with torch.inference_mode():
        logits = DenseClassifier(model)(pack([[image] for image in images]))
        for image, found in zip(images, logits, strict=True):
            x = model.backbone(model.normalise(image[None]))[model.feature]
            # Apply the layers as convolutions, as in section 3.2 of Simonyan and Zisserman.
            neck, last = model.neck, model.linear
            x = F.relu(F.conv2d(x, neck.fc1.weight.view(64, 64, 7, 7), neck.fc1.bias))
            x = F.relu(F.conv2d(x, neck.fc2.weight[..., None, None], neck.fc2.bias))
            x = F.conv2d(x, last.weight[..., None, None], last.bias)
            assert x.shape[-2:].numel() > 2
            torch.testing.assert_close(found, x.mean((0, 2, 3)), rtol=0, atol=1e-5)
        with pytest.raises(UserError, match="of 24x36 pixels is smaller than 7x7"):
            DenseClassifier(model)(pack([[torch.zeros(3, 36, 24, dtype=torch.uint8)]]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scales", "40", "30", "--crop", "32"], "contains 30, but the crop is 32 pixels"),
        (["--scales", "40", "40"], "expected distinct sizes"),
        (["--scales", "40", "--resize", "40"], "Remove one of them"),
        (["--crops", "10", "--crop-mode", "squash"], "can't be combined with --crop-mode"),
        (["--dense", "--crops", "10"], "whole images"),
        (
            ["--saved-logits", "a.csv", "SEED", "1"],
            "--weights, --data, SEED 1 can't be combined with --saved-logits",
        ),
    ],
)
@pytest.mark.long
def test_views_that_contradict_each_other_are_rejected(words, message, networks, photos):
    model = ["--model", "resnet18", "--weights", networks[0][1], "--data", photos]
    with pytest.raises(UserError, match=message):
        evaluate(*model, *words)


@pytest.mark.long
@pytest.mark.usefixtures("zero_initial_weights")
def test_models_of_other_classes_or_preprocessing_are_rejected(photos, tmp_path):
    def saved(name: str, classes: list[str], network: str = "cifar_resnet8", **options) -> str:
        model = create_classifier(network, len(classes))
        model.backbone.preprocessing = replace(model.preprocessing, **options)
        save_weights(model, tmp_path / name, classes=classes)
        return str(tmp_path / name)

    cats = saved("cats.safetensors", ["cat", "dog"])
    for classes, message in [
        (["dog", "cat"], "class orders of .* differ: class 0 is cat in the first model and dog in"),
        (["cat", "emu"], "The classes of .* differ: class 1 is dog in the first model and emu in"),
        (["cat", "dog", "emu"], "have 2 and 3 classes"),
    ]:
        other = saved("other.safetensors", classes)
        with pytest.raises(UserError, match=message):
            evaluate("--weights", cats, other, "--data", photos)
    options = {"classes": ["class0", "class1"], "network": "resnet18"}
    first = saved("first.safetensors", **options)
    other = saved("other.safetensors", **options, interpolation="bicubic")
    with pytest.raises(UserError, match="differs: interpolation bilinear and bicubic"):
        evaluate("--weights", first, other, "--data", photos)


def test_the_authors_caffe_models_have_another_order_of_the_classes():
    def source(family: str) -> ModelSource:
        content = SimpleNamespace(num_classes=1000, family=SimpleNamespace(name=family))
        cfg = get_senet_config()
        cfg.MODEL.META_ARCHITECTURE = "ImageClassifier"
        return ModelSource(cfg, content)

    check_same_classes([source("caffe"), source("caffe")])
    check_same_classes([source("cadene"), source("torchvision_v1")])
    with pytest.raises(UserError, match="order of ImageNet's development kit"):
        check_same_classes([source("cadene"), source("caffe")])
    folders = SimpleNamespace(classes=["n01440764", "n01443537"], origin="imagenet/val")
    _check_order([source("cadene")], folders)
    _check_order([source("caffe")], SimpleNamespace(classes=["0", "1"]))
    with pytest.raises(UserError, match="imagenet/val are sorted by WordNet id"):
        _check_order([source("caffe")], folders)


def test_models_are_compared_even_if_the_first_one_has_no_class_names():
    def source(*classes: str) -> ModelSource:
        cfg = get_senet_config()
        cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.CLASSIFIER.NUM_CLASSES = "ImageClassifier", 2
        cfg.DATASETS.CLASSES = list(classes)
        return ModelSource(cfg)

    check_same_classes([source(), source("cat", "dog"), source("cat", "dog")])
    with pytest.raises(UserError, match="class 0 is cat in the first model and dog in the second"):
        check_same_classes([source(), source("cat", "dog"), source("dog", "cat")])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("a,0,x", "a,1,y", r"the label of a is 0 \(x\) in the first file and 1 \(y\)"),
        ("a,0,x", "c,0,x", "2 images are in only one file, such as a"),
        ("a,0,x", "b,0,x", "two rows with the key b"),
        ("logit1,", "", "for 2 and 1 classes"),
        ("logit0", "other", "can't be read: .*Expected a CSV file"),
        (",0.5,", ",,", "can't be read"),
        ("\na,", "\n\na,", "line 2 has 0 columns; expected 6"),
    ],
)
def test_saved_logits_that_do_not_match_are_rejected(old, new, message, tmp_path):
    text = "key,label,class,logit0,logit1,path\na,0,x,0.5,1,p\nb,1,y,2,3,q\n"
    (tmp_path / "a.csv").write_text(text)
    (tmp_path / "b.csv").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        evaluate("--saved-logits", tmp_path / "a.csv", tmp_path / "b.csv")


def test_flags_accept_several_values_before_flags_and_config_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL.PTH").touch()
    words = (
        "--weights a.pth MODEL.PTH SEED 3 --scales 224 256 --crops 10 --scales 288 TEST.LOSS True"
    )
    found = parser().parse_args(words.split())
    assert found.weights == ["a.pth", "MODEL.PTH"]
    assert found.scales == [224, 256, 288]
    assert found.opts == ["SEED", "3", "TEST.LOSS", "True"]
    assert found.crops == 10
