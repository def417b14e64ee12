"""Tests that compare the fused kernels with PyTorch's own operators in float64.

The tests run on a GPU or, with ``TRITON_INTERPRET=1``, in Triton's interpreter on a CPU. If there
is no GPU and the variable is not set, `test_the_kernels_in_the_interpreter` runs this file in a
process with the variable set.
"""

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm, get_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from benchmark import saved_bytes
from senet_transfer import UserError, create_backbone, deploy
from senet_transfer.layers import SEOptions, SqueezeExcitation, fused
from senet_transfer.layers.fused import functions, launch, operators
from senet_transfer.layers.fused.functions import (
    conv_norm_relu,
    gate_add_norm,
    gate_and_add,
    norm_gate_add,
    norm_relu,
    residual_end,
    set_fused,
)
from senet_transfer.models.backbones.blocks import SEBottleneckBlock

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The kernels support float64 only in the interpreter.
DOUBLE = torch.float64 if INTERPRETED else torch.float32
# Use float16 in the interpreter, which truncates numbers to bfloat16 instead of rounding them.
HALF = torch.float16 if INTERPRETED else torch.bfloat16


def runs_kernels(test: Callable) -> Callable:
    """Mark a test that launches Triton kernels.

    Without Triton's interpreter, the test requires a GPU.
    """
    test = pytest.mark.usefixtures("kernels_run")(test)
    return test if INTERPRETED else pytest.mark.gpu(test)


# Largest relative errors found so far, by dtype and tensor.
WORST: dict[tuple[str, str], tuple[float, str]] = {}

# Bounds for the relative error ||found - exact|| / ||exact||.
BOUNDS = {
    torch.float64: 1e-9,
    torch.float32: 5e-6,
    torch.bfloat16: 1.3e-2,
    torch.float16: 1.3e-3,
}


@pytest.fixture(scope="module", autouse=True)
def _report() -> Iterator[None]:
    """Print the largest error of each dtype and tensor after the last test."""
    yield
    for (dtype, name), (error, case) in sorted(WORST.items()):
        print(f"worst error of {name} in {dtype}: {error:.1e} ({case})")


