import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from senet_transfer.cli.data import prepare
from senet_transfer.data.shapes import generate as shapes
from senet_transfer.data.shapes.generate import (
    SHAPE_CLASSES,
    SHAPE_SPLITS,
    make_shapes,
    render_image,
)
from senet_transfer.errors import UserError

SCRIPT = Path(__file__).parents[2] / "datasets" / "prepare_shapes.py"
COUNTS = {"train": 40, "val": 4, "tiny": 8}


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """Render a small dataset that is shared by all tests, which must not modify it."""
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes", seed=0, train=40, val=4)


@pytest.fixture(scope="module")
def rendered():
    """Return the images and objects in the training split, keyed by image id."""
    return {index: render_image(0, "train", index) for index in range(1, COUNTS["train"] + 1)}


@pytest.fixture
def main():
    return lambda words: prepare("shapes", words)


def annotation_file(root, split):
    return root / "annotations" / f"instances_{split}.json"


def snapshot(folder):
    """Return the contents of all files in a folder, keyed by relative path."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rasterised(annotation, image):
    """Convert an annotation's polygons to run-length encoding with pycocotools."""
    parts = coco_mask.frPyObjects(annotation["segmentation"], image["height"], image["width"])
    return coco_mask.merge(parts)


def encoded(mask):
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


def corners(box):
    left, top, width, height = box
    return left, top, left + width, top + height


# Output.


@pytest.mark.long
def test_the_layout_matches_the_documentation(data_set):
    expected = {Path("shapes.json")}
    for split, count in COUNTS.items():
        expected.add(Path("annotations", f"instances_{split}.json"))
        expected |= {Path(split, f"{index:06d}.jpg") for index in range(1, count + 1)}
    assert set(snapshot(data_set)) == expected


@pytest.mark.long
def test_same_seed_gives_identical_annotations_and_pixels(data_set, tmp_path):
    again = make_shapes(tmp_path / "again", seed=0, train=40, val=4)
    for split, count in COUNTS.items():
        first, second = (annotation_file(root, split) for root in (data_set, again))
        assert first.read_bytes() == second.read_bytes()
        for index in range(1, count + 1):
            name = f"{split}/{index:06d}.jpg"
            images = [cv2.imread(str(root / name)) for root in (data_set, again)]
            np.testing.assert_array_equal(*images)


@pytest.mark.long
def test_the_number_of_images_does_not_change_them(data_set, tmp_path):
    fewer = snapshot(make_shapes(tmp_path / "fewer", seed=0, train=5, val=2))
    more = snapshot(data_set)
    images = [path for path in fewer if path.suffix == ".jpg"]
    assert len(images) == 5 + 2 + 8
    assert all(fewer[path] == more[path] for path in images)


def test_another_seed_split_or_index_gives_another_image():
    arguments = [(0, "train", 1), (1, "train", 1), (0, "val", 1), (0, "tiny", 1), (0, "train", 2)]
    assert len({render_image(*a)[0].tobytes() for a in arguments}) == len(arguments)


@pytest.mark.long
def test_written_images_equal_the_rendered_ones_except_for_jpeg(data_set, rendered):
    for index, (image, _) in rendered.items():
        # Swapped channels or images would cause a much larger difference than JPEG compression.
        written = cv2.imread(str(data_set / "train" / f"{index:06d}.jpg"))[..., ::-1]
        assert written.shape == image.shape
        assert np.abs(written.astype(int) - image).mean() < 4


@pytest.mark.parametrize("split", SHAPE_SPLITS)
@pytest.mark.long
def test_pycocotools_loads_every_split(data_set, split):
    coco = COCO(annotation_file(data_set, split))
    assert len(coco.imgs) == COUNTS[split]
    assert {k: v["name"] for k, v in coco.cats.items()} == dict(enumerate(SHAPE_CLASSES, 1))
    for image in coco.imgs.values():
        written = cv2.imread(str(data_set / split / image["file_name"]))
        assert written.shape == (image["height"], image["width"], 3)
        assert 1 <= len(coco.getAnnIds([image["id"]])) <= 6


