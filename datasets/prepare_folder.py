#!/usr/bin/env python
"""Convert a dataset with one image folder per class to shards for training and evaluation.

    python datasets/prepare_folder.py --source flowers/train --output datasets/flowers/train
    python datasets/prepare_folder.py --source flowers/val --output datasets/flowers/val \\
        --classes-from datasets/flowers/train

A few thousand images do not need shards: training and evaluation can also read image folders
directly. An interrupted conversion is resumed.
"""

from senet_transfer.cli.data import prepare

if __name__ == "__main__":
    prepare("folder")