@pytest.mark.long
@pytest.mark.parametrize("tests", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_in_the_interpreter(tests):
    if INTERPRETED:
        pytest.skip("this process already runs the kernels in the interpreter")
    pytest.importorskip("triton")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    options = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    words = ["-m", "pytest", "-s", "-p", "no:cacheprovider", "-m", tests, "-n0"]
    environment = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
    done = subprocess.run(
        [sys.executable, *words, __file__],
        env={**environment, **options},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


class End(nn.Module):
    """End of a residual block: norm, SE gate, addition of the shortcut, and ReLU, each optional.

    If ``plain`` is True, the operations are not fused.
    """

    def __init__(self, channels: int, norm: str = "BN", gate: str = "sigmoid", **options):
        super().__init__()
        torch.manual_seed(channels)
        self.norm = self.se = None
        if norm:
            self.norm = get_norm(norm.partition(" ")[0], channels)
            nn.init.uniform_(self.norm.weight, 0.5, 1.5)
            nn.init.normal_(self.norm.bias)
            nn.init.normal_(self.norm.running_mean)
            nn.init.uniform_(self.norm.running_var, 0.5, 2)
        if gate:
            self.se = SqueezeExcitation(
                channels, ratio=min(2, channels), excitation=gate, bias=options.get("bias", True)
            )
            for parameter in self.se.parameters():
                nn.init.normal_(parameter, std=channels**-0.5)
            if self.se.fc1.bias is not None:
                nn.init.constant_(self.se.fc1.bias, 0.5)  # makes some hidden units active
        self.relu = options.get("relu", True)
        self.plain = False
        self.train("evaluation" not in norm)

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None) -> torch.Tensor:
        if not self.plain:
            return norm_gate_add(self.norm, self.se, x, shortcut, relu=self.relu)
        out = plain_norm(self.norm, x)
        if self.se is not None:
            out = plain_gate(self.se, out) * out
        if shortcut is not None:
            out = out + shortcut
        return torch.relu(out) if self.relu else out


def plain_norm(norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    if norm is None:
        return x
    if isinstance(norm, FrozenBatchNorm2d):
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return x * scale[:, None, None] + (norm.bias - norm.running_mean * scale)[:, None, None]
    return norm(x)


def plain_gate(se: SqueezeExcitation, x: torch.Tensor) -> torch.Tensor:
    hidden = torch.relu(F.linear(x.mean((2, 3)), se.fc1.weight, se.fc1.bias))
    gate = F.linear(hidden, se.fc2.weight, se.fc2.bias)
    return {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}[se.excitation](gate)[
        :, :, None, None
    ]


def run(model: nn.Module, maps: list, upstream: list, autocast: bool = False) -> dict:
    """Run a model forward and backward, and return the resulting tensors, keyed by name.

    The tensors are the outputs, the gradients of the inputs and parameters, and the buffers.
    """
    leaves = {f"map{i}": x for i, x in enumerate(maps) if x is not None}
    leaves |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    outputs = model(*maps)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return {
        **{f"out{i}": out.detach() for i, out in enumerate(outputs)},
        **dict(zip(leaves, gradients, strict=True)),
        **{name: buffer.clone() for name, buffer in model.named_buffers()},
    }


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    norm = exact.double().norm().item()
    return (found.double() - exact.double()).norm().item() / (norm or 1.0)


def draw(shape: tuple[int, ...], dtype: torch.dtype, last: bool, seed: int) -> torch.Tensor:
    """Return a random feature map. Its channels have different means and variances."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    channels = torch.arange(shape[1], dtype=torch.float64)[:, None, None]
    x = x * (1 + channels % 3) + channels % 5 - 2
    layout = torch.channels_last if last else torch.contiguous_format
    return x.to(DEVICE, dtype).contiguous(memory_format=layout)


def check(
    model: nn.Module,
    maps: list,
    *,
    bound: float | None = None,
    upstream: list | None = None,
    outputs: int = 1,
) -> None:
    """Compare a fused model with the same model in float64 without fusion, on the same inputs.

    The limit for the relative errors is ``bound``, by default the dtype's value in ``BOUNDS``. In
    float32, the limit is at least twice the error of the unfused float32 model.
    """
    dtype = maps[0].dtype
    model = model.to(DEVICE)
    model = model.double() if dtype == torch.float64 else model
    exact = copy.deepcopy(model).double()
    exact.plain = True
    shape = maps[0].shape if maps[1] is None else maps[1].shape
    if upstream is None:
        upstream = [draw(shape, dtype, i % 2 == 1, 7 + i) for i in range(outputs)]
    maps = [x if x is None else x.detach().requires_grad_() for x in maps]
    doubled = [x if x is None else x.detach().double().requires_grad_() for x in maps]
    expected = run(exact, doubled, [gradient.double() for gradient in upstream])
    plain = {}
    if dtype == torch.float32:
        same = copy.deepcopy(model)
        same.plain = True
        plain = run(same, [x if x is None else x.detach().requires_grad_() for x in maps], upstream)
    found = run(model, maps, upstream)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        if value.dtype == torch.int64:
            assert torch.equal(found[name], value), name
            continue
        error = relative(found[name], value)
        key = str(dtype).removeprefix("torch."), name.rpartition(".")[2]
        if error >= WORST.get(key, (0.0, ""))[0]:
            WORST[key] = error, f"{tuple(shape)}"
        accepted = 2 * relative(plain[name], value) if plain else 0.0
        assert error <= max(bound or BOUNDS[dtype], accepted), f"{name}: {error:.1e}"


@pytest.fixture
def kernels_run() -> Iterator[None]:
    """Skip the test if Triton is not installed; otherwise disable TF32 in convolutions."""
    pytest.importorskip("triton")
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make each Triton program process several tiles, as it does with large batches."""
    monkeypatch.setattr(launch, "_PROGRAMS", 1)
    launch._tiling.cache_clear()
    yield
    launch._tiling.cache_clear()


NORMS = ["BN", "BN in evaluation", "FrozenBN", ""]

# The shapes cover numbers of channels and positions that are not multiples of the block size, one
# image, one position, one channel, more channels than in a block, and images whose positions are
# divided among several Triton programs.
SHAPES = [
    (2, 5, 3, 4),
    (1, 8, 5, 3),
    (3, 4, 1, 1),
    (2, 1, 4, 4),
    (5, 3, 2, 7),
    (2, 70, 2, 3),
    (1, 3, 40, 60),
]


def cases() -> Iterator[tuple]:
    """Yield cases (shape, layout, norm, gate) that cover all pairwise combinations of values."""
    gates = ["sigmoid", "", "tanh", "relu"]
    for index, shape in enumerate(SHAPES):
        for number, norm in enumerate(NORMS):
            yield shape, (index + number) % 2 == 0, norm, gates[(index + number) % 4]
    for norm in NORMS:
        for gate in gates:
            for last in (False, True):
                yield (2, 6, 3, 3), last, norm, gate


CASES = list(dict.fromkeys(cases()))


def fast_if(condition: bool) -> tuple:
    """Return a tuple of pytest marks: empty if the condition is true, otherwise with ``slow``."""
    return () if condition else (pytest.mark.slow,)


@runs_kernels
@pytest.mark.parametrize(
    ("shape", "last", "norm", "gate"),
    [pytest.param(*case, marks=fast_if(i < 28 and i % 2 == 0)) for i, case in enumerate(CASES)],
)
def test_the_end_of_a_block(shape, last, norm, gate):
    maps = [draw(shape, DOUBLE, last, 1), draw(shape, DOUBLE, last, 2)]
    check(End(shape[1], norm, gate), maps)


@runs_kernels
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(
    ("shape", "last", "norm", "gate"),
    [
        pytest.param(*shape, *parts, marks=fast_if(shape[1] == (parts[0] == "BN")))
        for shape in (((2, 3, 37, 41), False), ((2, 70, 7, 9), True))
        for parts in (("BN", "sigmoid"), ("FrozenBN", "relu"), ("BN", ""))
    ],
)
def test_several_tiles_per_program(shape, last, norm, gate):
    maps = [draw(shape, DOUBLE, last, seed) for seed in (1, 2)]
    check(End(shape[1], norm, gate), maps)
    if norm == "BN":
        check(PreAct(shape[1], norm, gate), maps, outputs=2)


@runs_kernels
@pytest.mark.parametrize("add", [True, False], ids=["sum", "no sum"])
@pytest.mark.parametrize("relu", [True, False], ids=["ReLU", "no ReLU"])
@pytest.mark.parametrize(("norm", "gate"), [("BN", "sigmoid"), ("BN", ""), ("FrozenBN", "")])
def test_the_sum_and_the_relu_are_optional(norm, gate, add, relu, request):
    shortcut = draw((2, 6, 3, 4), DOUBLE, True, 2) if add else None
    check(End(6, norm, gate, relu=relu), [draw((2, 6, 3, 4), DOUBLE, True, 1), shortcut])


@runs_kernels
@pytest.mark.parametrize("norm", NORMS)
def test_a_gate_without_biases(norm):
    maps = [draw((2, 6, 3, 4), DOUBLE, False, seed) for seed in (1, 2)]
    check(End(6, norm, "tanh", bias=False), maps)


class Layouts:
    """Functions that convert feature maps to layouts other than contiguous and channels-last."""

    transposed = staticmethod(lambda x: x.transpose(2, 3).contiguous().transpose(2, 3))
    strided = staticmethod(lambda x: x.repeat_interleave(2, 3)[:, :, :, ::2])
    channels = staticmethod(lambda x: x.repeat_interleave(2, 1)[:, ::2])
    images = staticmethod(lambda x: x.repeat_interleave(2, 0)[::2])
    expanded = staticmethod(lambda x: x[:, :, :1, :1].expand_as(x))


@runs_kernels
@pytest.mark.parametrize(
    ("layout", "which"),
    [
        pytest.param(layout, which, marks=fast_if((i + j) % 3 == 1))
        for i, layout in enumerate(name for name in vars(Layouts) if name[0] != "_")
        for j, which in enumerate(["input", "shortcut", "gradient"])
    ],
)
def test_feature_maps_and_gradients_with_any_strides(layout, which):
    maps = [draw((2, 6, 3, 4), DOUBLE, seed == 1, seed) for seed in (1, 2, 3)]
    index = ["input", "shortcut", "gradient"].index(which)
    maps[index] = getattr(Layouts, layout)(maps[index])
    assert not maps[index].is_contiguous()
    check(End(6), maps[:2], upstream=maps[2:])


@runs_kernels
@pytest.mark.parametrize(
    ("dtype", "norm", "last"),
    [
        pytest.param(dtype, norm, last, marks=fast_if(last and norm in ("BN", "FrozenBN")))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for norm in NORMS
        for last in (True, False)
    ],
)
def test_lower_precision(dtype, norm, last):
    maps = [draw((3, 8, 6, 5), dtype, last, seed) for seed in (1, 2)]
    check(End(8, norm), maps)


@runs_kernels
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
def test_a_variance_far_below_the_mean(last):
    """Check norms of inputs whose mean is about 1,000 times their standard deviation.

    For such inputs, a variance computed as E[x^2] - E[x]^2 in float32 has an error of 10%.
    """
    x = draw((3, 4, 20, 30), torch.float64, last, 1).float() + 1e3
    norm = nn.BatchNorm2d(4).to(DEVICE)
    exact = copy.deepcopy(norm).double()
    found = norm_gate_add(norm, None, x, None, relu=False)
    assert relative(found, exact(x.double())) < 1e-4
    assert relative(norm.running_var, exact.running_var) < 1e-4
    assert relative(norm.running_mean, exact.running_mean) < 1e-6


@runs_kernels
def test_running_statistics_over_several_steps():
    norm = nn.BatchNorm2d(5, momentum=0.3).to(DEVICE, DOUBLE)
    exact = copy.deepcopy(norm).double()
    for seed in range(3):
        x = draw((2, 5, 3, 3), DOUBLE, False, seed)
        norm_relu(norm, x, True)
        exact(x.double())
    bound = 1e-7 if torch.float64 == DOUBLE else 1e-5
    for name, value in exact.state_dict().items():
        found = norm.state_dict()[name].to(value.dtype)
        torch.testing.assert_close(found, value, rtol=bound, atol=bound)
    assert norm.num_batches_tracked == 3


@runs_kernels
def test_tensors_that_a_hook_copies_until_the_backward_pass():
    """Compare fused and unfused operations with a hook that makes saved tensors contiguous.

    An example of such a hook is ``torch.autograd.graph.save_on_cpu``.
    """
    maps = [draw((2, 6, 3, 4), DOUBLE, True, seed) for seed in (1, 2)]
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda kept: kept):
        check(End(6), maps)
        check(End(6, "FrozenBN", gate=""), maps)
        check(PreAct(6, "BN", "sigmoid"), maps, outputs=2)


@runs_kernels
def test_another_batch_size_needs_no_other_kernels(monkeypatch):
    found, original = {}, launch._launch

    def collect(kernel, grid, key, arguments, flags):
        found.setdefault(n, set()).add((id(kernel), key, *flags.items()))
        original(kernel, grid, key, arguments, flags)

    monkeypatch.setattr(launch, "_launch", collect)
    for n in (2, 3):
        x, shortcut = (draw((n, 6, 3, 4), DOUBLE, False, seed).requires_grad_() for seed in (1, 2))
        End(6).to(DEVICE, DOUBLE)(x, shortcut).sum().backward()
    assert len(found[2]) > 4
    assert found[2] == found[3]


@runs_kernels
def test_integers_as_momentum_and_epsilon(monkeypatch):
    """Check that an integer momentum or epsilon is passed to the kernels as a float.

    For integer arguments, Triton would compile additional kernels.
    """
    numbers, original = [], launch._launch

    def collect(kernel, grid, key, arguments, flags):
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        numbers.extend(named[name] for name in ("momentum", "eps") if name in named)
        original(kernel, grid, key, arguments, flags)

    monkeypatch.setattr(launch, "_launch", collect)
    x = draw((2, 5, 3, 3), DOUBLE, False, 1)
    for momentum in (1, 0, 0.3):
        norm = nn.BatchNorm2d(5, eps=1, momentum=momentum).to(DEVICE, DOUBLE)
        exact = copy.deepcopy(norm).double()
        assert relative(norm_relu(norm, x, True), exact(x.double()).relu()) < 1e-5
        torch.testing.assert_close(norm.running_mean.double(), exact.running_mean)
    assert {type(number) for number in numbers} == {float}


@runs_kernels
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_non_finite_numbers_are_not_hidden(norm):
    x = draw((2, 3, 2, 2), torch.float32, False, 1)
    x[1, 2, 0, 1] = torch.nan
    out = End(3, norm).to(DEVICE)(x, torch.zeros_like(x))
    assert out[1, 2].isnan().any()


class PreAct(nn.Module):
    """Gate, sum, norm and ReLU of a pre-activation block, with or without fusion."""

    def __init__(self, channels: int, norm: str, gate: str):
        super().__init__()
        parts = End(channels, norm, gate)
        self.norm, self.se, self.plain = parts.norm, parts.se, False
        # The sum is rounded to this dtype before the norm.
        self.dtype = DOUBLE
        self.train(parts.training)

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self.plain:
            return gate_add_norm(self.se, self.norm, x, shortcut, True)
        added = (x if self.se is None else plain_gate(self.se, x) * x) + shortcut
        added = added + (added.to(self.dtype) - added).detach()
        return added, torch.relu(plain_norm(self.norm, added))


@runs_kernels
@pytest.mark.parametrize(
    ("shape", "gate", "norm"),
    [
        pytest.param(shape, gate, norm, marks=fast_if(i == 0 or (norm, gate) == ("BN", "tanh")))
        for i, shape in enumerate([(2, 5, 3, 4), (1, 3, 40, 60), (3, 4, 1, 1)])
        for gate in ("", "sigmoid", "tanh")
        for norm in NORMS[:3]
    ],
)
def test_the_end_of_a_pre_activation_block(shape, gate, norm):
    last = shape[0] == 2
    maps = [draw(shape, DOUBLE, last, 1), draw(shape, DOUBLE, not last, 2)]
    check(PreAct(shape[1], norm, gate), maps, outputs=2)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_lower_precision_of_a_pre_activation_block(dtype):
    """Check that the norm's input is rounded to the dtype of the feature maps, as in PyTorch."""
    maps = [draw((3, 8, 6, 5), dtype, True, seed) for seed in (1, 2)]
    model = PreAct(8, "BN", "sigmoid")
    model.dtype = dtype
    check(model, maps, outputs=2)


@runs_kernels
@pytest.mark.parametrize("unused", [0, 1])
def test_one_of_the_outputs_of_a_pre_activation_block_is_unused(unused):
    model = PreAct(4, "BN", "sigmoid").to(DEVICE).to(DOUBLE)
    exact = copy.deepcopy(model).double()
    exact.plain = True
    maps = [draw((2, 4, 3, 3), DOUBLE, False, seed).requires_grad_() for seed in (1, 2)]
    found = torch.autograd.grad(model(*maps)[unused].square().sum(), maps)
    maps = [x.detach().double().requires_grad_() for x in maps]
    for one, other in zip(
        found, torch.autograd.grad(exact(*maps)[unused].square().sum(), maps), strict=True
    ):
        assert relative(one, other) < BOUNDS[DOUBLE]


class Branch(nn.Module):
    """Last convolution of a residual branch, followed by the operations of :class:`End`."""

    def __init__(
        self,
        norm: str,
        *,
        channels: int = 8,
        gate: str = "sigmoid",
        kernel: int = 1,
        groups: int = 1,
    ):
        super().__init__()
        parts = End(channels, norm, gate)
        self.conv = Conv2d(
            4, channels, kernel, padding=kernel // 2, groups=groups, bias=False, norm=parts.norm
        )
        self.se, self.plain = parts.se, False
        self.train(parts.training)

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        if not self.plain:
            return residual_end(self.conv, self.se, x, shortcut, True)
        out = F.conv2d(x, self.conv.weight, None, 1, self.conv.padding, 1, self.conv.groups)
        out = plain_norm(self.conv.norm, out)
        out = out if self.se is None else plain_gate(self.se, out) * out
        return torch.relu(out + shortcut)


@runs_kernels
@pytest.mark.parametrize("options", [{}, {"gate": ""}, {"kernel": 3}, {"groups": 2}], ids=str)
@pytest.mark.parametrize("norm", NORMS[:3])
def test_a_convolution_and_the_end_of_a_block(norm, options):
    maps = [draw((2, size, 3, 4), DOUBLE, size == 8, size) for size in (4, 8)]
    check(Branch(norm, **options), maps)


@runs_kernels
@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "norms"), [(End, NORMS), (PreAct, NORMS[:3]), (Branch, ["FrozenBN"])]
)
@settings(max_examples=30 if INTERPRETED else 5, deadline=None, derandomize=True)
@given(
    shape=st.tuples(
        st.integers(1, 4), st.integers(1, 70), st.integers(1, 12), st.integers(1, 12)
    ).filter(lambda shape: shape[0] * shape[2] * shape[3] > 1),
    last=st.booleans(),
    gate=st.sampled_from(["sigmoid", "tanh", "relu", ""]),
    data=st.data(),
)
def test_any_shape(form, norms, shape, last, gate, data):
    norm = data.draw(st.sampled_from(norms), "norm")
    n, channels, *size = shape
    maps = [draw(shape, DOUBLE, last, seed) for seed in (1, 2)]
    if form is End:
        check(End(channels, norm, gate, relu=data.draw(st.booleans(), "relu")), maps)
    elif form is PreAct:
        check(PreAct(channels, norm, gate), maps, outputs=2)
    else:
        maps[0] = draw((n, 4, *size), DOUBLE, last, 1)
        check(Branch(norm, channels=channels, gate=gate), maps)


