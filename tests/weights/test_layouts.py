"""Tests that checkpoints of other projects load, or raise an error that suggests a fix."""

import json
import re

import pytest
import safetensors.torch
import torch
from detectron2.modeling import build_model

from senet_transfer import UserError, apply_file_geometry, create_backbone, create_classifier
from senet_transfer.config.load import load_config
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer
from senet_transfer.export.conversion import convert_file
from senet_transfer.weights.choice import config_choice
from senet_transfer.weights.formats.reader import read_tensors
from tests.weights import layouts
from tests.weights.detectors import config
from tests.weights.layouts import FLAT_WRITERS, WIDTH, prefixed, tiny, write_shards
from tests.weights.peers import peer

_SIZE = {"stem_out_channels": WIDTH, "res2_out_channels": WIDTH}
_IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def _logits(path, **choice):
    model = create_classifier("resnet18", 5, weights=path, **choice, **_SIZE).eval()
    with torch.no_grad():
        return model(_IMAGES)


def _assert_is(peer, path, **choice):
    """Check that a classifier loaded from a file computes the same logits as the original."""
    with torch.no_grad():
        expected = peer.eval()(_IMAGES)
    torch.testing.assert_close(_logits(path, **choice), expected, rtol=1e-4, atol=1e-4)


def _assert_backbone_is(peer, path, **choice):
    backbone = create_backbone("resnet18", weights=path, **choice, **_SIZE).eval()
    with torch.no_grad():
        expected = peer.eval().features(_IMAGES)
        torch.testing.assert_close(backbone(_IMAGES)["res5"], expected, rtol=1e-4, atol=1e-4)


# Prefixes, which work in the same way in all formats.

_PREFIXES = [
    *("", "module.", "_orig_mod.", "model.", "net.", "encoder.", "backbone.", "student."),
    *("module._orig_mod.", "_orig_mod.module.", "model.module.", "module.model.backbone."),
    *("_fsdp_wrapped_module.", "model._fsdp_wrapped_module.", "_forward_module.model."),
]


@pytest.mark.parametrize("kind", FLAT_WRITERS)
@pytest.mark.parametrize("prefix", _PREFIXES)
@pytest.mark.long
def test_a_network_behind_a_prefix_loads_in_every_format(prefix, kind, tmp_path):
    FLAT_WRITERS[kind](prefixed(prefix, (peer := tiny()).state_dict()), tmp_path / "a")
    _assert_is(peer, tmp_path / "a")


@pytest.mark.parametrize("kind", FLAT_WRITERS)
def test_wrappers_inside_the_network_and_counters_are_left_out(kind, tmp_path):
    state = (peer := tiny()).state_dict()
    state = {
        f"layer3._fsdp_wrapped_module.{n[7:]}" if n.startswith("layer3.") else n: t
        for n, t in state.items()
    }
    state = {
        n.replace("layer4.0.", "layer4.0._checkpoint_wrapped_module._orig_mod."): t
        for n, t in state.items()
    }
    FLAT_WRITERS[kind](
        {"n_averaged": torch.tensor(4), **prefixed("module.", state)}, tmp_path / "a"
    )
    _assert_is(peer, tmp_path / "a")
    assert "n_averaged" in read_tensors(tmp_path / "a").dropped


@pytest.mark.parametrize("kind", FLAT_WRITERS)
@pytest.mark.long
def test_several_networks_are_named_and_one_can_be_chosen(kind, tmp_path):
    student, teacher = tiny(1), tiny(2)
    path = tmp_path / "a"
    FLAT_WRITERS[kind](
        prefixed("student.", student.state_dict()) | prefixed("teacher.", teacher.state_dict()),
        path,
    )
    with pytest.raises(UserError, match=r"2 networks.* student\., teacher\..*WEIGHTS_PREFIX"):
        _logits(path)
    _assert_is(student, path, prefix="student.")
    _assert_is(teacher, path, prefix="teacher")
    with pytest.raises(UserError, match=r"no tensors with the prefix 'online'.*student, teacher"):
        _logits(path, prefix="online")


