"""Tests that invalid and malicious annotation files raise errors that name the file."""

import json

import pytest

from senet_transfer.data.detection.formats.prepare import import_dataset
from senet_transfer.errors import UserError
from tests.data.detection.formats.test_readers import FIXTURES, make_images

OBJECT = (
    "<object><name>a</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>{}</xmax><ymax>9</ymax>"
    "</bndbox></object>"
)
SIZE = "<size><width>64</width><height>48</height></size>"
VOC = "<annotation><filename>a.png</filename>" + SIZE + OBJECT.format(20) + "</annotation>"
BOMB = (
    '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">'
    '<!ENTITY c SYSTEM "file:///etc/passwd">]>'
)
NO_DATA = '[{"data": 1, "annotations": [{"result": []}]}]'
YAML_BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
YOLO = "train: images\nnames: [cat, dog]\n"
CVAT = (FIXTURES / "cvat_images.xml").read_text()
LABELME = json.loads((FIXTURES / "labelme.json").read_text())


def labelme(**changes):
    return {"a.json": json.dumps({**LABELME, "imagePath": "a.png", **changes})}


def labelme_shape(**changes):
    return labelme(shapes=[{**LABELME["shapes"][0], **changes}])


def labelstudio(old="", new=""):
    return {"a.json": (FIXTURES / "labelstudio.json").read_text().replace(old, new)}


def via(old="", new=""):
    return {"a.json": (FIXTURES / "via.json").read_text().replace(old, new)}


def cvat(old="", new=""):
    return {"annotations.xml": CVAT.replace(old, new)}


def yolo(line, names=YOLO):
    return {"data.yaml": names, "labels/a.txt": f"0 0.5 0.5 0.2 0.2\n{line}\n"}


