"""Tests for load_weights and save_weights. Loading fails if any tensor is unaccounted for."""

import pytest
import torch
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling import Backbone

from senet_transfer import UserError, create_backbone, create_classifier, load_weights, save_weights
from senet_transfer.models import Classifier
from senet_transfer.preprocessing import Preprocessing
from tests.weights.detectors import detector
from tests.weights.peers import load_and_expect_no_change, peer, randomise, save

AUTHORS = {"stem_pool": "ceil", "stride_in_1x1": True}


@pytest.fixture(scope="module")
def r18(tmp_path_factory):
    """Save torchvision's ResNet-18 and return the path."""
    return save(peer("torchvision", "resnet18"), tmp_path_factory.mktemp("r18") / "r18.pth")


@pytest.fixture(scope="module")
def se_r18(tmp_path_factory):
    """Save timm's SE-ResNet-18, which corresponds to `se_divisor=8`, and return the path."""
    return save(peer("timm", "seresnet18"), tmp_path_factory.mktemp("se_r18") / "se_r18.pth")


def _changed(path, folder, change):
    """Write a copy of a file, after ``change`` has modified the state dict in place."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, folder / "changed.pth")
    return folder / "changed.pth"


def _is_filled_from(model, prefix, path):
    """Return whether a model's backbone contains the weights stored in a file."""
    backbone = create_backbone("se_resnet18", weights=path).state_dict()
    state = model.state_dict()
    return all(torch.equal(state[prefix + name], tensor) for name, tensor in backbone.items()
               if "num_batches" not in name)  # fmt: skip


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.long
def test_all_statistics_must_come_from_the_file(norm, r18, tmp_path):
    # Detectron2's frozen norms silently replace missing statistics with 0 and 1.
    path = _changed(r18, tmp_path, lambda state: state.pop("layer3.1.bn2.running_var"))
    model = create_backbone("resnet18", norm=norm)
    with pytest.raises(UserError, match=r"1 missing from the file: res4.1.conv2.norm.running_var"):
        load_and_expect_no_change(model, path)


@pytest.mark.long
def test_frozen_norms_are_filled_and_have_no_counters(r18):
    model = create_backbone("resnet18", norm="FrozenBN")
    report = load_weights(model, r18)
    expected = torch.load(r18, weights_only=True)["layer1.0.bn1.running_mean"]
    assert torch.equal(model.res2[0].conv1.norm.running_mean, expected)
    assert "num_batches_tracked: frozen norms do not have it" in report.ignored.values()


@pytest.mark.long
def test_one_error_lists_all_that_is_wrong(r18, tmp_path):
    def change(state):
        state["layer9.weights"] = torch.zeros(2)
        state["layer1.0.conv1.weight_"] = state.pop("layer1.0.conv1.weight")
        state["layer2.0.bn1.bias"] = torch.zeros(7)

    with pytest.raises(UserError) as error:
        load_and_expect_no_change(create_backbone("resnet18"), _changed(r18, tmp_path, change))
    message = str(error.value)
    assert "detected as torchvision_v1" in message
    assert "1 missing from the file: res2.0.conv1.weight" in message
    assert "2 unexpected: layer9.weights, layer1.0.conv1.weight_" in message
    assert "res3.0.conv1.norm.bias ((7,) in the file, (128,) in the model)" in message


@pytest.mark.long
def test_integers_in_place_of_weights_are_rejected(r18, tmp_path):
    path = _changed(r18, tmp_path, lambda s: s.update({"bn1.bias": torch.zeros(64).long()}))
    with pytest.raises(UserError, match="stem.conv1.norm.bias .int64 in the file"):
        load_and_expect_no_change(create_backbone("resnet18"), path)


@pytest.mark.long
def test_a_plain_file_initialises_an_se_backbone_and_is_logged(r18):
    model = create_backbone("se_resnet18", weights=r18)
    report = load_weights(model, r18)
    names = {name for name in model.state_dict() if ".se." in name}
    assert set(report.initialised) == names
    assert set(report.initialised.values()) == {"SE layers: the file has none"}
    assert "SE layers" in str(report)


