"""End-to-end test on Places365: prepare, train, evaluate, and compare with torchvision."""

import csv
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import SqueezeExcitation

ROOT = Path(__file__).resolve().parents[3]
NORMALISE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class GatedBlock(BasicBlock):
    """torchvision's ``BasicBlock`` with ``SqueezeExcitation`` after the last norm layer."""

    def __init__(self, inputs, outputs, *args, **kwargs):
        super().__init__(inputs, outputs, *args, **kwargs)
        self.bn2 = nn.Sequential(self.bn2, SqueezeExcitation(outputs, outputs // 16))


def torchvisions_se_resnet18(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Build SE-ResNet-18 from torchvision's modules and load this project's weights into it."""
    model = ResNet(GatedBlock, [2, 2, 2, 2], num_classes=len(tensors["linear.bias"]))
    names = {
        r"^linear\.": "fc.",
        r"^backbone\.stem\.conv1\.norm\.": "bn1.",
        r"^backbone\.stem\.": "",
        r"^backbone\.res(\d)\.": lambda stage: f"layer{int(stage[1]) - 1}.",
        r"\.conv1\.norm\.": ".bn1.",
        r"\.conv2\.norm\.": ".bn2.0.",
        r"\.se\.": ".bn2.1.",
        r"\.shortcut\.norm\.": ".downsample.1.",
        r"\.shortcut\.": ".downsample.0.",
    }
    state = {}
    for name, tensor in tensors.items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        is_gate = re.search(r"bn2\.1\.fc\d\.weight", name)
        state[name] = tensor[..., None, None] if is_gate else tensor
    model.load_state_dict(state)
    return model.eval()


@torch.inference_mode()
def plain_loop(model: nn.Module, places: Path, resize: int, crop: int) -> torch.Tensor:
    """Compute logits in the order of places365_val.txt, using only Pillow and torchvision."""
    steps = [transforms.Resize(resize), transforms.CenterCrop(crop)]
    view = transforms.Compose([*steps, transforms.ToTensor(), NORMALISE])
    names = [line.split()[0] for line in (places / "places365_val.txt").read_text().splitlines()]
    images = [Image.open(places / "val_256" / name).convert("RGB") for name in names]
    return torch.cat([model(view(image)[None]) for image in images])


def command(script: str, *words: object) -> None:
    subprocess.run(
        [sys.executable, script, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=3600,
    )


@pytest.mark.slow
def test_a_classifier_trained_on_the_official_files_agrees_with_torchvision(shared_data, tmp_path):
    source = shared_data / "mini_places365"
    for split in ("val", "train_standard"):
        words = ["--source", source, "--split", split, "--output", tmp_path / split]
        command("datasets/prepare_places365.py", *words)
    run = tmp_path / "run"
    data = ["DATASETS.TRAIN", f"('{tmp_path}/train_standard',)"]
    data += ["DATASETS.TEST", f"('{tmp_path}/val',)", "OUTPUT_DIR", run]
    recipe = ["--config-file", "configs/demo_places365_se_r18.yaml", "--num-gpus", "1"]
    command("tools/train_net.py", *recipe, *data)

    with tarfile.open(tmp_path / "val_256.tar", "w") as tar:
        tar.add(source / "val_256", "val_256")
    for name in ("places365_val.txt", "categories_places365.txt"):
        (tmp_path / name).write_text((source / name).read_text())
    found, rows = check_sources(
        run / "model_final.pth",
        {"shards": tmp_path / "val", "folder": source, "archive": tmp_path / "val_256.tar"},
        tmp_path,
    )
    # The images are of eight classes, so guessing has an error of about 88%.
    assert found["top1_error"] < 50
    check_logits(run / "model_final.pth", rows, source)


def check_sources(weights: Path, sources: dict[str, Path], folder: Path) -> tuple[dict, list]:
    """Check that all data sources give the same top-1 error and the same top-5 error.

    Return the results for the last data source, and the rows of its CSV file with the logits.
    """
    errors = set()
    for kind, data in sources.items():
        files = ["--output", folder / f"{kind}.json", "--predictions", folder / f"{kind}.csv"]
        model = ["--model", "se_resnet18", "--weights", weights, "--data", data, "--logits"]
        command("tools/eval_places365.py", *model, *files)
        found = json.loads((folder / f"{kind}.json").read_text())
        assert found["images"] == 298
        errors.add((found["top1_error"], found["top5_error"]))
        with open(folder / f"{kind}.csv", newline="") as file:
            rows = sorted(csv.DictReader(file), key=lambda row: row["key"])
    assert len(errors) == 1
    return found, rows


def check_logits(weights: Path, rows: list[dict], source: Path) -> None:
    """Compare each image's logits and top-5 classes with those of torchvision's SE-ResNet-18."""
    tensors = torch.load(weights, weights_only=True)["model"]
    model = torchvisions_se_resnet18(tensors)
    # These are the sizes in the recipe. The tools read them from the checkpoint.
    expected = plain_loop(model, source, resize=73, crop=64)
    logits = [[float(row[f"logit{label}"]) for label in range(365)] for row in rows]
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-4)
    best = [[int(row[f"top{place}"]) for place in range(1, 6)] for row in rows]
    assert best == expected.topk(5).indices.tolist()
