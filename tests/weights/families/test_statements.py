"""Tests that weight files are loaded as their metadata specifies, unless the user overrides it."""

import math
from argparse import Namespace
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from senet_transfer import (
    UserError,
    apply_file_geometry,
    create_backbone,
    create_classifier,
    load_weights,
    save_weights,
)
from senet_transfer.config.load import load_config
from senet_transfer.engine.model_from import find_model
from senet_transfer.export.conversion import convert_file
from senet_transfer.preprocessing import Preprocessing
from senet_transfer.weights.families.architecture import Architecture
from senet_transfer.weights.families.statements import statements_of
from senet_transfer.weights.formats.timm_config import train_options
from senet_transfer.weights.hub.catalogue import Entry, load_catalogue
from senet_transfer.weights.mapping.source import examine
from tests.weights.layouts import WIDTH, prefixed, tiny
from tests.weights.peers import peer, randomise, save

_SIZE = {"stem_out_channels": WIDTH, "res2_out_channels": WIDTH}
_IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def _write(path: Path, **extras: object) -> Path:
    torch.save({"state_dict": tiny().state_dict(), **extras}, path)
    return path


# Information in a file about its network.

_ENDLESS = Namespace(model="resnet18")
_ENDLESS.itself = _ENDLESS


@pytest.mark.parametrize(
    "extras",
    [
        {"arch": "resnetblur18"},
        {"arch": "resnet50"},
        {"arch": "resnet18d"},
        {"arch": "seresnet18"},
        {"architecture": "resnetaa18.x_in1k"},
        {"arch": "deeplabv3_resnet18"},
        *({"arch": f"{start}resnetblur18"} for start in ("timm_", "timm:", "timm.", "tu-")),
        {"hyper_parameters": {"arch": "resnet34", "lr": 0.1}},
        {"hyper_parameters": {"model": {"name": "resnetblur18", "num_classes": 5}}},
        {"config": {"model": {"backbone": {"arch": "resnetblur18"}}}},
        {"args": Namespace(model="resnetblur18", device=torch.device("cpu"))},
        {"args": SimpleNamespace(arch="resnetblur18", start=datetime.now())},
        {"args": Namespace(model=Namespace(name="resnetblur18"), weights=torch.ones(5))},
        {"hyper_parameters": {"model": "resnetblur18", "loss": {"weights": torch.ones(5)}}},
        {"args": {"model": "legacy_seresnet18"}},
        {"meta": {"cfg": "model = dict(backbone=dict(type='ResNet', depth=50, style='pytorch'))"}},
        {
            "meta": {
                "config": "backbone=dict(\n    depth=18,\n    style='caffe',\n    type='ResNet')"
            }
        },
        {"meta": {"cfg": "backbone=dict(type='ResNet', depth=18, dilations=(1, 1, 2, 4)), neck="}},
    ],
)
def test_stated_values_that_contradict_the_tensors_are_an_error(extras, tmp_path):
    with pytest.raises(UserError, match="its (entry|config)"):
        create_classifier("resnet18", 5, weights=_write(tmp_path / "a.pth", **extras), **_SIZE)


@pytest.mark.parametrize(
    "extras",
    [
        *({"arch": "resnet18"}, {"arch": "resnet18.a1_in1k"}, {"arch": "tv_resnet18"}),
        *(
            {"arch": "ResNet18"},
            {"arch": "my_network"},
            {"arch": "resnet18_finetuned"},
            {"arch": 3},
        ),
        {"hyper_parameters": {"model": "resnet18"}},
        {"hyper_parameters": {"model": {"name": "baseline", "teacher": "resnet50"}}},
        {"args": Namespace(model="tu-resnet18", name="resnet50", itself=_ENDLESS)},
        {"meta": {"cfg": "backbone=dict(depth=18, strides=(1, 2, 2, 2), style='pytorch')"}},
        {
            "meta": {
                "cfg": "teacher = dict(backbone=dict(depth=50))\n"
                "model = dict(backbone=dict(depth=18))"
            }
        },
    ],
)
def test_consistent_or_empty_stated_values_are_accepted(extras, tmp_path):
    path = _write(tmp_path / "a.pth", **extras)
    model = create_classifier("resnet18", 5, weights=path, **_SIZE).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(_IMAGES), tiny()(_IMAGES), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("nested", [False, True])
