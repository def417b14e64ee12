"""Tests that a timm network can be fine-tuned, evaluated and exported."""

import shutil

import pytest
import torch
import yaml

from senet_transfer import create_backbone, load
from senet_transfer.cli.analysis.complexity import command as complexity
from senet_transfer.cli.export import command as export
from senet_transfer.engine.model_from import find_model
from tests.engine.classification.conftest import BATCH_NORM
from tests.weights.peers import peer


@pytest.mark.long
def test_a_run_is_evaluated_predicted_with_and_exported(train, tree, tmp_path, capsys):
    torch.save(peer("timm", "test_resnet").state_dict(), tmp_path / "pretrained.pth")
    trainer = train(
        **BATCH_NORM,
        **{
            "MODEL.BACKBONE.ARCH": "timm/test_resnet",
            "MODEL.SE.ENABLED": "None",
            "MODEL.WEIGHTS": str(tmp_path / "pretrained.pth"),
            "SOLVER.EMA.ENABLED": "True",
        },
    )
    run = tmp_path / "run"
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["MODEL"]["PIXEL_MEAN"] == [127.5] * 3
    assert "classification" in trainer.results
    assert (run / "model_ema.pth").is_file()

    image = tree / "blue" / "0.jpg"
    found = load(run / "model_final.pth")(image)
    shutil.copy(run / "model_final.pth", tmp_path / "moved.pth")
    assert load(tmp_path / "moved.pth")(image).scores == found.scores

    backbone = create_backbone("timm/test_resnet", run / "model_final.pth")
    model = find_model(weights=str(run / "model_final.pth")).build("cpu").model
    assert torch.equal(backbone.net.conv1[0].weight, model.backbone.net.conv1[0].weight)
    complexity(["--weights", str(run / "model_final.pth")])
    assert "layer4" in capsys.readouterr().out

    export(["--weights", str(run / "model_final.pth"), "--output", str(tmp_path / "model.onnx")])
    exported = load(tmp_path / "model.onnx")(image)
    assert exported.names == found.names
    assert exported.scores == pytest.approx(found.scores, abs=1e-5)
