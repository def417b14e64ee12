"""Tests for training a small detector with an SE backbone from a LazyConfig."""

import json
import re
from pathlib import Path

import pytest
import torch

from senet_transfer import UserError
from senet_transfer.cli.arguments import argument_parser
from senet_transfer.cli.train import run_options
from senet_transfer.engine.lazy_config.train import load_lazy_config, main

# The documented config, but with a smaller network and fewer proposals.
CONFIG = """
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config
from senet_transfer import create_backbone

model = get_config("common/models/mask_rcnn_fpn.py").model
for name in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(name)
model.backbone.bottom_up = L(create_backbone)(
    name="se_resnet18", out_features=["res2", "res3", "res4", "res5"], se_ratio=8,
    stem_out_channels=16, res2_out_channels=16,
)
model.roi_heads.box_head.fc_dims = [16]
model.roi_heads.box_predictor.input_shape = ShapeSpec(channels=16)
model.proposal_generator.post_nms_topk = (20, 20)
model.roi_heads.batch_size_per_image = 8
model.roi_heads.num_classes = 5
model.roi_heads.box_predictor.test_score_thresh = 0.0
dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.dataset.names = dataloader.test.dataset.names = "lazy_shapes"
dataloader.train.mapper.use_instance_mask = False
dataloader.train.mapper.augmentations[0].short_edge_length = (64,)
dataloader.test.mapper.augmentations[0].short_edge_length = 64
dataloader.train.total_batch_size = 2
dataloader.train.num_workers = dataloader.test.num_workers = 0
optimizer = get_config("common/optim.py").SGD
optimizer.lr = 0.001
lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_1x
train = dict(output_dir="OUTPUT", max_iter=4, eval_period=4, device="cpu",
             checkpointer=dict(period=2, max_to_keep=5))
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "lazy.py"
    path.write_text(CONFIG.replace("OUTPUT", str(tmp_path / "run")))
    return path


def _options(config, shapes, *words):
    own = ["--dataset", "lazy_shapes", f"{shapes}/annotations/instances_tiny.json"]
    words = ["--config-file", str(config), *own, f"{shapes}/tiny", *words]
    return run_options(argument_parser().parse_args(words))


@pytest.mark.long
def test_a_run_trains_evaluates_resumes_and_is_not_overwritten(
    config, shapes, one_thread, monkeypatch
):
    folder = Path(config.parent, "run")
    main(_options(config, shapes, "train.max_iter=2"))
    saved = torch.load(folder / "model_final.pth", weights_only=True)
    assert any(".se." in name for name in saved["model"])
    with pytest.raises(UserError, match="model_final.pth.*--resume"):
        main(_options(config, shapes))

    main(_options(config, shapes, "--resume"))
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line] == [1, 3]
    assert torch.load(folder / "model_final.pth", weights_only=True)["iteration"] == 3
    results = json.loads((folder / "results.json").read_text())
    assert results["training"] == {"iterations": 4}

    main(_options(config, shapes, "--eval-only", f"train.init_checkpoint={folder}/model_final.pth"))
    again = json.loads((folder / "results.json").read_text())
    assert again["bbox"] == results["bbox"]

    # Simulate a launcher's restart of a run that was killed while writing its first checkpoint.
    for path in [*folder.glob("model_*"), folder / "last_checkpoint"]:
        path.unlink()
    (folder / ".model_0000001.pth.x.tmp").touch()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    main(_options(config, shapes, "train.max_iter=1"))
    assert (folder / "model_final.pth").is_file()
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.long
def test_the_documented_config_is_accepted_by_the_command(config, shapes):
    page = Path(__file__).parents[2] / "docs" / "detectron2.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    config.write_text(next(block for block in blocks if "LazyCall" in block))
    cfg = load_lazy_config(_options(config, shapes, "train.output_dir=output/other"))
    assert cfg.train.output_dir == "output/other"
    assert cfg.train.eval_period == 5000  # the default in Detectron2
    assert cfg.model.backbone.bottom_up.name == "se_resnet50"
    assert cfg.dataloader.test.mapper.image_format == "RGB"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["TEST.EVAL_PERIOD", "3"], "can't be applied.*Expected KEY=VALUE"),
        (["--deterministic"], "--deterministic is not supported with a LazyConfig"),
        (["--overwrite", "--resume"], "--overwrite.*can't be combined with --resume"),
    ],
)
def test_invalid_options_of_a_lazy_config_are_rejected(flags, words, config):
    with pytest.raises(UserError, match=words):
        load_lazy_config(_options(config, "x", *flags))
    config.write_text("model = {}")
    with pytest.raises(UserError, match="not contain dataloader, optimizer, lr_multiplier, train"):
        load_lazy_config(_options(config, "x"))
