"""Triton kernels that fuse batch norm, SE gate, residual addition and ReLU.

A feature map ``(N, C, H, W)`` is processed as ``N`` matrices of ``C`` channels and ``P = H * W``
spatial positions, in contiguous or channels-last layout (``LAST``). The positions of an image are
divided into ``S`` chunks of ``CHUNK`` positions. In kernels that process a feature map, each
program processes one chunk in tiles of ``BP`` positions by ``BC`` channels. It writes at most one
row of partial sums, so no kernel needs atomic operations, and the results are deterministic. Row
``n * S + s`` of an array of partial sums contains the sums of chunk ``s`` of image ``n``.

Triton does not specialise the kernels for integers that do not affect the alignment of addresses
(``do_not_specialize``), so fewer kernel variants are compiled.

All arithmetic uses the dtype ``ACC``: float32, or float64 for float64 inputs. Only this module
imports Triton at module level, and only functions that are about to launch a kernel import this
module.
"""

import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def"


@triton.jit
def _locate(C, BC: tl.constexpr):
    """Return the chunk index and channel indices of a program, and a mask of valid channels."""
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    c = pid % blocks * BC + tl.arange(0, BC)
    return pid // blocks, c, c < C


@triton.jit
def _tile(first, stop, c, inside, C, P, LAST: tl.constexpr, BP: tl.constexpr):
    """Return the memory offsets of a tile within an image, and a mask of valid elements."""
    p = first + tl.arange(0, BP)
    mask = (p < stop)[:, None] & inside[None, :]
    if LAST:
        offsets = p[:, None] * C + c[None, :]
    else:
        offsets = c[None, :] * P + p[:, None]
    return offsets, mask


@triton.jit
def _row(pointer, row, C, c, inside, ACC: tl.constexpr):
    """Load a row of an array with ``C`` columns, converted to the dtype ``ACC``."""
    return tl.load(pointer + row.to(tl.int64) * C + c, mask=inside, other=0).to(ACC)


@triton.jit
def _vector(pointer, c, inside, ACC: tl.constexpr):
    """Load per-channel values, such as a norm's weights, converted to the dtype ``ACC``."""
    return tl.load(pointer + c, mask=inside, other=0).to(ACC)


@triton.jit
def _invstd(var_ptr, eps, c, inside, ACC: tl.constexpr):
    return tl.rsqrt(tl.load(var_ptr + c, mask=inside, other=1).to(ACC) + eps)


@triton.jit
def _activate(value, ACT: tl.constexpr):
    if ACT == "sigmoid":
        value = tl.sigmoid(value)
    elif ACT == "tanh":
        value = 2 * tl.sigmoid(2 * value) - 1
    else:
        value = tl.where(value < 0, 0, value)  # Unlike tl.maximum, this keeps NaN.
    return value


