#!/usr/bin/env python
"""Shows what the gates of an SE network do: the paper's Figures 6 and 7 on any labelled images.

    python tools/analyze_excitations.py --weights output/model_best.pth --data flowers/val \\
        --output output/gates
    python tools/analyze_excitations.py --model se_resnet50 --weights cadene/se_resnet50 \\
        --data imagenet/val --classes goldfish pug airliner cliff --output output/gates
    python tools/analyze_excitations.py --weights output/model_final.pth \\
        --data annotations.json --images images/ --output output/gates

--data takes a folder a class, shards, Places365, or with --images a JSON in COCO's format, whose
objects are cut out. Of every class 50 images are taken. Written are a figure a block (blocks/),
the paper's choice of blocks in one (figure6.png), all blocks at a glance (blocks.png), and the
numbers (gates.csv, blocks.csv). Printed is a line a block:

    mean      of all gates
    > 0.95    share of the gates that are open, as good as 1
    < 0.05    share of those that are closed
    between   standard deviation of the classes' means, freed of what chance adds to it
    within    standard deviation between the images of a class
    ratio     of these two: how specific to classes the gates are
    and "open" or "constant" where a block does next to nothing and might be removed

--prune-stage 5 also drops the gates of that stage, evaluates the classifier on all of --data with
and without, and writes the network without them to OUTPUT/pruned.
"""

from senet_transfer.cli.gates import analysis_parser, run_analysis
from senet_transfer.engine.launch import run_single

if __name__ == "__main__":
    run_single(run_analysis, analysis_parser(__doc__).parse_args())
