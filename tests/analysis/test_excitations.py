"""Tests for the analysis of gate activations and for networks with pruned gates."""

import csv
import hashlib
import json
import shlex

import numpy as np
import pytest
import torch
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from PIL import Image

from senet_transfer import UserError, create_classifier, save_weights
from senet_transfer.analysis.excitations.analyze import open_labelled
from senet_transfer.analysis.excitations.collect import backbone_of, collect_excitations
from senet_transfer.analysis.excitations.gates import gates_of
from senet_transfer.analysis.excitations.prune import pruned_config, without_gates
from senet_transfer.cli import evaluate
from senet_transfer.cli.analysis import gates
from senet_transfer.config.load import load_config
from senet_transfer.data.cifar.in_memory import save_images, split_file
from senet_transfer.data.cifar.open import decode_all
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.detection.crops import CocoImages
from senet_transfer.data.images.transforms import EvalTransform
from senet_transfer.engine.model_from import find_model, model_config

VIEW = EvalTransform(resize=32, crop=32)
SIZE = [
    "INPUT.CLASSIFICATION.TEST_RESIZE", "32", "INPUT.CLASSIFICATION.TEST_CROP", "32",
    "MODEL.CLASSIFIER.NUM_CLASSES", "3", "MODEL.DEVICE", "cpu",
]  # fmt: skip