@pytest.mark.long
def test_a_file_with_se_does_not_load_into_a_plain_backbone(se_r18):
    with pytest.raises(UserError, match="has SE layers, but the model has none"):
        load_and_expect_no_change(create_backbone("resnet18"), se_r18)


@pytest.mark.long
def test_a_file_with_se_in_other_stages_is_rejected(se_r18):
    model = create_backbone("se_resnet18", se_stages=(4, 5), se_divisor=8)
    with pytest.raises(UserError, match="SE in stages.*but the model has SE"):
        load_and_expect_no_change(model, se_r18)


@pytest.mark.long
def test_a_classifier_of_another_size_is_initialised_and_logged(r18):
    model = create_classifier("resnet18", 10)
    before = model.linear.weight.clone()
    report = load_weights(model, r18)
    why = "classifier: 1000 classes in the file, 10 in the model"
    assert report.initialised == {"linear.weight": why, "linear.bias": why}
    assert torch.equal(model.linear.weight, before)


@pytest.mark.long
def test_a_truncated_backbone_ignores_the_rest_of_the_file(r18):
    backbone = create_backbone("resnet18", out_features=["res3"])
    report = load_weights(backbone, r18)
    assert {"the backbone ends before res4", "the backbone ends before res5"} < set(
        report.ignored.values()
    )
    assert report.ignored["fc.weight"] == "classifier: the model has none"


@pytest.mark.parametrize("kind", ["fpn", "c4"])
@pytest.mark.long
def test_a_detector_loads_a_backbone_and_logs_initialised_layers(kind, se_r18, tmp_path):
    # The file's res5 is loaded into the head of a C4 detector.
    model = detector("resnet18", kind=kind, NORM="BN")
    plain = save(peer("torchvision", "resnet18"), tmp_path / "plain.pth")
    report = _load_rgb(model, plain)
    assert set(report.initialised.values()) == {
        "detector parts outside the backbone: the file has none"
    }
    backbone = create_backbone("resnet18", weights=plain).state_dict()
    state = model.state_dict()
    for name, tensor in backbone.items():
        prefix = "backbone.bottom_up." if kind == "fpn" else "backbone."
        prefix = "roi_heads." if kind == "c4" and name.startswith("res5") else prefix
        if "num_batches" not in name:
            assert torch.equal(state[prefix + name], tensor), name
    rest = set(state) - set(report.loaded) - set(report.initialised)
    assert all("num_batches" in name for name in rest)


def _load_rgb(model, path):
    """Switch a detector to RGB preprocessing, and load weights trained on RGB images into it."""
    model.input_format = "RGB"
    model.pixel_mean.copy_(torch.tensor(Preprocessing().mean)[:, None, None])
    model.pixel_std.copy_(torch.tensor(Preprocessing().std)[:, None, None])
    return load_weights(model, path)


