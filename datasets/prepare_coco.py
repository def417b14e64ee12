#!/usr/bin/env python
"""Convert Pascal VOC, YOLO, LabelMe, CVAT, Label Studio or VIA annotations to COCO format.

python datasets/prepare_coco.py --from voc --source SOURCE --output datasets/mine
"""

from senet_transfer.cli.data import prepare

if __name__ == "__main__":
    prepare("import")
