#!/usr/bin/env python
"""Benchmark this project against common alternatives.

In each round, every implementation is timed once. The reported ratios are medians over the rounds,
with 95% confidence intervals. As a control, the baseline is measured twice.

    python tools/benchmark.py detector --output output/detector.json

The benchmark `gpu` measures the time and memory of training and inference on a GPU, and compares
the results with target values. It takes at most six minutes. To run only some parts of this
benchmark, add their names.

    python tools/benchmark.py gpu --output output/gpu.json
    python tools/benchmark.py gpu training inference
"""

import argparse
import importlib
import sys

# For each part, the module in the package `benchmark`, and the function in the module.
PARTS = {
    "block": ("networks", "measure_block"),
    "backbone": ("networks", "measure_backbone"),
    "inference": ("inference", "measure_inference"),
    "detector": ("detector", "measure_detector"),
    "loader": ("inputs", "measure_loader"),
    "coco-eval": ("coco", "measure_coco"),
    "scaling": ("scaling", "measure_scaling"),
    "startup": ("startup", "measure_startup"),
    "engine": ("training", "measure_engine"),
    "augment": ("training", "measure_augment"),
}


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"benchmarks to run: {', '.join(PARTS)} or gpu (default: all except gpu)",
    )
    add(
        "--seconds",
        type=float,
        default=20.0,
        help="approximate seconds per comparison (default: 20)",
    )
    add("--device", default="cpu", help="device for the networks, cpu or cuda (default: cpu)")
    add(
        "--profile",
        action="store_true",
        help="profile the time and memory of each implementation",
    )
    add("--output", help="JSON file to write")
    add("--quiet", action="store_true", help="hide the progress bars")
    add = parser.add_argument_group("options of the benchmark gpu").add_argument
    add("--budget", type=float, default=340.0, help="maximum total time in seconds (default: 340)")
    add(
        "--compiled",
        choices=["bf16", "all"],
        default="bf16",
        help="networks to compile: ResNet-50 with and without SE in bfloat16 (bf16), or more "
        "variants of ResNet-50, each in bfloat16, float16 and float32 (all)",
    )
    add(
        "--dry-run",
        action="store_true",
        help="check the benchmark's code on a CPU, with tiny networks and images",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Run the benchmarks, print each result as soon as it is available, and write the JSON file."""
    if args.parts[:1] == ["gpu"]:
        _run_gpu(args)
        return
    from benchmark import networks, report
    from senet_transfer.errors import check_choice
    from senet_transfer.utils.progress import progress

    for part in args.parts:
        check_choice("The part", part, PARTS)
    options = networks.Options(seconds=args.seconds, device=args.device, profile=args.profile)
    found = {}
    for part in args.parts or PARTS:
        found[part] = []
        module, function = PARTS[part]
        measure = getattr(importlib.import_module(f"benchmark.{module}"), function)
        bar = progress(measure(options), desc=part, unit="comparison", quiet=args.quiet)
        for row in bar:
            bar.clear()
            print(row, flush=True)
            found[part].append(row)
    if args.output:
        report.write_json(args.output, found, " ".join(sys.argv))


def _run_gpu(args: argparse.Namespace) -> None:
    from benchmark.gpu import run
    from senet_transfer.errors import check_choice

    names = args.parts[1:]
    for name in names:
        check_choice("The part of the GPU benchmark", name, run.PARTS)
    run.run(
        names,
        output=args.output,
        command=" ".join(sys.argv),
        budget=args.budget,
        compiled=args.compiled,
        dry_run=args.dry_run,
    )


if __name__ == "__main__":
    arguments = parser().parse_args()
    from senet_transfer.engine.launch import run_single

    run_single(main, arguments)