def test_stated_values_of_another_network_in_the_file_are_a_note(nested, tmp_path):
    networks = {"teacher": tiny(1).state_dict(), "student": tiny().state_dict()}
    if not nested:
        networks = prefixed("teacher.", networks["teacher"]) | prefixed(
            "student.", networks["student"]
        )
    torch.save({"arch": "resnet50", "state_dict": networks}, path := tmp_path / "a.pth")
    model = create_classifier("resnet18", 5, weights=path, prefix="student", **_SIZE).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(_IMAGES), tiny()(_IMAGES), rtol=1e-4, atol=1e-4)
    assert any(
        "its entry 'arch' is 'resnet50'" in note for note in examine(path, prefix="student").notes
    )
    # If the file contains only one network, `arch` must describe it, even if a prefix is given.
    single = prefixed("student.", tiny().state_dict()) | {"criterion.weight": torch.ones(5)}
    torch.save({"arch": "resnet50", "state_dict": single}, path)
    with pytest.raises(UserError, match="its entry 'arch'"):
        examine(path, prefix="student")


def test_an_entry_that_contradicts_two_others_is_a_note(tmp_path):
    options = Namespace(arch="resnet18", backbone="resnet50")
    path = _write(tmp_path / "a.pth", arch="resnet18", args=options)
    model = create_classifier("resnet18", 5, weights=path, **_SIZE).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(_IMAGES), tiny()(_IMAGES), rtol=1e-4, atol=1e-4)
    (note,) = examine(path).notes
    assert note.startswith("its entry 'args.backbone' is 'resnet50', but its tensors are those of")
    assert note.endswith(", as another entry states")
    config = {"cfg": "backbone=dict(type='ResNet', depth=18, style='pytorch')"}
    _write(path, arch="resnet18", args=options, meta=config)
    assert "'args.backbone' is 'resnet50'" in examine(path).notes[0]


@pytest.mark.parametrize("other", ["resnetblur18", "resnet18d", "timm/resnetaa18"])
def test_a_similar_network_is_an_error_even_if_another_entry_contradicts_it(other, tmp_path):
    options = Namespace(arch="resnet18", backbone="resnet50", model=other)
    path = _write(tmp_path / "a.pth", arch="resnet18", args=options)
    with pytest.raises(UserError, match=f"its entry 'args.model' is '{other}'"):
        examine(path)


@pytest.mark.parametrize(
    "values",
    [
        *({"img_size": size} for size in (0.5, 160.0, 0, -160, True, 10**400, "160")),
        *({"crop_pct": value} for value in (1e-320, 0.09, 1.01, True, math.nan, math.inf, "1")),
        *({key: value} for key in ("mean", "std") for value in ([True] * 3, [math.nan], "0.5")),
        {"input_size": [3, 160, 160.5]},
    ],
)
def test_invalid_options_of_timms_train_script_are_ignored(values):
    none = dict.fromkeys(("mean", "std", "crop_pct", "img_size")) | {"interpolation": ""}
    default = Preprocessing(resize=256, crop=224)
    assert train_options({"args": none | values}, default) == {}
    found = train_options({"args": none | {"img_size": 96, "crop_pct": 0.5} | values}, default)
    if "img_size" in values:
        assert found == {"resize": 448, "crop": 224}
    elif "crop_pct" in values:
        assert found == {"resize": 109, "crop": 96}


@pytest.mark.parametrize("kind", [dict, Namespace])
@pytest.mark.parametrize("network", ["", "timm/resnet10t"])
@pytest.mark.long
def test_the_options_of_timms_train_script_set_the_preprocessing(network, kind, tmp_path):
    data = pytest.importorskip("timm.data")
    none = dict.fromkeys(("mean", "std", "crop_pct", "img_size")) | {"interpolation": ""}
    half = {"mean": [0.5] * 3, "std": [0.25] * 3}
    default = {"input_size": (3, 224, 224), "crop_pct": 0.875}
    if network:
        default = pytest.importorskip("timm").get_pretrained_cfg("resnet10t").to_dict()
        state = peer("timm", "resnet10t").state_dict()
    else:
        state = tiny().state_dict()
    for stated in (
        {},
        half,
        {"mean": [0.5], "std": [0.5]},
        {"interpolation": "bilinear"},
        {"crop_pct": 0.95},
        {"img_size": 160},
        {**half, "img_size": 96, "crop_pct": 1.0},
    ):
        args = none | stated
        torch.save(
            {"arch": network[5:] or "resnet18", "state_dict": state, "args": kind(**args)},
            path := tmp_path / "a.pth",
        )
        found = examine(path, network=network)
        expected = data.resolve_data_config(args, pretrained_cfg=default)
        side = expected["input_size"][-1]
        assert found.preprocessing == Preprocessing(
            mean=pytest.approx([255 * value for value in expected["mean"]], abs=1e-3),
            std=pytest.approx([255 * value for value in expected["std"]], abs=1e-3),
            resize=math.floor(side / expected["crop_pct"]),
            crop=side,
            interpolation=expected["interpolation"],
        )
        assert "train.py" in found.notes[-1]
        assert found.recorded >= {"mean", "std"} & stated.keys()


