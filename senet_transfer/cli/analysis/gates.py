"""Analyse the gate values of an SE network on labelled images, as in Figures 6 and 7 of the paper.

    senet gates --weights output/model_best.pth --data flowers/val \\
        --output output/gates
    senet gates --model se_resnet50 --weights cadene/se_resnet50 \\
        --data imagenet/val --classes goldfish pug airliner cliff --output output/gates
    senet gates --weights output/model_final.pth \\
        --data annotations.json --images images/ --output output/gates
    senet gates --weights output/model_final.pth \\
        --data annotations.json --images images/ --group-by size --output output/size_gates

--data can be an image folder with one folder per class, shards, Places365, or annotations such as a
JSON file in COCO format with --images. Annotated objects are cropped from their images. With
--group-by, whole images are processed as in detection, because a gate has one value per channel and
image, not per object. The images are then grouped by the class or size of most of their objects. By
default, 50 images of each class or group are used. The output folder contains one figure per block
(blocks/), a figure of the blocks shown in the paper (figure6.png), an overview of all blocks
(blocks.png), and the gate values (gates.csv, blocks.csv). The command prints one line per block,
with these columns:

    mean      mean gate value
    > 0.95    fraction of open gates
    < 0.05    fraction of closed gates
    between   standard deviation of the class means, corrected for sampling noise
    within    standard deviation between the images of a class
    ratio     between / within: how class-specific the gates are

A block is marked "open" if most gate values are close to 1, or "constant" if the values hardly
vary. Such gates have little effect and might be removed.

With --prune-stage 5, the classifier is evaluated on all images in --data with all gates, and with
the gates of stage 5 replaced by 1 or by their means. The better of the two pruned networks is
written to OUTPUT/pruned.
"""

import argparse

from senet_transfer.cli.arguments import Parser, add_running_arguments, run_command
from senet_transfer.utils.text import counted


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(description=__doc__)
    parser.lists = ("--classes", "--prune-stage")
    add = parser.add_argument
    add("--weights", required=True, help="weights of an SE classifier or detector")
    add("--model", default="", help="model name, if neither a config nor the weights specify it")
    add(
        "--config-file",
        default="",
        help="config file; default: the config.yaml next to the weights",
    )
    add("--data", required=True, help="labelled images")
    add(
        "--images",
        default="",
        help="image folder for the annotations in --data; required for a JSON file in COCO format",
    )
    add(
        "--group-by",
        choices=("class", "size"),
        default="",
        help="use whole annotated images instead of crops of objects; an image belongs to the "
        "class or size (small, medium or large) of more than half of its objects, and is skipped "
        "if no class or size accounts for more than half",
    )
    add("--output", required=True, help="output folder for figures and tables")
    add(
        "--record",
        default="",
        metavar="FILE",
        help="also write the command, the hardware and the image counts to this JSON file",
    )
    add(
        "--classes",
        action="append",
        help="one or more classes to plot; default: a random selection",
    )
    add(
        "--num-classes",
        type=int,
        default=4,
        help="number of randomly selected classes (default: 4)",
    )
    add("--images-per-class", type=int, default=50, help="number of images per class (default: 50)")
    add("--channels", type=int, default=50, help="number of channels per figure (default: 50)")
    add(
        "--seed",
        type=int,
        default=0,
        help="seed for selecting images, classes and channels (default: 0)",
    )
    add(
        "--prune-stage",
        type=int,
        action="append",
        default=[],
        help="one or more stages whose SE gates are removed, to measure the effect on accuracy",
    )
    add_running_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Analyse the gates, and print the statistics and the location of the written files."""
    from senet_transfer.analysis.excitations.analyze import analyze_gates, open_labelled
    from senet_transfer.analysis.excitations.prune import pruning_table
    from senet_transfer.analysis.excitations.tables import block_table
    from senet_transfer.data.images.decode import Reading
    from senet_transfer.engine.model_from import find_model

    model = find_model(args.model, args.config_file, args.weights, options=args.opts)
    # The boxes in a JSON file refer to the upright image, even if the model is a classifier.
    options = model.cfg.INPUT
    reading = Reading(tuple(options.VALUE_RANGE), upright=options.EXIF != "ignore")
    dataset = open_labelled(args.data, args.images, args.group_by, reading)
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
    if args.record:
        from senet_transfer.analysis.results.records import write_gates_record

        write_gates_record(excitations.counts, args.record, words=args.words, weights=args.weights)
    kind = "groups" if args.group_by else "classes"
    print(f"{excitations.images} images of {excitations.classes} {kind} from {dataset.origin}")
    if left_out := getattr(dataset, "left_out", 0):
        few = counted(left_out, "image")
        by = args.group_by
        print(f"Skipped {few} in which no {by} accounts for more than half of the objects")
    print(block_table(excitations))
    print(f"{len(found.files)} figures and tables in {args.output}")
    if found.pruned:
        print(f"Without the gates of stage {', '.join(map(str, args.prune_stage))}:")
        print(pruning_table(found.pruned))
        print(f"Wrote {found.pruned_file}")


def command(words: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    run_command(main, parser().parse_args(words))
