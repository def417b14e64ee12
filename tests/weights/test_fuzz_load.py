"""Tests that a randomly modified weight file is either loaded completely or raises UserError."""

import random
import time
from pathlib import Path

import pytest
import torch

from senet_transfer import UserError, create_backbone, create_classifier
from senet_transfer.weights.formats.reader import OWN_METADATA, WeightFile, read_tensors
from senet_transfer.weights.load import load_source
from senet_transfer.weights.mapping import source as source_module
from senet_transfer.weights.mapping.source import examine
from senet_transfer.weights.save import model_metadata
from tests.weights import published
from tests.weights.caffe_networks import places_resnet
from tests.weights.peers import peer, randomise, save

ODD = ["", ".", "x", "fc", "layer1.0", "layer9.9.conv9.weight", "backbone.", "stem.conv1.weight",
       "roi_heads.res5.0.conv1.weight", "linear.weight", "conv1.0.weight", "res2.0.se.fc1.weight",
       "layer1.0.se.fc1.weight", "anchor_generator.cell_anchors.0", "pixel_mean"]  # fmt: skip


def _mutate(file: WeightFile, rng: random.Random) -> WeightFile:
    """Change tensor names, shapes, dtypes or metadata of a weight file at random."""
    tensors, metadata = dict(file.tensors), dict(file.metadata)
    for _ in range(rng.choice([1, 1, 2, 5])):
        name = rng.choice(list(tensors))
        tensor = tensors[name]
        kind = rng.randrange(9)
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            tensors[rng.choice(ODD)] = tensors.pop(name)
        elif kind == 2:
            tensors[rng.choice(ODD)] = tensor
        elif kind == 3:
            tensors[name] = tensor.reshape(-1)
        elif kind == 4:
            tensors[name] = tensor.new_zeros([rng.choice([0, 1, 3])] * rng.randrange(6))
        elif kind == 5:
            tensors[name] = tensor.to(rng.choice([torch.int8, torch.float16, torch.bool]))
        elif kind == 6:
            other = rng.choice(list(tensors))
            tensors[name], tensors[other] = tensors[other], tensors[name]
        elif kind == 7:
            tensors = {
                f"{rng.choice(['backbone.', 'module.', 'a.'])}{k}": v for k, v in tensors.items()
            }
        else:
            metadata[rng.choice([OWN_METADATA, "__author__"])] = rng.choice(
                [None, 3, [], {}, "torchvision", {"geometry": 3, "preprocessing": []},
                 {"geometry": {"stem_pool": 5}, "preprocessing": {"mean": "abc"}},
                 {"preprocessing": {"mean": [1], "format": 4}}]
            )  # fmt: skip
    return WeightFile(file.path, file.format, tensors, metadata, file.layers)


def _write_caffe(path: Path) -> Path:
    places_resnet((1, 1, 1, 1), classes=3).write(path.with_suffix(".prototxt"), path)
    return path


def _own(path: Path) -> Path:
    model = create_backbone("se_resnet18")
    torch.save({"model": model.state_dict(), OWN_METADATA: model_metadata(model)}, path)
    return path


WRITERS = {
    "torchvision_v1": ("resnet18", lambda path: save(peer("torchvision", "resnet18"), path)),
    "timm": ("se_resnet18", lambda path: save(peer("timm", "seresnet18"), path)),
    "timm_legacy": ("se_resnet18", lambda path: save(peer("timm", "legacy_seresnet18"), path)),
    "moskomule": ("se_resnet18", lambda path: save(randomise(published.moskomule(18)), path)),
    "places365_caffe": ("resnet50", _write_caffe),
    "senet_transfer": ("se_resnet18", _own),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", WRITERS)
def test_mutated_names_shapes_and_metadata_are_loaded_or_rejected(family, tmp_path, monkeypatch):
    ours, write = WRITERS[family]
    file = read_tensors(write(tmp_path / "file.pth"))
    model = create_classifier(ours)
    rng = random.Random(0)
    loaded = 0
    for _ in range(1000):
        mutated = _mutate(file, rng)
        monkeypatch.setattr(source_module, "read_tensors", lambda path, f=mutated, **_: f)
        before = model.backbone.res5[0].conv1.weight.clone()
        start = time.perf_counter()
        try:
            report = load_source(model, examine("file.pth"))
        except UserError:
            assert torch.equal(model.backbone.res5[0].conv1.weight, before)
        else:
            loaded += 1
            filled = {*report.loaded, *report.initialised}
            rest = {name for name in model.state_dict() if "num_batches" not in name} - filled
            assert not rest
        assert time.perf_counter() - start < 2
    assert loaded < 500