def _described(name: str) -> Architecture:
    with torch.device("meta"):
        return Architecture.of(create_backbone(name).state_dict())


def test_names_of_published_networks_agree_with_their_tensors():
    for ours, theirs in (
        (
            "resnet50",
            ("resnet50", "gluon_resnet50_v1b", "resnet50.ram_in1k", "timm/resnet50.tv_in1k"),
        ),
        ("resnext50_32x4d", ("resnext50_32x4d", "resnext50", "resnext50-32x4d")),
        (
            "se_resnet50",
            ("seresnet50", "se_resnet50", "legacy_seresnet50", "SE-ResNet-50", "resnet50"),
        ),
    ):
        architecture = _described(ours)
        for name in theirs:
            assert not statements_of({"arch": name}, architecture).contradiction, name


@pytest.mark.parametrize("name", ["resnetblur18", "resnetblur50", "resnetaa50"])
@pytest.mark.long
def test_timms_similar_networks_are_named_in_the_report(name, tmp_path):
    timm = pytest.importorskip("timm")
    other = f"resnet{name[-2:]}"
    with torch.device("meta"):
        shapes = [
            {k: v.shape for k, v in timm.create_model(n).state_dict().items()}
            for n in (name, other)
        ]
    assert shapes[0] == shapes[1]
    state = {k: torch.full(v, 0.5) for k, v in shapes[0].items()}
    torch.save(state, tmp_path / "a.pth")
    assert f"timm's {name}" in examine(tmp_path / "a.pth").lookalikes
    torch.save({"arch": other, "state_dict": state}, tmp_path / "a.pth")
    assert examine(tmp_path / "a.pth").lookalikes == ()
    torch.save({"arch": name, "state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=name):
        examine(tmp_path / "a.pth")


class WideResNet18(nn.Module):
    """Network in CSAIL's wideresnet.py: a ResNet-18 without a max pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for stage, outputs in enumerate((64, 128, 256, 512), 1):
            shortcut = None
            if inputs != outputs:
                shortcut = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs)
                )
            first = BasicBlock(inputs, outputs, 1 if stage == 1 else 2, shortcut)
            setattr(self, f"layer{stage}", nn.Sequential(first, BasicBlock(outputs, outputs)))
            inputs = outputs
        self.fc = nn.Linear(512, 365)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.long
def test_csail_s_wideresnet18(tmp_path):
    plain = randomise(WideResNet18())
    state = {f"module.{name}": tensor for name, tensor in plain.state_dict().items()}
    path = tmp_path / "wideresnet18_places365.pth.tar"
    torch.save({"epoch": 90, "arch": "wideresnet18", "state_dict": state}, path)
    with torch.no_grad():
        expected = plain(_IMAGES)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    name = "places365_wideresnet18"

    model = create_classifier(name, 365, weights=path).eval()
    close(model(_IMAGES).detach(), expected)
    assert model.backbone.output_shape()["res5"].stride == 16
    for wrong in ("resnet18", "se_resnet18"):
        with pytest.raises(UserError, match=f"contains {name}.*MODEL.BACKBONE.ARCH {name}"):
            create_classifier(wrong, 365, weights=path)
    with pytest.raises(UserError, match="stem's max pool is 'none'"):
        load_weights(create_classifier("resnet18", 365), path)
    with pytest.raises(UserError, match="no model called 'se_places365_wideresnet18'"):
        create_classifier(f"se_{name}")

    # Load without the network's name, and from a file saved by this project.
    found = find_model(weights=str(path)).build().model
    close(found({"image": torch.zeros(1, 3, 64, 64, dtype=torch.uint8)}).shape, (1, 365))
    assert found.backbone.stem.pool == "none"
    save_weights(model, tmp_path / "own.pth")
    close(create_classifier(name, 365, weights=tmp_path / "own.pth").eval()(_IMAGES), expected)
    with pytest.raises(UserError, match=f"contains {name}"):
        create_classifier("resnet18", 365, weights=tmp_path / "own.pth")

    convert_file(str(path), tmp_path / "converted.safetensors", check=True)
    converted = create_classifier(name, 365, weights=tmp_path / "converted.safetensors").eval()
    close(converted(_IMAGES), expected)
    with pytest.raises(UserError, match="stem_pool"):
        convert_file(str(path), tmp_path / "tv.pth", to="torchvision")

    # Without `arch`, the file could contain a ResNet-18, so the name of the model decides.
    torch.save(state, path)
    close(create_classifier(name, 365, weights=path).eval()(_IMAGES), expected)
    assert "CSAIL's wideresnet18" in examine(path).lookalikes


# Settings from the user.

_HALF = [127.5, 127.5, 127.5]


def _config(tmp_path, path, yaml="", *options):
    file = tmp_path / "config.yaml"
    base = Path(__file__).parents[3] / "configs" / "base" / "backbone.yaml"
    file.write_text(f"_BASE_: {base}\n{yaml}")
    return load_config(
        str(file), ["MODEL.BACKBONE.ARCH", "se_resnet18", "MODEL.WEIGHTS", str(path), *options]
    )


def test_options_with_another_file_reset_the_keys_of_the_configs_file(tmp_path):
    text = "MODEL: {WEIGHTS: a.pth, WEIGHTS_PREFIX: encoder_q., WEIGHTS_HEAD: ignore}\n"
    (tmp_path / "config.yaml").write_text(text)
    path = str(tmp_path / "config.yaml")
    same = load_config(path, ["MODEL.WEIGHTS", "a.pth"]).MODEL
    assert (same.WEIGHTS_PREFIX, same.WEIGHTS_HEAD) == ("encoder_q.", "ignore")
    other = load_config(path, ["MODEL.WEIGHTS", "b.pth", "MODEL.WEIGHTS_PREFIX", "x"]).MODEL
    assert (other.WEIGHTS_PREFIX, other.WEIGHTS_HEAD) == ("x", "strict")


def _legacy(path):
    """Save timm's legacy_seresnet18, whose stem pool uses ceil mode."""
    return save(peer("timm", "legacy_seresnet18"), path)


@pytest.mark.long
def test_stated_values_override_a_guess_but_inherited_ones_do_not(tmp_path, caplog):
    path = _legacy(tmp_path / "a.pth")
    caplog.set_level("INFO", "senet_transfer")

    cfg = _config(tmp_path, path)
    apply_file_geometry(cfg)
    assert cfg.MODEL.RESNETS.STEM_POOL == "ceil"  # overrides configs/base
    assert "as stated" not in caplog.text

    text = "MODEL:\n  PIXEL_MEAN: [127.5, 127.5, 127.5]\n  RESNETS: {STEM_POOL: pad}\n"
    options = ("MODEL.PIXEL_MEAN", str(_HALF), "MODEL.RESNETS.STEM_POOL", "pad")
    for cfg in (_config(tmp_path, path, text), _config(tmp_path, path, "", *options)):
        caplog.clear()
        apply_file_geometry(cfg)
        assert cfg.MODEL.PIXEL_MEAN == _HALF
        assert cfg.MODEL.RESNETS.STEM_POOL == "pad"
        assert "stem_pool is pad, as specified" in caplog.text
        # A run's config.yaml contains all keys, but still marks these as set by the user.
        (tmp_path / "run.yaml").write_text(cfg.dump())
        again = load_config(str(tmp_path / "run.yaml"))
        assert again.MODEL.WEIGHTS_KEEP == cfg.MODEL.WEIGHTS_KEEP

    cfg = _config(tmp_path, path, "", "MODEL.WEIGHTS_PIN", "True")
    apply_file_geometry(cfg)
    assert cfg.MODEL.RESNETS.STEM_POOL == "pad"  # as explained in configs/base
    (tmp_path / "run.yaml").write_text(load_config("").dump())
    assert load_config(str(tmp_path / "run.yaml")).MODEL.WEIGHTS_KEEP == []


@pytest.mark.long
def test_a_stated_mean_gives_the_logits_of_that_mean(tmp_path):
    network = peer("torchvision", "resnet18")
    path = save(network, tmp_path / "a.pth")
    options = ["MODEL.PIXEL_MEAN", str(_HALF), "MODEL.PIXEL_STD", str(_HALF)]
    found = find_model("resnet18", weights=str(path), options=options)
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = network((image / 255 - 0.5) / 0.5)
        logits = found.build().model({"image": image})
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.long
def test_stated_values_that_contradict_the_files_metadata_are_an_error(tmp_path):
    backbone = create_backbone("se_resnet18", stem_pool="ceil", se_divisor=8)
    save_weights(randomise(backbone), tmp_path / "own.pth")
    options = ("MODEL.RESNETS.STEM_POOL", "pad")
    with pytest.raises(UserError, match=r"Your config sets.*(?s:.*)STEM_POOL: pad, but ceil"):
        apply_file_geometry(_config(tmp_path, tmp_path / "own.pth", "", *options))
    with pytest.raises(UserError, match="WEIGHTS_PIN is True"):
        apply_file_geometry(
            _config(tmp_path, tmp_path / "own.pth", "", "MODEL.WEIGHTS_PIN", "True")
        )
    with pytest.raises(UserError, match="stem_pool='pad' contradicts"):
        create_backbone("se_resnet18", weights=tmp_path / "own.pth", stem_pool="pad")


@pytest.mark.long
def test_an_argument_wins_against_a_guess(tmp_path):
    path = _legacy(tmp_path / "a.pth")
    backbone = create_backbone("se_resnet18", weights=path, stem_pool="pad", se_relu_before=False)
    assert backbone.stem.pool == "pad"
    assert not backbone.res2[0].relu_before
    assert create_backbone("se_resnet18", weights=path).stem.pool == "ceil"


# Settings from the publisher.


@pytest.mark.long
def test_every_published_file_has_the_preprocessing_that_timm_states():
    models = pytest.importorskip("timm").models
    data = pytest.importorskip("timm.data")
    differing = 0
    for name, entry in load_catalogue().items():
        if entry.family not in ("timm", "timm_legacy"):
            continue
        theirs = name.partition("/")[2]
        theirs = f"legacy_{theirs}.in1k" if entry.family == "timm_legacy" else theirs
        stated = models.get_pretrained_cfg(theirs).to_dict()
        resolved = data.resolve_data_config(pretrained_cfg=stated)
        transform = data.create_transform(**resolved)
        ours = _published(entry)
        assert ours.resize == transform.transforms[0].size, name
        assert ours.crop == transform.transforms[1].size[0], name
        assert ours.interpolation == resolved["interpolation"], name
        assert ours.mean == pytest.approx([255 * value for value in resolved["mean"]]), name
        assert ours.std == pytest.approx([255 * value for value in resolved["std"]]), name
        differing += bool(entry.view)
    assert differing == 31  # 30 timm networks and legacy_seresnet18


def _published(entry: Entry) -> Preprocessing:
    from senet_transfer.weights import FAMILIES

    network = "inception_resnet_v2" if "inception" in entry.model else ""
    architecture = Architecture((), False, 1, 64, False, (), 0, 1, True, 1000, network)
    return replace(FAMILIES[entry.family].preprocessing(architecture), **entry.view)


def test_a_published_file_is_known_by_its_name_and_hash(tmp_path, monkeypatch):
    import hashlib

    raw = _write(tmp_path / "x.pth").read_bytes()
    digest = hashlib.sha256(raw).hexdigest()[:8]
    path = tmp_path / f"resnet18-{digest}.pth"
    path.write_bytes(raw)
    view = {"resize": 168, "crop": 160}
    entry = Entry("timm/x", "", path.name, digest, "timm", "resnet18", view=view)
    monkeypatch.setitem(load_catalogue(), "timm/x", entry)
    source = examine(path)
    assert source.family.name == "timm"
    assert source.preprocessing == Preprocessing(resize=168, crop=160, interpolation="bicubic")
    assert source.lookalikes == ()
    assert examine(path, "torchvision_v1").preprocessing == Preprocessing()
    path.write_bytes(_write(tmp_path / "x.pth", epoch=3).read_bytes())
    assert examine(path).family.name == "torchvision_v1"  # a different file with the same name


# Other numbers of classes.


def test_another_number_of_classes_is_reported_first_with_a_remedy(tmp_path):
    save_weights(create_classifier("cifar_resnet8", 8), tmp_path / "own.pth")
    found = find_model(
        "cifar_resnet8", weights=str(tmp_path / "own.pth"),
        options=["MODEL.CLASSIFIER.NUM_CLASSES", "5"],
    )  # fmt: skip
    with pytest.raises(UserError) as error:
        found.build()
    first, _, rest = str(error.value).partition("\n")
    assert "contains a classifier for 8 classes, but the model has 5" in first
    assert "linear.weight" in rest


@pytest.mark.parametrize("value", ["['MODEL.PIXEL_MEANS']", "[['MODEL.PIXEL_MEAN']]", "[3]"])
def test_only_keys_that_a_file_would_change_are_kept(value):
    with pytest.raises(UserError, match=r"MODEL.WEIGHTS_KEEP (contains|is) .*; expected"):
        load_config("", ["MODEL.WEIGHTS_KEEP", value])


def test_none_for_the_kept_keys_is_an_empty_list():
    assert load_config("", ["MODEL.WEIGHTS_KEEP", "None"]).MODEL.WEIGHTS_KEEP == []
