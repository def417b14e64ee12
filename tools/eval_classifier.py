#!/usr/bin/env python
"""Evaluates a classifier: top-1 and top-5 error, the worst and the most confused classes.

On ImageNet's validation set, a folder a class, with a family's published error beside it:
    python tools/eval_classifier.py --model se_resnet50 --weights se_resnet50.pth \\
        --data imagenet/val --output results.json

What tools/train_net.py has trained; its config.yaml lies beside it:
    python tools/eval_classifier.py --weights output/model_best.pth --data flowers/val
"""

from senet_transfer.cli.evaluate import evaluation_parser, run_evaluation
from senet_transfer.engine.launch import run_single

if __name__ == "__main__":
    run_single(run_evaluation, evaluation_parser(__doc__).parse_args())
