"""Script that wrote ``fixtures/``. It was run once, with the code of ``COMMIT``.

    python tests/compatibility/write_fixtures.py

Later code must read these files, so they are never written again. The script records the behaviour
of that commit and therefore needs a checkout of it.
"""

import ast
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
import torch
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from omegaconf import OmegaConf

import senet_transfer
from tests.compatibility.inputs import (
    DOCUMENTS,
    FIXTURES,
    NARROW,
    ROOT,
    WITHOUT_ALL,
    draw_images,
    draw_pixels,
    flatten,
    last_metrics,
    tensor_sums,
)

COMMIT = "394ad59"
WITH_ALL = (
    "senet_transfer",
    "senet_transfer.backbones",
    "senet_transfer.classification",
    "senet_transfer.weights",
    "senet_transfer.layers",
    "senet_transfer.export",
    "senet_transfer.analysis.benchmark",
    "senet_transfer.analysis.report",
)
# Names outside ``__all__`` that users or LazyConfigs may refer to.
BESIDES = {
    "senet_transfer.backbones.registry": ("create_backbone",),
    "senet_transfer.weights.detect": ("having",),
    "senet_transfer.weights.names": ("torchvision",),
}

# Options of the training run, which uses momentum, averaged weights, and mixup (random numbers).
RUN = """\
MODEL.META_ARCHITECTURE ImageClassifier
MODEL.DEVICE cpu
MODEL.BACKBONE.NAME build_senet_backbone
MODEL.BACKBONE.ARCH se_cifar_resnet8
MODEL.BACKBONE.FREEZE_AT 0
MODEL.RESNETS.NORM BN
MODEL.WEIGHTS ''
MODEL.CLASSIFIER.MIXUP 0.2
DATASETS.TRAIN ('images/train',)
DATASETS.TEST ('images/val',)
INPUT.CLASSIFICATION.AUGMENT pad_crop
INPUT.CLASSIFICATION.CROP 32
INPUT.CLASSIFICATION.TEST_RESIZE 32
INPUT.CLASSIFICATION.TEST_CROP 32
DATALOADER.NUM_WORKERS 0
SOLVER.IMS_PER_BATCH 8
SOLVER.BASE_LR 0.02
SOLVER.NESTEROV True
SOLVER.MAX_ITER 6
SOLVER.STEPS (4,)
SOLVER.WARMUP_ITERS 0
SOLVER.CHECKPOINT_PERIOD 100
SOLVER.EMA.ENABLED True
SOLVER.EMA.DECAY 0.8
SEED 7
OUTPUT_DIR run
"""

# Code that sends SIGTERM after the third step, as a job scheduler does, to stop the run gracefully.
STOPPED = """
import os, runpy, signal, sys, time
from torch.optim.optimizer import register_optimizer_step_post_hook

steps = []

def stop(*_):
    steps.append(None)
    if len(steps) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)

register_optimizer_step_post_hook(stop)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

WEIGHTS_CONFIG = """\
MODEL:
  META_ARCHITECTURE: ImageClassifier
  BACKBONE:
    NAME: build_senet_backbone
    FREEZE_AT: 0
  RESNETS:
    DEPTH: 50
    NORM: BN
    STEM_OUT_CHANNELS: 4
    RES2_OUT_CHANNELS: 8
    WIDTH_PER_GROUP: 1
    STRIDE_IN_1X1: False
  SE:
    ENABLED: True
    RATIO: 4
  CLASSIFIER:
    NUM_CLASSES: 5
DATASETS:
  CLASSES: [a, b, c, d, e]
INPUT:
  FORMAT: RGB
  CLASSIFICATION:
    CROP: 64
    TEST_RESIZE: 64
    TEST_CROP: 64
