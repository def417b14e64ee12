#!/usr/bin/env python
"""Convert the downloaded ImageNet (ILSVRC 2012) dataset to shards for training and evaluation.

    python datasets/prepare_imagenet.py --source DIR --split val --output datasets/imagenet/val

DIR contains the archives `ILSVRC2012_img_train.tar`, `ILSVRC2012_img_val.tar` and
`ILSVRC2012_devkit_t12.tar.gz`, which do not need to be unpacked, or the folders `train` and `val`.
If a conversion is interrupted, run the same command again to resume it.
"""

from senet_transfer.cli.data import prepare

if __name__ == "__main__":
    prepare("imagenet")
