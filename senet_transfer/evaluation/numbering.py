"""Consecutive ids for the images, categories and annotations of COCO ground truth."""

import math
from collections.abc import Iterable, Sequence
from typing import Any


class Numbering:
    """Consecutive ids, starting at 1, that replace the ids in an annotation file.

    The libraries for the COCO metrics silently return wrong results for some ids: they store ids as
    doubles or 64-bit integers, and ignore matches with the annotation id 0. Images are numbered in
    the order of their ids, which is the order in which pycocotools evaluates them. Categories are
    numbered in the order of the classes, and annotations in the order of the file.

    Attributes:
        dataset: A copy of the ground truth with consecutive ids. Annotations whose image or
            category is not in the file are omitted, because the metrics ignore such annotations.
    """

    def __init__(self, dataset: dict[str, Any], class_of_category: dict[Any, int] | None = None):
        """
        Args:
            dataset: The content of an annotation file, which is not modified.
            class_of_category: Dictionary from category id to class index. If None, the classes are
                in the order of the category ids.
        """
        classes = class_of_category or {}
        images = in_order(image["id"] for image in dataset["images"])
        categories = in_order(category["id"] for category in dataset["categories"])
        categories.sort(key=lambda key: classes.get(key, math.inf))
        self._images = {key: number for number, key in enumerate(images, 1)}
        self._categories = {key: number for number, key in enumerate(categories, 1)}
        known = [
            item
            for item in dataset["annotations"]
            if item["image_id"] in self._images and item["category_id"] in self._categories
        ]
        self.dataset = {
            **dataset,
            "images": [{**item, "id": self._images[item["id"]]} for item in dataset["images"]],
            "categories": [
                {**item, "id": self._categories[item["id"]]} for item in dataset["categories"]
            ],
            "annotations": [
                {**self._numbered(item), "id": number} for number, item in enumerate(known, 1)
            ],
        }

    def image_numbers(self, ids: Sequence[Any]) -> list[int]:
        """Return the consecutive ids that replace the given image ids."""
        return [self._images[key] for key in ids]

    def results(self, results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Copy COCO results, replacing the image and category ids with the consecutive ids."""
        return [self._numbered(result) for result in results]

    def _numbered(self, item: dict[str, Any]) -> dict[str, Any]:
        image, category = self._images[item["image_id"]], self._categories[item["category_id"]]
        return {**item, "image_id": image, "category_id": category}


def in_order(ids: Iterable[Any]) -> list[Any]:
    """Return the ids without duplicates, in ascending order if they can be sorted.

    If they can't be sorted, such as a mixture of numbers and strings, they keep the given order.
    """
    unique = list(dict.fromkeys(ids))
    try:
        return sorted(unique)
    except TypeError:
        return unique
