"""Tests for a detector's losses on an evaluation dataset."""

import copy

import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, detection_utils
from detectron2.utils.events import EventStorage

from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer
from tests.engine.conftest import command, shapes  # noqa: F401  # fixtures


@pytest.fixture
def few(command, shapes):  # noqa: F811
    """Return a function that builds the config of a run with four evaluation images."""
    files = (f"{shapes}/annotations/instances_val.json", f"{shapes}/val")

    def make(**overrides: str):
        keys = {"DATASETS.TEST": "('few',)", **overrides}
        return setup(command("--dataset", "few", *files, **keys))

    return make


def expected_losses(cfg, model) -> dict[str, float]:
    """Compute each loss with plain Detectron2, and return its mean over the images."""
    augmentations = detection_utils.build_augmentation(cfg, is_train=False)
    mapper = DatasetMapper(cfg, is_train=True, augmentations=augmentations)
    records = DatasetCatalog.get("few")
    means: dict[str, float] = {}
    model.train()
    for record in records:
        torch.manual_seed(0)
        with EventStorage(), torch.no_grad():
            losses = model([mapper(record)])
        for name, loss in losses.items():
            means[name] = means.get(name, 0) + float(loss) / len(records)
    return means


@pytest.mark.long
@pytest.mark.parametrize("config", ["faster_rcnn_se_r50", "retinanet_se_r50"])
def test_losses_equal_detectron2s_and_the_model_is_unchanged(few, config):
    # Group norm gives the same results in training and evaluation mode.
    overrides = {"MODEL.RESNETS.NORM": "GN", "MODEL.FPN.OUT_CHANNELS": "16"}
    cfg = few(config=f"configs/{config}.yaml", **overrides)
    model = Trainer.build_model(cfg)
    untouched = copy.deepcopy(model)
    model.train()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}

    losses = Trainer.validation_losses(cfg, model, "few")
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert vars(model).get("loss_normalizer") == vars(untouched).get("loss_normalizer")

    expected = expected_losses(cfg, untouched)
    assert len(expected) >= 2
    total = losses.pop("total_loss")
    assert losses == pytest.approx(expected, rel=1e-5)
    assert total == pytest.approx(sum(expected.values()), rel=1e-5)


@pytest.mark.long
def test_an_evaluation_computes_the_losses_on_request(few):
    options = {"TEST.LOSS": "True", "TEST.BEST_METRIC": "validation/total_loss"}
    cfg = few(**options)
    model = Trainer.build_model(cfg)
    results = Trainer.test(cfg, model)
    assert list(results) == ["bbox", "validation"]
    assert results["validation"] == Trainer.validation_losses(cfg, model, "few")
    assert list(Trainer.test(few(), model)) == ["bbox"]
