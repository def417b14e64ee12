"""Tests for gate names, values and statistics, and for image sampling."""

import json

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from senet_transfer import UserError, create_backbone, list_models
from senet_transfer.analysis.excitations import figures
from senet_transfer.analysis.excitations.collect import Excitations
from senet_transfer.analysis.excitations.figures import papers_blocks
from senet_transfer.analysis.excitations.gates import capture_gates, gates_of, stage_of
from senet_transfer.analysis.excitations.statistics import GateStatistics
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.classification.subsets import ClassSample, draw
from senet_transfer.data.detection.crops import CocoCrops, square_around
from senet_transfer.data.images.decode import decode_exact
from senet_transfer.models.empty import built_empty


def empty_backbone(name: str, **options):
    with built_empty():
        return create_backbone(name, **options)


def test_gates_have_the_papers_names():
    names = list(gates_of(empty_backbone("se_resnet50")))
    blocks = {2: 3, 3: 4, 4: 6, 5: 3}
    assert names == [f"SE_{s}_{b + 1}" for s, count in blocks.items() for b in range(count)]
    assert papers_blocks(names) == ["SE_2_3", "SE_3_4", "SE_4_6", "SE_5_1", "SE_5_2", "SE_5_3"]
    assert [stage_of(name) for name in names[:4]] == [2, 2, 2, 3]


@pytest.mark.parametrize("name", [*list_models("se_*"), "senet154"])
@pytest.mark.long
def test_every_gate_has_a_unique_name_and_a_stage(name):
    backbone = empty_backbone(name)
    gates = gates_of(backbone)
    assert len(gates) == sum(key.endswith("fc1.weight") for key, _ in backbone.named_parameters())
    # VGG's first four convolutions belong to the stem, which isn't a stage.
    assert {stage_of(gate) for gate in gates if "stem" not in gate} <= {2, 3, 4, 5}
    assert 4 <= len(papers_blocks(list(gates))) <= 8


def test_a_network_without_gates_is_rejected():
    with pytest.raises(UserError, match="no SE"):
        gates_of(empty_backbone("resnet18"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"se_placement": "pre"},
        {"se_placement": "identity"},
        {"se_squeeze": "none"},
        {"se_squeeze": "max", "se_excitation": "tanh", "se_placement": "post"},
    ],
)
def test_captured_values_are_the_applied_gates(options):
    torch.manual_seed(0)
    backbone = create_backbone("se_cifar_resnet8", **options).eval()
    for module in backbone.modules():
        if hasattr(module, "fc2"):
            torch.nn.init.normal_(module.fc2.weight)
            torch.nn.init.constant_(module.fc1.bias, 1.0)
    seen = {}
    gates = gates_of(backbone)
    for module in gates.values():
        module.register_forward_pre_hook(lambda m, inputs: seen.update({m: inputs[0].clone()}))
    with torch.no_grad(), capture_gates(gates) as values:
        backbone(torch.randn(3, 3, 8, 8))
    assert set(values) == set(gates)
    for name, module in gates.items():
        torch.testing.assert_close(values[name], stated_gate(module, seen[module]))


def stated_gate(module, x):
    """Compute gates with Equations 2 and 3 of the SENet paper, or variants of them."""
    x = x.flatten(2)
    squeezed = {"avg": x.mean(2, keepdim=True), "max": x.amax(2, keepdim=True), "none": x}
    hidden = (module.fc1.weight @ squeezed[module.squeeze] + module.fc1.bias[:, None]).clamp(min=0)
    out = module.fc2.weight @ hidden + module.fc2.bias[:, None]
    return {"sigmoid": torch.sigmoid, "tanh": torch.tanh}[module.excitation](out).mean(2)


def test_nothing_is_captured_after_the_context_ends():
    backbone = create_backbone("se_cifar_resnet8").eval()
    gates = gates_of(backbone)
    with capture_gates(gates) as values:
        pass
    backbone(torch.randn(1, 3, 8, 8))
    assert not values


