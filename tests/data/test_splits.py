"""Property-based tests for train/val/test splits and folds, and tests of the written files."""

import csv
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from senet_transfer.cli.data import prepare
from senet_transfer.data.classification.open import open_dataset
from senet_transfer.data.splits import Split, split_images
from senet_transfer.errors import UserError
from tests.data.drawn_places import jpeg

SPLITS = st.one_of(
    st.builds(
        Split,
        val=st.sampled_from([0.1, 0.25, 0.5]),
        test=st.sampled_from([0, 0.1]),
        seed=st.just(3),
    ),
    st.builds(Split, folds=st.integers(2, 5), test=st.sampled_from([0, 0.2])),
)
repeated = settings(derandomize=True, deadline=None, database=None, max_examples=60)


def by_class(sizes, group=1):
    """Return a dict that maps each image name to a list with one class.

    The dict starts with the first image of each class, followed by the second image of each class,
    and so on.

    Args:
        sizes: Number of groups of each class.
        group: Number of images per group.
    """
    names = [(number, label) for label, size in enumerate(sizes) for number in range(size * group)]
    return {f"v{n // group}_{label}_{n}": [f"c{label}"] for n, label in sorted(names)}


def count(images, part_of):
    """Return the number of images per split or fold, in total and by class."""
    sizes = Counter(part_of.values())
    return sizes, Counter((part_of[name], label) for name in images for label in set(images[name]))


@pytest.mark.long
@given(st.lists(st.integers(25, 60), min_size=1, max_size=6), st.integers(1, 3), SPLITS)
@repeated
def test_parts_and_their_classes_have_the_requested_sizes(sizes, group, split):
    images = by_class(sizes, group)
    pattern = r"(v\d+_\d+)_" if group > 1 else ""
    split = Split(split.val, split.test, split.folds, split.seed, pattern)
    part_of = split_images(images, split)
    assert list(part_of) == list(images)
    totals, found = count(images, part_of)
    assert set(totals) == set(split.fractions())
    for part, fraction in split.fractions().items():
        assert abs(totals[part] - fraction * len(images)) < 1.5 * group
        for label, size in enumerate(sizes):
            assert abs(found[part, f"c{label}"] - fraction * size * group) < 2 * group
    groups = {(name.rpartition("_")[0], part) for name, part in part_of.items()}
    assert group == 1 or len(groups) == sum(sizes)
    # The split depends on the seed, but not on the order of the files.
    assert split_images(dict(reversed(images.items())), split) == part_of
    other = Split(split.val, split.test, split.folds, 1 + split.seed, pattern)
    assert split_images(images, other) != part_of


@given(st.lists(st.integers(1, 5), min_size=2, max_size=12).filter(lambda sizes: max(sizes) > 1))
@repeated
@pytest.mark.long
def test_every_class_with_two_images_is_in_train_and_val(sizes):
    images = by_class(sizes)
    _, found = count(images, split_images(images, Split(val=0.1)))
    for label, size in enumerate(sizes):
        assert found["train", f"c{label}"] >= 1
        assert (found["val", f"c{label}"] >= 1) == (size >= 2)
    if max(sizes) < 3:
        return
    _, found = count(images, split_images(images, Split(val=0.1, test=0.5)))
    for label, size in enumerate(sizes):
        for rank, part in enumerate(("train", "val", "test")):
            assert (found[part, f"c{label}"] > 0) == (size > rank)
    _, found = count(images, split_images(images, Split(folds=3)))
    for label, size in enumerate(sizes):
        folds = [found[f"fold{fold}", f"c{label}"] for fold in range(3)]
        assert sorted(folds) == ([0, 0, 0] if size == 1 else sorted(_dealt(size, 3)))
        assert found["train", f"c{label}"] == (size == 1)


