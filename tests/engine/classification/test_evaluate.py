"""Tests that compare the evaluation tools with reference code in Pillow and torchvision."""

import csv
import json
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from PIL import Image
from torchvision import transforms

from senet_transfer import UserError, create_classifier, save_weights
from senet_transfer.cli.evaluate import main, parser
from senet_transfer.config.load import load_config
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.images.multi_scale import MultiScaleTransform
from senet_transfer.data.images.places365 import open_places365
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.data.shards.write import convert
from senet_transfer.engine.inference.evaluate import _published
from senet_transfer.evaluation.classification import evaluate_classifier
from senet_transfer.evaluation.paper_results import PLACES365
from senet_transfer.models.image_classifier import wrap_classifier

NORMALISE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SMALL = ["--resize", "37", "--crop", "32", "--workers", "0", "--batch-size", "17"]


def views_of(mode: str, resize: int, crop: int):
    tensor = transforms.Compose([transforms.ToTensor(), NORMALISE])
    if mode == "ten_crop":
        stack = transforms.Lambda(lambda crops: torch.stack([tensor(view) for view in crops]))
        return transforms.Compose([transforms.Resize(resize), transforms.TenCrop(crop), stack])
    size = (resize, resize) if mode == "squash" else resize
    steps = [transforms.Resize(size), transforms.CenterCrop(crop), tensor]
    return transforms.Compose(steps)


def listed(places: Path) -> list[tuple[str, int]]:
    lines = (places / "places365_val.txt").read_text().splitlines()
    return [(name, int(label)) for name, label in (line.split() for line in lines)]


def copy_of(places: Path, target: Path, images: int | None = None) -> Path:
    """Copy the validation set, or its first ``images`` images, using symbolic links."""
    (target / "val_256").mkdir(parents=True)
    lines = (places / "places365_val.txt").read_text().splitlines(keepends=True)[:images]
    (target / "places365_val.txt").write_text("".join(lines))
    categories = "categories_places365.txt"
    (target / categories).write_text((places / categories).read_text())
    for name, _ in listed(target):
        (target / "val_256" / name).symlink_to(places / "val_256" / name)
    return target


@torch.inference_mode()
def plain_loop(model, places: Path, mode="short_side", resize=37, crop=32) -> torch.Tensor:
    """Compute logits ``(N, 365)`` image by image, in the order of places365_val.txt."""
    transform, logits = views_of(mode, resize, crop), []
    for name, _ in listed(places):
        views = transform(Image.open(places / "val_256" / name).convert("RGB"))
        logits.append(model(views if mode == "ten_crop" else views[None]).mean(0))
    return torch.stack(logits)


def errors(logits: torch.Tensor, labels: list[int]) -> tuple[float, float]:
    order = logits.argsort(1, descending=True)
    hits = order == torch.tensor(labels)[:, None]
    return tuple(100 * (1 - hits[:, :k].any(1).double().mean().item()) for k in (1, 5))


