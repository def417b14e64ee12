"""Tests that compare feature extraction, linear probes and k-NN with reference code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torchvision import transforms

from senet_transfer import UserError, create_backbone, create_classifier, save_weights
from senet_transfer.cli import evaluate, predict
from senet_transfer.cli.little_data import features, probe
from senet_transfer.data.images.folders import open_folder
from senet_transfer.data.shards.write import convert
from senet_transfer.engine.little_data import linear_probe
from senet_transfer.engine.little_data.neighbours import neighbour_scores, top_errors

VIEW = ["--workers", "0", "--batch-size", "5", "--quiet", "INPUT.CLASSIFICATION.TEST_RESIZE", "36",
        "INPUT.CLASSIFICATION.TEST_CROP", "32"]  # fmt: skip


def run(module, *words) -> None:
    module.main(module.parser().parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return create_classifier("se_resnet18", 7).eval()


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "network.safetensors"
    save_weights(network, path)
    return path


@torch.inference_mode()
def plain_loop(network, tree: Path) -> tuple[list[Path], torch.Tensor]:
    """Return the paths and pooled features of the images in a folder, using a simple loop."""
    classes = sorted({path.parent for path in tree.rglob("*.jpg")})
    paths = [path for folder in classes for path in sorted(folder.glob("*.jpg"))]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in
                 ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))  # fmt: skip
    steps = [transforms.Resize(36), transforms.CenterCrop(32), transforms.PILToTensor()]
    view = transforms.Compose(steps)
    images = [(view(Image.open(path).convert("RGB")) - mean) / std for path in paths]
    found = [
        network.backbone(torch.stack(images[start : start + 5]))["res5"].mean((2, 3))
        for start in range(0, len(images), 5)
    ]
    return paths, torch.cat(found)


@pytest.mark.long
def test_features_are_bitwise_equal_to_a_plain_loop(network, weights, tree, tmp_path):
    paths, expected = plain_loop(network, tree)
    backbone = create_backbone("se_resnet18")
    backbone.load_state_dict(network.backbone.state_dict())
    save_weights(backbone, tmp_path / "backbone.pth")
    for file in (weights, tmp_path / "backbone.pth"):
        words = ["--model", "se_resnet18", "--weights", file, "--data", tree]
        for name in ("f.npz", "f.safetensors"):
            run(features, *words, "--output", tmp_path / name, *VIEW)
        found = np.load(tmp_path / "f.npz")
        assert np.array_equal(found["features"], expected.numpy())
        assert found["paths"].tolist() == [str(path) for path in paths]
        names = [path.parent.relative_to(tree).as_posix() for path in paths]
        assert found["classes"][found["labels"]].tolist() == names
        with safe_open(tmp_path / "f.safetensors", "pt") as stored:
            for name in ("features", "labels"):
                assert torch.equal(stored.get_tensor(name), torch.from_numpy(found[name]))
            for name in ("paths", "classes"):
                assert json.loads(stored.metadata()[name]) == found[name].tolist()


@pytest.mark.long
def test_features_of_shards_with_workers_equal_those_of_the_folder(
    network, weights, tree, tmp_path
):
    convert(open_folder(tree), tmp_path / "shards", split="images", shard_mb=0.02)
    words = ["--weights", weights, "--output", tmp_path / "f.npz", "--data", tmp_path / "shards"]
    run(features, *words, *VIEW, "--workers", "2")
    found = np.load(tmp_path / "f.npz")
    _, expected = plain_loop(network, tree)
    shown = [int(path.rpartition("_")[2]) for path in found["paths"]]
    np.testing.assert_allclose(found["features"], expected[shown], rtol=0, atol=1e-5)


@pytest.mark.long
def test_logistic_regression_finds_scipys_minimum():
    from scipy.optimize import minimize
    from scipy.special import log_softmax, softmax

    random = np.random.RandomState(0)
    x, y = random.randn(40, 6), random.randint(0, 3, 40)
    decay = 0.03

    def loss(flat):
        weight, bias = flat[:18].reshape(3, 6), flat[18:]
        logits = x @ weight.T + bias
        value = -log_softmax(logits, 1)[np.arange(40), y].mean() + decay / 2 * (weight**2).sum()
        slope = (softmax(logits, 1) - np.eye(3)[y]) / 40
        return value, np.concatenate([(slope.T @ x + decay * weight).ravel(), slope.sum(0)])

    best = minimize(loss, np.zeros(21), jac=True, method="BFGS", options={"gtol": 1e-9}).x
    weight, bias = linear_probe.logistic_regression(
        torch.from_numpy(x), torch.from_numpy(y), 3, decay
    )
    np.testing.assert_allclose(weight, best[:18].reshape(3, 6), atol=1e-5)
    np.testing.assert_allclose(bias, best[18:], atol=1e-5)


def test_the_probe_learns_at_any_scale_with_the_best_regularisation():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    values = torch.randn(90, 5, generator=generator)
    values[:, :3] += 3 * F.one_hot(labels, 3)
    values = values * torch.tensor([1e-3, 1.0, 1e3, 1.0, 0.0]) + 5
    found = linear_probe.fit_linear_probe(values, labels, 3)
    logits = F.linear(values.double(), found.weight.double(), found.bias.double())
    assert top_errors(logits, labels)["top1_error"] < 10
    assert found.held_out == 18
    best = min(found.tried, key=lambda row: (row["top1_error"], row["loss"]))
    assert found.weight_decay == best["weight_decay"]
    with pytest.raises(UserError, match="at least two images per class"):
        linear_probe.fit_linear_probe(values[:3], labels[:3], 3)


def test_nearest_neighbours_vote_with_dinos_weights():
    random = np.random.RandomState(1)
    known, labels, images = random.randn(30, 4), random.randint(0, 6, 30), random.randn(9, 4)
    expected = np.zeros((9, 7))
    for place, image in enumerate(images):
        cosine = known @ image / np.linalg.norm(known, axis=1) / np.linalg.norm(image)
        for other in np.argsort(-cosine)[:5]:
            expected[place, labels[other]] += np.exp(cosine[other] / 0.07)
    found = neighbour_scores(*map(torch.from_numpy, (known, labels, images)), k=5, num_classes=7)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    # No neighbour has class 6, so it is never among the top 5.
    errors = top_errors(found.log(), torch.full((9,), 6))
    assert errors == {"images": 9, "top1_error": 100.0, "top5_error": 100.0}


@pytest.mark.long
def test_the_saved_probe_is_a_classifier_with_the_same_errors(weights, tree, tmp_path, capsys):
    output = tmp_path / "probe"
    # Create a validation folder with rotated images of three of the four classes.
    val = tmp_path / "val"
    for name in ("blue", "nested/blue", "red"):
        (val / name).mkdir(parents=True)
        for path in (tree / name).glob("[0-3].jpg"):
            Image.open(path).rotate(90).save(val / name / path.name)
    words = ["--weights", weights, "--train", tree, "--data", val, "--output", output]
    run(probe, *words, "--neighbours", "3", *VIEW)
    results = json.loads((output / "probe.json").read_text())
    assert (results["images"], results["train_images"], results["num_classes"]) == (12, 24, 4)
    assert results["held_out_images"] == 4
    assert results["neighbours"]["images"] == 12
    assert "linear probe" in capsys.readouterr().out

    model = ["--weights", output / "model_final.pth", "--workers", "0", "--batch-size", "5"]
    run(evaluate, *model, "--output", tmp_path / "eval.json")
    evaluated = json.loads((tmp_path / "eval.json").read_text())
    for key in ("images", "top1_error", "top5_error", "num_classes"):
        assert evaluated[key] == results[key]
    words = ["--weights", output / "model_final.pth", "--output", tmp_path / "predictions"]
    run(predict, *words, "--input", val / "red", "--quiet")
    found = json.loads((tmp_path / "predictions" / "predictions.json").read_text())
    names = {row["class"] for row in found[0]["top"]}
    assert names == {"blue", "green", "nested/blue", "red"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "se_resnet18"], "no weights"),
        (["--config-file", "configs/faster_rcnn_se_r50.yaml"], "senet convert"),
        (["--model", "se_resnet18", "--weights", "{plain}"], "no weights for 32 .*SE layers"),
    ],
)
@pytest.mark.long
def test_a_backbone_without_weights_is_rejected(words, message, tree, tmp_path):
    save_weights(create_classifier("resnet18", 4), tmp_path / "plain.pth")
    words = [word.format(plain=tmp_path / "plain.pth") for word in words]
    with pytest.raises(UserError, match=message):
        run(features, *words, "--data", tree, "--output", tmp_path / "f.npz", *VIEW)
    with pytest.raises(UserError, match=r"\.npz or \.safetensors"):
        run(features, *words, "--data", tree, "--output", tmp_path / "f.csv")


@pytest.mark.long
def test_a_training_run_is_not_replaced_by_a_probe(weights, tree, tmp_path):
    (tmp_path / "config.yaml").write_text("")
    words = ["--weights", weights, "--train", tree, "--data", tree, "--output", tmp_path]
    with pytest.raises(UserError, match="contains a training run"):
        run(probe, *words)