@pytest.mark.parametrize("outer", ["model", "net", "teacher"])
@pytest.mark.long
def test_a_prefix_can_be_the_same_word_as_the_key_of_its_state_dict(outer, tmp_path):
    first, second = tiny(1), tiny(2)
    inside = prefixed(f"{outer}.", first.state_dict()) | prefixed("aux.", second.state_dict())
    torch.save({outer: inside, "epoch": 3}, path := tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"2 networks.* {outer}\., aux\."):
        _logits(path)
    for prefix in (f"{outer}.", outer, f"{outer}.{outer}."):
        _assert_is(first, path, prefix=prefix)
    for prefix in ("aux.", f"{outer}.aux."):
        _assert_is(second, path, prefix=prefix)


_HEADS = [["fc.1.weight"], ["fc.0.weight", "fc.2.bias"], ["projector.0.weight"]]


@pytest.mark.parametrize(
    "prefix", ["backbone.", "model.backbone.", "student.backbone.", "encoder."]
)
@pytest.mark.long
def test_a_head_in_the_backbone_s_module_can_be_ignored(prefix, tmp_path):
    peer, path = tiny(), tmp_path / "a.pth"
    body = {n: t for n, t in peer.state_dict().items() if not n.startswith("fc.")}
    for head in _HEADS:
        torch.save(prefixed(prefix, body | dict.fromkeys(head, torch.ones(4, 4))), path)
        with pytest.raises(UserError, match="head='ignore'"):
            create_backbone("resnet18", weights=path, **_SIZE)
        _assert_backbone_is(peer, path, head="ignore")
    torch.save(prefixed(prefix, body | {"layer5.0.weight": torch.ones(4)}), path)
    with pytest.raises(UserError, match=r"1 unexpected: .*layer5\.0"):
        create_backbone("resnet18", weights=path, head="ignore", **_SIZE)


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [("model.module.", ""), ("module.module.", ""), ("ema.module.", "ema."), ("a.ema_model.", "a")],
)
@pytest.mark.parametrize("kind", FLAT_WRITERS)
@pytest.mark.long
def test_counters_behind_a_prefix_are_left_out(wrapper, prefix, kind, tmp_path):
    outer, _, _ = wrapper.removesuffix(".").rpartition(".")
    state = prefixed(wrapper, (peer := tiny()).state_dict())
    counter = "n_averaged" if "module" in wrapper else "step"
    state |= {f"{outer}.{counter}": torch.tensor(4)}
    if prefix:
        state |= {"other.weight": torch.ones(2)}
    FLAT_WRITERS[kind](state, tmp_path / "a")
    _assert_is(peer, tmp_path / "a", prefix=prefix)


@pytest.mark.parametrize(
    "rest", ["criterion.weight", "model_ema.conv1weight", "logit_scale", "normalize.mean"]
)
@pytest.mark.long
def test_the_advice_for_tensors_outside_a_prefix_keeps_the_classifier(rest, tmp_path):
    state = prefixed("net.model.", (peer := tiny()).state_dict()) | {rest: torch.ones(3)}
    torch.save(layouts.lightning(state), path := tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="with its classifier, set prefix='(.*?)'") as error:
        _logits(path)
    advice = re.search("prefix='(.*?)'", str(error.value))
    _assert_is(peer, path, prefix=advice[1])


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
@pytest.mark.parametrize("parts", [r"(layer\d\.)", r"(layer1\.|layer4\.)", r"(layer\d\.\d\.)"])
@pytest.mark.long
def test_parts_of_a_network_wrapped_by_data_parallel(prefix, parts, tmp_path):
    state = (peer := tiny()).state_dict()
    state = {re.sub(rf"^{parts}", r"\1module.", name): tensor for name, tensor in state.items()}
    torch.save({"arch": "resnet18", "state_dict": prefixed(prefix, state)}, tmp_path / "a.pth")
    _assert_is(peer, tmp_path / "a.pth")


@pytest.mark.long
def test_vgg_with_parallel_features_as_saved_by_pytorch_s_imagenet_example(tmp_path):
    state = (network := peer("torchvision", "vgg16_bn")).state_dict()
    state = {n.replace("features.", "features.module."): t for n, t in state.items()}
    torch.save({"arch": "vgg16_bn", "state_dict": state}, path := tmp_path / "a.pth")
    with torch.no_grad():
        found = create_classifier("vgg16_bn", weights=path).eval()(images := _IMAGES)
        torch.testing.assert_close(found, network(images), rtol=1e-3, atol=1e-3)


