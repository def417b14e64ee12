"""Show what the gates of an SE network do: the paper's Figures 6 and 7 on any labelled images.

    python tools/analyze_excitations.py --weights output/model_best.pth --data flowers/val \\
        --output output/gates
    python tools/analyze_excitations.py --model se_resnet50 --weights cadene/se_resnet50 \\
        --data imagenet/val --classes goldfish pug airliner cliff --output output/gates
    python tools/analyze_excitations.py --weights output/model_final.pth \\
        --data annotations.json --images images/ --output output/gates

--data takes one folder per class, shards, Places365, or with --images a JSON in COCO's format,
whose objects are cut out. Of every class 50 images are taken. Written are one figure per block
(blocks/), the paper's choice of blocks in one (figure6.png), all blocks at a glance (blocks.png),
and the numbers (gates.csv, blocks.csv). Printed is one line per block:

    mean      of all gates
    > 0.95    share of the gates that are open, as good as 1
    < 0.05    share of those that are closed
    between   standard deviation of the classes' means, without what chance adds to it
    within    standard deviation between the images of a class
    ratio     of these two: how specific to classes the gates are
    and "open" or "constant" where a block does next to nothing and might be removed

--prune-stage 5 also drops the gates of that stage, evaluates the classifier on all of --data with
and without, and writes the network without them to OUTPUT/pruned.
"""

import argparse

from senet_transfer.cli.arguments import Parser, add_running_arguments, run_command


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--weights", required=True, help="of an SE network, a classifier or a detector")
    add("--model", default="", help="its name, if nothing else tells")
    add("--config-file", default="", help="its config; default: the config.yaml next to it")
    add("--data", required=True, help="labelled images")
    add("--images", default="", help="folder of images, if --data is a JSON in COCO's format")
    add("--output", required=True, help="folder for figures and tables")
    add("--classes", nargs="+", help="names of the classes to draw; default: some at random")
    add("--num-classes", type=int, default=4, help="how many, if they are drawn at random (4)")
    add("--images-per-class", type=int, default=50, help="of every class (50)")
    add("--channels", type=int, default=50, help="channels per figure (50)")
    add("--seed", type=int, default=0, help="of images, classes and channels (0)")
    add("--prune-stage", type=int, nargs="+", default=[], help="drop the gates of these stages")
    add_running_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Analyse the gates, and print what was found and written."""
    from senet_transfer.analysis.excitations.analyze import analyze_gates, open_labelled
    from senet_transfer.analysis.excitations.prune import pruning_table
    from senet_transfer.analysis.excitations.tables import block_table
    from senet_transfer.engine.model_from import find_model

    dataset = open_labelled(args.data, args.images)
    model = find_model(args.model, args.config_file, args.weights, options=args.opts)
    found = analyze_gates(
        model.build(args.device),
        dataset,
        args.output,
        images_per_class=args.images_per_class,
        classes=args.classes,
        num_classes=args.num_classes,
        channels=args.channels,
        seed=args.seed,
        prune_stages=args.prune_stage,
        batch_size=args.batch_size,
        workers=args.workers,
        quiet=args.quiet,
    )
    excitations = found.excitations
    print(f"{excitations.images} images of {excitations.classes} classes of {dataset.origin}")
    print(block_table(excitations))
    print(f"{len(found.files)} figures and tables in {args.output}")
    if found.pruned:
        print(f"Without the gates of stage {', '.join(map(str, args.prune_stage))}:")
        print(pruning_table(found.pruned))
        print(f"Written: {found.pruned_file}")


def command(words: list[str] | None = None) -> None:
    """Run as the command line says."""
    run_command(main, parser().parse_args(words))
