#!/usr/bin/env python
"""Convert the downloaded Places365 dataset to shards for training and evaluation.

    python datasets/prepare_places365.py --source DIR --split val --output datasets/places365/val

DIR contains the label lists and the images. The lists are text files such as `places365_val.txt`
and `categories_places365.txt`, or the official archive of these files. The images are an archive,
such as `val_256.tar` or `train_256_places365standard.tar`, which does not need to be unpacked, or
an unpacked folder. If a conversion is interrupted, run the same command again to resume it.
"""

from senet_transfer.cli.data import prepare

if __name__ == "__main__":
    prepare("places365")
