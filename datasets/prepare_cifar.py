#!/usr/bin/env python
"""Prepare the two files from which CIFAR-10, CIFAR-100 or similar data is trained.

    python datasets/prepare_cifar.py --download cifar10
    python datasets/prepare_cifar.py --source cifar-10-python.tar.gz --output datasets/cifar10

The download is torchvision's, verified by its md5. A source is an official archive (binary or
python version, verified by its md5), the folder it was unpacked to, or a folder with train and test
(or train.tar.xz and test.tar.xz) that hold one folder of 32x32 images per class. Preparing takes
less than a minute; existing files are kept.
"""

from senet_transfer.cli.data import prepare

if __name__ == "__main__":
    prepare("cifar")
