"""Tests that compare ONNX detectors with eager detectors, and tests for tools/detect_onnx.py."""

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from pycocotools import mask as mask_util

from senet_transfer import UserError
from senet_transfer.cli import export, train
from senet_transfer.config.load import load_config
from senet_transfer.engine.model_from import LoadedModel
from senet_transfer.engine.predictor.files import predict_files
from senet_transfer.engine.predictor.load import load_trained
from senet_transfer.engine.predictor.predictor import DetectorPredictor
from senet_transfer.export import deploy, onnx_detectors
from senet_transfer.export.write import export_model

onnxruntime = pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs" / "demo_faster_rcnn_se_r18.yaml")
CLASSES = ["circle", "square", "triangle", "star", "cross"]


def untrained(*options: str) -> LoadedModel:
    """Return a detector with random weights. All its detections have scores of about 1/6."""
    cfg = load_config(DEMO, ["MODEL.DEVICE", "cpu", "DATASETS.CLASSES", str(CLASSES), *options])
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(CLASSES)
    torch.manual_seed(0)
    return LoadedModel(build_model(cfg).eval(), cfg)


def detect_without_torch(*words: str | Path) -> str:
    """Run tools/detect_onnx.py in a process that can't import torch or this package."""
    argv = [str(ROOT / "tools" / "detect_onnx.py"), *map(str, words)]
    code = (
        "import sys, runpy; sys.modules['torch'] = sys.modules['senet_transfer'] = None; "
        f"sys.argv = {argv}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_detections(
    loaded: LoadedModel, model: Path, images: list[str], folder: Path, threshold: float
) -> int:
    """Compare detections of detect_onnx.py and ``senet predict``; return the number of detections.

    Both tools report pixel coordinates in the original images.
    """
    output = folder / "detections.json"
    detect_without_torch(model, *images, "--output", output, "--threshold", threshold)
    found = json.loads(output.read_text())
    predictor = DetectorPredictor.of(loaded, threshold=threshold)
    predicted = predict_files(predictor, images, str(folder), draw=False, quiet=True)
    expected = json.loads(Path(predicted).read_text())["annotations"]
    assert len(found) == len(expected)
    for image_id, path in enumerate(images, start=1):
        pair = [
            sorted(
                (each for each in objects if each["image_id"] == image_id),
                key=lambda each: -each["score"],
            )
            for objects in (found, expected)
        ]
        for one, other in zip(*pair, strict=True):
            assert one["file_name"] == path
            assert one["category_id"] == other["category_id"]
            assert one["bbox"] == pytest.approx(other["bbox"], abs=0.1)
            assert one["score"] == pytest.approx(other["score"], abs=1e-3)
            if "segmentation" in other:
                masks = [mask_util.decode(each["segmentation"]) for each in (one, other)]
                # A mask pixel may differ if its probability is nearly 0.5.
                assert (masks[0] != masks[1]).sum() <= 1e-3 * masks[1].sum() + 1
    return len(found)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[LoadedModel, Path, list[str]]:
    """Return an untrained Mask R-CNN, its ONNX file and the paths of two images."""
    narrow = ["MODEL.ROI_MASK_HEAD.CONV_DIM", "8", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1"]
    loaded = untrained("MODEL.MASK_ON", "True", "INPUT.FORMAT", "BGR", *narrow)
    folder, draw = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    images = []
    for name, shape in (("a", (9, 13, 3)), ("b", (14, 7, 3))):
        coarse = Image.fromarray(draw.integers(0, 255, shape, dtype=np.uint8))
        images.append(str(folder / f"{name}.png"))
        coarse.resize((shape[1] * 20, shape[0] * 20), Image.Resampling.BICUBIC).save(images[-1])
    model = folder / "model.onnx"
    said = export_model(loaded.model, loaded.cfg, str(model), image=images[0])
    assert "both detect the same 200 objects with scores above 0.05." in said
    return loaded, model, images


@pytest.mark.long
def test_a_small_mask_rcnn_detects_the_same_in_onnx_runtime_without_torch(small, tmp_path):
    loaded, model, images = small
    assert check_detections(loaded, model, images, tmp_path, 0.0) == 200

    stored = model.read_bytes()
    assert str(ROOT).encode() not in stored
    assert b"site-packages" not in stored
    session = onnxruntime.InferenceSession(stored)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == CLASSES
    assert [tuple(each.shape) for each in session.get_inputs()] == [(3, "height", "width")]
    shapes = {each.name: each.shape[1:] for each in session.get_outputs()}
    assert shapes == {"boxes": [4], "scores": [], "classes": [], "masks": [28, 28]}


@pytest.mark.long
def test_a_file_with_different_detections_is_rejected(small, tmp_path, monkeypatch):
    loaded, _, images = small

    def wrong(network: torch.nn.Module) -> torch.nn.Module:
        network = deploy(network)
        network.roi_heads.box_predictor.bbox_pred.bias.data += 0.5
        return network

    monkeypatch.setattr(onnx_detectors, "deploy", wrong)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"earlier")
    with pytest.raises(UserError, match="They differ from the 100 objects detected by the model"):
        export_model(loaded.model, loaded.cfg, str(path), image=images[0])
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.long
def test_openvino_detects_the_same(small):
    openvino = pytest.importorskip("openvino", reason="OpenVINO is missing (pip install openvino)")
    _, model, images = small
    pixels = np.asarray(Image.open(images[1]), np.float32).transpose(2, 0, 1).copy()
    session = onnxruntime.InferenceSession(str(model))
    names = [each.name for each in session.get_outputs()]
    # On CPUs with bfloat16 support, OpenVINO uses bfloat16 by default.
    compiled = openvino.Core().compile_model(str(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled({"image": pixels})
    for name, expected in zip(names, session.run(names, {"image": pixels}), strict=True):
        assert len(expected) == 100
        np.testing.assert_allclose(found[name], expected, atol=0.1 if name == "boxes" else 1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["MODEL.KEYPOINT_ON", "True"], "predicts keypoints"),
        (["MODEL.META_ARCHITECTURE", "ProposalNetwork"], "predicts only proposals"),
        (["MODEL.ROI_HEADS.NAME", "RROIHeads"], "predicts rotated boxes"),
        (["MODEL.META_ARCHITECTURE", "PanopticFPN"], "export of segmentation models"),
        (["INPUT.FORMAT", "YUV-BT.601"], "INPUT.FORMAT is YUV-BT.601; expected RGB, BGR or L"),
    ],
)
def test_detectors_that_onnx_does_not_support_are_rejected(options, words, tmp_path):
    cfg = load_config(DEMO, ["MODEL.DEVICE", "cpu", *options])
    with pytest.raises(UserError, match=words):
        export_model(torch.nn.Identity(), cfg, str(tmp_path / "model.onnx"))


