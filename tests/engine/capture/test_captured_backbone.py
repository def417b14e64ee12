"""Tests for detector backbones captured as CUDA graphs, which are simulated on a CPU."""

import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from senet_transfer import UserError, create_backbone
from senet_transfer.config.load import load_config
from senet_transfer.engine.capture.captured_backbone import CapturedBackbone
from senet_transfer.engine.run_checks import check_run
from senet_transfer.engine.setup import setup
from senet_transfer.engine.trainer import Trainer
from senet_transfer.models.build import build_senet_fpn_backbone
from tests.comparing import assert_same


class Captures:
    """Stand-in for `torch.cuda.make_graphed_callables` with the same warm-up and input checks."""

    def __init__(self):
        self.sizes, self.replays = [], 0

    def __call__(self, module, samples):
        assert not torch.is_autocast_enabled("cpu") or not torch.is_autocast_cache_enabled()
        self.sizes.append(tuple(samples[0].shape[2:]))
        parameters = [p for p in module.parameters() if p.requires_grad]
        for _ in range(3):
            outputs = list(module(*samples).values())
            gradients = [torch.empty_like(output) for output in outputs]
            torch.autograd.grad(outputs, parameters, gradients, allow_unused=True)

        def replay(images):
            assert images.shape == samples[0].shape
            assert images.stride() == samples[0].stride()
            self.replays += 1
            return module(images)

        return replay


def images(height, width=32, device="cpu"):
    generator = torch.Generator().manual_seed(height)
    return torch.randn(2, 3, height, width, generator=generator).to(device)


def backbone(norm="BN"):
    torch.manual_seed(0)
    return create_backbone("se_cifar_resnet8", norm=norm)


@pytest.mark.long
def test_frequent_sizes_are_captured_up_to_a_limit_and_others_are_eager(caplog):
    caplog.set_level("INFO")
    net, captures = backbone(), Captures()
    expected = copy.deepcopy(net)
    CapturedBackbone(net, captures, max_sizes=2)
    for height in [8, 16, 8, 8, 16, 24, 24, 24, 16, 8, 24, 40, 40, 40]:
        found, wanted = net(images(height)), expected(images(height))
        assert_same(found, wanted)
        for features in (found, wanted):
            next(iter(features.values())).sum().backward()
    assert captures.sizes == [(8, 32), (24, 32)]
    assert_same(net.state_dict(), expected.state_dict())  # includes running statistics
    for own, other in zip(net.parameters(), expected.parameters(), strict=True):
        assert_same(own.grad, other.grad)
    assert caplog.text.count("INPUT.SIZE_DIVISIBILITY") == 1


def test_evaluation_is_eager_and_a_new_mode_or_precision_is_captured_again():
    net, captures = backbone(), Captures()
    CapturedBackbone(net, captures)
    for _ in range(3):
        net(images(8))
    net.eval()
    for _ in range(3):
        net(images(8))
    net.train()
    with torch.no_grad():
        net(images(8))
    assert (len(captures.sizes), captures.replays) == (1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            (features,) = net(images(8)).values()
    assert features.dtype == torch.bfloat16
    assert len(captures.sizes) == 2
    next(module for module in net.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    for _ in range(3):
        net(images(8))
    assert len(captures.sizes) == 3


def test_a_backbone_that_cannot_be_captured_is_rejected():
    def capture(module, samples):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    net = backbone()
    CapturedBackbone(net, capture, occurrences=1)
    with pytest.raises(UserError, match=r"backbone can't be captured .*is capturing\)\. Set"):
        net(images(8))


@pytest.mark.long
def test_a_detector_with_a_captured_backbone_learns_the_same(command, tmp_path):
    captures = Captures()

    class CapturedTrainer(Trainer):
        def __init__(self, cfg):
            # Set this key here, because setup rejects it on a CPU.
            cfg.defrost()
            cfg.SOLVER.COMPILE = "graph"
            cfg.freeze()
            super().__init__(cfg)

        @classmethod
        def capture_backbone(cls, backbone):
            CapturedBackbone(backbone, captures)

    options = {"SOLVER.MAX_ITER": "6", "SOLVER.STEPS": "()", "INPUT.SIZE_DIVISIBILITY": "96"}
    checkpoints = []
    for kind in (Trainer, CapturedTrainer):
        trainer = kind(setup(command(OUTPUT_DIR=str(tmp_path / kind.__name__), **options)))
        assert trainer.model.backbone.size_divisibility == 96
        trainer.resume_or_load(resume=False)
        trainer.train()
        path = tmp_path / kind.__name__ / "model_final.pth"
        checkpoints.append(torch.load(path, weights_only=True))
    for key in ("model", "trainer"):
        assert_same(checkpoints[1][key], checkpoints[0][key])
    assert captures.sizes == [(96, 96)]
    assert captures.replays == 4


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("faster_rcnn_se_r50", ["SOLVER.COMPILE", "graph"], "MICRO_BATCHES is 2"),
        (
            "faster_rcnn_se_r50",
            ["MODEL.BACKBONE.NAME", "build_senet_backbone", "INPUT.SIZE_DIVISIBILITY", "64"],
            "only supported for detectors whose",
        ),
        ("instant/cifar10_se_resnet20", ["INPUT.SIZE_DIVISIBILITY", "64"], "only supported for"),
    ],
)
def test_incompatible_options_are_rejected(config, options, message, tmp_path):
    options = [*options, "MODEL.WEIGHTS", "", "MODEL.RESNETS.NORM", "GN"]
    options += ["SOLVER.MICRO_BATCHES", "2", "MODEL.BACKBONE.FREEZE_AT", "0"]
    cfg = load_config(f"configs/{config}.yaml", [*options, "MODEL.DEVICE", "cuda"])
    cfg.OUTPUT_DIR = str(tmp_path)
    with pytest.raises(UserError, match=message):
        check_run(cfg, eval_only=False, resume=False)


def test_images_are_padded_to_multiples_of_the_largest_stride_only():
    cfg = load_config("configs/instant/demo_faster_rcnn_se_r18.yaml")
    cfg.INPUT.SIZE_DIVISIBILITY = 48
    with pytest.raises(UserError, match="48; expected 0 or a multiple of the FPN's .* 32"):
        build_senet_fpn_backbone(cfg, ShapeSpec(channels=3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_on_a_gpu_a_captured_backbone_computes_the_same(norm, dtype):
    stages = ["res2", "res3", "res4", "res5"]
    torch.manual_seed(0)
    net = create_backbone("se_resnet50", out_features=stages, norm=norm, freeze_at=2).cuda()
    expected = copy.deepcopy(net)
    captured = CapturedBackbone(net)
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        for height in [64, 96, 64, 64, 96, 96, 64, 128, 96, 64]:
            for model in (net, expected):
                model.zero_grad()
                with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
                    features = model(images(height, 64, "cuda"))
                sum(feature.float().square().mean() for feature in features.values()).backward()
            torch.testing.assert_close(net.state_dict(), expected.state_dict())
            for own, other in zip(net.parameters(), expected.parameters(), strict=True):
                torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-6)
    assert len(captured._captured) == 2