def _dealt(size, folds):
    return [size // folds + (fold < size % folds) for fold in range(folds)]


@given(st.lists(st.sets(st.sampled_from("abcde"), max_size=3), min_size=5, max_size=8))
@repeated
@pytest.mark.long
def test_images_of_several_classes_are_split_as_well_as_by_trying_all_splits(objects):
    images = {f"{number}.jpg": sorted(labels) for number, labels in enumerate(objects)}
    numbers = Counter(label for labels in objects for label in labels)

    def missing(part_of):
        _, found = count(images, part_of)
        train = sum(not found["train", label] for label in numbers)
        return train, sum(number > 1 and not found["val", c] for c, number in numbers.items())

    assume(any(number > 1 for number in numbers.values()))
    found = missing(split_images(images, Split(val=0.4)))
    parts = itertools.product(("train", "val"), repeat=len(images))
    assert found == min(missing(dict(zip(images, choice, strict=True))) for choice in parts)


def test_single_frames_and_frames_of_videos_are_kept_together(caplog):
    images = {f"cam{video}/{frame}.jpg": ["a"] for video in range(4) for frame in range(3)}
    images |= {"cover.jpg": ["a"]}
    part_of = split_images(images, Split(val=0.25, group_by=r"cam\d+"))
    for video in range(4):
        assert len({part_of[f"cam{video}/{frame}.jpg"] for frame in range(3)}) == 1
    assert "doesn't match 1 of 13 file names. These images are not grouped: cover" in caplog.text


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"val": 0.0}, "--val is 0.0"),
        ({"val": 0.7, "test": 0.3}, "whose sum is below 1"),
        ({"folds": 1}, "two or more folds"),
        ({"folds": 4}, "no images are left for fold3"),
        ({"group_by": "("}, "not a valid regular expression"),
        ({"group_by": "frame"}, "matches none of the 3 file names: 1.jpg"),
        ({"group_by": "jpg"}, "3 images that belong to 1 groups: no images are left for val"),
    ],
)
def test_a_split_that_is_impossible_is_rejected(options, complaint):
    with pytest.raises(UserError, match=complaint):
        split_images({"1.jpg": ["a"], "2.jpg": ["a"], "3.jpg": ["a"]}, Split(**options))


def test_the_files_of_a_coco_split_contain_all_objects_once(shared_data, tmp_path, capsys, caplog):
    source = shared_data / "coco128" / "annotations" / "instances_train2017.json"
    prepare("split", [str(source), "--output", str(tmp_path), "--test", "0.1"])
    printed = capsys.readouterr().out
    whole = COCO(source)
    parts = [COCO(tmp_path / f"{part}.json") for part in ("train", "val", "test")]
    for part in parts:
        assert part.dataset["categories"] == whole.dataset["categories"]
    assert sorted(sum((part.getImgIds() for part in parts), [])) == sorted(whole.getImgIds())
    assert sorted(sum((part.getAnnIds() for part in parts), [])) == sorted(whole.getAnnIds())
    images = {number: set(whole.getImgIds(catIds=number)) for number in whole.getCatIds()}
    only = set().union(*(members for members in images.values() if len(members) == 1))
    for category in whole.loadCats(whole.getCatIds()):
        members = images[category["id"]]
        found = [len(part.getImgIds(catIds=category["id"])) for part in parts]
        assert sum(found) == len(members)
        assert found[0] or not members
        # The only image of a class must be in train.
        assert bool(found[1]) == (len(members) > 1 and not members <= only)
        numbers = [len(part.getAnnIds(catIds=category["id"], iscrowd=False)) for part in parts]
        row = [category["name"], *map(str, numbers), str(sum(numbers))]
        assert " ".join(row) in " ".join(printed.split())
    assert "8 classes have no images in val: horse, bear, skis, banana, sand" in caplog.text


