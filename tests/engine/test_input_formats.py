"""Tests for detectors of grayscale images, and for the validation of config values."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from senet_transfer import UserError, create_backbone, load_weights, save_weights
from senet_transfer.config.load import load_config
from senet_transfer.engine.inference.augmentation import with_augmentation
from senet_transfer.engine.model_from import find_model
from senet_transfer.engine.predictor.files import predict_files
from senet_transfer.engine.predictor.load import load_trained
from senet_transfer.engine.predictor.predictor import DetectorPredictor
from senet_transfer.engine.setup import setup
from senet_transfer.engine.train import main
from senet_transfer.export.write import export_model

SHORT = {"SOLVER.MAX_ITER": "1", "SOLVER.STEPS": "()", "INPUT.FORMAT": "L"}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.long
def test_a_detector_of_grey_images_trains_predicts_and_is_exported(
    channels, command, shapes, tmp_path
):
    keys = {**SHORT, "DATASETS.TEST": "()"}
    if channels == 1:
        keys |= {"MODEL.PIXEL_MEAN": "[110.0]", "MODEL.PIXEL_STD": "[57.0]"}
    main(command("--quiet", **keys))
    weights = str(tmp_path / "run" / "model_final.pth")
    loaded = load_trained(weights)
    pixels = loaded.model.backbone.bottom_up.preprocessing
    assert (pixels.format, len(pixels.mean)) == ("L", channels)
    assert loaded.model.backbone.bottom_up.stem.conv1.weight.shape[1] == channels

    photo = next((shapes / "val").glob("*.jpg"))
    grey = tmp_path / "grey.png"
    Image.open(photo).convert("L").save(grey)
    path = predict_files(
        DetectorPredictor.of(loaded, threshold=0), [str(grey)], str(tmp_path / "out")
    )
    found = json.loads(Path(path).read_text())["annotations"]
    # Compute the expected detections by passing the pixels directly to Detectron2's model.
    image = cv2.imread(str(grey), cv2.IMREAD_GRAYSCALE)[:, :, None]
    side = loaded.cfg.INPUT.MIN_SIZE_TEST
    scale = side / min(image.shape[:2])
    assert max(image.shape[:2]) * scale <= loaded.cfg.INPUT.MAX_SIZE_TEST
    size = [round(scale * length) for length in image.shape[1::-1]]
    resized = np.asarray(Image.fromarray(image[:, :, 0]).resize(size, Image.Resampling.BILINEAR))
    inputs = {
        "image": torch.tensor(resized)[None],
        "height": image.shape[0],
        "width": image.shape[1],
    }
    with torch.no_grad():
        (expected,) = loaded.model([inputs])
    assert len(found) == len(expected["instances"]) > 0
    np.testing.assert_allclose(
        [note["score"] for note in found], expected["instances"].scores, rtol=1e-4
    )
    said = export_model(
        find_model(weights=weights).build("cpu").model,
        loaded.cfg,
        str(tmp_path / "detector.ts"),
        image=str(grey),
    )
    assert "detect the same" in said
    # A new run that starts from the checkpoint uses its image format.
    cfg = setup(command(**{"MODEL.WEIGHTS": weights, "OUTPUT_DIR": str(tmp_path / "other")}))
    assert (cfg.INPUT.FORMAT, len(cfg.MODEL.PIXEL_MEAN)) == ("L", channels)


@pytest.mark.long
def test_grey_images_start_from_weights_for_colours(command, tmp_path):
    """Compare a grayscale and a BGR model that load the same weights, on a grayscale image."""
    main(command("--quiet", **{**SHORT, "INPUT.FORMAT": "BGR", "DATASETS.TEST": "()"}))
    weights = str(tmp_path / "run" / "model_final.pth")
    colours, grey = (
        find_model(config_file=str(tmp_path / "run" / "config.yaml"), weights=weights,
                   options=["INPUT.FORMAT", form]).build("cpu")
        for form in ("BGR", "L")
    )  # fmt: skip
    assert (colours.cfg.INPUT.FORMAT, grey.cfg.INPUT.FORMAT) == ("BGR", "L")
    image = torch.randint(0, 256, (1, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        one = grey.model([{"image": image}])[0]["instances"]
        other = colours.model([{"image": image.expand(3, -1, -1)}])[0]["instances"]
    assert torch.equal(one.scores, other.scores)
    assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)


@pytest.mark.long
def test_a_backbone_of_one_channel_is_saved_and_created_again(tmp_path):
    backbone = create_backbone("se_resnet18", in_channels=1)
    assert backbone.preprocessing.format == "L"
    save_weights(backbone, tmp_path / "grey.pth")
    again = create_backbone("se_resnet18", weights=tmp_path / "grey.pth")
    image = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(again.eval()(image)["res5"], backbone.eval()(image)["res5"])
    assert again.preprocessing == backbone.preprocessing
    with pytest.raises(UserError, match="does not fit"):
        load_weights(create_backbone("se_resnet18"), tmp_path / "grey.pth")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"INPUT.FORMAT": "YUV-BT.601"}, "INPUT.FORMAT is 'YUV-BT.601'; expected one of: BGR, RGB"),
        ({"INPUT.FORMAT": "LA"}, "INPUT.FORMAT is 'LA'"),
        (
            {"MODEL.PIXEL_MEAN": "[1.0]"},
            "has 1 value and MODEL.PIXEL_STD has 3; expected 3",
        ),
        ({"MODEL.PIXEL_STD": "[1.0, 0.0, 1.0]"}, "non-zero standard deviations"),
        ({"INPUT.FORMAT": "L", "MODEL.PIXEL_MEAN": "[1.0, 2.0]"}, "expected 1 value each, or 3"),
        ({"INPUT.VALUE_RANGE": "[5]"}, r"VALUE_RANGE is \[5\]; expected \[low, high\]"),
        ({"INPUT.VALUE_RANGE": "[4095, 0]"}, "expected the lower value first"),
        ({"INPUT.EXIF": "no"}, "INPUT.EXIF is 'no'; expected one of: auto, apply, ignore"),
        ({"DATALOADER.CHECK_IMAGES": "none"}, "CHECK_IMAGES is 'none'; expected one of: header, d"),
        (
            {"MODEL.ANCHOR_GENERATOR.SIZES": "[[[32]], [[64]], [[128]], [[256]], [[512]]]"},
            r"SIZES is .*or one list per feature map, such as \[\[32\], \[64\]",
        ),
        (
            {"MODEL.ANCHOR_GENERATOR.SIZES": "[[32], 64]"},
            "SIZES .*expected a list of positive numbers",
        ),
        (
            {"MODEL.ANCHOR_GENERATOR.SIZES": "[[32], []]"},
            "SIZES .*expected a list of positive numbers",
        ),
        (
            {"MODEL.ANCHOR_GENERATOR.SIZES": "[[32], [64]]"},
            "SIZES contains 2 inner lists, but .* 5",
        ),
        ({"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": "[[[0.5, 1.0]]]"}, "ASPECT_RATIOS is"),
        ({"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": "[[-1.0]]"}, "ASPECT_RATIOS is"),
        ({"DATASETS.TRAIN": "('own')"}, r"TRAIN is the string 'own'.*\"\('own',\)\""),
        ({"DATASETS.TRAIN": "own"}, r"TRAIN is the string 'own'.*\"\['own'\]\""),
    ],
)
def test_an_unusable_key_is_an_error_at_start(keys, message, command):
    with pytest.raises(UserError, match=message):
        setup(command(**keys))


@pytest.mark.parametrize("text", ["('mine')", '"mine"', "mine"])
def test_a_name_without_a_comma_in_a_config_file_is_explained(text, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"DATASETS:\n  TRAIN: {text}\n")
    with pytest.raises(UserError, match=rf"In {path}: DATASETS.TRAIN is the string 'mine'"):
        load_config(str(path))
    path.write_text("DATASETS:\n  TRAIN: ('mine',)\n")
    assert load_config(str(path)).DATASETS.TRAIN == ("mine",)


@pytest.mark.parametrize(
    ("side", "sizes", "expected"),
    [
        (800, None, (400, 500, 600, 700, 800, 900, 1000, 1100, 1200)),
        (400, None, (200, 250, 300, 350, 400, 450, 500, 550, 600)),
        (0, None, (400, 500, 600, 700, 800, 900, 1000, 1100, 1200)),
        (400, (96, 128), (96, 128)),
    ],
)
def test_test_time_augmentation_follows_the_test_size(side, sizes, expected, monkeypatch):
    monkeypatch.setattr(
        "senet_transfer.engine.inference.augmentation.GeneralizedRCNNWithTTA",
        lambda cfg, model: tuple(cfg.TEST.AUG.MIN_SIZES),
    )
    cfg = load_config("", ["INPUT.MIN_SIZE_TEST", str(side)])
    if sizes:
        cfg.TEST.AUG.MIN_SIZES = sizes
    assert with_augmentation(cfg, None) == expected


@pytest.mark.parametrize("name", ["../../escaped", "a/b", "..", "a b"])
@pytest.mark.long
def test_results_of_a_data_set_stay_in_the_output_folder(name, command, shapes, tmp_path):
    own = (name, f"{shapes}/annotations/instances_tiny.json", f"{shapes}/tiny")
    run = command(**{**SHORT, "DATASETS.TRAIN": f"('{name}',)", "DATASETS.TEST": f"('{name}',)"})
    before = set(tmp_path.parent.iterdir())
    main(replace(run, datasets=[own], quiet=True))
    assert set(tmp_path.parent.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (folder,) = (tmp_path / "run" / "inference").iterdir()
    assert (folder / "coco_instances_results.json").is_file()


@pytest.mark.long
def test_weights_of_another_head_are_an_error_with_a_remedy(command, tmp_path):
    main(command("--quiet", **{**SHORT, "INPUT.FORMAT": "BGR", "DATASETS.TEST": "()"}))
    weights = str(tmp_path / "run" / "model_final.pth")
    run = command(config="configs/retinanet_se_r50.yaml", **{
        **SHORT, "INPUT.FORMAT": "BGR", "DATASETS.TEST": "()", "MODEL.WEIGHTS": weights,
        "OUTPUT_DIR": str(tmp_path / "other"),
    })  # fmt: skip
    with pytest.raises(UserError, match=r"senet convert .*model_final.pth .* --backbone"):
        main(run)