@runs_kernels
@pytest.mark.parametrize(
    "norm", ["BN", *[pytest.param(norm, marks=pytest.mark.slow) for norm in NORMS[1:3]]]
)
def test_gradients_equal_finite_differences(norm):
    if DEVICE == "cuda":
        pytest.skip("the kernels do not support float64 on a GPU")
    maps = [draw((2, size, 2, 2), DOUBLE, False, size).requires_grad_() for size in (4, 8)]
    for model in (Branch(norm).double(), PreAct(8, norm, "sigmoid").double()):
        leaves = [*(maps if isinstance(model, Branch) else (maps[1], maps[1].detach() + 1))]
        torch.autograd.gradcheck(model, leaves, fast_mode=True)


@runs_kernels
def test_a_second_derivative_is_an_error():
    maps = [draw((2, 8, 2, 2), DOUBLE, False, seed).requires_grad_() for seed in (1, 2)]
    for model in (End(8), PreAct(8, "BN", "sigmoid")):
        out = model.to(DEVICE, DOUBLE)(*maps)
        out = out[1] if isinstance(out, tuple) else out
        (first,) = torch.autograd.grad(out.square().sum(), maps[0], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


MODELS = {
    "BN": lambda: End(8),
    "BN without a gate": lambda: End(8, gate=""),
    "gate": lambda: End(8, norm="", relu=False),
    "FrozenBN": lambda: Branch("FrozenBN"),
    "pre-activation": lambda: PreAct(8, "BN", "sigmoid"),
    "pre-activation without a gate": lambda: PreAct(8, "FrozenBN", ""),
}

every_model = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=fast_if(name in ("BN", "FrozenBN", "pre-activation")))
        for name in MODELS
    ],
)


