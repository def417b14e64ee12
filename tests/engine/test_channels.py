"""Tests for training on images with five channels, starting from weights of an RGB model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from senet_transfer import UserError, create_backbone, create_classifier, load_weights, save_weights
from senet_transfer.cli import evaluate, predict
from senet_transfer.cli.arguments import argument_parser
from senet_transfer.cli.train import run_options
from senet_transfer.data.images.decode import Reading
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.engine.model_from import find_model
from senet_transfer.engine.predictor.cam import class_activation_map
from senet_transfer.engine.predictor.files import predict_files
from senet_transfer.engine.predictor.load import load, load_trained
from senet_transfer.engine.predictor.predictor import DetectorPredictor
from senet_transfer.engine.setup import setup
from senet_transfer.engine.train import main
from senet_transfer.export.write import export_model
from senet_transfer.preprocessing import Preprocessing

FIVE = {
    "INPUT.CHANNELS": "5",
    "MODEL.PIXEL_MEAN": "[110.0, 111.0, 112.0, 113.0, 114.0]",
    "MODEL.PIXEL_STD": "[51.0, 52.0, 53.0, 54.0, 55.0]",
}
SHORT = {"SOLVER.MAX_ITER": "1", "SOLVER.STEPS": "()"}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Run every test in this file with one torch thread."""


def five_channels(image: Image.Image) -> np.ndarray:
    """Return a uint16 image with five channels and values up to 4095, computed from RGB."""
    pixels = np.asarray(image.convert("RGB")).astype(np.uint16) * 16
    return np.dstack([pixels, pixels[..., 0], 4095 - pixels[..., 1]])


@pytest.mark.parametrize("form", ["RGB", "BGR"])
@pytest.mark.long
def test_the_first_convolution_is_adapted_as_by_timm(form, tmp_path):
    from timm.models import adapt_input_conv

    colours = create_backbone("cifar_resnet8")
    colours.preprocessing = replace(colours.preprocessing, format=form)
    save_weights(colours, tmp_path / "colours.pth")
    # Images keep the channel order of their files, so red is the first channel.
    rgb = colours.stem.conv1.weight.detach()
    rgb = rgb if form == "RGB" else rgb.flip(1)
    for channels in (1, 2, 3, 5, 16):
        model = create_backbone("cifar_resnet8", in_channels=channels)
        model.preprocessing = Preprocessing().with_channels(channels)
        report = load_weights(model, tmp_path / "colours.pth")
        torch.testing.assert_close(model.stem.conv1.weight, adapt_input_conv(channels, rgb.clone()))
        assert f"stem.conv1.weight was adapted to {channels} channels" in str(report)
        assert model.preprocessing.format == f"C{channels}"
        save_weights(model, tmp_path / "own.pth")
        again = create_backbone("cifar_resnet8", weights=tmp_path / "own.pth")
        assert torch.equal(again.stem.conv1.weight, model.stem.conv1.weight)
        assert again.preprocessing == model.preprocessing
    five = create_backbone("cifar_resnet8", weights=tmp_path / "colours.pth", in_channels=5)
    torch.testing.assert_close(five.stem.conv1.weight, adapt_input_conv(5, rgb.clone()))


