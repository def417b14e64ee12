"""Tests for annotation formats other than COCO.

They cover identifying the format, choosing a split, and registering or importing a dataset.
"""

import json
import logging
import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json
from PIL import ExifTags, Image

from senet_transfer.cli.arguments import argument_parser
from senet_transfer.cli.data import prepare
from senet_transfer.data.detection.coco import register_coco_dataset, register_datasets
from senet_transfer.data.detection.crops import CocoImages
from senet_transfer.data.detection.dataset_checks import check_datasets_on_disk, check_segmentations
from senet_transfer.data.detection.formats.prepare import import_dataset
from senet_transfer.data.detection.formats.source import find_source
from senet_transfer.data.detection.image_checks import check_images
from senet_transfer.data.images.decode import Reading
from senet_transfer.data.own_data import DataPart
from senet_transfer.engine.recipe.facts import describe_data
from senet_transfer.errors import UserError
from senet_transfer.evaluation.coco import FastCOCOEvaluator
from tests.data.detection.formats.test_hostile_files import VOC, YOLO
from tests.data.detection.formats.test_readers import FIXTURES, make_images

pytestmark = pytest.mark.usefixtures("catalogs")


def test_boxes_are_fractions_of_the_image_with_or_without_its_orientation(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (tmp_path / "images").mkdir()
    Image.new("RGB", (100, 80)).save(tmp_path / "images" / "a.jpg", exif=exif)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("1 0.5 0.25 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text(YOLO)
    for upright, size, box in (
        (True, (80, 100), [20, 0, 40, 50]),
        (False, (100, 80), [25, 0, 50, 40]),
    ):
        register_datasets([["own", str(tmp_path / "data.yaml")]], upright=upright)
        (image,) = DatasetCatalog.get("own")
        assert (image["width"], image["height"]) == size
        assert image["annotations"][0]["bbox"] == box
        check_images(["own"], mode="decode", reading=Reading(upright=upright))
        truth = FastCOCOEvaluator("own", ("bbox",), distributed=False)._coco_api
        assert truth.anns[1]["bbox"] == box


def test_recipes_and_image_groups_use_boxes_without_the_orientation(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (100, 80)).save(tmp_path / "a.jpg", exif=exif)
    # With the orientation applied, the image is 80 pixels wide and the box is outside of it.
    box = {"name": "rect", "x": 85, "y": 5, "width": 10, "height": 40}
    region = {"shape_attributes": box, "region_attributes": {"label": "cell"}}
    content = {"a": {"filename": "a.jpg", "regions": [region]}}
    (tmp_path / "via.json").write_text(json.dumps(content))
    data = DataPart(str(tmp_path / "via.json"), str(tmp_path))
    found = describe_data(data, data, upright=False)
    assert (found.images, found.object_size) == (1, 0.25)  # sqrt(10 * 40) / 80
    assert CocoImages(*data, by="size", upright=False).labels().tolist() == [0]
    with pytest.raises(UserError, match="outside its image of 80x100 pixels"):
        CocoImages(*data, by="size")


@pytest.fixture
def voc(tmp_path):
    """Write a dataset in Pascal VOC format with two splits and an object marked as difficult."""
    root = tmp_path / "voc"
    make_images(root / "JPEGImages", a=(64, 48), b=(64, 48), c=(64, 48))
    (root / "Annotations").mkdir()
    difficult = VOC.replace("<name>a", "<difficult>1</difficult><name>b")
    for name, text in {"a": VOC, "b": difficult, "c": VOC}.items():
        (root / "Annotations" / f"{name}.xml").write_text(text)
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for split, names in {"train": "a\nb\n", "val": "c\n", "trainval": "a\nb\nc\n"}.items():
        (lists / f"{split}.txt").write_text(names)
    return root


def test_the_format_is_detected_from_the_path(tmp_path, voc, data):
    files = {
        "cvat/annotations.xml": (FIXTURES / "cvat_images.xml").read_text(),
        "yolo/data.yaml": YOLO,
        "labelme/x.json": (FIXTURES / "labelme.json").read_text(),
        "labelimg/x.xml": VOC,
        "via/via_project.json": (FIXTURES / "via.json").read_text(),
        "via1/via_region_data.json": '{"a.png3": {"fileref": "", "filename": "a.png"}}',
        "labelstudio/x.json": (FIXTURES / "labelstudio.json").read_text(),
        "coco/x.json": json.dumps(data),
        "results/x.json": '[{"image_id": 3, "score": 0.5}]',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    expected = {
        "voc": "voc", "cvat": "cvat", "cvat/annotations.xml": "cvat", "yolo": "yolo",
        "yolo/data.yaml": "yolo", "labelme": "labelme", "labelme/x.json": "labelme",
        "labelimg": "voc", "via": "via", "via1": "via", "labelstudio": "labelstudio",
        "labelstudio/x.json": "labelstudio", "coco/x.json": None, "results/x.json": None,
        "absent": None,
    }  # fmt: skip
    found = {path: find_source(tmp_path / path) for path in expected}
    assert {path: source and source.format for path, source in found.items()} == expected
    with pytest.raises(UserError, match="x.xml is a single Pascal VOC file"):
        find_source(tmp_path / "labelimg" / "x.xml")


def test_voc_is_registered_by_split_and_equals_the_converted_file(tmp_path, voc, caplog):
    caplog.set_level(logging.WARNING)
    register_datasets([["train", f"{voc}:train"], ["val", f"{voc}:val", f"{voc}/JPEGImages"]])
    assert "1 objects are marked as difficult and become crowds (iscrowd=1)" in caplog.text
    assert MetadataCatalog.get("train").thing_classes == ["a", "b"]
    assert MetadataCatalog.get("val").thing_classes == ["a", "b"]
    check_datasets_on_disk(["train", "val"], evaluated=["val"])
    prepare("import", ["--from", "voc", "--source", str(voc), "--output", str(tmp_path / "out")])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["train.json", "val.json"]
    for split in ("train", "val"):
        converted = tmp_path / "out" / f"{split}.json"
        # Detectron2's own reader returns the same records from the converted file.
        theirs = load_coco_json(str(converted), str(voc / "JPEGImages"))
        mine = DatasetCatalog.get(split)
        for record in theirs:
            for item in record["annotations"]:
                item.pop("segmentation", None)
                item["category_id"] -= 1
        assert mine == theirs
        register_coco_dataset(f"{split}_json", converted, voc / "JPEGImages")
        assert DatasetCatalog.get(f"{split}_json") == mine
    evaluator = FastCOCOEvaluator("val", output_dir=None)
    assert evaluator._coco_api.getAnnIds() == [1]
    first = DatasetCatalog.get("train")[0]["annotations"][0]
    assert (first["bbox"], first["iscrowd"]) == ([0, 1, 20, 8], 0)


def test_a_changed_annotation_is_read_again(voc):
    register_coco_dataset("mine", f"{voc}:val")
    assert DatasetCatalog.get("mine")[0]["annotations"][0]["bbox"][2] == 20
    (voc / "Annotations" / "c.xml").write_text(VOC.replace("<xmin>1<", "<xmin>700<"))
    with pytest.raises(UserError) as found:
        DatasetCatalog.get("mine")
    # The checks of COCO annotations name the XML file that contains the error, and no other.
    problem = "object 1 has bbox [699.0, 1.0, -679.0, 8.0] with a negative size"
    assert str(found.value).startswith(f"{voc}/Annotations/c.xml: {problem}")
    assert str(found.value).count(str(voc)) == 1


def test_a_split_has_to_be_chosen(voc):
    with pytest.raises(UserError, match=r"contains 3 splits; .* paths: .*voc:train, .*voc:val"):
        register_coco_dataset("mine", voc)
    with pytest.raises(UserError, match=r"contains no split 'test'; expected the path"):
        register_coco_dataset("mine", f"{voc}:test")
    with pytest.raises(UserError, match="not found"):
        register_coco_dataset("mine", f"{voc}:other")


def test_each_split_may_have_its_own_folder(tmp_path):
    for split in ("train", "valid"):
        make_images(tmp_path / split, a=(100, 80))
        content = (FIXTURES / "labelme.json").read_text().replace("..\\\\images\\\\", "")
        (tmp_path / split / "a.json").write_text(content)
    register_coco_dataset("mine", f"{tmp_path}:val", segmentations=True)
    assert DatasetCatalog.get("mine")[0]["file_name"] == str(tmp_path / "valid" / "a.png")
    # Training with masks needs segmentations, but rectangles have none.
    with pytest.raises(UserError, match=r"a.json: shape 1 has no `segmentation`. 1 of 6"):
        check_segmentations(["mine"])


def test_images_in_subfolders_of_the_folders_of_splits_are_found(tmp_path):
    xml = (
        '<annotations><image name="a.png" width="100" height="80"><box label="cat" xtl="0" '
        'ytl="0" xbr="9" ybr="9"/></image></annotations>'
    )
    for split in ("train", "valid"):
        make_images(tmp_path / "cvat" / split / "images", a=(100, 80))
        (tmp_path / "cvat" / split / "annotations.xml").write_text(xml)
    register_coco_dataset("mine", f"{tmp_path}/cvat:val")
    (record,) = DatasetCatalog.get("mine")
    assert record["file_name"] == str(tmp_path / "cvat" / "valid" / "images" / "a.png")
    # The images may also be in a separate folder.
    (tmp_path / "cvat" / "valid" / "images").rename(tmp_path / "valid")
    contents, _ = import_dataset("cvat", tmp_path / "cvat", tmp_path)
    assert contents["val"]["images"][0]["file_name"] == "valid/a.png"


def test_the_command_writes_nothing_if_an_image_is_missing(tmp_path, voc, capsys):
    (voc / "JPEGImages" / "c.png").unlink()
    words = ["--from", "voc", "--source", str(voc), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        prepare("import", words)
    assert "c.xml refer to the same image, a.png" in capsys.readouterr().err
    text = (voc / "Annotations" / "c.xml").read_text()
    (voc / "Annotations" / "c.xml").write_text(text.replace("a.png", "c.png"))
    with pytest.raises(SystemExit, match="2"):
        prepare("import", words)
    assert "1 of the 1 images listed in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        prepare("import", ["--from", "cvat", *words[2:]])
    assert "can't be read as data in CVAT format" in capsys.readouterr().err
    shutil.rmtree(voc)
    with pytest.raises(SystemExit, match="2"):
        prepare("import", words)
    assert "does not exist" in capsys.readouterr().err


def test_the_command_leaves_files_of_an_earlier_import(tmp_path, voc, capsys):
    root = tmp_path / "cells"
    make_images(root, a=(64, 48))
    (root / "a.xml").write_text(VOC)
    out = tmp_path / "out"
    out.mkdir()
    words = ["--from", "voc", "--source", str(root), "--output", str(out)]
    # Training would read each of these files as a split or fold, or the import would overwrite it.
    for name in ("train", "val", "test", "fold0_val"):
        (out / f"{name}.json").write_text("mine")
        with pytest.raises(SystemExit, match="2"):
            prepare("import", words)
        assert f"already exist: {out / name}.json" in capsys.readouterr().err
        assert [path.read_text() for path in out.iterdir()] == ["mine"]
        (out / f"{name}.json").unlink()
    (out / "classes.json").write_text("mine")
    prepare("import", words)
    assert sorted(path.name for path in out.iterdir()) == ["classes.json", "train.json"]
    with pytest.raises(SystemExit, match="2"):
        prepare("import", [*words[:-1], str(root / "a.xml" / "out")])
    assert "a.xml/out: [Errno" in capsys.readouterr().err


def test_the_command_checks_a_folder_with_a_slash_at_the_end(tmp_path, monkeypatch, capsys):
    make_images(tmp_path, a=(64, 48))
    (tmp_path / "a.xml").write_text(VOC)
    monkeypatch.chdir(tmp_path)
    for path in (f"{tmp_path}/", "."):
        prepare("check", [path, "--quiet"])
        assert "the annotations and 1 image have no errors\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "datasets", "opts"),
    [
        ("--dataset a p", [["a", "p", ""]], []),
        ("--dataset a p SOLVER.MAX_ITER 3", [["a", "p", ""]], ["SOLVER.MAX_ITER", "3"]),
        ("--dataset a p OUTPUT_DIR x", [["a", "p", ""]], ["OUTPUT_DIR", "x"]),
        ("--dataset a p images SEED 1", [["a", "p", "images"]], ["SEED", "1"]),
        ("--dataset a p --dataset b q i", [["a", "p", ""], ["b", "q", "i"]], []),
        ("SEED 1 --dataset a p --resume", [["a", "p", ""]], ["SEED", "1"]),
    ],
)
def test_the_image_folder_of_a_data_set_is_optional(words, datasets, opts):
    args = argument_parser().parse_args(["--config-file", "x.yaml", *words.split()])
    assert (args.dataset, args.opts) == (datasets, opts)