# Detectron2 options that change the demo's Faster R-CNN with FPN into other detectors.
LEVELS = [
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [32], [64], [128]]"),
    *("MODEL.RPN.IN_FEATURES", "['p2', 'p3', 'p4', 'p5']"),
    *("MODEL.ROI_HEADS.IN_FEATURES", "['p2', 'p3', 'p4']"),
]
KINDS = {
    "faster_rcnn_fpn": LEVELS,
    "mask_rcnn": [
        *LEVELS,
        *("MODEL.MASK_ON", "True"),
        *("MODEL.ROI_MASK_HEAD.CONV_DIM", "32", "MODEL.ROI_MASK_HEAD.NUM_CONV", "2"),
    ],
    "cascade_rcnn": [*LEVELS, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads"],
    "faster_rcnn_c4": [
        *("MODEL.BACKBONE.NAME", "build_senet_backbone"),
        *("MODEL.RESNETS.OUT_FEATURES", "['res4']", "MODEL.RPN.IN_FEATURES", "['res4']"),
        *("MODEL.ROI_HEADS.NAME", "SENetRes5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']"),
        *("MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 32, 64, 128]]"),
    ],
    "retinanet": [
        *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NORM", "BN"),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"),
        *("MODEL.BACKBONE.NAME", "build_retinanet_senet_fpn_backbone"),
        *("MODEL.RESNETS.OUT_FEATURES", "['res3', 'res4', 'res5']"),
        *("MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']"),
        *(
            "MODEL.ANCHOR_GENERATOR.SIZES",
            "[[16, 20, 25], [32, 40, 50], [64, 80, 101], [128, 161, 203], [256, 322, 406]]",
        ),
    ],
}


