#!/usr/bin/env python
"""Write Places365, as downloaded from its site, to shards for training and evaluation.

    python datasets/prepare_places365.py --source DIR --split val --output datasets/places365/val

DIR contains the lists (`places365_val.txt`, `categories_places365.txt` and so on, or their archive)
and the images: either the archive (`val_256.tar`, `train_256_places365standard.tar`), which doesn't
need to be unpacked, or the unpacked folder. An interrupted run is resumed.
"""

from senet_transfer.cli.data import prepare

if __name__ == "__main__":
    prepare("places365")