def inputs_of(model: nn.Module, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    channels = 4 if isinstance(model, Branch) else 8
    dtype = dtype or DOUBLE
    return [
        draw((2, size, 3, 3), dtype, False, seed).requires_grad_()
        for seed, size in enumerate((channels, 8))
    ]


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor at an address that is not a multiple of 16 bytes."""
    buffer = tensor.new_empty(tensor.numel() + 1)
    return buffer[1:].view_as(tensor).copy_(tensor.detach())


@runs_kernels
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_tensors_at_any_address(norm):
    """Check that kernels compiled for aligned tensors give the same results for unaligned ones."""
    aligned = End(6, norm).to(DEVICE, DOUBLE)
    other = copy.deepcopy(aligned)
    for parameter in other.parameters():
        parameter.data = shifted(parameter)
    for name, buffer in list(other.norm.named_buffers()):
        if buffer.is_floating_point():
            setattr(other.norm, name, shifted(buffer))
    maps = [draw((2, 6, 3, 4), DOUBLE, False, seed).requires_grad_() for seed in (1, 2)]
    upstream = draw((2, 6, 3, 4), DOUBLE, False, 3)
    expected = run(aligned, maps, [upstream])
    found = run(other, [shifted(x).requires_grad_() for x in maps], [shifted(upstream)])
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=key)


@runs_kernels
@every_model
def test_compiled_as_one_graph_it_computes_the_same(name):
    eager = MODELS[name]().to(DEVICE, DOUBLE)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for function, owner in ((eager, eager), (compiled, model)):
        maps = inputs_of(owner)
        outputs = function(*maps)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(out.square().sum() for out in outputs).backward()
        gradients = [tensor.grad for tensor in (*maps, *owner.parameters())]
        results.append([*outputs, *gradients, *owner.buffers()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@runs_kernels
@every_model
def test_exported_it_computes_the_same(name):
    model = MODELS[name]().to(DEVICE, DOUBLE).eval()
    maps = [x.detach() for x in inputs_of(model)]
    exported = torch.export.export(model, tuple(maps))
    assert any("senet_transfer" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(*maps), model(*maps))


@runs_kernels
@every_model
def test_the_operators_pass_pytorch_s_checks(name, monkeypatch):
    """Check the schema, fake implementation, gradient and AOT dispatch with ``opcheck``."""
    calls = []
    for operator in ("norm_gate_add", "conv_gate_add", "gate_add_norm"):
        defined = getattr(operators, operator)

        def record(*arguments, defined=defined):
            calls.append((defined, arguments))
            return defined(*arguments)

        monkeypatch.setattr(functions.operators, operator, record)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    model = MODELS[name]().to(DEVICE, DOUBLE)
    model(*inputs_of(model))
    monkeypatch.undo()
    for defined, arguments in calls:
        torch.library.opcheck(defined, arguments)
    assert calls


@runs_kernels
@every_model
def test_backward_again_and_activation_checkpointing(name):
    model = MODELS[name]().to(DEVICE, DOUBLE).eval()
    maps = inputs_of(model)
    total = lambda outputs: sum(  # noqa: E731
        out.square().sum() for out in (outputs if isinstance(outputs, tuple) else (outputs,))
    )
    loss = total(model(*maps))
    first = torch.autograd.grad(loss, maps, retain_graph=True)
    second = torch.autograd.grad(loss, maps)
    third = torch.autograd.grad(total(checkpoint(model, *maps, use_reentrant=False)), maps)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, third)


@runs_kernels
@pytest.mark.parametrize("name", ["BN", "FrozenBN", "pre-activation"])
def test_autocast(name):
    """Compare fused results under autocast with unfused results in float64."""
    model = MODELS[name]().to(DEVICE)
    model.dtype = HALF
    exact = copy.deepcopy(model).double()
    exact.plain = True
    maps = [x.detach().requires_grad_() for x in inputs_of(model, HALF)]
    doubled = [x.detach().double().requires_grad_() for x in maps]
    upstream = [draw((2, 8, 3, 3), HALF, False, seed) for seed in (5, 6)]
    upstream = upstream[: 2 if isinstance(model, PreAct) else 1]
    expected = run(exact, doubled, [gradient.double() for gradient in upstream])
    with torch.autocast(DEVICE, dtype=HALF):
        found = run(model, maps, upstream)
    assert found["out0"].dtype == HALF
    for key, value in expected.items():
        if value.is_floating_point():
            assert relative(found[key], value) < BOUNDS[HALF], key


@runs_kernels
@pytest.mark.parametrize("frozen", ["norm", "se", "x"])
def test_frozen_parts_get_no_gradient(frozen):
    model = End(6).to(DEVICE, DOUBLE)
    maps = [draw((2, 6, 3, 3), DOUBLE, False, seed).requires_grad_() for seed in (1, 2)]
    everything = run(model, maps, [torch.ones_like(maps[0])])
    if frozen == "x":
        maps[0] = maps[0].detach()
    else:
        getattr(model, frozen).requires_grad_(False)
    model(*maps).sum().backward()
    for key, leaf in {"map0": maps[0], "map1": maps[1], **dict(model.named_parameters())}.items():
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, everything[key])
        else:
            assert leaf.grad is None


@runs_kernels
def test_without_gradients_nothing_is_saved():
    model, maps = End(6).to(DEVICE, DOUBLE), [draw((2, 6, 3, 3), DOUBLE, False, 1)] * 2
    with torch.no_grad():
        assert saved_bytes(lambda: model(*maps), model) == 0
    with torch.inference_mode():
        model(*maps)


class AllOperators(nn.Module):
    """Network that uses all three fused operators."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Branch("BN"), Branch("FrozenBN")
        self.third = PreAct(8, "BN", "sigmoid")

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        out = self.second(x, self.first(x, shortcut))
        return sum(out.square().sum() for out in self.third(out, shortcut))


def save_gradients(rank: int, folder: Path) -> None:
    """Compute gradients in one of two processes with DistributedDataParallel, and save them."""
    options = {"rank": rank, "world_size": 2, "init_method": f"file://{folder / 'store'}"}
    torch.distributed.init_process_group("gloo", **options)
    model = DistributedDataParallel(AllOperators().double())
    model(*maps_of_rank(rank)).backward()
    gradients = {name: p.grad for name, p in model.module.named_parameters()}
    torch.save(gradients, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def maps_of_rank(rank: int) -> list[torch.Tensor]:
    return [draw((2, size, 3, 3), DOUBLE, False, 2 * rank + size) for size in (4, 8)]


@runs_kernels
@pytest.mark.slow
def test_gradients_of_two_processes_are_averaged(tmp_path):
    if not INTERPRETED:
        pytest.skip("two processes need two GPUs")
    multiprocessing.spawn(save_gradients, (tmp_path,), nprocs=2)
    model = AllOperators().double()
    (sum(model(*maps_of_rank(rank)) for rank in range(2)) / 2).backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, msg=name)


@runs_kernels
@pytest.mark.parametrize("norm", NORMS[:3])
def test_a_gate_saves_no_additional_feature_map(norm):
    """Compare the size of the tensors saved for the backward pass with and without a gate."""
    inputs = draw((2, 4, 24, 24), DOUBLE, False, 1).requires_grad_()
    shortcut = draw((2, 8, 24, 24), DOUBLE, False, 2).requires_grad_()
    kept = {}
    for name, gate in (("plain", ""), ("fused", ""), ("gated", "sigmoid")):
        model = Branch(norm, gate=gate).to(DEVICE, DOUBLE)
        model.plain = name == "plain"
        outputs = []
        kept[name] = saved_bytes(lambda: outputs.append(model(inputs, shortcut)), model)  # noqa: B023
    print(f"bytes saved for the backward pass with {norm}: {kept}")
    small = 8 * (2 * 8 * 3 + 2 * 8)  # Values per image and channel.
    assert kept["fused"] <= kept["plain"] + small
    assert kept["gated"] <= kept["plain"] + 2 * small


@runs_kernels
@pytest.mark.parametrize("norm", NORMS[:3])
def test_a_gate_saves_its_input_in_a_pre_activation_block(norm):
    """Check which feature maps are saved for the backward pass, and the memory that they use.

    Without a gate, these are the output and, if the norm is not frozen, the result of the residual
    addition. With a gate, the gate's input is also saved.
    """
    shape = (2, 8, 24, 24)
    kept, saved = {}, {}
    for name, gate in (("plain", ""), ("fused", ""), ("gated", "sigmoid")):
        maps = [draw(shape, DOUBLE, False, seed).requires_grad_() for seed in (1, 2)]
        model, outputs = PreAct(8, norm, gate).to(DEVICE, DOUBLE), []
        model.plain = name == "plain"
        kept[name] = saved_bytes(lambda: outputs.extend(model(*maps)), model)  # noqa: B023
        if not model.plain:
            names = dict(
                zip([x.data_ptr() for x in (maps[0], *outputs)], ["x", "sum", "out"], strict=True)
            )
            tensors = [tensor for tensor in outputs[1].grad_fn.saved_tensors if tensor is not None]
            large = [tensor.data_ptr() for tensor in tensors if tensor.shape == shape]
            saved[name] = sorted(names.get(pointer, "other") for pointer in large)
    print(f"bytes saved for the backward pass with {norm}: {kept}")
    expected = ["out"] if norm == "FrozenBN" else ["out", "sum"]
    assert saved == {"fused": expected, "gated": [*expected, "x"]}
    small = 8 * (2 * 8 * 3 + 2 * 8)  # Values per image and channel.
    one_map = maps[0].nbytes
    assert kept["fused"] <= kept["plain"] + small
    assert kept["gated"] <= kept["plain"] + one_map + 2 * small


@runs_kernels
@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("BN", 4, 4),
        ("BN without a gate", 3, 3),
        ("FrozenBN", 3, 4),
        ("FrozenBN without a gate", 1, 1),
        ("pre-activation", 5, 6),
        ("pre-activation BN without a gate", 3, 3),
    ],
)
def test_the_number_of_kernels(name, forward, backward, monkeypatch):
    models = {
        **MODELS,
        "FrozenBN without a gate": lambda: End(8, "FrozenBN", ""),
        "pre-activation BN without a gate": lambda: PreAct(8, "BN", ""),
    }
    launched, original = [], launch._launch

    def count(kernel, *arguments):
        launched.append(kernel.__name__)
        original(kernel, *arguments)

    monkeypatch.setattr(launch, "_launch", count)
    model = models[name]().to(DEVICE, DOUBLE)
    outputs = model(*inputs_of(model))
    found = len(launched)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(out.sum() for out in outputs).backward()
    assert (found, len(launched) - found) == (forward, backward), launched


