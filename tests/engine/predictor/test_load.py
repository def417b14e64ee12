"""Tests for the predictors that ``senet_transfer.load`` returns for each kind of model."""

import hashlib
import pickle
import shutil
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultPredictor
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset
from detectron2.modeling import build_model
from PIL import ExifTags, Image, ImageOps
from pycocotools import mask as mask_util

import senet_transfer
from senet_transfer import UserError
from senet_transfer.cli.predict import main, parser
from senet_transfer.config.load import load_config
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.detection.mapper import CheckedDatasetMapper
from senet_transfer.data.images.places365 import places365_classes
from senet_transfer.engine.model_from import find_model
from senet_transfer.engine.predictor.cam import class_activation_map
from senet_transfer.engine.predictor.predictions import Detections
from senet_transfer.evaluation.classification import evaluate_classifier
from senet_transfer.export.write import export_model
from senet_transfer.weights.hub.catalogue import load_catalogue
from tests.weights.web import serving

pytestmark = pytest.mark.long


def evaluated_objects(folder: Path, path: Path):
    """Return a detector's instances for an image that is preprocessed as in an evaluation."""
    loaded = find_model(weights=str(folder / "model_final.pth")).build("cpu")
    record = CheckedDatasetMapper(loaded.cfg, is_train=False)({"file_name": str(path)})
    record["width"], record["height"] = Image.open(path).size
    with torch.no_grad():
        return loaded.model([record])[0]["instances"]


def test_objects_are_bitwise_equal_to_the_evaluations(detector, photos):
    predictor = senet_transfer.load(detector, threshold=0)
    for path in sorted(photos.glob("*.jpg")):
        found, expected = predictor(path), evaluated_objects(detector, path)
        assert len(found) == len(expected) == 4
        np.testing.assert_array_equal(found.boxes, expected.pred_boxes.tensor)
        np.testing.assert_array_equal(found.scores, expected.scores)
        np.testing.assert_array_equal(found.labels, expected.pred_classes)
        np.testing.assert_array_equal(found.masks, expected.pred_masks)


@pytest.mark.parametrize("mode", ["short_side", "ten_crop"])
def test_probabilities_are_bitwise_equal_to_the_evaluations(classifier, photos, mode, tmp_path):
    data = tmp_path / "data"
    for name in ("one", "two", "three"):
        shutil.copytree(photos / "sub", data / name)
    option = ["INPUT.CLASSIFICATION.TEST_MODE", mode]
    predictor = senet_transfer.load(classifier / "model_final.pth", options=option)
    dataset = open_dataset(str(data), split="val")
    evaluation = evaluate_classifier(
        predictor.run, dataset, predictor.transform, batch_size=1, keep_logits=True, quiet=True
    )
    assert len(evaluation.predictions) == 6
    for row in evaluation.predictions:
        found = predictor(data / row["path"])
        expected = torch.tensor([row["logits"]]).softmax(1)[0]
        np.testing.assert_array_equal(found.probabilities, expected)
        assert found.labels == row["top"]
        assert found.names == [predictor.classes.things[label] for label in row["top"]]
        np.testing.assert_allclose(found.outdoor, 1 - found.probabilities[1], rtol=1e-5)


def run_folder(classifier, detector, tmp_path, monkeypatch):
    return classifier, find_model(weights=str(classifier / "model_final.pth")).build("cpu")


def checkpoint(classifier, detector, tmp_path, monkeypatch):
    _, loaded = run_folder(classifier, detector, tmp_path, monkeypatch)
    return classifier / "model_final.pth", loaded


def config(classifier, detector, tmp_path, monkeypatch):
    _, loaded = run_folder(classifier, detector, tmp_path, monkeypatch)
    cfg = load_config(str(classifier / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(classifier / "model_final.pth")
    (tmp_path / "own.yaml").write_text(cfg.dump())
    return tmp_path / "own.yaml", loaded


def published(classifier, detector, tmp_path, monkeypatch):
    """Save random weights in torchvision's download cache.

    Return the name of the weights in the catalogue, and the model that loads them.
    """
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "torchvision_v1/resnet18"
    entry = replace(load_catalogue()[name], sha256=None, file="resnet18.pth")
    monkeypatch.setitem(load_catalogue(), name, entry)
    entry.path.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), entry.path)
    loaded = find_model(weights=name).build("cpu")
    expected = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    assert loaded.classes == expected
    return name, loaded


