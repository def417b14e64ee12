#!/usr/bin/env python
"""Prepare the training and test files of CIFAR-10, CIFAR-100 or a similar data set.

    python datasets/prepare_cifar.py --download cifar10
    python datasets/prepare_cifar.py --source cifar-10-python.tar.gz --output datasets/cifar10

The download is torchvision's, verified by its md5. A source is an official archive (binary or
Python version, verified by its md5), the unpacked folder, or a folder with train and test (or
train.tar.xz and test.tar.xz) that contain one folder of 32x32 images per class. This takes less
than a minute. Existing files are kept.
"""

from senet_transfer.cli.data import prepare

if __name__ == "__main__":
    prepare("cifar")
