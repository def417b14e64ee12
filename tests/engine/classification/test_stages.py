"""Tests for fine-tuning by stage: layer-wise learning rates and gradual unfreezing."""

import sys
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import build_model

from senet_transfer import UserError, create_classifier
from senet_transfer.config.load import load_config
from senet_transfer.engine import solver
from senet_transfer.engine.little_data.stages import GradualUnfreezing, backbone_stages
from tests.processes import call

UNFREEZE = {
    "SOLVER.UNFREEZE_ITERS": "(2, 4)",
    "SOLVER.MAX_ITER": "6",
    "SOLVER.CHECKPOINT_PERIOD": "1",
    "SOLVER.CHECKPOINTS_KEPT": "0",
    "TEST.EVAL_PERIOD": "3",
}


def rates(model, **overrides) -> dict[str, float]:
    """Return the learning rate of each model parameter, keyed by parameter name."""
    options = {"SOLVER.BASE_LR": "1.0", "SOLVER.LAYER_DECAY": "0.5", **overrides}
    cfg = load_config("", [word for item in options.items() for word in item])
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = solver.build_optimizer(cfg, model).param_groups
    return {names[p]: group["lr"] for group in groups for p in group["params"]}


@pytest.mark.long
def test_the_learning_rate_halves_from_stage_to_stage():
    found = rates(create_classifier("se_resnet18", 3), **{"SOLVER.BACKBONE_MULTIPLIER": "0.1"})
    expected = {"stem": 0.1 / 32, "res2": 0.1 / 16, "res3": 0.1 / 8, "res4": 0.1 / 4,
                "res5": 0.1 / 2}  # fmt: skip
    for name, rate in found.items():
        stage = name.split(".")[1] if name.startswith("backbone.") else ""
        assert rate == pytest.approx(expected.get(stage, 1.0)), name
    found = rates(create_classifier("cifar_resnet8", 3))  # its last stage is res4
    assert found["backbone.res4.0.conv1.weight"] == 0.5
    assert found["backbone.stem.conv1.weight"] == 0.5**4


@pytest.mark.long
def test_the_stages_of_detectors_are_found_below_the_fpn_and_in_the_c4_head(zero_initial_weights):
    for config in ("faster_rcnn_se_r50", "faster_rcnn_c4_se_r50"):
        model = build_model(load_config(config, ["MODEL.DEVICE", "cpu"]))
        names = [name.rpartition(".")[2] for name in backbone_stages(model)]
        assert names == ["stem", "res2", "res3", "res4", "res5"]
        found = rates(model)
        assert found["proposal_generator.rpn_head.conv.weight"] == 1.0
        (res5,) = {rate for name, rate in found.items() if ".res5." in name}
        assert res5 == 0.5
    assert any(name.startswith("roi_heads.res5") for name in found)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"SOLVER.BIAS_LR_FACTOR": "2.0"}, "SOLVER.LAYER_DECAY is 0.5 and SOLVER.BIAS_LR_FACTOR"),
        ({}, "no stages named stem"),
    ],
)
def test_a_decay_that_cannot_be_applied_is_rejected(overrides, message):
    with pytest.raises(UserError, match=message):
        rates(torch.nn.Linear(1, 1), **overrides)


def test_stages_are_unfrozen_from_the_last_to_the_first():
    model = create_classifier("cifar_resnet8", 3, freeze_at=1)
    wrapped = []
    hook = GradualUnfreezing(model, [1, 3], lambda: wrapped.append(hook.trainer.iter))
    hook.trainer = SimpleNamespace()
    seen = []
    for hook.trainer.iter in range(5):
        model.train()  # as the trainer does after an evaluation
        hook.before_step()
        stages = backbone_stages(model)
        stages.pop("backbone.stem")
        seen.append([name[9:] for name, s in stages.items() if not s.training])
        for stage in stages.values():
            assert {p.requires_grad for p in stage.parameters()} == {stage.training}
    assert seen == [["res2", "res3", "res4"], *[["res2", "res3"]] * 2, *[["res2"]] * 2]
    assert wrapped == [0, 1, 3]
    assert not any(p.requires_grad for p in model.backbone.stem.parameters())
    for starts, message in (([1, 2, 3, 4], "3 trainable stages"), ([2, 1], "ascending order")):
        with pytest.raises(UserError, match=message):
            GradualUnfreezing(create_classifier("cifar_resnet8", 3, freeze_at=1), starts, list)


def stage_values(state: dict, stage: str) -> list:
    return [value for name, value in state.items() if name.startswith(f"backbone.{stage}.")]


@pytest.mark.long
def test_frozen_stages_do_not_change_and_a_resumed_run_is_exact(train, tmp_path):
    bn = {"MODEL.RESNETS.NORM": "BN", "INPUT.CLASSIFICATION.CROP": "64"}
    train(**UNFREEZE, **bn)
    run = tmp_path / "run"

    def saved(iteration):
        return torch.load(run / f"model_{iteration:07d}.pth", weights_only=True)["model"]

    first, last = saved(0), torch.load(run / "model_final.pth", weights_only=True)["model"]

    def changes(stage, iteration):
        values = (stage_values(saved(i), stage) for i in (iteration, iteration + 1))
        return not all(map(torch.equal, *values))

    stages = ("stem", "res2", "res3", "res4", "res5")
    changed = {stage: [changes(stage, iteration) for iteration in range(5)] for stage in stages}
    # Of the five iterations, the last four train res5 and the last two train res4.
    assert changed == {
        "stem": [False] * 5,
        "res2": [False] * 5,
        "res3": [False] * 5,
        "res4": [False, False, False, True, True],
        "res5": [False, True, True, True, True],
    }
    assert not torch.equal(first["linear.weight"], last["linear.weight"])
    (run / "last_checkpoint").write_text("model_0000002.pth")
    train("--resume", **UNFREEZE, **bn)
    resumed = torch.load(run / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(last[name], value) for name, value in resumed.items())


@pytest.mark.long
def test_the_times_can_be_given_in_epochs(train):
    # An epoch of 24 images in batches of 4 has 6 iterations.
    overrides = {
        "SOLVER.UNFREEZE_EPOCHS": "(0.5, 1)",
        "SOLVER.EPOCHS": "0.3",
        "SOLVER.MAX_ITER": "40000",
        "SOLVER.STEPS": "(30000,)",
    }
    trainer = train(**overrides)
    assert tuple(trainer.cfg.SOLVER.UNFREEZE_ITERS) == (3, 6)
    trained = {
        name.split(".")[0] for name, p in trainer.model.named_parameters() if p.requires_grad
    }
    assert trained == {"linear"}


@pytest.mark.slow
def test_two_processes_train_like_one_with_gradual_unfreezing(train, words, tmp_path):
    train(**UNFREEZE, OUTPUT_DIR=str(tmp_path / "one"))
    line = words("--num-gpus", "2", "--dist-url", "auto", **UNFREEZE)
    result = call(sys.executable, "tools/train_net.py", *line)
    assert result.returncode == 0, result.stderr
    one, two = (
        torch.load(tmp_path / run / "model_final.pth", weights_only=True)["model"]
        for run in ("one", "run")
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)