def test_flat_parameters_of_fsdp_are_an_error_with_a_remedy(tmp_path):
    torch.save({"_fsdp_wrapped_module._flat_param": torch.ones(9)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="FULL_STATE_DICT"):
        _logits(tmp_path / "a.pth")


# Training scripts.


def test_timm_s_checkpoints(tmp_path):
    path = tmp_path / "checkpoint-3.pth.tar"
    torch.save(layouts.timm_train(peer := tiny()), path)
    _assert_is(peer, path)


def test_torchvision_s_checkpoints(tmp_path):
    path = tmp_path / "model_3.pth"
    torch.save(layouts.torchvision_references(peer := tiny()), path)
    _assert_is(peer, path)


@pytest.mark.parametrize("prefix", ["", "model.", "net.", "backbone.", "model._orig_mod."])
def test_lightning_s_checkpoints(prefix, tmp_path):
    path = tmp_path / "epoch=3.ckpt"
    torch.save(layouts.lightning(prefixed(prefix, (peer := tiny()).state_dict())), path)
    _assert_is(peer, path)


def test_lightning_with_a_loss_with_weights_is_an_error_with_a_remedy(tmp_path):
    state = prefixed("model.", (peer := tiny()).state_dict())
    path = tmp_path / "a.ckpt"
    torch.save(layouts.lightning(state | {"criterion.weight": torch.ones(5)}), path)
    with pytest.raises(UserError, match=r"criterion\.weight"):
        _logits(path)
    _assert_is(peer, path, prefix="model.")


def test_mmengine_s_checkpoints(tmp_path):
    state = prefixed("backbone.", (peer := tiny()).state_dict())
    state = {name.replace("backbone.fc.", "head.fc."): t for name, t in state.items()}
    torch.save(layouts.mmengine(state), tmp_path / "epoch_3.pth")
    _assert_is(peer, tmp_path / "epoch_3.pth")


@pytest.mark.long
def test_moco_s_checkpoints(tmp_path):
    query, key = tiny(1, classes=32), tiny(2, classes=32)
    path = tmp_path / "checkpoint_0003.pth.tar"
    torch.save(layouts.moco(query, key), path)
    with pytest.raises(UserError, match=r"encoder_q\., encoder_k\..*prefix="):
        create_backbone("resnet18", weights=path, **_SIZE)
    _assert_backbone_is(query, path, prefix="encoder_q.")
    _assert_backbone_is(key, path, prefix="encoder_k.")
    # In MoCo v2, an MLP replaces the linear layer.
    query.fc = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 9))
    torch.save(layouts.moco(query, key), path)
    with pytest.raises(UserError, match=r"head='ignore' \(in a config, MODEL.WEIGHTS_HEAD"):
        create_backbone("resnet18", weights=path, prefix="encoder_q.", **_SIZE)
    _assert_backbone_is(query, path, prefix="encoder_q.", head="ignore")


@pytest.mark.long
def test_a_detector_starts_from_one_network_of_a_file_by_its_config(tmp_path):
    state = {}
    for start, seed in (("encoder_q.", 1), ("encoder_k.", 2)):
        network = peer("torchvision", "resnet18", seed)
        network.fc = torch.nn.Sequential(torch.nn.Linear(512, 8), torch.nn.ReLU())
        state |= prefixed(f"module.{start}", network.state_dict())
    torch.save({"arch": "resnet18", "state_dict": state}, path := tmp_path / "moco.pth.tar")
    cfg = config("resnet18")
    cfg.MODEL.WEIGHTS = str(path)
    with pytest.raises(UserError, match="WEIGHTS_PREFIX"):
        apply_file_geometry(cfg)
    cfg.MODEL.WEIGHTS_PREFIX, cfg.MODEL.WEIGHTS_HEAD = "encoder_k.", "ignore"
    apply_file_geometry(cfg)
    model = build_model(cfg)
    Checkpointer(model, choice=config_choice(cfg)).load(cfg.MODEL.WEIGHTS, [])
    loaded = model.state_dict()["backbone.bottom_up.res5.0.conv1.weight"]
    assert torch.equal(loaded, state["module.encoder_k.layer4.0.conv1.weight"])