@pytest.fixture(scope="module")
def network(shared_data):
    """Return torchvision's ResNet-18 with a linear layer fitted to half of the images."""
    places = shared_data / "mini_places365"
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=365)
    labels = torch.tensor([label for _, label in listed(places)])
    images = [
        views_of("short_side", 37, 32)(Image.open(places / "val_256" / name).convert("RGB"))
        for name, _ in listed(places)
    ]
    images = torch.stack(images)
    with torch.no_grad():
        model.train()(images)
        model.eval()
        head, model.fc = model.fc, torch.nn.Identity()
        features = model(images)
        target = torch.nn.functional.one_hot(labels, 365).float()[::2]
        head.weight.copy_(torch.linalg.lstsq(features[::2], target).solution.T)
        head.bias.zero_()
        model.fc = head
    return model


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(network.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def places(shared_data, tmp_path_factory):
    """Map each storage format to the path of the validation set in this format."""
    source = shared_data / "mini_places365"
    root = tmp_path_factory.mktemp("places")
    convert(open_places365(source, "val"), root / "shards", split="val", shard_mb=1)
    for name in ("places365_val.txt", "categories_places365.txt"):
        (root / name).write_text((source / name).read_text())
    with tarfile.open(root / "val_256.tar", "w") as tar:
        tar.add(source / "val_256", "val_256")
    return {
        "lists and folder": source,
        "folder": source / "val_256",
        "shards": root / "shards",
        "archive": root / "val_256.tar",
    }


def evaluate(*words: str, published=()) -> dict:
    return main(parser().parse_args([str(word) for word in words]), published)


def read_logits(path) -> tuple[list[dict], torch.Tensor]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    logits = [[float(row[f"logit{label}"]) for label in range(365)] for row in rows]
    return rows, torch.tensor(logits)


@pytest.mark.long
def test_shards_folder_and_archive_equal_a_plain_loop(network, weights, places, tmp_path, capsys):
    expected = plain_loop(network, places["lists and folder"])
    names, labels = zip(*listed(places["lists and folder"]), strict=True)
    top1, top5 = errors(expected, labels)
    assert 10 < top1 < 70
    assert top5 < top1
    found = {}
    for kind, data in places.items():
        output = tmp_path / kind.replace(" ", "_")
        files = ["--output", f"{output}.json", "--predictions", f"{output}.csv", "--logits"]
        model = ["--model", "resnet18", "--weights", weights, "--family", "torchvision_v1"]
        evaluate(*model, "--data", data, *files, *SMALL, published=PLACES365)
        found[kind] = json.loads(Path(f"{output}.json").read_text())
        rows, logits = read_logits(f"{output}.csv")
        rows = {row["key"]: (row, logit) for row, logit in zip(rows, logits, strict=True)}
        for name, label, logit in zip(names, labels, expected, strict=True):
            (key,) = [key for key in rows if key.startswith(name.removesuffix(".jpg"))]
            row, own = rows[key]
            assert int(row["label"]) == label
            torch.testing.assert_close(own, logit, rtol=0, atol=1e-4)
            best = [int(row[f"top{place}"]) for place in range(1, 6)]
            assert best == own.topk(5).indices.tolist()
    for result in found.values():
        assert result["images"] == 298
        assert result["top1_error"] == found["shards"]["top1_error"]
        assert result["top5_error"] == found["shards"]["top5_error"]
        assert (result["top1_error"], result["top5_error"]) == pytest.approx((top1, top5))
        assert result["family"] == "torchvision_v1"
        assert result["published"][1]["top1_error"] == 40.37
    printed = capsys.readouterr()
    for word in ("41.15", "11.61", "40.37", "11.01", "41.07", "11.48", "Worst", "Most confused"):
        assert word in printed.out
    assert "image/s" not in printed.err


@pytest.mark.parametrize("mode", ["squash", "ten_crop"])
@pytest.mark.long
def test_the_other_views_equal_a_plain_loop(network, weights, places, tmp_path, mode):
    some = copy_of(places["lists and folder"], tmp_path / "copy", images=50)
    expected = plain_loop(network, some, mode)
    files = ["--predictions", tmp_path / "p.csv", "--logits", "--crop-mode", mode]
    data = ["--data", some]
    evaluate("--model", "resnet18", "--weights", weights, *data, *files, *SMALL)
    _, logits = read_logits(tmp_path / "p.csv")
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "views", "published"),
    [
        ("senet154", EvalTransform(), 18.68),
        ("senet154", EvalTransform(resize=366, crop=320), 17.28),
        ("senet154", EvalTransform(mode="ten_crop"), None),
        ("senet154", MultiScaleTransform((EvalTransform(), EvalTransform(resize=320))), None),
        ("se_resnet50", EvalTransform(), 22.37),
        ("se_resnet50", EvalTransform(resize=366, crop=320), None),
    ],
)
def test_the_papers_results_are_shown_only_for_the_same_views(model, views, published):
    cfg = load_config("imagenet_se_r50", ["MODEL.BACKBONE.ARCH", model])
    loaded = SimpleNamespace(cfg=cfg, family="caffe", preprocessing=EvalTransform())
    evaluation = SimpleNamespace(classes=[str(label) for label in range(1000)])
    rows = _published(evaluation, "imagenet/val", loaded, views)
    assert [row.top1_error for row in rows] == ([published] if published else [])


@pytest.mark.slow
def test_evaluation_at_full_size_equals_a_plain_loop(network, weights, places, tmp_path):
    expected = plain_loop(network, places["lists and folder"], resize=256, crop=224)
    files = ["--predictions", tmp_path / "p.csv", "--logits", "--workers", "1"]
    data = ["--data", places["shards"]]
    evaluate("--model", "resnet18", "--weights", weights, *data, *files)
    rows, logits = read_logits(tmp_path / "p.csv")
    order = [int(row["key"].rpartition("_")[2]) for row in rows]
    torch.testing.assert_close(logits, expected[order], rtol=0, atol=1e-4)


@pytest.mark.long
def test_the_worst_and_most_confused_classes_equal_a_simple_count(
    network, weights, places, tmp_path
):
    data = places["lists and folder"]
    files = ["--predictions", tmp_path / "p.csv"]
    found = evaluate("--model", "resnet18", "--weights", weights, "--data", data, *files, *SMALL)
    with open(tmp_path / "p.csv", newline="") as file:
        rows = [(row["class"], int(row["label"]), int(row["top1"])) for row in csv.DictReader(file)]
    for row in found["worst_classes"]:
        own = [predicted == label for name, label, predicted in rows if name == row["class"]]
        assert row["images"] == len(own)
        assert row["top1_error"] == pytest.approx(100 * (1 - sum(own) / len(own)))
    rates = [row["top1_error"] for row in found["worst_classes"]]
    assert rates == sorted(rates, reverse=True)
    names = {label: name for name, label, _ in rows}
    pair = found["most_confused"][0]
    counts = [
        sum(1 for name, label, got in rows if (name, got) == (a, b) and label != b)
        for a in set(names.values())
        for b in range(365)
    ]
    assert pair["images"] == max(counts)


