#!/usr/bin/env python
"""Convert Places365, as downloaded from its website, to shards for training and evaluation.

    python datasets/prepare_places365.py --source DIR --split val --output datasets/places365/val

DIR contains the lists (`places365_val.txt`, `categories_places365.txt` and so on, or their archive)
and the images: either the archive (`val_256.tar`, `train_256_places365standard.tar`), which does
not need to be unpacked, or the unpacked folder. An interrupted conversion is resumed.
"""

from senet_transfer.cli.data import prepare

if __name__ == "__main__":
    prepare("places365")
