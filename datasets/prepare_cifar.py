#!/usr/bin/env python
"""Prepare the training and test files of CIFAR-10, CIFAR-100 or a similar dataset.

    python datasets/prepare_cifar.py --download cifar10
    python datasets/prepare_cifar.py --source cifar-10-python.tar.gz --output datasets/cifar10

`--download` uses torchvision. `--source` accepts an official archive (binary or Python version),
an unpacked official archive, or a folder that contains `train` and `test` (or `train.tar.xz` and
`test.tar.xz`), each with one folder of 32x32 images per class. Downloads and official archives are
verified with their MD5 checksums. The preparation takes less than a minute. Existing files are not
overwritten.
"""

from senet_transfer.cli.data import prepare

if __name__ == "__main__":
    prepare("cifar")