def shaken(name: str, *options: str, seed: int = 0):
    """Build a classifier with random weights in all layers, including gates and norms."""
    torch.manual_seed(seed)
    cfg = model_config(name, options=[*SIZE, *options])
    model = build_model(cfg)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if ".se." in key and not key.endswith("fc1.bias"):
                value.normal_(std=0.5)
            elif value.dim() == 1 and value.is_floating_point():
                value.uniform_(0.5, 1.5)
    return cfg, model.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Write the weights and config of a classifier to a folder, as a training run does."""
    folder = tmp_path_factory.mktemp("run")
    cfg, model = shaken("se_cifar_resnet8")
    save_weights(model, folder / "model.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


@pytest.fixture
def no_figures(monkeypatch):
    """Disable plotting, which takes up most of the analysis time."""
    for name in ("write_blocks", "write_overview"):
        monkeypatch.setattr(
            f"senet_transfer.analysis.excitations.analyze.{name}", lambda *_, **__: []
        )


def arguments(trained, tree, output, *more: str, words_only: bool = False):
    words = ["--weights", str(trained / "model.pth"), "--data", str(tree), "--output", str(output)]
    words += ["--workers", "0", "--quiet", *more]
    return words if words_only else gates.parser().parse_args(words)


def test_statistics_equal_those_of_one_image_at_a_time(tree):
    _, model = shaken("se_cifar_resnet8")
    dataset = open_dataset(tree)
    found = collect_excitations(
        model, dataset, VIEW, images_per_class=100, batch_size=7, quiet=True
    )
    assert (found.images, found.classes) == (16, 3)
    assert list(found.drawn.values()) == dataset.classes
    for name, gate in gates_of(model.backbone).items():
        values, labels = [], []
        hook = gate.register_forward_hook(lambda m, x, _, v=values: v.append(m.gate(x[0])))
        for index in range(len(dataset)):
            sample = dataset.read_sample(index)
            with torch.no_grad():
                model({"image": VIEW(sample.data)[None]})
            labels.append(sample.label)
        hook.remove()
        values, labels = torch.cat(values).flatten(1).double().numpy(), np.array(labels)
        for label in range(3):
            of_class = values[labels == label]
            kept = found.blocks[name].kept[label]
            np.testing.assert_allclose(kept.mean, of_class.mean(0), rtol=1e-5)
            np.testing.assert_allclose(kept.std, of_class.std(0, ddof=1), rtol=1e-3, atol=1e-6)


@pytest.mark.long
def test_the_command_writes_and_prints_the_documented_files(trained, tree, tmp_path, capsys):
    words = ("--num-classes", "2", "--channels", "9", "--images-per-class", "4")
    gates.main(arguments(trained, tree, tmp_path, *words))
    said = capsys.readouterr().out
    blocks = ["SE_2_1", "SE_3_1", "SE_4_1"]
    assert "12 images of 3 classes" in said
    assert [line.split()[0] for line in said.splitlines() if line.startswith("SE_")] == blocks
    for name in (*(f"blocks/{block}" for block in blocks), "figure6", "blocks"):
        with Image.open(tmp_path / f"{name}.png") as image:
            # An empty plot contains only the colours of its background and frame.
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    with open(tmp_path / "gates.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (16 + 32 + 64) * 3
    assert {row["class"] for row in rows} - {"all classes"} < {"bark", "moss/dry", "sand"}
    assert {row["images"] for row in rows} == {"4", "12"}
    with open(tmp_path / "blocks.csv") as file:
        table = {row["block"]: row for row in csv.DictReader(file)}
    everything = [float(row["mean"]) for row in rows if row["class"] == "all classes"]
    assert np.mean(everything[:16]) == pytest.approx(float(table["SE_2_1"]["mean"]), abs=1e-5)


@pytest.mark.long
def test_a_record_of_the_gates_states_how_they_were_measured(trained, tree, tmp_path, no_figures):
    words = arguments(trained, tree, tmp_path, "--images-per-class", "4", words_only=True)
    gates.command([*words, "--record", str(tmp_path / "gates.json")])
    found = json.loads((tmp_path / "gates.json").read_text())
    assert found["images"] == {"bark": 4, "moss/dry": 4, "sand": 4}
    hashed = hashlib.sha256((trained / "model.pth").read_bytes()).hexdigest()
    assert found["weights_sha256"] == hashed
    assert shlex.split(found["command"])[: 2 + len(words)] == ["senet", "gates", *words]
    assert {"machine", "commit"} < found.keys()


@pytest.mark.long
def test_the_same_seed_gives_the_same_files(trained, tree, tmp_path):
    for folder, seed in (("first", "0"), ("second", "0"), ("other", "1")):
        words = ("--images-per-class", "2", "--seed", seed)
        gates.main(arguments(trained, tree, tmp_path / folder, *words))
    names = ["blocks.csv", "figure6.png", "blocks/SE_3_1.png"]
    first, second, other = (
        [(tmp_path / folder / name).read_bytes() for name in names]
        for folder in ("first", "second", "other")
    )
    assert first == second
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.usefixtures("no_figures")
@pytest.mark.long
def test_a_prepared_split_gives_the_same_result_as_its_images(
    trained, tree, tmp_path, monkeypatch, capsys, named
):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    place = split_file(tmp_path / "cifar10", "test")
    save_images(decode_all(open_dataset(tree)), place, "a tree")
    found = []
    for number, data in enumerate((tree, "cifar10_test" if named else place)):
        words = ("--images-per-class", "3", "--prune-stage", "4")
        gates.main(arguments(trained, data, tmp_path / str(number), *words))
        pruning = capsys.readouterr().out.partition("Without the gates")[2].partition("Wrote")[0]
        assert "gates at 1" in pruning
        found.append([pruning, (tmp_path / str(number) / "gates.csv").read_bytes()])
    assert found[0] == found[1]


@pytest.mark.long
def test_classes_are_drawn_by_name(trained, tree, tmp_path, capsys):
    gates.main(arguments(trained, tree, tmp_path, "--classes", "sand", "moss/dry"))
    with open(tmp_path / "gates.csv") as file:
        found = dict.fromkeys(row["class"] for row in csv.DictReader(file))
    assert list(found) == ["sand", "moss/dry", "all classes"]


# ---- removing a gate whose value is the same for all images


def constant_gates(model, stages):
    """Make all gates in the given stages independent of the image, and return their values."""
    values = {}
    for name, gate in gates_of(model.backbone).items():
        if int(name.split("_")[1]) in stages:
            torch.nn.init.zeros_(gate.fc2.weight)
            torch.nn.init.normal_(gate.fc2.bias)
        values[name] = torch.sigmoid(gate.fc2.bias).detach().numpy().astype(np.float64)
    return values


@pytest.mark.parametrize(
    ("name", "options", "stages"),
    [
        ("se_cifar_resnet8", (), [4]),
        ("se_cifar_resnet8", (), [2, 3, 4]),
        ("se_resnet18", (), [5]),
        ("se_shufflenet_g3", (), [4]),
        pytest.param("se_inception_resnet_v2", (), [3, 5], marks=pytest.mark.slow),
        pytest.param(
            "se_resnet50", ("MODEL.RESNETS.NORM", "FrozenBN"), [5, 2], marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.long
def test_a_constant_gate_is_folded_exactly(name, options, stages):
    cfg, model = shaken(name, *options)
    values = constant_gates(model, stages)
    side = 96 if "inception" in name else 32
    x = {"image": torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)}
    pruned = pruned_config(cfg, model, stages)
    taken_in, open_ = without_gates(pruned, model, values), without_gates(pruned, model)
    assert not [key for key in taken_in.state_dict() for s in stages if f"res{s}.0.se" in key]
    left = {int(key.split("_")[1]) for key in gates_of(model.backbone)} - set(stages)
    assert any(".se." in key for key in taken_in.state_dict()) == bool(left)
    with torch.no_grad():
        expected, found, other = model(x), taken_in(x), open_(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (other - expected).abs().max() > 10 * (found - expected).abs().max()


@pytest.mark.long
def test_a_gate_equal_to_one_is_removed_exactly():
    cfg, model = shaken("se_resnet18")
    for gate in gates_of(model.backbone).values():
        torch.nn.init.zeros_(gate.fc2.weight)
        torch.nn.init.constant_(gate.fc2.bias, 100.0)
    x = {"image": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)}
    plain = without_gates(pruned_config(cfg, model, [2, 3, 4, 5]), model)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x))


def test_gates_that_do_not_follow_a_convolution_are_not_folded():
    cfg, model = shaken("se_cifar_resnet8", "MODEL.SE.PLACEMENT", "identity")
    pruned = pruned_config(cfg, model, [4])
    assert without_gates(pruned, model, constant_gates(model, [4])) is None
    assert without_gates(pruned, model) is not None


@pytest.mark.usefixtures("no_figures")
@pytest.mark.long
def test_pruning_measures_and_writes_a_network_that_loads(trained, tree, tmp_path, capsys):
    gates.main(arguments(trained, tree, tmp_path, "--prune-stage", "4"))
    said = capsys.readouterr().out
    table = [line for line in said.splitlines() if line.startswith(("with its", "gates at"))]
    assert len(table) == 3
    hidden = 64 // 16
    assert f"{_parameters(trained) - (2 * 64 * hidden + 64 + hidden):,}" in table[1]
    path = tmp_path / "pruned" / "model.pth"
    loaded = find_model(weights=str(path)).build()
    cfg, again = loaded.cfg, loaded.model
    assert cfg.MODEL.SE.STAGES == (2, 3)
    assert cfg.DATASETS.CLASSES == ["bark", "moss/dry", "sand"]
    assert {name[:4] for name in gates_of(again.backbone)} == {"SE_2", "SE_3"}
    # Evaluate with tools/eval_classifier.py's code, which finds the config next to the weights.
    words = ["--weights", str(path), "--data", str(tree), "--workers", "0", "--quiet"]
    result = evaluate.main(evaluate.parser().parse_args(words))
    errors = [float(line.split()[-6]) for line in table[1:]]
    assert min(errors) == pytest.approx(result["top1_error"], abs=0.01)


def _parameters(trained) -> int:
    state = torch.load(trained / "model.pth", weights_only=True)["model"]
    names = [key for key in state if "running" not in key and "tracked" not in key]
    return sum(state[key].numel() for key in names)


@pytest.mark.long
def test_a_pruned_residual_network_is_detected_from_its_tensors(tmp_path):
    cfg, model = shaken("se_resnet18")
    save_weights(without_gates(pruned_config(cfg, model, [5]), model), tmp_path / "pruned.pth")
    again = create_classifier("se_resnet18", 3, weights=tmp_path / "pruned.pth")
    assert {name[:4] for name in gates_of(again.backbone)} == {"SE_2", "SE_3", "SE_4"}


@pytest.mark.parametrize(
    ("options", "stages", "said"),
    [
        ((), [5], "have no gates"),
        (("MODEL.SE.STAGES", "(2, 3)"), [4], "expected one or more of: 2, 3"),
    ],
)
def test_stages_without_gates_are_rejected(options, stages, said):
    cfg, model = shaken("se_cifar_resnet8", *options)
    with pytest.raises(UserError, match=said):
        pruned_config(cfg, model, stages)


def test_a_gate_with_its_own_relu_cannot_be_removed():
    cfg, model = shaken("se_resnet18", "MODEL.SE.RELU_BEFORE", "True")
    with pytest.raises(UserError, match="ReLU before each gate"):
        pruned_config(cfg, model, [5])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--classes", "gravel"), "no images of gravel"),
        (("--channels", "0"), "--channels is 0"),
        (("--images-per-class", "0"), "images_per_class is 0"),
        (("--prune-stage", "5"), "have no gates"),
        (("--images", "somewhere"), "--images requires object annotations"),
        (("--group-by", "size"), "--group-by requires object annotations"),
        (("--model", "cifar_resnet8", "--images-per-class", "1"), "se_"),
    ],
)
def test_invalid_input_is_rejected_with_a_clear_error(trained, tree, tmp_path, words, said):
    with pytest.raises(UserError, match=said):
        gates.main(arguments(trained, tree, tmp_path, *words))


def test_a_json_file_requires_an_image_folder():
    with pytest.raises(UserError, match="--images"):
        open_labelled("annotations.json")


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """Save a detector's weights, and four images with objects of two classes and several sizes."""
    folder = tmp_path_factory.mktemp("detector")
    options = ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", "2", "MODEL.WEIGHTS", ""]
    cfg = model_config(config_file="configs/demo_faster_rcnn_se_r18.yaml", options=options)
    save_weights(build_model(cfg), folder / "model.pth")
    cfg.DATASETS.CLASSES = ["left", "right"]
    (folder / "config.yaml").write_text(cfg.dump())
    random = np.random.default_rng(0)
    # (side, class) of the objects in each image. The last image has no majority size or class.
    objects = ([(30, 1), (31, 1), (40, 2)], [(20, 1)], [(96, 2), (97, 2)], [(20, 1), (50, 2)])
    content = {
        "images": [
            {"id": index, "file_name": f"{index}.png", "width": 120, "height": 100 + index}
            for index in range(len(objects))
        ],
        "categories": [{"id": 1, "name": "left"}, {"id": 2, "name": "right"}],
        "annotations": [
            {"image_id": index, "bbox": [0, 0, side, side], "category_id": category,
             "iscrowd": 0, "area": side**2}
            for index, found in enumerate(objects) for side, category in found
        ],
    }  # fmt: skip
    for number, item in enumerate(content["annotations"]):
        item["id"] = number
    for image in content["images"]:
        pixels = random.integers(0, 255, (image["height"], image["width"], 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / image["file_name"])
    (folder / "objects.json").write_text(json.dumps(content))
    return folder


def analyse(detector, output, *more: str) -> None:
    words = ["--weights", str(detector / "model.pth"), "--data", str(detector / "objects.json")]
    words += ["--images", str(detector), "--output", str(output), "--workers", "0", "--quiet"]
    gates.main(gates.parser().parse_args([*words, *more]))


@pytest.mark.long
def test_a_detectors_gates_are_captured_on_crops(detector, tmp_path, no_figures):
    analyse(detector, tmp_path)
    with open(tmp_path / "blocks.csv") as file:
        assert len(list(csv.DictReader(file))) == 8
    cfg = load_config(str(detector / "config.yaml"))
    model = find_model(weights=str(detector / "model.pth")).build().model
    with pytest.raises(UserError, match="Gates can only be removed from a classifier"):
        pruned_config(cfg, model, [5])
    assert backbone_of(model) is model.backbone.bottom_up


@pytest.mark.long
def test_gates_by_object_size_equal_those_of_detectron2_on_whole_images(
    detector, tmp_path, no_figures, capsys
):
    analyse(detector, tmp_path, "--group-by", "size")
    said = capsys.readouterr().out
    assert "3 images of 2 groups" in said
    assert "Skipped 1 image in which no size accounts for more than half of the objects" in said
    with open(tmp_path / "gates.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["block"] == "SE_4_1"]
    cfg = load_config(str(detector / "config.yaml"))
    model = find_model(weights=str(detector / "model.pth")).build().model
    expected = []
    layer = model.backbone.bottom_up.res4[0].se
    layer.register_forward_hook(lambda m, x, _: expected.append(m.gate(x[0]).flatten()))
    resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    for name in "012":
        pixels = read_image(str(detector / f"{name}.png"), cfg.INPUT.FORMAT)
        pixels = resize.get_transform(pixels).apply_image(pixels)
        with torch.no_grad():
            model([{"image": torch.as_tensor(pixels.transpose(2, 0, 1).copy())}])
    found = {g: [float(r["mean"]) for r in rows if r["class"] == g] for g in ("small", "large")}
    # In image 0, two of three objects are small: their sides are below 32 pixels.
    small = (expected[0] + expected[1]) / 2
    np.testing.assert_allclose(found["small"], small, atol=2e-6)
    np.testing.assert_allclose(found["large"], expected[2], atol=2e-6)
    by_class = CocoImages(str(detector / "objects.json"), str(detector), by="class")
    assert by_class.labels().tolist() == [0, 0, 1]
    assert by_class.left_out == 1
    with pytest.raises(UserError, match="Remove one of these options"):
        analyse(detector, tmp_path, "--group-by", "class", "--prune-stage", "5")


@pytest.mark.long
def test_whole_images_are_cropped_once_for_a_classifier(trained, detector, tmp_path, no_figures):
    words = ["--weights", str(trained / "model.pth"), "--data", str(detector / "objects.json")]
    words += ["--images", str(detector), "--group-by", "size", "--workers", "0", "--quiet"]
    for mode in ("short_side", "ten_crop"):
        options = ["--output", str(tmp_path / mode), "INPUT.CLASSIFICATION.TEST_MODE", mode]
        gates.main(gates.parser().parse_args([*words, *options]))
    one, ten = (tmp_path / mode / "gates.csv" for mode in ("short_side", "ten_crop"))
    assert one.read_text() == ten.read_text()