@pytest.fixture(scope="module")
def eight_images(shared_data, tmp_path_factory) -> tuple[str, list[str]]:
    """Return an annotation file and the paths of eight images with 3 to 8 large objects each."""
    folder = shared_data / "coco128"
    coco = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    objects = Counter(each["image_id"] for each in coco["annotations"])
    large = Counter(
        each["image_id"]
        for each in coco["annotations"]
        if each["area"] > 48**2 and not each["iscrowd"]
    )
    images = [
        each
        for each in coco["images"]
        if 3 <= objects[each["id"]] <= 8 and objects[each["id"]] == large[each["id"]]
    ][:8]
    ids = {each["id"] for each in images}
    annotations = [each for each in coco["annotations"] if each["image_id"] in ids]
    used = {each["category_id"] for each in annotations}
    categories = [each for each in coco["categories"] if each["id"] in used]
    json_file = tmp_path_factory.mktemp("eight") / "eight.json"
    json_file.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return str(json_file), [str(folder / "train2017" / each["file_name"]) for each in images]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_an_overfitted_detector_detects_the_same_in_onnx_runtime(
    kind, eight_images, shared_data, tmp_path, capsys
):
    json_file, images = eight_images
    run = tmp_path / "run"
    train.command(
        ["--config-file", DEMO, "--quiet"]
        + ["--dataset", "eight", json_file, str(shared_data / "coco128" / "train2017")]
        + ["DATASETS.TRAIN", "('eight',)", "DATASETS.TEST", "('eight',)", *KINDS[kind]]
        + ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "240", "SOLVER.BASE_LR", "0.002"]
        + ["SOLVER.WEIGHT_DECAY", "0.0", "SOLVER.REFERENCE_LR_PER_IMAGE", "0.0"]
        + ["INPUT.MIN_SIZE_TRAIN", "(128,)", "INPUT.MAX_SIZE_TRAIN", "192"]
        + ["INPUT.MIN_SIZE_TEST", "128", "INPUT.MAX_SIZE_TEST", "192"]
        + ["INPUT.RANDOM_FLIP", "none", "DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(run)]
    )
    weights, model = str(run / "model_final.pth"), run / "model.onnx"
    capsys.readouterr()
    export.command(["--weights", weights, "--output", str(model)])
    assert "both detect the same" in capsys.readouterr().out
    check_run(weights, model, images, tmp_path)


def check_run(weights: str, model: Path, images: list[str], folder: Path) -> None:
    """Compare a detector with its ONNX file on images with and without objects."""
    loaded = load_trained(weights)
    assert loaded.cfg.INPUT.FORMAT == "RGB"
    assert check_detections(loaded, model, images, folder, 0.5) >= 20

    # Compare ONNX Runtime with the eager model at more image sizes.
    session = onnxruntime.InferenceSession(str(model))
    above = 0
    for path, short in itertools.product(images, (120, 124, 132, 136)):
        photo = Image.open(path).convert("RGB")
        scale = short / min(photo.size)
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)))
        rgb = np.asarray(photo).transpose(2, 0, 1)
        expected = loaded.model([{"image": torch.from_numpy(rgb.copy())}])[0]["instances"]
        boxes, scores = session.run(["boxes", "scores"], {"image": rgb.astype(np.float32)})
        assert len(boxes) == len(expected)
        difference = np.abs(boxes - expected.pred_boxes.tensor.detach().numpy())
        assert difference.max(initial=0) <= 0.1
        above += int((scores > 0.5).sum())
    assert above >= 20
    # With a high score threshold, nothing is detected in single-colour images.
    strict = folder / "strict.onnx"
    limits = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "MODEL.RETINANET.SCORE_THRESH_TEST"]
    options = [word for key in limits for word in (key, "0.9999")]
    export.command(["--weights", weights, "--output", str(strict), *options])
    session = onnxruntime.InferenceSession(str(strict))
    for colour in (0, 128, 255):
        pixels = np.full((3, 100, 140), colour, np.float32)
        assert session.run(["boxes"], {"image": pixels})[0].shape == (0, 4)
