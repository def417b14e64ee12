#!/usr/bin/env python
"""Write a data set with one folder of images per class to shards for training and evaluation.

    python datasets/prepare_folder.py --source flowers/train --output datasets/flowers/train
    python datasets/prepare_folder.py --source flowers/val --output datasets/flowers/val \\
        --classes-from datasets/flowers/train

A few thousand images need no shards: training and evaluation also read image folders directly. An
interrupted run is resumed.
"""

from senet_transfer.cli.data import prepare

if __name__ == "__main__":
    prepare("folder")
