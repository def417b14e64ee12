"""Tests for training steps that are captured as graphs.

On a GPU, the graphs are CUDA graphs. On a CPU, they are lists of recorded operators.
"""

import copy
import random
from collections import Counter

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn
from torch.profiler import ProfilerActivity, profile

from senet_transfer import UserError, create_classifier
from senet_transfer.config.load import load_config
from senet_transfer.engine import solver
from senet_transfer.engine import trainer as trainer_module
from senet_transfer.engine.capture.captured_step import CapturedStep
from senet_transfer.engine.capture.graphs import CudaGraphs
from senet_transfer.engine.hooks import ModelEMA
from senet_transfer.engine.run_checks import check_run
from senet_transfer.engine.train_step import StepTrainer
from senet_transfer.engine.trainer import Trainer
from senet_transfer.layers.shake_shake import ShakeMix
from tests.comparing import assert_same
from tests.engine.capture.recorded_graphs import RecordedGraphs
from tests.engine.test_waits import CudaWaits, FusedTrainer, cifar_network, waits_of_steps


def doubled(inputs):
    return (inputs["x"] * 2,)


def test_a_step_is_eager_three_times_then_captured_once_and_replayed():
    graphs = RecordedGraphs()
    step = CapturedStep(doubled, graphs)
    outputs = [step({"x": torch.full((2,), float(value))})[0] for value in range(6)]
    # Later steps do not overwrite earlier outputs.
    assert torch.equal(torch.stack(outputs)[:, 0], torch.arange(6) * 2.0)
    assert (graphs.captures, graphs.replays) == (1, 3)


def test_an_incomplete_batch_is_computed_eagerly_and_the_graph_is_kept(caplog):
    graphs = RecordedGraphs()
    step = CapturedStep(doubled, graphs)
    caplog.set_level("INFO")
    for size in [4, 4, 4, 4, 3, 4, 3, 4]:
        (output,) = step({"x": torch.ones(size)})
        assert torch.equal(output, torch.full((size,), 2.0))
    assert (graphs.captures, graphs.replays) == (1, 3)
    assert caplog.text.count("run eagerly") == 1


def test_a_step_is_captured_again_when_its_state_has_changed():
    graphs, state = RecordedGraphs(), {"factor": 2.0}
    step = CapturedStep(
        lambda inputs: (inputs["x"] * state["factor"],), graphs, state=lambda: state["factor"]
    )
    found = []
    for _ in range(2):
        found += [step({"x": torch.ones(1)})[0].item() for _ in range(5)]
        state["factor"] = 3.0
    assert found == [2.0] * 5 + [3.0] * 5
    assert (graphs.captures, graphs.replays) == (2, 4)


def test_a_step_that_reads_from_the_device_is_rejected():
    step = CapturedStep(lambda inputs: (inputs["x"] * inputs["x"].sum().item(),), RecordedGraphs())
    inputs = {"x": torch.ones(2)}
    for _ in range(3):
        step(inputs)
    with pytest.raises(UserError, match=r"can't be captured .*stream is capturing\)\. Set SOLVER"):
        step(inputs)


def test_a_step_with_random_numbers_of_the_host_is_rejected():
    step = CapturedStep(lambda inputs: (inputs["x"] * random.random(),), RecordedGraphs())
    with pytest.raises(UserError, match="draws random numbers on the host"):
        step({"x": torch.ones(2)})


SCHEDULE = [0.5 / 2**step for step in range(10)]


def fused(parameters, kind):
    groups = [{"params": [p], "lr": 0.5 * (1 + p.dim() % 2)} for p in parameters]
    if kind == "AdamW":
        return torch.optim.AdamW(groups, fused=True)
    optimizer = torch.optim.SGD(groups, momentum=0.9, fused=True)
    solver.fill_momentum(optimizer)
    return optimizer