# Mutations of the kernels: "kernel: changed term", the original code and its replacement.
MUTATIONS = {
    "moments: mean": ("mean += change", "mean += 0 * change"),
    "moments: squares": ("square += change * (value - mean)", "square += 0 * change"),
    "moments: squares between lanes": ("lanes * apart * apart", "0 * apart"),
    "moments: gate": ("value *= gate[None, :]", "value *= 1"),
    "moments: shortcut": ("value += tl.load(shortcut_ptr", "value += 0 * tl.load(shortcut_ptr"),
    "merge: squares between chunks": ("apart * apart * count", "0 * apart"),
    "merge: running mean": ("momentum * (mean - old)", "0 * mean"),
    "merge: running variance": ("momentum * (unbiased - old)", "0 * old"),
    "merge: unbiased variance": ("(total - 1)", "total"),
    "merge: number of batches": ("tl.load(batches_ptr) + 1", "tl.load(batches_ptr)"),
    "_image_mean: weights of chunks": ("other=0) * count", "other=0) * CHUNK"),
    "hidden_units: norm": ("pooled += _vector(bias_ptr, c, inside, ACC)", "pooled += 0"),
    "hidden_units: bias": ("hidden += _vector(b1_ptr", "hidden += 0 * _vector(b1_ptr"),
    "hidden_units: ReLU": ('_activate(hidden, "relu")', "hidden"),
    "_excite: bias": ("gate += _vector(b2_ptr", "gate += 0 * _vector(b2_ptr"),
    "_excite: activation": ("_activate(gate, ACT)", "gate"),
    "apply: mean": ("(value - mean[None, :])", "value"),
    "apply: bias": ("scale[None, :] + shift[None, :]", "scale[None, :]"),
    "apply: gate": ("value *= gate[None, :]", "value *= 1"),
    "apply: shortcut": ("value += tl.load(shortcut_ptr", "value += 0 * tl.load(shortcut_ptr"),
    "gradient_sums: total": ("total += gradient", "total += 0 * gradient"),
    "gradient_sums: mean": ("x -= mean[None, :]", "x -= 0"),
    "gradient_sums: ReLU": ("tl.where(out <= 0, 0, gradient)", "gradient"),
    "gate_backward: bias": ("dgate += total *", "dgate += 0 * total *"),
    "gate_backward: activation": ("dgate * _slope(gate, ACT)", "dgate"),
    "gate_backward: ReLU": ("tl.where(hidden <= 0, 0, tl.sum(summed, 0))", "tl.sum(summed, 0)"),
    "gate_backward: bias through the squeeze": ("gate * total + dpooled,", "gate * total,"),
    "gate_backward: weight through the squeeze": ("+ dpooled * pooled", ""),
    "parameter_gradients: norm": ("scale[None, :] + shift[None, :]", "scale[None, :]"),
    "parameter_gradients: images": ("range(0, N, BN)", "range(BN, N, BN)"),
    "parameter_gradients: chunks": ("range(0, ROWS, BN)", "range(BN, ROWS, BN)"),
    "input_gradient: mean of the batch": ("constant -= share", "constant -= 0 * share"),
    "input_gradient: variance of the batch": ("value -= (x - mean[None, :])", "value -= 0 * x"),
    "input_gradient: squeeze": ("constant += scale", "constant += 0 * scale"),
    "input_gradient: gate": ("scale *= _row(gate_ptr", "scale += 0 * _row(gate_ptr"),
    "input_gradient: other gradient": ("value += tl.load(extra", "value += 0 * tl.load(extra"),
    "input_gradient: products": ("stored.to(ACC) * branch", "0 * branch"),
}  # fmt: skip

