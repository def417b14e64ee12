"""Checkpoints of a small network, in the formats of other projects' training scripts."""

import argparse
import collections
import datetime
import json
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.resnet import BasicBlock

from tests.weights.peers import randomise

WIDTH = 8


class TinyResNet(nn.Module):
    """ResNet-18 with torchvision's blocks and tensor names, and 8 channels in the stem."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        for stage in range(4):
            inputs, outputs = WIDTH * 2 ** max(stage - 1, 0), WIDTH * 2**stage
            shortcut = None
            if stage:
                shortcut = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs)
                )
            first = BasicBlock(inputs, outputs, 2 if stage else 1, shortcut)
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, BasicBlock(outputs, outputs)))
        self.fc: nn.Module = nn.Linear(8 * WIDTH, classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the last feature map."""
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def tiny(seed: int = 0, classes: int = 5) -> TinyResNet:
    """Return a TinyResNet with random weights."""
    model = TinyResNet(classes)
    randomise(model, seed)
    return model


State = dict[str, Any]


def prefixed(prefix: str, state: State) -> State:
    """Return a state dict with a prefix added to all names."""
    return {prefix + name: tensor for name, tensor in state.items()}


def _sgd(model: nn.Module) -> State:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def averaged(model: nn.Module) -> AveragedModel:
    """Wrap a model in PyTorch's AveragedModel, as torchvision's reference training does."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)


def timm_train(model: nn.Module, ema: nn.Module | None = None) -> State:
    """Return the content of a checkpoint from timm's CheckpointSaver."""
    state = {
        "epoch": 3,
        "arch": "resnet18",
        "optimizer": _sgd(model),
        "version": 2,
        "args": argparse.Namespace(model="resnet18", output=pathlib.PosixPath("out"), lr=0.1),
        "amp_scaler": torch.amp.GradScaler("cpu").state_dict(),
        "state_dict": model.state_dict(),
        "metric": 71.2,
    }
    return state | ({"state_dict_ema": ema.state_dict()} if ema else {})


def torchvision_references(model: nn.Module, ema: nn.Module | None = None) -> State:
    """Return the content of a checkpoint from torchvision's references/classification/train.py."""
    state = {
        "model": model.state_dict(),
        "optimizer": _sgd(model),
        "lr_scheduler": {"last_epoch": 3, "_step_count": 4},
        "epoch": 3,
        "args": argparse.Namespace(
            model="resnet18", start=datetime.datetime.now(), device=torch.device("cpu")
        ),
    }
    return state | ({"model_ema": averaged(ema).state_dict()} if ema else {})


def lightning(state: State) -> State:
    """Return the content of a checkpoint from Lightning's ModelCheckpoint."""
    return {
        "epoch": 3,
        "global_step": 40,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": collections.OrderedDict(state),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 4}}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'val_loss'}": {
                "best_model_score": torch.tensor(0.5),
                "dirpath": "/runs/1",
            }
        },
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(3)}}}],
        "lr_schedulers": [{"last_epoch": 3}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "root": pathlib.PosixPath("data")},
    }


def lightning_averaging(state: State, ema: State) -> State:
    """Return the content of a checkpoint from Lightning's WeightAveraging callback."""
    return lightning(ema) | {
        "current_model_state": state,
        "averaging_state": {"n_averaged": torch.tensor(5)},
    }


def mmengine(state: State, ema: State | None = None) -> State:
    """Return the content of a checkpoint from mmengine's CheckpointHook.

    If ``ema`` is given, the content is as saved with EMAHook, which stores the EMA weights in
    ``state_dict`` and the weights without EMA in ``ema_state_dict``.
    """
    content = {
        "meta": {"epoch": 3, "mmengine_version": "0.10.5", "time": "20250101", "seed": 1},
        "state_dict": state,
        "message_hub": {
            "log_scalars": {"train/loss": torch.tensor([1.0, 2.0])},
            "runtime_info": {"epoch": 3},
        },
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "param_schedulers": [{"last_step": 3}],
    }
    if ema is not None:
        content["state_dict"] = ema
        content["ema_state_dict"] = {"steps": torch.tensor(9), **prefixed("module.", state)}
    return content


def moco(query: nn.Module, key: nn.Module) -> State:
    """Return the content of a checkpoint from MoCo's main_moco.py."""
    state = {
        **prefixed("module.encoder_q.", query.state_dict()),
        **prefixed("module.encoder_k.", key.state_dict()),
        "module.queue": torch.randn(16, 32),
        "module.queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    return {"epoch": 3, "arch": "resnet18", "state_dict": state, "optimizer": _sgd(query)}


def dino(student: nn.Module, teacher: nn.Module) -> State:
    """Return the content of a checkpoint from DINO's main_dino.py for a convolutional network."""

    def with_head(model: nn.Module, prefix: str) -> State:
        state = {n: t for n, t in model.state_dict().items() if not n.startswith("fc.")}
        head = {"head.mlp.0.weight": torch.randn(4, 64), "head.last_layer.weight_g": torch.ones(4)}
        return prefixed(prefix, prefixed("backbone.", state) | head)

    return {
        "student": with_head(student, "module."),
        "teacher": with_head(teacher, ""),
        "optimizer": _sgd(student),
        "epoch": 3,
        "args": argparse.Namespace(arch="resnet18", output_dir="."),
        "dino_loss": {"center": torch.zeros(1, 16)},
        "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0},
    }


def swav(model: nn.Module) -> State:
    """Return the content of a checkpoint from SwAV's main_swav.py."""
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("fc.")}
    state["projection_head.0.weight"] = torch.randn(16, 64)
    state["projection_head.1.running_var"] = torch.ones(16)
    state["prototypes.weight"] = torch.randn(30, 16)
    return {"epoch": 3, "state_dict": prefixed("module.", state), "optimizer": _sgd(model)}


def deepspeed(state: State, *, zero3: bool = False) -> State:
    """Return the content of DeepSpeed's mp_rank_00_model_states.pt."""
    shapes = collections.OrderedDict((n, t.shape) for n, t in state.items())
    if zero3:
        state = {
            n: torch.empty(0) if n.endswith(("weight", "bias")) else t for n, t in state.items()
        }
    return {
        "module": collections.OrderedDict(state),
        "buffer_names": ["bn1.running_mean"],
        "optimizer": None,
        "param_shapes": [shapes],
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": 40,
        "global_samples": 1280,
        "dp_world_size": 2,
        "mp_world_size": 1,
        "ds_config": {"train_batch_size": 32, "zero_optimization": {"stage": 3 if zero3 else 1}},
        "ds_version": "0.16.2",
    }


def write_shards(state: State, folder: Path, parts: int = 2) -> Path:
    """Write a sharded model as huggingface_hub does, and return the path of its index."""
    names = list(state)
    weight_map = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        safetensors.torch.save_file(
            {n: state[n].contiguous() for n in names[part::parts]}, folder / file, {"format": "pt"}
        )
        weight_map |= dict.fromkeys(names[part::parts], file)
    index = folder / "model.safetensors.index.json"
    size = sum(tensor.nbytes for tensor in state.values())
    index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return index


Writer = Callable[[State, Path], Any]

# Functions that write a flat state dict, by format.
FLAT_WRITERS: dict[str, Writer] = {
    "pth": torch.save,
    "safetensors": lambda state, path: safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, path
    ),
}