def exported(suffix):
    def make(classifier, detector, tmp_path, monkeypatch):
        _, loaded = run_folder(classifier, detector, tmp_path, monkeypatch)
        path = tmp_path / f"exported{suffix}"
        export_model(loaded.model, loaded.cfg, str(path))
        return path, loaded

    return make


SOURCES = {
    "run": run_folder,
    "checkpoint": checkpoint,
    "config": config,
    "published": published,
    **{suffix: exported(suffix) for suffix in (".onnx", ".pt2", ".ts")},
}


@pytest.mark.parametrize(
    "kind",
    # Exports with torch.export are slow.
    [pytest.param(k, marks=pytest.mark.slow) if k in (".onnx", ".pt2") else k for k in SOURCES],
)
def test_a_model_from_any_source_classifies_like_the_model_in_python(
    kind, classifier, detector, photos, tmp_path, monkeypatch
):
    source, loaded = SOURCES[kind](classifier, detector, tmp_path, monkeypatch)
    predictor = senet_transfer.load(source)
    path = photos / "a.jpg"
    with torch.no_grad():
        view = predictor.transform(path.read_bytes())
        expected = loaded.model({"image": view[None]}).softmax(1)[0].numpy()
    found = predictor(path)
    np.testing.assert_allclose(found.probabilities, expected, rtol=1e-3 * kind.startswith("."))
    assert predictor.transform == senet_transfer.load(source).transform
    assert list(predictor.classes.things) == loaded.classes
    assert found.names == [loaded.classes[label] for label in found.labels]


SMALL_ZOO = """
_BASE_: {base}
MODEL:
  DEVICE: cpu
  MASK_ON: True
  PIXEL_STD: {std}
  RESNETS: {{STEM_OUT_CHANNELS: 32, RES2_OUT_CHANNELS: 32, WIDTH_PER_GROUP: 1, NUM_GROUPS: 32,
            STRIDE_IN_1X1: {stride}}}
  FPN: {{OUT_CHANNELS: 16}}
  RPN: {{POST_NMS_TOPK_TEST: 20}}
  ROI_BOX_HEAD: {{FC_DIM: 16}}
  ROI_MASK_HEAD: {{CONV_DIM: 16, NUM_CONV: 1}}
  ROI_HEADS: {{SCORE_THRESH_TEST: 0.0}}
INPUT: {{MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}}
"""


