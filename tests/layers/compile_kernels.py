"""Script that compiles the fused kernels for Hopper GPUs, on a machine without a GPU.

It prints the number of registers that each kernel uses. It fails if a kernel can't be compiled,
spills registers, or does not access its feature maps with 16-byte loads and stores.
"""

import re
import subprocess
import tempfile

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from senet_transfer.layers.fused import kernels

TARGET = GPUTarget("cuda", 90, 32)

# Arguments that point to feature maps. All other pointers point to float32 values.
MAPS = {
    "x_ptr", "shortcut_ptr", "out_ptr", "dout_ptr", "masked_ptr", "dx_ptr", "sum_ptr", "extra_ptr",
    "branch_ptr",
}  # fmt: skip
FLOATS = {"eps", "momentum"}

LAYOUTS = {
    "channels_last": {"LAST": True, "BP": 32, "BC": 64},
    "contiguous": {"LAST": False, "BP": 1024, "BC": 2},
}
# For float32, tiles are half as large, as in `launch._TILE`.
HALVED = {"channels_last": {"BP": 16}, "contiguous": {"BC": 1}}
GATES = {"GATE": True, "BIAS": True, "ACT": "sigmoid", "BR": 64}
NO_GATES = {"GATE": False, "BIAS": False, "ACT": "", "BR": 1}

# Kernel name, names of the pointers passed as None (without ``_ptr``), and constexpr arguments.
TILED = [
    (
        "moments",
        "shortcut sum hidden w2 b2 gate",
        {"SUM": False, "MEAN": True, "SQUARE": True, **NO_GATES},
    ),
    ("moments", "", {"SUM": True, "MEAN": True, "SQUARE": True, **GATES}),
    ("apply", "", {"NORM": True, "ADD": True, "RELU": True, **GATES}),
    ("gradient_sums", "", {"NORM": True, "RELU": True, "KEEP": True}),
    (
        "input_gradient",
        "out extra branch masked dot",
        {
            "NORM": True, "BATCH": True, "GATE": True, "RELU": False, "KEEP": False,
            "EXTRA": False, "DOT": False,
        },
    ),
    (
        "input_gradient",
        "gate dpooled masked",
        {
            "NORM": True, "BATCH": True, "GATE": False, "RELU": True, "KEEP": False, "EXTRA": True,
            "DOT": True,
        },
    ),
]  # fmt: skip
# Triton compiles arguments with the value 1 as constants.
ONES = {"C": 1, "P": 1, "S": 1, "CHUNK": 1, "COUNT": 1, "ROWS": 1, "N": 1, "R": 1}
NO_GATE = "dsum dhidden hidden pooled dw1 db1 dw2 db2"
OTHERS = [
    ("merge", "", {"RUNNING": True, "BR": 256, "BC": 16}, 8),
    ("hidden_units", "", {"NORM": True, "BIAS": True, "BS": 16, "BR": 16, "BC": 512}, 8),
    *[
        (
            "gate_backward",
            "",
            {"NORM": True, "SUMS": True, "ACT": "sigmoid", "BS": 4, "BR": units, "BC": width},
            16,
        )
        for units, width in ((128, 128), (1024, 16))
    ],
    (
        "parameter_gradients",
        "",
        {
            "SUMS": True, "SCALED": True, "NORM": True, "GATE": True, "BIAS": True, "BN": 16,
            "BR": 32, "BC": 32,
        },
        4,
    ),
    (
        "parameter_gradients",
        NO_GATE,
        {
            "SUMS": True, "SCALED": False, "NORM": False, "GATE": False, "BIAS": False, "BN": 256,
            "BR": 16, "BC": 16,
        },
        8,
    ),
]  # fmt: skip


def compile_kernel(name: str, missing: str, constants: dict, warps: int, maps: str) -> str:
    """Compile a kernel and return its PTX code.

    Args:
        name: Name of the kernel.
        missing: Names of the pointers passed as None, without the suffix ``_ptr``.
        constants: Values of the kernel's ``tl.constexpr`` arguments, except ``ACC``.
        warps: Number of warps per program.
        maps: Triton's name for the dtype of the feature maps, such as "bf16".
    """
    kernel = getattr(kernels, name)
    constants = {**constants, "ACC": tl.float32, **{f"{m}_ptr": None for m in missing.split()}}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument == "batches_ptr":
            return "*i64"
        if argument.endswith("_ptr"):
            return f"*{maps}" if argument in MAPS else "*fp32"
        return "fp32" if argument in FLOATS else "i32"

    names = kernel.arg_names
    aligned = [n for n in names if n not in constants and (n.endswith("_ptr") or n in "C P CHUNK")]
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={argument: kind(argument) for argument in names},
        constexprs={(names.index(key),): value for key, value in constants.items()},
        attrs={(names.index(argument),): [["tt.divisibility", 16]] for argument in aligned},
    )
    return triton.compile(source, target=TARGET, options={"num_warps": warps}).asm["ptx"]


def assemble(ptx: str) -> tuple[int, int]:
    """Assemble PTX code, and return the numbers of registers and spilled bytes."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        words = [triton.knobs.nvidia.ptxas.path, "-arch=sm_90a", "-v", file.name, "-o", "/dev/null"]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    registers, spilled = (
        int(re.search(pattern, said)[1])
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    )
    return registers, spilled


def main() -> None:
    """Compile all kernels in all layouts and dtypes."""
    for name, missing, constants, warps in OTHERS:
        for ones in ({"S": 1}, ONES):
            compile_kernel(name, missing, {**constants, **ones}, warps, "bf16")
        registers, spilled = assemble(compile_kernel(name, missing, constants, warps, "bf16"))
        print(f"{name}: {registers} registers, {spilled} bytes spilled")
        assert spilled == 0
    for layout, tile in LAYOUTS.items():
        for maps in ("bf16", "fp16", "fp32"):
            tile = {**tile, **(HALVED[layout] if maps == "fp32" else {})}
            for name, missing, constants in TILED:
                if maps == "bf16":
                    for ones in ({"S": 1}, ONES):
                        compile_kernel(name, missing, {**constants, **tile, **ones}, 4, maps)
                ptx = compile_kernel(name, missing, {**constants, **tile}, 4, maps)
                registers, spilled = assemble(ptx)
                wide = len(re.findall(r"ld\.global\.v4", ptx))
                print(f"{name} {layout} {maps}: {registers} registers, {wide} wide loads")
                assert spilled == 0, spilled
                assert wide > 0
                assert "st.global.v4" in ptx or name in ("moments", "gradient_sums")


if __name__ == "__main__":
    main()