@pytest.mark.parametrize("split", SHAPE_SPLITS)
@pytest.mark.long
def test_detectron2_loads_every_split_with_its_polygons(data_set, split):
    from detectron2.data.datasets.coco import load_coco_json

    records = load_coco_json(str(annotation_file(data_set, split)), str(data_set / split))
    written = json.loads(annotation_file(data_set, split).read_text())["annotations"]
    loaded = [annotation for record in records for annotation in record["annotations"]]
    assert len(loaded) == len(written)
    # Detectron2 removes invalid polygons, so equal counts show that all are valid.
    assert sum(len(a["segmentation"]) for a in loaded) == sum(
        len(a["segmentation"]) for a in written
    )


# Annotations.


@pytest.mark.long
def test_boxes_and_areas_match_the_visible_masks(data_set, rendered):
    coco = COCO(annotation_file(data_set, "train"))
    for index, (_, objects) in rendered.items():
        annotations = coco.loadAnns(coco.getAnnIds([index]))
        assert len(annotations) == len(objects)
        for annotation, shape in zip(annotations, objects, strict=True):
            mask = encoded(shape.mask)
            assert annotation["bbox"] == coco_mask.toBbox(mask).tolist()
            assert annotation["area"] == coco_mask.area(mask)
            assert SHAPE_CLASSES[annotation["category_id"] - 1] == shape.category
            assert annotation["iscrowd"] == 0


@pytest.mark.long
def test_keypoints_are_visible_pixels_at_the_four_edges_of_the_box(data_set, rendered):
    coco = COCO(annotation_file(data_set, "train"))
    assert coco.cats[1]["keypoints"] == ["left", "right", "top", "bottom"]
    for index, (_, objects) in rendered.items():
        annotations = coco.loadAnns(coco.getAnnIds([index]))
        for annotation, shape in zip(annotations, objects, strict=True):
            points = np.array(annotation["keypoints"]).reshape(4, 3)
            assert (points[:, 2] == 2).all()
            assert annotation["num_keypoints"] == 4
            assert shape.mask[points[:, 1], points[:, 0]].all()
            (left, right), (top, bottom) = points[:2, 0], points[2:, 1]
            assert [left, top, right + 1 - left, bottom + 1 - top] == annotation["bbox"]


@pytest.mark.long
def test_polygons_cover_the_visible_masks_and_their_boxes(data_set, rendered):
    coco = COCO(annotation_file(data_set, "train"))
    for index, (_, objects) in rendered.items():
        annotations = coco.loadAnns(coco.getAnnIds([index]))
        for annotation, shape in zip(annotations, objects, strict=True):
            assert all(len(p) >= 6 and len(p) % 2 == 0 for p in annotation["segmentation"])
            polygon = rasterised(annotation, coco.imgs[index])
            assert coco_mask.iou([polygon], [encoded(shape.mask)], [0]).item() > 0.9
            edges = [corners(box) for box in (annotation["bbox"], coco_mask.toBbox(polygon))]
            np.testing.assert_allclose(*edges, atol=1)


@pytest.mark.long
def test_visible_masks_show_one_shape_each(rendered):
    """Check that masks do not overlap, and that the pixels in each mask have one colour."""
    for image, objects in rendered.values():
        assert sum(x.mask.astype(int) for x in objects).max() == 1
        for shape in objects:
            inner = cv2.erode(shape.mask.astype(np.uint8), np.ones((3, 3))) > 0
            if inner.sum() < 50:
                continue
            hue = image[inner] / np.linalg.norm(image[inner], axis=1, keepdims=True)
            strays = np.linalg.norm(hue - np.median(hue, axis=0), axis=1) > 0.2
            assert strays.mean() < 0.05


