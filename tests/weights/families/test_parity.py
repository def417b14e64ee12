"""Tests that loaded weights give the same outputs as the original packages' networks."""

import pytest
import torch

from senet_transfer import UserError, create_classifier, load_weights
from tests.weights.peers import (
    check_wrong_options,
    geometry_options,
    images,
    outputs_of_ours,
    outputs_of_peer,
    peer,
    save,
    worst,
)

slow = pytest.mark.slow

# Package, its model name, this project's model name, and the family that must be detected.
PEERS = [
    ("timm", "legacy_seresnet18", "se_resnet18", "timm_legacy"),
    ("timm", "legacy_seresnet50", "se_resnet50", "cadene"),
    ("timm", "legacy_seresnext50_32x4d", "se_resnext50_32x4d", "cadene"),
    ("timm", "seresnet18", "se_resnet18", "timm"),
    ("timm", "seresnet50", "se_resnet50", "timm"),
    ("timm", "seresnext50_32x4d", "se_resnext50_32x4d", "timm"),
    ("torchvision", "resnet18", "resnet18", "torchvision_v1"),
    ("torchvision", "resnet50", "resnet50", "torchvision_v1"),
    ("torchvision", "resnext50_32x4d", "resnext50_32x4d", "torchvision_v1"),
    ("pretrainedmodels", "se_resnet50", "se_resnet50", "cadene"),
]
# Deeper networks with the same blocks, and networks with the same tensors as those above.
SLOW_PEERS = [
    ("timm", "resnet50", "resnet50", "torchvision_v1"),
    ("pretrainedmodels", "se_resnext50_32x4d", "se_resnext50_32x4d", "cadene"),
    ("timm", "legacy_seresnet34", "se_resnet34", "timm_legacy"),
    ("timm", "legacy_seresnet101", "se_resnet101", "cadene"),
    ("timm", "legacy_seresnet152", "se_resnet152", "cadene"),
    ("timm", "legacy_seresnext101_32x4d", "se_resnext101_32x4d", "cadene"),
    ("timm", "legacy_senet154", "senet154", "cadene"),
    ("timm", "seresnet34", "se_resnet34", "timm"),
    ("timm", "seresnet101", "se_resnet101", "timm"),
    ("timm", "seresnet152", "se_resnet152", "timm"),
    ("timm", "seresnext101_32x4d", "se_resnext101_32x4d", "timm"),
    ("timm", "senet154", "senet154", "timm"),
    ("timm", "resnet18", "resnet18", "torchvision_v1"),
    ("timm", "resnet34", "resnet34", "torchvision_v1"),
    ("timm", "resnet101", "resnet101", "torchvision_v1"),
    ("timm", "resnet152", "resnet152", "torchvision_v1"),
    ("timm", "resnext50_32x4d", "resnext50_32x4d", "torchvision_v1"),
    ("timm", "resnext101_32x4d", "resnext101_32x4d", "torchvision_v1"),
    ("torchvision", "resnet34", "resnet34", "torchvision_v1"),
    ("torchvision", "resnet101", "resnet101", "torchvision_v1"),
    ("torchvision", "resnet152", "resnet152", "torchvision_v1"),
    ("pretrainedmodels", "se_resnet101", "se_resnet101", "cadene"),
    ("pretrainedmodels", "se_resnet152", "se_resnet152", "cadene"),
    ("pretrainedmodels", "se_resnext101_32x4d", "se_resnext101_32x4d", "cadene"),
    ("pretrainedmodels", "senet154", "senet154", "cadene"),
]


@pytest.mark.parametrize(
    ("package", "theirs", "ours", "family"),
    [*PEERS, *(pytest.param(*case, marks=slow) for case in SLOW_PEERS)],
)
@pytest.mark.long
def test_a_file_of_another_library_gives_that_librarys_outputs(
    package, theirs, ours, family, tmp_path
):
    # Also check loading into an existing model, and networks with wrong strides or stem pools.
    model = peer(package, theirs)
    path = save(model, tmp_path / "peer.pth")
    expected = outputs_of_peer(model, images())

    created = create_classifier(ours, weights=path).eval()
    assert worst(expected, outputs_of_ours(created, images())) < 1e-5

    options = geometry_options(created)
    report = load_weights(empty := create_classifier(ours, **options).eval(), path)
    assert report.family == family
    assert not report.initialised
    assert worst(expected, outputs_of_ours(empty, images())) < 1e-5

    check_wrong_options(ours, created, expected, path)


@pytest.mark.long
def test_the_same_network_under_another_name_is_rejected(tmp_path):
    path = save(peer("torchvision", "resnet18"), tmp_path / "r18.pth")
    with pytest.raises(UserError, match="The file contains resnet18, but the model is resnet34"):
        create_classifier("resnet34", weights=path)


@pytest.mark.parametrize("name", ["resnet50d", "seresnet50t", "ecaresnet50t", "seresnext26d_32x4d"])
@pytest.mark.long
def test_unsupported_timm_networks_are_rejected_by_their_differences(name, tmp_path):
    path = save(peer("timm", name), tmp_path / "other.pth")
    with pytest.raises(UserError, match="an unsupported network|does not fit") as error:
        create_classifier("se_resnet50" if "se" in name else "resnet50", weights=path)
    assert "average" in str(error.value) or "ECA" in str(error.value)


@pytest.mark.long
def test_half_precision_and_safetensors_files_load(tmp_path):
    from safetensors.torch import save_file

    model = peer("torchvision", "resnet18").half()
    save_file(model.state_dict(), tmp_path / "half.safetensors")
    loaded = create_classifier("resnet18", weights=tmp_path / "half.safetensors").eval()
    assert loaded.linear.weight.dtype == torch.float32
    assert worst(outputs_of_peer(model.float(), images()), outputs_of_ours(loaded, images())) < 1e-5
