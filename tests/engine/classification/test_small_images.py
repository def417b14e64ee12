"""Tests for training and evaluation on datasets of small images that are held in memory."""

import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from senet_transfer import UserError
from senet_transfer.cli.evaluate import main, parser
from senet_transfer.config.load import load_config
from senet_transfer.data.build import train_loader, use_classification_datasets
from senet_transfer.data.cifar.in_memory import ImageArrays, save_images, split_file
from senet_transfer.engine.predictor.load import load
from senet_transfer.engine.setup import setup

CONFIG = "configs/instant/cifar10_se_shake_shake26_2x96d.yaml"
SIDE = "INPUT.CLASSIFICATION"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Write a small dataset in the layout of CIFAR-10, and set ``$DETECTRON2_DATASETS``."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 24), ("test", 10)):
        images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator).to(torch.uint8)
        data = ImageArrays(images, torch.arange(count) % 3, ["cat", "dog", "ship"], "drawn")
        save_images(data, split_file(tmp_path / "data" / "cifar10", split), "drawn")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    return tmp_path


@pytest.fixture
def small(root):
    """Return config overrides for a small network with all augmentations enabled."""
    return {
        "config": CONFIG,
        "DATASETS.TRAIN": "('cifar10_train',)",
        "DATASETS.TEST": "('cifar10_test',)",
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.BACKBONE.ARCH": "cifar_resnet8",
        f"{SIDE}.TEST_RESIZE": "32",
        f"{SIDE}.CUTOUT": "16",
        "OUTPUT_DIR": str(root / "straight"),
    }


def tensors(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.long
def test_an_interrupted_run_ends_bitwise_equal_to_an_uninterrupted_one(small, train, root):
    keys = {**small, "SOLVER.MAX_ITER": "8", "SOLVER.CHECKPOINT_PERIOD": "4"}
    train(**keys)
    broken = root / "broken"
    broken.mkdir()
    for name in ("model_0000003.pth", "config.yaml"):
        shutil.copy(root / "straight" / name, broken / name)
    (broken / "last_checkpoint").write_text("model_0000003.pth")
    resumed = train("--resume", **{**keys, "OUTPUT_DIR": str(broken)})
    assert resumed.start_iter == 4
    whole, again = (tensors(root / name / "model_final.pth") for name in ("straight", "broken"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    other = train(**{**keys, "SEED": "4", "OUTPUT_DIR": str(root / "other")})
    state = other.model.state_dict()
    assert not all(torch.equal(whole[key], state[key]) for key in whole)


def test_a_step_gets_a_normalised_batch_with_cutout(small, command):
    cfg = setup(command(**small))
    batch = next(iter(train_loader(cfg, cfg.SEED, start_iter=5)))
    assert torch.equal(batch["image"], next(islice(train_loader(cfg, cfg.SEED), 5, 6))["image"])
    model = build_model(cfg)
    seen = []
    model.backbone.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(batch)
    model.eval()(batch)
    trained, evaluated = seen
    mean, std = (torch.tensor(getattr(cfg.MODEL, f"PIXEL_{n}")) for n in ("MEAN", "STD"))
    plain = (batch["image"] - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    torch.testing.assert_close(evaluated, plain)
    for image, original, centre in zip(trained, plain, batch["cutout"].tolist(), strict=True):
        top, left = (max(place - 8, 0) for place in centre)
        bottom, right = (place + 8 for place in centre)
        original[:, top:bottom, left:right] = 0
        torch.testing.assert_close(image, original)


@pytest.mark.long
def test_a_trained_model_is_evaluated_and_predicts(small, train, root, capsys):
    trainer = train(**small)
    weights = root / "straight" / "model_final.pth"
    words = ["--weights", str(weights), "--output", str(root / "results.json"), "--quiet"]
    found = main(parser().parse_args(words))
    logged = trainer.results["classification"]
    assert found["model"] == "se_cifar_resnet8"
    assert (found["images"], found["top1_error"]) == (10, pytest.approx(logged["top1_error"]))
    named = ["--model", "se_cifar_resnet8", "--data", "cifar10_test"]
    assert main(parser().parse_args([*words, *named]))["top1_error"] == pytest.approx(
        logged["top1_error"]
    )
    pixels = np.random.RandomState(0).randint(0, 256, (48, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(root / "photo.png")
    assert set(load(weights)(root / "photo.png").names) == {"cat", "dog", "ship"}


@pytest.mark.long
def test_the_papers_row_is_next_to_its_network(small, train, root, capsys):
    train(**{**small, "MODEL.BACKBONE.ARCH": "cifar_resnet110", "SOLVER.MAX_ITER": "1",
             "SOLVER.STEPS": "()", f"{SIDE}.CUTOUT": "0"})  # fmt: skip
    weights = root / "straight" / "model_final.pth"
    words = ["--weights", str(weights), "--data", str(root / "data/cifar10/test.safetensors")]
    main(parser().parse_args([*words, "--quiet"]))
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "SE-ResNet-110" in line)
    assert row.split()[1:3] == ["5.21", "-"]
    assert "Table IV" in row


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({f"{SIDE}.AUGMENT": "random"}, r"AUGMENT is 'random'"),
        ({f"{SIDE}.AUGMENT": "region"}, r"CUTOUT is 16, but AUGMENT is region"),
        ({f"{SIDE}.AUGMENT": "region", f"{SIDE}.CUTOUT": "0"}, r"requires .*pad_crop"),
        ({f"{SIDE}.CUTOUT": "15"}, r"cutout is 15; expected an even number"),
        ({f"{SIDE}.PADDING": "edge"}, r"'edge'"),
        ({f"{SIDE}.TEST_RESIZE": "36"}, r"are \(32, 36, 32\)"),
        ({f"{SIDE}.TEST_MODE": "ten_crop"}, r"ten_crop"),
        (
            {"DATASETS.TRAIN": "('cifar100_train',)"},
            r"Dataset cifar100/train.safetensors not found",
        ),
    ],
)
def test_invalid_options_are_rejected(small, options, message):
    keys = {**small, **options}
    config = keys.pop("config")
    cfg = load_config(config, [word for item in keys.items() for word in item])
    with pytest.raises(UserError, match=message):
        use_classification_datasets(cfg)


def test_class_aware_sampling_is_rejected(small, command):
    cfg = setup(command(**small))
    cfg.defrost()
    cfg.DATALOADER.SAMPLER_TRAIN = "ClassAwareSampler"
    with pytest.raises(UserError, match=r"classifier with .* expected one of: TrainingSampler"):
        train_loader(cfg, cfg.SEED)
