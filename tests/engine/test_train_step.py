"""Tests that compare the training step with Detectron2's and with simple reference code."""

import copy
import json

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import nn

from senet_transfer import UserError
from senet_transfer.engine.nonfinite_guard import Step, StepGuard
from senet_transfer.engine.train_step import StepTrainer, split_batch
from senet_transfer.errors import RunError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 1)

    def forward(self, batch):
        out = self.b(self.a(batch["x"]).relu())
        return {"one": (out - batch["y"]).square().mean(), "two": out.square().mean()}


def batches():
    generator = torch.Generator().manual_seed(0)
    while True:
        yield {
            "x": torch.randn(12, 5, generator=generator),
            "y": torch.randn(12, 1, generator=generator),
        }


def run(kind, model, steps=4, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = kind(model, batches(), optimizer, **options)
    with EventStorage() as storage:
        for trainer.iter in range(steps):
            trainer.run_step()
            storage.step()
        return model.state_dict(), storage.latest()["total_loss"][0]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def test_without_options_a_step_is_bitwise_equal_to_detectron2s(net):
    expected, loss = run(SimpleTrainer, copy.deepcopy(net))
    found, own_loss = run(StepTrainer, net)
    assert own_loss == loss
    for key, value in expected.items():
        assert torch.equal(found[key], value)


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_gradients_of_micro_batches_add_up_to_those_of_the_full_batch(net, parts):
    expected, loss = run(SimpleTrainer, copy.deepcopy(net))
    found, own_loss = run(StepTrainer, net, micro_batches=parts)
    assert own_loss == pytest.approx(loss, rel=1e-5)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 3])
def test_autocast_works_with_micro_batches(net, parts):
    expected, _ = run(SimpleTrainer, copy.deepcopy(net))
    for dtype in ("bfloat16", "float16"):
        found, _ = run(StepTrainer, copy.deepcopy(net), dtype=dtype, micro_batches=parts)
        for key, value in expected.items():
            assert found[key].dtype == torch.float32
            torch.testing.assert_close(found[key], value, rtol=0.1, atol=0.05)


def test_a_batch_that_cannot_be_split_evenly_is_rejected():
    assert split_batch([1, 2, 3, 4], 2) == [[1, 2], [3, 4]]
    for size in ([1, 2, 3], {"x": torch.zeros(3)}):
        with pytest.raises(UserError, match="MICRO_BATCHES is 2.*3 images"):
            split_batch(size, 2)


class Spoilt(Net):
    """Model with a buffer. In the given steps, it computes non-finite values or raises an error."""

    def __init__(self, steps, kind="loss"):
        super().__init__()
        self.steps, self.kind = steps, kind
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, batch):
        losses = super().forward(batch)
        self.seen += losses["one"].detach() * (torch.nan if self.calls in self.steps else 1)
        if self.calls in self.steps and self.kind == "loss":
            losses["one"] = losses["one"] * torch.nan
        if self.calls in self.steps and self.kind == "gradient":
            # Keep the loss finite, but make its gradient non-finite.
            losses["one"] = losses["one"] + (self.a.weight * 0).abs().sum().sqrt()
        if self.calls in self.steps and self.kind == "raised":
            raise FloatingPointError("Predicted boxes contain NaN")
        self.calls += 1
        return losses


@pytest.mark.parametrize("kind", ["loss", "gradient", "raised"])
def test_a_step_with_a_non_finite_loss_is_skipped_and_reported(net, tmp_path, kind):
    torch.manual_seed(0)
    spoilt = Spoilt({2}, kind)
    expected, _ = run(SimpleTrainer, net, steps=2)
    with pytest.raises(RunError, match="Iteration 2: .*SOLVER.BASE_LR"):
        run(StepTrainer, spoilt, output_dir=str(tmp_path))
    for name, value in expected.items():
        assert torch.equal(spoilt.state_dict()[name], value)
    report = json.loads((tmp_path / "nonfinite_0000002_rank0.json").read_text())
    assert report["iteration"] == 2
    assert bool(report["nonfinite_gradients"]) == (kind != "raised")


def test_a_skipped_step_does_not_change_weights_and_buffers(tmp_path):
    torch.manual_seed(0)
    spoilt = Spoilt({1, 2})
    state, _ = run(StepTrainer, spoilt, steps=5, max_skips=2)
    assert all(value.isfinite().all() for value in state.values())
    torch.manual_seed(0)
    with pytest.raises(RunError):
        run(StepTrainer, Spoilt({1, 2}), steps=5, max_skips=1)


def verdict(net, scale):
    """Return whether StepGuard skips a step, and whether it detects non-finite gradients.

    Args:
        net: Model whose gradients are checked. The loss is finite.
        scale: Loss scale.
    """
    losses, step = {"one": torch.ones(())}, Step(0, 0.0, None, 0)
    return tuple(map(bool, StepGuard(net).check(step, losses, torch.tensor(scale))))


def test_overflow_due_to_the_scale_is_handled_by_the_scaler(net):
    state, _ = run(StepTrainer, net, dtype="float16")
    assert all(value.isfinite().all() for value in state.values())
    net.a.weight.grad = torch.full_like(net.a.weight, torch.inf)
    assert verdict(net, scale=65536.0) == (False, True)
    assert verdict(net, scale=1.0) == (True, True)


def test_large_finite_gradients_are_not_an_error(net):
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 1e30)
    assert verdict(net, scale=1.0) == (False, False)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [(True, False), (False, True)])
def test_a_run_resumes_with_the_optimizer_of_its_current_device(net, kind, fused):
    trainers = []
    for uses_fused in fused:
        options = {"fused": True} if uses_fused else {"foreach": True}
        options |= {"momentum": 0.9} if kind is torch.optim.SGD else {}
        model = copy.deepcopy(net)
        trainers.append(StepTrainer(model, batches(), kind(model.parameters(), lr=0.1, **options)))
    first, second = trainers
    with EventStorage():
        first.iter = 0
        first.run_step()
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        second.model.load_state_dict(first.model.state_dict())
        second._next_batch()
        for trainer in trainers:
            trainer.iter = 1
            trainer.run_step()
    assert bool(second.optimizer.param_groups[0]["fused"]) == fused[1]
    for found, value in zip(second.model.parameters(), first.model.parameters(), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-7)