@pytest.mark.long
def test_shapes_stand_out_from_the_background(rendered):
    for image, objects in rendered.values():
        lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
        shown = np.any([x.mask for x in objects], axis=0).astype(np.uint8)
        background = np.median(lab[cv2.dilate(shown, np.ones((9, 9))) == 0], axis=0)
        for shape in objects:
            assert np.linalg.norm(np.median(lab[shape.mask], axis=0) - background) > 20


def test_a_hole_is_left_out_of_the_polygons():
    mask = np.zeros((40, 50), bool)
    mask[5:35, 8:44] = True
    mask[10:20, 15:25] = False
    mask[24:25, 30:31] = False
    polygons = shapes._polygons(mask)
    raster = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 40, 50)))
    assert (raster != mask).sum() <= 2
    assert not raster[10:20, 15:25].any()


def test_any_mask_has_valid_polygons_that_cover_it():
    """Compare random masks with their polygons, rasterised by pycocotools.

    The masks range from scattered pixels to areas with many holes.
    """
    rng = np.random.default_rng(0)
    for density in np.linspace(0.02, 0.98, 60):
        mask = rng.random((12, 14)) < density
        polygons = shapes._polygons(mask)
        assert all(len(polygon) >= 6 for polygon in polygons)
        raster = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 12, 14)))
        assert (raster != mask).mean() < 0.1


# Difficulty.


@pytest.mark.long
def test_shapes_occlude_each_other_and_hidden_ones_are_not_annotated(rendered):
    visible = np.array([x.visible for _, objects in rendered.values() for x in objects])
    assert visible.min() >= 0.25
    assert visible.max() <= 1
    assert 0.1 < np.mean(visible < 0.9) < 0.5


@pytest.mark.long
def test_nearly_hidden_shapes_occur(rendered, monkeypatch):
    monkeypatch.setattr("senet_transfer.data.shapes.render.MIN_VISIBLE", 0.0)
    everything = sum(len(render_image(0, "train", index)[1]) for index in rendered)
    assert everything > sum(len(objects) for _, objects in rendered.values())


@pytest.mark.long
def test_sizes_and_aspects_vary(data_set):
    coco = COCO(annotation_file(data_set, "train"))
    longest = np.array([max(a["bbox"][2:]) for a in coco.anns.values()])
    assert longest.max() <= 98
    assert np.mean(longest < 32) > 0.2
    assert np.mean(longest > 64) > 0.1
    sides = np.array([(i["height"], i["width"]) for i in coco.imgs.values()])
    assert sides.min() >= 128
    assert sides.max() <= 192
    assert len(np.unique(sides[:, 0] / sides[:, 1])) > 10


@pytest.mark.long
def test_topmost_shapes_alternate_so_few_images_have_every_class(rendered):
    topmost = [objects[-1].category for _, objects in rendered.values()]
    for start in range(len(topmost) - len(SHAPE_CLASSES) + 1):
        assert set(topmost[start : start + len(SHAPE_CLASSES)]) == set(SHAPE_CLASSES)


@pytest.mark.long
def test_every_class_is_in_the_training_and_tiny_splits_evenly(data_set):
    for split in ("train", "tiny"):
        coco = COCO(annotation_file(data_set, split))
        counts = Counter(a["category_id"] for a in coco.anns.values())
        assert set(counts) == set(range(1, len(SHAPE_CLASSES) + 1))
        assert max(counts.values()) < len(coco.anns) / 2


# The output folder.