def voc(text):
    return {"a.xml": text}


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("voc", voc(BOMB + VOC.replace("20", "&b;")), "a.xml declares an entity"),
        ("voc", voc(BOMB + VOC.replace("<name>a", "<name>&c;")), "a.xml declares an entity"),
        ("voc", voc(VOC[:80]), "a.xml is not valid XML"),
        ("voc", voc(VOC.replace("20", "nan")), r"a.xml: object 1 has the xmax 'nan'; expected a"),
        ("voc", voc(VOC.replace("<xmax>20</xmax>", "")), "a.xml: object 1 has no xmax"),
        ("voc", voc(VOC.replace("<name>a</name>", "")), "a.xml: object 1 has no label"),
        ("voc", voc(VOC.replace("64", "1e9")), "a.xml has the size 1e9 x 48; at most"),
        ("voc", voc(VOC.replace("64", "0")), "a.xml has the size 0 x 48; expected positive"),
        ("voc", {"b.xml": VOC.replace("a.png", "../a.png")}, r"b.xml specifies .*outside"),
        ("voc", {"b.xml": VOC.replace("a.png", "/etc/passwd")}, r"b.xml specifies .* '/etc/pas"),
        ("voc", {**voc(VOC), "ImageSets/Main/val.txt": "../a\n"}, r"val.txt: line 1 lists '../a'"),
        ("yolo", yolo("2 0.5 0.5 0.1 0.1"), r"labels/a.txt: line 2 has the class 2; .* 0 to 1"),
        ("yolo", yolo("-1 0.5 0.5 0.1 0.1"), "line 2 has the class -1"),
        ("yolo", yolo("0.5 0.5 0.5 0.1 0.1"), "line 2 has the class 0.5"),
        ("yolo", yolo("1 0.5 nan 0.1 0.1"), r"labels/a.txt: line 2 has the value 'nan'"),
        ("yolo", yolo("1 50 60 10 10"), r"labels/a.txt: line 2 .* not pixels"),
        ("yolo", yolo("1 0.5 0.5 0.1 0.1 0.9"), "line 2 has 6 values, as in a prediction"),
        ("yolo", yolo("1 0.5 0.5"), "line 2 has 3 values"),
        ("yolo", yolo("", "train: ../../\nnames: [a]"), r"data.yaml: `train` .*outside"),
        ("yolo", yolo("", "train: /etc\nnames: [a]"), r"data.yaml: `train` .*outside"),
        ("yolo", yolo("", "train: absent\nnames: [a]"), r"data.yaml: `train` is 'absent', but"),
        ("yolo", yolo("", "names: [a, yes]"), r"data.yaml: `names` is not valid"),
        ("yolo", yolo("", "names: [a]\nnc: 2"), r"data.yaml: `nc` is 2"),
        ("yolo", yolo("", YAML_BOMB + "names: *j"), r"data.yaml: `names` is not valid"),
        ("yolo", yolo("", YAML_BOMB + "names: [a]\ntrain: *j"), "data.yaml: `train` specifies the"),
        ("yolo", yolo("", YAML_BOMB + "names: [a]\nnc: *j"), "data.yaml: `nc` is"),
        ("yolo", yolo("", "names: [a"), "data.yaml is not valid YAML"),
        ("yolo", yolo("", "names: !!python/object/apply:os.getcwd []"), "data.yaml is not valid"),
        ("yolo", {"data.yaml": YOLO}, r"data.yaml: none of the 1 images has a label file"),
        ("labelme", labelme(imagePath="../../a.png"), r"a.json specifies the image .*outside"),
        ("labelme", labelme(imagePath="a\\..\\..\\..\\x.png"), "a.json specifies .*outside"),
        ("labelme", labelme(imagePath=None), "a.json specifies the image None"),
        ("labelme", labelme_shape(points=[[float("nan"), 1]]), "a.json: shape 1 has the points"),
        ("labelme", labelme_shape(points=[[1, 2, 3]]), "a.json: shape 1 has the points"),
        ("labelme", labelme_shape(label=3), "a.json: shape 1 has the label 3"),
        ("labelme", labelme_shape(shape_type="heart"), "a.json: shape 1 has the shape_type"),
        ("labelme", labelme_shape(shape_type="mask", mask="!"), "a.json: shape 1 has a mask"),
        ("labelme", {"a.json": '{"shapes": [' + "[" * 10**5}, "a.json is not valid"),
        ("cvat", {"a.xml": BOMB + CVAT.split("?>")[1]}, "a.xml declares an entity"),
        ("cvat", cvat("</annotations>", ""), "annotations.xml is not valid XML"),
        ("cvat", cvat('"a.png"', '"../../a.png"'), "annotations.xml: image .*outside"),
        ("cvat", cvat('xtl="10.50"', 'xtl="inf"'), r"image 'a.png', shape 1 has the xtl 'inf'"),
        ("cvat", cvat('label="dog"', 'label="cow"'), r"shape 2 has the label 'cow'"),
        ("cvat", cvat("2, 3, 1, 6", "2, 3, 1, 9999999999"), "shape 4 is a mask of 4 x 3"),
        ("cvat", cvat("2, 3, 1, 6", "2, 3, 1, 6" + "0" * 5000), "shape 4 is a mask of 4 x 3"),
        ("cvat", cvat('left="70"', 'left="-70"'), "shape 4 is a mask of 4 x 3"),
        ("cvat", cvat('width="100"', 'width="1e99"'), "image 'a.png' has the size 1e99 x 80"),
        ("labelstudio", labelstudio("upload/3/0", "../../0"), r"a.json: task 11 .* without `..`"),
        ("labelstudio", labelstudio("10.5", "NaN"), "a.json: task 11, region 1 has the x nan"),
        ("labelstudio", labelstudio('tion": 0,', 'tion": 90,'), "task 11, region 1 .*by 90"),
        ("labelstudio", {"a.json": NO_DATA}, "task 1 has no `data` object"),
        ("labelstudio", {"a.json": "[{}, 1]"}, "a.json does not contain a list of tasks"),
        ("via", via('"a.png"', '"../a.png"'), r"a.json: '../a.png' specifies the image .*outside"),
        ("via", via('"filename": "a.', '"filename": "z.'), "a.json: 'z.png' lists the image"),
        ("via", via('"r": 12', '"r": Infinity'), "a.json: 'a.png', region 2 has the r"),
        ("via", via('"type":', '"x": 1, "y":'), "a.json: the regions have the attributes 'x', 'y'"),
        ("via", {"a.json": '{"a": {"filename": "a.png"}}'}, "a.json is not a file written by VIA"),
    ],
)  # fmt: skip
def test_an_invalid_file_is_an_error_that_names_it(tmp_path, name, files, message):
    root = tmp_path / "data"
    make_images(root / ("images" if name == "yolo" else ""), a=(64, 48), b=(64, 48))
    make_images(root, sub__b=(64, 48), c=(64, 48))
    if name == "yolo":
        (root / "images" / "b.png").unlink()
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    if name == "voc":
        (root / "b.png").unlink()  # an XML file also matches an image with its own name
    with pytest.raises(UserError, match=message) as found:
        import_dataset(name, root)
    assert str(root) in str(found.value)
    assert len(str(found.value)) < 800
