"""Reader for the Pascal VOC format, with one XML file per image and an image list per split.

The files specify a box by its first and last pixels, whose indices start at 1. As in Detectron2 and
the supervision library, (xmin - 1, ymin - 1, xmax, ymax) are the edges of the box. Objects marked
as `difficult` are converted to crowd annotations (`iscrowd`). The VOC metric ignores these objects
and their detections, as the COCO metrics do for crowds. The attributes `truncated`, `occluded` and
`pose` and the boxes of object parts have no equivalent in COCO format and are not read.
"""

import os
from pathlib import Path
from xml.etree.ElementTree import Element

from senet_transfer.data.detection.formats.files import (
    ImageFolder,
    first_folder,
    image_sides,
    label_text,
    list_files,
    number,
    read_text,
    read_xml,
)
from senet_transfer.data.detection.formats.records import (
    SPLITS,
    ImportedData,
    ImportedImage,
    ImportedObject,
)
from senet_transfer.errors import UserError

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def image_folder(location: Path) -> Path:
    """Return the image subfolder, such as "JPEGImages", or `location` if there is none."""
    return first_folder(location, "JPEGImages", "images", "Images")


def read(location: Path, images: ImageFolder) -> ImportedData:
    """Read a dataset in Pascal VOC format.

    Args:
        location: Folder that contains `Annotations` and optionally `ImageSets`, or the XML files
            themselves.
        images: Folder with the images.

    Raises:
        UserError: If a file is invalid.
    """
    data = ImportedData()
    annotations = first_folder(location, "Annotations")
    names = list_files(annotations, lambda name: name.lower().endswith(".xml"))
    data.files = [str(annotations / name) for name in names] + [str(annotations)]
    read_images = {
        os.path.splitext(name)[0]: _read_image(annotations / name, name, images, data)
        for name in names
    }
    _check_unique(list(read_images.values()))
    lists = {split: location / "ImageSets" / "Main" / f"{split}.txt" for split in SPLITS}
    for split, path in lists.items():
        if path.is_file():
            data.files.append(str(path))
            data.splits[split] = _listed(path, read_images)
    if not data.splits:
        data.splits["train"] = list(read_images.values())
    used = {id(image) for split in data.splits.values() for image in split}
    unused = len(read_images) - len(used)
    if unused:
        data.notes["XML files are not listed in ImageSets/Main and are skipped"] = unused
    return data


def _check_unique(found: list[ImportedImage]) -> None:
    first: dict[str, str] = {}
    for image in found:
        other = first.setdefault(image.file_name, image.source)
        if other != image.source:
            raise UserError(
                f"{other} and {image.source} refer to the same image, {image.file_name}; expected "
                "a different image for each XML file. Correct the <filename> in one of the files, "
                "or remove one of the files."
            )


def _listed(path: Path, read_images: dict[str, ImportedImage]) -> list[ImportedImage]:
    found = {}
    for number_of_line, line in enumerate(read_text(path).splitlines(), 1):
        name = line.strip()
        if not name:
            continue
        # Some tools add the extension to the name, or write a label after the name.
        spellings = (name, os.path.splitext(name)[0], name.split()[0])
        stem = next((word for word in spellings if word in read_images), None)
        if stem is None:
            raise UserError(
                f"{path}: line {number_of_line} lists {name[:80]!r}, which has no XML file; "
                "expected the name of an XML file without its extension. Correct the list."
            )
        found[stem] = read_images[stem]
    return list(found.values())


def _read_image(path: Path, name: str, images: ImageFolder, data: ImportedData) -> ImportedImage:
    root = read_xml(path)
    if root.tag != "annotation":
        raise UserError(
            f"{path} has the root element <{root.tag}>; expected <annotation>, as in Pascal VOC. "
            "Move XML files of other formats to a different folder."
        )
    # The XML file's name has priority, because files are often renamed without editing the XML.
    file_name = images.with_stem(os.path.splitext(name)[0])
    if file_name is None:
        file_name = images.name_of(root.findtext("filename"), images.root, str(path))
    sides = root.findtext("size/width"), root.findtext("size/height")
    if sides in ((None, None), ("0", "0")):
        width, height = images.size(file_name, str(path))
    else:
        width, height = image_sides(*sides, str(path))
    image = ImportedImage(file_name, width, height, str(path))
    for index, item in enumerate(root.findall("object"), 1):
        image.objects.append(_read_object(item, f"{path}: object {index}", data))
    return image


def _read_object(item: Element, where: str, data: ImportedData) -> ImportedObject:
    label = label_text(item.findtext("name"), where)
    left, top, right, bottom = (
        number(item.findtext(f"bndbox/{corner}"), corner, where) for corner in _CORNERS
    )
    difficult = number(item.findtext("difficult") or "0", "difficult", where) != 0
    if difficult:
        data.notes["objects are marked as difficult and become crowds (iscrowd=1)"] += 1
    if left == right or top == bottom:
        data.notes["objects have a box that is only one pixel wide or high"] += 1
    if item.find("polygon") is not None:
        data.notes["objects have a polygon, but only their box is read"] += 1
    return ImportedObject(label, (left - 1, top - 1, right, bottom), where, crowd=difficult)
