"""Tests for the meta-architecture ImageClassifier.

They include comparisons with classifiers built by ``create_classifier``.
"""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from torchvision.transforms.v2 import CutMix, MixUp

from senet_transfer import UserError, create_classifier
from senet_transfer.config.load import load_config
from senet_transfer.models.image_classifier import ImageClassifier, wrap_classifier
from senet_transfer.preprocessing import Preprocessing

BASE = "configs/base/classification.yaml"


def build(**overrides) -> ImageClassifier:
    keys = {"MODEL.DEVICE": "cpu", "MODEL.CLASSIFIER.NUM_CLASSES": "7"}
    keys |= {"MODEL.BACKBONE.ARCH": "se_cifar_resnet8", "MODEL.RESNETS.NORM": "BN", **overrides}
    torch.manual_seed(0)
    return build_model(load_config(BASE, [word for item in keys.items() for word in item]))


def batch(images: int = 4, size: int = 32) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randint(256, (images, 3, size, size), generator=generator).byte(),
        "label": torch.arange(images) % 7,
        "key": [str(index) for index in range(images)],
    }


@pytest.mark.parametrize("name", ["resnet18", "se_resnet18", "se_resnext50_32x4d", "senet154"])
@pytest.mark.long
def test_weights_are_interchangeable_with_those_of_create_classifier(name):
    model = build(**{"MODEL.BACKBONE.ARCH": name})
    with torch.device("meta"):
        plain = create_classifier(name, 7)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert model.dropout.p == plain.dropout.p
    prefixes = {key.partition(".")[0] for key in model.state_dict()}
    assert prefixes == {"backbone", "linear"}


@pytest.mark.slow
def test_vggs_hidden_layers_equal_those_of_create_classifier():
    model = build(**{"MODEL.BACKBONE.ARCH": "vgg16_bn"})
    plain = create_classifier("vgg16_bn", 7)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert model.dropout.p == model.neck.dropout.p == 0.5
    assert {key.partition(".")[0] for key in model.state_dict()} == {"backbone", "neck", "linear"}


@pytest.mark.long
def test_a_classifier_has_the_published_inception_resnet():
    model = build(**{"MODEL.BACKBONE.ARCH": "inception_resnet_v2"}).eval()
    plain = create_classifier("inception_resnet_v2", 7).eval()
    plain.load_state_dict(model.state_dict())
    images = torch.randint(0, 256, (1, 3, 80, 80), dtype=torch.uint8)
    with torch.no_grad():
        expected = plain(model.normalise(images))
        torch.testing.assert_close(model({"image": images}), expected)


@pytest.mark.long
def test_a_backbone_described_by_resnets_keys_returns_its_last_stage():
    model = build(
        **{
            "MODEL.BACKBONE.ARCH": "",
            "MODEL.RESNETS.DEPTH": "50",
            "MODEL.SE.ENABLED": "True",
            "MODEL.RESNETS.OUT_FEATURES": "('res3',)",
        }
    )
    assert model.feature == "res5"
    assert model.linear.in_features == 2048
    assert any(".se." in key for key in model.state_dict())


@pytest.mark.long
def test_evaluation_logits_equal_the_classifiers_on_normalised_images():
    model = build(**{"MODEL.BACKBONE.ARCH": "se_resnet18"}).eval()
    plain = create_classifier("se_resnet18", 7).eval()
    plain.load_state_dict(model.state_dict())
    inputs = batch()
    mean, std = (
        torch.tensor(getattr(Preprocessing(), key)).view(3, 1, 1) for key in ("mean", "std")
    )
    with torch.no_grad():
        expected = plain((inputs["image"].float() - mean) / std)
        assert torch.equal(model(inputs), expected)
        assert torch.equal(wrap_classifier(plain).eval()(inputs), expected)


def test_a_bgr_backbone_gets_its_channels_reversed():
    model = build(**{"INPUT.FORMAT": "BGR", "MODEL.PIXEL_MEAN": "[104., 117., 123.]"})
    images = batch()["image"]
    bgr = images[:, [2, 1, 0]].float()
    mean = torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1)
    expected = (bgr - mean) / torch.tensor(Preprocessing().std).view(3, 1, 1)
    torch.testing.assert_close(model.normalise(images), expected, rtol=0, atol=0)


def test_several_views_of_an_image_give_the_mean_of_their_logits():
    model = build().eval()
    views = batch(6)["image"].view(2, 3, 3, 32, 32)
    with torch.no_grad():
        each = torch.stack([model({"image": views[:, view]}) for view in range(3)])
        torch.testing.assert_close(model({"image": views}), each.mean(0))


