"""Tests for Faster R-CNN with FPN, with each backbone that supports FPN."""

import pytest
from detectron2.utils.events import EventStorage

from senet_transfer import UserError, create_backbone, list_models
from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer
from senet_transfer.models.registry import model_entry

CLASSIFIER = "places365_wideresnet18"
PYRAMIDS = [
    name
    for name in list_models()
    if model_entry(name).preprocessing.crop > 32 and name != CLASSIFIER
]
ONE_A_FAMILY = [
    "se_bn_inception",
    "se_inception_resnet_v2",
    "se_mobilenet",
    "se_shufflenet_g3",
    "se_vgg16_bn",
]


def keys_of(name: str) -> dict[str, str]:
    entry = model_entry(name)
    return {"MODEL.BACKBONE.ARCH": name, "MODEL.SE.ENABLED": str(entry.has_se)}


@pytest.mark.parametrize(
    "name",
    [
        *ONE_A_FAMILY,
        *(pytest.param(n, marks=pytest.mark.slow) for n in PYRAMIDS if n not in ONE_A_FAMILY),
    ],
)
@pytest.mark.long
def test_every_network_under_an_fpn_trains_a_step_and_is_evaluated(name, command):
    cfg = setup(command(**keys_of(name)))
    model = Trainer.build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with EventStorage():
        losses = model(next(iter(Trainer.build_train_loader(cfg))))
    sum(losses.values()).backward()
    optimizer.step()
    changed = [
        not parameter.equal(old) for parameter, old in zip(model.parameters(), before, strict=True)
    ]
    # The second layer of a new gate has zero weights, so its first layer has zero gradients.
    assert sum(changed) > 0.6 * len(changed)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert 0 <= Trainer.test(cfg, model)["bbox"]["AP"] <= 100


def test_only_networks_for_small_images_lack_fpn_feature_maps():
    others = set(list_models()) - {*PYRAMIDS, CLASSIFIER}
    assert others
    assert all(name.removeprefix("se_").startswith(("cifar", "wrn", "shake")) for name in others)


@pytest.mark.long
def test_a_network_with_feature_maps_of_other_strides_is_for_classification_only(command):
    with pytest.raises(UserError, match="for classification only"):
        Trainer.build_model(setup(command(**keys_of(CLASSIFIER))))


@pytest.mark.long
def test_a_detector_uses_the_inception_resnet_with_aligned_feature_maps(command):
    cfg = setup(command(**keys_of("inception_resnet_v2")))
    backbone = Trainer.build_model(cfg).backbone.bottom_up
    aligned = create_backbone("inception_resnet_v2", padding="same", out_features=["res2"])
    first = "0.conv"
    assert backbone.stem.get_submodule(first).padding == (1, 1)
    assert backbone.stem.get_submodule(first).padding == aligned.stem.get_submodule(first).padding
    cfg.defrost()
    cfg.MODEL.BACKBONE.PADDING = "valid"
    with pytest.raises(UserError, match=r"MODEL.BACKBONE.PADDING is 'valid'.*Set it to 'same'"):
        Trainer.build_model(cfg)
