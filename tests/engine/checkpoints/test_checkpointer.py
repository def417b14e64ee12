"""Tests for the checkpointer: resuming runs, and rejecting files that do not fit the model."""

import pytest
import torch
from detectron2.solver import build_lr_scheduler, build_optimizer

from senet_transfer import UserError, create_classifier
from senet_transfer.engine.checkpoints.checkpointer import Checkpointer
from senet_transfer.weights.mapping.source import examine
from tests.weights.detectors import config, detector
from tests.weights.peers import peer, randomise, save


def _run(folder, classes=3, seed=0):
    """Return a model, its optimizer, and a checkpointer for the model, optimizer and scheduler."""
    model = detector("se_resnet18", classes, seed=seed)
    cfg = config("se_resnet18")
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    parts = {"optimizer": optimizer, "scheduler": scheduler}
    return model, optimizer, Checkpointer(model, str(folder), **parts)


@pytest.mark.long
def test_a_run_resumes_with_all_its_state(tmp_path):
    model, optimizer, checkpointer = _run(tmp_path)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpointer.save("model_0000004", iteration=4)

    again, fresh, second = _run(tmp_path, seed=1)
    rest = second.resume_or_load("", resume=True)
    assert rest["iteration"] == 4
    assert all(torch.equal(a, b) for a, b in zip(
        model.state_dict().values(), again.state_dict().values(), strict=True))  # fmt: skip
    momenta = [
        [state["momentum_buffer"] for state in o.state.values() if "momentum_buffer" in state]
        for o in (optimizer, fresh)
    ]
    assert momenta[0]
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("initial", ["", "first.pth"])
def test_a_resumed_run_keeps_the_origin_of_its_initial_weights(tmp_path, initial):
    (tmp_path / "other").mkdir()
    _run(tmp_path / "other")[2].save("first")
    _, _, checkpointer = _run(tmp_path)
    if initial:
        checkpointer.load(str(tmp_path / "other" / initial), checkpointables=[])
    checkpointer.save("model_0000004", iteration=4)
    for name in ("model_0000009", "model_final"):
        _, _, checkpointer = _run(tmp_path, seed=1)
        checkpointer.resume_or_load("", resume=True)
        checkpointer.save(name, iteration=9)
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)["senet_transfer"]
    assert saved["source"].get("file", "") == initial


@pytest.mark.long
def test_checkpoints_contain_their_architecture(tmp_path):
    _, _, checkpointer = _run(tmp_path)
    checkpointer.save("model_final")
    source = examine(tmp_path / "model_final.pth")
    assert source.family.name == "senet_transfer"
    assert source.geometry.stem_pool == "pad"
    assert source.preprocessing.format == "BGR"
    assert source.detector


@pytest.mark.long
def test_a_run_starts_from_but_does_not_resume_with_other_classes(tmp_path):
    _run(tmp_path)[2].save("model_final")
    _, _, other = _run(tmp_path, classes=5)
    with pytest.raises(UserError, match="cls_score"):
        other.resume_or_load("", resume=True)
    other.resume_or_load(str(tmp_path / "model_final.pth"), resume=False)
    assert len(other.report.initialised) == 4


@pytest.mark.long
def test_prediction_requires_a_file_of_the_complete_model(tmp_path):
    path = save(peer("timm", "seresnet18"), tmp_path / "backbone.pth")
    with pytest.raises(UserError, match="missing from the file"):
        Checkpointer(detector("se_resnet18")).load(str(path))


@pytest.mark.long
def test_initial_weights_of_any_family_use_the_same_code(tmp_path):
    path = save(peer("torchvision", "resnet18"), tmp_path / "r18.pth")
    model = create_classifier("resnet18", 10)
    checkpointer = Checkpointer(model, family="torchvision_v2")
    assert checkpointer.resume_or_load(str(path), resume=False) == {}
    assert checkpointer.report.family == "torchvision_v2"
    assert set(checkpointer.report.initialised) == {"linear.weight", "linear.bias"}


@pytest.mark.long
def test_a_file_without_matching_tensors_is_rejected_and_the_next_loads(tmp_path):
    """Check that a file is rejected if Detectron2's checkpointer would load no tensors from it."""
    torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / "other.pth")
    right = save(randomise(peer("torchvision", "resnet18")), tmp_path / "right.pth")
    checkpointer = Checkpointer(create_classifier("resnet18"))
    with pytest.raises(UserError, match="match no known weight family"):
        checkpointer.load(str(tmp_path / "other.pth"), [])
    with pytest.raises(UserError, match="weight file .*does not exist"):
        checkpointer.load(str(tmp_path / "absent.pth"), [])
    checkpointer.load(str(right))
    assert not checkpointer.report.initialised


@pytest.mark.long
def test_weights_without_training_state_cannot_be_resumed(tmp_path):
    model, _, checkpointer = _run(tmp_path)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="missing: optimizer, scheduler"):
        checkpointer.load(str(tmp_path / "weights.pth"))
    assert checkpointer.load("") == {}
