"""Tests that compare learning rate schedules and parameter groups with reference code."""

import copy
import math

import pytest
import torch
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from senet_transfer import UserError, create_classifier
from senet_transfer.config import get_senet_config
from senet_transfer.config.load import find_config, load_config
from senet_transfer.engine.solver import (
    build_lr_scheduler,
    build_optimizer,
    check_epochs,
    epochs_to_iterations,
)

BASE = "configs/base/classification.yaml"


def config(**overrides):
    return load_config(BASE, [word for item in overrides.items() for word in item])


def rates(cfg, evaluations=()):
    """Return the learning rate of each step, given the evaluations as (step, metric) pairs."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=cfg.SOLVER.BASE_LR)
    schedule = build_lr_scheduler(cfg, optimizer)
    found, evaluations = [], dict(evaluations)
    for iteration in range(cfg.SOLVER.MAX_ITER):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        if iteration in evaluations:
            schedule.observe(evaluations[iteration])
    return found


def test_epochs_are_iterations_rounded_up():
    cfg = config(
        **{
            "SOLVER.EPOCHS": "90",
            "SOLVER.STEP_EPOCHS": "(30, 60)",
            "SOLVER.IMS_PER_BATCH": "256",
            "SOLVER.WARMUP_EPOCHS": "0.5",
            "SOLVER.FROZEN_BN_EPOCHS": "2",
            "SOLVER.CHECKPOINT_EPOCHS": "1",
            "TEST.EVAL_EPOCHS": "5",
        }
    )
    check_epochs(cfg)
    images = 8_026_628
    counted = epochs_to_iterations(cfg, images)

    def ceil(epochs):
        return math.ceil(epochs * images / 256)

    assert ceil(90) == counted.SOLVER.MAX_ITER
    assert (ceil(30), ceil(60)) == counted.SOLVER.STEPS
    assert ceil(0.5) == counted.SOLVER.WARMUP_ITERS
    assert ceil(2) == counted.SOLVER.FROZEN_BN_ITERS
    assert ceil(1) == counted.SOLVER.CHECKPOINT_PERIOD
    assert ceil(5) == counted.TEST.EVAL_PERIOD
    # The user's config is not modified, and exact numbers of iterations are not rounded up.
    assert cfg.SOLVER.MAX_ITER == 40000
    exact = config(**{"SOLVER.EPOCHS": "0.7", "SOLVER.IMS_PER_BATCH": "10"})
    assert epochs_to_iterations(exact, 100).SOLVER.MAX_ITER == 7


def test_a_warm_up_of_0_epochs_is_none():
    keys = {"SOLVER.EPOCHS": "2", "SOLVER.WARMUP_EPOCHS": "0", "SOLVER.IMS_PER_BATCH": "10"}
    cfg = config(**keys, **{"SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR"})
    check_epochs(cfg)
    counted = epochs_to_iterations(cfg, 100)
    assert rates(counted) == [cfg.SOLVER.BASE_LR] * 20


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"SOLVER.EPOCHS": "3", "SOLVER.MAX_ITER": "100"},
            "SOLVER.MAX_ITER is 100.*only one of the two",
        ),
        ({"SOLVER.EPOCHS": "3", "SOLVER.STEPS": "(5,)"}, "SOLVER.STEPS.*only one of the two"),
        ({"SOLVER.EPOCHS": "-1"}, "SOLVER.EPOCHS is -1"),
        ({"SOLVER.EPOCHS": "many"}, "SOLVER.EPOCHS is 'many'"),
        ({"SOLVER.EPOCHS": "3", "TEST.EVAL_EPOCHS": "0"}, "EVAL_EPOCHS is 0;"),
    ],
)
def test_contradictory_or_invalid_epochs_are_rejected(overrides, words):
    with pytest.raises(UserError, match=words):
        check_epochs(config(**overrides))


def test_the_last_schedule_replaces_one_in_other_units(tmp_path):
    defaults = get_senet_config().SOLVER
    replaced = load_config("faster_rcnn_se_r50", ["SOLVER.EPOCHS", "12"]).SOLVER
    assert (replaced.EPOCHS, replaced.MAX_ITER) == (12, defaults.MAX_ITER)
    assert defaults.STEPS == replaced.STEPS
    replaced = load_config("places365_se_r152", ["SOLVER.MAX_ITER", "20"]).SOLVER
    assert (replaced.EPOCHS, replaced.MAX_ITER) == (None, 20)
    own = tmp_path / "own.yaml"
    for base, schedule in (
        ("places365_se_r152", "{MAX_ITER: 20}"),
        ("faster_rcnn_se_r50", "{EPOCHS: 12}"),
    ):
        own.write_text(f"_BASE_: {find_config(base)}\nSOLVER: {schedule}\n")
        check_epochs(load_config(str(own)))
    # If several files in a chain of base configs have a schedule, the last one is used.
    assert load_config(str(own)).SOLVER.EPOCHS == 12
    (tmp_path / "mine.yaml").write_text("_BASE_: own.yaml\nSOLVER: {MAX_ITER: 30}\n")
    solver = load_config(str(tmp_path / "mine.yaml")).SOLVER
    assert (solver.EPOCHS, solver.MAX_ITER) == (None, 30)


def test_integers_are_accepted_for_float_keys():
    cfg = config(**{"SOLVER.BASE_LR": "1", "SOLVER.CHECKPOINT_EPOCHS": "5"})
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.CHECKPOINT_EPOCHS) == (1.0, 5.0)


def test_the_step_schedule_divides_by_ten_at_each_step():
    cfg = config(**{"SOLVER.MAX_ITER": "9", "SOLVER.STEPS": "(3, 6)", "SOLVER.BASE_LR": "0.1"})
    expected = [0.1] * 3 + [0.01] * 3 + [0.001] * 3
    assert rates(cfg) == pytest.approx(expected)


def test_the_cosine_schedule_is_half_a_cosine_after_a_linear_warm_up():
    cfg = config(
        **{
            "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
            "SOLVER.MAX_ITER": "20",
            "SOLVER.WARMUP_ITERS": "4",
            "SOLVER.WARMUP_FACTOR": "0.0",
            "SOLVER.BASE_LR": "0.1",
        }
    )
    cosine = [0.05 * (1 + math.cos(math.pi * i / 20)) for i in range(20)]
    expected = [cosine[4] * i / 4 for i in range(4)] + cosine[4:]
    assert rates(cfg) == pytest.approx(expected)


PLATEAU = {
    "SOLVER.LR_SCHEDULER_NAME": "WarmupPlateauLR",
    "SOLVER.MAX_ITER": "24",
    "SOLVER.BASE_LR": "0.1",
    "SOLVER.PLATEAU.PATIENCE": "2",
    "SOLVER.PLATEAU.MAX_DROPS": "2",
}
ERRORS = [50, 40, 40, 40, 40, 39, 39, 41, 45, 38, 38, 38, 38, 38, 38, 38, 38, 38, 38, 38, 38, 38]


def torchs_rates(values, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    # With min_lr=0.001, the rate is reduced at most twice.
    schedule = ReduceLROnPlateau(optimizer, factor=0.1, patience=2, min_lr=0.001, **options)
    found = []
    for value in values:
        found.append(optimizer.param_groups[0]["lr"])
        schedule.step(value)
    return found


@pytest.mark.parametrize("threshold", ["0.0", "1.5"])
def test_the_plateau_schedule_equals_pytorchs(threshold):
    cfg = config(**PLATEAU, **{"SOLVER.PLATEAU.THRESHOLD": threshold})
    found = rates(cfg, enumerate(ERRORS))[: len(ERRORS)]
    options = {"threshold": float(threshold), "threshold_mode": "abs"}
    assert found == pytest.approx(torchs_rates(ERRORS, **options))
    assert min(found) < 0.0011


def test_a_metric_other_than_an_error_is_better_when_higher():
    cfg = config(**PLATEAU, **{"SOLVER.PLATEAU.METRIC": "bbox/AP"})
    scores = [100 - error for error in ERRORS]
    expected = torchs_rates(scores, mode="max", threshold=0.0, threshold_mode="abs")
    assert rates(cfg, enumerate(scores))[: len(scores)] == pytest.approx(expected)


def test_the_plateau_schedule_resumes_from_its_state():
    cfg = config(**PLATEAU)
    optimizers, schedules = [], []
    for _ in range(2):
        optimizers.append(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
        schedules.append(build_lr_scheduler(cfg, optimizers[-1]))
    for value in ERRORS[:4]:
        optimizers[0].step()
        schedules[0].step()
        schedules[0].observe(value)
    schedules[1].load_state_dict(schedules[0].state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for value in ERRORS[4:]:
        found = []
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            schedule.observe(value)
            found.append(optimizer.param_groups[0]["lr"])
        assert found[0] == found[1]


def groups_of(**overrides):
    model = create_classifier("se_resnet18", 5)
    optimizer = build_optimizer(config(**overrides), model)
    by_parameter = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {name: by_parameter[id(p)] for name, p in model.named_parameters()}, optimizer


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_the_backbone_can_have_a_separate_learning_rate(kind):
    groups, _ = groups_of(**{"SOLVER.BACKBONE_MULTIPLIER": "0.1", "SOLVER.OPTIMIZER": kind})
    base = groups["linear.weight"]["lr"]
    assert groups["linear.bias"]["lr"] == base
    backbone = [group["lr"] for name, group in groups.items() if name.startswith("backbone.")]
    assert backbone == pytest.approx([0.1 * base] * len(backbone))


def test_norms_and_biases_can_be_excluded_from_weight_decay():
    off = {"SOLVER.WEIGHT_DECAY_NORM": "0.0", "SOLVER.WEIGHT_DECAY_BIAS": "0.0"}
    groups, optimizer = groups_of(**off, **{"SOLVER.NESTEROV": "True"})
    for name, group in groups.items():
        none = name.endswith(".bias") or ".norm." in name
        assert group["weight_decay"] == (0.0 if none else 1e-4), name
        assert group["nesterov"]


@pytest.mark.long
def test_two_learning_rates_for_the_backbones_biases_are_rejected():
    with pytest.raises(UserError, match="BIAS_LR_FACTOR is 2"):
        groups_of(**{"SOLVER.BACKBONE_MULTIPLIER": "0.1", "SOLVER.BIAS_LR_FACTOR": "2.0"})


@pytest.mark.parametrize("kind", ["value", "norm"])
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_gradient_clipping_is_bitwise_equal_to_detectron2s(kind, order):
    cfg = get_senet_config()
    cfg.SOLVER.MOMENTUM = 0.9
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
    cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = order
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.7
    torch.manual_seed(0)
    own = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 2))
    theirs = copy.deepcopy(own)
    optimizers = [build_optimizer(cfg, own), build_detectron2_optimizer(cfg, theirs)]
    for scale in (0.01, 1.0, 100.0):
        images = torch.randn(4, 5) * scale
        for model, optimizer in zip((own, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            # Detectron2 can't clip gradients by value if a parameter has none.
            used = model if kind == "value" else model[0]
            used(images).square().sum().backward()
            optimizer.step()
        for name, value in theirs.state_dict().items():
            assert torch.equal(own.state_dict()[name], value)