@pytest.mark.long
def test_dino_s_checkpoints(tmp_path):
    student, teacher = tiny(1), tiny(2)
    path = tmp_path / "checkpoint.pth"
    torch.save(layouts.dino(student, teacher), path)
    with pytest.raises(UserError, match=r"student\.module\.backbone\., teacher\.backbone\."):
        create_backbone("resnet18", weights=path, **_SIZE)
    with pytest.raises(UserError, match=r"head='ignore'"):
        create_backbone("resnet18", weights=path, prefix="teacher.", **_SIZE)
    _assert_backbone_is(teacher, path, prefix="teacher", head="ignore")
    _assert_backbone_is(student, path, prefix="student.", head="ignore")
    _assert_backbone_is(teacher, path, prefix="teacher.backbone.")


@pytest.mark.long
def test_solo_learn_s_checkpoints_have_a_second_backbone(tmp_path):
    online, target = tiny(1), tiny(2)
    state = prefixed("backbone.", online.state_dict())
    state |= prefixed("momentum_backbone.", target.state_dict())
    state |= {"projector.0.weight": torch.ones(4, 64), "classifier.weight": torch.ones(5, 64)}
    torch.save(layouts.lightning(state), path := tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"backbone\., momentum_backbone\."):
        create_backbone("resnet18", weights=path, head="ignore", **_SIZE)
    _assert_backbone_is(target, path, prefix="momentum_backbone.")


@pytest.mark.long
def test_a_backbone_of_a_detector_of_torchvision(tmp_path):
    state = prefixed("backbone.body.", (peer := tiny()).state_dict())
    state |= {"backbone.fpn.inner_blocks.0.0.weight": torch.ones(4, 64, 1, 1)}
    state |= {"rpn.head.conv.0.0.weight": torch.ones(4, 4, 3, 3)}
    torch.save({"model": state}, path := tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"prefix='backbone\.body\.'.*head='ignore'"):
        create_backbone("resnet18", weights=path, **_SIZE)
    _assert_backbone_is(peer, path, head="ignore")
    _assert_is(peer, path, prefix="backbone.body.")


@pytest.mark.long
def test_one_network_of_a_file_can_be_converted(tmp_path):
    torch.save(layouts.moco(query := tiny(1), tiny(2)), path := tmp_path / "moco.pth.tar")
    with pytest.raises(UserError, match=r"encoder_q\., encoder_k\."):
        convert_file(str(path), tmp_path / "own.pth")
    convert_file(str(path), tmp_path / "own.pth", prefix="encoder_q.", check=True)
    _assert_backbone_is(query, tmp_path / "own.pth")


@pytest.mark.long
def test_swav_s_checkpoints(tmp_path):
    path = tmp_path / "ckp-3.pth"
    torch.save(layouts.swav(peer := tiny()), path)
    with pytest.raises(UserError, match=r"projection_head.*|head='ignore'"):
        create_backbone("resnet18", weights=path, **_SIZE)
    _assert_backbone_is(peer, path, head="ignore")


@pytest.mark.long
def test_deepspeed_s_checkpoints(tmp_path):
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save(layouts.deepspeed((peer := tiny()).state_dict()), path)
    _assert_is(peer, path)
    state = prefixed("module.model.", peer.state_dict())
    callbacks = {"ModelCheckpoint{}": {"best_model_score": torch.tensor(0.5)}}
    extra = {"callbacks": callbacks, "frozen_param_fragments": dict(list(state.items())[:9])}
    torch.save(layouts.deepspeed(state) | extra, path)  # as Lightning's DeepSpeedStrategy
    _assert_is(peer, path)
    torch.save(layouts.deepspeed(peer.state_dict(), zero3=True), path)
    with pytest.raises(UserError, match=r"ZeRO-3.*zero_to_fp32\.py"):
        _logits(path)


@pytest.mark.parametrize("head", [["layer4.2.conv1.weight"], ["conv2.weight"], ["layer5.0.x"]])
def test_a_part_of_the_backbone_is_never_ignored_as_a_head(head, tmp_path):
    state = tiny().state_dict() | dict.fromkeys(head, torch.ones(3))
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=f"1 unexpected: {re.escape(head[0])}"):
        create_backbone("resnet18", weights=tmp_path / "a.pth", head="ignore", **_SIZE)