@pytest.mark.long
def test_a_detector_rejects_other_preprocessing(r18):
    # Channel order, mean and std do not affect the shape of any tensor.
    with pytest.raises(UserError, match="INPUT.FORMAT") as error:
        load_and_expect_no_change(detector("resnet18"), r18)
    assert "MODEL.PIXEL_MEAN" in str(error.value)
    assert "MODEL.PIXEL_STD" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "predictors"),
    [
        ("fpn", {"roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"}),
        ("c4", {"roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"}),
        (
            "mask",
            {
                "roi_heads.box_predictor.cls_score",
                "roi_heads.box_predictor.bbox_pred",
                "roi_heads.mask_head.predictor",
            },
        ),
        ("retinanet", {"head.cls_score"}),
    ],
)
@pytest.mark.long
def test_a_coco_detector_initialises_one_with_three_classes(kind, predictors, tmp_path):
    coco = randomise(detector("se_resnet18", 80, kind, seed=1))
    torch.save({"model": coco.state_dict(), "iteration": 5}, tmp_path / "coco.pth")
    model = detector("se_resnet18", 3, kind, seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_weights(model, tmp_path / "coco.pth")

    assert {name.rpartition(".")[0] for name in report.initialised} == predictors
    assert set(report.initialised.values()) == {"predictors for a different number of classes"}
    assert not report.ignored
    for name, tensor in model.state_dict().items():
        expected = before if name in report.initialised else coco.state_dict()
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.long
def test_a_detectors_file_must_match_except_for_the_predictors(tmp_path):
    torch.save({"model": detector("resnet18", kind="fpn").state_dict()}, tmp_path / "fpn.pth")
    with pytest.raises(UserError, match="(?s)missing from the file.*unexpected"):
        load_and_expect_no_change(detector("resnet18", kind="retinanet"), tmp_path / "fpn.pth")
    state = detector("resnet18", kind="fpn").state_dict()
    state.pop("backbone.fpn_lateral3.weight")
    torch.save({"model": state}, tmp_path / "fpn.pth")
    with pytest.raises(UserError, match="1 missing from the file: backbone.fpn_lateral3.weight"):
        load_and_expect_no_change(detector("resnet18", kind="fpn"), tmp_path / "fpn.pth")


@pytest.mark.parametrize("kind", ["fpn", "c4"])
@pytest.mark.long
def test_a_detectors_backbone_can_be_extracted(kind, tmp_path):
    model = randomise(detector("se_resnet18", kind=kind))
    torch.save({"model": model.state_dict()}, tmp_path / "detector.pth")
    backbone = create_backbone("se_resnet18", norm="FrozenBN")
    report = load_weights(backbone, tmp_path / "detector.pth")
    assert set(report.ignored.values()) == {"detector parts: the model is not a detector"}
    prefix = "roi_heads." if kind == "c4" else "backbone.bottom_up."
    state = model.state_dict()
    assert torch.equal(backbone.res5[0].se.fc1.weight, state[f"{prefix}res5.0.se.fc1.weight"])


@pytest.mark.long
def test_a_detector_of_the_model_zoo_has_msra_s_geometry(tmp_path):
    import pickle

    zoo = detector("resnet50", 80, STRIDE_IN_1X1=True)
    state = {name: tensor.numpy() for name, tensor in zoo.state_dict().items()}
    path = tmp_path / "model_final_280758.pkl"
    path.write_bytes(pickle.dumps({"model": state, "__author__": "Detectron2 Model Zoo"}))
    report = load_weights(detector("resnet50", 80, STRIDE_IN_1X1=True, seed=3), path)
    assert report.family == "detectron2"
    assert not report.initialised
    with pytest.raises(UserError, match="stride_in_1x1"):
        load_and_expect_no_change(detector("resnet50", 80, STRIDE_IN_1X1=False), path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("whole", [True, False], ids=["classifier", "backbone"])
@pytest.mark.usefixtures("zero_initial_weights")
@pytest.mark.long
def test_own_files_contain_geometry_and_preprocessing(suffix, whole, tmp_path):
    # The file's stride placement, stem pool and preprocessing are restored with its weights.
    path = tmp_path / f"own{suffix}"
    first = randomise(create_classifier("se_resnet50", 10, se_ratio=8, **AUTHORS))
    first.backbone.preprocessing = Preprocessing("BGR", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), 300, 299)
    save_weights(first if whole else first.backbone, path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]

    second = create_classifier("se_resnet50", 10, weights=path)
    assert second.preprocessing == first.preprocessing
    assert second.backbone.stem.pool == "ceil"
    for name, tensor in first.state_dict().items():
        if "num_batches" not in name and (whole or name.startswith("backbone.")):
            assert torch.equal(tensor, second.state_dict()[name]), name
    with pytest.raises(UserError, match="stride_in_1x1"):
        load_and_expect_no_change(create_classifier("se_resnet50", 10, se_ratio=8), path)
    with pytest.raises(UserError, match="stem_pool='pad' contradicts"):
        create_backbone("se_resnet50", weights=path, stem_pool="pad")


@pytest.mark.long
def test_own_files_store_the_origin_of_their_weights(r18, tmp_path):
    save_weights(create_backbone("resnet18", weights=r18), tmp_path / "own.pth")
    source = torch.load(tmp_path / "own.pth", weights_only=True)["senet_transfer"]["source"]
    assert source == {"family": "torchvision_v1", "file": "r18.pth"}


@pytest.mark.long
def test_own_files_are_written_atomically(tmp_path, monkeypatch):
    (tmp_path / "own.pth").write_bytes(b"before")

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match="No space left"):
        save_weights(create_backbone("resnet18"), tmp_path / "own.pth")
    assert [entry.name for entry in tmp_path.iterdir()] == ["own.pth"]
    assert (tmp_path / "own.pth").read_bytes() == b"before"
    with pytest.raises(UserError, match=r"have the suffix .pth or .safetensors"):
        save_weights(create_backbone("resnet18"), tmp_path / "own.bin")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write"):
        save_weights(create_backbone("resnet18"), tmp_path / "file" / "below" / "own.pth")


