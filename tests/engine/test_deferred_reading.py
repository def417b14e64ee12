"""Tests for reading the loss values only every 20 steps, as in training on a GPU.

The tests run on a CPU. The results must be bitwise equal to those of a run that reads the loss
values after each step.
"""

import json
import os
import socket
from unittest import mock

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from senet_transfer.engine import solver
from senet_transfer.engine.hooks import ModelEMA
from senet_transfer.engine.train_step import StepTrainer
from senet_transfer.errors import RunError
from tests.comparing import assert_same

STEPS = 26


class Net(nn.Module):
    """Network with batch norm and dropout.

    ``bad`` contains the indices of the forward passes that cause a non-finite loss or gradient, or
    that raise an error. ``kind`` selects one of these: "loss", "gradient" or "raised".
    """

    def __init__(self, bad=(), kind="loss"):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)
        self.bad, self.kind, self.calls = bad, kind, 0

    def forward(self, batch):
        x, bad = batch["x"], self.calls in self.bad
        self.calls += 1
        if bad and self.kind == "raised":
            raise FloatingPointError("Predicted boxes contain NaN")
        if bad and self.kind == "loss":
            x = x * torch.nan
        out = self.b(nn.functional.dropout(self.norm(self.a(x)).relu(), 0.1))
        losses = {"one": (out - batch["y"]).square().mean(), "two": out.square().mean()}
        if bad and self.kind == "gradient":
            losses["one"] = losses["one"] + (self.a.weight * 0).abs().sum().sqrt()
        return losses


def batches(rank=0):
    generator = torch.Generator().manual_seed(rank)
    for index in range(STEPS):
        yield {
            "x": torch.randn(8, 5, generator=generator),
            "y": torch.randn(8, 1, generator=generator),
            "key": [f"image_{index}_{rank}"],
        }


def fused(parameters, kind):
    if kind == "AdamW":
        return torch.optim.AdamW(parameters, lr=0.01, fused=True)
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True)
    solver.fill_momentum(optimizer)
    return optimizer


def train(net, period, folder, *, optimizer="SGD", rank=None, ema=True, **options):
    """Train for :data:`STEPS` steps, or until a RunError is raised.

    Returns:
        The final state, the logged metrics, the JSON reports on steps with non-finite values, keyed
        by file name, and the message of the RunError, which is empty if no error was raised.
    """
    folder.mkdir()
    model = net if rank is None else DistributedDataParallel(net, broadcast_buffers=False)
    trainer = StepTrainer(
        model,
        batches(rank or 0),
        fused(net.parameters(), optimizer),
        output_dir=str(folder),
        reads_after=None if period == 1 else lambda done: (done + 1) % period == 0,
        **options,
    )
    assert trainer.guard.deferred == (period > 1)
    average = ModelEMA(net, 0.99, trainer.guard)
    average.before_train()
    message = ""
    with EventStorage() as storage:
        try:
            for trainer.iter in range(STEPS):
                torch.manual_seed(trainer.iter)
                trainer.run_step()
                average.after_step()
                storage.step()
            trainer.read()
        except RunError as error:
            message = str(error)
        histories = storage.histories()
        metrics = {k: v.values() for k, v in histories.items() if "time" not in k}
    if message:
        trainer.iter = average.steps = 0  # these depend on when the error is read
    reports = {p.name: json.loads(p.read_text()) for p in sorted(folder.iterdir())}
    state = {**trainer.state_dict(), "model": net.state_dict(), "ema": average.state_dict()}
    return state, metrics, reports, message.replace(str(folder), "FOLDER")


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        ("loss", ()),
        ("loss", (0, 3)),
        ("gradient", (0, 19)),
        ("raised", (2, 20)),
        ("loss", (4, 6, 7, 9)),
        ("gradient", (4, 6, 7, 9)),
        ("raised", (4, 6, 20)),
        ("loss", (0, 21, 23)),
    ],
)
@pytest.mark.long
def test_losses_read_together_give_the_same_run(tmp_path, dtype, optimizer, kind, bad):
    options = {"dtype": dtype, "optimizer": optimizer, "max_skips": 2}
    expected = train(Net(bad, kind), 1, tmp_path / "immediate", **options)
    found = train(Net(bad, kind), 20, tmp_path / "deferred", **options)
    assert_same(found, expected)
    counted = kind != "gradient" or dtype != "float16"  # scaled float16 gradients may overflow
    assert bool(found[3]) == (counted and len(bad) > 2)
    assert found[0]["skipped"] == (min(len(bad), 3) if counted else 0)
    for name, report in found[2].items():
        assert report["batch"]["key"] == [f"image_{report['iteration']}_0"]
        assert report["torch_seed"] == report["iteration"]
        assert name == f"nonfinite_{report['iteration']:07d}_rank0.json"


def check_logged_metrics(rank=None):
    """Compare the logged metrics with Detectron2's, and check that ``gather`` is called once."""
    net, losses = Net(), []
    net.register_forward_hook(
        lambda *call: losses.append({k: v.detach() for k, v in call[2].items()})
    )
    model = net if rank is None else DistributedDataParallel(net, broadcast_buffers=False)
    optimizer = fused(net.parameters(), "SGD")
    trainer = StepTrainer(
        model, batches(rank or 0), optimizer, reads_after=lambda done: done == STEPS - 1
    )
    with EventStorage() as found, mock.patch.object(comm, "gather", wraps=comm.gather) as gather:
        for trainer.iter in range(STEPS):
            trainer.run_step()
    assert gather.call_count == 1
    seconds = [value for value, _ in found.history("rank_data_time").values()]
    with EventStorage() as expected:
        for iteration in range(STEPS):
            SimpleTrainer.write_metrics(losses[iteration], seconds[iteration], iteration)
    values = [
        [(name, history.values()) for name, history in storage.histories().items()]
        for storage in (found, expected)
    ]
    assert len(values[0]) == (1 if rank else 5)
    assert values[0] == values[1]


def test_losses_read_together_are_logged_as_by_detectron2():
    check_logged_metrics()


_IN_PROCESSES = [("loss", ()), ("loss", (0, 3)), ("gradient", (2, 4, 5, 7)), ("raised", (1,))]


def _rank(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for case, (kind, bad) in enumerate(_IN_PROCESSES):
        runs = []
        for period in (1, 20):
            own = folder / f"{kind}_{case}_{period}_{rank}"
            runs.append(train(Net(bad if rank else (), kind), period, own, rank=rank, max_skips=2))
        assert_same(runs[1], runs[0])
        if bad:
            assert runs[1][0]["skipped"] == min(len(bad), 3)
            reports = runs[1][2].values()
            assert all(report["problem"] and report["rank"] == rank for report in reports)
            assert len(reports) == min(len(bad), 3)
    check_logged_metrics(rank)
    torch.distributed.destroy_process_group()


@pytest.mark.long
def test_losses_read_together_give_the_same_run_in_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_rank, (port, tmp_path), nprocs=2)