# Averaged weights.


@pytest.mark.long
def test_ema_weights_are_chosen_like_the_projects_default_or_on_request(tmp_path):
    plain, ema = tiny(1), tiny(2)
    content = {
        "timm": (layouts.timm_train(plain, ema), ema),
        "torchvision": (layouts.torchvision_references(plain, ema), plain),
        "mmengine": (layouts.mmengine(plain.state_dict(), ema.state_dict()), ema),
        "lightning": (
            layouts.lightning_averaging(
                prefixed("model.", plain.state_dict()), prefixed("model.", ema.state_dict())
            ),
            ema,
        ),
        "basicsr": ({"params": plain.state_dict(), "params_ema": ema.state_dict()}, plain),
        "next to": ({"model": plain.state_dict(), "ema": ema.state_dict()}, plain),
        "ema_state_dict": (
            {"model": plain.state_dict(), "ema_state_dict": ema.state_dict(), "epoch": 3},
            plain,
        ),
        "rt-detr": (
            {"model": plain.state_dict(), "ema": {"module": ema.state_dict(), "updates": 5}},
            plain,
        ),
    }
    for name, (tree, default) in content.items():
        path = tmp_path / f"{name}.pth"
        torch.save(tree, path)
        _assert_is(default, path)
        _assert_is(default, path, ema="auto")
        _assert_is(plain, path, ema=False)
        _assert_is(ema, path, ema=True)
        note = " ".join(read_tensors(path).notes)
        assert "(MODEL.WEIGHTS_EMA)" in note, name


_AVERAGED = [
    *("model_avg", "model_averaged", "average_state_dict", "averaged_state_dict", "shadow"),
    *("model_moving_average", "polyak", "Ema", "modelEMA"),
]


@pytest.mark.parametrize("key", _AVERAGED)
@pytest.mark.long
def test_averaged_weights_are_recognised_by_the_words_in_their_key(key, tmp_path):
    plain, ema = tiny(1), tiny(2)
    torch.save({"model": plain.state_dict(), key: ema.state_dict()}, path := tmp_path / "a.pth")
    _assert_is(plain, path)
    _assert_is(ema, path, ema=True)
    assert f"({key})" in " ".join(read_tensors(path).notes)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"decay": 0.9, "shadow_params": [torch.ones(3), torch.ones(2)]}, "list of tensors"),
        (torch.nn.Linear(2, 2), r"object of the class torch\.nn\.modules\.linear\.Linear"),
    ],
)
def test_averaged_weights_that_cannot_be_loaded_are_reported(value, words, tmp_path):
    torch.save({"model": (peer := tiny()).state_dict(), "ema": value}, path := tmp_path / "a.pth")
    _assert_is(peer, path)
    assert re.search(words, " ".join(read_tensors(path).notes))
    with pytest.raises(UserError, match=f"can't be loaded: ema is .*{words}"):
        _logits(path, ema=True)


@pytest.mark.parametrize("kind", FLAT_WRITERS)
@pytest.mark.long
def test_averaged_weights_in_flat_files_name_the_choice(kind, tmp_path):
    plain, ema, path = tiny(1), tiny(2), tmp_path / "a"
    state = prefixed("ema_model.", ema.state_dict()) | prefixed("online_model.", plain.state_dict())
    FLAT_WRITERS[kind](state | {"initted": torch.tensor(True), "step": torch.tensor(3)}, path)
    with pytest.raises(UserError, match=r"prefix='ema_model\.'.*instead of ema=True"):
        _logits(path, ema=True)
    _assert_is(ema, path, prefix="ema_model.", ema=True)
    _assert_is(plain, path, prefix="online_model.")
    copies = {f"ema_{n.replace('.', '_')}": t for n, t in ema.state_dict().items()}
    FLAT_WRITERS[kind](plain.state_dict() | copies, path)
    _assert_is(plain, path)
    with pytest.raises(UserError, match="mmcv's EMAHook.*CheckpointHook.*Remove ema=True"):
        _logits(path, ema=True)


