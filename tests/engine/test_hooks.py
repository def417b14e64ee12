"""Tests for training hooks, called without a trainer."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from senet_transfer.engine import hooks


def test_the_memory_of_a_cpu_run_is_that_of_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 3 * 2**20)
    logged = {}
    for name in ("cpu", "cuda"):
        hook = hooks.Resources(torch.device(name))
        with EventStorage() as storage:
            hook.trainer = SimpleNamespace(storage=storage)
            hook.before_train()
            hook.after_step()
        logged[name], _ = storage.latest()["peak_memory_mb"]
    assert logged["cuda"] == 3
    assert logged["cpu"] > 50  # importing PyTorch alone uses more


def test_the_share_of_waiting_covers_the_last_20_steps(caplog):
    caplog.set_level("INFO", logger="senet_transfer.engine.hooks")
    trainer = SimpleNamespace(timer=SimpleNamespace(seconds=7.0), waited=3.0)
    hook = hooks.DataWaits()
    hook.trainer = trainer
    with EventStorage() as trainer.storage:
        hook.before_train()
        shares = []
        for step in range(40):
            trainer.timer.seconds += 2.0
            trainer.waited += 1.0 if step < 20 else 0.5
            hook.after_step()
            shares.append(trainer.storage.latest()["data_time_share"][0])
        hook.after_train()
    assert shares[0] == shares[19] == 0.5
    assert shares[29] == 0.375  # mean of ten steps with 50% and ten with 25%
    assert shares[39] == 0.25
    assert "37.5% of the training time was spent waiting for data." in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("deferred", [False, True])
def test_the_ema_equals_that_of_each_tensor_separately(dtype, deferred):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).to(dtype)
    guard = SimpleNamespace(deferred=deferred, halted=torch.zeros(()))
    average = hooks.ModelEMA(model, 0.9, guard)
    average.before_train()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(1, 21):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        model(torch.randn(4, 3, dtype=dtype))
        average.after_step()
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name].lerp_(value, 1 - min(0.9, (1 + step) / (10 + step)))
            else:
                expected[name].copy_(value)
            assert torch.equal(average.average[name], expected[name])
            assert average.average[name].dtype == value.dtype
    if deferred:
        guard.halted.fill_(1)
        with torch.no_grad():
            model[0].weight += 1
        average.after_step()
        average.update(torch.tensor(0.5))
        assert torch.equal(average.average["0.weight"], expected["0.weight"])


def test_the_ema_with_a_weight_on_the_device_is_equal_up_to_rounding():
    torch.manual_seed(0)
    model = nn.Linear(3, 5)
    average = hooks.ModelEMA(model, 0.9)
    average.before_train()
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    average.update(torch.tensor(0.25))
    torch.testing.assert_close(average.average["weight"], before + 0.25)


@pytest.mark.parametrize(
    ("logged", "message"),
    [
        ({"bbox/AP": float("nan")}, "The metric 'bbox/AP' is nan in this evaluation"),
        ({"segm/AP": 3.0}, "did not return the metric 'bbox/AP'. Available metrics: segm/AP."),
    ],
)
def test_a_metric_without_a_value_is_distinguished_from_a_missing_one(
    logged, message, caplog, tmp_path
):
    hook = hooks.BestModel(1, "bbox/AP", SimpleNamespace(save_dir=str(tmp_path)))
    with EventStorage() as storage:
        storage.put_scalars(**logged)
        hook.trainer = SimpleNamespace(storage=storage, iter=0, max_iter=5)
        hook.after_step()
    assert hook.best is None
    assert any(message in text for text in caplog.messages)