@pytest.mark.parametrize(("stride", "std"), [(True, [1.0, 1.0, 1.0]), (False, [57.4, 57.1, 58.4])])
def test_a_detector_of_the_model_zoo_is_downloaded_and_predicts_as_in_detectron2(
    stride, std, photos, tmp_path, monkeypatch
):
    """Compare a small detector downloaded from a local server with Detectron2's predictor."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x"
    base = Path(model_zoo.get_config_file(f"{name}.yaml")).parents[1] / "Base-RCNN-FPN.yaml"
    (tmp_path / "small.yaml").write_text(SMALL_ZOO.format(base=base, stride=stride, std=std))
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "small.yaml"))
    torch.manual_seed(1)
    model = build_model(cfg).eval()
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    # Some files in the model zoo contain these tensors, which Detectron2 ignores.
    tensors |= {"proposal_generator.anchor_generator.cell_anchors.0": np.zeros((3, 4), np.float32)}
    content = pickle.dumps({"model": tensors, "__author__": "Detectron2 Model Zoo"})
    file = "137849600/model_final_f10217.pkl"
    assert model_zoo.get_checkpoint_url(f"{name}.yaml").endswith(f"{name}/{file}")
    with serving() as site:
        url = site.add(file, content)
        monkeypatch.setattr(model_zoo, "get_checkpoint_url", lambda name: url)
        monkeypatch.setattr(model_zoo, "get_config_file", lambda name: str(tmp_path / "small.yaml"))
        predictor = senet_transfer.load(name, threshold=0)
        assert senet_transfer.load(f"{name}.yaml", threshold=0).classes == predictor.classes
        assert len(site.asked) == 1
    found, expected = predictor(photos / "a.jpg"), DefaultPredictor.__new__(DefaultPredictor)
    expected.__dict__ |= {
        "cfg": cfg,
        "model": model,
        "aug": predictor.resize,
        "input_format": "BGR",
    }
    instances = expected(cv2.imread(str(photos / "a.jpg")))["instances"]
    np.testing.assert_array_equal(found.boxes, instances.pred_boxes.tensor)
    np.testing.assert_array_equal(found.labels, instances.pred_classes)
    assert len(found) > 5
    # The 13th of COCO's 80 classes has category id 14.
    assert predictor.classes.categories[12] == {"id": 14, "name": "parking meter"}


def test_an_exported_detector_finds_the_same_objects(detector, photos, turned, tmp_path):
    options = ["INPUT.EXIF", "ignore"]
    weights = str(detector / "model_final.pth")
    loaded = find_model(weights=weights, options=options).build("cpu")
    path = str(tmp_path / "detector.onnx")
    export_model(loaded.model, loaded.cfg, path, image=str(photos / "a.jpg"))
    expected = senet_transfer.load(detector, threshold=0)(photos / "b.jpg")
    predictor = senet_transfer.load(path, threshold=0)
    found = predictor(photos / "b.jpg")
    assert len(found) == len(expected) == 4
    assert (found.names, found.classes) == (expected.names, expected.classes)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.01)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    assert (found.masks != expected.masks).mean() < 0.01
    assert_same_result(predictor(turned[0]), predictor(turned[1]))
    with pytest.raises(UserError, match="runs on the CPU with the precision"):
        senet_transfer.load(path, half=True)


@pytest.fixture
def turned(photos, tmp_path):
    """Return the paths of a JPEG file with an EXIF rotation and of two PNG copies of it.

    The rotation is applied to the pixels of the second copy, but not to those of the first.
    """
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(photos / "a.jpg").save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image = Image.open(tmp_path / "turned.jpg")
    Image.fromarray(np.asarray(image)).save(tmp_path / "stored.png")
    ImageOps.exif_transpose(image).save(tmp_path / "upright.png")
    return [tmp_path / name for name in ("turned.jpg", "stored.png", "upright.png")]


def assert_same_result(found, expected):
    if isinstance(found, Detections):
        np.testing.assert_array_equal(found.boxes, expected.boxes)
    else:
        np.testing.assert_array_equal(found.probabilities, expected.probabilities)


def test_the_orientation_of_a_photograph_is_applied_as_in_training(classifier, detector, turned):
    path, stored, upright = turned
    for folder, exif, same in (
        (classifier, "auto", stored),
        (classifier, "apply", upright),
        (detector, "auto", upright),
        (detector, "ignore", stored),
    ):
        predictor = senet_transfer.load(folder, threshold=0, options=["INPUT.EXIF", exif])
        expected = predictor(same)
        found = predictor([path, Image.open(path)])
        for result in found:
            assert_same_result(result, expected)
        assert found[0].plot().size == expected.plot().size


def test_an_exported_classifier_applies_the_orientation_if_the_model_does(
    classifier, turned, tmp_path
):
    options = ["INPUT.EXIF", "apply"]
    weights = str(classifier / "model_final.pth")
    loaded = find_model(weights=weights, options=options).build("cpu")
    export_model(loaded.model, loaded.cfg, str(tmp_path / "model.ts"))
    predictor = senet_transfer.load(tmp_path / "model.ts")
    path, _, upright = turned
    assert_same_result(predictor(path), predictor(upright))


def test_images_are_predicted_from_paths_pillow_arrays_tensors_and_lists(
    classifier, detector, photos, tmp_path
):
    path = photos / "a.jpg"
    image = Image.open(path)
    array = np.asarray(image)
    images = [path, image, array, torch.tensor(array).permute(2, 0, 1)]
    for folder in (classifier, detector):
        predictor = senet_transfer.load(folder, threshold=0)
        results = [predictor(image) for image in images]
        listed = predictor(images)
        batch = predictor(torch.stack([images[3]] * 2))
        assert len(batch) == 2
        for result in [*results, *listed, *batch]:
            if folder == classifier:
                expected, found = results[0].probabilities, result.probabilities
            else:
                expected, found = results[0].boxes, result.boxes
            np.testing.assert_array_equal(found, expected)
        names = ["a.jpg", "b.jpg", "c.jpg", "sub/a.jpg", "sub/d.jpg"]
        in_folder = predictor(photos, batch_size=2)
        assert [result.photo.relative for result in in_folder] == names
        if folder == classifier:
            np.testing.assert_allclose(
                in_folder[0].probabilities, results[0].probabilities, rtol=1e-5
            )
    for wrong in (array.astype(np.float32), array[:, :, :2], "no.jpg", 5):
        with pytest.raises(UserError, match="expected|Expected"):
            predictor(wrong)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken\.jpg can't be read as an image"):
        predictor([path, tmp_path / "broken.jpg"])


def test_results_are_converted_to_coco_and_supervision_and_drawn(classifier, detector, photos):
    import supervision

    found = senet_transfer.load(detector, threshold=0)(photos / "a.jpg")
    theirs = found.to_supervision()
    assert isinstance(theirs, supervision.Detections)
    np.testing.assert_array_equal(theirs.xyxy, found.boxes)
    np.testing.assert_array_equal(theirs.mask, found.masks)
    assert list(theirs.data["class_name"]) == found.names
    annotations = found.to_coco(7)
    assert [row["category_id"] for row in annotations] == (found.labels + 1).tolist()
    for row, box, mask in zip(annotations, found.boxes, found.masks, strict=True):
        x, y, width, height = row["bbox"]
        np.testing.assert_allclose([x, y, x + width, y + height], box, rtol=1e-5)
        np.testing.assert_array_equal(mask_util.decode(row["segmentation"]), mask)
        assert row["image_id"] == 7
    # Small images are enlarged by a factor of at most 4 when drawn.
    assert found.plot().size == (4 * 80, 4 * 60)
    assert repr(found).startswith(f"{photos}/a.jpg: {len(found)} objects: ")
    assert found._repr_html_().startswith('<img src="data:image/jpeg;base64,')
    classes = senet_transfer.load(classifier)(photos / "a.jpg")
    assert "outdoors" in repr(classes)
    np.testing.assert_array_equal(classes.to_supervision().confidence, classes.probabilities)
    plain = np.asarray(Image.open(photos / "a.jpg").resize((320, 240)))
    assert (np.asarray(classes.plot()) != plain).any()


def test_the_documented_example_predicts(detector, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").symlink_to(detector)
    shutil.copy(photos / "a.jpg", "photo.jpg")
    document = Path(__file__).parents[3] / "docs" / "python.md"
    names: dict = {}
    exec(document.read_text().split("```python\n")[1].split("```")[0], names)
    assert Image.open("drawing.jpg").size == (320, 240)
    assert isinstance(names["found"].boxes, np.ndarray)


def test_half_precision_gives_nearly_the_same(classifier, photos):
    full, half = (senet_transfer.load(classifier, half=half) for half in (False, True))
    one, other = (predictor(photos / "a.jpg").probabilities for predictor in (full, half))
    assert 0 < np.abs(one - other).max() < 0.05


def test_an_exported_classifier_takes_the_exported_size_and_may_lack_class_names(
    classifier, photos, tmp_path
):
    loaded = find_model(weights=str(classifier / "model_final.pth")).build("cpu")
    cfg = loaded.cfg.clone()
    cfg.defrost()
    cfg.DATASETS.CLASSES = []
    path = tmp_path / "model.ts"
    side = 2 * cfg.INPUT.CLASSIFICATION.TEST_CROP
    export_model(loaded.model, cfg, str(path), size=[side])
    predictor = senet_transfer.load(path)
    assert predictor.transform.crop == side
    assert predictor.classes.things == ("class 0", "class 1", "class 2")
    assert predictor(photos / "a.jpg").names[0].startswith("class ")


def test_a_source_that_cannot_be_loaded_is_named_with_a_remedy(tmp_path, classifier):
    from onnx import TensorProto, helper

    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    node = helper.make_node("Identity", ["x"], ["y"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 8, 8]) for name in "xy"]
    graph = helper.make_graph([node], "graph", ends[:1], ends[1:])
    other = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(other, {"names": "{0: 'person'}"})  # as in other programs' exports
    (tmp_path / "other.onnx").write_bytes(other.SerializeToString())
    for source, message in (
        (tmp_path / "empty", r"contains neither model_best.pth nor model_final.pth"),
        (tmp_path / "no.pth", "The checkpoint .* does not exist"),
        (tmp_path / "broken.onnx", "can't be read as an exported model"),
        (tmp_path / "other.onnx", "can't be read as an exported model"),
        ("COCO-Detection/faster_rcnn_R_5O", "is not a detector with a YAML config"),
        ("cadene/se_resnet5O", "Did you mean"),
        (classifier / "no.ts", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            senet_transfer.load(source)


def test_the_classes_of_places365_match_the_data_set():
    names = list(places365_classes())
    # These lines must equal categories_places365.txt, whose MD5 is in torchvision.
    lines = "\n".join(f"/{name} {label}" for label, name in enumerate(names))
    meta = torchvision.datasets.Places365._CATEGORIES_META
    assert hashlib.md5(lines.encode()).hexdigest() == meta[1]
    stated = {"indoor": False, "outdoor": True}
    for name, outdoor in places365_classes().items():
        assert stated.get(name.rpartition("/")[2], outdoor) == outdoor


def test_a_class_activation_map_sums_to_the_logit(classifier, photos, tmp_path):
    key = "INPUT.CLASSIFICATION.TEST_"
    predictor = senet_transfer.load(classifier, options=[f"{key}RESIZE", "100", f"{key}CROP", "96"])
    model = predictor.run
    blocks = []
    last = model.backbone.res5[-1]
    # Make the gates differ, because those of the random weights are nearly equal.
    torch.nn.init.normal_(last.se.fc2.weight, std=3)
    with last.register_forward_hook(lambda block, inputs, output: blocks.append((*inputs, output))):
        logits = model({"image": predictor.transform(photos.joinpath("a.jpg").read_bytes())[None]})
    x, features = blocks[0]
    inner = torch.relu(last.conv1(x))
    # Compute the block by hand, with each gate value replaced by their mean.
    mean = last.se.gate(last.conv2(inner)).mean()
    equal = torch.relu(x + mean * last.conv2(inner))
    for label in range(3):
        found = class_activation_map(predictor, photos / "a.jpg", label)
        weight, bias = model.linear.weight[label], model.linear.bias[label]
        for values, maps in ((found.cam, features), (found.plain, equal)):
            expected = sum(weight[k] * maps[0, k] for k in range(len(weight)))
            np.testing.assert_allclose(values, expected.detach(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            found.cam.mean() + bias.item(), logits[0, label].item(), rtol=1e-4
        )
        assert found.cam.shape == (3, 3)
        assert np.abs(found.added).max() > 1e-3
    assert found.plot().size == (800, 430)
    words = ["--weights", str(classifier), "--input", str(photos / "a.jpg"), "--cam", "--quiet"]
    main(parser().parse_args([*words, "--output", str(tmp_path)]))
    assert Image.open(tmp_path / "a.jpg").size == (800, 430)
    most = class_activation_map(predictor, photos / "a.jpg")
    assert [most.name] == predictor(photos / "a.jpg").names[:1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classifier", "detector"])
def test_prediction_is_at_least_0_9_times_as_fast_as_the_evaluation(
    kind, classifier, detector, shared_data, tmp_path
):
    """Compare the CPU times of `predictor.stream` and an evaluation of the same 64 images.

    Unlike wall-clock times, CPU times hardly depend on the load of the machine.
    """
    paths = sorted(map(str, (shared_data / "coco128").rglob("*.jpg")))[:64]
    if kind == "classifier":
        key = "INPUT.CLASSIFICATION.TEST_"
        options = [f"{key}RESIZE", "256", f"{key}CROP", "224"]
        predictor = senet_transfer.load(classifier, options=options, batch_size=16)
        for index, path in enumerate(paths):
            folder = tmp_path / f"class{index % 3}"
            folder.mkdir(exist_ok=True)
            shutil.copy(path, folder)
        model, dataset = predictor.run, open_dataset(str(tmp_path), split="val")

        def evaluate():
            evaluate_classifier(model, dataset, predictor.transform, batch_size=16, quiet=True)
    else:
        options = ["INPUT.MIN_SIZE_TEST", "256", "INPUT.MAX_SIZE_TEST", "400"]
        predictor = senet_transfer.load(detector, options=options)
        cfg = find_model(weights=str(detector / "model_final.pth"), options=options).cfg
        records = [{"file_name": path, "image_id": path} for path in paths]
        for record in records:
            record["width"], record["height"] = Image.open(record["file_name"]).size

        def evaluate():
            mapper = CheckedDatasetMapper(cfg, is_train=False)
            loader = build_detection_test_loader(records, mapper=mapper)
            inference_on_dataset(predictor.run, loader, DatasetEvaluators([]))

    seconds: dict = {"evaluate": [], "predict": []}
    for _ in range(4):
        for name, function in (
            ("evaluate", evaluate),
            ("predict", lambda: list(predictor.stream(paths))),
        ):
            start = time.process_time()
            function()
            seconds[name].append(time.process_time() - start)
    assert min(seconds["evaluate"]) / min(seconds["predict"]) >= 0.9
