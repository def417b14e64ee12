#!/usr/bin/env python
"""Turns Places365, as its site serves it, into the shards that training and evaluation read.

    python datasets/prepare_places365.py --source DIR --split val --output datasets/places365/val

DIR holds the lists (`places365_val.txt`, `categories_places365.txt` and so on, or the archive that
they come in) and the images: the archive (`val_256.tar`, `train_256_places365standard.tar`), which
need not be unpacked, or the folder it unpacks to. A run that was stopped goes on where it was.
"""

from senet_transfer.cli.data import prepare

if __name__ == "__main__":
    prepare("places365")