# Files with several networks, or with other entries next to a network.


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("model", "teacher"),
        ("state_dict", "best_state_dict"),
        ("model", "net"),
        ("encoder", "momentum_encoder"),
        ("online", "momentum"),
    ],
)
@pytest.mark.long
def test_another_network_in_the_file_is_reported_with_its_prefix(key, other, tmp_path):
    peers = {other: tiny(2), key: tiny(1)}
    torch.save({k: m.state_dict() for k, m in peers.items()}, path := tmp_path / "a.pth")
    _assert_is(peers[key], path)
    assert any(f"prefix='{other}'" in note for note in read_tensors(path).notes)
    _assert_is(peers[other], path, prefix=other)


_RANDOM_STATE = torch.get_rng_state()
_STATES = {name: torch.ones_like(tensor) for name, tensor in tiny().state_dict().items()}
_NEXT_TO_A_NETWORK = {
    "random state in a dictionary": ("network", {"rng": {"cpu": _RANDOM_STATE}}),
    "random state": ("resnet", {"rng_state": _RANDOM_STATE}),
    "metrics": ("weights", {"metrics": {"acc": torch.tensor([0.5, 0.6])}}),
    "metric": ("classifier", {"best_acc": torch.tensor(0.5)}),
    "class weights": ("encoder", {"class_weights": torch.ones(5)}),
    "optimizer by name": ("network", {"opt": {"state": _STATES}}),
    **{
        f"key {key}": (key, {})
        for key in ("example_model", "sample_net", "semantic_net", "momentum_encoder")
    },
}


@pytest.mark.parametrize("name", _NEXT_TO_A_NETWORK)
@pytest.mark.long
def test_a_network_under_any_key_is_found_next_to_other_tensors(name, tmp_path):
    key, others = _NEXT_TO_A_NETWORK[name]
    torch.save({key: (peer := tiny()).state_dict(), **others}, path := tmp_path / "a.pth")
    _assert_is(peer, path)
    assert not read_tensors(path).notes


@pytest.mark.parametrize("key", ["ema", "ema_state_dict", "params_ema", "model_ema", "swa_model"])
def test_a_file_with_averaged_weights_only(key, tmp_path):
    path = tmp_path / "a.pth"
    torch.save({key: (peer := tiny()).state_dict(), "epoch": 3, "rng": {"cpu": [1]}}, path)
    _assert_is(peer, path)
    with pytest.raises(UserError, match="only EMA weights"):
        _logits(path, ema=False)
    torch.save({"model": peer.state_dict()}, path)
    with pytest.raises(UserError, match="no EMA weights"):
        _logits(path, ema=True)


# Unusual dtypes, shapes and values.


@pytest.mark.parametrize("kind", FLAT_WRITERS)
@pytest.mark.long
def test_half_precision_and_odd_counters_of_batches(kind, tmp_path):
    peer = tiny()
    half, seven = torch.tensor(7.0).half(), torch.tensor([7])
    overflow, unequal = torch.tensor(float("inf")).half(), torch.tensor([1, 2])
    counters = [half, seven, overflow, unequal, half[None, None], seven.repeat(2), torch.zeros(0)]
    for counter in counters:
        state = {
            n: counter if n.endswith("num_batches_tracked") else t
            for n, t in peer.state_dict().items()
        }
        FLAT_WRITERS[kind]({n: t.clone() for n, t in state.items()}, tmp_path / "a")
        _assert_is(peer, tmp_path / "a")
    rounded = tiny()
    rounded.load_state_dict({n: t.half() for n, t in peer.state_dict().items()})
    FLAT_WRITERS[kind]({n: t.half() for n, t in peer.state_dict().items()}, tmp_path / "a")
    _assert_is(rounded, tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("kind", FLAT_WRITERS)
@pytest.mark.long
def test_float8_is_converted(dtype, kind, tmp_path):
    state = (peer := tiny()).state_dict()
    small = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    FLAT_WRITERS[kind](small, tmp_path / "a")
    peer.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in small.items()})
    _assert_is(peer, tmp_path / "a")
    # Scaled weights can't be converted, because the meaning of the scales is unknown.
    FLAT_WRITERS[kind](small | {"conv1.weight_scale": torch.ones(1)}, tmp_path / "a")
    with pytest.raises(UserError, match="conv1.weight_scale"):
        _logits(tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.uint64])