"""


def call(*words: object, folder: Path, status: int = 0, **environment: str) -> None:
    """Run Python with the given arguments in a folder, and check the exit status."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    line = [sys.executable, *(str(word) for word in words)]
    done = subprocess.run(line, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr


def train_words() -> list[str]:
    """Write the config of a training run, and return the run's command line.

    The command line does not include the Python executable.
    """
    words = [word for line in RUN.splitlines() for word in line.split(" ", 1)]
    config = FIXTURES / "empty.yaml"
    config.write_text("VERSION: 2\n")
    return [str(ROOT / "tools/train_net.py"), "--config-file", str(config), *words]


def results(run: Path) -> dict:
    """Return the :func:`tensor_sums` of a run's final weights and of their moving average (EMA)."""
    names = {"model": "model_final.pth", "ema": "model_ema.pth"}
    found = {key: torch.load(run / name, weights_only=True) for key, name in names.items()}
    return {key: tensor_sums(checkpoint["model"]) for key, checkpoint in found.items()}


def write_run(work: Path) -> dict:
    """Save the output folder of an interrupted run, then resume the run and return its results.

    Also check that an uninterrupted run has the same results.
    """
    draw_images(work / "images")
    words = train_words()
    call(*words, folder=work)
    unbroken = results(work / "run")
    shutil.rmtree(work / "run")
    call("-c", STOPPED, *words, folder=work, status=75)
    kept = FIXTURES / "run"
    # Omit files that contain names from this machine.
    hidden = shutil.ignore_patterns("log.txt*", "events.*", "environment.txt")
    shutil.copytree(work / "run", kept, ignore=hidden)
    config = kept / "config.yaml"
    config.write_text(config.read_text().replace(f"{work}/", ""))
    call(words[0], "--config-file", "run/config.yaml", "--resume", folder=work)
    assert results(work / "run") == unbroken
    metrics = last_metrics(work / "run")
    kinds = ("lr", "total_loss", "classification/")
    return unbroken | {"metrics": {k: v for k, v in metrics.items() if k.startswith(kinds)}}


def write_weights() -> list:
    """Save a classifier in three file formats, and return its logits for a batch of test images."""
    folder = FIXTURES / "weights"
    folder.mkdir()
    (folder / "config.yaml").write_text(WEIGHTS_CONFIG)
    torch.manual_seed(0)
    model = senet_transfer.create_classifier("se_resnet50", num_classes=5, **NARROW).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_mean"):
                tensor.normal_(0, 0.1)
            elif name.endswith(("norm.weight", "running_var")):
                tensor.uniform_(0.5, 1.5)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in pixel_values(model))
        logits = model((torch.from_numpy(draw_pixels()) - mean) / std)
    for suffix in ("pth", "safetensors"):
        senet_transfer.save_weights(model, folder / f"classifier.{suffix}")
    words = ["--weights", folder / "classifier.pth", "--output", folder / "classifier.onnx"]
    call(ROOT / "tools/export.py", *words, folder=ROOT)
    network = onnx.load(folder / "classifier.onnx")
    for node in network.graph.node:
        del node.metadata_props[:]  # remove stack traces, which contain paths
    onnx.save(network, folder / "classifier.onnx")
    return logits.tolist()


def pixel_values(model: torch.nn.Module) -> tuple:
    """Return the mean and standard deviation with which a model's inputs are normalised."""
    return model.preprocessing.mean, model.preprocessing.std


def write_detector_config(work: Path) -> dict:
    """Run the smoke test of the demo detector, and copy the run's config.yaml to the fixtures.

    Returns:
        A dictionary with the config's keys and values (``"keys"``) and the number of parameters of
        the model (``"parameters"``).
    """
    environment = {"DETECTRON2_DATASETS": "datasets"}
    words = ["--output", "datasets/shapes", "--train", "8", "--val", "4"]
    call(ROOT / "datasets/prepare_shapes.py", *words, folder=work)
    words = ["--config-file", ROOT / "configs/instant/demo_faster_rcnn_se_r18.yaml"]
    words += ["OUTPUT_DIR", "output", "MODEL.DEVICE", "cpu"]
    call(ROOT / "tools/train_net.py", *words, folder=work, **environment)
    path = FIXTURES / "detector.yaml"
    shutil.copy(work / "output/config.yaml", path)
    cfg = senet_transfer.get_senet_config()
    cfg.merge_from_file(str(path))
    parameters = sum(value.numel() for value in build_model(cfg).parameters())
    return {"keys": flatten(cfg), "parameters": parameters}