# One mutation of each kernel. The tests of all other mutations are marked as slow.
FAST = {
    "moments: squares", "merge: squares between chunks", "hidden_units: norm",
    "_excite: bias", "apply: shortcut", "gradient_sums: total", "gate_backward: ReLU",
    "parameter_gradients: images", "input_gradient: variance of the batch",
}  # fmt: skip


def check_all() -> None:
    """Compare two fused models with their unfused versions.

    The inputs have two shapes and two memory formats. The comparison must fail if any of the
    ``MUTATIONS`` is applied to the kernels.
    """
    for shape, last in (((2, 5, 3, 4), False), ((2, 66, 7, 10), True)):
        maps = [draw(shape, DOUBLE, last, seed) for seed in (1, 2)]
        launch._tiling.cache_clear()
        check(PreAct(shape[1], "BN", "sigmoid"), maps, outputs=2)
        check(End(shape[1]), maps)


def mutated_kernels(name: str, folder: Path) -> object:
    """Return a copy of the kernel module in which a mutation changes one expression.

    The changed source is written to a temporary file and imported from there.
    """
    from senet_transfer.layers.fused import kernels

    old, new = MUTATIONS[name]
    before, kernel, after = (
        Path(kernels.__file__).read_text().partition(f"def {name.partition(':')[0]}(")
    )
    kernel, decorator, others = f"{kernel}{after}".partition("@triton.jit")
    assert kernel.count(old) == 1, f"found {kernel.count(old)} times in the kernel: {old}"
    path = folder / "mutated.py"
    path.write_text(before + kernel.replace(old, new) + decorator + others)
    spec = importlib.util.spec_from_file_location("mutated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@runs_kernels
@pytest.mark.skipif(not INTERPRETED, reason="the interpreter runs mutations without compiling them")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=fast_if(name in FAST)) for name in MUTATIONS],
)
def test_the_check_fails_if_a_term_is_missing(name, tmp_path, monkeypatch):
    module = mutated_kernels(name, tmp_path)
    monkeypatch.setattr(fused, "kernels", module)
    worst = dict(WORST)
    # With 8 programs, each program processes several tiles, and several programs share an image.
    monkeypatch.setattr(launch, "_PROGRAMS", 8)
    with pytest.raises(AssertionError):
        check_all()
    launch._tiling.cache_clear()
    WORST.clear()
    WORST.update(worst)