@pytest.mark.parametrize("kind", FLAT_WRITERS)
def test_a_variance_of_another_dtype_is_rejected(dtype, kind, tmp_path):
    state = tiny().state_dict()
    FLAT_WRITERS[kind](state | {"bn1.running_var": torch.ones(WIDTH).to(dtype)}, tmp_path / "a")
    with pytest.raises(UserError, match=f"running_var .{str(dtype)[6:]} in the file"):
        _logits(tmp_path / "a")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", FLAT_WRITERS)
def test_weights_of_a_diverged_training_are_rejected_in_every_format(kind, value, tmp_path):
    state = tiny().state_dict()
    state["layer2.0.conv1.weight"][0, 0, 0, 0] = value
    FLAT_WRITERS[kind](state, tmp_path / "a")
    with pytest.raises(UserError, match=r"invalid values: layer2\.0\.conv1\.weight"):
        _logits(tmp_path / "a")


# Folders and shards.


def test_a_sharded_model_loads_from_its_index(tmp_path):
    index = write_shards(prefixed("model.", (peer := tiny()).state_dict()), tmp_path)
    _assert_is(peer, index)
    with pytest.raises(UserError, match=r"split into 2 files.*model\.safetensors\.index\.json"):
        _logits(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"Hugging Face model folder.*safetensors\.index\.json"):
        _logits(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    whole = safetensors.torch.load_file(shard)
    safetensors.torch.save_file(dict(list(whole.items())[1:]), shard)
    with pytest.raises(UserError, match="does not contain exactly the tensors"):
        _logits(index)
    shard.unlink()
    with pytest.raises(UserError, match=r"missing from its folder: model-00002-of-00002"):
        _logits(index)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_sharded_model_of_timm_has_the_preprocessing_in_its_config(name, tmp_path):
    index = write_shards(tiny().state_dict(), tmp_path)
    index = index.rename(tmp_path / f"{name}.index.json")
    half, pretrained = [0.5] * 3, {"input_size": [3, 160, 160], "crop_pct": 0.95}
    pretrained |= {"mean": half, "std": half, "interpolation": "bicubic"}
    config = {"architecture": "resnet18", "pretrained_cfg": pretrained}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = create_backbone("resnet18", weights=index, **_SIZE).preprocessing
    assert (found.mean, found.std) == ((127.5,) * 3, (127.5,) * 3)
    assert (found.resize, found.crop, found.interpolation) == (168, 160, "bicubic")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"weight_map": {"a": "../x.safetensors"}}', "damaged.*not in the folder"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "damaged.*not in the folder"),
        ('{"weight_map": {"a": 3}}', "damaged"),
        ('{"weight_map": {"a": "x.bin"}}', "not safetensors"),
        ('{"weight_map": []}', "without a weight_map"),
        ('{"weight_map": ' + "[" * 9000, "damaged"),
        ("{", "damaged"),
    ],
)
def test_a_malformed_index_is_rejected(content, words, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        read_tensors(path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([".metadata", "__0_0.distcp"], "distributed checkpoint .*dcp_to_torch"),
        (["config.json", "model.safetensors"], r"Hugging Face.*Use .*/model\.safetensors\."),
        (["config.json", "pytorch_model.bin"], r"Hugging Face.*Use .*/pytorch_model\.bin\."),
        (["config.json", "README.md"], "Hugging Face.*no weights"),
        (["latest", "zero_to_fp32.py"], "DeepSpeed.*python zero_to_fp32.py"),
        (["mp_rank_00_model_states.pt"], r"DeepSpeed.*Use .*mp_rank_00_model_states\.pt"),
        (["zero_pp_rank_0_mp_rank_00_model_states.pt"], r"DeepSpeed.*zero_to_fp32\.py"),
        (["data.pkl", "version"], "unpacked torch.save file"),
        (["saved_model.pb"], "TensorFlow"),
        (["last.ckpt"], r"is a folder.*last\.ckpt"),
        ([], "Check the path"),
    ],
)
def test_a_folder_is_an_error_that_names_its_kind(files, words, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=words):
        create_backbone("resnet18", weights=tmp_path)
    with pytest.raises(UserError, match=words):
        _from_config(tmp_path)


def _from_config(path, *options):
    cfg = load_config("", ["MODEL.BACKBONE.ARCH", "resnet18", "MODEL.WEIGHTS", str(path), *options])
    return apply_file_geometry(cfg)
