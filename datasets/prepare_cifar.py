#!/usr/bin/env python
"""Makes the two files that training on CIFAR-10 or CIFAR-100 reads.

    python datasets/prepare_cifar.py --source cifar-10-python.tar.gz --output datasets/cifar10

The source is an official archive (binary or python version, checked against its site's md5), the
folder it was unpacked into, or a folder with train and test (or train.tar.xz and test.tar.xz) that
have a folder of 32x32 images a class. Takes less than a minute; what is there already is kept.
"""

from senet_transfer.cli.data import prepare

if __name__ == "__main__":
    prepare("cifar")