def observed(seed=0, classes=5, channels=7, between=0.1, within=0.05):
    """Return random gate values and labels, with varying class sizes and one empty class."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), random.integers(3, 9, classes))
    labels = labels[labels != 1]
    means = 0.5 + between * random.standard_normal((classes, channels))
    return means[labels] + within * random.standard_normal((len(labels), channels)), labels


def in_batches(gates, labels, size, classes, keep=()):
    found = GateStatistics(np.bincount(labels, minlength=classes), keep)
    for start in range(0, len(labels), size):
        found.update(labels[start : start + size], gates[start : start + size])
    return found


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_statistics_from_batches_equal_those_of_the_whole(size, shuffled):
    gates, labels = observed()
    if shuffled:
        order = np.random.default_rng(1).permutation(len(labels))
        gates, labels = gates[order], labels[order]
    found = in_batches(gates, labels, size, 5, keep=[0, 3])
    there = np.unique(labels)
    means = np.stack([gates[labels == label].mean(0) for label in there])
    np.testing.assert_allclose(found.mean_of_classes, means.mean(0))
    assert set(found.kept) == {0, 3}
    for label, kept in found.kept.items():
        np.testing.assert_allclose(kept.mean, gates[labels == label].mean(0))
        np.testing.assert_allclose(kept.std, gates[labels == label].std(0, ddof=1))
        assert kept.images == (labels == label).sum()
    summary = found.summary()
    assert summary.saturated == pytest.approx((gates > 0.95).mean())
    assert summary.closed == pytest.approx((gates < 0.05).mean())
    assert summary.mean == pytest.approx(gates.mean())
    # Use the textbook formulas of a random-effects analysis of variance.
    number = np.array([(labels == label).sum() for label in there])
    deviations = gates - means[np.searchsorted(there, labels)]
    mean_square = (deviations**2).sum(0) / (len(labels) - len(there))
    assert summary.within == pytest.approx(np.sqrt(mean_square.mean()))
    weighted = (number[:, None] * (means - gates.mean(0)) ** 2).sum(0) / (len(there) - 1)
    n0 = (len(labels) - (number**2).sum() / len(labels)) / (len(there) - 1)
    assert summary.between == pytest.approx(np.sqrt(((weighted - mean_square) / n0).mean()))


def test_deviations_match_the_simulated_ones():
    gates, labels = observed(classes=200, channels=40, between=0.02, within=0.06)
    summary = in_batches(gates, labels, 64, 200).summary()
    assert summary.between == pytest.approx(0.02, rel=0.1)
    assert summary.within == pytest.approx(0.06, rel=0.05)
    assert summary.specificity == pytest.approx(1 / 3, rel=0.15)
    # Without differences between classes, random variation must not be counted as a difference.
    gates, labels = observed(classes=200, channels=40, between=0.0, within=0.06)
    assert in_batches(gates, labels, 64, 200).summary().between < 0.006


def test_memory_does_not_grow_with_the_number_of_classes():
    gates, labels = observed(classes=100)
    found = GateStatistics(np.bincount(labels, minlength=100))
    held = []
    for start in range(0, len(labels), 8):
        found.update(labels[start : start + 8], gates[start : start + 8])
        held.append(len(found._open))
    assert max(held) <= 4
    assert not found._open
    assert not found.kept


@pytest.mark.parametrize(
    ("gates", "verdict"),
    [
        (np.full((6, 3), 0.99), "open"),
        (np.full((6, 3), 0.4), "constant"),
        (np.linspace(0, 1, 18).reshape(6, 3), ""),
    ],
)
def test_a_gate_without_effect_is_named(gates, verdict):
    assert in_batches(gates, np.array([0, 0, 0, 1, 1, 1]), 6, 2).summary().verdict == verdict


def test_a_sample_has_the_given_number_per_class_and_is_reproducible(tree):
    dataset = open_dataset(tree)
    sample = ClassSample(dataset, 3, seed=1)
    assert sample.counts.tolist() == [3, 3, 3]
    assert sample.labels().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(set(sample.chosen)) == 9
    assert [sample.read_sample(i).label for i in range(9)] == sample.labels().tolist()
    assert ClassSample(dataset, 3, seed=1).chosen == sample.chosen
    others = {tuple(ClassSample(dataset, 3, seed=seed).chosen) for seed in range(8)}
    assert len(others) > 4
    # If a class has fewer images than requested, all of them are used.
    assert ClassSample(dataset, 100).counts.tolist() == [5, 5, 6]


def test_every_image_is_equally_likely_to_be_drawn(tree):
    dataset = open_dataset(tree)
    drawn = [place for seed in range(200) for place in ClassSample(dataset, 2, seed=seed).chosen]
    share = np.bincount(drawn, minlength=len(dataset)) / 200
    expected = np.array([2 / 5] * 10 + [2 / 6] * 6)
    # Allow five standard deviations.
    assert (np.abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / 200)).all()


def test_a_sample_keeps_the_original_order():
    assert draw(range(100), 1000) == list(range(100))
    found = draw("abcdefghij", 4, seed=3)
    assert found == sorted(found)
    assert len(found) == 4


@pytest.fixture
def coco(tmp_path):
    """Write an image with a red object, and a COCO file with this object and two other objects."""
    pixels = np.full((60, 100, 3), 128, np.uint8)
    pixels[10:30, 70:95] = (200, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    boxes = [([70, 10, 25, 20], 7, 0), ([0, 0, 50, 50], 3, 1), ([40, 40, 4, 30], 3, 0)]
    content = {
        "images": [{"id": 1, "file_name": "image.png", "width": 100, "height": 60}],
        "categories": [{"id": 3, "name": "crowd"}, {"id": 7, "name": "red"}],
        "annotations": [
            {
                "id": index, "image_id": 1, "bbox": box, "category_id": category,
                "iscrowd": crowd, "area": box[2] * box[3],
            }
            for index, (box, category, crowd) in enumerate(boxes, start=1)
        ],
    }  # fmt: skip
    (tmp_path / "objects.json").write_text(json.dumps(content))
    return tmp_path


def test_crops_contain_the_objects_with_their_surroundings(coco):
    crops = CocoCrops(str(coco / "objects.json"), str(coco))
    assert crops.classes == ["crowd", "red"]
    assert len(crops) == 1
    assert crops.labels().tolist() == [1]
    image = np.asarray(decode_exact(crops.read_sample(0).data))
    assert image.shape == (25, 25, 3)
    red = (image == (200, 0, 0)).all(2)
    assert red.sum() == 20 * 25
    assert ((image == 128).all(2) | red).all()


def test_a_crop_is_a_square_inside_the_image():
    random = np.random.default_rng(0)
    for _ in range(300):
        x, y = random.uniform(0, 80), random.uniform(0, 40)
        w, h = random.uniform(1, 100 - x), random.uniform(1, 60 - y)
        left, top, right, bottom = square_around((x, y, w, h), 100, 60)
        assert 0 <= left < right <= 100
        assert 0 <= top < bottom <= 60
        # Apart from rounding, the crop contains the whole object.
        assert left <= x + 0.51
        assert top <= y + 0.51
        assert right >= x + w - 0.51
        assert bottom >= y + h - 0.51
        if max(w, h) <= 58:
            assert abs((right - left) - (bottom - top)) <= 1


def test_crops_of_a_file_without_objects_are_rejected(coco):
    with pytest.raises(UserError, match="no object"):
        CocoCrops(str(coco / "objects.json"), str(coco), min_side=40)


@pytest.mark.parametrize(("unit", "units"), [("class", "classes"), ("size", "sizes")])
def test_figures_name_the_groups_of_images(unit, units, tmp_path, monkeypatch):
    statistics = GateStatistics(np.array([2, 2]), [0, 1])
    statistics.update(np.array([0, 0, 1, 1]), np.random.default_rng(0).random((4, 3)))
    found = Excitations({"SE_2_1": statistics}, {0: "a", 1: "b"}, (("a", 2), ("b", 2)), unit)
    texts = []
    monkeypatch.setattr(
        figures,
        "_save",
        lambda figure, *_: texts.extend(t.get_text() for t in figure.findobj(Text)),
    )
    figures.write_blocks(found, str(tmp_path))
    figures.write_overview(found, str(tmp_path))
    words = {f"between {units}", f"within {units}", f"all {units}", f"SE_2_1: means of {units}"}
    assert words | {f"SE_2_1: mean ± standard deviation within a {unit}"} <= set(texts)
