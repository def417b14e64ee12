"""Forward and backward passes of the fused operators, implemented with the Triton kernels."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

# Number of elements in a feature map tile, by dtype, and in a tile of gate weights. A thread loads
# 32 bytes of a feature map at a time.
_TILE = {torch.float16: 2048, torch.bfloat16: 2048, torch.float32: 1024, torch.float64: 2048}
_GATE_TILE = 16384

# Number of a gate's hidden units per program.
_UNITS = 16

# Number of programs that fully occupies a large GPU. Images are divided into chunks to reach this
# number.
_PROGRAMS = 1024

Maybe: TypeAlias = Tensor | None
_Results: TypeAlias = tuple[Maybe, ...]


# Properties of an integer argument that Triton specialises kernels for: whether it equals 1, is
# divisible by 16, and fits in 32 bits.
_Kind: TypeAlias = tuple[bool, bool, bool]


class _Tiling(NamedTuple):
    """Division of a feature map into tiles and chunks of positions; see :mod:`.kernels`.

    Attributes:
        programs: Number of program instances (grid size) of a kernel that processes a feature map.
        rows: Total number of chunks in all images; each chunk is a row of the partial sums.
        sizes: Numbers of channels, positions, chunks per image, and positions per chunk.
        tile: Compile-time arguments of the kernels that process a feature map.
        kinds: Properties of the sizes for which Triton compiles separate kernels, such as
            divisibility by 16; part of the cache key.
    """

    programs: int
    rows: int
    sizes: tuple[int, int, int, int]
    tile: dict[str, Any]
    kinds: tuple[Any, ...]


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _kind(n: int) -> _Kind:
    return n == 1, n % 16 == 0, n < 2**31


@functools.lru_cache(maxsize=4096)
def _tiling(n: int, channels: int, positions: int, last: bool, dtype: torch.dtype) -> _Tiling:
    import triton.language as tl

    size = _TILE[dtype]
    if last:
        width = min(64, _power_of_2(channels))
        length = size // width
    else:
        length = min(1024, _power_of_2(positions))
        width = min(size // length, _power_of_2(channels))
    blocks = -(-channels // width)
    chunk = -(-positions // max(1, _PROGRAMS // (n * blocks)))
    chunk = -(-chunk // length) * length
    splits = -(-positions // chunk)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    sizes = channels, positions, splits, chunk
    # On AMD GPUs, Triton uses 32-bit offsets for tensors smaller than 2 GiB. For large shapes, the
    # shape and the dtypes determine which tensors are that small.
    large = (n, channels, positions) if 8 * n * channels * positions >= 2**31 else None
    return _Tiling(
        programs=n * splits * blocks,
        rows=n * splits,
        sizes=sizes,
        tile={"LAST": last, "ACC": acc, "BP": length, "BC": width, "num_warps": 4},
        kinds=(*map(_kind, (channels, positions, chunk)), n * positions < 2**31, large),
    )


def _aligned(value: Any) -> Any:
    """Copy a tensor if its address is not aligned to 16 bytes. Return other values unchanged."""
    if isinstance(value, Tensor) and value.data_ptr() % 16:
        return value.clone()
    return value


def _prepared(function: Callable[..., _Results]) -> Callable[..., _Results]:
    """Decorate a function that launches kernels, so that it runs on the GPU of its arguments.

    Unaligned tensors are copied. The decorated function receives an additional first argument, a
    key for the cache of compiled kernels. The key consists of the function's name, the device index
    and the dtypes of the tensors.

    Raises:
        RuntimeError: If the tensors are on different devices.
    """

    @functools.wraps(function)
    def call(*arguments: Any) -> _Results:
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        tensors += next((value[:3] for value in arguments if isinstance(value, Running)), ())
        device = tensors[0].device
        if any(tensor.device != device for tensor in tensors):
            devices = sorted({str(tensor.device) for tensor in tensors})
            raise RuntimeError(
                f"The feature maps, the norm and the gate of a residual block are on the devices "
                f"{' and '.join(devices)}; expected one device. Move the whole network with "
                "model.to(device)."
            )
        arguments = tuple(map(_aligned, arguments))
        dtypes = [value.dtype if isinstance(value, Tensor) else None for value in arguments]
        key = (function.__name__, device.index, *dtypes)
        if device.type == "cpu" or device.index == torch.cuda.current_device():
            return function(key, *arguments)
        with torch.cuda.device(device):
            return function(key, *arguments)

    return call


def is_channels_last(x: Tensor) -> bool:
    """Return whether ``x`` has the channels-last memory format.

    If ``x`` is also contiguous, for example because it has a single channel, return False.
    """
    return not x.is_contiguous() and x.stride(1) == 1


class _Norm(NamedTuple):
    """Statistics and parameters ``(C,)`` of a norm layer, and its epsilon.

    If there is no norm, the tensors are None.
    """

    mean: Maybe
    var: Maybe
    weight: Maybe
    bias: Maybe
    eps: float


class _Gate(NamedTuple):
    """Weights and biases of a gate's two linear layers, with R hidden units.

    The shapes are ``(R, C)``, ``(R,)``, ``(C, R)`` and ``(C,)``.
    """

    w1: Tensor
    b1: Maybe
    w2: Tensor
    b2: Maybe


def _make_gate(w1: Maybe, b1: Maybe, w2: Maybe, b2: Maybe) -> _Gate | None:
    if w1 is None or w2 is None:
        return None
    return _Gate(w1.contiguous(), b1, w2.contiguous(), b2)


_Key: TypeAlias = tuple[Any, ...]

# Cache of compiled kernels and the values of their compile-time arguments; see `_launch`.
_COMPILED: dict[_Key, tuple[Any, list[Any]]] = {}


def _launch(
    kernel: Any, grid: tuple[int, ...], key: _Key, arguments: Sequence[Any], flags: dict[str, Any]
) -> None:
    """Launch a kernel, and cache the compiled kernel for later launches.

    When Triton itself launches a kernel, it inspects all arguments. On the host, this takes longer
    than most kernels take on the GPU. The launch of a cached kernel skips this inspection. Tensors
    are passed as integer addresses, so their pointers are not looked up in the CUDA driver.

    Args:
        kernel: The kernel.
        grid: Number of programs in each dimension.
        key: Key of the cache, in addition to ``kernel`` and ``flags``. It contains the device, the
            dtypes of the tensors, and the properties of integers for which Triton specialises
            kernels.
        arguments: Tensors, numbers and None, in the order of the kernel's parameters. The addresses
            of tensors must be aligned. An integer whose properties are not in ``key`` must be
            passed as a float, because Triton does not specialise kernels for values of floats.
        flags: Compile-time arguments of the kernel and Triton options.
    """
    key = (id(kernel), key, *flags, *flags.values())
    found = _COMPILED.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **flags)
        if compiled is not None:  # Triton's interpreter returns None.
            constants = [flags[name] for name in kernel.arg_names[len(arguments) :]]
            _COMPILED[key] = compiled, constants
    else:
        compiled, constants = found
        values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
        compiled[(*grid, 1, 1)](*values, *constants)


class _Gates(NamedTuple):
    """Arguments of the kernels that compute gates from hidden units and apply them.

    Attributes:
        hidden: Activations of the hidden units, ``(N, R)``. None if the kernel computes no gates.
        w2: Weights ``(C, R)``.
        b2: Biases ``(C,)``, or None.
        value: Output tensor for the gates, ``(N, C)``.
        activation: Name of the activation.
    """

    hidden: Maybe = None
    w2: Maybe = None
    b2: Maybe = None
    value: Maybe = None
    activation: str = ""

    @property
    def units(self) -> int:
        """The number of hidden units."""
        return 0 if self.w2 is None else self.w2.shape[1]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The run-time arguments for the gates, in the order of the kernels' parameters."""
        return self.hidden, self.w2, self.b2, self.value, self.units

    def flags(self, launch: "_Launcher") -> dict[str, Any]:
        """Return the gate-related keyword arguments of :meth:`_Launcher.run`.

        They are the compile-time arguments of the kernels, and ``key``, which adds properties of
        the number of hidden units to the key for the cache of compiled kernels.
        """
        return {
            "GATE": self.value is not None,
            "BIAS": self.b2 is not None,
            "ACT": self.activation,
            "BR": min(4096 // launch.tiling.tile["BC"], _power_of_2(self.units)),
            "key": _kind(self.units),
        }


_NO_GATES = _Gates()


class _Launcher:
    """Launcher of the kernels for feature maps of a given shape, layout, dtype and device."""

    def __init__(self, key: _Key, like: Tensor, last: bool | None = None):
        """
        Args:
            key: Key for the cache of compiled kernels; see :func:`_prepared`.
            like: A feature map with the shape, dtype and device of those to be processed.
            last: Whether the memory format is channels-last; None uses that of ``like``.
        """
        from senet_transfer.layers.fused import kernels

        self.kernels = kernels
        self.last = is_channels_last(like) if last is None else last
        self.n, self.c, height, width = like.shape
        self.count = self.n * height * width
        self.tiling = _tiling(self.n, self.c, height * width, self.last, like.dtype)
        self.key = (*key, like.dtype, *self.tiling.kinds)
        self.acc = self.tiling.tile["ACC"]
        self.device = like.device
        self.dtype = torch.float64 if like.dtype == torch.float64 else torch.float32

    def dense(self, x: Tensor) -> Tensor:
        """Return ``x`` in the launcher's memory format. It is copied only if necessary."""
        layout = torch.channels_last if self.last else torch.contiguous_format
        return x.contiguous(memory_format=layout)

    def new(self, *shape: int) -> Tensor:
        """Return an uninitialised tensor with the dtype in which the kernels accumulate."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def rows(self) -> Tensor:
        """Return an uninitialised tensor ``(chunks, C)`` for one value per chunk and channel."""
        return self.new(self.tiling.rows, self.c)

    def run(self, kernel: Any, *arguments: Any, key: _Key | _Kind = (), **flags: Any) -> None:
        """Launch a kernel that processes the tiles of a feature map."""
        arguments = (*arguments, *self.tiling.sizes)
        key = (*self.key, *key)
        _launch(kernel, (self.tiling.programs,), key, arguments, flags | self.tiling.tile)

    def run_grid(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *arguments: Any,
        key: _Key | _Kind = (),
        **flags: Any,
    ) -> None:
        """Launch a kernel that reads per-image or per-chunk arrays instead of a feature map."""
        _launch(kernel, grid, (*self.key, *key), arguments, flags | {"ACC": self.acc})

    def moments(self, x: Tensor, *, square: bool) -> tuple[Tensor, Maybe]:
        """Compute the statistics of each channel over each chunk of positions.

        Returns:
            The means, and the sums of squared deviations, or None if ``square`` is False.
        """
        means, squares = self.rows(), self.rows() if square else None
        self.run(
            self.kernels.moments, x, None, None, means, squares, *_NO_GATES.arguments,
            SUM=False, MEAN=True, SQUARE=square, **_NO_GATES.flags(self),
        )  # fmt: skip
        return means, squares

    def add(
        self, x: Tensor, shortcut: Tensor, gates: "_Gates", *, moments: bool
    ) -> tuple[Tensor, Maybe, Maybe]:
        """Return ``gate * x + shortcut`` and its statistics.

        The statistics are the mean and the sum of squared deviations of each channel over each
        chunk of positions.

        Args:
            x: The feature map.
            shortcut: The shortcut.
            gates: The gates for the feature map.
            moments: Whether to compute the statistics. If False, None is returned for them.
        """
        added = torch.empty_like(x)
        means, squares = (self.rows(), self.rows()) if moments else (None, None)
        self.run(
            self.kernels.moments, x, shortcut, added, means, squares, *gates.arguments,
            SUM=True, MEAN=moments, SQUARE=moments, **gates.flags(self),
        )  # fmt: skip
        return added, means, squares

    def apply(
        self, x: Tensor, norm: _Norm, gates: "_Gates", shortcut: Maybe, *, relu: bool
    ) -> Tensor:
        """Return ``relu(gate * norm(x) + shortcut)``."""
        out = torch.empty_like(x)
        self.run(
            self.kernels.apply, x, shortcut, out, *norm, *gates.arguments,
            NORM=norm.mean is not None, ADD=shortcut is not None, RELU=relu, **gates.flags(self),
        )  # fmt: skip
        return out

    def gradient_sums(
        self, gradient: Tensor, out: Maybe, x: Tensor, norm: _Norm, masked: Maybe
    ) -> tuple[Maybe, Tensor]:
        """Return the sums of the gradient and of its product with ``x``.

        Each sum is over the positions of one chunk and channel; see :mod:`.kernels`.

        Args:
            gradient: Gradient of the output.
            out: Output of the ReLU, which masks the gradient. None if there is no ReLU.
            x: The feature map.
            norm: The norm, whose mean is subtracted from ``x``. If there is no norm, nothing is
                subtracted, and None is returned for the sums of the gradient.
            masked: Tensor to which the masked gradient is written, or None.
        """
        has_norm = norm.mean is not None
        total, aligned = self.rows() if has_norm else None, self.rows()
        self.run(
            self.kernels.gradient_sums, gradient, out, x, norm.mean, masked, total, aligned,
            NORM=has_norm, RELU=out is not None, KEEP=masked is not None,
        )  # fmt: skip
        return total, aligned

    def _row_tile(self) -> dict[str, int]:
        """Return the number of rows and warps per tile, for kernels that combine all chunks."""
        rows = min(256, max(16, _power_of_2(self.tiling.rows)))
        return {"BR": rows, "num_warps": 4 if rows <= 64 else 8}

    def merge(
        self, means: Tensor, squares: Maybe, running: "Running | None"
    ) -> tuple[Tensor, Tensor]:
        """Merge the statistics of all chunks of positions into the batch mean and variance.

        If ``running`` is not None, also update the running statistics.
        """
        mean, var = self.new(self.c), self.new(self.c)
        channels, positions, splits, chunk = self.tiling.sizes
        tensors = running[:3] if running else ()
        self.run_grid(
            self.kernels.merge, (-(-self.c // 16),),
            means, squares, mean, var, *(running or (None, None, None, 0.0)), channels, positions,
            splits, self.tiling.rows, chunk, RUNNING=running is not None, BC=16, **self._row_tile(),
            key=tuple((tensor.dtype, tensor.data_ptr() % 16) for tensor in tensors),
        )  # fmt: skip
        return mean, var

    def hidden_units(self, means: Tensor, norm: _Norm, gate: _Gate) -> tuple[Tensor, Tensor]:
        """Return the pooled features and the hidden units of all images.

        Args:
            means: Means of the feature map over each chunk of positions, ``(chunks, C)``.
            norm: The norm between the feature map and the gate.
            gate: The gate.
        """
        units = len(gate.w1)
        pooled, hidden = self.new(self.n, self.c), self.new(self.n, units)
        channels, positions, splits, chunk = self.tiling.sizes
        height, rows = min(_UNITS, _power_of_2(units)), min(128, _power_of_2(splits))
        self.run_grid(
            self.kernels.hidden_units, (self.n, -(-units // height)),
            means, *norm, gate.w1, gate.b1, pooled, hidden, channels, units, positions, splits,
            chunk, NORM=norm.mean is not None, BIAS=gate.b1 is not None,
            BS=rows, BR=height, BC=min(512, 8192 // rows, _power_of_2(self.c)),
            num_warps=8, key=_kind(units),
        )  # fmt: skip
        return pooled, hidden

    def _gate_tile(self, units: int) -> dict[str, Any]:
        height = _power_of_2(units)
        width = min(max(16, _GATE_TILE // height), _power_of_2(self.c))
        return {
            "BS": min(64, _power_of_2(self.tiling.sizes[2])),
            "BR": height,
            "BC": width,
            "num_warps": 16 if height * width > _GATE_TILE // 2 else 8,
        }

    def gate_gradients(
        self,
        total: Maybe,
        aligned: Tensor,
        norm: _Norm,
        gate: _Gate,
        saved: tuple[Tensor, ...],
        excitation: str,
        *,
        sums: bool,
    ) -> tuple[Tensor, tuple[Maybe, ...]]:
        """Return the gradients of the pooled features and of the parameters of gate and norm.

        Args:
            total: Sums of the gradient over each chunk of positions; see :mod:`.kernels`. Required
                only if a norm precedes the gate.
            aligned: Sums of the product of gradient and feature map over each chunk. If a norm
                precedes the gate, the norm's mean is subtracted from the feature map.
            norm: The norm before the gate.
            gate: The gate.
            saved: Pooled features, hidden units and gates of all images.
            excitation: Name of the gate's activation.
            sums: Whether to compute the gradients of the norm's parameters.

        Returns:
            The gradients of the pooled features, of the norm's weight and bias, and of w1, b1, w2
            and b2.
        """
        pooled, hidden, value = saved
        units, has_norm = len(gate.w1), norm.mean is not None
        dsum, dpooled, dhidden = (self.new(self.n, size) for size in (self.c, self.c, units))
        totals = [self.new(self.n, self.c) if sums else None for _ in range(2)]
        self.run_grid(
            self.kernels.gate_backward, (self.n,),
            total, aligned, pooled, *norm, gate.w1, gate.w2, hidden, value, dsum, dhidden, dpooled,
            *totals, self.c, units, self.tiling.sizes[2], NORM=has_norm, SUMS=sums, ACT=excitation,
            **self._gate_tile(units), key=_kind(units),
        )  # fmt: skip
        affine = [self.new(self.c) if sums else None for _ in range(2)]
        found = [None if p is None else torch.empty_like(p) for p in gate]
        height = min(32, max(16, _power_of_2(units)))
        self.run_grid(
            self.kernels.parameter_gradients, (-(-self.c // 32), -(-units // height)),
            *totals, *norm, *affine, dsum, dhidden, hidden, pooled, *found, self.c, units, self.n,
            self.n, SUMS=sums, SCALED=True, NORM=has_norm, GATE=True, BIAS=gate.b1 is not None,
            BN=16, BR=height, BC=32, key=_kind(units),
        )  # fmt: skip
        return dpooled, (*affine, *found)

    def norm_gradients(self, total: Maybe, aligned: Tensor, norm: _Norm) -> tuple[Tensor, Tensor]:
        """Return the gradients of a norm's weight and bias."""
        affine = self.new(self.c), self.new(self.c)
        tile = self._row_tile()
        self.run_grid(
            self.kernels.parameter_gradients, (-(-self.c // 16), 1),
            total, aligned, *norm, *affine, *(None,) * 8, self.c, 0, 0, self.tiling.rows,
            SUMS=True, SCALED=False, NORM=False, GATE=False, BIAS=False, BN=tile["BR"], BR=16,
            BC=16, num_warps=tile["num_warps"],
        )  # fmt: skip
        return affine

    def input_gradient(
        self,
        gradient: Tensor,
        norm: _Norm,
        affine: tuple[Maybe, ...],
        *,
        out: Maybe = None,
        x: Maybe = None,
        gated: tuple[Tensor, Tensor] | None = None,
        masked: Maybe = None,
        extra: Maybe = None,
        branch: Maybe = None,
    ) -> tuple[Tensor, Maybe]:
        """Compute the gradient with respect to the input of a norm or gate.

        Args:
            gradient: Gradient of the output.
            norm: The norm.
            affine: Gradients of the norm's weight and bias; None for fixed statistics.
            out: Output of the ReLU, which masks the gradient; None for no ReLU.
            x: Input of the norm; required only for batch statistics.
            gated: The gates, and the gradients of the pooled features; None if there is no gate.
            masked: Tensor to which the masked gradient is written, or None.
            extra: Another gradient of the same input, which is added to the result, or None.
            branch: Feature map to multiply by the result, or None.

        Returns:
            The gradient of the input, and the sums of its product with ``branch`` over each chunk
            of positions, ``(chunks, C)``. Without ``branch``, the sums are None.
        """
        dx, dots = torch.empty_like(gradient), None if branch is None else self.rows()
        batch = affine[0] is not None
        self.run(
            self.kernels.input_gradient, gradient, out, x if batch else None, extra, branch,
            *norm, *affine, *(gated or (None, None)), dx, masked, dots, self.count,
            NORM=norm.mean is not None, BATCH=batch, GATE=gated is not None,
            RELU=out is not None, KEEP=masked is not None, EXTRA=extra is not None,
            DOT=branch is not None,
        )  # fmt: skip
        return dx, dots


class Running(NamedTuple):
    """Running statistics of a batch norm, which are updated in place."""

    mean: Tensor
    var: Tensor
    batches: Tensor
    momentum: float


_NO_NORM = _Norm(None, None, None, None, 0.0)
_NO_AFFINE = (None, None)


# The implementations of the operators. Results that are not computed are None.


@_prepared
def end_forward(
    key: _Key,
    x: Tensor,
    shortcut: Maybe,
    squeezed: Maybe,
    mean: Maybe,
    var: Maybe,
    weight: Maybe,
    bias: Maybe,
    w1: Maybe,
    b1: Maybe,
    w2: Maybe,
    b2: Maybe,
    eps: float,
    batch: bool,
    excitation: str,
    relu: bool,
    running: Running | None = None,
) -> _Results:
    """Run the forward pass of the operator ``norm_gate_add``.

    ``squeezed`` is the feature map from which the gates are computed. If it is None, the gates are
    computed from the norm's output.

    Returns:
        The output, batch mean, batch variance, pooled features, hidden units and gates.
    """
    launch, gate = _Launcher(key, x), _make_gate(w1, b1, w2, b2)
    x = launch.dense(x)
    found: tuple[Maybe, ...] = (None, None)
    saved: tuple[Maybe, ...] = (None, None, None)
    gates = _NO_GATES
    if batch or (gate is not None and squeezed is None):
        means, squares = launch.moments(x, square=batch)
        if batch:
            mean, var = found = launch.merge(means, squares, running)
    norm = _Norm(mean, var, weight, bias, eps)
    if gate is not None:
        if squeezed is not None:
            source = _Launcher(key, squeezed)
            means, _ = source.moments(source.dense(squeezed), square=False)
            pooled, hidden = source.hidden_units(means, _NO_NORM, gate)
        else:
            pooled, hidden = launch.hidden_units(means, norm, gate)
        saved = pooled, hidden, launch.new(launch.n, launch.c)
        gates = _Gates(hidden, gate.w2, gate.b2, saved[2], excitation)
    shortcut = None if shortcut is None else launch.dense(shortcut)
    out = launch.apply(x, norm, gates, shortcut, relu=relu)
    return out, *found, *saved


@_prepared
def end_backward(
    key: _Key,
    dout: Tensor,
    out: Maybe,
    x: Maybe,
    mean: Maybe,
    var: Maybe,
    weight: Maybe,
    bias: Maybe,
    w1: Maybe,
    b1: Maybe,
    w2: Maybe,
    b2: Maybe,
    pooled: Maybe,
    hidden: Maybe,
    value: Maybe,
    eps: float,
    batch: bool,
    excitation: str,
    add: bool,
    sums: bool,
    last: bool,
) -> _Results:
    """Run the backward pass of the operator ``norm_gate_add``.

    Returns:
        The gradients of x, shortcut, weight, bias, w1, b1, w2 and b2. The shortcut's gradient is
        None if it equals the output's gradient, ``dout``.
    """
    launch, gate = _Launcher(key, dout, last), _make_gate(w1, b1, w2, b2)
    gradient, norm = launch.dense(dout), _Norm(mean, var, weight, bias, eps)
    out = None if out is None else launch.dense(out)  # saved-tensor hooks may change strides
    masked = torch.empty_like(gradient) if add and out is not None else None
    if not sums and gate is None:
        dx, _ = launch.input_gradient(gradient, norm, _NO_AFFINE, out=out, masked=masked)
        return dx, masked, None, None, None, None, None, None
    x = launch.dense(x)
    total, aligned = launch.gradient_sums(gradient, out, x, norm, masked)
    gated = None
    found: _Results
    if gate is None:
        found = (*launch.norm_gradients(total, aligned, norm), None, None, None, None)
    else:
        saved = (pooled, hidden, value)
        dpooled, found = launch.gate_gradients(
            total, aligned, norm, gate, saved, excitation, sums=sums
        )
        gated = value, dpooled
    if masked is not None:
        gradient, out = masked, None
    affine = found[:2] if batch else _NO_AFFINE
    dx, _ = launch.input_gradient(gradient, norm, affine, out=out, x=x, gated=gated)
    return dx, masked, *found


@_prepared
def conv_forward(
    key: _Key,
    inputs: Tensor,
    kernel: Tensor,
    shortcut: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    w1: Tensor,
    b1: Maybe,
    w2: Tensor,
    b2: Maybe,
    eps: float,
    excitation: str,
    relu: bool,
) -> _Results:
    """Run the forward pass of the operator ``conv_gate_add``.

    Returns:
        The output, the pooled features, the hidden units and the gates.
    """
    norm = (mean, var, weight, bias)
    x = _convolve(inputs, kernel)
    found = end_forward(x, shortcut, None, *norm, w1, b1, w2, b2, eps, False, excitation, relu)
    return found[0], *found[3:]


@_prepared
def conv_backward(
    key: _Key,
    dout: Tensor,
    out: Maybe,
    inputs: Tensor,
    kernel: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    w1: Tensor,
    b1: Maybe,
    w2: Tensor,
    b2: Maybe,
    pooled: Tensor,
    hidden: Tensor,
    value: Tensor,
    eps: float,
    excitation: str,
) -> _Results:
    """Run the backward pass of the operator ``conv_gate_add``.

    The convolution's output is not saved in the forward pass, so it is recomputed.

    Returns:
        The gradients of inputs, kernel, shortcut, w1, b1, w2 and b2.
    """
    x = _convolve(inputs, kernel)
    norm, saved = (mean, var, weight, bias), (pooled, hidden, value)
    options = (eps, False, excitation, True, False, is_channels_last(x))
    dx, masked, _, _, *found = end_backward(dout, out, x, *norm, w1, b1, w2, b2, *saved, *options)
    dinputs, dkernel, _ = torch.ops.aten.convolution_backward(
        dx, inputs, kernel, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (True, True, False)
    )
    return dinputs, dkernel, masked, *found


def _convolve(inputs: Tensor, kernel: Tensor) -> Tensor:
    # Compute in the dtype of the feature maps, regardless of autocast.
    with torch.autocast(inputs.device.type, enabled=False):
        return F.conv2d(inputs, kernel)


@_prepared
def preact_forward(
    key: _Key,
    x: Tensor,
    shortcut: Tensor,
    mean: Maybe,
    var: Maybe,
    weight: Tensor,
    bias: Tensor,
    w1: Maybe,
    b1: Maybe,
    w2: Maybe,
    b2: Maybe,
    eps: float,
    batch: bool,
    excitation: str,
    running: Running | None = None,
) -> _Results:
    """Run the forward pass of the operator ``gate_add_norm``.

    Returns:
        The residual sum, ``relu(norm(sum))``, batch mean, batch variance, pooled features, hidden
        units and gates.
    """
    launch, gate = _Launcher(key, x), _make_gate(w1, b1, w2, b2)
    x = launch.dense(x)
    found: tuple[Maybe, ...] = (None, None)
    saved: tuple[Maybe, ...] = (None, None, None)
    gates = _NO_GATES
    if gate is not None:
        means, _ = launch.moments(x, square=False)
        pooled, hidden = launch.hidden_units(means, _NO_NORM, gate)
        saved = pooled, hidden, launch.new(launch.n, launch.c)
        gates = _Gates(hidden, gate.w2, gate.b2, saved[2], excitation)
    added, means, squares = launch.add(x, launch.dense(shortcut), gates, moments=batch)
    if batch:
        mean, var = found = launch.merge(means, squares, running)
    norm = _Norm(mean, var, weight, bias, eps)
    out = launch.apply(added, norm, _NO_GATES, None, relu=True)
    return added, out, *found, *saved


@_prepared
def preact_backward(
    key: _Key,
    dadded: Maybe,
    dout: Tensor,
    out: Tensor,
    added: Maybe,
    x: Maybe,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    w1: Maybe,
    b1: Maybe,
    w2: Maybe,
    b2: Maybe,
    pooled: Maybe,
    hidden: Maybe,
    value: Maybe,
    eps: float,
    batch: bool,
    excitation: str,
    sums: bool,
) -> _Results:
    """Run the backward pass of the operator ``gate_add_norm``.

    Returns:
        The gradients of x, shortcut, weight, bias, w1, b1, w2 and b2. The gradient of x is None if
        it equals the gradient of the shortcut.
    """
    launch, gate = _Launcher(key, out), _make_gate(w1, b1, w2, b2)
    gradient, norm = launch.dense(dout), _Norm(mean, var, weight, bias, eps)
    added = None if added is None else launch.dense(added)
    affine: tuple[Maybe, ...] = _NO_AFFINE
    if sums:
        total, aligned = launch.gradient_sums(gradient, out, added, norm, None)
        affine = launch.norm_gradients(total, aligned, norm)
    branch = None if gate is None else launch.dense(x)
    dsum, dots = launch.input_gradient(
        gradient,
        norm,
        affine if batch else _NO_AFFINE,
        out=out,
        x=added,
        extra=None if dadded is None else launch.dense(dadded),
        branch=branch,
    )
    if gate is None:
        return None, dsum, *affine, None, None, None, None
    saved = (pooled, hidden, value)
    dpooled, found = launch.gate_gradients(
        None, dots, _NO_NORM, gate, saved, excitation, sums=False
    )
    dx, _ = launch.input_gradient(dsum, _NO_NORM, _NO_AFFINE, gated=(value, dpooled))
    return dx, dsum, *affine, *found[2:]