@runs_kernels
def test_the_check_passes_if_no_term_is_missing(monkeypatch):
    monkeypatch.setattr(launch, "_PROGRAMS", 8)
    check_all()
    launch._tiling.cache_clear()


@runs_kernels
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("cifar_resnet8", {}, marks=pytest.mark.slow),
        ("se_cifar_resnet8", {}),
        pytest.param("se_cifar_resnet8", {"norm": "FrozenBN"}, marks=pytest.mark.slow),
        pytest.param("se_cifar_resnet8", {"se_placement": "identity"}, marks=pytest.mark.slow),
        pytest.param("se_cifar_resnet8", {"se_placement": "pre"}, marks=pytest.mark.slow),
        pytest.param("se_cifar_resnet8", {"se_placement": "post"}, marks=pytest.mark.slow),
        pytest.param("se_cifar_resnet11", {"block": "bottleneck"}, marks=pytest.mark.slow),
        pytest.param("se_cifar_resnet8", {"freeze_at": 2}, marks=pytest.mark.slow),
        pytest.param("resnet18", {}, marks=pytest.mark.slow),
        pytest.param("se_resnet18", {"norm": "FrozenBN", "freeze_at": 2}, marks=pytest.mark.slow),
        pytest.param("se_resnet50", {"se_placement": "3x3"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_networks_compute_the_same(name, options):
    """Compare a network's outputs, gradients and buffers with and without fused kernels."""
    torch.manual_seed(0)
    plain = create_backbone(name, fused=False, **options)
    for key, parameter in plain.named_parameters():
        if key.endswith("fc2.weight"):
            nn.init.normal_(parameter, std=0.1)
    plain = plain.to(DEVICE, DOUBLE)
    ours, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    set_fused(ours, True)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    images = draw((2, 3, 16, 16) if "cifar" in name else (2, 3, 64, 64), DOUBLE, True, 1)
    results = []
    for model in (ours, plain, exact):
        outputs = list(model(images.double() if model is exact else images).values())
        outputs[-1].square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([*outputs, *gradients, *model.buffers()])
    for found, other, expected in zip(*results, strict=True):
        # In float32, even the errors of PyTorch's operators grow from layer to layer.
        accepted = 1e-6 if torch.float64 == DOUBLE else 1e-4 + 3 * relative(other, expected)
        assert relative(found, expected) < accepted


def deployed_block() -> nn.Module:
    torch.manual_seed(0)
    block = SEBottleneckBlock(8, 8, bottleneck_channels=6, se=SEOptions(ratio=2))
    nn.init.normal_(block.se.fc2.weight)
    block = deploy(block.to(DEVICE, DOUBLE))
    assert block.se.takes_input
    return block


@runs_kernels
def test_a_deployed_block_squeezes_the_input_of_its_last_convolution():
    block, x = deployed_block(), draw((2, 8, 3, 5), DOUBLE, True, 1)
    with torch.no_grad():
        set_fused(block, True)
        found = block(x)
        set_fused(block, False)
        assert relative(found, block(x)) < (1e-9 if INTERPRETED else 5e-6)


@runs_kernels
@pytest.mark.parametrize("leaf", ["x", "conv3.weight", "se.fc1.weight"])
def test_a_deployed_block_has_gradients(leaf):
    block, x = deployed_block(), draw((2, 8, 3, 5), DOUBLE, True, 1)
    leaf = x if leaf == "x" else block.get_parameter(leaf)
    leaf.requires_grad_()
    results = []
    for fused_option in (True, False):
        set_fused(block, fused_option)
        out = block(x)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaf)])
    for found, expected in zip(*results, strict=True):
        assert relative(found, expected) < (1e-9 if INTERPRETED else 5e-6)


@runs_kernels
def test_a_gradient_of_an_exported_deployed_block_is_an_error():
    block, x = deployed_block(), draw((2, 8, 3, 5), DOUBLE, True, 1)
    set_fused(block, True)
    exported = torch.export.export(block, (x,)).module()
    torch.testing.assert_close(exported(x), block(x))
    with pytest.raises(RuntimeError, match=r"feature map other than x.*deploy\(\)"):
        exported(x.requires_grad_()).sum().backward()


@runs_kernels
@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_a_gate_and_a_sum_without_a_norm(scale):
    se = End(8, "").se.to(DEVICE, DOUBLE)
    maps = [draw((2, 8, 3, 3), DOUBLE, False, seed) for seed in (1, 2)]
    expected = scale * plain_gate(se, maps[0]) * maps[0] + maps[1]
    torch.testing.assert_close(gate_and_add(se, *maps, True, scale), expected)


