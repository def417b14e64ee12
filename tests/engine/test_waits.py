"""Tests that count the host-device synchronisations in each training step.

On a CPU, the tests count operators that would synchronise with a GPU, e.g. to copy a value to the
host. As on a GPU, the trainers read the loss values every 20 steps.
"""

import copy
import warnings
from collections import Counter
from contextlib import ExitStack, contextmanager
from itertools import islice
from unittest import mock

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from torch.utils._python_dispatch import TorchDispatchMode

from senet_transfer.cli.arguments import argument_parser
from senet_transfer.cli.train import run_options
from senet_transfer.data.cifar.in_memory import ImageArrays, save_images, split_file
from senet_transfer.data.shapes.class_folders import make_shape_classes
from senet_transfer.engine import solver
from senet_transfer.engine import trainer as trainer_module
from senet_transfer.engine.setup import setup
from senet_transfer.engine.train_step import StepTrainer
from senet_transfer.engine.trainer import Trainer

aten = torch.ops.aten

# Operators for which the host needs the result or its shape.
_READING = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten.unique_dim,
    aten._unique2,
}
STEPS = 22

_METHODS = ("cpu", "numpy", "tolist")


class Waits(TorchDispatchMode):
    """Counter of operators and tensor methods that would synchronise with a GPU."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in _READING:
            self.found[function.overloadpacket.__name__] += 1
        # A mask used as an index is converted to indices with nonzero.
        if function.overloadpacket in (aten.index, aten.index_put_):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            self.found["mask"] += bool(masks)
        return function(*args, **(kwargs or {}))

    @contextmanager
    def counting(self):
        self.found.clear()
        with ExitStack() as stack:
            stack.enter_context(self)
            for name in _METHODS:
                method = getattr(torch.Tensor, name)

                def counted(*args, name=name, method=method, **kwargs):
                    self.found[name] += 1
                    return method(*args, **kwargs)

                stack.enter_context(mock.patch.object(torch.Tensor, name, counted))
            yield


class FusedTrainer(Trainer):
    """Trainer with the fused optimizer that is normally used only on a GPU."""

    @classmethod
    def build_optimizer(cls, cfg, model):
        optimizer = super().build_optimizer(cfg, model)
        group = optimizer.defaults | {"foreach": False, "fused": True}
        keys = ("lr", "momentum", "weight_decay", "nesterov", "fused")
        groups = [{"params": group["params"]} for group in optimizer.param_groups]
        fused = torch.optim.SGD(groups, **{key: group[key] for key in keys})
        solver.fill_momentum(fused)
        return fused


class CudaWaits:
    """Counter of operations that synchronise the host with the GPU."""

    @contextmanager
    def counting(self):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        self.found = Counter("synchronizing CUDA" in str(each.message) for each in caught)
        del self.found[False]


@pytest.fixture
def asynchronous(monkeypatch):
    """Make trainers treat the CPU as a device that runs asynchronously, such as a GPU."""
    monkeypatch.setattr(trainer_module, "_ASYNCHRONOUS", ("cpu",))


def waits_of_steps(trainer, waits):
    """Count the host-device synchronisations in each training step, including its hooks.

    Return one dictionary per step, which maps each operator or method to its number of calls.
    """
    found = []
    with EventStorage() as trainer.storage:
        trainer.start_iter = 0
        trainer.before_train()
        for trainer.iter in range(STEPS):
            with waits.counting():
                trainer.before_step()
                trainer.run_step()
                trainer.after_step()
            found.append(dict(+waits.found))
    return found


_OPTIONS = {
    "MODEL.DEVICE": "cpu",
    "SOLVER.EPOCHS": "None",
    "SOLVER.STEPS": "()",
    "SOLVER.MAX_ITER": str(STEPS),
    "SOLVER.CHECKPOINT_PERIOD": "100",
    "SOLVER.EMA.ENABLED": "True",
    "SOLVER.CLIP_GRADIENTS.ENABLED": "True",
    "SOLVER.IMS_PER_BATCH": "4",
    "TEST.EVAL_PERIOD": "0",
    "DATALOADER.NUM_WORKERS": "0",
}


def classifier(kind, config, data, tmp_path, **options):
    words = ["--config-file", f"configs/instant/{config}.yaml"]
    keys = {**_OPTIONS, "OUTPUT_DIR": str(tmp_path / "run"), **options}
    keys |= {"DATASETS.TRAIN": f"('{data}',)", "DATASETS.TEST": f"('{data}',)"}
    words += [word for item in keys.items() for word in item]
    trainer = kind(setup(run_options(argument_parser().parse_args(words))))
    trainer.resume_or_load(resume=False)
    return trainer


def cifar(folder):
    """Write a small dataset of 32x32 images and return its folder."""
    images = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8)
    data = ImageArrays(images, torch.arange(32) % 3, ["cat", "dog", "ship"], "test")
    for split in ("train", "test"):
        save_images(data, split_file(folder / "images", split), "test")
    return folder / "images"


def assert_waits_only_every_20th(found):
    assert [step for step, waits in enumerate(found) if waits] == [19, STEPS - 1], found


def places(kind, shapes, tmp_path, **options):
    name = make_shape_classes(shapes, tmp_path / "classes")
    small = {"MODEL.BACKBONE.ARCH": "se_resnet18", "INPUT.CLASSIFICATION.CROP": "32"}
    trainer = classifier(kind, "places365_se_r152", name, tmp_path, **small, **options)
    # Load the batches in advance. In a real run, worker processes load them asynchronously.
    batches = list(islice(trainer._trainer.data_loader, STEPS))
    if torch.cuda.is_available():
        batches = [{**batch, "image": batch["image"].pin_memory()} for batch in batches]
    trainer._trainer.data_loader = batches
    return trainer


def cifar_network(kind, tmp_path, dtype, **options):
    options |= {"MODEL.BACKBONE.ARCH": "se_cifar_resnet8"}
    if dtype:
        options |= {"SOLVER.AMP.ENABLED": "True", "SOLVER.AMP.DTYPE": dtype}
    return classifier(kind, "cifar10_se_resnet20", cifar(tmp_path), tmp_path, **options)


@pytest.mark.long
def test_a_classifier_waits_only_in_every_20th_step(shapes, tmp_path, asynchronous):
    trainer = places(FusedTrainer, shapes, tmp_path)
    assert_waits_only_every_20th(waits_of_steps(trainer, Waits()))


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["", "float16"])
def test_a_cifar_network_waits_only_in_every_20th_step(tmp_path, asynchronous, dtype):
    trainer = cifar_network(FusedTrainer, tmp_path, dtype)
    assert_waits_only_every_20th(waits_of_steps(trainer, Waits()))


def waits_of_detectors(trainer, kind, waits, **options):
    """Count the host-device synchronisations in three training steps on the same batch.

    Args:
        trainer: Trainer that provides the model and the batch.
        kind: Trainer class that runs the steps.
        waits: Counter of synchronisations, such as :class:`Waits`.
        **options: Further arguments for ``kind``.

    Returns:
        One ``collections.Counter`` per step.
    """
    batch = next(iter(trainer._trainer.data_loader))
    model = copy.deepcopy(trainer.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0025, momentum=0.9, fused=True)
    own, found = kind(model, iter([batch] * 3), optimizer, **options), []
    with EventStorage(), mock.patch.object(kind, "write_metrics"):
        for own.iter in range(3):
            torch.manual_seed(own.iter)
            with waits.counting():
                own.run_step()
            found.append(+waits.found)
    return found


def detector(command, **options):
    trainer = Trainer(setup(command(**options)))
    trainer.resume_or_load(resume=False)
    return trainer


@pytest.mark.long
def test_a_detector_waits_as_often_as_with_detectron2s_trainer(command, asynchronous):
    trainer = detector(command)
    expected = waits_of_detectors(trainer, SimpleTrainer, Waits())
    found = waits_of_detectors(trainer, StepTrainer, Waits(), reads_after=lambda iteration: False)
    assert found == expected
    assert all(found)


@pytest.mark.gpu
def test_on_a_gpu_a_classifier_waits_only_in_every_20th_step(shapes, tmp_path):
    trainer = places(Trainer, shapes, tmp_path, **{"MODEL.DEVICE": "cuda"})
    assert_waits_only_every_20th(waits_of_steps(trainer, CudaWaits()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["", "float16", "bfloat16"])
def test_on_a_gpu_a_cifar_network_waits_only_in_every_20th_step(tmp_path, dtype):
    trainer = cifar_network(Trainer, tmp_path, dtype, **{"MODEL.DEVICE": "cuda"})
    assert_waits_only_every_20th(waits_of_steps(trainer, CudaWaits()))


@pytest.mark.gpu
def test_on_a_gpu_a_detector_waits_no_more_often_than_with_detectron2s_trainer(command):
    trainer = detector(command, **{"MODEL.DEVICE": "cuda"})
    expected = waits_of_detectors(trainer, SimpleTrainer, CudaWaits())
    found = waits_of_detectors(
        trainer, StepTrainer, CudaWaits(), reads_after=lambda iteration: False
    )
    assert all(found)
    # Detectron2 also synchronises for each image that is copied to the GPU.
    for waits, others in zip(found, expected, strict=True):
        assert waits.total() <= others.total()