@pytest.mark.long
def test_imported_data_is_split_unless_it_states_its_splits(shared_data, tmp_path, capsys):
    options = ["--from", "voc", "--output", str(tmp_path / "out"), "--val", "0.25"]
    with pytest.raises(SystemExit):
        prepare("import", ["--source", str(shared_data / "bccd"), *options])
    assert "already contains the splits train, val, test" in capsys.readouterr().err
    for name in ("Annotations", "JPEGImages"):
        (tmp_path / name).symlink_to(shared_data / "bccd" / name)
    prepare("import", ["--source", str(tmp_path), *options])
    parts = [
        json.loads((tmp_path / "out" / f"{part}.json").read_text()) for part in ("train", "val")
    ]
    names = [{image["file_name"] for image in part["images"]} for part in parts]
    assert len(names[0] | names[1]) == len(names[0]) + len(names[1]) == 364
    assert len(names[1]) == pytest.approx(0.25 * 364, abs=2)
    text = [path.read_text() for path in (tmp_path / "Annotations").iterdir()]
    for category in parts[0]["categories"]:
        tag = f"<name>{category['name']}</name>"
        total = sum(part.count(tag) for part in text)
        counts = [
            sum(item["category_id"] == category["id"] for item in part["annotations"])
            for part in parts
        ]
        assert sum(counts) == total
        assert counts[1] / total == pytest.approx(0.25, abs=0.03)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        prepare("import", ["--source", str(tmp_path), *options[:4], "--test", "0.1"])
    assert "--test and --group-by require --val or --folds" in capsys.readouterr().err


@pytest.fixture
def tree(tmp_path):
    for label, size in (("a", 6), ("b c", 6), ("d", 1)):
        (tmp_path / "tree" / label).mkdir(parents=True)
        for number in range(size):
            data = jpeg(ord(label[0]) + 7 * number, (32, 32))
            (tmp_path / "tree" / label / f"{number}.jpg").write_bytes(data)
    return tmp_path / "tree"


def samples(path, classes):
    dataset = open_dataset(path, classes=classes)
    found = [dataset.read_sample(index) for index in range(len(dataset))]
    return sorted((classes[sample.label], sample.data) for sample in found)


def test_folds_of_a_folder_and_of_its_csv_file_contain_each_image_once(tree, tmp_path, capsys):
    classes = open_dataset(tree).classes
    expected = samples(tree, classes)
    # The output is behind a symbolic link, so ".." is not the folder that contains the link.
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    prepare("split", [str(tree), "--output", str(tmp_path / "link" / "folds"), "--folds", "3"])
    assert "images  1 (7.7%)  4 (30.8%)  4 (30.8%)  4 (30.8%)     13" in capsys.readouterr().out
    folds = tmp_path / "elsewhere" / "deep" / "folds"
    parts = [[samples(folds / f"fold{n}_{part}.csv", classes) for part in ("train", "val")]
             for n in range(3)]  # fmt: skip
    assert all(sorted(train + val) == expected for train, val in parts)
    assert sorted(sum((val for _, val in parts), [])) == [row for row in expected if row[0] != "d"]
    source = folds / "fold0_train.csv"
    prepare("split", [str(source), "--output", str(tmp_path / "again"), "--val", "0.5"])
    both = [samples(tmp_path / "again" / f"{part}.csv", classes) for part in ("train", "val")]
    assert sorted(sum(both, [])) == parts[0][0]
    with open(tmp_path / "again" / "train.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "label"]
    assert not any(Path(path).is_absolute() for path, _ in rows[1:])


def test_existing_files_and_other_data_are_rejected(tree, tmp_path, capsys):
    (tmp_path / "val.csv").write_text("mine")
    (tmp_path / "list.json").write_text(json.dumps({"images": []}))
    (tmp_path / "blank" / "a ").mkdir(parents=True)
    (tmp_path / "blank" / "a " / "1.jpg").write_bytes(b"x")
    for source, complaint in {
        tree: f"already exist: {tmp_path / 'val.csv'}",
        tmp_path / "missing": "(missing); expected a JSON file",
        tmp_path / "list.json": "list.json contains an empty `images` list",
        tmp_path / "val.csv": "line 1: the header has 0 columns named path",
        tmp_path / "blank": "expected UTF-8 without leading or trailing spaces",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            prepare("split", [str(source), "--output", str(tmp_path)])
        assert stopped.value.code == 2
        assert complaint in capsys.readouterr().err
    assert (tmp_path / "val.csv").read_text() == "mine"
    assert not (tmp_path / "train.csv").exists()