@pytest.fixture
def classify(tmp_path):
    """Write five-channel images. Return a function that trains on them, and the image folder."""
    random = np.random.RandomState(0)
    for name in ("dark", "light"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(4):
            small = random.randint(0, 100, (5, 6, 3)) + (100 if name == "light" else 0)
            image = Image.fromarray(small.astype(np.uint8)).resize((48, 40))
            np.save(tmp_path / "data" / name / f"{index}.npy", five_channels(image))

    def run(*flags: str, **overrides: str) -> None:
        data = f"('{tmp_path / 'data'}',)"
        keys = {"MODEL.DEVICE": "cpu", "MODEL.BACKBONE.ARCH": "resnet18", "DATASETS.TRAIN": data,
                "DATASETS.TEST": data, "DATALOADER.NUM_WORKERS": "0", "SOLVER.IMS_PER_BATCH": "4",
                "INPUT.CLASSIFICATION.CROP": "64", "INPUT.CLASSIFICATION.TEST_RESIZE": "72",
                "INPUT.CLASSIFICATION.TEST_CROP": "64", "INPUT.VALUE_RANGE": "[0, 4095]",
                "SOLVER.CHECKPOINT_PERIOD": "10", "OUTPUT_DIR": str(tmp_path / "run"), "SEED": "1",
                **FIVE, **SHORT, **overrides}  # fmt: skip
        words = ["--config-file", "configs/base/classification.yaml", "--quiet", *flags]
        words += [word for item in keys.items() for word in item]
        main(run_options(argument_parser().parse_args(words)))

    return run, tmp_path / "data"


@pytest.mark.long
def test_a_classifier_is_trained_evaluated_exported_and_predicts(classify, tmp_path):
    run, data = classify
    save_weights(create_classifier("resnet18", 3), tmp_path / "colours.pth")
    run(**{"MODEL.WEIGHTS": str(tmp_path / "colours.pth")})
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "stem.conv1.weight was adapted to 5 channels" in log
    weights = str(tmp_path / "run" / "model_final.pth")
    trained = json.loads((tmp_path / "run" / "results.json").read_text())["classification"]
    words = ["--weights", weights, "--workers", "0"]
    found = evaluate.main(evaluate.parser().parse_args(words))
    assert {key: found[key] for key in trained} == trained

    loaded = load_trained(weights)
    assert loaded.preprocessing.format == "C5"
    paths = sorted((data / "dark").iterdir())
    view = EvalTransform(resize=72, crop=64, reading=Reading((0, 4095), channels=5))
    pixels = torch.stack([view(path.read_bytes()) for path in paths]).float()
    mean, std = (torch.arange(first, first + 5.0).view(-1, 1, 1) for first in (110, 51))
    with torch.no_grad():
        expected = loaded.model((pixels - mean) / std).softmax(1)
    words = ["--weights", weights, "--input", str(data / "dark"), "--output", str(tmp_path / "out")]
    predict.main(predict.parser().parse_args([*words, "--quiet"]))
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    for row, probabilities in zip(rows, expected, strict=True):
        for entry in row["top"]:
            assert entry["probability"] == pytest.approx(float(probabilities[entry["label"]]), 1e-4)

    export_model(loaded.model, loaded.cfg, str(tmp_path / "five.ts"))
    values = [np.load(path) for path in paths]
    for predictor in (load(weights), load(tmp_path / "five.ts")):
        found = np.stack([result.probabilities for result in predictor(values)])
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    shown = class_activation_map(load(weights), str(paths[0])).view
    assert np.array_equal(shown, pixels[0, :3].permute(1, 2, 0))
    # The checkpoint can be loaded without a config. A config with other channels is rejected.
    named = find_model(weights=weights, options=["INPUT.VALUE_RANGE", "[0, 4095]"])
    assert named.cfg.INPUT.CHANNELS == 5
    with pytest.raises(UserError, match="INPUT.CHANNELS: 4, but 5 in the file"):
        run(**{"MODEL.WEIGHTS": weights, "INPUT.CHANNELS": "4", "OUTPUT_DIR": str(tmp_path / "x"),
               "MODEL.PIXEL_MEAN": "[1.0, 1.0, 1.0, 1.0]",
               "MODEL.PIXEL_STD": "[1.0, 1.0, 1.0, 1.0]"})  # fmt: skip


@pytest.mark.long
def test_a_detector_is_trained_evaluated_exported_and_predicts(command, shapes, tmp_path):
    annotations = json.loads((shapes / "annotations" / "instances_tiny.json").read_text())
    (tmp_path / "images").mkdir()
    for image in annotations["images"]:
        path = tmp_path / "images" / Path(image["file_name"]).with_suffix(".npy")
        np.save(path, five_channels(Image.open(shapes / "tiny" / image["file_name"])))
        image["file_name"] = path.name
    (tmp_path / "five.json").write_text(json.dumps(annotations))
    register = f"[['five', '{tmp_path / 'five.json'}', '{tmp_path / 'images'}']]"
    keys = {"DATASETS.REGISTER": register, "DATASETS.TRAIN": "('five',)",
            "DATASETS.TEST": "('five',)", "INPUT.VALUE_RANGE": "[0, 4095]", **FIVE,
            **SHORT}  # fmt: skip
    main(command("--quiet", **keys))
    weights = str(tmp_path / "run" / "model_final.pth")
    loaded = load_trained(weights)
    assert loaded.model.backbone.bottom_up.stem.conv1.weight.shape[1] == 5

    path = sorted((tmp_path / "images").iterdir())[0]
    detector = DetectorPredictor.of(loaded, threshold=0.0)
    written = predict_files(detector, [str(path)], str(tmp_path / "out"), quiet=True)
    found = json.loads(Path(written).read_text())["annotations"]
    pixels = np.rint(np.load(path) / 4095 * 255).astype(np.uint8)
    size = [round(length * 64 / min(pixels.shape[:2])) for length in pixels.shape[1::-1]]
    bands = [Image.fromarray(pixels[..., band]).resize(size, 2) for band in range(5)]
    inputs = {"image": torch.tensor(np.stack([np.asarray(band) for band in bands]))}
    with torch.no_grad():
        height, width = pixels.shape[:2]
        (expected,) = loaded.model([{**inputs, "height": height, "width": width}])
    assert len(found) == len(expected["instances"]) > 0
    scores = [note["score"] for note in found]
    np.testing.assert_allclose(scores, expected["instances"].scores, rtol=1e-4)
    assert (tmp_path / "out" / f"{path.stem}.jpg").is_file()
    said = export_model(loaded.model, loaded.cfg, str(tmp_path / "five.ts"), image=str(path))
    assert "detect the same" in said


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"INPUT.CHANNELS": "17"}, "INPUT.CHANNELS is 17; expected an integer from 1 to 16"),
        ({"INPUT.CHANNELS": "4"}, "has 3 values and MODEL.PIXEL_STD has 3; expected 4 values"),
        ({**FIVE, "TEST.AUG.ENABLED": "True"}, "TEST.AUG.ENABLED is True, which is not supported"),
        ({"INPUT.FORMAT": "C5"}, "set INPUT.CHANNELS instead"),
        (FIVE, r"(?s)8 of the 8 images.*\(\d+, \d+, 3\); expected \(height, width, 5\)"),
    ],
)
def test_a_key_or_image_that_does_not_fit_is_an_error_at_the_start(keys, message, command):
    with pytest.raises(UserError, match=message):
        setup(command(**keys))
