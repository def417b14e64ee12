"""Networks of other projects with random weights, and comparisons with this project's networks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from senet_transfer import UserError, create_classifier, load_weights
from senet_transfer.models import Classifier
from senet_transfer.weights.mapping.source import examine

STAGES = ("res2", "res3", "res4", "res5")


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set random weights and norm statistics that preserve the signal's scale over many blocks."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.0),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
            ):
                tensor.data.uniform_(low, high, generator=generator)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
            if module.bias is not None:
                module.bias.data.uniform_(-0.5, 0.5, generator=generator)
    return model.eval()


def peer(package: str, name: str, seed: int = 0) -> nn.Module:
    """Build a network from another package, or skip the test if the package is not installed.

    The weights are random.
    """
    library = pytest.importorskip(package)
    if package == "timm":
        model = library.create_model(name)
    elif package == "torchvision":
        model = library.models.get_model(name)
    else:
        model = getattr(library, name)(pretrained=None)
        # The original pool has a 7x7 window and supports only images of 224 pixels.
        model.avg_pool = nn.AdaptiveAvgPool2d(1)
    return randomise(model, seed)


def images(seed: int = 0, size: tuple[int, int] = (64, 96)) -> Tensor:
    """Return two random images.

    With the default size, stem pools with padding and with ceil mode have the same output shape.
    """
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs_of_peer(model: nn.Module, x: Tensor, stages: list[nn.Module] | None = None) -> dict:
    """Return the logits and the outputs of the four stages of another project's network."""
    found: dict[str, Tensor] = {}
    modules = stages or [getattr(model, f"layer{i}") for i in (1, 2, 3, 4)]
    hooks = [
        # Copy the output, because the next block may modify it in place.
        module.register_forward_hook(lambda m, args, out, name=name: found.update({name: +out}))
        for name, module in zip(STAGES, modules, strict=True)
    ]
    found["logits"] = model(x)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def outputs_of_ours(model: Classifier, x: Tensor) -> dict[str, Tensor]:
    """Return the outputs of res2 to res5 and the logits of one of this project's classifiers."""
    stages = [getattr(model.backbone, name) for name in STAGES]
    return outputs_of_peer(model, x, stages)


def worst(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Return the maximum of ``max |first - second| / max |first|`` over all outputs."""
    assert first.keys() == second.keys()
    differences = []
    for name, value in first.items():
        assert value.shape == second[name].shape, name
        differences.append(((value - second[name]).abs().max() / value.abs().max()).item())
    return max(differences)


def save(model: nn.Module, path: Path) -> Path:
    """Save a model's state dict and return the path."""
    torch.save(model.state_dict(), path)
    return path


def load_and_expect_no_change(model: nn.Module, path: Path) -> None:
    """Load a file for which an error is expected, and check that the model is unchanged."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    preprocessing = getattr(model, "preprocessing", None)
    try:
        load_weights(model, path)
    finally:
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert getattr(model, "preprocessing", None) == preprocessing


def geometry_options(model: Classifier) -> dict[str, object]:
    """Return those architecture options of a classifier that differ between weight families."""
    block = model.backbone.res3[0]
    options: dict[str, object] = {"stem_pool": model.backbone.stem.pool}
    if hasattr(block, "conv3") and type(block).__name__ != "SENet154Block":
        options["stride_in_1x1"] = block.conv1.stride == (2, 2)
    if hasattr(block, "se"):
        widths = [stage[0].se.fc1.out_features for stage in model.backbone.stages]
        options["se_relu_before"] = block.relu_before
        options["se_divisor"] = 8 if widths[0] == widths[1] else 1
        options["se_bias"] = block.se.fc1.bias is not None
    return options


def check_wrong_options(
    ours: str, right: Classifier, expected: dict, path: Path, **fixed: object
) -> None:
    """Check that weights are rejected if an option that does not affect tensor shapes is wrong.

    These options are the stem pool, the stride placement and the ReLU before the gate. For each
    wrong option, ``load_weights`` must raise an error. ``load_state_dict`` accepts the tensors, but
    the outputs must then differ from those of the original network. This shows that comparisons of
    outputs detect such errors.
    """
    fixed["num_classes"] = right.linear.out_features
    options = {**geometry_options(right), **fixed}
    for name in ("stem_pool", "stride_in_1x1", "se_relu_before"):
        if name not in options:
            continue
        other = {"pad": "ceil", "ceil": "pad", True: False, False: True}[options[name]]
        model = create_classifier(ours, **{**options, name: other}).eval()
        with pytest.raises(UserError, match=rf"(?s)trained with different settings.*\({name}"):
            load_and_expect_no_change(model, path)
        model.load_state_dict(right.state_dict(), strict=True)
        assert worst(expected, outputs_of_ours(model, images())) > 1e-3, name


def check_peer(
    model: nn.Module, stages: list, path: Path, ours: str, family: str, **overrides: object
) -> Classifier:
    """Load a file, compare outputs with those of the original network, and return the new model.

    Args:
        model: Original network, from which the file was saved.
        stages: Modules of the original network whose outputs correspond to res2 to res5.
        path: Path of the weight file.
        ours: Name of this project's model into which the file is loaded.
        family: Weight family that must be detected.
        overrides: Options of this project's model.
    """
    expected = outputs_of_peer(model, images(), stages)
    created = create_classifier(ours, weights=path, **overrides).eval()
    assert examine(path).family.name == family
    assert worst(expected, outputs_of_ours(created, images())) < 1e-5
    check_wrong_options(ours, created, expected, path, **overrides)
    return created
