#!/usr/bin/env python
"""Convert a dataset with one image folder per class to shards for training and evaluation.

    python datasets/prepare_folder.py --source flowers/train --output datasets/flowers/train
    python datasets/prepare_folder.py --source flowers/val --output datasets/flowers/val \\
        --classes-from datasets/flowers/train

Shards are not needed for a few thousand images, because training and evaluation can also read image
folders directly. If a conversion is interrupted, run the same command again to resume it.
"""

from senet_transfer.cli.data import prepare

if __name__ == "__main__":
    prepare("folder")