class Small(nn.Module):
    """Small shake-shake network. Unlike a ResNet, it is fast on a CPU even in float16."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3 * 32 * 32, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.branches, self.mix = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), ShakeMix()
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        x = self.backbone(x.flatten(1))
        a, b = (branch(x)[:, :, None, None] for branch in self.branches)
        return self.linear(self.mix(a, b).flatten(1))


class Classifier(nn.Module):
    """Module that computes the loss of a classifier with batch norm and dropout."""

    def __init__(self, name, bad=()):
        super().__init__()
        torch.manual_seed(0)
        self.net = Small() if name == "small" else create_classifier(name, num_classes=3)
        self.bad = bad

    def forward(self, batch):
        images = batch["image"].float() / 255
        logits = self.net(nn.functional.dropout(images, 0.1))
        loss = nn.functional.cross_entropy(logits, batch["label"])
        return {"loss": loss * batch["factor"].mean()}


def batches(device, bad, sizes):
    generator = torch.Generator().manual_seed(0)
    for step, size in enumerate(sizes):
        image = torch.randint(256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
        factor = torch.full((size,), torch.nan if step in bad else 1.0)
        batch = {"image": image, "label": torch.arange(size) % 3, "factor": factor}
        yield {key: value.to(device) for key, value in batch.items()}


def train(name, graphs, *, device="cpu", bad=(), sizes=(4,) * 10, kind="SGD", **options):
    """Train for ten steps, and return the trainer, model and EMA states and the losses."""
    net = Classifier(name).to(device)
    optimizer = fused(net.parameters(), kind)
    solver_options = {"max_skips": 3, "reads_after": lambda done: done == 9, **options}
    trainer = StepTrainer(
        net, batches(device, bad, sizes), optimizer, graphs=graphs, **solver_options
    )
    average = ModelEMA(net, 0.99, trainer.guard)
    trainer.use_average(average)
    average.before_train()
    with EventStorage() as storage:
        for trainer.iter in range(10):
            torch.manual_seed(trainer.iter)
            if trainer.iter == 7:
                net.net.backbone.eval()  # freezes the batch norm statistics
            for group in optimizer.param_groups:
                group["lr"] = SCHEDULE[trainer.iter] * (1 + group["params"][0].dim() % 2)
            trainer.run_step()
            average.after_step()
            storage.step()
        losses = storage.history("total_loss").values()
    state = {**trainer.state_dict(), "model": net.state_dict(), "ema": average.state_dict()}
    return copy.deepcopy(state), losses


class Eager:
    """Stand-in for CUDA graphs that runs functions eagerly, to compute expected values."""

    def __init__(self, graphs):
        self.device, self.warm_up = graphs.device, graphs.warm_up

    def capture(self, function):
        graph = type("Graph", (), {})()

        def replay():
            graph.outputs = function()

        graph.replay = replay
        return graph


CASES = [
    ("se_cifar_resnet8", {"dtype": None}),
    ("se_cifar_resnet8", {"dtype": "bfloat16", "kind": "AdamW"}),
    ("small", {"dtype": "float16", "bad": (1, 5)}),
    ("cifar_resnet8", {"dtype": None, "bad": (1, 4, 5, 6), "max_skips": 9, "kind": "AdamW"}),
    ("cifar_resnet8", {"dtype": None, "micro_batches": 2, "sizes": (4,) * 5 + (2,) + (4,) * 4}),
]


@pytest.mark.long
@pytest.mark.parametrize(("name", "options"), CASES)
def test_captured_steps_are_bitwise_equal_to_eager_ones(name, options):
    graphs = RecordedGraphs()
    expected = train(name, Eager(graphs), **options)
    found = train(name, graphs, **options)
    assert_same(found, expected)
    assert graphs.captures == 1
    assert graphs.replays == (3 if len(set(options.get("sizes", (4,)))) > 1 else 4)


@pytest.mark.long
def test_captured_steps_equal_those_without_graphs():
    # Learning rates are powers of 2 and therefore exact; only the weight of the average is rounded.
    expected, losses = train("cifar_resnet8", None)
    state, found = train("cifar_resnet8", RecordedGraphs())
    assert_same(found, losses)
    for key in ("optimizer", "model"):
        assert_same(state[key], expected[key])
    assert state["ema"]["steps"] == expected["ema"]["steps"]
    for name, value in expected["ema"]["average"].items():
        torch.testing.assert_close(state["ema"]["average"][name], value, msg=name)


def test_an_optimizer_that_cannot_skip_on_the_device_is_rejected():
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(UserError, match="fused SGD or AdamW"):
        StepTrainer(net, [], optimizer, reads_after=bool, graphs=RecordedGraphs())


def recorded(graphs):
    """Return a trainer class whose steps are captured by ``graphs``, a stand-in for CUDA graphs."""

    class RecordedTrainer(FusedTrainer):
        def __init__(self, cfg):
            # Set this key here, because setup rejects it on a CPU.
            cfg.defrost()
            cfg.SOLVER.COMPILE = "graph"
            cfg.freeze()
            super().__init__(cfg)

        @classmethod
        def build_graphs(cls, cfg, device):
            return graphs

    return RecordedTrainer


@pytest.mark.long
def test_captured_runs_resume_exactly_with_unaffected_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "_ASYNCHRONOUS", ("cpu",))
    options = {
        "SOLVER.MAX_ITER": "10",
        "SOLVER.CHECKPOINT_PERIOD": "5",
        "INPUT.CLASSIFICATION.CUTOUT": "8",
    }
    checkpoints = {}
    for kind in ("eager", "captured"):
        torch.manual_seed(0)
        (tmp_path / kind).mkdir()
        graphs = RecordedGraphs()
        source = graphs if kind == "captured" else Eager(graphs)
        trainer = cifar_network(recorded(source), tmp_path / kind, "", **options)
        trainer.train()
        path = tmp_path / kind / "run" / "model_final.pth"
        checkpoints[kind] = torch.load(path, weights_only=True)
        assert graphs.replays == (7 if kind == "captured" else 0)
    assert_same(checkpoints["captured"], checkpoints["eager"])
    for group in checkpoints["captured"]["trainer"]["_trainer"]["optimizer"]["param_groups"]:
        assert isinstance(group["lr"], float)

    (path.parent / "last_checkpoint").write_text("model_0000004.pth")
    path.unlink()
    graphs = RecordedGraphs()
    trainer = recorded(graphs)(trainer.cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 5
    trainer.train()
    assert graphs.replays == 2
    resumed = torch.load(path, weights_only=True)
    for key in ("model", "trainer"):
        assert_same(resumed[key], checkpoints["eager"][key])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"MODEL.DEVICE": "cpu"}, "this run's device is cpu"),
        ({"MODEL.CLASSIFIER.MIXUP": "0.2"}, "MIXUP is 0.2 and CUTMIX is 0"),
    ],
)
def test_a_run_that_cannot_be_captured_is_rejected_at_start(tmp_path, options, message):
    cfg = load_config("configs/instant/cifar10_se_resnet20.yaml", ["MODEL.DEVICE", "cuda"])
    cfg.merge_from_list(["SOLVER.COMPILE", "graph", *(w for item in options.items() for w in item)])
    cfg.OUTPUT_DIR = str(tmp_path)
    with pytest.raises(UserError, match=message):
        check_run(cfg, eval_only=False, resume=False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "options"), [*CASES, ("se_shake_even29_2x4x64d", {"dtype": "bfloat16"})]
)
def test_on_a_gpu_captured_steps_are_bitwise_equal_to_eager_ones(name, options):
    graphs = CudaGraphs(torch.device("cuda", torch.cuda.current_device()))
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        expected = train(name, Eager(graphs), device="cuda", **options)
        found = train(name, graphs, device="cuda", **options)
    assert_same(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["", "float16", "bfloat16"])
def test_on_a_gpu_a_captured_step_has_one_launch_and_waits_every_20th_step(tmp_path, dtype):
    options = {"MODEL.DEVICE": "cuda", "SOLVER.COMPILE": "graph"}
    trainer = cifar_network(Trainer, tmp_path, dtype, **options)
    found = waits_of_steps(trainer, CudaWaits())
    # The first three steps are eager. To capture the next step, PyTorch synchronises.
    assert {step for step, waits in enumerate(found) if waits} <= {3, 19, len(found) - 1}
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with EventStorage() as trainer.storage, profile(activities=activities) as profiler:
        trainer.iter = len(found)
        trainer.before_step()
        trainer.run_step()
    launched = Counter(event.name for event in profiler.events())
    assert launched["cudaGraphLaunch"] == 1
    # Two kernels set the seed, and others copy the results.
    assert sum(n for name, n in launched.items() if "LaunchKernel" in name) < 10