def write_lazy_config() -> int:
    """Save the README's LazyConfig and return the number of parameters of its backbone."""
    stages = ["res2", "res3", "res4", "res5"]
    create = LazyCall(senet_transfer.create_backbone)
    backbone = LazyCall(FPN)(
        bottom_up=create(name="se_resnet50", out_features=stages, norm="FrozenBN"),
        in_features=stages,
        out_channels=256,
        top_block=LazyCall(LastLevelMaxPool)(),
    )
    LazyConfig.save(OmegaConf.create({"backbone": backbone}), str(FIXTURES / "lazy_config.yaml"))
    return sum(value.numel() for value in instantiate(backbone).parameters())


def public_names() -> dict[str, list[str]]:
    """Return the sorted public names of each module, keyed by the module's dotted name.

    Each list also contains "", which represents the module itself.
    """
    names = {module: {"", *importlib.import_module(module).__all__} for module in WITH_ALL}
    for short in WITHOUT_ALL:
        module = importlib.import_module(f"senet_transfer.{short}")
        own = {n for n, v in vars(module).items() if n[0] != "_" and _is_own(module, n, v)}
        names[module.__name__] = {"", *own}
    for document in DOCUMENTS:
        text = (ROOT / f"{document}.md").read_text()
        for block in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("senet_transfer"):
                    members = (alias.name for alias in node.names)
                    names.setdefault(node.module, {""}).update(members)
        for module, name in re.findall(r"\b(senet_transfer(?:\.\w+)*)\.(\w+)\b", text):
            if importlib.util.find_spec(f"{module}.{name}" if "." in module else module):
                names.setdefault(module, {""}).add(name)
    for module, members in BESIDES.items():
        names.setdefault(module, {""}).update(members)
    return {module: sorted(members) for module, members in sorted(names.items())}


def _is_own(module, name: str, value: object) -> bool:
    return getattr(value, "__module__", None) == module.__name__ or name.isupper()


def write_interface(work: Path) -> None:
    """Write the fixtures of the public interface: names, help texts, configs and default values."""
    path, output = FIXTURES / "public_names.json", work / "interface.json"
    path.write_text(json.dumps(public_names(), indent=1) + "\n")
    call(ROOT / "tests/compatibility/dump_interface.py", path, output, folder=ROOT)
    found = json.loads(output.read_text())
    assert not found["missing"], found["missing"]
    for name, text in found["help"].items():
        place = FIXTURES / "help" / f"{name.removesuffix('.py').replace('/', '_')}.txt"
        place.parent.mkdir(exist_ok=True)
        place.write_text(text)
    configs = (p.relative_to(ROOT / "configs").as_posix() for p in ROOT.glob("configs/**/*.yaml"))
    (FIXTURES / "configs.json").write_text(json.dumps(sorted(configs), indent=1) + "\n")
    (FIXTURES / "defaults.yaml").write_text(senet_transfer.get_senet_config().dump())


def main() -> None:
    """Write all fixtures. The folder ``fixtures/`` must not exist."""
    FIXTURES.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        expected = {
            "run": write_run(work),
            "logits": write_weights(),
            "detector": write_detector_config(work),
            "lazy_parameters": write_lazy_config(),
        }
        write_interface(work)
    (FIXTURES / "empty.yaml").unlink()
    (FIXTURES / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    text = (
        f"These fixtures were written by `write_fixtures.py` with the code of commit {COMMIT}. "
        "Do not change them.\n"
    )
    (FIXTURES / "README.md").write_text(text)


if __name__ == "__main__":
    main()
