"""Tests for building models from names and configs, and for reading each weight file once."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from senet_transfer import UserError, create_classifier, save_weights
from senet_transfer.cli import evaluate, predict
from senet_transfer.cli.analysis import gates
from senet_transfer.data.build import eval_transform
from senet_transfer.data.images.decode import Reading
from senet_transfer.engine.model_from import ModelSource, find_model, model_config
from senet_transfer.engine.predictor.load import load_trained
from senet_transfer.engine.setup import setup
from senet_transfer.engine.train import main as run
from senet_transfer.preprocessing import Preprocessing
from senet_transfer.utils import hashing
from senet_transfer.utils.read_once import once_per_file, read_once
from senet_transfer.weights.convert import write_converted
from senet_transfer.weights.mapping import source
from tests.weights.peers import peer, save


@pytest.fixture
def reads(monkeypatch) -> Counter:
    """Count the reads of each weight file, separately for tensors, training state and SHA-256."""
    counts: Counter = Counter()

    def counted(kind, function):
        def call(path, *args, **kwargs):
            counts[kind, Path(path).name] += 1
            return function(path, *args, **kwargs)

        return call

    monkeypatch.setattr(source, "read_tensors", counted("tensors", source.read_tensors))
    monkeypatch.setattr(torch, "load", counted("state", torch.load))
    digest = hashing.hashlib.file_digest
    monkeypatch.setattr(
        hashing.hashlib,
        "file_digest",
        lambda file, kind: counted("sha256", lambda _: digest(file, kind))(file.name),
    )
    return counts


@pytest.fixture
def trained(train, tmp_path) -> Path:
    train()
    return tmp_path / "run"


@pytest.fixture
def own_weights(tmp_path) -> str:
    """Save a weight file whose metadata specifies the network, in a folder without a config."""
    (tmp_path / "weights").mkdir()
    save_weights(create_classifier("se_resnet18", 4), tmp_path / "weights" / "own.pth")
    return str(tmp_path / "weights" / "own.pth")


@pytest.mark.long
def test_a_resumed_run_reads_its_checkpoint_once(trained, command, reads):
    args = command("--resume", **{"SOLVER.MAX_ITER": "3"})
    final = trained / "model_final.pth"
    shutil.copy(final, trained / "start.pth")
    shutil.copy(f"{final}.sha256", trained / "start.pth.sha256")
    name = trained / "start.pth.sha256"
    name.write_text(name.read_text().replace("model_final", "start"))
    (trained / "last_checkpoint").write_text("start.pth")
    (trained / "recent_checkpoints").write_text("start.pth\n")
    run(args)
    found = {kind: count for (kind, file), count in reads.items() if file == "start.pth"}
    assert found == {"tensors": 1, "state": 1, "sha256": 1}


@pytest.mark.long
def test_an_evaluation_of_a_run_reads_its_checkpoint_once(trained, command, reads):
    run(command("--eval-only", "--resume"))
    assert reads["tensors", "model_final.pth"] == 1
    assert reads["sha256", "model_final.pth"] == 1


@pytest.mark.long
def test_initial_weights_are_read_once(command, own_weights, reads):
    keys = {"MODEL.BACKBONE.ARCH": "se_resnet18", "MODEL.RESNETS.NORM": "FrozenBN"}
    run(command(**keys, **{"MODEL.WEIGHTS": own_weights}))
    assert reads["tensors", "own.pth"] == 1


@pytest.mark.parametrize("words", [[], ["--model", "se_resnet18"]])
@pytest.mark.long
def test_an_evaluation_of_a_file_reads_it_once(own_weights, tree, reads, words):
    size = ["--resize", "36", "--crop", "32", "--workers", "0", "--quiet"]
    words = ["--weights", own_weights, "--data", str(tree), *words, *size]
    assert evaluate.main(evaluate.parser().parse_args(words))["model"] == "se_resnet18"
    assert reads["tensors", "own.pth"] == 1


@pytest.mark.long
def test_prediction_and_analysis_read_a_checkpoint_once(trained, tree, tmp_path, reads):
    weights = ["--weights", str(trained / "model_final.pth"), "--quiet"]
    out = ["--output", str(tmp_path / "out")]
    predict.main(predict.parser().parse_args([*weights, "--input", str(tree / "red"), *out]))
    assert reads["tensors", "model_final.pth"] == 1
    words = [*weights, "--data", str(tree), *out, "--images-per-class", "1", "--workers", "0"]
    gates.main(gates.parser().parse_args(words))
    assert reads["tensors", "model_final.pth"] == 2


@pytest.mark.long
def test_creating_a_model_reads_its_file_once(own_weights, reads):
    create_classifier("se_resnet18", 4, weights=own_weights)
    assert reads["tensors", "own.pth"] == 1


@pytest.mark.long
def test_a_model_by_name_equals_that_of_create_classifier(tmp_path):
    path = str(save(peer("torchvision", "resnet50", seed=1), tmp_path / "r50.pth"))
    options = {"weights": path, "family": "torchvision_v2"}
    expected = create_classifier("resnet50", **options).eval()
    loaded = find_model("resnet50", **options).build("cpu")
    assert loaded.preprocessing == expected.preprocessing
    assert loaded.preprocessing.resize == 232
    assert loaded.family == "torchvision_v2"
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.model(x), expected(x))
    # Options from the user override the preprocessing that is inferred from the weight file.
    options = ["INPUT.CLASSIFICATION.TEST_RESIZE", "64", "INPUT.FORMAT", "BGR"]
    changed = find_model("resnet50", weights=path, options=options).build("cpu")
    assert (changed.preprocessing.resize, changed.preprocessing.format) == (64, "BGR")


@pytest.mark.long
def test_a_file_contains_its_architecture(tmp_path):
    model = create_classifier("se_resnet18", 5, se_ratio=8, se_stages=(3, 4), stem_pool="ceil")
    model.backbone.preprocessing = Preprocessing(format="BGR", resize=36, crop=32)
    save_weights(model, tmp_path / "own.safetensors")
    loaded = find_model(weights=str(tmp_path / "own.safetensors")).build("cpu")
    assert loaded.preprocessing == model.preprocessing
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.model(x), model.eval()(x))


@pytest.mark.long
def test_a_checkpoint_contains_the_preprocessing_of_its_model(train, tmp_path):
    keys = {"EXIF": "apply", "VALUE_RANGE": "[0, 4095]", "CLASSIFICATION.TEST_MODE": "squash"}
    trainer = train(**{f"INPUT.{key}": value for key, value in keys.items()})
    weights = tmp_path / "alone.pth"
    weights.write_bytes((tmp_path / "run" / "model_final.pth").read_bytes())
    converted = tmp_path / "alone.safetensors"
    write_converted(source.examine(weights), converted, "senet_transfer")
    view = eval_transform(trainer.cfg)
    assert (view.mode, view.reading) == ("squash", Reading((0, 4095), upright=True))
    for path in (weights, converted):
        assert eval_transform(find_model(weights=str(path)).cfg) == view
    options = ["INPUT.EXIF", "ignore", "INPUT.VALUE_RANGE", "[0, 255]"]
    options += ["DATASETS.CLASSES", "['a', 'b', 'c', 'd']"]
    chosen = find_model(weights=str(weights), options=options).examined().cfg
    assert list(chosen.DATASETS.CLASSES) == list(trainer.cfg.DATASETS.CLASSES)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "DATASETS.CLASSES is a, b, c, d, but the model was trained on the classes blue" in log
    assert eval_transform(chosen) == replace(view, reading=Reading((0, 255)))
    # Files saved by older versions lack these three entries.
    checkpoint = torch.load(weights)
    for key in ("mode", "value_range", "upright"):
        del checkpoint["senet_transfer"]["preprocessing"][key]
    torch.save(checkpoint, tmp_path / "older.pth")
    older = eval_transform(find_model(weights=str(tmp_path / "older.pth")).cfg)
    assert older == replace(view, mode="short_side", reading=Reading())


@pytest.mark.long
def test_the_family_of_initial_weights_is_not_that_of_the_checkpoint(train, tmp_path):
    path = save(peer("torchvision", "resnet18"), tmp_path / "r18.pth")
    keys = {
        "MODEL.BACKBONE.ARCH": "resnet18",
        "MODEL.RESNETS.NORM": "FrozenBN",
        "MODEL.SE.ENABLED": "False",
        "MODEL.WEIGHTS": str(path),
        "MODEL.WEIGHTS_FAMILY": "torchvision_v1",
    }
    train(**keys)
    checkpoint = str(tmp_path / "run" / "model_final.pth")
    loaded = load_trained(checkpoint)
    assert loaded.family == "senet_transfer"
    assert loaded.classes == ["blue", "green", "nested/blue", "red"]
    # The config's weight family applies only to the weight file that the config names.
    config = str(tmp_path / "run" / "config.yaml")
    assert model_config(config_file=config, weights=str(path)).MODEL.WEIGHTS_FAMILY


def test_a_configs_weights_are_read_when_the_model_is_built(command):
    cfg = setup(command()).clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = "absent.pth"
    with pytest.raises(UserError, match=r"The weight file absent\.pth"):
        ModelSource(cfg).build("cpu")


def test_a_changed_file_is_read_again_and_nothing_stays_cached(tmp_path):
    path, calls = tmp_path / "file", []
    path.write_text("a")

    @once_per_file
    def read(path, mark=""):
        calls.append(mark)
        return path.read_text()

    assert [read(path), read(path)] == ["a", "a"]
    with read_once():
        assert [read(path), read(path), read(path, "x"), read(path, mark="x")] == ["a"] * 4
        path.write_text("bc")
        assert [read(path), read(path)] == ["bc", "bc"]
    assert read(path) == "bc"
    assert calls == ["", "", "", "x", "x", "", ""]
    with read_once(), pytest.raises(FileNotFoundError):
        read(tmp_path / "absent")