@triton.jit
def _excite(
    hidden_ptr, w2_ptr, b2_ptr, gate_ptr, image, store, c, inside, C, R,
    BIAS: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Compute one image's gates ``excitation(fc2(hidden))``; write them if ``store`` is True."""
    summed = tl.zeros((BC, BR), ACC)
    for first in range(0, R, BR):
        r = first + tl.arange(0, BR)
        hidden = _row(hidden_ptr, image, R, r, r < R, ACC)
        mask = inside[:, None] & (r < R)[None, :]
        w2 = tl.load(w2_ptr + c[:, None] * R + r[None, :], mask=mask, other=0).to(ACC)
        summed += w2 * hidden[None, :]
    gate = tl.sum(summed, 1)
    if BIAS:
        gate += _vector(b2_ptr, c, inside, ACC)
    gate = _activate(gate, ACT)
    tl.store(gate_ptr + image.to(tl.int64) * C + c, gate, mask=inside & store)
    return gate


@triton.jit(do_not_specialize=["S"])
def moments(
    x_ptr, shortcut_ptr, sum_ptr, mean_ptr, square_ptr, hidden_ptr, w2_ptr, b2_ptr, gate_ptr, R,
    C, P, S, CHUNK,
    SUM: tl.constexpr, MEAN: tl.constexpr, SQUARE: tl.constexpr, GATE: tl.constexpr,
    BIAS: tl.constexpr, ACT: tl.constexpr, BR: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute the mean and the sum of squared deviations for each chunk and channel.

    A chunk is a range of positions in one image. With ``SUM``, the statistics are those of
    ``x + shortcut`` or ``gate * x + shortcut``. This sum is written to ``sum_ptr``, and the gates
    are written to ``gate_ptr``. For each of the ``BP`` positions in a tile, Welford's algorithm
    accumulates the statistics over all tiles. The ``BP`` results are merged at the end.
    """
    row, c, inside = _locate(C, BC)
    image = row // S
    base = image.to(tl.int64) * C * P
    start = row % S * CHUNK
    stop = tl.minimum(start + CHUNK, P)
    mean = tl.zeros((BP, BC), ACC)
    square = tl.zeros((BP, BC), ACC)
    if GATE:
        gate = _excite(
            hidden_ptr, w2_ptr, b2_ptr, gate_ptr, image, start == 0, c, inside, C, R,
            BIAS, ACT, ACC, BC, BR,
        )  # fmt: skip
    for first in range(start, stop, BP):
        offsets, mask = _tile(first, stop, c, inside, C, P, LAST, BP)
        value = tl.load(x_ptr + base + offsets, mask=mask, other=0).to(ACC)
        if SUM:
            if GATE:
                value *= gate[None, :]
            value += tl.load(shortcut_ptr + base + offsets, mask=mask, other=0).to(ACC)
            # Compute the statistics from the rounded sum, which is also what the backward pass
            # reads.
            stored = value.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + base + offsets, stored, mask=mask)
            value = stored.to(ACC)
        if MEAN:
            change = tl.where(mask, value - mean, 0)
            mean += change * (1 / ((first - start) // BP + 1).to(ACC))
            if SQUARE:
                square += change * (value - mean)
    if MEAN:
        count = stop - start
        lanes = (count - tl.arange(0, BP) + BP - 1) // BP
        lanes = tl.maximum(lanes, 0).to(ACC)[:, None]
        average = tl.sum(mean * lanes, 0) / count.to(ACC)
        out = row.to(tl.int64) * C + c
        tl.store(mean_ptr + out, average, mask=inside)
        if SQUARE:
            apart = mean - average[None, :]
            square = tl.sum(square + lanes * apart * apart, 0)
            tl.store(square_ptr + out, square, mask=inside)


@triton.jit(do_not_specialize=["S", "ROWS"])
def merge(
    means_ptr, squares_ptr, mean_ptr, var_ptr, running_mean_ptr, running_var_ptr, batches_ptr,
    momentum, C, P, S, ROWS, CHUNK,
    RUNNING: tl.constexpr, ACC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of all chunks into a mean and variance per channel (Chan et al.).

    The statistics of a chunk, which is a range of positions in one image, are the mean and the sum
    of squared deviations.

    With ``RUNNING``, also update a batch norm's running statistics and batch counter.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    total = tl.cast(ROWS // S, ACC) * tl.cast(P, ACC)
    summed = tl.zeros((BR, BC), ACC)
    for first in range(0, ROWS, BR):
        row = first + tl.arange(0, BR)
        mask = (row < ROWS)[:, None] & inside[None, :]
        count = tl.minimum(CHUNK, P - row % S * CHUNK).to(ACC)[:, None]
        at = row.to(tl.int64)[:, None] * C + c[None, :]
        summed += tl.load(means_ptr + at, mask=mask, other=0) * count
    mean = tl.sum(summed, 0) / total
    square = tl.zeros((BR, BC), ACC)
    for first in range(0, ROWS, BR):
        row = first + tl.arange(0, BR)
        mask = (row < ROWS)[:, None] & inside[None, :]
        count = tl.minimum(CHUNK, P - row % S * CHUNK).to(ACC)[:, None]
        at = row.to(tl.int64)[:, None] * C + c[None, :]
        apart = tl.load(means_ptr + at, mask=mask, other=0) - mean[None, :]
        within = tl.load(squares_ptr + at, mask=mask, other=0)
        square += tl.where(mask, within + apart * apart * count, 0)
    squares = tl.sum(square, 0)
    tl.store(mean_ptr + c, mean, mask=inside)
    tl.store(var_ptr + c, squares / total, mask=inside)
    if RUNNING:
        old = _vector(running_mean_ptr, c, inside, ACC)
        tl.store(running_mean_ptr + c, old + momentum * (mean - old), mask=inside)
        old = _vector(running_var_ptr, c, inside, ACC)
        unbiased = squares / (total - 1)
        tl.store(running_var_ptr + c, old + momentum * (unbiased - old), mask=inside)
        if tl.program_id(0) == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit
def _image_mean(means_ptr, n, c, inside, C, P, S, CHUNK, ACC: tl.constexpr, BS: tl.constexpr,
                BC: tl.constexpr):  # fmt: skip
    """Compute the mean of each channel of an image from the means of the image's chunks."""
    summed = tl.zeros((BS, BC), ACC)
    for first in range(0, S, BS):
        s = first + tl.arange(0, BS)
        mask = (s < S)[:, None] & inside[None, :]
        at = (n * S + s).to(tl.int64)[:, None] * C + c[None, :]
        count = tl.minimum(CHUNK, P - s * CHUNK).to(ACC)[:, None]
        summed += tl.load(means_ptr + at, mask=mask, other=0) * count
    return tl.sum(summed, 0) / tl.cast(P, ACC)


@triton.jit
def _image_sum(sums_ptr, n, c, inside, C, S, ACC: tl.constexpr, BS: tl.constexpr,
               BC: tl.constexpr):  # fmt: skip
    """Compute the sum of each channel of an image from the sums of the image's chunks."""
    summed = tl.zeros((BS, BC), ACC)
    for first in range(0, S, BS):
        s = first + tl.arange(0, BS)
        mask = (s < S)[:, None] & inside[None, :]
        at = (n * S + s).to(tl.int64)[:, None] * C + c[None, :]
        summed += tl.load(sums_ptr + at, mask=mask, other=0)
    return tl.sum(summed, 0)


@triton.jit
def _slope(gate, ACT: tl.constexpr):
    """Return the derivative of the gate's activation function, given the function's output."""
    if ACT == "sigmoid":
        slope = gate * (1 - gate)
    elif ACT == "tanh":
        slope = 1 - gate * gate
    else:
        slope = tl.where(gate > 0, 1, 0).to(gate.dtype)
    return slope


@triton.jit(do_not_specialize=["S"])
def hidden_units(
    means_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, w1_ptr, b1_ptr, pooled_ptr,
    hidden_ptr, C, R, P, S, CHUNK,
    NORM: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr,
    BS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute the hidden units ``relu(fc1(squeeze))`` of a gate from the means of all chunks.

    The means are per channel. Each program computes a block of hidden units for one image. The
    kernel also writes the mean of each channel over the image. If a norm precedes the gate, this is
    the mean of the norm's input.
    """
    n = tl.program_id(0)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    summed = tl.zeros((BR, BC), ACC)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        inside = c < C
        pooled = _image_mean(means_ptr, n, c, inside, C, P, S, CHUNK, ACC, BS, BC)
        if tl.program_id(1) == 0:
            tl.store(pooled_ptr + n.to(tl.int64) * C + c, pooled, mask=inside)
        if NORM:
            scale = _invstd(var_ptr, eps, c, inside, ACC) * _vector(weight_ptr, c, inside, ACC)
            pooled = (pooled - _vector(mean_ptr, c, inside, ACC)) * scale
            pooled += _vector(bias_ptr, c, inside, ACC)
        mask = (r < R)[:, None] & inside[None, :]
        w1 = tl.load(w1_ptr + r[:, None] * C + c[None, :], mask=mask, other=0).to(ACC)
        summed += w1 * pooled[None, :]
    hidden = tl.sum(summed, 1)
    if BIAS:
        hidden += _vector(b1_ptr, r, r < R, ACC)
    tl.store(hidden_ptr + n.to(tl.int64) * R + r, _activate(hidden, "relu"), mask=r < R)


@triton.jit(do_not_specialize=["S"])
def apply(
    x_ptr, shortcut_ptr, out_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, hidden_ptr, w2_ptr,
    b2_ptr, gate_ptr, R, C, P, S, CHUNK,
    NORM: tl.constexpr, ADD: tl.constexpr, RELU: tl.constexpr, GATE: tl.constexpr,
    BIAS: tl.constexpr, ACT: tl.constexpr, BR: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute ``relu(gate * norm(x) + shortcut)``, in which each operation is optional.

    The gates are also written to ``gate_ptr``.
    """
    row, c, inside = _locate(C, BC)
    image = row // S
    base = image.to(tl.int64) * C * P
    start = row % S * CHUNK
    stop = tl.minimum(start + CHUNK, P)
    if NORM:
        mean = _vector(mean_ptr, c, inside, ACC)
        scale = _invstd(var_ptr, eps, c, inside, ACC) * _vector(weight_ptr, c, inside, ACC)
        shift = _vector(bias_ptr, c, inside, ACC)
    if GATE:
        gate = _excite(
            hidden_ptr, w2_ptr, b2_ptr, gate_ptr, image, start == 0, c, inside, C, R,
            BIAS, ACT, ACC, BC, BR,
        )  # fmt: skip
    for first in range(start, stop, BP):
        offsets, mask = _tile(first, stop, c, inside, C, P, LAST, BP)
        value = tl.load(x_ptr + base + offsets, mask=mask, other=0).to(ACC)
        if NORM:
            value = (value - mean[None, :]) * scale[None, :] + shift[None, :]
        if GATE:
            value *= gate[None, :]
        if ADD:
            value += tl.load(shortcut_ptr + base + offsets, mask=mask, other=0).to(ACC)
        if RELU:
            value = _activate(value, "relu")
        tl.store(out_ptr + base + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["S"])
def gradient_sums(
    dout_ptr, out_ptr, x_ptr, mean_ptr, masked_ptr, total_ptr, aligned_ptr, C, P, S, CHUNK,
    NORM: tl.constexpr, RELU: tl.constexpr, KEEP: tl.constexpr,
    LAST: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sum the product of the gradient and the feature map over each chunk of positions.

    With ``NORM``, first subtract the mean from the feature map, and also sum the gradient itself.
    With ``RELU``, first set the gradient to 0 where the block's output is 0. With ``KEEP``, also
    write this masked gradient, which is the gradient with respect to the shortcut.
    """
    row, c, inside = _locate(C, BC)
    base = (row // S).to(tl.int64) * C * P
    start = row % S * CHUNK
    stop = tl.minimum(start + CHUNK, P)
    total = tl.zeros((BP, BC), ACC)
    aligned = tl.zeros((BP, BC), ACC)
    if NORM:
        mean = _vector(mean_ptr, c, inside, ACC)
    for first in range(start, stop, BP):
        offsets, mask = _tile(first, stop, c, inside, C, P, LAST, BP)
        gradient = tl.load(dout_ptr + base + offsets, mask=mask, other=0)
        if RELU:
            out = tl.load(out_ptr + base + offsets, mask=mask, other=0)
            gradient = tl.where(out <= 0, 0, gradient)
            if KEEP:
                tl.store(masked_ptr + base + offsets, gradient, mask=mask)
        gradient = gradient.to(ACC)
        x = tl.load(x_ptr + base + offsets, mask=mask, other=0).to(ACC)
        if NORM:
            total += gradient
            x -= mean[None, :]
        aligned += tl.where(mask, gradient * x, 0)
    at = row.to(tl.int64) * C + c
    if NORM:
        tl.store(total_ptr + at, tl.sum(total, 0), mask=inside)
    tl.store(aligned_ptr + at, tl.sum(aligned, 0), mask=inside)


@triton.jit(do_not_specialize=["S"])
def gate_backward(
    total_ptr, aligned_ptr, pooled_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps,
    w1_ptr, w2_ptr, hidden_ptr, gate_ptr, dsum_ptr, dhidden_ptr, dpooled_ptr, total_out_ptr,
    aligned_out_ptr, C, R, S,
    NORM: tl.constexpr, SUMS: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr, BS: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the fc2 output, the fc1 output and the pooled features of an image.

    These gradients are written to ``dsum_ptr``, ``dhidden_ptr`` and ``dpooled_ptr``. With ``SUMS``,
    also write the image's contributions to the gradients of the norm's bias and weight. These
    contributions include the gradients through the gated feature map and the squeeze.
    """
    n = tl.program_id(0)
    at = n.to(tl.int64) * C
    r = tl.arange(0, BR)
    summed = tl.zeros((BC, BR), ACC)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        inside = c < C
        dgate = _image_sum(aligned_ptr, n, c, inside, C, S, ACC, BS, BC)
        if NORM:
            total = _image_sum(total_ptr, n, c, inside, C, S, ACC, BS, BC)
            dgate *= _invstd(var_ptr, eps, c, inside, ACC) * _vector(weight_ptr, c, inside, ACC)
            dgate += total * _vector(bias_ptr, c, inside, ACC)
        gate = tl.load(gate_ptr + at + c, mask=inside, other=0).to(ACC)
        dsum = dgate * _slope(gate, ACT)
        tl.store(dsum_ptr + at + c, dsum, mask=inside)
        mask = inside[:, None] & (r < R)[None, :]
        w2 = tl.load(w2_ptr + c[:, None] * R + r[None, :], mask=mask, other=0).to(ACC)
        summed += w2 * dsum[:, None]
    hidden = tl.load(hidden_ptr + n.to(tl.int64) * R + r, mask=r < R, other=0).to(ACC)
    dhidden = tl.where(hidden <= 0, 0, tl.sum(summed, 0))
    tl.store(dhidden_ptr + n.to(tl.int64) * R + r, dhidden, mask=r < R)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        inside = c < C
        mask = (r < R)[:, None] & inside[None, :]
        w1 = tl.load(w1_ptr + r[:, None] * C + c[None, :], mask=mask, other=0).to(ACC)
        dpooled = tl.sum(w1 * dhidden[:, None], 0)
        tl.store(dpooled_ptr + at + c, dpooled, mask=inside)
        if SUMS:
            invstd = _invstd(var_ptr, eps, c, inside, ACC)
            gate = tl.load(gate_ptr + at + c, mask=inside, other=0).to(ACC)
            pooled = tl.load(pooled_ptr + at + c, mask=inside, other=0).to(ACC)
            pooled = (pooled - _vector(mean_ptr, c, inside, ACC)) * invstd
            total = _image_sum(total_ptr, n, c, inside, C, S, ACC, BS, BC)
            aligned = _image_sum(aligned_ptr, n, c, inside, C, S, ACC, BS, BC) * invstd
            tl.store(total_out_ptr + at + c, gate * total + dpooled, mask=inside)
            tl.store(aligned_out_ptr + at + c, gate * aligned + dpooled * pooled, mask=inside)


@triton.jit(do_not_specialize=["N", "ROWS"])
def parameter_gradients(
    total_ptr, aligned_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, dweight_ptr, dbias_ptr,
    dsum_ptr, dhidden_ptr, hidden_ptr, pooled_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr,
    C, R, N, ROWS,
    SUMS: tl.constexpr, SCALED: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr,
    BIAS: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the parameters of the norm and the gate.

    ``total`` and ``aligned`` contain partial sums per channel, with one row per image or per chunk
    of an image. ``total`` contains sums of the gradient with respect to the norm's output, which
    yield the gradient of the norm's bias. ``aligned`` contains sums of the product of this gradient
    and the norm's input, which yield the gradient of the norm's weight. The input is normalised if
    ``SCALED`` is True, and only centred otherwise. If ``NORM`` is True, a norm precedes the gate.
    Program (i, j) computes block i of the channels and block j of the hidden units.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    if SUMS and tl.program_id(1) == 0:
        total = tl.zeros((BN, BC), ACC)
        aligned = tl.zeros((BN, BC), ACC)
        for first in range(0, ROWS, BN):
            row = first + tl.arange(0, BN)
            mask = (row < ROWS)[:, None] & inside[None, :]
            at = row.to(tl.int64)[:, None] * C + c[None, :]
            total += tl.load(total_ptr + at, mask=mask, other=0)
            aligned += tl.load(aligned_ptr + at, mask=mask, other=0)
        dweight = tl.sum(aligned, 0)
        if not SCALED:
            dweight *= _invstd(var_ptr, eps, c, inside, ACC)
        tl.store(dbias_ptr + c, tl.sum(total, 0), mask=inside)
        tl.store(dweight_ptr + c, dweight, mask=inside)
    if GATE:
        r = tl.program_id(1) * BR + tl.arange(0, BR)
        dw1 = tl.zeros((BR, BC), ACC)
        dw2 = tl.zeros((BC, BR), ACC)
        db1 = tl.zeros((BN, BR), ACC)
        db2 = tl.zeros((BN, BC), ACC)
        if NORM:
            mean = _vector(mean_ptr, c, inside, ACC)
            scale = _invstd(var_ptr, eps, c, inside, ACC) * _vector(weight_ptr, c, inside, ACC)
            shift = _vector(bias_ptr, c, inside, ACC)
        for first in range(0, N, BN):
            n = (first + tl.arange(0, BN)).to(tl.int64)
            mask = (n < N)[:, None] & inside[None, :]
            at = n[:, None] * C + c[None, :]
            dsum = tl.load(dsum_ptr + at, mask=mask, other=0)
            pooled = tl.load(pooled_ptr + at, mask=mask, other=0)
            if NORM:
                pooled = (pooled - mean[None, :]) * scale[None, :] + shift[None, :]
                pooled = tl.where(mask, pooled, 0)
            mask = (n < N)[:, None] & (r < R)[None, :]
            at = n[:, None] * R + r[None, :]
            hidden = tl.load(hidden_ptr + at, mask=mask, other=0)
            dhidden = tl.load(dhidden_ptr + at, mask=mask, other=0)
            dw1 += tl.dot(tl.trans(dhidden), pooled, input_precision="tf32x3")
            dw2 += tl.dot(tl.trans(dsum), hidden, input_precision="tf32x3")
            db1 += dhidden
            db2 += dsum
        mask = (r < R)[:, None] & inside[None, :]
        tl.store(dw1_ptr + r[:, None] * C + c[None, :], dw1, mask=mask)
        mask = inside[:, None] & (r < R)[None, :]
        tl.store(dw2_ptr + c[:, None] * R + r[None, :], dw2, mask=mask)
        if BIAS:
            if tl.program_id(0) == 0:
                tl.store(db1_ptr + r, tl.sum(db1, 0), mask=r < R)
            if tl.program_id(1) == 0:
                tl.store(db2_ptr + c, tl.sum(db2, 0), mask=inside)


@triton.jit(do_not_specialize=["S", "COUNT"])
def input_gradient(
    dout_ptr, out_ptr, x_ptr, extra_ptr, branch_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps,
    dweight_ptr, dbias_ptr, gate_ptr, dpooled_ptr, dx_ptr, masked_ptr, dot_ptr,
    COUNT, C, P, S, CHUNK,
    NORM: tl.constexpr, BATCH: tl.constexpr, GATE: tl.constexpr, RELU: tl.constexpr,
    KEEP: tl.constexpr, EXTRA: tl.constexpr, DOT: tl.constexpr,
    LAST: tl.constexpr, ACC: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute the gradient with respect to the input of the norm or, without a norm, of the gate.

    With ``RELU``, first set the output's gradient to 0 where the output is 0. With ``KEEP``, also
    write this masked gradient. With ``BATCH``, add the gradients through the batch mean and
    variance, which are constants otherwise. With ``GATE``, add the gradient through the squeeze.
    With ``EXTRA``, add a precomputed gradient with respect to the same input. With ``DOT``, also
    multiply the result by the feature map ``branch``, and sum the products over each chunk of
    positions.
    """
    row, c, inside = _locate(C, BC)
    image = row // S
    base = image.to(tl.int64) * C * P
    start = row % S * CHUNK
    stop = tl.minimum(start + CHUNK, P)
    scale = tl.full((BC,), 1, ACC)
    constant = tl.zeros((BC,), ACC)
    if NORM:
        invstd = _invstd(var_ptr, eps, c, inside, ACC)
        scale = invstd * _vector(weight_ptr, c, inside, ACC)
    if BATCH:
        share = scale / tl.cast(COUNT, ACC)
        slope = share * invstd * _vector(dweight_ptr, c, inside, ACC)
        constant -= share * _vector(dbias_ptr, c, inside, ACC)
        mean = _vector(mean_ptr, c, inside, ACC)
    if GATE:
        constant += scale * _row(dpooled_ptr, image, C, c, inside, ACC) / tl.cast(P, ACC)
        scale *= _row(gate_ptr, image, C, c, inside, ACC)
    dot = tl.zeros((BP, BC), ACC)
    for first in range(start, stop, BP):
        offsets, mask = _tile(first, stop, c, inside, C, P, LAST, BP)
        gradient = tl.load(dout_ptr + base + offsets, mask=mask, other=0)
        if RELU:
            out = tl.load(out_ptr + base + offsets, mask=mask, other=0)
            gradient = tl.where(out <= 0, 0, gradient)
            if KEEP:
                tl.store(masked_ptr + base + offsets, gradient, mask=mask)
        value = gradient.to(ACC) * scale[None, :] + constant[None, :]
        if BATCH:
            x = tl.load(x_ptr + base + offsets, mask=mask, other=0).to(ACC)
            value -= (x - mean[None, :]) * slope[None, :]
        if EXTRA:
            value += tl.load(extra_ptr + base + offsets, mask=mask, other=0).to(ACC)
        stored = value.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + base + offsets, stored, mask=mask)
        if DOT:
            branch = tl.load(branch_ptr + base + offsets, mask=mask, other=0).to(ACC)
            dot += tl.where(mask, stored.to(ACC) * branch, 0)
    if DOT:
        tl.store(dot_ptr + row.to(tl.int64) * C + c, tl.sum(dot, 0), mask=inside)