@runs_kernels
def test_variants_without_a_fused_form_use_pytorch_s_operators():
    x, shortcut = (draw((2, 8, 3, 3), DOUBLE, False, seed) for seed in (1, 2))
    for norm in (NaiveSyncBatchNorm(8), nn.GroupNorm(2, 8), nn.BatchNorm2d(8, affine=False)):
        norm.to(DEVICE, DOUBLE).eval()
        torch.testing.assert_close(norm_relu(norm, x, True), torch.relu(norm(x)))
        assert gate_add_norm(None, norm, x, shortcut, True) is None
    for options in ({"squeeze": "max"}, {"squeeze": "none"}):
        se = SqueezeExcitation(8, ratio=2, **options).to(DEVICE, DOUBLE)
        torch.testing.assert_close(
            gate_and_add(se, x, shortcut, True), se.gate_and_add(x, shortcut)
        )


@runs_kernels
def test_tensors_on_several_devices_are_an_error():
    model = End(4).to(DEVICE, DOUBLE)
    maps = [draw((2, 4, 3, 3), DOUBLE, False, seed) for seed in (1, 2)]
    model(*maps)
    model.norm.bias = nn.Parameter(model.norm.bias.to("meta"))
    with pytest.raises(RuntimeError, match=f"{DEVICE}.* and meta; expected one device"):
        model(*maps)


@runs_kernels
def test_hooks_are_called():
    branch = Branch("BN").to(DEVICE, DOUBLE)
    maps = inputs_of(branch)
    for name in ("conv", "conv.norm", "se.fc1", "se"):
        model, calls = copy.deepcopy(branch), []
        model.get_submodule(name).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert residual_end(model.conv, model.se, *maps, True) is None


@runs_kernels
def test_one_value_per_channel_raises_pytorchs_error():
    conv = Conv2d(4, 8, 1, bias=False, norm=get_norm("BN", 8)).to(DEVICE, DOUBLE)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        conv_norm_relu(conv, draw((1, 4, 1, 1), DOUBLE, False, 1), True)


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu():
    """Compile variants of each kernel for Hopper GPUs. Compilation does not need a GPU."""
    pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("interpreted kernels can't be compiled")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_auto_uses_the_kernels_only_on_a_gpu():
    device = SimpleNamespace(type="cpu")
    assert not functions.uses_kernels("auto", SimpleNamespace(device=device))
    assert not functions.uses_kernels(False, SimpleNamespace(device=device))
    device.type = "cuda"
    on_gpu = functions.uses_kernels("auto", SimpleNamespace(device=device))
    assert on_gpu == (importlib.util.find_spec("triton") is not None)
    assert not functions.uses_kernels(False, SimpleNamespace(device=device))


@pytest.mark.parametrize(
    ("norm", "training", "gate", "compiling", "fused"),
    [
        ("BN", True, True, False, True),
        ("BN", True, False, False, False),
        ("BN", False, False, False, True),
        ("FrozenBN", True, False, False, True),
        ("BN", True, True, True, False),
    ],
)
def test_auto_fuses_only_what_is_faster(monkeypatch, norm, training, gate, compiling, fused):
    monkeypatch.setattr(functions, "uses_kernels", lambda *_: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    norm, se = get_norm(norm, 4).train(training), SqueezeExcitation(4, ratio=2) if gate else None
    x = torch.zeros(2, 4, 3, 3)
    assert functions._is_selected("auto", x, norm, se) == fused
    assert functions._is_selected(True, x, norm, se)


class FakeKernel:
    """Stand-in for a Triton kernel with one flag. It records compilations and launches."""

    arg_names = ("x_ptr", "size", "FLAG")

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, **flags):
            self.compiled.append((grid, arguments, flags))
            return self.launches()

        return compile_and_launch

    def launches(self):
        kernel = self

        class Compiled:
            def __getitem__(self, grid):
                return lambda *values: kernel.launched.append((grid[:3], values))

        return Compiled()


def test_a_kernel_is_compiled_once_for_each_key_and_flags(monkeypatch):
    """Check that a second launch with the same key and flags reuses the compiled kernel.

    The arguments of this kernel are ``x.data_ptr()``, ``size`` and ``FLAG``, in this order.
    """
    monkeypatch.setattr(launch, "_COMPILED", {})
    kernel, x = FakeKernel(), torch.zeros(4)
    for key, size, flag in (("a", 5, True), ("a", 7, True), ("a", 7, False), ("b", 7, True)):
        launch._launch(kernel, (size,), (key,), (x, size), {"FLAG": flag, "num_warps": 4})
    assert [(size, flags["FLAG"]) for (size,), _, flags in kernel.compiled] == [
        (5, True),
        (7, False),
        (7, True),
    ]
    assert kernel.launched == [((7, 1, 1), (x.data_ptr(), 7, True))]


def test_only_tensors_that_are_not_aligned_are_copied():
    aligned = torch.zeros(8)
    other = shifted(torch.arange(8.0))
    assert launch._aligned(aligned) is aligned
    assert launch._aligned(other).data_ptr() % 16 == 0 != other.data_ptr() % 16
    assert torch.equal(launch._aligned(other), other)


def test_true_is_an_error_on_a_cpu(monkeypatch):
    monkeypatch.setattr(functions, "_INTERPRETED", False)
    with pytest.raises(UserError, match=r"device 'cpu'.*MODEL.SE.FUSED.*TRITON_INTERPRET"):
        create_backbone("cifar_resnet8", fused=True)(torch.zeros(1, 3, 8, 8))
    monkeypatch.setattr(functions, "_HAS_TRITON", False)
    with pytest.raises(UserError, match="Triton.*is not installed"):
        create_backbone("cifar_resnet8", fused=True)(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("value", ["yes", None, 1, "True"])
def test_another_value_is_an_error(value):
    with pytest.raises(UserError, match=r"fused is .*expected 'auto'"):
        create_backbone("cifar_resnet8", fused=value)
    with pytest.raises(UserError, match="fused is"):
        set_fused(nn.Identity(), value)


@pytest.mark.long
def test_importing_the_package_imports_no_kernel():
    code = (
        "import sys, senet_transfer.models; "
        "assert 'senet_transfer.layers.fused.operators' in sys.modules; "
        "assert 'senet_transfer.layers.fused.kernels' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