@pytest.mark.long
def test_second_call_does_nothing_and_reports_it(data_set, monkeypatch, caplog):
    def fail(*_):
        raise AssertionError("rendered again")

    monkeypatch.setattr(shapes, "render_image", fail)
    before = {path: path.stat().st_mtime_ns for path in data_set.rglob("*")}
    with caplog.at_level("INFO"):
        assert make_shapes(data_set, seed=0, train=40, val=4) == data_set
    assert "already contains" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in data_set.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("holiday.jpg", "a photograph", "holiday.jpg"),
        ("shapes.json", "{not json", "unreadable shapes.json"),
        ("shapes.json", '{"seed": 7}', "seed 7"),
        ("shapes.json", "[]", "different settings"),
    ],
)
def test_rejects_a_folder_with_other_content_and_keeps_it(tmp_path, name, content, found):
    folder = tmp_path / "shapes"
    folder.mkdir()
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=found) as caught:
        make_shapes(folder, train=1, val=1)
    assert "expected" in str(caught.value)
    assert f"Move {folder}" in str(caught.value)
    assert snapshot(tmp_path) == {Path("shapes", name): content.encode()}


def test_rejects_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "shapes").write_text("notes")
    with pytest.raises(UserError, match="is a file"):
        make_shapes(tmp_path / "shapes", train=1, val=1)
    assert (tmp_path / "shapes").read_text() == "notes"


@pytest.mark.parametrize("other", [{"seed": 1}, {"train": 3}, {"val": 2}])
@pytest.mark.long
def test_rejects_a_data_set_with_other_settings(tmp_path, other):
    settings = {"seed": 0, "train": 2, "val": 1}
    make_shapes(tmp_path / "shapes", **settings)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="different settings"):
        make_shapes(tmp_path / "shapes", **settings | other)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("lost", ["train/000002.jpg", "annotations/instances_val.json"])
@pytest.mark.long
def test_rejects_a_data_set_with_a_missing_file(tmp_path, lost):
    folder = make_shapes(tmp_path / "shapes", train=2, val=1)
    (folder / lost).unlink()
    with pytest.raises(UserError, match="1 of 2 images in train|without instances_val"):
        make_shapes(folder, train=2, val=1)


@pytest.mark.long
def test_writes_to_an_empty_folder_and_through_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "shapes").symlink_to(tmp_path / "disk")
    make_shapes(tmp_path / "shapes", train=1, val=1)
    assert (tmp_path / "shapes").is_symlink()
    assert (tmp_path / "disk" / "shapes.json").is_file()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("disk full")])
def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch, interruption):
    def interrupted(seed, split, index):
        if index == 3:
            raise interruption
        return render_image(seed, split, index)

    monkeypatch.setattr(shapes, "render_image", interrupted)
    with pytest.raises((KeyboardInterrupt, UserError)):
        make_shapes(tmp_path / "shapes", train=5, val=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_keeps_the_result_of_another_run_that_finishes_first(tmp_path, monkeypatch):
    def overtaken(seed, split, index):
        monkeypatch.setattr(shapes, "render_image", render_image)
        make_shapes(tmp_path / "shapes", train=2, val=1)
        return render_image(seed, split, index)

    monkeypatch.setattr(shapes, "render_image", overtaken)
    make_shapes(tmp_path / "shapes", train=2, val=1)
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"train": 0}, {"val": 0}])
def test_rejects_numbers_out_of_range(tmp_path, wrong):
    with pytest.raises(UserError, match="expected"):
        make_shapes(tmp_path / "shapes", **wrong)
    assert list(tmp_path.iterdir()) == []


# The command line.


def test_command_writes_below_the_data_root(tmp_path, monkeypatch, main):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    main(["--train", "1", "--val", "2", "--seed", "3"])
    settings = json.loads((tmp_path / "shapes" / "shapes.json").read_text())
    assert (settings["seed"], settings["train"], settings["val"]) == (3, 1, 2)


def test_command_shows_no_progress_without_a_terminal(tmp_path, main, capsys):
    main(["--output", str(tmp_path / "shapes"), "--train", "1", "--val", "1"])
    printed = capsys.readouterr()
    assert "image/s" not in printed.out + printed.err


def test_command_reports_a_mistake_without_a_traceback(tmp_path, main, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as end:
        main(["--output", str(tmp_path)])
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert "notes.txt" in printed