def logits_of(model: ImageClassifier, images: torch.Tensor) -> torch.Tensor:
    return model.linear(model.backbone(images)[model.feature].mean((2, 3)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_cross_entropy_with_smoothed_labels(smoothing):
    model = build(**{"MODEL.CLASSIFIER.LABEL_SMOOTHING": str(smoothing)})
    inputs = batch()
    log = logits_of(model, model.normalise(inputs["image"])).log_softmax(1)
    target = F.one_hot(inputs["label"], 7) * (1 - smoothing) + smoothing / 7
    (loss,) = model(inputs).values()
    torch.testing.assert_close(loss, -(target * log).sum(1).mean())


@pytest.mark.parametrize("mixup", ["0.0", "0.4"])
def test_class_weights_equal_those_of_cross_entropy(mixup):
    weights = [0.5, 2.0, 0.0, 1.0, 1.0, 3.0, 0.25]
    model = build(
        **{
            "MODEL.CLASSIFIER.CLASS_WEIGHTS": str(weights),
            "MODEL.CLASSIFIER.LABEL_SMOOTHING": "0.1",
            "MODEL.CLASSIFIER.MIXUP": mixup,
        }
    )
    assert "class_weights" not in model.state_dict()
    inputs = batch()
    images, target = model.normalise(inputs["image"]), inputs["label"]
    torch.manual_seed(5)
    if float(mixup):
        torch.randint(1, ())
        images, target = MixUp(alpha=0.4, num_classes=7)(images, target)
    logits = logits_of(model, images)
    expected = F.cross_entropy(logits, target, torch.tensor(weights), label_smoothing=0.1)
    torch.manual_seed(5)
    torch.testing.assert_close(model(inputs)["loss_cls"], expected)
    model.focal_gamma = 0.0
    torch.manual_seed(5)
    torch.testing.assert_close(model(inputs)["loss_cls"], expected)


def test_the_focal_loss_uses_the_config():
    options = {"MODEL.CLASSIFIER.LOSS": "focal", "MODEL.CLASSIFIER.FOCAL_GAMMA": "1.5"}
    model, inputs = build(**options), batch()
    logits = logits_of(model, model.normalise(inputs["image"])).double()
    p = logits.softmax(1)[torch.arange(4), inputs["label"]]
    expected = -((1 - p) ** 1.5 * p.log()).mean()
    torch.testing.assert_close(model(inputs)["loss_cls"].double(), expected, rtol=1e-5, atol=0)


def test_losses_and_weights_that_do_not_exist_are_rejected():
    with pytest.raises(UserError, match="LOSS is 'bce'; expected one of: cross_entropy, focal"):
        build(**{"MODEL.CLASSIFIER.LOSS": "bce"})
    with pytest.raises(UserError, match="contains 2 values; expected one for each of the 7"):
        build(**{"MODEL.CLASSIFIER.CLASS_WEIGHTS": "[1.0, 2.0]"})


@pytest.mark.parametrize(("key", "mix"), [("MIXUP", MixUp), ("CUTMIX", CutMix)])
def test_mixed_images_have_the_loss_of_mixed_labels(key, mix):
    model = build(**{f"MODEL.CLASSIFIER.{key}": "0.4"})
    inputs = batch()
    torch.manual_seed(5)
    torch.randint(1, ())
    images, target = mix(alpha=0.4, num_classes=7)(
        model.normalise(inputs["image"]), inputs["label"]
    )
    assert 0 < target.max(1).values.min() < 1
    expected = -(target * logits_of(model, images).log_softmax(1)).sum(1).mean()
    torch.manual_seed(5)
    (loss,) = model(inputs).values()
    torch.testing.assert_close(loss, expected)


@pytest.mark.long
def test_with_mixup_and_cutmix_a_batch_uses_one_of_them():
    model = build(**{"MODEL.CLASSIFIER.MIXUP": "0.2", "MODEL.CLASSIFIER.CUTMIX": "1.0"})
    seen = set()
    for mix in model.mixes:
        mix.register_forward_hook(lambda module, *_: seen.add(type(module)))
    for seed in range(8):
        torch.manual_seed(seed)
        model(batch())
    assert seen == {MixUp, CutMix}


def test_dropout_is_only_used_in_training():
    model = build(**{"MODEL.CLASSIFIER.DROPOUT": "0.5"})
    with torch.no_grad():
        assert model(batch())["loss_cls"] != model(batch())["loss_cls"]
        model.eval()
        assert torch.equal(model(batch()), model(batch()))


def test_channels_last_does_not_change_the_result():
    model, other = build().eval(), build(**{"MODEL.CLASSIFIER.CHANNELS_LAST": "True"}).eval()
    other.load_state_dict(model.state_dict())
    assert other.normalise(batch()["image"]).is_contiguous(memory_format=torch.channels_last)
    convolution = other.backbone.res2[0].conv1.weight
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(other(batch()), model(batch()), rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_an_exported_classifier_computes_the_same_for_any_batch_size():
    model = build().eval()
    size = torch.export.Dim("N", min=1, max=16)
    images = {"image": batch()["image"]}
    exported = torch.export.export(model, (images,), dynamic_shapes=({"image": {0: size}},))
    for count in (4, 7):
        inputs = {"image": batch(count)["image"]}
        with torch.no_grad():
            torch.testing.assert_close(exported.module()(inputs), model(inputs))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.long
def test_a_compiled_classifier_computes_the_same(training):
    # This test compiles the code around the backbone. test_matrix.py compiles every backbone.
    model = build(**{"MODEL.CLASSIFIER.LABEL_SMOOTHING": "0.1"})
    model.train(training)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = {key: batch()[key] for key in ("image", "label")}
    expected, found = model(inputs), compiled(inputs)
    if training:
        expected, found = expected["loss_cls"], found["loss_cls"]
    torch.testing.assert_close(found, expected)


@pytest.mark.long
def test_a_compiled_classifier_trains_on_mixed_images():
    model = build(**{"MODEL.CLASSIFIER.MIXUP": "0.2"})
    compiled = torch.compile(model, backend="aot_eager")
    torch.manual_seed(3)
    expected = model(batch())["loss_cls"]
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(batch())["loss_cls"], expected)


@pytest.mark.parametrize("key", ["LABEL_SMOOTHING", "DROPOUT", "MIXUP"])
def test_invalid_values_are_rejected(key):
    with pytest.raises(UserError, match=key.lower()):
        build(**{f"MODEL.CLASSIFIER.{key}": "-0.5"})