def test_the_preset_is_called_as_documented(weights, places, tmp_path, run_python):
    output = tmp_path / "deep" / "results.json"
    words = ["--model", "resnet18", "--weights", weights, "--data", places["shards"]]
    line = ["tools/eval_places365.py", *words, "--output", output, *SMALL]
    done = run_python(*line)
    assert done.returncode == 0, done.stderr
    assert "Places-365-CNN" in done.stdout
    assert {"images", "top1_error", "top5_error"} <= json.loads(output.read_text()).keys()
    line[line.index(weights)] = "no/such.pth"
    done = run_python(*line)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: The weight file")


@pytest.mark.long
def test_a_missing_image_and_a_list_of_others_are_rejected(weights, places, tmp_path):
    data = copy_of(places["lists and folder"], tmp_path / "copy")
    words = ["--model", "resnet18", "--weights", weights, "--data", data, *SMALL]
    (data / "val_256" / "Places365_val_00000007.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 298 listed images.*Places365_val_00000007"):
        evaluate(*words)
    lines = (data / "places365_val.txt").read_text().splitlines()
    (data / "places365_val.txt").write_text("\n".join(lines[10:]))
    with pytest.raises(UserError, match="images that are not in the list"):
        evaluate(*words)


@pytest.mark.long
def test_an_image_that_cannot_be_decoded_is_named(weights, places, tmp_path):
    data = copy_of(places["lists and folder"], tmp_path / "copy")
    image = data / "val_256" / "Places365_val_00000007.jpg"
    content = image.read_bytes()
    image.unlink()
    image.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="Places365_val_00000007"):
        evaluate("--model", "resnet18", "--weights", weights, "--data", data, *SMALL)


class Slow(EvalTransform):
    """Evaluation transform that takes an additional 10 ms per image."""

    def __call__(self, data: bytes) -> torch.Tensor:
        time.sleep(0.01)
        return super().__call__(data)


def test_the_time_spent_waiting_for_images_is_reported(tree):
    dataset = open_dataset(tree)
    model = wrap_classifier(create_classifier("cifar_resnet8", len(dataset.classes))).eval()
    shares = {}
    for view in (Slow(resize=32, crop=32), EvalTransform(resize=32, crop=32)):
        found = evaluate_classifier(model, dataset, view, quiet=True)
        assert 0 < found.waited < found.seconds
        shares[type(view)] = found.summary()["share_of_time_waiting_for_images"]
        if isinstance(view, Slow):
            assert found.waited >= 0.01 * len(dataset)
    assert shares[Slow] > shares[EvalTransform]


@pytest.mark.long
def test_a_model_of_other_classes_is_rejected(weights, tree):
    with pytest.raises(UserError, match=r"(?s)linear.*365.*4"):
        evaluate("--model", "resnet18", "--weights", weights, "--data", tree, *SMALL)


@pytest.mark.long
def test_a_trained_model_is_evaluated_with_its_own_config(train, tree, tmp_path):
    trainer = train()
    run = tmp_path / "run"
    expected = trainer.results["classification"]
    # By default, all settings come from the config next to the checkpoint.
    found = evaluate("--weights", run / "model_final.pth", "--workers", "0")
    assert {key: found[key] for key in expected} == expected
    config = ["--config-file", run / "config.yaml"]
    found = evaluate("--weights", run / "model_final.pth", *config, "--data", tree)
    assert {key: found[key] for key in expected} == expected
    assert found["num_classes"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "resnet18"], "no weights to evaluate"),
        (["--data", "."], "No model is specified"),
        (["--weights", "{weights}"], "no evaluation data"),
        (["--model", "a", "--config-file", "b"], "only one of them is allowed"),
        (["--config-file", "configs/faster_rcnn_se_r50.yaml"], "expected ImageClassifier"),
        (["--config-file", "configs/places365_se_r152.yaml"], "neither --weights"),
        (["--model", "resnet18", "--weights", "{weights}"], "no evaluation data"),
        (
            ["--model", "resnet18", "--weights", "{weights}", "--data", "/no/such"],
            "Dataset /no/such not found",
        ),
        (["--model", "resnet18", "--weights", "{weights}", "--logits"], "--predictions"),
        (["--model", "resnet18", "--weights", "{weights}", "--output", "."], "can't be written"),
    ],
)
@pytest.mark.long
def test_an_inconsistent_command_line_is_rejected(words, message, tmp_path):
    save_weights(create_classifier("resnet18", 4), tmp_path / "w.pth")
    words = [word.format(weights=tmp_path / "w.pth") for word in words]
    with pytest.raises(UserError, match=message):
        evaluate(*words)


@pytest.mark.long
def test_an_invalid_view_or_device_is_rejected(tree, tmp_path):
    save_weights(create_classifier("resnet18", 4), tmp_path / "own.safetensors")
    words = ["--model", "resnet18", "--weights", tmp_path / "own.safetensors", "--data", tree]
    with pytest.raises(UserError, match="crop=0"):
        evaluate(*words, "--crop", "0")
    with pytest.raises(UserError, match="The device is 'gpu'; expected cuda or cpu"):
        evaluate(*words, "--device", "gpu")