FULL = """
import resource, signal, sys
from senet_transfer import UserError, create_backbone, save_weights
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
backbone = create_backbone("resnet18")
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
for path in sys.argv[1:]:
    try:
        save_weights(backbone, path)
    except UserError as error:
        print(error)
"""


def test_a_full_disk_is_reported_and_leaves_no_partial_file(tmp_path, run_python):
    paths = [tmp_path / f"own{suffix}" for suffix in (".pth", ".safetensors")]
    done = run_python("-c", FULL, *paths)
    assert done.returncode == 0, done.stderr
    for line, path in zip(done.stdout.splitlines(), paths, strict=True):
        assert line.startswith(f"Cannot write {path}: ")
        assert "File too large" in line
    assert not list(tmp_path.iterdir())


class OtherBackbone(Backbone):
    """Backbone without residual stages."""

    def __init__(self):
        super().__init__()
        self.block = Conv2d(3, 8, 3, bias=False, norm=get_norm("BN", 8))
        self._out_features = ["res5"]
        self._out_feature_channels = {"res5": 8}
        self._out_feature_strides = {"res5": 1}
        self.preprocessing = Preprocessing(resize=40)

    def forward(self, x):
        return {"res5": self.block(x)}


@pytest.mark.parametrize("marked", [True, False])
def test_other_architectures_are_saved_and_loaded_strictly_too(marked, tmp_path):
    first, path = randomise(Classifier(OtherBackbone(), num_classes=4)), tmp_path / "own.pth"
    if marked:
        save_weights(first, path)
    else:
        save(first, path)
    report = load_weights(second := Classifier(OtherBackbone(), num_classes=4), path)
    assert report.family == "senet_transfer"
    assert second.preprocessing == Preprocessing(resize=40)
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    torch.save({"block.weight": first.backbone.block.weight.data}, path)
    with pytest.raises(UserError, match="3 missing|4 missing"):
        load_and_expect_no_change(OtherBackbone(), _forced(path))


def _forced(path):
    # The family can't be detected from these names and must be specified.
    with pytest.raises(UserError, match="match no known weight family"):
        load_weights(OtherBackbone(), path)
    with pytest.raises(UserError, match="detected as senet_transfer"):
        load_weights(OtherBackbone(), path, family="senet_transfer")
    torch.save({"block.weight": torch.zeros(8, 3, 3, 3), "x.norm.running_var": torch.ones(8),
                "linear.weight": torch.zeros(4, 8)}, path)  # fmt: skip
    return path


@pytest.mark.long
def test_the_report_lists_loaded_and_initialised_tensors(r18, caplog):
    caplog.set_level("INFO", "senet_transfer")
    model = create_classifier("se_resnet18", 10)
    text = str(load_weights(model, r18))
    assert text in caplog.text
    assert "120 tensors loaded, family torchvision_v1" in text
    assert "could also be of the family torchvision_v2, timm" in text
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "torchvision_v1 is assumed" in warning.message
    assert "torchvision_v2 (with resize 232) or timm (with interp" in warning.message
    assert "initialised, 32 (SE layers: the file has none): backbone.res2.0.se" in text
    assert "and 20 more" in text
    assert "expects RGB, mean (123.675, 116.28, 103.53)" in text
